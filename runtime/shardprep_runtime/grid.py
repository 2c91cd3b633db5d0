"""Say which worker is which: rank <-> place in the grid, and which layers a stage holds. Arithmetic only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class Grid:
    """`pipeline_parallel_size` stages of `tensor_parallel_size` workers each.

    Ranks count through a stage first: rank = pp_rank * tensor_parallel_size + tp_rank, as in vLLM and Megatron.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        for axis in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                raise LayoutError(f"{axis} must be an integer of at least 1, not {size!r}")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def place(self, rank: int) -> tuple[int, int]:
        """(pp_rank, tp_rank) of `rank`. Raises LayoutError for a rank outside the grid."""
        if type(rank) is not int or not 0 <= rank < self.world_size:
            raise LayoutError(
                f"rank {rank!r} is not in a grid of {self.pipeline_parallel_size} x {self.tensor_parallel_size}"
                f" (pipeline x tensor parallel) workers; ranks go from 0 to {self.world_size - 1}"
            )
        return divmod(rank, self.tensor_parallel_size)


def parse_stages(text: str) -> list[tuple[int, int]] | None:
    """Stages as people write them, by first and last layer (0-15,16-31), as layers [start, stop); None for other text."""
    found = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip()) for word in text.split(",")]
    if not all(found):
        return None
    return [(int(each[1]), int(each[2] or each[1]) + 1) for each in found if each]


Stages = tuple[tuple[int, int], ...]
"""Layers [start, stop) of each pipeline stage, in order."""


def even_stages(layers: int, pipeline_parallel_size: int) -> Stages:
    """The stages that vLLM makes: equal ones; a remainder goes to the stages before the last, from the back.

    (vllm/distributed/utils.py, `get_pp_indices`: the last stage already carries the head.)
    Raises LayoutError where a stage would be empty.
    """
    size, extra = divmod(layers, pipeline_parallel_size)
    if size == 0:
        raise LayoutError(
            f"{layers} layers cannot fill {pipeline_parallel_size} pipeline stages; use at most {layers}"
        )
    counts = [size] * pipeline_parallel_size
    for i in range(extra):
        counts[-2 - i] += 1
    bounds = [sum(counts[:i]) for i in range(pipeline_parallel_size + 1)]
    return tuple(pairwise(bounds))


def check_stages(stages: Sequence[Sequence[int]], layers: int) -> Stages:
    """`stages` if they cover layers 0 to `layers` in order without gap, each with at least one layer."""
    end = 0
    for stage in stages:
        if len(stage) != 2 or stage[0] != end or stage[1] <= stage[0]:
            raise LayoutError(
                f"stages {_show(stages)}: expected the next to begin at layer {end} and hold at least one layer"
            )
        end = stage[1]
    if end != layers:
        raise LayoutError(f"stages {_show(stages)} end at layer {end}, the model has {layers} layers")
    return tuple((start, stop) for start, stop in stages)


def _show(stages: Sequence[Sequence[int]]) -> str:
    return ",".join(f"{stage[0]}-{stage[1] - 1}" if len(stage) == 2 else str(list(stage)) for stage in stages)
