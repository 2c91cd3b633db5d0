"""Say how many bytes of weights each worker of a grid holds, exactly, by asking for its view. Arithmetic only.

Tensors of the same form and the same expert have the same share on a rank. So one view of one tensor of each kind is
enough: a layer's bytes are those of its kinds, each times the number of its tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Entry, Form, Layer, Manifest
from shardprep_runtime.format.view import Place, plan_view

from ..layout import ModelLayout


class Census:
    """Counts the tensors of each kind in each layer of a model."""

    def __init__(self, layout: ModelLayout, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.layout = layout
        self.entries: dict[str, Entry] = {}
        """The name of one tensor of each kind -> that tensor; the name stands for the kind."""
        forms: dict[Form, Form] = {}
        known: dict[
            tuple[str, tuple[int, ...], int, int], Form
        ] = {}  # by the layout's identity, since hashing a form is slow
        kinds: dict[tuple[int, int | None], str] = {}
        self.layers: dict[Layer, Counter[str]] = {}
        """Layer or placement -> kind -> number of tensors."""
        for name, placed in layout.tensors.items():
            dtype, shape = tensors[name]
            alike = dtype, shape, id(placed.layout), id(placed.engines)
            form = known.get(alike)
            if form is None:
                form = Form(dtype, shape, placed.layout, placed.engines)
                form = known[alike] = forms.setdefault(form, form)
            key = id(form), placed.expert
            if key not in kinds:
                kinds[key] = name
                self.entries[name] = Entry(form, "every", placed.expert)
            self.layers.setdefault(placed.layer, Counter())[kinds[key]] += 1

    def weigh(
        self, tensor_parallel_size: int, expert_parallel_size: int = 1, *, engine: str = manifests.TORCH
    ) -> Weights:
        """Give the bytes of weights of each tensor rank.

        Args:
            engine: The engine whose cuts are weighed.

        Raises:
            LayoutError: For sizes that the layout does not allow.
        """
        size = tensor_parallel_size
        if expert_parallel_size > 1 and self.layout.experts < expert_parallel_size:
            raise LayoutError(
                f"{self.layout.experts} experts cannot be shared by {expert_parallel_size} groups"
            )
        sample = Manifest(
            model={},
            layers=0,
            grain=size,
            stages=None,
            block_bytes=1,
            tensors=self.entries,
            aliases={},
            tied={},
            parts=(),
            side_files=(),
            experts=self.layout.experts,
            engines=self.layout.engines,
        )
        ranks = []
        for rank in range(size):
            view = plan_view(
                sample,
                Place(
                    rank=rank,
                    tensor_parallel_size=size,
                    expert_parallel_size=expert_parallel_size,
                    engine=engine,
                ),
            )
            ranks.append({name: tensor.nbytes for name, tensor in view.tensors.items()})
        alike: dict[frozenset[tuple[str, int]], tuple[int, ...]] = {}
        sums: dict[Layer, tuple[int, ...]] = {}
        for layer, counts in self.layers.items():
            key = frozenset(counts.items())
            if key not in alike:
                alike[key] = tuple(
                    sum(own.get(name, 0) * count for name, count in counts.items()) for own in ranks
                )
            sums[layer] = alike[key]
        none = (0,) * size
        layers = tuple(sums.get(layer, none) for layer in range(self.layout.layers))
        return Weights(
            layers,
            {layer: found for layer, found in sums.items() if isinstance(layer, str)},
            tuple(tuple(accumulate((layer[rank] for layer in layers), initial=0)) for rank in range(size)),
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights of each tensor rank, by layer."""

    layers: tuple[tuple[int, ...], ...]
    """For each layer: bytes of each rank."""
    outside: Mapping[str, tuple[int, ...]]
    """Placement of tensors that are not in a layer -> bytes of each rank."""
    sums: tuple[tuple[int, ...], ...]
    """For each rank, then for each layer: bytes of all layers before it."""

    def beside(self, *, first: bool, last: bool) -> tuple[int, ...]:
        """Bytes that each rank of a stage holds beside its layers.

        Args:
            first: Whether the stage is the first one, with the embedding.
            last: Whether the stage is the last one, with the head.
        """
        found = [0] * len(self.sums)
        for placement, sizes in self.outside.items():
            if placement == "every" or (first and placement != "last") or (last and placement != "first"):
                found = [a + b for a, b in zip(found, sizes, strict=True)]
        return tuple(found)

    def stage(self, start: int, stop: int, *, first: bool, last: bool) -> tuple[int, ...]:
        """Bytes that each rank of a stage holds.

        Args:
            start: First layer of the stage.
            stop: One past its last layer.
            first: Whether the stage is the first one, with the embedding.
            last: Whether the stage is the last one, with the head.
        """
        beside = self.beside(first=first, last=last)
        return tuple(own[stop] - own[start] + more for own, more in zip(self.sums, beside, strict=True))
