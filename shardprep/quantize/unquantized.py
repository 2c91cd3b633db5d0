"""Give the tensors of a checkpoint as they were before it was quantized: names and shapes from headers, values when read.

Imports torch: nothing imports this module before a model is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from shardprep_runtime.errors import FormatError, UnsupportedError, quote
from shardprep_runtime.format import dtypes

from ..index import Index, Tensor
from ..layout.quantization import Scheme
from ..model.describe import scheme_of
from ..source.bytes import Sources, open_reader
from .packing import FIELDS, PACKED, dequantize

CHUNK: Final = 4 * 2**20
"""Bytes of a tensor that are read at a time."""

NEEDED: Final = {
    "gptq": ("qzeros", "scales"),
    "awq": ("qzeros", "scales"),
    "compressed-tensors": ("weight_scale",),
}
"""Method -> the fields that are always beside the packed numbers."""


class Unquantized:
    """The tensors of a checkpoint that is quantized by gptq, awq or pack-quantized, or not at all. Close it.

    Raises:
        UnsupportedError: For another quantization.
        FormatError: Where a packed weight lacks what it stands with.
    """

    def __init__(self, index: Index) -> None:
        self._scheme = _scheme(index)
        self._fields = _fields(index, self._scheme)
        self._sources = Sources(index)
        self.names = list(self._fields)
        """Those of the tensors before they were quantized."""

    def stored(self, name: str) -> Tensor | None:
        """The tensor as it lies in the checkpoint; None where it is quantized."""
        return self._fields[name].get("")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape before the tensor was quantized, out x in of a packed weight."""
        stored = self.stored(name)
        if stored is not None:
            return stored.shape
        assert self._scheme is not None, "a tensor without a scheme is stored as it is"
        return _unpacked_shape(self._fields[name], self._scheme)

    def read(self, name: str) -> torch.Tensor:
        """The values: as they are stored, or in float32 where they are dequantized."""
        stored = self.stored(name)
        if stored is not None:
            return self._whole(stored)
        assert self._scheme is not None, "a tensor without a scheme is stored as it is"
        fields = {field: self._whole(each) for field, each in self._fields[name].items()}
        return dequantize(fields, self._scheme)

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a stored tensor. All of it is read, so that its checksum is checked.

        Args:
            name: As for `stored`, which gives it.
            rows: Their numbers, ascending.
        """
        tensor = self._fields[name][""]
        row = tensor.nbytes // max(tensor.shape[0], 1)
        memory = torch.empty(len(rows), row, dtype=torch.uint8)
        wanted = iter(enumerate(rows))
        place, number = next(wanted, (0, None))
        for start, chunk in self._chunks(tensor, max(CHUNK // max(row, 1), 1) * row):
            piece = torch.frombuffer(chunk, dtype=torch.uint8).view(-1, row)
            first = start // row
            while number is not None and number < first + len(piece):
                memory[place] = piece[number - first]
                place, number = next(wanted, (0, None))
        return memory.view(_dtype(tensor)).view(len(rows), *tensor.shape[1:])

    def check_unchanged(self) -> None:
        """Raises SourceError where a file has changed since it was indexed."""
        self._sources.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        self._sources.__exit__(None, None, None)

    def _whole(self, tensor: Tensor) -> torch.Tensor:
        memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        into = memoryview(memory.numpy())  # type: ignore[arg-type]
        for start, chunk in self._chunks(tensor, CHUNK):
            into[start : start + len(chunk)] = chunk
        return memory.view(_dtype(tensor)).view(tensor.shape)

    def _chunks(self, tensor: Tensor, size: int) -> Iterator[tuple[int, memoryview]]:
        """The bytes of a tensor in order, each chunk with the byte at which it begins."""
        reader = open_reader(self._sources, tensor, tensor.dtype)
        for start in range(0, tensor.nbytes, size or 1):
            yield start, reader.read(start, min(start + size, tensor.nbytes))
        reader.finish()


def _fields(index: Index, scheme: Scheme | None) -> dict[str, dict[str, Tensor]]:
    """Name before quantization -> its fields; a tensor that is stored as it is lies under the name "" alone."""
    tensors = {**index.tensors, **{alias: index.tensors[name] for alias, name in index.aliases.items()}}
    if scheme is None:
        return {name: {"": tensor} for name, tensor in tensors.items()}
    packed = PACKED[scheme.method]
    stems = {name.removesuffix(f".{packed}") for name in tensors if name.endswith(f".{packed}")}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, field = name.rpartition(".")
        if stem in stems and field in FIELDS:
            found.setdefault(f"{stem}.weight", {})[field] = tensor
        else:
            found[name] = {"": tensor}
    for stem in stems:
        missing = [field for field in NEEDED[scheme.method] if field not in found[f"{stem}.weight"]]
        if missing:
            raise FormatError(
                f"{index.folder.where()}: {quote(stem)} has no {missing[0]}, without which its packed weight "
                f"({scheme.method}) stands for nothing; is the checkpoint whole?"
            )
    return found


def _unpacked_shape(fields: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, ...]:
    """Out x in of the weight that packed fields stand for."""
    shape = fields[PACKED[scheme.method]].shape
    if len(shape) != 2:
        raise FormatError(
            f"{quote(fields[PACKED[scheme.method]].name)}: a packed weight of shape {list(shape)}; expected 2 dims"
        )
    words = 32 // scheme.bits
    match scheme.method:
        case "gptq":  # in / words x out
            return shape[1], shape[0] * words
        case "awq":  # in x out / words
            return shape[1] * words, shape[0]
    columns = shape[1] * words
    if scheme.group is not None:  # the last word of a row may be filled up
        columns = min(columns, fields["weight_scale"].shape[-1] * scheme.group)
    return shape[0], columns


def _scheme(index: Index) -> Scheme | None:
    """How a checkpoint is quantized; None where it is not. Raises UnsupportedError for what cannot be dequantized."""
    scheme = scheme_of(index)
    if scheme is not None and (
        scheme.method not in PACKED
        or (scheme.method == "compressed-tensors" and scheme.format != "pack-quantized")
    ):
        raise UnsupportedError(
            f"{index.folder.where()}: quantized by {quote(scheme.method)} ({quote(scheme.format)}); quality is measured "
            "of gptq, awq and compressed-tensors' pack-quantized, and of what is not quantized"
        )
    return scheme


def _dtype(tensor: Tensor) -> torch.dtype:
    name = dtypes.TORCH.get(tensor.dtype)
    if name is None or not hasattr(torch, name) or dtypes.BITS[tensor.dtype] < 8:
        raise UnsupportedError(f"{quote(tensor.name)}: torch has no dtype {tensor.dtype}; it cannot be run")
    found: torch.dtype = getattr(torch, name)
    return found
