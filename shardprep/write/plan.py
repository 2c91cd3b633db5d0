"""Decide what is written where: an index and a layout become parts, and each tensor a move. Arithmetic only."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Final, NamedTuple

from shardprep_runtime.errors import UnsupportedError, quote
from shardprep_runtime.format import cut, dtypes
from shardprep_runtime.format.grid import Stages
from shardprep_runtime.format.header import PAGE, dump_header, metadata_text, padded_size, tensor_text
from shardprep_runtime.format.manifest import PLACEMENTS, Form, Layer
from shardprep_runtime.format.view import order
from shardprep_runtime.shard.parts import part_metadata, piece_block, piece_texts

from ..index import CASTABLE, Index, Tensor, natural
from ..layout import ModelLayout

DIGEST_HEX: Final = 64
"""Characters of a block's digest. All have this length, so that a header's size is known before its digests are."""


class PlannedPiece(NamedTuple):
    """One block of a tensor, and where it will lie. A tuple, since a large model has a million of them."""

    name: str
    form: Form
    piece: cut.Piece
    part: int
    """Number of its part in the plan."""
    start: int
    """First byte of the piece, counted from the end of the part's header."""

    @property
    def shape(self) -> tuple[int, ...]:
        return piece_block(self.form, self.piece)[1]

    @property
    def nbytes(self) -> int:
        return dtypes.nbytes(self.form.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One safetensors file to be written."""

    path: str
    pieces: tuple[PlannedPiece, ...]
    ranks: tuple[int, int] = (0, 1)
    """Ranks [start, stop) of the grain that own all its pieces."""
    layers: tuple[int, int] = (0, 0)
    """Layers [start, stop) of its pieces."""
    placements: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None
    """The `__metadata__` of a part without digests."""
    header_size: int = 0
    """Bytes of the header; 0 in a plan that is only digested, not written."""

    @property
    def nbytes(self) -> int:
        """Bytes of the part's data: its pieces follow each other without a gap."""
        return self.pieces[-1].start + self.pieces[-1].nbytes if self.pieces else 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.header_size + self.nbytes


@dataclass(frozen=True, slots=True)
class Move:
    """One source tensor and the pieces that it becomes; they tile it along `dim`."""

    tensor: Tensor
    dtype: str
    """The dtype in which the tensor is written."""
    dim: int
    pieces: tuple[PlannedPiece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Parts, and the moves that fill them: all that the mover needs to know."""

    parts: tuple[PlannedPart, ...]
    moves: tuple[Move, ...]
    """Moves in the order in which they should be carried out."""
    block_bytes: int | None
    """Bytes of a piece that share one digest; None: no digests."""

    def header(self, part: PlannedPart, digests: Mapping[str, Sequence[str]] | None) -> bytes:
        """Make the header of a part.

        Args:
            digests: Tensor name -> a digest for each block; None: zeros stand for them, and the length is right.
        """
        # many pieces of a part are the same block of the same form, whose text is made once
        known: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        tensors, described = {}, {}
        for piece in part.pieces:
            form = piece.form
            key = id(form), id(piece.piece)
            if key not in known:
                known[key] = piece_block(form, piece.piece)
            offset, shape = known[key]
            tensors[piece.name] = form.dtype, shape
            if self.block_bytes is not None:
                nbytes = dtypes.nbytes(form.dtype, shape)
                digest = digests[piece.name] if digests is not None else zeros(nbytes, self.block_bytes)
                described[piece.name] = form.shape, offset, digest
        if self.block_bytes is None:
            return dump_header(tensors, part.metadata or {})
        return dump_header(tensors, part_metadata(described, self.block_bytes))

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, headers aside."""
        return sum(part.nbytes for part in self.parts)


def zeros(nbytes: int, block_bytes: int) -> list[str]:
    """Make placeholders for the digests of a piece of `nbytes` bytes, which are not known yet.

    Args:
        block_bytes: Bytes of the piece that share one digest.
    """
    return ["0" * DIGEST_HEX] * -(-nbytes // block_bytes)


def plan_convert(
    index: Index, *, max_part_bytes: int, dtype: str | None = None, aliases: Mapping[str, str]
) -> Plan:
    """Plan whole tensors in the order of their names. The same tensors give the same plan wherever they come from.

    Args:
        max_part_bytes: Bytes of tensor data in a file at most, unless one tensor is larger.
        dtype: Cast floating-point tensors to this one; None: keep their dtypes.
        aliases: Tied names that are left out -> the name that is stored. The metadata of that tensor's file records
            them, as the Hugging Face converters do.

    Raises:
        UnsupportedError: For a dtype that is not castable.
    """
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in sorted(index.tensors.values(), key=lambda tensor: natural(tensor.name)):
        nbytes = dtypes.nbytes(target_dtype(tensor, dtype), tensor.shape)
        if groups[-1] and size + nbytes > max_part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    parts, moves = [], []
    for number, group in enumerate(groups):
        path = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        )
        forms = [(t.name, Form(target_dtype(t, dtype), t.shape, cut.WHOLE)) for t in group]
        items = [
            _Item(name, form, "every", 0, _blocks(form, 1, None), _named(name, None), [])
            for name, form in forms
        ]
        pieces, listed = _lay_out(items, (0, 1, 0), number)
        names = {tensor.name for tensor in group}
        tied = {alias: name for alias, name in sorted(aliases.items()) if name in names}
        if "format" in tied:
            raise UnsupportedError(
                f"{quote(tied['format'])}: it is tied to a tensor named format, the key that every file's metadata "
                "needs for itself; rename that tensor"
            )
        metadata = {**tied, "format": "pt"}
        length = len(f"{{{metadata_text(metadata)}}}".encode()) + listed
        parts.append(PlannedPart(path, pieces, metadata=metadata, header_size=padded_size(length)))
        moves += [Move(index.tensors[p.name], p.form.dtype, 0, (p,)) for p in pieces]
    return Plan(tuple(parts), tuple(moves), None)


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the garbage collector: a million objects are made and kept, and each collection would visit all of them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@uncollected()
def plan_split(
    index: Index,
    layout: ModelLayout,
    *,
    grain: int,
    stages: Stages | None,
    max_part_bytes: int,
    block_bytes: int,
) -> Plan:
    """Plan pieces in layer order, in parts that end at layers where they can.

    Each part holds pieces of one run of ranks: those of one rank, those that neighbours share (KV heads), or those of
    all ranks. A fused tensor can give one rank several blocks. They go into different parts, since a name is unique
    within a file.

    Args:
        layout: How each tensor may be cut.
        grain: The tensor parallel size that tensors are cut for.
        stages: Layers [start, stop) of each pipeline stage, at which parts end too.
        max_part_bytes: Bytes of a part at most, unless one piece is larger.
        block_bytes: Bytes of a piece that share one digest.

    Raises:
        LayoutError: Where the layout does not allow the grain.
    """
    layout.check_grain(grain)
    items = _items(index, layout, grain, block_bytes)
    lanes: dict[_Lane, list[_Item]] = {}
    for item in items:
        for lane in item.blocks:
            lanes.setdefault(lane, []).append(item)
    files: dict[tuple[int, int], list[tuple[_Lane, list[_Item]]]] = {}
    for lane in sorted(lanes, key=_lane_order):
        groups = _fill(lanes[lane], lane, layout.layers, stages=stages, max_part_bytes=max_part_bytes)
        files.setdefault(lane[:2], []).extend((lane, group) for group in groups)
    parts: list[PlannedPart] = []
    # bytes of JSON in a header without pieces; in two of its three lists the first entry has no comma before it
    alone = len(f"{{{metadata_text(part_metadata({}, block_bytes))}}}".encode()) - 2
    for shard, (ranks, found) in enumerate(files.items()):
        for i, (lane, group) in enumerate(found):
            layers = {item.layer for item in group}
            numbers = [layer for layer in layers if isinstance(layer, int)]
            pieces, listed = _lay_out(group, lane, len(parts))
            parts.append(
                PlannedPart(
                    f"shard-{shard + 1:05}-model-{i + 1:05}-of-{len(found):05}.safetensors",
                    pieces,
                    ranks,
                    (min(numbers), max(numbers) + 1) if numbers else (0, 0),
                    tuple(placement for placement in PLACEMENTS if placement in layers),
                    header_size=padded_size(alone + listed),
                )
            )
    moves = []
    for item in items:
        if len(item.form.layout.segments) > 1:  # lanes are in the order of ranks
            item.planned.sort(key=lambda planned: planned.piece.start)
        tensor = index.tensors[item.name]
        moves.append(Move(tensor, tensor.dtype, item.form.layout.dim or 0, tuple(item.planned)))
    return Plan(tuple(parts), tuple(moves), block_bytes)


_Lane = tuple[int, int, int]
"""First and last rank of a piece's owners, and its segment. A part holds one lane; a tensor has one piece in a lane."""


class _Block(NamedTuple):
    """The piece that every tensor of one form has in one lane."""

    piece: cut.Piece
    nbytes: int
    rank: tuple[bool, int]
    """Sort key of the pieces within a layer: whole pages first, then the widest elements."""
    described: int
    """Bytes that the piece takes of a header's JSON, without its name and its place in the data."""


@dataclass(slots=True)
class _Item:
    """A tensor whose pieces are being placed. Pieces, which may be a million, become objects only at the end."""

    name: str
    form: Form
    layer: Layer
    order: int
    """Number of the tensor's layer in the order of a forward pass."""
    blocks: Mapping[_Lane, _Block]
    named: int
    """Bytes that the tensor's name takes of the JSON of each header that lists it."""
    planned: list[PlannedPiece]


def _items(index: Index, layout: ModelLayout, grain: int, block_bytes: int) -> list[_Item]:
    """List the tensors in layer order, and within a layer in the natural order of their names."""
    forms: dict[Form, tuple[Form, dict[_Lane, _Block]]] = {}  # tensors of the same form are cut once
    # look a form up by its identity first, since hashing it is slow
    known: dict[tuple[str, tuple[int, ...], int, int], tuple[Form, dict[_Lane, _Block]]] = {}
    found = []
    for name, tensor in index.tensors.items():
        placed = layout.tensors[name]
        key = tensor.dtype, tensor.shape, id(placed.layout), id(placed.engines)
        if key not in known:
            form = Form(tensor.dtype, tensor.shape, placed.layout, placed.engines)
            if form not in forms:
                forms[form] = form, _blocks(form, grain, block_bytes)
            known[key] = forms[form]
        form, blocks = known[key]
        at = order(placed.layer, layout.layers)
        found.append(_Item(name, form, placed.layer, at, blocks, _named(name, block_bytes), []))
    return sorted(found, key=lambda item: (item.order, natural(item.name)))


def _blocks(form: Form, grain: int, block_bytes: int | None) -> dict[_Lane, _Block]:
    found = {}
    for piece in cut.pieces(form.layout, form.shape, grain):
        offset, shape = piece_block(form, piece)
        nbytes = dtypes.nbytes(form.dtype, shape)
        described = len(",") + len(tensor_text("", form.dtype, shape, 0, 0)) - len("00")
        if block_bytes is not None:
            for text in piece_texts("", form.shape, offset, zeros(nbytes, block_bytes)):
                described += len(",") + _quoted(text)
        lane = piece.first_rank, piece.last_rank, piece.segment
        found[lane] = _Block(piece, nbytes, (nbytes % PAGE != 0, -dtypes.BITS[form.dtype]), described)
    return found


def _named(name: str, block_bytes: int | None) -> int:
    """Bytes that a name takes of a header's JSON: once as a key, and twice in texts that the metadata quote."""
    own = len(encode_basestring(name).encode())
    return own if block_bytes is None else own + 2 * _quoted(encode_basestring_ascii(name))


def _quoted(text: str) -> int:
    """Bytes that ASCII text takes within a JSON string."""
    return len(encode_basestring(text)) - len('""')


def _lane_order(key: tuple[int, int, int]) -> tuple[int, int, int]:
    """Order lanes: first those of one rank, by rank, so that shard 1 is rank 0's; then what some share, then what all do."""
    first, last, segment = key
    return last - first, first, segment


def _fill(
    items: Sequence[_Item], lane: _Lane, layers: int, *, stages: Stages | None, max_part_bytes: int
) -> list[list[_Item]]:
    """Distribute the pieces of one lane, in layer order, over files of at most `max_part_bytes` where they can."""
    files: list[list[_Item]] = []
    room = -1
    stage = -1
    for at, found in groupby(items, key=lambda item: item.order):
        group = list(found)
        clamped = min(max(at, 0), max(layers - 1, 0))
        own_stage = next((i for i, (start, stop) in enumerate(stages or ()) if start <= clamped < stop), 0)
        sizes = [item.blocks[lane].nbytes for item in group]
        if own_stage != stage or sum(sizes) > room:
            files.append([])
            room, stage = max_part_bytes, own_stage
        for item, size in zip(group, sizes, strict=True):
            if files[-1] and size > room:  # a layer that is larger than a part is spread over several
                files.append([])
                room = max_part_bytes
            files[-1].append(item)
            room -= size
    return files


def _lay_out(items: Sequence[_Item], lane: _Lane, part: int) -> tuple[tuple[PlannedPiece, ...], int]:
    """Place pieces one after the other: by layer, within it whole pages first, then the widest elements first.

    So large tensors begin at page boundaries, and small ones where their dtype may begin.

    Returns:
        The pieces, and the bytes that they take of the header's JSON, with a comma before each.
    """
    found = []
    start = listed = 0
    digits = len("0")
    for item in sorted(items, key=lambda item: (item.order, item.blocks[lane].rank)):
        piece, nbytes, _, described = item.blocks[lane]
        placed = PlannedPiece(item.name, item.form, piece, part, start)
        found.append(placed)
        item.planned.append(placed)
        start += nbytes
        before, digits = digits, len(str(start))
        listed += item.named + described + before + digits
    return tuple(found), listed


def target_dtype(tensor: Tensor, dtype: str | None) -> str:
    """The dtype in which a tensor is written.

    Args:
        dtype: The dtype that the user asks for; None: keep.
    """
    return dtype if dtype is not None and tensor.dtype in CASTABLE else tensor.dtype


def check_cast(dtype: str) -> str:
    """Give `dtype` back if tensors can be cast to it.

    Raises:
        UnsupportedError: Where they cannot.
    """
    if dtype not in CASTABLE:
        raise UnsupportedError(f"cannot cast to {quote(dtype)}; known are {', '.join(CASTABLE)}")
    return dtype
