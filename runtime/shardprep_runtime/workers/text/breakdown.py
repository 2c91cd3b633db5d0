"""Say where the time of a token went: each stage's compute, staging, packing, the network, sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from ..transport import Output


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the seconds of one trip through the stages went; what it took in all is their sum."""

    compute: tuple[float, ...]
    """Seconds that each stage computed, in order."""
    staging: float
    """Copying between devices and hosts, of all stages."""
    packing: float
    """Turning tensors into what is sent and back, of all stages and the front end."""
    network: float
    """On the way, and waiting for a stage that was busy with another sequence."""
    sampling: float
    """Choosing tokens from logits."""
    total: float
    drafting: float = 0.0
    """What the draft model took to guess."""
    recovery: float = 0.0
    """Losses of workers, and sending all positions again."""
    is_prefill: bool = False
    """The trip took the whole prompt."""
    tokens: int = 1
    """How many tokens came of it."""


def breakdown_of(
    output: Output,
    *,
    trip: float,
    sampling: float,
    drafting: float = 0.0,
    recovery: float = 0.0,
    is_prefill: bool = False,
    tokens: int = 1,
) -> Breakdown:
    """Say where the seconds of a trip went.

    Args:
        output: What came of it, with what each worker spent.
        trip: Seconds that it took as the front end saw it; what nobody says is the network's.
        sampling, drafting, recovery: Seconds that the front end spent beside, on these.
        is_prefill: It took a whole prompt.
        tokens: How many came of it.
    """
    compute = tuple(each.compute for each in output.timings)
    staging = sum(each.staging for each in output.timings)
    packing = sum(each.packing for each in output.timings) + output.packing
    return Breakdown(
        compute=compute,
        staging=staging,
        packing=packing,
        # clocks of several processes: what is left may come out a little below nothing
        network=max(0.0, trip - sum(compute) - staging - packing),
        sampling=sampling,
        total=drafting + trip + recovery + sampling,
        drafting=drafting,
        recovery=recovery,
        is_prefill=is_prefill,
        tokens=tokens,
    )


def table(breakdowns: Iterable[Breakdown | None]) -> str:
    """Medians over the trips, in milliseconds, of prefill and of decode; None (no trip of its own) is left out."""
    trips = [each for each in breakdowns if each is not None]
    kinds = [
        (name, found)
        for name, found in (
            ("prefill", [each for each in trips if each.is_prefill]),
            ("decode", [each for each in trips if not each.is_prefill]),
        )
        if found
    ]
    if not kinds:
        return "no trips\n"
    rows: list[tuple[str, list[str]]] = [("", [f"{name} ms" for name, _ in kinds])]
    for label, values in _rows(kinds[0][1][0], trips):
        rows.append((label, [_milliseconds([values(each) for each in found]) for _, found in kinds]))
    rows.append(("trips", [f"{len(found):,}" for _, found in kinds]))
    if any(each.tokens > 1 for each in trips):
        shares = [sum(each.tokens for each in found) / len(found) for _, found in kinds]
        rows.append(("tokens per trip", [f"{each:.2f}" for each in shares]))
    left = max(len(label) for label, _ in rows)
    right = max(len(cell) for _, cells in rows for cell in cells)
    return "".join(
        f"{label:<{left}}" + "".join(f"  {cell:>{right}}" for cell in cells) + "\n" for label, cells in rows
    )


def _rows(first: Breakdown, trips: Sequence[Breakdown]) -> Iterable[tuple[str, _Value]]:
    """What is said of a trip, by name; what no trip has is left out where it is not a usual part of one."""
    stages = max(len(each.compute) for each in trips)
    for stage in range(stages):
        yield f"compute of stage {stage}", _Value("compute", stage)
    for name, label in (
        ("staging", "staging"),
        ("packing", "serialization"),
        ("network", "network and waiting"),
        ("drafting", "drafting"),
        ("sampling", "sampling"),
        ("recovery", "recovery"),
        ("total", "total"),
    ):
        if name not in ("drafting", "recovery") or any(getattr(each, name) for each in trips):
            yield label, _Value(name)


@dataclass(frozen=True, slots=True)
class _Value:
    name: str
    stage: int | None = None

    def __call__(self, trip: Breakdown) -> float:
        if self.stage is not None:  # a trip through the fallback may have fewer stages
            return trip.compute[self.stage] if self.stage < len(trip.compute) else 0.0
        found: float = getattr(trip, self.name)
        return found


def _milliseconds(seconds: list[float]) -> str:
    return f"{1000 * median(seconds):.2f}"
