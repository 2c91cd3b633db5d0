"""Serve a worker to a front end over links: take places in routes, compute steps, pass them on.

One thread listens to the front end and answers its pings, whatever else goes on; one computes, so that steps keep
their order and OpenMP has one set of threads; one for each place in a route receives, so that the next step is here
when the one before is done. What is sent is not waited for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from ...errors import FormatError, WorkerError
from ..failures import failure_of
from ..transport import NAME, Step
from .link import (
    DEFAULT_LIMITS,
    MAX_PENDING,
    MAX_PENDING_CONTROL,
    BrokenLink,
    Frame,
    Header,
    Limits,
    Link,
    Op,
    connect,
    open_device,
)

if TYPE_CHECKING:
    from ..meeting import Membership
    from ..worker import Worker

CONNECT_TIMEOUT: Final = 20.0
"""Seconds in which the other side of a link must be there."""

SILENCE: Final = 60.0
"""Seconds without a ping after which a worker takes its front end for gone: one whose host lost power says nothing."""

END_TIMEOUT: Final = 10.0
"""Seconds in which what is being computed may end."""

MAX_MESSAGE: Final = 1000
"""Characters of an error, of which JSON may make twelve times as many."""

MAX_ROUTES: Final = 64
"""A worker is in one, or in a few while a route takes the place of another."""


def serve_links(
    worker: Worker,
    membership: Membership,
    *,
    connect_timeout: float = CONNECT_TIMEOUT,
    silence: float = SILENCE,
    limits: Limits = DEFAULT_LIMITS,
) -> bool:
    """Answer for a worker.

    Args:
        connect_timeout: Seconds in which the other side of a link must be there.
        silence: Seconds without a ping after which the front end is taken for gone.
        limits: What a frame may bring.

    Returns:
        Whether the front end has said that this is the end; else it is gone.

    Raises:
        WorkerError: Where the front end never comes.
    """
    return _Served(worker, membership, connect_timeout, silence, limits).run()


class _Place:
    """The place of this worker in a route."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.before: Link | None = None
        self.after: Link | None = None
        self.is_over = False
        self.finished = -1
        """The last step that was computed and passed on, or has failed."""
        self._lock = threading.Lock()

    def connected(self, side: str, link: Link) -> None:
        with self._lock:
            setattr(self, side, link)
            is_over = self.is_over
        if is_over:
            link.close()

    def close(self) -> None:
        with self._lock:
            self.is_over = True
            links = [each for each in (self.before, self.after) if each is not None]
        for link in links:
            link.close()


class _Served:
    def __init__(
        self,
        worker: Worker,
        membership: Membership,
        connect_timeout: float,
        silence: float,
        limits: Limits,
    ) -> None:
        worker.name = membership.name
        self._worker = worker
        self._membership = membership
        self._timeout, self._silence, self._limits = connect_timeout, silence, limits
        self._device = open_device(membership.host)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._places: dict[int, _Place] = {}
        self._threads: list[threading.Thread] = []

    def run(self) -> bool:
        is_told = False
        try:
            self._control = self._connect(
                f"control-{self._membership.number}", 1, max_pending=MAX_PENDING_CONTROL
            )
        except BrokenLink as error:
            raise WorkerError(f"the front end at {self._membership.host} has gone: {error}") from None
        self._threads.append(self._start(self._compute, "compute"))
        try:
            while True:
                frame = self._control.receive(self._silence)
                if frame.header.op is Op.END:
                    is_told = True
                    break
                self._hear(frame)
        except BrokenLink:
            pass  # the front end is gone
        finally:
            # a process that ends while one of its threads waits for gloo is aborted
            self._jobs.put(None)
            with self._lock:
                places, self._places = list(self._places.values()), {}
            for place in places:
                place.close()
            self._control.close()
            deadline = time.monotonic() + END_TIMEOUT
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        return is_told

    def _start(self, work: Callable[..., None], name: str, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name=f"shardprep-{name}", daemon=True)
        thread.start()
        return thread

    def _connect(
        self,
        name: str,
        rank: int,
        is_over: Callable[[], bool] = lambda: False,
        *,
        max_pending: int = MAX_PENDING,
    ) -> Link:
        return connect(
            self._membership.store,
            name,
            rank,
            self._device,
            timeout=self._timeout,
            limits=self._limits,
            max_pending=max_pending,
            is_over=is_over,
        )

    # -------------------------------------------------------------------------------------------- the front end's word

    def _hear(self, frame: Frame) -> None:
        header, worker = frame.header, self._worker
        number, generation = header.number, header.generation
        if header.op is Op.PING:
            with self._lock:
                place = self._places.get(generation)
            finished = place is not None and place.finished >= number
            self._say(Header(Op.PONG, number, generation), {"finished": finished})
        elif header.op is Op.ROUTE:
            place = _Place(generation)
            with self._lock:
                is_full = len(self._places) >= MAX_ROUTES
                if not is_full:
                    self._places[generation] = place
            if is_full:
                self._say(
                    Header(Op.BROKEN, generation=generation), {"why": f"is in {MAX_ROUTES} routes already"}
                )
                return
            names = frame.tail.get("before"), frame.tail.get("after")
            self._threads = [each for each in self._threads if each.is_alive()]
            self._threads.append(self._start(self._take_place, f"route-{generation}", place, *names))
        elif header.op is Op.DROP:
            with self._lock:
                dropped = self._places.pop(generation, None)
            if dropped is not None:
                dropped.close()
        elif header.op is Op.RESET:
            sequence = frame.tail.get("sequence")
            if isinstance(sequence, str):
                self._jobs.put(lambda: worker.reset(sequence))
        elif header.op is Op.HEALTH and frame.tail.get("probe"):
            self._jobs.put(lambda: self._answer(number, lambda: asdict(worker.health(probe=True))))
        elif header.op is Op.HEALTH:  # not by this thread: it may have to wait for a step to end
            self._start(self._answer, "health", number, lambda: asdict(worker.health(probe=False)))
        elif header.op is Op.PROMOTE:
            pp_rank = frame.tail.get("pp_rank")
            if isinstance(pp_rank, int):
                self._jobs.put(lambda: self._answer(number, lambda: asdict(worker.promote(pp_rank))))

    def _answer(self, number: int, work: Callable[[], dict[str, Any]]) -> None:
        try:
            self._say(Header(Op.ANSWER, number), work())
        except Exception as error:  # noqa: BLE001 - it is the front end's to handle
            self._say_failed(Header(Op.FAILED, number), error)

    def _say(self, header: Header, tail: dict[str, Any]) -> None:
        with suppress(BrokenLink):  # `run` sees that too
            self._control.send(header, tail)

    def _say_failed(self, header: Header, error: Exception) -> None:
        failure = failure_of(error)
        self._say(header, asdict(replace(failure, message=failure.message[:MAX_MESSAGE])))

    # ------------------------------------------------------------------------------------------------------------ steps

    def _take_place(self, place: _Place, before: object, after: object) -> None:
        """Connect, in the order of the route: so nobody waits for one who waits for him. Then receive."""
        try:
            for side, name, rank in (("before", before, 1), ("after", after, 0)):
                if not isinstance(name, str) or not NAME.fullmatch(name):
                    raise BrokenLink("a route without links")
                place.connected(side, self._connect(name, rank, lambda: place.is_over))
            assert place.before is not None
            while not place.is_over:
                frame = place.before.receive()
                if frame.header.op is Op.STEP:
                    self._jobs.put(lambda frame=frame: self._step(place, frame))  # type: ignore[misc]
        except BrokenLink as error:
            self._left(
                place, "after" if place.before is not None and place.after is None else "before", error
            )

    def _left(self, place: _Place, side: str, why: BrokenLink) -> None:
        if not place.is_over:
            tail = {"side": side, "why": f"the link with the one {side} it: {why}"}
            self._say(Header(Op.BROKEN, generation=place.generation), tail)
        place.close()

    def _step(self, place: _Place, frame: Frame) -> None:
        if place.is_over or place.after is None:
            return  # of a route that is no more: whoever sent it has sent it again elsewhere
        header = frame.header
        try:
            step, timings = read_step(frame)
            assert frame.tensor is not None
            output, timing = self._worker.step(step, frame.tensor)
            began = time.perf_counter()
            parcel = place.after.pack(output)
            packing = timing.packing + frame.seconds + time.perf_counter() - began
            mine = [self._worker.name, timing.compute, timing.staging, packing]
            passed = Header(
                Op.STEP, header.number, header.generation, past=step.past, keep_all=header.keep_all
            )
            place.after.send(passed, {"sequence": step.sequence, "timings": [*timings, mine]}, parcel)
        except BrokenLink as error:
            self._left(place, "after", error)
        except Exception as error:  # noqa: BLE001 - of this step alone
            self._say_failed(Header(Op.FAILED, header.number, header.generation), error)
        place.finished = header.number

    def _compute(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def read_step(frame: Frame) -> tuple[Step, list[Any]]:
    """The step that a frame brings, and what was spent on it so far. Raises FormatError."""
    sequence, timings = frame.tail.get("sequence"), frame.tail.get("timings")
    if frame.tensor is None or not isinstance(timings, list):
        raise FormatError("a step without a tensor or timings")
    if not isinstance(sequence, str) or not NAME.fullmatch(sequence):
        raise FormatError("a step of a sequence whose name is none")
    return Step(sequence, frame.header.past, "all" if frame.header.keep_all else "last"), timings
