"""Decide where a tensor is cut and which ranks own each piece. Arithmetic only; writer and reader share it.

A tensor is cut once, at the finest tensor parallel size that will be wanted (the grain). A coarser size that divides
the grain takes whole pieces of it where units are shared evenly; of uneven ones it may take part of a piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a dim that is cut by itself: one of the blocks of a fused tensor, or the only one."""

    size: int
    """Indices along the dim."""
    units: int
    """Equal parts (heads, say) that are never split."""
    shared: bool = False
    """Whether each unit may belong to several neighbouring ranks once units run out (KV heads)."""
    uneven: bool = False
    """Whether ranks take chunks of ceil(units / ranks), the last shorter or empty, where units do not divide."""
    multiple: int = 1
    """The count of uneven units is padded to a multiple of this before it is chunked (see `chunk`)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor may be cut: whole (`dim` is None), or along `dim` in `segments`, each cut by itself in units.

    With `experts` dim 0 counts experts, of which an expert parallel rank takes a run; `dim` is then None or another.
    """

    dim: int | None = None
    segments: tuple[Segment, ...] = ()
    experts: bool = False


WHOLE = Layout()


@dataclass(frozen=True, slots=True)
class Piece:
    """Indices [start, stop) of a tensor along its layout's dim, owned by the ranks [first_rank, last_rank) of the grain.

    A whole tensor is one piece of [0, 0) owned by all.
    """

    segment: int
    start: int
    stop: int
    first_rank: int
    last_rank: int


@dataclass(frozen=True, slots=True)
class Take:
    """Indices [start, stop), counted within the piece, that a view takes of `piece`."""

    piece: Piece
    start: int
    stop: int

    @property
    def all_of_it(self) -> bool:
        return self.stop - self.start == self.piece.stop - self.piece.start


def allows(layout: Layout, size: int) -> bool:
    """Whether the rule lets tensor ranks share the tensor.

    Args:
        layout: The rule.
        size: How many ranks there are.
    """
    return all(s.uneven or s.units % size == 0 or (s.shared and size % s.units == 0) for s in layout.segments)


def length(layout: Layout) -> int:
    """Indices of all segments together."""
    return sum(segment.size for segment in layout.segments)


def sizes_that_work(layouts: list[Layout], *, limit: int = 64) -> list[int]:
    """Every tensor parallel size that some layouts all allow.

    Args:
        layouts: Those of the tensors.
        limit: The largest size that is tried.
    """
    return [size for size in range(1, limit + 1) if all(allows(layout, size) for layout in layouts)]


def chunk(size: int, parts: int, index: int, *, multiple: int = 1) -> tuple[int, int]:
    """The rows of one chunk where rows are cut into several.

    Args:
        size: Rows that exist.
        parts: Chunks.
        index: Which chunk, from 0.
        multiple: Rows are padded to a multiple of it first: 1 is torch.chunk, 64 is vLLM's padded vocabulary.

    Returns:
        Rows [start, stop); stop never exceeds the rows that exist.
    """
    padded = -(-size // multiple) * multiple
    width = -(-padded // parts)
    return min(size, index * width), min(size, (index + 1) * width)


def pieces(layout: Layout, shape: tuple[int, ...], grain: int) -> tuple[Piece, ...]:
    """The pieces of a tensor in the order of its bytes along the dim; empty ones are left out.

    They tile the dim exactly.

    Args:
        layout: How it is cut.
        shape: Its full shape.
        grain: Ranks that share it.

    Raises:
        LayoutError: Where the rule does not allow so many ranks, or does not fit the shape.
    """
    if layout.dim is None:
        return (Piece(0, 0, 0, 0, grain),)
    _check(layout, grain)
    if layout.dim >= len(shape) or length(layout) != shape[layout.dim]:
        raise LayoutError(f"segments of {length(layout)} along dim {layout.dim} do not fit {list(shape)}")
    found = []
    base = 0
    for i, segment in enumerate(layout.segments):
        count = grain if segment.uneven else min(grain, segment.units)
        owners = grain // count
        for n in range(count):
            start, stop = _share(segment, count, n)
            if start < stop:
                found.append(Piece(i, base + start, base + stop, n * owners, (n + 1) * owners))
        base += segment.size
    return tuple(found)


def takes(
    stored: Layout, shape: tuple[int, ...], grain: int, *, size: int, rank: int, asked: Layout | None = None
) -> tuple[Take, ...]:
    """What one tensor rank takes of the pieces of a tensor, in the order in which they join.

    Args:
        stored: How the pieces were cut.
        shape: Full shape of the tensor.
        grain: Ranks that the pieces were cut for.
        size: Tensor ranks that load it.
        rank: Which of them, from 0.
        asked: How an engine cuts, where it cuts otherwise: whole, or along the same dim.

    Raises:
        LayoutError: Where `size` does not divide the grain, or the rule does not allow it.
    """
    if grain % size:
        fits = ", ".join(str(n) for n in range(1, grain + 1) if grain % n == 0)
        raise LayoutError(
            f"a shard set of grain {grain} cannot be viewed at tensor parallel size {size}; it serves {fits}"
        )
    cut = pieces(stored, shape, grain)
    asked = stored if asked is None else asked
    check_asked(stored, asked)
    if stored.dim is None:
        return (Take(cut[0], 0, 0),)
    _check(asked, size)
    wanted = ((0, shape[stored.dim]),) if asked.dim is None else _wanted(asked, size=size, rank=rank)
    return tuple(_overlap(cut, wanted))


def check_asked(stored: Layout, asked: Layout) -> None:
    """Refuse to serve an engine with pieces that were cut in a way that it cannot take.

    Args:
        stored: How the pieces were cut.
        asked: How the engine cuts.

    Raises:
        LayoutError: Where the one cannot serve the other.
    """
    if asked.dim is not None and asked.dim != stored.dim:
        how = "whole" if stored.dim is None else f"in pieces along dim {stored.dim}"
        raise LayoutError(
            f"asked for along dim {asked.dim}, but stored {how}; expected whole or the same dim"
        )
    if asked.dim is not None and length(asked) != length(stored):
        raise LayoutError(
            f"the segments that are asked for hold {length(asked)}, those that are stored {length(stored)}"
        )
    if asked.experts and not stored.experts:
        raise LayoutError("asked for by expert, but its dim 0 does not count experts")


def _check(layout: Layout, size: int) -> None:
    if not allows(layout, size):
        units = " + ".join(str(segment.units) for segment in layout.segments)
        raise LayoutError(
            f"{units} units cannot be shared by {size} tensor ranks; sizes that work: "
            f"{', '.join(map(str, sizes_that_work([layout])))}"
        )


def _overlap(cut: tuple[Piece, ...], wanted: tuple[tuple[int, int], ...]) -> Iterator[Take]:
    """The runs of the pieces that cover the wanted ones; pieces tile the dim, so they are found by bisection."""
    starts = [piece.start for piece in cut]
    for start, stop in wanted:
        at = max(bisect_right(starts, start) - 1, 0)
        while at < len(cut) and cut[at].start < stop:
            piece = cut[at]
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                yield Take(piece, low - piece.start, high - piece.start)
            at += 1


def _wanted(layout: Layout, *, size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The range [start, stop) of each segment, along the whole dim, that a rank of an engine asks for.

    Ranges that touch are one, so that no piece is taken twice.
    """
    found: list[tuple[int, int]] = []
    base = 0
    for segment in layout.segments:
        count = size if segment.uneven else min(size, segment.units)
        start, stop = _share(segment, count, rank * count // size)
        if found and found[-1][1] == base + start:
            found[-1] = found[-1][0], base + stop
        elif start < stop:
            found.append((base + start, base + stop))
        base += segment.size
    return tuple(found)


def _share(segment: Segment, count: int, index: int) -> tuple[int, int]:
    """Indices [start, stop) of the segment that are share `index` of `count`."""
    if segment.uneven:
        width = segment.size // max(segment.units, 1)  # a vocabulary of no rows has no units
        start, stop = chunk(segment.units, count, index, multiple=segment.multiple)
        return start * width, stop * width
    width = segment.size // count
    return index * width, (index + 1) * width
