"""Decide where a tensor is cut and which ranks own each piece. Arithmetic only; writer and reader share it.

A tensor is cut once, at the finest tensor parallel size that will be wanted (the grain). Every coarser size that
divides the grain takes whole pieces of it, so no view needs a byte that is not its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a dim that is cut by itself: one of the blocks of a fused tensor, or the only one."""

    size: int
    """Indices along the dim."""
    units: int
    """Equal parts (heads, say) that are never split."""
    shared: bool = False
    """Whether each unit may belong to several neighbouring ranks once units run out (KV heads)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor may be cut.

    Either whole (`dim` is None); or along `dim` in `segments`, each cut by itself in units; or, `uneven`, along
    `dim` in chunks of ceil(size / ranks) whose last are shorter or empty (the rows of a vocabulary).

    """

    dim: int | None = None
    segments: tuple[Segment, ...] = ()
    uneven: bool = False


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
    """Whether the rule lets `size` tensor ranks share the tensor."""
    return layout.uneven or all(
        s.units % size == 0 or (s.shared and size % s.units == 0) for s in layout.segments
    )


def sizes_that_work(layouts: list[Layout], *, limit: int = 64) -> list[int]:
    """Every tensor parallel size up to `limit` that all of `layouts` allow."""
    return [size for size in range(1, limit + 1) if all(allows(layout, size) for layout in layouts)]


def chunk(size: int, parts: int, index: int, *, multiple: int = 1) -> tuple[int, int]:
    """Rows [start, stop) of chunk `index` when `size` rows, padded up to `multiple`, are cut into `parts`.

    `multiple` 1 is torch.chunk, 64 is vLLM's padded vocabulary; stop never exceeds the rows that exist.
    """
    padded = -(-size // multiple) * multiple
    width = -(-padded // parts)
    return min(size, index * width), min(size, (index + 1) * width)


def pieces(layout: Layout, shape: tuple[int, ...], grain: int) -> tuple[Piece, ...]:
    """The pieces of a tensor in the order of its bytes along the dim; empty ones are left out.

    They tile the dim exactly. Raises LayoutError where the rule does not allow `grain` ranks.
    """
    if layout.dim is None:
        return (Piece(0, 0, 0, 0, grain),)
    if layout.uneven:
        bounds = (chunk(shape[layout.dim], grain, rank) for rank in range(grain))
        return tuple(Piece(0, *b, rank, rank + 1) for rank, b in enumerate(bounds) if b[0] < b[1])
    _check(layout, grain)
    found = []
    base = 0
    for i, segment in enumerate(layout.segments):
        count = min(grain, segment.units)
        width, owners = segment.size // count, grain // count
        found += [
            Piece(i, base + n * width, base + (n + 1) * width, n * owners, (n + 1) * owners)
            for n in range(count)
        ]
        base += segment.size
    return tuple(piece for piece in found if piece.start < piece.stop)


def takes(
    layout: Layout, shape: tuple[int, ...], grain: int, *, size: int, rank: int, multiple: int = 1
) -> tuple[Take, ...]:
    """What tensor rank `rank` of `size` takes, in the order in which it joins along the layout's dim.

    `multiple` pads the rows of an uneven tensor before they are shared (see `chunk`).
    Raises LayoutError where `size` does not divide the grain or the rule does not allow it.
    """
    if grain % size:
        fits = ", ".join(str(n) for n in range(1, grain + 1) if grain % n == 0)
        raise LayoutError(
            f"a shard set of grain {grain} cannot be viewed at tensor parallel size {size}; it serves {fits}"
        )
    cut = pieces(layout, shape, grain)
    if layout.dim is None:
        return (Take(cut[0], 0, 0),)
    _check(layout, size)
    return tuple(_overlap(layout, shape, cut, size=size, rank=rank, multiple=multiple))


def _check(layout: Layout, size: int) -> None:
    if not allows(layout, size):
        units = " + ".join(str(segment.units) for segment in layout.segments)
        raise LayoutError(
            f"{units} units cannot be shared by {size} tensor ranks; sizes that work: "
            f"{', '.join(map(str, sizes_that_work([layout])))}"
        )


def _overlap(
    layout: Layout, shape: tuple[int, ...], cut: tuple[Piece, ...], *, size: int, rank: int, multiple: int
) -> Iterator[Take]:
    for index, (start, stop) in enumerate(_wanted(layout, shape, size=size, rank=rank, multiple=multiple)):
        for piece in cut:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if piece.segment == index and low < high:
                yield Take(piece, low - piece.start, high - piece.start)


def _wanted(
    layout: Layout, shape: tuple[int, ...], *, size: int, rank: int, multiple: int
) -> Iterator[tuple[int, int]]:
    """The range [start, stop) of each segment, along the whole dim, that a rank of an engine asks for."""
    if layout.uneven:
        assert layout.dim is not None
        yield chunk(shape[layout.dim], size, rank, multiple=multiple)
        return
    base = 0
    for segment in layout.segments:
        count = min(size, segment.units)
        width = segment.size // count
        own = rank * count // size
        yield base + own * width, base + (own + 1) * width
        base += segment.size
