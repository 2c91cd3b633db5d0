"""Make tensors of mapped bytes: a view of them where the worker's tensor is one piece, a joined copy otherwise."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Final

from . import dtypes
from .errors import UnsupportedError, quote
from .parts import OpenPart, PieceSpan, byte_range
from .view import TensorView

if TYPE_CHECKING:
    import torch

IOV_MAX: Final = 1024
"""Buffers that one preadv takes (POSIX's and Linux's limit)."""

SMALL: Final = 64 * 2**10
"""Copies below this many bytes are not worth pages of their own."""

Located = Sequence[tuple[OpenPart, PieceSpan]]
"""Where the piece of each take of a TensorView lies, in their order."""


def is_mapped(view: TensorView, located: Located) -> bool:
    """Whether the tensor can be handed out as it lies in its part: one run of bytes, aligned for its dtype."""
    if len(located) != 1:
        return False
    start, _ = byte_range(view.form, located[0][1], view.takes[0])
    return (located[0][1].span.start + start) % (max(dtypes.BITS[view.form.dtype], 8) // 8) == 0


def memory_of(view: TensorView, located: Located) -> memoryview:
    """The tensor's packed bytes: of the mapping itself where `is_mapped`, else of memory of its own."""
    if view.nbytes == 0:
        return memoryview(bytearray())
    if is_mapped(view, located):
        part, piece = located[0]
        start, stop = byte_range(view.form, piece, view.takes[0])
        return memoryview(part.map)[piece.span.start + start : piece.span.start + stop]
    size = view.nbytes
    joined = _allocate(size)
    dim = view.form.layout.dim or 0
    rows = prod(view.shape[:dim])
    row = size // rows
    at = 0  # of the take within a row
    for (part, piece), take in zip(located, view.takes, strict=True):
        start, stop = byte_range(view.form, piece, take)
        width = (stop - start) // rows
        _scatter(part, piece.span.start + start, joined, at=at, width=width, row=row)
        at += width
    return joined


def _allocate(size: int) -> memoryview:
    """Zeroed memory of this process alone: Python's default would share it with children after a fork."""
    if size < SMALL:
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _scatter(part: OpenPart, offset: int, into: memoryview, *, at: int, width: int, row: int) -> None:
    """Read packed rows of `width` bytes from `offset` on into bytes [at, at + width) of each `row` bytes of `into`.

    The kernel puts them in place: no byte passes through a buffer of ours.
    """
    if width == row:
        part.read_into(offset, into)
        return
    starts = iter(range(at, len(into), row))
    while batch := [into[start : start + width] for start in islice(starts, IOV_MAX)]:
        got = os.preadv(part.fd, batch, offset)
        if got != len(batch) * width:  # a read may be cut short, by a signal say: finish it row by row
            for i, target in enumerate(batch):
                part.read_into(offset + i * width, target)
        offset += len(batch) * width


def tensor_of(view: TensorView, memory: memoryview) -> torch.Tensor:
    """A torch tensor over `memory`, which it keeps alive; no byte is copied or touched."""
    import torch

    shape = view.shape
    name = dtypes.TORCH.get(view.form.dtype)
    dtype = getattr(torch, name, None) if name else None
    if dtype is None:
        raise UnsupportedError(
            f"{quote(view.name)}: torch {torch.__version__} has no dtype for {view.form.dtype}; use memory() instead"
        )
    if view.form.dtype == "F4":  # torch counts pairs
        shape = (*shape[:-1], shape[-1] // 2)
    if not len(memory):
        return torch.empty(shape, dtype=dtype)
    # frombuffer knows only torch's older dtypes on some versions; bytes are known to all
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
