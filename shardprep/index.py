"""Say what a checkpoint holds, without its data: each tensor's name, dtype, shape and where its bytes lie.

An index looks the same whatever tool made the checkpoint. Everything that follows is planned from it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from shardprep_runtime.format.dtypes import nbytes

from .files import Folder

CASTABLE: Final = ("F64", "F32", "F16", "BF16")
"""The dtypes that `--dtype` changes into one another. Others (integers, fp8) carry meaning in their bits and are kept."""


@dataclass(frozen=True, slots=True)
class Record:
    """A run of bytes of a source file that carries a checksum of its own: the data of one member of a zip."""

    start: int
    """First byte, counted from the start of the file."""
    stop: int
    """One past the last byte."""
    crc32: int


@dataclass(frozen=True, slots=True)
class Extent:
    """The place of a block of a tensor in one source file; or a block of zeros, which lies in no file."""

    file: str
    """Path relative to the checkpoint's folder; empty where the block is zeros."""
    offset: int
    """Byte of the block's element (0, ..., 0), counted from the start of the file."""
    start: int = 0
    """First index of the block along the tensor's `dim`."""
    stop: int | None = None
    """One past the last index of the block along `dim`; None where the block is the whole tensor."""
    strides: tuple[int, ...] | None = None
    """Elements from one index to the next, per dim; None: packed row-major."""
    big_endian: bool = False
    record: Record | None = None
    """The record that holds the block's bytes, where its file has checksums."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    """The dtype as safetensors names it: BF16, F32, I32."""
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    """The tensor's blocks in order along `dim`. Only a shard set or padding makes more than one."""
    dim: int = 0
    """The dim along which the extents join."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor once packed."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that holds tensor data."""

    path: str
    """Path relative to the checkpoint's folder."""
    size: int
    """Bytes of the file."""
    version: str
    """Changes when the file does: its time of modification, or the ETag of an object."""
    digest: str
    """`sha256:...` of what describes the data: a safetensors header, or the pickle and the directory of a zip
    (which holds the crc32 of every record)."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something beside the weights that is not carried over."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Index:
    """The contents of a checkpoint, without tensor data."""

    folder: Folder
    kind: str
    """`torch`, `safetensors` or `shard set`."""
    tensors: Mapping[str, Tensor]
    """Name -> tensor, in the order of names. A tied tensor stands here once, under the first of its names."""
    aliases: Mapping[str, str]
    """Other names of tied tensors -> the name in `tensors`."""
    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """The parsed config.json; empty where there is none."""
    edited: bool = False
    """Whether `config` differs from the file. It is then written anew when the side files are copied."""
    side_files: tuple[str, ...] = ()
    """Files that travel with the weights (config, tokenizer, licence), relative to the folder."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Make a sort key that puts layer 2 before layer 10."""
    return tuple(map(_natural_word, name.split(".")))


@lru_cache(maxsize=4096)
def _natural_word(word: str) -> tuple[bool, int, str]:
    number = word.isascii() and word.isdigit() and len(word) < 19
    return (True, int(word), word) if number else (False, 0, word)
