"""Decide where a pipeline is cut so that no stage is fuller, for its device, than it must be. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from shardprep_runtime.format.grid import Stages

ROUNDS = 32
"""Times that the search for the least share of a device halves its interval; it then is less than a kilobyte wide."""


def balance_stages(
    layers: Sequence[int],
    fixed: Sequence[int],
    capacity: Sequence[int],
    needs: Sequence[Sequence[int]] = (),
) -> Stages | None:
    """Choose stages so that the fullest one, as a share of its device, is as empty as possible.

    Each stage holds at least one layer. Among equally good choices the one whose stages differ least is taken.

    Args:
        layers: Bytes of each layer.
        fixed: Bytes of each stage beside its layers: the embedding of the first, the head of the last.
        capacity: Bytes of each stage's device.
        needs: Groups of layers, in order; each stage must hold at least one layer of each group.

    Returns:
        Layers [start, stop) of each stage; None where no such stages exist.
    """
    if not 0 < len(capacity) <= len(layers):
        return None
    reach = _Reach(layers, fixed, capacity, needs)
    high = max((sum(layers) + extra) / room for extra, room in zip(fixed, capacity, strict=True))
    high *= 1 + 1e-9  # a share times the bytes of its device gives the bytes back only up to rounding
    if not reach.covers(high):
        return None  # too few layers for every stage to hold one of each group
    low = (sum(layers) + sum(fixed)) / sum(capacity)
    near = low + max(layers) / min(capacity)
    if near < high and reach.covers(near):
        high = near
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if reach.covers(middle) else (middle, high)
    return reach.best(high)


class _Reach:
    """Finds the layers at which stages can end when no stage may be fuller than a limit."""

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
        """For each layer: the first place at which a stage that starts at the layer can end."""
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
                ):  # places before `done` are marked already, or no later start can end there
                    ends[done] = True
                    done += 1
            starts = ends
        return starts[count]

    def best(self, limit: float) -> Stages | None:
        """Choose stages that are at most `limit` full and whose squared shares have the least sum."""
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
