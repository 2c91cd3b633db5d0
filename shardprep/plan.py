"""Decide what is written where: an index and a layout become parts, and each tensor a move. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shardprep_runtime import cut, dtypes
from shardprep_runtime.errors import UnsupportedError, quote
from shardprep_runtime.grid import Stages
from shardprep_runtime.header import PAGE, dump_header
from shardprep_runtime.manifest import PLACEMENTS, Form, Layer
from shardprep_runtime.parts import part_metadata, piece_block
from shardprep_runtime.view import order

from .index import Index, Tensor
from .layout import ModelLayout, known_types, ties_head

DIGEST_HEX: Final = 64
"""Characters of a block's digest: a header has its size before its digests are known."""

CASTABLE: Final = ("F64", "F32", "F16", "BF16")
"""The dtypes that `--dtype` changes into one another. Others (integers, fp8) carry meaning in their bits and are kept."""


@dataclass(frozen=True, slots=True)
class PlannedPiece:
    """One block of a tensor, and where it will lie."""

    name: str
    form: Form
    piece: cut.Piece
    part: int
    """Its part's place in the plan."""
    start: int
    """Byte of the part's data (behind the header) at which it begins."""

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
    layers: tuple[int, int] = (0, 0)
    placements: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None
    """What stands in `__metadata__` when there are no digests."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Move:
    """One source tensor and the pieces that it becomes; they tile it along `dim`."""

    tensor: Tensor
    dtype: str
    """As it is written."""
    dim: int
    pieces: tuple[PlannedPiece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the mover needs to know."""

    parts: tuple[PlannedPart, ...]
    moves: tuple[Move, ...]
    """In the order in which they should be carried out."""
    block_bytes: int | None
    """Bytes of a piece that share one digest; None: no digests."""

    def header(self, part: PlannedPart, digests: Mapping[str, Sequence[str]] | None) -> bytes:
        """The header of a part. With `digests` None it has the right length and zeros for digests."""
        tensors = {piece.name: (piece.form.dtype, piece.shape) for piece in part.pieces}
        if self.block_bytes is None:
            return dump_header(tensors, part.metadata or {})
        described = {}
        for piece in part.pieces:
            blocks = -(-piece.nbytes // self.block_bytes)
            digest = digests[piece.name] if digests is not None else ["0" * DIGEST_HEX] * blocks
            described[piece.name] = (piece.form.shape, piece_block(piece.form, piece.piece)[0], digest)
        return dump_header(tensors, part_metadata(described, self.block_bytes))

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, headers aside."""
        return sum(part.nbytes for part in self.parts)


def plan_convert(
    index: Index, *, max_part_bytes: int, dtype: str | None = None, aliases: Mapping[str, str]
) -> Plan:
    """Whole tensors, in the order of their names, in files of at most `max_part_bytes` (one tensor at least).

    The same tensors give the same plan wherever they come from. `aliases` are the tied names that stay out; they
    are recorded in the metadata of the file that holds the tensor, as the Hugging Face converters do.
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
        forms = [(t, Form(target_dtype(t, dtype), t.shape, cut.WHOLE)) for t in group]
        pieces = _lay_out(
            [(t.name, form, cut.pieces(form.layout, form.shape, 1)[0]) for t, form in forms], number
        )
        names = {tensor.name for tensor in group}
        tied = {alias: name for alias, name in sorted(aliases.items()) if name in names}
        if "format" in tied:
            raise UnsupportedError(
                f"{quote(tied['format'])}: it is tied to a tensor named format, the key that every file's metadata "
                "needs for itself; rename that tensor"
            )
        parts.append(PlannedPart(path, pieces, metadata={**tied, "format": "pt"}))
        moves += [Move(index.tensors[p.name], p.form.dtype, 0, (p,)) for p in pieces]
    return Plan(tuple(parts), tuple(moves), None)


def plan_split(
    index: Index,
    layout: ModelLayout,
    *,
    grain: int,
    stages: Stages | None,
    max_part_bytes: int,
    block_bytes: int,
) -> Plan:
    """Pieces at `grain`, in layer order, in parts that end at layers (and at `stages`) where they can.

    Each part holds pieces of one run of ranks: rank r's own, those that neighbours share (KV heads), or all ranks'.
    A tensor that gives one run of ranks several blocks (fused ones) has them in parts beside each other, since a
    name is unique within a file. Raises LayoutError where the grain is not allowed.
    """
    layout.check_grain(grain)
    lanes: dict[tuple[int, int, int], list[tuple[str, Form, cut.Piece]]] = {}
    names = sorted(
        index.tensors, key=lambda name: (order(layout.tensors[name].layer, layout.layers), natural(name))
    )
    for name in names:
        tensor = index.tensors[name]
        form = Form(tensor.dtype, tensor.shape, layout.tensors[name].layout)
        for piece in cut.pieces(form.layout, form.shape, grain):
            key = (piece.first_rank, piece.last_rank, piece.segment)
            lanes.setdefault(key, []).append((name, form, piece))
    files: dict[tuple[int, int], list[list[tuple[str, Form, cut.Piece]]]] = {}
    for (first, last, _), pieces in sorted(lanes.items(), key=lambda item: _lane_order(item[0])):
        files.setdefault((first, last), []).extend(
            _fill(pieces, layout, stages=stages, max_part_bytes=max_part_bytes)
        )
    parts: list[PlannedPart] = []
    for shard, (ranks, groups) in enumerate(files.items()):
        for i, group in enumerate(groups):
            layers: list[Layer] = [layout.tensors[name].layer for name, _, _ in group]
            numbers = [layer for layer in layers if isinstance(layer, int)]
            parts.append(
                PlannedPart(
                    f"shard-{shard + 1:05}-model-{i + 1:05}-of-{len(groups):05}.safetensors",
                    _lay_out(
                        group, len(parts), layer=lambda name: order(layout.tensors[name].layer, layout.layers)
                    ),
                    ranks,
                    (min(numbers), max(numbers) + 1) if numbers else (0, 0),
                    tuple(placement for placement in PLACEMENTS if placement in layers),
                )
            )
    of_tensor: dict[str, list[PlannedPiece]] = {}
    for part in parts:
        for planned in part.pieces:
            of_tensor.setdefault(planned.name, []).append(planned)
    moves = []
    for name in names:
        own = sorted(of_tensor.get(name, []), key=lambda planned: planned.piece.start)
        moves.append(
            Move(
                index.tensors[name],
                index.tensors[name].dtype,
                layout.tensors[name].layout.dim or 0,
                tuple(own),
            )
        )
    return Plan(tuple(parts), tuple(moves), block_bytes)


def _lane_order(key: tuple[int, int, int]) -> tuple[int, int, int]:
    """Ranks' own lanes first, by rank, so that shard 1 is rank 0's; then what neighbours share, then what all do."""
    first, last, segment = key
    return last - first, first, segment


def _fill(
    pieces: Iterable[tuple[str, Form, cut.Piece]],
    layout: ModelLayout,
    *,
    stages: Stages | None,
    max_part_bytes: int,
) -> list[list[tuple[str, Form, cut.Piece]]]:
    """Distribute the pieces of one lane, in layer order, over files of at most `max_part_bytes` where they can."""

    def group_of(item: tuple[str, Form, cut.Piece]) -> tuple[int, int]:
        at = order(layout.tensors[item[0]].layer, layout.layers)
        clamped = min(max(at, 0), max(layout.layers - 1, 0))
        return next((i for i, (start, stop) in enumerate(stages or ()) if start <= clamped < stop), 0), at

    def size_of(item: tuple[str, Form, cut.Piece]) -> int:
        return dtypes.nbytes(item[1].dtype, piece_block(item[1], item[2])[1])

    files: list[list[tuple[str, Form, cut.Piece]]] = []
    room = -1
    stage = -1
    by_layer: dict[tuple[int, int], list[tuple[str, Form, cut.Piece]]] = {}
    for item in pieces:
        by_layer.setdefault(group_of(item), []).append(item)
    for (own_stage, _), group in by_layer.items():
        size = sum(map(size_of, group))
        if own_stage != stage or size > room:
            files.append([])
            room, stage = max_part_bytes, own_stage
        for item in group:  # a layer that is larger than a part is spread over several
            if files[-1] and size_of(item) > room:
                files.append([])
                room = max_part_bytes
            files[-1].append(item)
            room -= size_of(item)
    return files


def _lay_out(
    pieces: Sequence[tuple[str, Form, cut.Piece]], part: int, *, layer: Callable[[str], int] = lambda _: 0
) -> tuple[PlannedPiece, ...]:
    """Place pieces behind each other: by layer, and within it whole pages first, then the widest elements first.

    So large tensors lie at page boundaries, and small ones where their dtype may lie.
    """

    def key(item: tuple[str, Form, cut.Piece]) -> tuple[int, bool, int]:
        name, form, piece = item
        return (
            layer(name),
            dtypes.nbytes(form.dtype, piece_block(form, piece)[1]) % PAGE != 0,
            -dtypes.BITS[form.dtype],
        )

    found = []
    start = 0
    for name, form, piece in sorted(pieces, key=key):
        found.append(PlannedPiece(name, form, piece, part, start))
        start += found[-1].nbytes
    return tuple(found)


def settle_aliases(index: Index) -> Index:
    """Decide which of a checkpoint's tied tensors are stored once: those that the model's config ties again.

    A model whose rules are known and whose config does not tie two tensors needs both of them, even where a
    checkpoint let them share memory: a loader would leave the second one at random. Where nothing is known of the
    model, tied tensors stay tied. Of a tied pair of head and embedding the embedding is the one that is stored.
    """
    pair = ties_head(index.config)
    tensors, aliases = dict(index.tensors), {}
    for alias, name in index.aliases.items():
        if pair == (name, alias):
            tensors[alias] = replace(tensors.pop(name), name=alias)
            aliases[name] = alias
        elif pair == (alias, name) or index.config.get("model_type") not in known_types():
            aliases[alias] = name
        else:
            tensors[alias] = replace(tensors[name], name=alias)
    while any(
        name in aliases for name in aliases.values()
    ):  # three names of one tensor, and the middle one moved
        aliases = {alias: aliases.get(name, name) for alias, name in aliases.items()}
    return replace(index, tensors=dict(sorted(tensors.items())), aliases=dict(sorted(aliases.items())))


def target_dtype(tensor: Tensor, dtype: str | None) -> str:
    """The dtype in which a tensor is written when `dtype` (None: keep) is asked for."""
    return dtype if dtype is not None and tensor.dtype in CASTABLE else tensor.dtype


def check_cast(dtype: str) -> str:
    """`dtype` if tensors can be cast to it. Raises UnsupportedError otherwise."""
    if dtype not in CASTABLE:
        raise UnsupportedError(f"cannot cast to {quote(dtype)}; known are {', '.join(CASTABLE)}")
    return dtype


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A sort key that puts layer 2 before layer 10."""
    return tuple(
        (True, int(word), word) if word.isascii() and word.isdigit() and len(word) < 19 else (False, 0, word)
        for word in name.split(".")
    )
