"""Keep the workers that a launcher starts: who is on the way, who has failed, whom another takes the place of.

What a worker that fails at its start says is raised by whoever waits for it, as the error that it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from ...errors import InputError, WorkerError
from ..failures import Failure
from ..kinds import LINKS, TransportKind
from ..meeting import Meeting, Plan, open_meeting
from ..policy import Policy
from ..sealed import new_secret
from ..transport import Transport
from ..worker import WorkerOptions
from ..worker_process import WorkerJob, quiet
from .launcher import Listener, Started

END_TIMEOUT: Final = 2.0
"""Seconds in which a worker's process that was told to end may do so by itself."""

LOOK_EVERY: Final = 0.05
"""Seconds between two looks whether all workers are there."""


@dataclass(frozen=True, slots=True)
class Starter:
    """A launcher that is ready."""

    host: str
    """The address of this machine at which its workers reach the front end, where the user names none."""
    start: Callable[[WorkerJob, str], Started] | None
    """Begins to start what a job describes, and gives it the secret, which nobody else is to see. None: nobody is
    started, and whoever comes is waited for."""


class Crew:
    """The workers of one front end, and the starting of others for those that are lost."""

    transport: Transport
    """What reaches them."""

    def __init__(
        self,
        options: WorkerOptions,
        say: Callable[[str], None],
        starter: Starter | None = None,
        meeting: Meeting | None = None,
        secret: str = "",
    ) -> None:
        """Start nobody yet.

        Args:
            options: What all workers have in common.
            meeting: Where they meet; None: they are in this process.
            secret: What they prove there.
        """
        self.meeting = meeting
        self.spares = 0
        """So many are kept ready."""
        self.replaces = False
        """Whether workers are started for stages that are lost."""
        self.may_grow = False
        """Whether a worker may yet come for such a stage: started for it, or by somebody else."""
        self._options, self._say, self._secret = options, say, secret
        self._start = starter.start if starter is not None else None
        self._lock = threading.Lock()
        self._refilling = threading.Lock()
        self._started: list[Started] = []
        self._names: set[str] = set()
        self._joined: set[str] = set()
        self._lost: set[str] = set()
        self._is_closed = False

    @property
    def workers(self) -> Mapping[str, list[Started]]:
        """Processes that were started here and run, by the name of their worker; tensor rank 0 first."""
        found: dict[str, list[Started]] = {}
        with self._lock:
            for each in self._started:
                if not each.has_ended():
                    found.setdefault(each.worker, []).append(each)
        return found

    # -------------------------------------------------------------------------------------------------- who is started
    def start(self, pp_rank: int | None) -> str:
        """Start a worker for a stage, or a spare; its name. Returns at once."""
        with self._lock:
            if self._is_closed or self._start is None:
                raise WorkerError("this front end has ended, or starts no workers")
            name = base = "spare" if pp_rank is None else f"stage-{pp_rank}"
            count = 1
            while name in self._names:
                count += 1
                name = f"{base}-{count}"
            self._names.add(name)
            assert self.meeting is not None
            for tp_rank in range(self._options.tensor_parallel_size):
                options = dataclasses.replace(self._options, pp_rank=pp_rank, tp_rank=tp_rank)
                job = WorkerJob(options=options, master=self.meeting.address, name=name)
                found = self._start(job, self._secret)
                found.reader = threading.Thread(
                    target=self._listen, args=(found,), name=f"shardprep-{name}", daemon=True
                )
                found.reader.start()
                self._started.append(found)
        return name

    def _listen(self, one: Started) -> None:
        """Hear what a process says until it ends; then end those that cannot go on without it."""
        for said in one.messages():
            if isinstance(said, Failure):
                one.failure = said
            else:
                one.has_begun = True
                self._say(said)
        with self._lock:
            others = [each for each in self._started if each.worker == one.worker and each is not one]
            is_closed = self._is_closed
        for other in others:
            # a tensor rank whose neighbour has ended ends by itself, unless it is stopped or waits for the network
            if not other.wait(END_TIMEOUT):
                other.kill()
        error = one.error()
        if error is not None and not is_closed:
            self._say(str(error))

    def check(self) -> None:
        """Raise what the first process that has failed said of it."""
        with self._lock:
            started = list(self._started)
        for each in started:
            error = each.error()
            if error is not None:
                raise error

    # ---------------------------------------------------------------------------------------------------- who is lost
    @property
    def replace(self) -> Callable[[int], None] | None:
        """What starts a worker for a stage that was lost; None where nobody does."""
        return self._replace if self.replaces else None

    def _replace(self, pp_rank: int) -> None:
        """Start a worker for a stage, unless one is on its way; it joins when it is ready."""
        if self._coming(pp_rank):
            return
        self._say(f"stage {pp_rank}: starting another worker")
        there = self.transport.workers()
        with self._lock:
            hung = [each for each in self._started if each.worker in self._lost and each.worker not in there]
        for each in hung:
            each.kill()  # the stage's memory is wanted
        self.start(pp_rank)

    def refill(self) -> None:
        """Start another spare for each that has taken a stage, or was lost. Does not wait: somebody may be mending."""
        if self.spares:
            threading.Thread(target=self._start_spares, name="shardprep-spares", daemon=True).start()

    def _start_spares(self) -> None:
        with self._refilling, contextlib.suppress(WorkerError):  # this front end is ending
            there = sum(info.pp_rank is None for info in self.transport.workers().values())
            for _ in range(self.spares - there - self._coming(None)):
                self.start(None)

    def _coming(self, pp_rank: int | None) -> int:
        """Workers for a stage, or spares, that were started here, run, and have not joined yet."""
        with self._lock:
            self._joined |= self.transport.workers().keys()
            joined = self._joined | self._lost
        return sum(ranks[0].pp_rank == pp_rank and name not in joined for name, ranks in self.workers.items())

    def reach(self, transport: Transport) -> None:
        """Take `transport` for the one that says which workers are there, and which are lost."""
        self.transport = transport
        transport.watch(self._on_lost)

    def _on_lost(self, worker: str, _: str) -> None:
        with self._lock:
            self._lost.add(worker)
        self.refill()

    # -------------------------------------------------------------------------------------------------------- the end
    def stop(self) -> None:
        """Say that this front end is about to end: who ends now is not lost."""
        self.spares = 0
        if self.meeting is not None:
            self.meeting.end()

    def close(self) -> None:
        """End everything that was started here."""
        with self._lock:
            self._is_closed = True
            started = list(self._started)
        for each in started:
            if not each.has_begun:
                each.kill()  # it still imports, and would hear of its end when that is done
        _wait_for_end(started)  # those that serve were told
        for each in started:
            each.end()
        _wait_for_end(started)
        for each in started:
            if not each.has_ended():
                each.kill()  # it may be stopped: nothing else ends it then
        for each in started:
            if each.reader is not None:
                each.reader.join()


def _wait_for_end(started: list[Started]) -> None:
    deadline = time.monotonic() + END_TIMEOUT
    for each in started:
        each.wait(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingLauncher(ABC):
    """A launcher whose workers are processes that meet the front end, and are then reached by a transport."""

    transport: TransportKind = LINKS
    """What carries steps between them."""
    host: str | None = None
    """Where workers meet; None: at the address by which this launcher's workers reach this machine."""
    port: int = 0
    """At which they meet; 0: any that is free."""
    allow_public: bool = False
    """Serve the meeting there also where the Internet may reach it."""
    secret: str | None = None
    """What front end and workers share, at least 16 characters; None: a new one for those that are started by this."""

    @abstractmethod
    def ready(
        self, options: WorkerOptions, workers: int, timeout: float | None
    ) -> AbstractContextManager[Starter]:
        """Be ready to start workers.

        Args:
            options: What all of them have in common; each is as many processes as there are tensor ranks.
            workers: How many there will be, spares included.
            timeout: Seconds in which there must be a place for them; None: as this launcher thinks right.
        """

    @contextlib.contextmanager
    def gather(
        self, options: WorkerOptions, policy: Policy, timeout: float | None, listener: Listener
    ) -> Iterator[Crew]:
        """Serve a meeting, have the workers join it, and yield them once all are there.

        Args:
            options, policy, timeout, listener: As `Launcher.gather` has them.
        """
        stages, spares, shard_set = len(options.stages), policy.spares, options.shard_set
        if spares < 0:
            raise InputError(f"spares must be at least 0, not {spares}")
        if spares and shard_set.is_remote and shard_set.cache is None and stages > 1:
            raise InputError("spares need a cache: without one they would hold the whole model in memory")
        secret, kind = self.chosen_secret(), self.transport
        plan = Plan(
            transport=kind.name,
            stages=options.stages,
            tensor_parallel_size=options.tensor_parallel_size,
            dtype=options.compute.dtype,
            manifest_digest=shard_set.digest or "",
            revision=shard_set.revision,
            details=kind.details(stages + spares),
        )
        quiet()
        with contextlib.ExitStack() as stack:
            # 1) a place to meet
            starter = stack.enter_context(self.ready(options, stages + spares, timeout))
            host = self.host or starter.host
            meeting = open_meeting(host, self.port, plan=plan, secret=secret, allow_public=self.allow_public)
            stack.callback(meeting.close)

            # 2) workers that are on their way
            crew = Crew(options, listener.say, starter, meeting, secret)
            stack.callback(crew.close)
            stack.callback(crew.stop)
            starts = starter.start is not None
            wanted: list[int | None] = [*range(stages), *[None] * spares]
            for pp_rank in wanted if starts else []:
                crew.start(pp_rank)
            self.say_how(listener.say, meeting, options)

            # 3) what reaches them, and then all of them
            deadline = None if timeout is None else time.monotonic() + timeout

            def still_missing(who: str) -> None:
                crew.check()
                if deadline is not None and time.monotonic() > deadline:
                    raise WorkerError(
                        f"{who} did not come in time; look at what they print, or give them longer (timeout)"
                    )

            crew.reach(kind.open(meeting, still_missing))
            stack.callback(crew.transport.close)
            stack.callback(crew.stop)  # before the transport is closed, which tells the workers to end
            _wait_for_all(crew.transport, stages, spares if starts else 0, still_missing)

            # 4) whoever is lost from now on is replaced, where the transport takes new ones
            crew.may_grow = policy.replace or not starts
            crew.replaces = policy.replace and starts and crew.transport.can_replace
            crew.spares = spares if crew.replaces else 0
            yield crew

    def chosen_secret(self) -> str:
        """What front end and workers share. Raises InputError where that is for the user to say."""
        return self.secret or new_secret()

    def say_how(self, say: Callable[[str], None], meeting: Meeting, options: WorkerOptions) -> None:  # noqa: B027
        """Tell people what they are to do; nothing, where this does it all.

        Args:
            say: Takes a line.
            meeting: Where workers are to come.
            options: What they are to hold.
        """


def _wait_for_all(
    transport: Transport, stages: int, spares: int, still_missing: Callable[[str], None]
) -> None:
    """Return once each stage has a worker, and all spares are warm."""
    while True:
        held = [info.pp_rank for info in transport.workers().values()]
        missing = [f"of stage {pp_rank}" for pp_rank in range(stages) if pp_rank not in held]
        if held.count(None) < spares:
            missing.append(f"that are spares ({spares - held.count(None)})")
        if not missing:
            return
        still_missing(f"the workers {', '.join(missing)}")
        time.sleep(LOOK_EVERY)
