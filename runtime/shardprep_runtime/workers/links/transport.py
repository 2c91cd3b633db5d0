"""Reach workers by links, torch.distributed's gloo in groups of two: the default way.

The front end has a control link with each worker. A step goes along a chain, from the front end to the first worker of
its route, from each to the next, and from the last back; each neighbouring pair has a data link, made when a route is
used for the first time. So the end of a worker breaks its own links and no others, and who takes its place gets new
ones.

Somebody waits for something on every link, so the end of a process is noticed as soon as the kernel closes its
connections. One that hangs is found by pings, which a worker answers while it computes.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ...errors import FormatError, InputError, ShardprepError, WorkerError, WorkerLostError, quote
from ..failures import again, raised, read_failure
from ..meeting import read_info
from ..transport import Health, Output, Step, Timing, Transport, WorkerInfo
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
    Parcel,
    connect,
    open_device,
)
from .served import CONNECT_TIMEOUT

if TYPE_CHECKING:
    import torch

    from ..meeting import Meeting, Member

PING_PERIOD: Final = 0.5
"""Seconds between two pings."""

HANG_TIMEOUT: Final = 2.0
"""Seconds without a word after which a worker counts as hung."""

GRACE: Final = 0.2
"""Seconds in which the control link of a worker that has ended breaks as well, once a data link has."""

ANSWER_TIMEOUT: Final = 0.5
"""Seconds in which workers say how far they are with a step that takes too long."""

END_TIMEOUT: Final = 3.0
"""Seconds in which workers that were told to end may close their links themselves."""

MAX_ROUTES: Final = 8
"""Routes whose links are kept; the one that was used least recently goes."""

ACCEPT_PERIOD: Final = 0.2


class _Peer:
    """A worker, as the front end sees it."""

    def __init__(self, info: WorkerInfo, link: Link) -> None:
        self.info = info
        self.link = link
        self.heard = time.monotonic()
        self.is_hung = False
        self.questions: dict[int, tuple[Op, Future[Mapping[str, Any]]]] = {}

    @property
    def name(self) -> str:
        return self.info.name


class _Flight:
    """A step that is under way."""

    def __init__(self, step: Step, shape: tuple[int, int], packing: float, timeout: float) -> None:
        self.step = step
        self.shape = shape
        self.packing = packing
        self.timeout = timeout
        self.future: Future[Output] = Future()
        self.future.set_running_or_notify_cancel()
        self.answers: dict[str, bool] = {}
        """By worker that has said how far it is: whether it has done its part."""

    def check(self, header: Header) -> None:
        """Raises FormatError for what cannot be the result."""
        batch, positions = self.shape
        expected = batch, positions if self.step.keep == "all" else 1
        if header.dtype is None or (header.batch, header.positions) != expected or not header.width:
            raise FormatError(f"logits of shape {list(header.shape)} for {batch} x {positions} token ids")


class _Route:
    """Workers in order, the two links of the front end with them, and the steps that are under way there."""

    def __init__(self, generation: int, names: tuple[str, ...]) -> None:
        self.generation = generation
        self.names = names
        self.is_ready = threading.Event()
        """Or has failed."""
        self.sending = threading.Lock()
        self.first: Link | None = None
        self.last: Link | None = None
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight] = {}
        self._error: WorkerError | None = None

    @property
    def error(self) -> WorkerError | None:
        return None if self._error is None else again(self._error)

    def connected(self, side: str, link: Link) -> None:
        with self._lock:
            has_failed = self._error is not None
            if not has_failed:
                setattr(self, side, link)
        if has_failed:
            link.close()

    def add(self, number: int, flight: _Flight) -> Link:
        """The link by which to send a step. Raises the error of a route that has failed.

        Args:
            number: The step's, which its answer has too.
            flight: Who waits for the answer.
        """
        with self._lock:
            if self._error is not None:
                raise again(self._error)
            assert self.first is not None
            self._flights[number] = flight
            return self.first

    def find(self, number: int) -> _Flight | None:
        with self._lock:
            return self._flights.get(number)

    def take(self, number: int) -> _Flight | None:
        """Who takes a flight settles its future."""
        with self._lock:
            return self._flights.pop(number, None)

    @property
    def is_idle(self) -> bool:
        with self._lock:
            return self.is_ready.is_set() and not self._flights

    def fail(self, error: WorkerError) -> None:
        """All that is under way, and all that follows, has this error."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            flights, self._flights = list(self._flights.values()), {}
        self.is_ready.set()
        for flight in flights:
            flight.future.set_exception(again(error))

    def close(self) -> None:
        """Close the links of a route that has failed, and let go of them."""
        with self._lock:
            links = [each for each in (self.first, self.last) if each is not None]
            self.first = self.last = None
        for link in links:
            link.close()


class LinkTransport(Transport):
    """The front end of workers that run `serve_links`. It welcomes whoever may join, now and later.

    Args:
        ping_period: Seconds between two pings.
        hang_timeout: Seconds without a word after which a worker is lost, until it speaks again.
        connect_timeout: Seconds in which both sides of a link must be there.
    """

    name = "links"
    can_replace = True

    def __init__(
        self,
        meeting: Meeting,
        *,
        ping_period: float = PING_PERIOD,
        hang_timeout: float = HANG_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._meeting = meeting
        self._timeout = connect_timeout
        self._limits = limits
        self._device = open_device(meeting.host)
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._routes: dict[tuple[str, ...], _Route] = {}  # the one that was used last is last
        self._generations = itertools.count(1)
        self._numbers = itertools.count(1)
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._clock = _Clock()
        self._watchers: list[Callable[[str, str], None]] = []
        self._period, self._hang_timeout = ping_period, hang_timeout
        self._start(self._ping, "pings")
        self._start(self._accept, "accept")
        atexit.register(self.close)  # a process that ends while one of its threads waits for gloo is aborted

    # -------------------------------------------------------------------------------------------------- what is asked

    def workers(self) -> Mapping[str, WorkerInfo]:
        with self._lock:
            return {name: peer.info for name, peer in self._peers.items() if not peer.is_hung}

    def watch(self, lost: Callable[[str, str], None]) -> None:
        with self._lock:
            self._watchers.append(lost)

    def step(
        self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
    ) -> Future[Output]:
        import torch

        failed: Future[Output] = Future()
        deadline = time.monotonic() + timeout
        try:
            if inputs.dtype != torch.int64 or inputs.ndim != 2 or not inputs.numel():
                raise InputError(
                    f"token ids are [batch, positions] of int64, not {list(inputs.shape)} of {inputs.dtype}"
                )
            began = time.perf_counter()
            parcel = Parcel(inputs)
            batch, positions = inputs.shape
            flight = _Flight(step, (batch, positions), time.perf_counter() - began, timeout)
            taken = self._route(tuple(route))
            if not taken.is_ready.wait(timeout):
                raise WorkerLostError(
                    f"{route[-1]}: no links in {timeout:g} s along {', '.join(route)}", worker=route[-1]
                )
            self._send(taken, flight, parcel, deadline)
        except ShardprepError as error:
            failed.set_exception(error)
            return failed
        return flight.future

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        found = self._ask(worker, Op.HEALTH, {"probe": probe}, timeout)
        try:
            proven, digest = found.get("proven"), found.get("probe")
            health = Health(
                info=self._learn(worker, found["info"]),
                sequences=int(found["sequences"]),
                probe=None if digest is None else str(digest),
                proven=None if proven is None else bool(proven),
                seconds=float(found["seconds"]),
            )
        except (KeyError, TypeError, ValueError, InputError):
            raise WorkerError(
                f"{worker}: an answer that cannot be read; use the same version everywhere"
            ) from None
        return health

    def reset(self, worker: str, sequence: str) -> None:
        with self._lock:
            peer = self._peers.get(worker)
        if peer is not None:
            self._say(peer, Header(Op.RESET), {"sequence": sequence})

    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        found = self._ask(worker, Op.PROMOTE, {"pp_rank": pp_rank}, timeout)
        try:
            return self._learn(worker, found)
        except (KeyError, TypeError, ValueError, InputError):
            raise WorkerError(
                f"{worker}: an answer that cannot be read; use the same version everywhere"
            ) from None

    def close(self) -> None:
        with self._lock:
            if self._is_over.is_set():
                return
            self._is_over.set()
            peers = list(self._peers.values())
            routes, self._routes = list(self._routes.values()), {}
        for route in routes:
            route.fail(WorkerError("the front end was closed"))
            route.close()
        for peer in peers:
            self._say(peer, Header(Op.END), {})
            if peer.is_hung:
                peer.link.close()
        deadline = time.monotonic() + END_TIMEOUT
        mine = threading.current_thread()
        for thread in self._threads:
            if thread is not mine:
                thread.join(max(0.0, deadline - time.monotonic()))
        for peer in peers:
            peer.link.close()
        for thread in self._threads:
            if thread is not mine:
                thread.join(END_TIMEOUT)
        self._clock.close()
        atexit.unregister(self.close)

    # ------------------------------------------------------------------------------------------------------- workers

    def _start(self, work: Callable[..., None], name: str, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, name=f"shardprep-{name}", daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive() or each.ident is None]
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_over.is_set():
            try:
                member = self._meeting.joined(ACCEPT_PERIOD)
            except WorkerError:
                return  # nobody can join any more; those who have are not concerned
            if member is not None:
                self._start(self._meet, f"control-{member.name}", member)

    def _meet(self, member: Member) -> None:
        """Welcome a worker, and listen to it until it is gone."""
        name = member.name
        try:
            self._meeting.welcome(member)
            link = self._connect(
                f"control-{member.number}", 0, self._is_over.is_set, max_pending=MAX_PENDING_CONTROL
            )
        except BrokenLink:
            return
        peer = _Peer(member.info, link)
        with self._lock:
            is_over = self._is_over.is_set()
            if not is_over:
                self._peers[name] = peer
        if is_over:
            link.close()
            return
        try:
            while True:
                self._hear(peer, link.receive())
        except BrokenLink as error:
            what = "has ended" if error.is_closed else f"cannot be reached: {error}"
            lost = WorkerLostError(f"{name} {what}", worker=name, is_certain=error.is_closed)
            self._lost(peer, lost, is_gone=True)
        finally:
            link.close()

    def _connect(
        self, name: str, rank: int, is_over: Callable[[], bool], *, max_pending: int = MAX_PENDING
    ) -> Link:
        return connect(
            self._meeting.store,
            name,
            rank,
            self._device,
            timeout=self._timeout,
            limits=self._limits,
            max_pending=max_pending,
            is_over=is_over,
        )

    def _hear(self, peer: _Peer, frame: Frame) -> None:
        header = frame.header
        peer.heard, peer.is_hung = time.monotonic(), False
        if header.op is Op.PONG:
            route = self._route_of(header.generation)
            flight = None if route is None else route.find(header.number)
            if flight is not None:
                flight.answers[peer.name] = bool(frame.tail.get("finished"))
        elif header.op is Op.BROKEN:
            route = self._route_of(header.generation)
            if route is not None and peer.name in route.names:
                place = route.names.index(peer.name) + (-1 if frame.tail.get("side") == "before" else 1)
                suspect = route.names[place] if 0 <= place < len(route.names) else peer.name
                self._doubt(route, suspect, f"{peer.name} says: {quote(frame.tail.get('why'), limit=300)}")
        elif header.op is Op.FAILED and header.generation:
            route = self._route_of(header.generation)
            failed = None if route is None else route.take(header.number)
            if failed is not None:
                failed.future.set_exception(_failure(frame.tail, peer.name))
        elif header.op in (Op.ANSWER, Op.FAILED):
            asked = peer.questions.pop(header.number, None)
            if asked is None:
                return  # who asked has given up
            question = asked[1]
            if header.op is Op.ANSWER:
                question.set_result(frame.tail)
            else:
                question.set_exception(_failure(frame.tail, peer.name))

    def _ping(self) -> None:
        """Ask all workers again and again whether they are there."""
        looked = time.monotonic()
        while not self._is_over.wait(self._period):
            now = time.monotonic()
            with self._lock:
                peers = list(self._peers.values())
            if (
                now - looked > 2 * self._period
            ):  # this process was stopped or starved: answers may lie here unread
                for peer in peers:
                    peer.heard = now
            looked = now
            for peer in peers:
                silence = now - peer.heard
                if silence > self._hang_timeout and not peer.is_hung:
                    peer.is_hung = True
                    why = f"{peer.name} hangs: it has said nothing for {silence:.1f} s"
                    self._lost(peer, WorkerLostError(why, worker=peer.name), is_gone=False)
                elif not peer.is_hung or silence % 10 < self._period:
                    self._say(peer, Header(Op.PING), {})

    def _say(self, peer: _Peer, header: Header, tail: Mapping[str, object]) -> None:
        with suppress(BrokenLink):  # who listens to that link knows, and says so
            peer.link.send(header, tail)

    def _ask(self, worker: str, op: Op, tail: Mapping[str, object], timeout: float) -> Mapping[str, Any]:
        """Have a question answered. Raises the errors that `Transport` names."""
        number = next(self._numbers)
        question: Future[Mapping[str, Any]] = Future()
        question.set_running_or_notify_cancel()
        peer = self._find(worker)
        with self._lock:
            peer.questions[number] = op, question
            is_here = self._peers.get(worker) is peer
        if not is_here:  # it has ended just now, and this question may have been overlooked
            raise WorkerLostError(f"{worker} has ended", worker=worker, is_certain=True)
        self._say(peer, Header(op, number), tail)
        try:
            return question.result(timeout)
        except TimeoutError:
            peer.questions.pop(number, None)
            raise WorkerLostError(
                f"{worker} has not answered in {timeout:g} s; it computes something else, or hangs",
                worker=worker,
            ) from None

    def _learn(self, worker: str, said: Mapping[str, Any]) -> WorkerInfo:
        info = replace(read_info({**said, "seconds": said["seconds"] or {}}), name=worker)
        with self._lock:
            peer = self._peers.get(worker)
            if peer is not None:
                peer.info = info
        return info

    def _find(self, worker: str) -> _Peer:
        """A worker that can be asked. Raises WorkerLostError."""
        with self._lock:
            peer = self._peers.get(worker)
        if peer is None:
            raise WorkerLostError(f"{worker} has ended, or was never here", worker=worker, is_certain=True)
        if peer.is_hung:
            raise WorkerLostError(f"{worker} hangs", worker=worker)
        return peer

    def _lost(self, peer: _Peer, error: WorkerLostError, *, is_gone: bool) -> None:
        """Fail what a worker was needed for, and say so. One that only hangs may come back."""
        with self._lock:
            if is_gone:
                del self._peers[peer.name]
            is_known = is_gone and peer.is_hung
            routes = [each for names, each in self._routes.items() if peer.name in names]
            watchers = [] if is_known or self._is_over.is_set() else list(self._watchers)
        for route in routes:  # who waits is told first: to close a link takes ten milliseconds
            route.fail(error)
        for number, (op, question) in list(peer.questions.items()):
            # a worker that builds a stage may be too busy to answer pings
            may_wait = op is Op.PROMOTE and not is_gone
            if not may_wait and peer.questions.pop(number, None) is not None:
                question.set_exception(again(error))
        try:
            for watcher in watchers:
                watcher(peer.name, str(error))
        finally:
            for route in routes:
                self._drop(route, error)

    # -------------------------------------------------------------------------------------------------------- routes

    def _route(self, names: tuple[str, ...]) -> _Route:
        """The route along these workers; its links are being made if it is new. Raises WorkerLostError."""
        with self._lock:
            route = self._routes.get(names)
            if route is not None and len(self._routes) == 1:
                return route  # if one of its workers is lost meanwhile, it says so
        if not names or len(set(names)) != len(names):
            raise InputError(f"no route: {', '.join(names) or 'nobody'}; name one worker for each stage")
        for name in names:
            self._find(name)
        with self._lock:
            if self._is_over.is_set():
                raise WorkerError("the front end was closed")
            route = self._routes.pop(names, None)
            is_new = route is None
            if route is None:
                route = _Route(next(self._generations), names)
            self._routes[names] = route  # as the one that was used last
            spare = [each for each in self._routes.values() if each is not route and each.is_idle]
            old = spare[0] if len(self._routes) > MAX_ROUTES and spare else None
        if old is not None:
            self._drop(old, WorkerError("a route that has not been used for long was given up"))
        if is_new:
            self._start(self._make, f"route-{route.generation}", route)
        return route

    def _route_of(self, generation: int) -> _Route | None:
        with self._lock:
            for route in self._routes.values():
                if route.generation == generation:
                    return route
        return None

    def _make(self, route: _Route) -> None:
        """Have each worker of a route connect, connect to the first and the last, and listen to the last."""
        names, generation = route.names, route.generation
        links = [f"data-{generation}-{number}" for number in range(len(names) + 1)]
        for number, name in enumerate(names):
            with self._lock:
                peer = self._peers.get(name)
            if peer is not None:
                tail = {"before": links[number], "after": links[number + 1]}
                self._say(peer, Header(Op.ROUTE, generation=generation), tail)

        def has_failed() -> bool:
            return route.error is not None

        suspect = names[0]
        try:
            route.connected("first", self._connect(links[0], 0, has_failed))
            suspect = names[-1]
            last = self._connect(links[-1], 1, has_failed)
            route.connected("last", last)
            route.is_ready.set()
            while True:
                self._land(route, last)
        except BrokenLink as error:
            self._doubt(route, suspect, f"the link with {suspect} broke: {error}")

    def _land(self, route: _Route, last: Link) -> None:
        """Wait for a step to come out of the last stage."""

        def check(header: Header) -> None:
            flight = route.find(header.number)
            if flight is not None:
                flight.check(header)

        frame = last.receive(check=check)
        flight = route.take(frame.header.number)
        if flight is None or frame.tensor is None:
            return  # it came too late: its future has an error already
        try:
            timings = tuple(_timing(each) for each in frame.tail["timings"])
            if [each.worker for each in timings] != list(route.names):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            flight.future.set_exception(
                WorkerError(f"{route.names[-1]}: a result without what was spent on it")
            )
        else:
            flight.future.set_result(Output(frame.tensor, timings, flight.packing + frame.seconds))

    def _send(self, route: _Route, flight: _Flight, parcel: Parcel, deadline: float) -> None:
        step = flight.step
        with route.sending:  # the workers count on numbers that grow
            number = next(self._numbers)
            header = Header(Op.STEP, number, route.generation, past=step.past, keep_all=step.keep == "all")
            first = route.add(number, flight)
            try:
                first.send(header, {"sequence": step.sequence, "timings": []}, parcel)
            except BrokenLink as error:
                self._doubt(route, route.names[0], f"the link to {route.names[0]} broke: {error}")
        self._clock.at(deadline, lambda: self._late(route, number))

    def _late(self, route: _Route, number: int) -> None:
        """A step has not come back in time: ask all workers of its route how far they are, then name one."""
        flight = route.find(number)
        if flight is None:
            return
        for name in route.names:
            with self._lock:
                peer = self._peers.get(name)
            if peer is not None:
                self._say(peer, Header(Op.PING, number, route.generation), {})
        self._clock.at(time.monotonic() + ANSWER_TIMEOUT, lambda: self._too_late(route, number))

    def _too_late(self, route: _Route, number: int) -> None:
        flight = route.take(number)
        if flight is None:
            return
        silent = [name for name in route.names if name not in flight.answers]
        busy = [name for name, finished in flight.answers.items() if not finished]
        first = next((name for name in route.names if name in busy), None)
        if silent:
            worker, why = silent[0], "and it does not answer"
        elif first is not None:
            worker, why = first, "which computes, or waits for something"
        else:
            worker, why = route.names[-1], "though all say that they have done it"
        message = f"{worker}: a step is not done after {flight.timeout:g} s, {why}"
        flight.future.set_exception(WorkerLostError(message, worker=worker))

    def _doubt(self, route: _Route, worker: str, why: str) -> None:
        """A data link broke: the worker has ended, as its control link is about to tell, or cannot be reached."""
        error = WorkerLostError(f"{worker} cannot be reached: {why}", worker=worker)
        self._clock.at(time.monotonic() + GRACE, lambda: self._drop(route, error))

    def _drop(self, route: _Route, error: WorkerError) -> None:
        """Give a route up: what is under way there fails, the next step along the same workers gets new links."""
        route.fail(error)
        with self._lock:
            if self._routes.get(route.names) is not route:
                return
            del self._routes[route.names]
            peers = [each for name in route.names if (each := self._peers.get(name)) is not None]
        for peer in peers:
            self._say(peer, Header(Op.DROP, generation=route.generation), {})
        route.close()


class _Clock:
    """Calls things when their time has come, one after the other in a thread of its own. They must not wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="shardprep-clock", daemon=True)
        self._thread.start()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Have something called, in the clock's thread.

        Args:
            when: As time.monotonic() tells it, in seconds.
            call: Must neither wait nor raise.
        """
        with self._changed:
            heapq.heappush(self._due, (when, next(self._numbers), call))
            if self._due[0][0] == when:
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_over:
                    left = self._due[0][0] - time.monotonic() if self._due else None
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                if self._is_over:
                    return
                call = heapq.heappop(self._due)[2]
            call()


def _failure(tail: Mapping[str, Any], worker: str) -> ShardprepError:
    return raised(read_failure(tail), worker)


def _timing(said: Any) -> Timing:
    """Raises TypeError or ValueError for what is none."""
    worker, *seconds = said
    if not isinstance(worker, str):
        raise TypeError
    compute, staging, packing = (float(each) for each in seconds)
    return Timing(worker, compute, staging, packing)
