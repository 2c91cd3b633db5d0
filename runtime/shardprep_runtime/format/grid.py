"""Say which worker is which: rank <-> place in the grid, and which layers a stage holds. Arithmetic only."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class Grid:
    """`pipeline_parallel_size` stages of `tensor_parallel_size` workers each.

    Ranks count through a stage first: rank = pp_rank * tensor_parallel_size + tp_rank, as in vLLM and Megatron.
    The workers of a stage share its experts in `expert_parallel_size` groups of neighbours, each with a run of the
    experts that it cuts among its own workers; everything else is cut by tensor rank alone.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1

    def __post_init__(self) -> None:
        for axis in ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size"):
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                raise LayoutError(f"{axis} must be an integer of at least 1, not {size!r}")
        tp, ep = self.tensor_parallel_size, self.expert_parallel_size
        if tp % ep:
            fits = ", ".join(str(n) for n in range(1, min(tp, 4096) + 1) if tp % n == 0)
            raise LayoutError(
                f"expert_parallel_size {ep} does not divide tensor_parallel_size {tp}: an expert group is a run of "
                f"tensor ranks; sizes that work: {fits}"
            )

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

    @property
    def expert_group_size(self) -> int:
        """Workers that share the same experts, and cut each of them."""
        return self.tensor_parallel_size // self.expert_parallel_size

    def place_in_group(self, tp_rank: int) -> tuple[int, int]:
        """(ep_rank, rank within its expert group) of a tensor rank."""
        return divmod(tp_rank, self.expert_group_size)


def experts_of(experts: int, expert_parallel_size: int, ep_rank: int) -> tuple[int, int]:
    """The experts of one group: runs of equal length, a remainder to the first.

    (vllm/model_executor/layers/fused_moe/layer.py, `determine_expert_map`, linear placement.)

    Args:
        experts: Routed experts of a layer.
        expert_parallel_size: Groups.
        ep_rank: Which group, from 0.

    Returns:
        Experts [start, stop).

    Raises:
        LayoutError: Where a group would have none.
    """
    size, extra = divmod(experts, expert_parallel_size)
    if size == 0:
        have = f"{experts} experts" if experts else "no experts"
        raise LayoutError(
            f"expert_parallel_size {expert_parallel_size}: the model has {have}; use at most {max(experts, 1)}"
        )
    start = ep_rank * size + min(ep_rank, extra)
    return start, start + size + (ep_rank < extra)


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

    Args:
        layers: Layers of the model.
        pipeline_parallel_size: Stages.

    Raises:
        LayoutError: Where a stage would be empty.
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
    """Have stages cover all layers, in order and without gap, each with at least one.

    Args:
        stages: Layers [start, stop) of each.
        layers: Layers of the model.

    Raises:
        LayoutError: Where they do not.
    """
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


def check_stage_needs(stages: Stages, needs: Sequence[int], *, engine: str) -> None:
    """Refuse stages of which one holds no layer that an engine needs in each.

    Args:
        stages: Layers [start, stop) of each.
        needs: Layers, ascending, of which each stage must hold one.
        engine: Whose need it is, for the message.

    Raises:
        LayoutError: With stages that would work.
    """
    for start, stop in stages:
        if not any(start <= layer < stop for layer in needs):
            size = min(len(stages), len(needs))
            advice = stages_with(needs, stages[-1][1], size)
            named = ", ".join(map(str, needs[:8])) + (f" and {len(needs) - 8} more" if len(needs) > 8 else "")
            raise LayoutError(
                f"{engine} needs one of the layers {named} in every pipeline stage, and {_show([(start, stop)])} has "
                f"none; use at most {len(needs)} stages, for example --stages {_show(advice)}"
            )


def stages_with(needs: Sequence[int], layers: int, pipeline_parallel_size: int) -> Stages:
    """Stages as even as they can be where each must hold one of certain layers.

    Args:
        needs: Those layers, ascending; at least as many as stages.
        layers: Layers of the model.
        pipeline_parallel_size: Stages.
    """
    size = pipeline_parallel_size
    bounds = [0]
    for i in range(1, size):
        low = needs[bisect_left(needs, bounds[-1])] + 1
        high = needs[len(needs) - size + i]
        bounds.append(min(max(round(i * layers / size), low), high))
    return tuple(pairwise([*bounds, layers]))


def _show(stages: Sequence[Sequence[int]]) -> str:
    return ",".join(f"{stage[0]}-{stage[1] - 1}" if len(stage) == 2 else str(list(stage)) for stage in stages)
