"""Decide where a pipeline is cut so that no stage is fuller, for its device, than it must be. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from shardprep_runtime.format.grid import Stages

ROUNDS = 32
"""Halvings of the search for the least share of a device: what is left of it is less than a kilobyte."""


def balance_stages(
    layers: Sequence[int],
    fixed: Sequence[int],
    capacity: Sequence[int],
    needs: Sequence[Sequence[int]] = (),
) -> Stages | None:
    """The stages whose fullest, as a share of its device, is as empty as can be; None where there are none.

    Each stage holds at least one layer. Of all that are equally good, the one whose stages differ least.

    Args:
        layers: Bytes of each layer.
        fixed: Bytes of each stage beside its layers: the embedding of the first, the head of the last.
        capacity: Bytes of each stage's device.
        needs: Groups of layers, in order; each stage must hold one of each group.
    """
    if not 0 < len(capacity) <= len(layers):
        return None
    reach = _Reach(layers, fixed, capacity, needs)
    high = max((sum(layers) + extra) / room for extra, room in zip(fixed, capacity, strict=True))
    high *= 1 + 1e-9  # a share times its device is what was shared, but for rounding
    if not reach.covers(high):
        return None  # what each stage must hold is not there
    low = (sum(layers) + sum(fixed)) / sum(capacity)
    near = low + max(layers) / min(capacity)
    if near < high and reach.covers(near):
        high = near
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if reach.covers(middle) else (middle, high)
    return reach.best(high)


class _Reach:
    """Which layers the stages can end at when none may be fuller than a limit."""

    def __init__(
        self,
        layers: Sequence[int],
        fixed: Sequence[int],
        capacity: Sequence[int],
        needs: Sequence[Sequence[int]],
    ) -> None:
        self.sums = [0, *accumulate(layers)]
        self.fixed = fixed
        self.capacity = capacity
        count = len(layers)
        self.least = [start + 1 for start in range(count)]
        """The first place at which a stage that starts at a layer can end."""
        for group in needs:
            following = count + 1
            wanted = set(group)
            for start in reversed(range(count)):
                following = start + 1 if start in wanted else following
                self.least[start] = max(self.least[start], following)

    def covers(self, limit: float) -> bool:
        """Whether stages that are at most `limit` full hold all layers."""
        count = len(self.least)
        starts = [True] + [False] * count
        for extra, room in zip(self.fixed, self.capacity, strict=True):
            ends = [False] * (count + 1)
            stop = done = 0
            for start in range(count):
                if not starts[start]:
                    continue
                stop = max(stop, start)
                while stop < count and self.sums[stop + 1] - self.sums[start] + extra <= limit * room:
                    stop += 1
                done = max(done, self.least[start])
                while (
                    done <= stop
                ):  # places before `done` were marked, or lie before the least of all later starts
                    ends[done] = True
                    done += 1
            starts = ends
        return starts[count]

    def best(self, limit: float) -> Stages | None:
        """Of the stages that are at most `limit` full, those whose squares add up to the least."""
        count = len(self.least)
        costs = [0.0] + [inf] * count
        came: list[list[int]] = []
        for extra, room in zip(self.fixed, self.capacity, strict=True):
            ends, whence = [inf] * (count + 1), [0] * (count + 1)
            for start in range(count):
                if costs[start] == inf:
                    continue
                for stop in range(self.least[start], count + 1):
                    held = self.sums[stop] - self.sums[start] + extra
                    if held > limit * room:
                        break
                    share = held / room
                    if costs[start] + share * share < ends[stop]:
                        ends[stop], whence[stop] = costs[start] + share * share, start
            costs = ends
            came.append(whence)
        if costs[count] == inf:
            return None
        stages: list[tuple[int, int]] = []
        stop = count
        for whence in reversed(came):
            stages.append((whence[stop], stop))
            stop = whence[stop]
        return tuple(reversed(stages))
