"""Say how wide each dtype is and what torch calls it. The one table of dtypes of the project.

Names are those of the safetensors format (safetensors 0.8, `safetensors/src/tensor.rs`, `enum Dtype`).
"""

from __future__ import annotations

from math import prod
from typing import Final

from ..errors import FormatError, quote

BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element."""

TORCH: Final[dict[str, str]] = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",  # one torch element holds two of ours: the last dim is halved
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""The attribute of `torch` that is the same dtype. The F6 kinds have none."""

MAX_ELEMENTS: Final = 2**63 - 1


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a packed row-major tensor.

    Args:
        dtype: A name in BITS.
        shape: Its sizes.

    Raises:
        FormatError: Where it does not end at a byte.
    """
    bits = prod(shape) * BITS[dtype]
    if bits % 8:
        raise FormatError(f"a {dtype} tensor of shape {list(shape)} does not end at a byte boundary")
    return bits // 8


def check_dtype(dtype: object, *, where: str) -> str:
    """Have a dtype be one that is known.

    Args:
        dtype: Its name, as a file has it.
        where: What has it, for the message.

    Raises:
        FormatError: For another name.
    """
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{where}: unknown dtype {quote(dtype)}; known are {', '.join(BITS)}")
    return dtype
