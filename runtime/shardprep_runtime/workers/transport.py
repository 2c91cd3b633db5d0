"""Say what every way of reaching workers can do: step, health, reset, promote."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import InputError, quote
from ..stage.stage import Keep

if TYPE_CHECKING:
    import torch


NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What workers and sequences can be called."""


def check_name(name: str) -> str:
    """`name` if a worker or a sequence can have it. Raises InputError."""
    if not NAME.fullmatch(name):
        raise InputError(f"{quote(name)} cannot be a name; use 1 to 64 letters, digits, '.', '_' and '-'")
    return name


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of some positions of one sequence through all stages."""

    sequence: str
    """The sequence whose cache each stage takes; a new name begins a new one."""
    past: int
    """Positions that are computed already. A stage whose cache is longer forgets the rest, so that a step can be sent
    again, and tokens that a draft model guessed wrong can be taken back; one whose cache is shorter, or that has none,
    says CacheLostError."""
    keep: Keep = "last"


@dataclass(frozen=True, slots=True)
class Timing:
    """What one worker spent on one step, in seconds."""

    worker: str
    compute: float
    staging: float = 0.0
    """Copying between device and host, both ways."""
    packing: float = 0.0
    """Turning tensors into what is sent and back, both ways, as far as the worker sees it."""


@dataclass(frozen=True, slots=True)
class Output:
    """What came out of the last stage of a route."""

    logits: torch.Tensor
    """[batch, 1 (keep="last") or positions (keep="all"), vocabulary], on the CPU."""
    timings: tuple[Timing, ...]
    """One for each stage, in order."""
    packing: float = 0.0
    """Seconds that the front end spent on turning tensors into what is sent and back."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that can be asked."""

    name: str
    pp_rank: int | None
    """None: a spare, which holds no stage yet."""
    layers: tuple[int, int] | None
    """[start, stop) of its stage."""
    host: str
    pid: int
    manifest_digest: str
    nbytes: int = 0
    """Bytes of the tensors that it holds."""
    bytes_fetched: int = 0
    """Bytes that it fetched itself."""
    seconds: Mapping[str, float] | None = None
    """What its start took, by what it did, in order."""


@dataclass(frozen=True, slots=True)
class Health:
    """What a worker says of itself."""

    info: WorkerInfo
    sequences: int
    """How many sequences it holds caches of."""
    probe: str | None = None
    """Digest of what a real forward through its stage gave, where one was asked for: the same as long as it serves."""
    proven: bool | None = None
    """Whether the forward gave what the manifest says it must; None: the manifest says nothing. (False is never sent:
    the worker raises IntegrityError.)"""
    seconds: float = 0.0
    """Seconds that the forward took."""


class Transport(ABC):
    """A way of reaching workers. Safe to use from several threads.

    Errors of all methods (through the future for `step`): WorkerLostError, which names the worker, where one has ended,
    hangs or cannot be reached; CacheLostError where one does not hold the sequence as far as the step says;
    IntegrityError where one serves what it must not; WorkerError, with the worker's message, where one has failed
    otherwise.
    """

    name: str
    """As `--transport` names it."""

    can_replace: bool = False
    """Whether workers may join later, for those that were lost."""

    @abstractmethod
    def workers(self) -> Mapping[str, WorkerInfo]:
        """Those that can be asked now, by name; spares too. Those that were lost are not among them."""

    @abstractmethod
    def step(
        self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
    ) -> Future[Output]:
        """Send a step through workers.

        Steps of different sequences overlap: while one is in the second stage, another is in the first.

        Args:
            route: Names of workers, one for each stage in order.
            inputs: Ids of tokens, [batch, positions], int64, on the CPU.
            timeout: Seconds after which the step counts as hung.
        """

    @abstractmethod
    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        """Ask a worker how it is.

        Args:
            worker: Name of the worker.
            probe: Have it compute a forward of its stage as well.
            timeout: Seconds for which the answer is waited for.
        """

    @abstractmethod
    def reset(self, worker: str, sequence: str) -> None:
        """Have a worker forget a sequence. Does not wait, and never raises: who cannot be reached has forgotten it.

        Args:
            worker: Name of the worker.
            sequence: Name of the sequence, as `Step.sequence`.
        """

    @abstractmethod
    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        """Have a spare take a stage, and prove by a forward that it is the right one.

        Args:
            worker: Name of the spare.
            pp_rank: The stage, from 0.
            timeout: Seconds for which it is waited for.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers and let go of everything."""

    def watch(self, lost: Callable[[str, str], None]) -> None:  # noqa: B027 - one whose workers are never lost
        """Have `lost(worker, why)` called, from any thread, as soon as a worker is known for certain to be lost, also
        between steps. A transport that learns of it only from a step need not call it.
        """

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
