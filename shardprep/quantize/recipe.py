"""Say how a checkpoint is to be quantized, and settle what the user left open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shardprep_runtime.errors import InputError, UnsupportedError, quote

from ..index import Index
from ..layout import Scheme
from ..layout.quantization import BITS
from ..layout.rules import text_config
from ..model.describe import scheme_of

SAMPLES: Final = 128

LENGTH: Final = 512
"""Tokens of a calibration sequence, where the model takes so many; AutoAWQ's default."""

BATCH: Final = 8
"""Sequences that an engine computes together."""

CLASSIC: Final = ("gptq", "awq")
"""Methods, which are also the formats, that GPTQModel, vLLM and transformers know by these names."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantize."""

    method: str
    """`gptq` or `awq`."""
    bits: int = 4
    group_size: int = 128
    """Numbers of a row that share a scale; -1: all of them."""
    symmetric: bool | None = None
    """Whether scales alone are kept, and no zero points; None: GPTQ does, AWQ does not, as engines expect."""
    act_order: bool = False
    """GPTQ: whether inputs are put into groups in the order of their activations (desc_act)."""
    skip: tuple[str, ...] = ()
    """Linears of the layers that stay as they are: names, parts of names, or patterns behind `re:`."""
    tensor_parallel_size: int | None = None
    """Ranks that must be able to share the result; None: not asked."""
    pad_to_tp: int | None = None
    """Ranks for which MLPs are made longer, with zeros, so that they can share the result."""
    device: str = "cpu"
    dtype: str | None = None
    """In which the model is computed and its other tensors are written; None: its own, float16 for AWQ."""
    calibration: str | Path | None = None
    """As `read_calibration` takes it."""
    samples: int = SAMPLES
    length: int | None = None
    """Tokens of a calibration sequence; None: 512, or as many as the model takes."""
    column: str = "text"
    seed: int = 0
    batch_size: int = BATCH

    @property
    def group(self) -> int | None:
        return self.group_size if self.group_size > 0 else None


def settle(recipe: Recipe, index: Index) -> tuple[Recipe, Scheme]:
    """The recipe without open questions, and the scheme that it leads to.

    Args:
        recipe: As the user gave it.
        index: The checkpoint that is to be quantized.

    Raises:
        InputError: For what no engine could do.
    """
    if not index.config:
        raise InputError(
            f"{index.folder.where()}: no config.json, which says what architecture the tensors belong to"
        )
    already = scheme_of(index)
    if already is not None:
        raise InputError(
            f"{index.folder.where()}: quantized already ({already.method}, {already.bits} bits); "
            "quantize the original"
        )
    method = recipe.method
    if method not in CLASSIC:
        raise InputError(f"{quote(method)}: methods are gptq and awq")
    if recipe.bits not in BITS[method]:
        raise UnsupportedError(
            f"{method} of {recipe.bits} bits; expected {' or '.join(map(str, BITS[method]))}"
        )
    if recipe.group_size == 0 or recipe.group_size < -1:
        raise InputError(f"groups of {recipe.group_size} numbers: at least 1, or -1 for a whole row")
    if recipe.act_order and method == "awq":
        raise InputError("AWQ knows no act-order; it is a way of GPTQ")
    symmetric = recipe.symmetric if recipe.symmetric is not None else method == "gptq"
    own = text_config(index.config)
    named = str(own.get("dtype") or own.get("torch_dtype") or "").removeprefix("torch.")
    dtype = recipe.dtype
    if dtype is None:
        dtype = "float16" if method == "awq" else named if named in ("float16", "bfloat16") else "bfloat16"
    settled = replace(recipe, symmetric=symmetric, dtype=dtype)
    return settled, Scheme(method, recipe.bits, recipe.group, symmetric, recipe.act_order)
