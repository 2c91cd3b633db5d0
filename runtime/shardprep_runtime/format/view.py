"""Decide what one worker loads: for each of its tensors the pieces, in order, and the dim along which they join.

Arithmetic over the manifest alone: a view that the layout rules do not allow is refused before any file is opened.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ..errors import LayoutError, quote
from .cut import Take, takes
from .dtypes import BITS, nbytes
from .grid import Grid, Stages, check_stage_needs, check_stages, even_stages, experts_of
from .manifest import TORCH, TRANSFORMERS, Form, Layer, Manifest, Part, lines_of, names_of


@dataclass(frozen=True, slots=True)
class Place:
    """Which shard of a set a worker owns: its rank in a grid, and for whose engine.

    Place(rank=3, tensor_parallel_size=8)
    Place(rank=1, stages=((0, 20), (20, 32)))
    Place.of_stage(1, pipeline_parallel_size=2)
    """

    rank: int = 0
    """pp_rank * tensor_parallel_size + tp_rank."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int | None = None
    """Default: as many as `stages`, else 1."""
    expert_parallel_size: int = 1
    """Groups of a stage's tensor ranks that share its experts; divides tensor_parallel_size."""
    stages: Sequence[Sequence[int]] | None = None
    """Layers [start, stop) of each pipeline stage; default: those of the split if it made as many, else even ones."""
    engine: str = TORCH
    """Whose way of cutting to follow where engines differ (vLLM pads a vocabulary, say): one of the manifest's, or torch,
    which asks for every tensor as it is stored."""

    @classmethod
    def of_stage(
        cls,
        pp_rank: int,
        *,
        stages: Sequence[Sequence[int]] | None = None,
        pipeline_parallel_size: int | None = None,
        tp_rank: int = 0,
        tensor_parallel_size: int = 1,
    ) -> Place:
        """The place of a worker that holds a stage of a transformers module, or a tensor rank of one.

        Args:
            pp_rank: The stage, from 0.
            stages: Layers [start, stop) of each stage; default: as `Place.stages` has it.
            tp_rank: From 0, within the stage.
        """
        return cls(
            pp_rank * tensor_parallel_size + tp_rank,
            tensor_parallel_size,
            pipeline_parallel_size,
            stages=stages,
            # one tensor rank takes whole tensors, also of a model that transformers cannot cut
            engine=TRANSFORMERS if tensor_parallel_size > 1 else TORCH,
        )


@dataclass(frozen=True, slots=True)
class Stripes:
    """Bytes of a piece: `count` runs of `width` bytes, `stride` apart, the first from byte `start` of the piece.

    Several runs where part of a piece is taken along another dim than the first, or pieces join along one: each is
    then what the take holds of one row.
    """

    start: int
    width: int
    stride: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + (self.count - 1) * self.stride + self.width


class TensorView(NamedTuple):
    """One tensor as one worker holds it. A tuple, since a worker of a large model makes 10,000 of them as it starts."""

    name: str
    form: Form
    """The full tensor."""
    layer: Layer
    shape: tuple[int, ...]
    """What the worker holds: `takes` joined along the layout's dim."""
    takes: tuple[Take, ...]
    stripes: tuple[Stripes, ...]
    """Where the bytes of each take lie in its piece."""
    experts: tuple[int, int] | None = None
    """Rows [start, stop) of dim 0 that are taken of every piece of a fused expert tensor; None: all."""

    @property
    def nbytes(self) -> int:
        """Bytes that the worker keeps."""
        return nbytes(self.form.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class View:
    """What one worker loads of a shard set."""

    grid: Grid
    rank: int
    pp_rank: int
    tp_rank: int
    ep_rank: int
    engine: str
    """Whose way of cutting it follows."""
    layers: tuple[int, int]
    """The stage's layers [start, stop)."""
    tensors: Mapping[str, TensorView]
    """In the order in which a forward pass meets them: embedding, layers, head."""
    names: Mapping[str, str]
    """Other names of tensors of this view (tied ones) -> the name in `tensors`."""
    parts: tuple[Part, ...]
    """The parts that hold its pieces."""

    @property
    def nbytes(self) -> int:
        """Bytes that the worker keeps."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_view(manifest: Manifest, place: Place, *, tensors: Collection[str] | None = None) -> View:
    """The view of one worker: which pieces of which tensors it loads.

    Args:
        tensors: Names of those that the view is to have, whatever their stage, and no others.

    Raises:
        LayoutError: For a grid, rank, stages or engine that the manifest does not allow.
    """
    tensor_parallel_size, expert_parallel_size = place.tensor_parallel_size, place.expert_parallel_size
    rank, engine = place.rank, place.engine
    chosen = choose_stages(manifest, pipeline_parallel_size=place.pipeline_parallel_size, stages=place.stages)
    grid = Grid(tensor_parallel_size, len(chosen), expert_parallel_size)
    _check_engine(manifest, engine)
    if engine in manifest.stage_needs:
        check_stage_needs(chosen, manifest.stage_needs[engine], engine=engine)
    pp_rank, tp_rank = grid.place(rank)
    ep_rank, rank_in_group = grid.place_in_group(tp_rank)
    own = None  # experts
    if expert_parallel_size > 1:
        if not manifest.experts:
            raise LayoutError(
                f"expert_parallel_size {expert_parallel_size}: this shard set knows of no experts; leave it out, or, "
                "where the model has some, split it again with this version of shardprep"
            )
        own = experts_of(manifest.experts, expert_parallel_size, ep_rank)
    placements, layers = _placements(pp_rank, len(chosen)), chosen[pp_rank]
    lines: list[tuple[str, tuple[int, int] | None, Layer, _Local]] = []
    known: dict[tuple[int, bool], _Local] = {}  # by a form's identity: to hash one is slow
    needed: dict[tuple[int, int], set[Layer]] = {}
    for name, entry, run in lines_of(manifest.tensors):
        form, layer, expert = entry
        if tensors is not None:
            if name not in tensors:
                continue
        elif not (layers[0] <= layer < layers[1] if isinstance(layer, int) else layer in placements):
            continue
        of_expert = run is not None or expert is not None
        if own is not None and expert is not None and not own[0] <= expert < own[1]:
            continue
        if own is not None and run is not None:
            run = max(run[0], own[0]), min(run[1], own[1])
            if run[0] >= run[1]:
                continue
        key = id(form), of_expert
        found = known.get(key)
        if found is None:
            try:
                found = known[key] = _local(
                    form,
                    manifest.grain,
                    engine=engine,
                    of_expert=of_expert,
                    in_stage=(tensor_parallel_size, tp_rank),
                    in_group=(grid.expert_group_size, rank_in_group),
                    experts=own,
                )
            except LayoutError as error:
                raise LayoutError(f"{quote(name)}: {error}") from None
        found.layers.add(layer)
        lines.append((name, run, layer, found))
    found_tensors: dict[str, TensorView] = {}
    for name, run, layer, each in sorted(lines, key=lambda line: order(line[2], manifest.layers)):
        for own_name in (name,) if run is None else names_of(name, run):
            found_tensors[own_name] = TensorView(
                own_name, each.form, layer, each.shape, each.takes, each.stripes, each.experts
            )
    for found in known.values():
        for take in found.takes:
            needed.setdefault((take.piece.first_rank, take.piece.last_rank), set()).update(found.layers)
    return View(
        grid=grid,
        rank=rank,
        pp_rank=pp_rank,
        tp_rank=tp_rank,
        ep_rank=ep_rank,
        engine=engine,
        layers=layers,
        tensors=found_tensors,
        names={
            alias: name
            for alias, name in (*manifest.aliases.items(), *manifest.tied.items())
            if name in found_tensors
        },
        parts=tuple(part for part in manifest.parts if holds(part, needed.get(part.ranks, set()))),
    )


def _check_engine(manifest: Manifest, engine: str) -> None:
    if engine != TORCH and engine not in manifest.engines:
        known = ", ".join((TORCH, *manifest.engines))
        raise LayoutError(
            f"this shard set does not know how {quote(engine)} cuts; it serves {known}; "
            "split the checkpoint again with this version of shardprep"
        )


def choose_stages(
    manifest: Manifest,
    *,
    pipeline_parallel_size: int | None = None,
    stages: Sequence[Sequence[int]] | None = None,
) -> Stages:
    """The layers of each stage: those given, else those the set was split for, else even ones.

    Args:
        manifest: The set's.
        pipeline_parallel_size: Stages; None: as many as are given, else 1.
        stages: Layers [start, stop) of each.

    Raises:
        LayoutError: Where they do not cover the model or disagree with `pipeline_parallel_size`.
    """
    size = pipeline_parallel_size
    if stages is not None:
        if size not in (None, len(stages)):
            raise LayoutError(f"{len(stages)} stages were given for pipeline parallel size {size}")
        return check_stages(stages, manifest.layers)
    if size is None:
        size = 1
    if manifest.stages is not None and len(manifest.stages) == size:
        return manifest.stages
    if size == 1:
        return ((0, manifest.layers),)  # a model without layers too
    Grid(1, size)  # refuses what is not a size
    return even_stages(manifest.layers, size)


def holds(part: Part, wanted: set[Layer]) -> bool:
    """Whether a part holds pieces of any of some layers.

    Args:
        part: The part.
        wanted: Layers and placements.
    """
    return any(
        part.layers[0] <= layer < part.layers[1] if isinstance(layer, int) else layer in part.placements
        for layer in wanted
    )


def order(layer: Layer, layers: int) -> int:
    """Where a tensor stands in a forward pass: before all layers, in one of them, or after them.

    Args:
        layer: The tensor's layer or placement.
        layers: Layers of the model.
    """
    if isinstance(layer, int):
        return layer
    return layers if layer == "last" else -1


def _placements(pp_rank: int, size: int) -> set[Layer]:
    found: set[Layer] = {"every"}
    if pp_rank == 0:
        found |= {"first", "ends"}
    if pp_rank == size - 1:
        found |= {"last", "ends"}
    return found


@dataclass(frozen=True, slots=True)
class _Local:
    """What a rank takes of the tensors of one form."""

    form: Form
    takes: tuple[Take, ...]
    stripes: tuple[Stripes, ...]
    shape: tuple[int, ...]
    experts: tuple[int, int] | None
    layers: set[Layer]
    """Layers of the tensors that were found so far."""


def _local(
    form: Form,
    grain: int,
    *,
    engine: str,
    of_expert: bool,
    in_stage: tuple[int, int],
    in_group: tuple[int, int],
    experts: tuple[int, int] | None,
) -> _Local:
    """What a rank takes of tensors of this form: as one of (size, rank) of its stage, or of its expert group."""
    asked = dict(form.engines).get(engine, form.layout)
    size, rank = in_group if experts is not None and (of_expert or asked.experts) else in_stage
    taken = takes(form.layout, form.shape, grain, size=size, rank=rank, asked=asked)
    rows = experts if asked.experts else None
    shape = list(form.shape)
    if form.layout.dim is not None:
        shape[form.layout.dim] = sum(take.stop - take.start for take in taken)
    if rows is not None:
        shape[0] = rows[1] - rows[0]
    stripes = tuple(_stripes(form, take, rows, joins=len(taken) > 1) for take in taken)
    return _Local(form, taken, stripes, tuple(shape), rows, set())


def _stripes(form: Form, take: Take, experts: tuple[int, int] | None, *, joins: bool) -> Stripes:
    """The bytes of a take; by rows where it is not all of the piece's rows, or `joins` others in each row.

    Raises:
        LayoutError: Where they do not begin and end at bytes.
    """
    shape, dim = form.shape, form.layout.dim
    before: tuple[int, ...] = ()  # dims before the layout's
    held = 1  # indices along it that the piece holds
    inner = prod(shape) * BITS[form.dtype]  # bits of one of them
    first, last = take.start, take.stop
    if dim is None:
        first, last = 0, 1
        if experts is not None:
            inner, held, (first, last) = prod(shape[1:]) * BITS[form.dtype], shape[0], experts
    else:
        before, held = shape[:dim], take.piece.stop - take.piece.start
        inner = prod(shape[dim + 1 :]) * BITS[form.dtype]
    count, skipped = prod(before), 0
    if experts is not None and dim is not None:
        each = prod(before[1:])
        count, skipped = (experts[1] - experts[0]) * each, experts[0] * each
    start, width, stride = (skipped * held + first) * inner, (last - first) * inner, held * inner
    if width == stride and not joins:
        width, stride, count = width * count, stride * count, 1
    if not width * count:
        return Stripes(0, 0, 0, 1)
    if any(bits % 8 for bits in (start, width, stride if count > 1 else 0)):
        raise LayoutError(
            f"a block of this {form.dtype} tensor of {list(shape)} would not end at a byte boundary"
        )
    return Stripes(start // 8, width // 8, stride // 8, count)
