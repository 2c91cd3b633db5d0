"""Make tensors of mapped bytes: a view of them where the worker's tensor is one piece, a joined copy otherwise."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from ..errors import UnsupportedError, quote
from ..format import dtypes
from ..format.view import Stripes, TensorView
from .parts import OpenPart, PieceSpan

if TYPE_CHECKING:
    import torch

IOV_MAX: Final = 1024
"""Buffers that one preadv takes (POSIX's and Linux's limit)."""

WIDE: Final = 16 * 2**10
"""Where this many unwanted bytes lie between rows, each row is read by itself; fewer are read along and dropped."""

SMALL: Final = 64 * 2**10
"""Bytes of a copy from which on it gets pages of its own."""

Located = Sequence[tuple[OpenPart, PieceSpan]]
"""Where the piece of each take of a TensorView lies, in the order of its takes."""


def is_mapped(view: TensorView, located: Located) -> bool:
    """Whether a tensor can be handed out as it lies in its part: one run of bytes, aligned for its dtype.

    Args:
        view: The tensor as the worker holds it.
        located: Where its pieces lie.
    """
    if len(located) != 1 or view.stripes[0].count != 1:
        return False
    start = located[0][1].span.start + view.stripes[0].start
    return start % (max(dtypes.BITS[view.form.dtype], 8) // 8) == 0


def memory_of(view: TensorView, located: Located) -> memoryview:
    """A tensor's packed bytes: those of the mapping where `is_mapped`, else a copy in memory of its own.

    Args:
        view: The tensor as the worker holds it.
        located: Where its pieces lie. Their bytes have arrived.

    Raises:
        FormatError: Where a part's file has become shorter.
    """
    if view.nbytes == 0:
        return memoryview(bytearray())
    if is_mapped(view, located):
        part, piece = located[0]
        start, stop = view.stripes[0].start, view.stripes[0].stop
        return memoryview(part.map)[piece.span.start + start : piece.span.start + stop]
    joined = _allocate(view.nbytes)
    row = sum(stripes.width for stripes in view.stripes)
    at = 0  # where the take begins within a row of the joined tensor
    for (part, piece), stripes in zip(located, view.stripes, strict=True):
        _scatter(part, piece.span.start, stripes, joined, at=at, row=row)
        at += stripes.width
    return joined


def _allocate(size: int) -> memoryview:
    """Zeroed memory of this process alone. An mmap is shared with forked children unless it is private."""
    if size < SMALL:
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _scatter(part: OpenPart, offset: int, stripes: Stripes, into: memoryview, *, at: int, row: int) -> None:
    """Read the stripes of the piece at `offset` into bytes [at, at + width) of each `row` bytes of `into`.

    The kernel puts them in place: no byte that is wanted passes through a buffer of ours.
    """
    offset, width, gap = offset + stripes.start, stripes.width, stripes.stride - stripes.width
    starts = range(at, at + stripes.count * row, row)
    if gap >= WIDE:
        for start in starts:
            part.read_into(offset, into[start : start + width])
            offset += stripes.stride
        return
    if width == row and not gap:
        part.read_into(offset, into)
        return
    unwanted = [memoryview(bytearray(gap))] if gap else []
    rows = IOV_MAX // (1 + len(unwanted))
    pending = iter(starts)
    while targets := [into[start : start + width] for start in islice(pending, rows)]:
        # what lies between goes again and again into one small buffer, which stays in a core's cache
        batch = [buffer for target in targets for buffer in (target, *unwanted)][: -1 if gap else None]
        got = os.preadv(part.fd, batch, offset)
        if got != len(targets) * stripes.stride - gap:  # cut short, by a signal say: finish it row by row
            for i, target in enumerate(targets):
                part.read_into(offset + i * stripes.stride, target)
        offset += len(targets) * stripes.stride


def tensor_of(view: TensorView, memory: memoryview) -> torch.Tensor:
    """Make a torch tensor; no byte is copied or touched.

    Args:
        view: The tensor as the worker holds it: its dtype and shape.
        memory: Its packed bytes, which the tensor keeps alive.

    Raises:
        UnsupportedError: Where this torch does not have the dtype.
    """
    import torch

    shape = view.shape
    name = dtypes.TORCH.get(view.form.dtype)
    dtype = getattr(torch, name, None) if name else None
    if dtype is None:
        raise UnsupportedError(
            f"{quote(view.name)}: torch {torch.__version__} has no dtype for {view.form.dtype}; use memory() instead"
        )
    if view.form.dtype == "F4":  # torch counts pairs of elements, a byte each
        shape = (*shape[:-1], shape[-1] // 2)
    if not len(memory):
        return torch.empty(shape, dtype=dtype)
    # frombuffer knows only torch's older dtypes on some versions; bytes are known to all
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
