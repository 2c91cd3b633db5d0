"""Decide what one worker loads: for each of its tensors the pieces, in order, and the dim along which they join.

Arithmetic over the manifest alone: a view that the layout rules do not allow is refused before any file is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cut import Take, takes
from .dtypes import nbytes
from .errors import LayoutError, quote
from .grid import Grid, Stages, check_stages, even_stages
from .manifest import Form, Layer, Manifest, Part


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor as one worker holds it."""

    name: str
    form: Form
    """The full tensor."""
    layer: Layer
    shape: tuple[int, ...]
    """What the worker holds: `takes` joined along the layout's dim."""
    takes: tuple[Take, ...]

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


def plan_view(
    manifest: Manifest,
    *,
    rank: int,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int | None = None,
    stages: Sequence[Sequence[int]] | None = None,
    vocab_multiple: int = 1,
) -> View:
    """The view of `rank` in a grid of `tensor_parallel_size` x `pipeline_parallel_size` workers.

    `stages` gives the layers [start, stop) of each stage; without it a set that was split for as many stages uses
    those, any other number is made by `grid.even_stages`. `vocab_multiple` pads uneven rows before they are shared:
    1 as transformers and torch do, 64 as vLLM does.
    Raises LayoutError for a grid, rank or stages that the manifest does not allow.
    """
    chosen = choose_stages(manifest, pipeline_parallel_size=pipeline_parallel_size, stages=stages)
    grid = Grid(tensor_parallel_size, len(chosen))
    if type(vocab_multiple) is not int or vocab_multiple < 1:
        raise LayoutError(f"vocab_multiple must be an integer of at least 1, not {vocab_multiple!r}")
    pp_rank, tp_rank = grid.place(rank)
    layers = chosen[pp_rank]
    placements = _placements(pp_rank, len(chosen))
    tensors: dict[str, TensorView] = {}
    of_form: dict[Form, tuple[tuple[Take, ...], tuple[int, ...]]] = {}
    needed: dict[tuple[int, int], set[Layer]] = {}
    for name, entry in manifest.tensors.items():
        layer = entry.layer
        if layer not in placements and not (isinstance(layer, int) and layers[0] <= layer < layers[1]):
            continue
        if entry.form not in of_form:
            try:
                of_form[entry.form] = _local(
                    entry.form,
                    manifest.grain,
                    size=tensor_parallel_size,
                    rank=tp_rank,
                    multiple=vocab_multiple,
                )
            except LayoutError as error:
                raise LayoutError(f"{quote(name)}: {error}") from None
        taken, shape = of_form[entry.form]
        tensors[name] = TensorView(name, entry.form, layer, shape, taken)
        for take in taken:
            needed.setdefault((take.piece.first_rank, take.piece.last_rank), set()).add(layer)
    tensors = dict(sorted(tensors.items(), key=lambda item: order(item[1].layer, manifest.layers)))
    return View(
        grid=grid,
        rank=rank,
        pp_rank=pp_rank,
        tp_rank=tp_rank,
        layers=layers,
        tensors=tensors,
        names={
            alias: name
            for alias, name in (*manifest.aliases.items(), *manifest.tied.items())
            if name in tensors
        },
        parts=tuple(part for part in manifest.parts if holds(part, needed.get(part.ranks, set()))),
    )


def choose_stages(
    manifest: Manifest,
    *,
    pipeline_parallel_size: int | None = None,
    stages: Sequence[Sequence[int]] | None = None,
) -> Stages:
    """The layers of each stage: those given, else those the set was split for, else even ones.

    Raises LayoutError where they do not cover the model or disagree with `pipeline_parallel_size`.
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
    Grid(1, size)  # refuses what is no size
    return even_stages(manifest.layers, size)


def holds(part: Part, wanted: set[Layer]) -> bool:
    """Whether the part holds pieces of any of the `wanted` layers or placements."""
    return any(
        part.layers[0] <= layer < part.layers[1] if isinstance(layer, int) else layer in part.placements
        for layer in wanted
    )


def order(layer: Layer, layers: int) -> int:
    """Where a tensor stands in a forward pass: before all layers, in one of `layers`, or after them."""
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


def _local(
    form: Form, grain: int, *, size: int, rank: int, multiple: int
) -> tuple[tuple[Take, ...], tuple[int, ...]]:
    """What a tensor rank takes of tensors of this form, and the shape that it then holds."""
    taken = takes(form.layout, form.shape, grain, size=size, rank=rank, multiple=multiple)
    dim = form.layout.dim
    if dim is None:
        return taken, form.shape
    length = sum(take.stop - take.start for take in taken)
    return taken, (*form.shape[:dim], length, *form.shape[dim + 1 :])
