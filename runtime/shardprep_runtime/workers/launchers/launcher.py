"""Say what a launcher is: whoever has workers started, and gives them to the front end once all are there."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...errors import ShardprepError, WorkerError
from ..failures import Failure, raised

if TYPE_CHECKING:
    from ..policy import Event, Policy
    from ..worker import WorkerOptions
    from ..worker_process import WorkerJob
    from .crew import Crew


def _nothing(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told what happens, from any thread."""

    say: Callable[[str], None] = _nothing
    """Is told of progress, in lines for people."""
    event: Callable[[Event], None] = _nothing
    """Is told of each loss, and of each mending; must not raise."""


class Launcher(Protocol):
    """Who has the workers of a model started."""

    def gather(
        self, options: WorkerOptions, policy: Policy, timeout: float | None, listener: Listener
    ) -> AbstractContextManager[Crew]:
        """Have a worker for each stage, and spares, and end what was started at the end of the `with`.

        Args:
            options: What all workers have in common.
            policy: How many spares there are, and whether others are started for those that are lost.
            timeout: Seconds in which all must be there; None: however long it takes.

        Raises:
            InputError: Before anything is started, for what cannot be.
            ShardprepError: What the first worker that fails says; WorkerError where not all came in time.
        """
        ...


class Started(ABC):
    """A process that a launcher has started: a worker, or one of its tensor ranks."""

    def __init__(self, job: WorkerJob, pid: int | None) -> None:
        self.worker = job.own_name
        """The name that the front end calls the worker by."""
        self.pp_rank = job.options.pp_rank
        """The stage that it was started for; None: a spare."""
        self.pid = pid
        """Its process; None as long as that is not known."""
        self.failure: Failure | None = None
        """What it said of its end."""
        self.has_begun = False
        """It has said something: its imports are done."""
        self.reader: threading.Thread | None = None
        """Who hears what it says."""

    @abstractmethod
    def messages(self) -> Iterator[str | Failure]:
        """What it says, as it says it: lines for people, and last, perhaps, why it has failed. Ends with the process."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the process is no more."""

    @abstractmethod
    def how(self) -> str | None:
        """How it has ended without a word of ours, for a sentence; None where it ended as it was to."""

    @abstractmethod
    def kill(self) -> None:
        """End it, whatever it does. Does not wait."""

    @abstractmethod
    def wait(self, timeout: float) -> bool:
        """Whether it has ended within so many seconds."""

    def end(self) -> None:
        """Tell it to end. Does not wait."""
        self.kill()

    def error(self) -> ShardprepError | None:
        """Why it has ended; None while it runs, and where it was to end."""
        if not self.has_ended():
            return None
        if self.reader is not None and self.reader is not threading.current_thread():
            self.reader.join(1)  # what it said last is on its way
        if self.failure is not None:
            return raised(self.failure, self.worker)
        how = self.how()
        return None if how is None else WorkerError(f"{self.worker}: its process has ended {how}")
