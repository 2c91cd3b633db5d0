"""Read and write the header of a safetensors file, strictly by the format.

The format (safetensors README, "Format", and `safetensors/src/tensor.rs`): 8 bytes little-endian length N, then N
bytes of UTF-8 JSON that begin with `{` and may end in spaces, then the data. Each tensor's `data_offsets` are
relative to the data; sorted, they are contiguous from 0 to the end of the file, without hole or overlap.
We are stricter than the reference reader where it lets a duplicate name through (the last would win).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from json.encoder import encode_basestring
from operator import mul
from typing import Any, Final

from ..errors import FormatError, quote
from . import dtypes

MAX_HEADER_BYTES: Final = 100_000_000
"""The limit that the format itself sets."""

PAGE: Final = 4096
"""Headers are padded to a multiple of this, so that large tensors lie at page boundaries."""

MAX_DIMS: Final = 64

_ENTRY: Final = {"dtype", "shape", "data_offsets"}
"""What the header says of a tensor."""

_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that may stand for half a character, which UTF-8 cannot hold."""


_MINUS_ZERO: Final = re.compile(r"-0(?<![^\[,:\s]-0)")
"""Where a number may be -0; most texts have it only within names. It looks back, since a search for plain text is fast."""


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    stop: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself."""

    nbytes: int
    """Bytes before the data: 8 and the JSON."""
    metadata: Mapping[str, str]
    tensors: Mapping[str, Span]
    """In the order of their bytes."""


def loads_strict(text: str, *, where: str, infinity: bool = False) -> Any:
    """Parse JSON, refusing duplicate keys, absurd nesting, NaN and, unless told otherwise, Infinity.

    Args:
        text: The JSON.
        where: What it is, for messages.
        infinity: Take Infinity and -Infinity.

    Raises:
        FormatError: For other text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: the key {quote(twice)} stands twice in one object")
        return found

    def constant_of(constant: str) -> float:
        if infinity and constant != "NaN":
            return float(constant)
        raise FormatError(f"{where}: {constant} is not JSON")

    def integer(digits: str) -> int:
        if digits == "-0":  # serde_json, which the reference reader uses, takes it for a float
            raise FormatError(f"{where}: -0 is not an integer")
        return int(digits)

    hook = integer if _MINUS_ZERO.search(text) else None  # a hook is slow
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant_of, parse_int=hook)
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:  # also an integer with more digits than Python converts
        raise FormatError(f"{where}: not JSON: {quote(error)}") from None


def is_size(value: object) -> bool:
    """Whether `value` is an int (and not a bool) from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value <= dtypes.MAX_ELEMENTS


def header_length(first8: bytes, file_size: int, *, where: str) -> int:
    """Bytes of JSON that a header declares, checked against the file before anyone allocates them.

    Args:
        first8: First eight bytes of the file.
        file_size: Bytes of the file.
        where: The file, for messages.

    Raises:
        FormatError: Where it is more than the format allows, or than the file has.
    """
    if len(first8) < 8:
        raise FormatError(
            f"{where}: truncated: a safetensors file has at least 8 bytes, this one {file_size}"
        )
    length = int.from_bytes(first8, "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{where}: the header claims {length} bytes, more than the format's {MAX_HEADER_BYTES}; not a safetensors file?"
        )
    if 8 + length > file_size:
        raise FormatError(f"{where}: truncated: the header claims {length} bytes, the file has {file_size}")
    return length


def parse_header(raw: bytes, file_size: int, *, where: str) -> Header:
    """Parse the header of a safetensors file.

    Args:
        raw: First 8 + N bytes of the file.
        file_size: Bytes of the file.
        where: The file, for messages.

    Raises:
        FormatError: On any breach of the format.
    """
    length = header_length(raw[:8], file_size, where=where)
    if len(raw) != 8 + length:
        raise FormatError(f"{where}: truncated: expected a header of {8 + length} bytes, found {len(raw)}")
    if raw[8:9] != b"{":
        raise FormatError(f"{where}: the header does not begin with '{{'; not a safetensors file?")
    try:
        text = raw[8:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: the header is not UTF-8 at byte {8 + error.start}") from None
    fields = loads_strict(text, where=f"{where}: header")
    if _SURROGATE.search(text):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FormatError(f"{where}: the header holds half a surrogate pair; it is not Unicode") from None
    metadata = fields.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the reference reader takes null too
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    spans = {name: _span(name, entry, 8 + length, sizes, where=where) for name, entry in fields.items()}
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 8 + length
    for name, span in ordered.items():
        if span.start != end:
            kind = "overlaps the tensor before it" if span.start < end else "leaves a hole before it"
            raise FormatError(
                f"{where}: tensor {quote(name)} {kind}: begins at byte {span.start}, expected {end}"
            )
        end = span.stop
    if end != file_size:
        kind = "truncated" if file_size < end else "has trailing bytes"
        raise FormatError(f"{where}: {kind}: the header accounts for {end} bytes, the file has {file_size}")
    return Header(8 + length, metadata, ordered)


def _span(
    name: str, entry: Any, base: int, sizes: dict[tuple[str, tuple[int, ...]], int], *, where: str
) -> Span:
    """`sizes` keeps the bytes of each dtype and shape that were found to be right."""
    try:
        return _checked(entry, base, sizes)
    except FormatError as error:
        raise FormatError(f"{where}: tensor {quote(name)}: {error}") from None


def _checked(entry: Any, base: int, sizes: dict[tuple[str, tuple[int, ...]], int]) -> Span:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise FormatError("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise FormatError(f"unknown dtype {quote(dtype)}; known are {', '.join(dtypes.BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_size, shape)):
        raise FormatError(f"shape must be a list of at most {MAX_DIMS} sizes")
    own = tuple(shape)
    size = sizes.get((dtype, own))
    if size is None:
        if not all(map(is_size, accumulate(shape, mul))):
            raise FormatError(f"{quote(shape)} is larger than any file")
        size = dtypes.nbytes(dtype, own)
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise FormatError("data_offsets must be [begin, end] with begin <= end")
    start, stop = offsets
    if not is_size(start) or not is_size(stop) or start > stop:
        raise FormatError("data_offsets must be [begin, end] with begin <= end")
    if size != stop - start:
        raise FormatError(f"{dtype} {shape} takes {size} bytes, data_offsets hold {stop - start}")
    sizes[dtype, own] = size
    return Span(dtype, own, base + start, base + stop)


def read_header(fd: int, *, where: str) -> tuple[bytes, Header]:
    """Read the header of an open safetensors file.

    Args:
        fd: The file.
        where: It, for messages.

    Returns:
        The header's bytes, and what they say.

    Raises:
        FormatError: On any breach of the format.
    """
    size = os.fstat(fd).st_size
    length = header_length(os.pread(fd, 8, 0), size, where=where)
    raw = os.pread(fd, 8 + length, 0)
    return raw, parse_header(raw, size, where=where)


def list_text(numbers: Sequence[int]) -> str:
    """JSON of a list of numbers, without spaces."""
    return f"[{','.join(map(str, numbers))}]"


def dump_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Write the header of a file, padded with spaces to a multiple of PAGE.

    Args:
        tensors: Name -> dtype and shape, in the order of their data, which have no holes.
        metadata: What `__metadata__` is to say; empty: there is none.

    Raises:
        FormatError: Where the format could not hold it.
    """
    # written out rather than by json.dumps: a large model has a million pieces, and there would be objects for each
    fields = [metadata_text(metadata)] if metadata else []
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtypes.nbytes(dtype, shape)
        fields.append(tensor_text(encode_basestring(name), dtype, shape, start, end))
    text = f"{{{','.join(fields)}}}".encode()
    padded = padded_size(len(text)) - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


def metadata_text(metadata: Mapping[str, str]) -> str:
    """How a header begins that has `__metadata__`."""
    own = json.dumps(dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False)
    return f'"__metadata__":{own}'


def tensor_text(key: str, dtype: str, shape: Sequence[int], start: int, stop: int) -> str:
    """How a header lists a tensor.

    Args:
        key: Its name, as JSON.
        dtype: Its dtype.
        shape: Its shape.
        start: First byte of its data.
        stop: Where they end (exclusive).
    """
    return f'{key}:{{"dtype":"{dtype}","shape":{list_text(shape)},"data_offsets":[{start},{stop}]}}'


def padded_size(length: int) -> int:
    """Bytes of a header whose JSON has `length`. Raises FormatError where the format could not hold it."""
    size = -(-(8 + length) // PAGE) * PAGE
    if size - 8 > MAX_HEADER_BYTES:
        raise FormatError(
            f"a header of {size - 8} bytes is more than the format's {MAX_HEADER_BYTES}; use smaller parts"
        )
    return size
