"""Say what is done about lost workers, and name what happens to a route: the nouns of mending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal[
    "lost", "retried", "replaced", "promoted", "dropped", "fallback", "restored", "prefilled", "failed"
]
"""What happened to the route:

    lost       a worker is not used any more
    retried    a worker that seemed lost has answered a probe
    replaced   another worker that holds the stage has taken it
    promoted   a spare has taken the stage
    dropped    a worker that was to take a stage could not; it is not tried again
    fallback   a transport in this process has taken over
    restored   all stages have workers again; new sequences take them
    prefilled  a sequence has sent all of its positions again
    failed     nothing was left to try
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about lost workers: how long to wait, how often to try, who takes over. Times are seconds."""

    step_timeout: float = 30.0
    """For a step, beside what its positions take and those of the other steps that are under way."""
    position_timeout: float = 0.25
    """More for each of these positions: a long prompt on a slow worker does not count as hung."""
    probe_timeout: float = 5.0
    """For a probe, and for all that one worker is asked again after a loss that is not certain."""
    probe_period: float = 10.0
    """Time between two probes of idle workers; 0: there are none."""
    retries: int = 3
    """How often a worker is asked again."""
    first_pause: float = 0.05
    """Before that; drawn from 0 to this, which doubles (full jitter)."""
    promotion_timeout: float = 60.0
    """For a spare to build a stage and prove it."""
    replacement_timeout: float = 60.0
    """How long a worker that is to take the place of a lost one is waited for; 0: it is not."""
    attempts: int = 8
    """Losses that one step, and one mending, live through."""
    spares: int = 0
    """Workers more that `launch` has ready, which take the stage of one that is lost."""
    replace: bool = True
    """Whether `launch` starts another worker for one that is lost, and another spare for one that was used, where the
    transport takes new ones."""
    fallback: bool = True
    """Whether `launch` has this process go on when no worker is left, as far as its memory allows."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the route."""

    time: float
    """Since the epoch."""
    kind: EventKind
    worker: str | None
    stage: int | None
    seconds: float
    """What it took."""
    message: str
