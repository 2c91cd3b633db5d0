"""Reach workers by Ray: each is an actor, which Ray places, and starts again when its process has ended.

The result of a stage goes to the next one as a reference; the front end gets what the last one gives. Ray's own
restart is the cold replacement: the actor prepares itself again, and is there under its name as another process, without
any sequence; one that was promoted is the spare again that it was made as.

Ray unpickles and runs what its clients send: whoever reaches its ports runs code as its user, and it listens on all
addresses of a host. Keep it within a private network, with RAY_AUTH_MODE=token where this Ray knows that.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

from ..errors import InputError, ShardprepError, WorkerError, WorkerLostError, quote
from .failures import Failure, failure_of, raised
from .presence import HANG_TIMEOUT, PING_PERIOD, Presence
from .transport import Health, Output, Step, Timing, Transport, WorkerInfo

if TYPE_CHECKING:
    import torch

    from .worker import Worker, WorkerOptions

Told = TypeVar("Told")

Placement: TypeAlias = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""Ray's words: on as few nodes as possible, on as many; strictly: on one, or each on its own, or not at all."""

START_TIMEOUT: Final = 600.0
"""Seconds in which Ray must find a place for all actors, and they must be ready."""

GROUPS: Final = {"compute": 1, "answer": 2, "park": 1}
"""Threads of an actor: what computes does one thing after the other, and never keeps the others from answering."""

LIFELINE_TIMEOUT: Final = 5.0
"""Seconds in which a connection to an actor must be there; without it, its end is known a second or two later."""

LOOK_EVERY: Final = 0.05
"""Seconds between two looks at steps whose time is over."""

FIRST_PAUSE: Final = 0.2
MAX_PAUSE: Final = 10.0
"""Seconds between two questions whether an actor is there again."""


# ------------------------------------------------------------------------------------------------------- the actors


@dataclass(frozen=True, slots=True)
class _Packed:
    """A tensor as Ray carries it fastest: torch's own pickle goes through a file in memory."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class _Passed:
    """What goes from stage to stage: a tensor, or which worker failed, and how."""

    result: _Packed | Failure
    timings: tuple[Timing, ...] = ()
    worker: str = ""


def _pack(tensor: torch.Tensor) -> _Packed:
    import torch

    whole = tensor.detach().cpu().contiguous()
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return _Packed(str(whole.dtype).removeprefix("torch."), tuple(whole.shape), data)


def _unpack(packed: _Packed) -> torch.Tensor:
    import torch

    dtype = getattr(torch, packed.dtype)
    if not packed.data:
        return torch.empty(packed.shape, dtype=dtype)
    return torch.frombuffer(bytearray(packed.data), dtype=dtype).reshape(packed.shape)


class StageActor:
    """A worker in a process of Ray's. It raises nothing: what went wrong is its answer."""

    def __init__(self, name: str, options: WorkerOptions) -> None:
        from .worker import Worker

        self._failure: Failure | None = None
        self._worker: Worker = Worker(name, options)
        try:
            self._worker.prepare()
        except Exception as error:  # noqa: BLE001 - it is the answer to the first question
            self._failure = failure_of(error)

    def info(self) -> WorkerInfo | Failure:
        return self._told(self._worker.info)

    def health(self, probe: bool) -> Health | Failure:
        return self._told(lambda: self._worker.health(probe=probe))

    def reset(self, sequence: str) -> None:
        self._told(lambda: self._worker.reset(sequence))

    def promote(self, pp_rank: int) -> WorkerInfo | Failure:
        return self._told(lambda: self._worker.promote(pp_rank))

    def step(self, step: Step, given: _Passed) -> _Passed:
        if isinstance(given.result, Failure):
            return given
        begin = time.monotonic()
        inputs = _unpack(given.result)
        packing = time.monotonic() - begin
        found = self._told(lambda: self._worker.step(step, inputs))
        if isinstance(found, Failure):
            return _Passed(found, given.timings, self._worker.name)
        tensor, timing = found
        begin = time.monotonic()
        packed = _pack(tensor)
        packing += time.monotonic() - begin
        timing = replace(timing, packing=timing.packing + packing)
        return _Passed(packed, (*given.timings, timing))

    def ping(self) -> None:
        """Answer."""

    def park(self) -> None:
        """Never answer: Ray says when this process has ended, a second or two after that."""
        threading.Event().wait()

    def lifeline(self) -> tuple[str, int]:
        """Where to connect once, and see the connection closed by the system as soon as this process has ended."""
        from ray.util import get_node_ip_address

        host = get_node_ip_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.settimeout(LIFELINE_TIMEOUT)
        threading.Thread(target=_hold, args=(listener,), name="shardprep-lifeline", daemon=True).start()
        port: int = listener.getsockname()[1]
        return host, port

    def _told(self, work: Callable[[], Told]) -> Told | Failure:
        if self._failure is not None:
            return self._failure
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - Ray would send it with its traceback
            return failure_of(error)


def _hold(listener: socket.socket) -> None:
    """Nothing is said over this connection, and there is one only: whoever comes first."""
    with listener:
        try:
            held, _ = listener.accept()
        except OSError:
            return
    threading.Event().wait()
    held.close()


def start_actors(
    options: WorkerOptions,
    *,
    spares: int = 0,
    placement: Placement = "PACK",
    cpus: float = 1,
    gpus: float = 0,
    max_restarts: int = -1,
    address: str | None = None,
    start_timeout: float = START_TIMEOUT,
    ping_period: float = PING_PERIOD,
    hang_timeout: float = HANG_TIMEOUT,
) -> RayTransport:
    """Have Ray start a worker for each stage, and spares, and wait until all of them are ready.

    Raises what the first worker to fail raises, and WorkerError where Ray finds no place for them in time.

    Args:
        options: Of every worker; its pp_rank counts for nothing.
        placement: On which nodes.
        cpus: What Ray sets aside for each worker.
        gpus: What Ray sets aside for each worker; parts of one are allowed.
        max_restarts: How often Ray starts a worker again; -1: always.
        address: Of the Ray to use; None: the one that this process is connected to already, or else one of its own on
            this host, which ends with the transport.
    """
    import ray

    count = len(options.stages)
    if spares < 0:
        raise InputError(f"spares is {spares}, expected at least 0")
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(address, int((count + spares) * cpus) + 1)
    group: Any = None
    handles: dict[str, Any] = {}
    try:
        bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        group = ray.util.placement_group([bundle] * (count + spares), strategy=placement)
        if not group.wait(start_timeout):
            raise WorkerError(
                f"Ray has no place for {count + spares} workers with {cpus:g} CPUs and {gpus:g} GPUs each, placed as "
                f"{placement}, within {start_timeout:g} s; add nodes, or ask for less"
            )
        for index in range(count + spares):
            pp_rank = index if index < count else None
            name = f"stage-{index}" if pp_rank is not None else f"spare-{index - count}"
            own_options = replace(options, pp_rank=pp_rank)
            handles[name] = (
                ray.remote(concurrency_groups=GROUPS)(StageActor)
                .options(
                    num_cpus=cpus,
                    num_gpus=gpus,
                    max_restarts=max_restarts,
                    max_task_retries=0,
                    # or a ping would wait for the step before it, and that for its stage before
                    allow_out_of_order_execution=True,
                    scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=index
                    ),
                )
                .remote(name, own_options)
            )
        return RayTransport(
            handles,
            group=group,
            is_ours=is_ours,
            start_timeout=start_timeout,
            ping_period=ping_period,
            hang_timeout=hang_timeout,
        )
    except BaseException:
        _end(handles, group, is_ours)
        raise


def _connect(address: str | None, cpus: int) -> None:
    """Use the Ray at `address`, or at RAY_ADDRESS, or start one that has a place for as much as is wanted of it."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address is None:
        with suppress(ValueError):  # of a Ray that runs already its CPUs cannot be chosen
            ray.init(include_dashboard=False, num_cpus=max(os.cpu_count() or 1, cpus), **options)
            return
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise WorkerError(f"no Ray at {quote(address or 'RAY_ADDRESS')}: {_first_line(error)}") from None


def _end(actors: Mapping[str, Any], group: Any, is_ours: bool) -> None:
    import ray

    for actor in actors.values():
        ray.kill(actor)
    if group is not None:
        with suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(group)
    if is_ours:
        ray.shutdown()


# ------------------------------------------------------------------------------------------------------ the front end


class RayTransport(Transport):
    """The front end of actors that `start_actors` has made."""

    name = "ray"
    can_replace = True

    def __init__(
        self,
        actors: Mapping[str, Any],
        *,
        group: Any,
        is_ours: bool,
        start_timeout: float = START_TIMEOUT,
        ping_period: float = PING_PERIOD,
        hang_timeout: float = HANG_TIMEOUT,
    ) -> None:
        self._actors = dict(actors)
        self._group = group
        self._is_ours = is_ours
        self._presence = Presence(self._ping, period=ping_period, hang_timeout=hang_timeout)
        self._flights: set[_Flight] = set()
        self._awaited: set[str] = set()  # workers that may come back
        self._lifelines: dict[socket.socket, threading.Thread] = {}
        self._methods: dict[tuple[str, str, str], Any] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        deadline = time.monotonic() + start_timeout
        asked = {name: self._submit(name, "answer", "info") for name in self._actors}
        for name, ref in asked.items():
            self._joined(name, _get(ref, name, max(0.0, deadline - time.monotonic())))
        self._clock = threading.Thread(target=self._run, name="shardprep-steps", daemon=True)
        self._clock.start()
        self._presence.start()

    def workers(self) -> Mapping[str, WorkerInfo]:
        return self._presence.infos()

    def watch(self, lost: Callable[[str, str], None]) -> None:
        self._presence.watch(lost)

    def step(
        self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
    ) -> Future[Output]:
        flight = _Flight(self, route, timeout)
        with self._lock:
            self._flights.add(flight)
        flight.begin(step, inputs)
        return flight.output

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        found: Health = self._ask(worker, "compute" if probe else "answer", "health", probe, timeout=timeout)
        self._presence.joined(found.info)
        return found

    def reset(self, worker: str, sequence: str) -> None:
        if worker in self._presence.infos():
            self._submit(worker, "compute", "reset", sequence)

    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        info: WorkerInfo = self._ask(worker, "compute", "promote", pp_rank, timeout=timeout)
        self._presence.joined(info)
        return info

    def close(self) -> None:
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._clock.join()
        self._presence.stop()
        with self._lock:
            lifelines = dict(self._lifelines)
        for connection, thread in lifelines.items():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._presence.close()
        _end(self._actors, self._group, self._is_ours)

    def _submit(self, worker: str, threads: str, method: str, *arguments: Any) -> Any:
        found = self._methods.get((worker, threads, method))
        if found is None:
            found = getattr(self._actors[worker], method).options(concurrency_group=threads)
            self._methods[worker, threads, method] = found
        return found.remote(*arguments)

    def _ask(self, worker: str, threads: str, method: str, *arguments: Any, timeout: float) -> Any:
        """What a worker answers, once it does. Raises one of the errors that `Transport` names."""
        reply: Future[Any] = Future()

        def lost(error: WorkerLostError) -> None:
            with suppress(InvalidStateError):
                reply.set_exception(error)

        def answered(done: Future[Any]) -> None:
            with suppress(InvalidStateError):
                try:
                    reply.set_result(_found(done, worker))
                except ShardprepError as error:
                    reply.set_exception(error)

        self._presence.wait_for(worker, lost)
        try:
            self._submit(worker, threads, method, *arguments).future().add_done_callback(answered)
            found = reply.result(timeout)
        except TimeoutError:
            error = WorkerLostError(f"{worker} hangs: no answer in {timeout:g} s", worker=worker)
            self._presence.lost(error)
            raise error from None
        except WorkerLostError as error:
            self._presence.lost(error)
            raise
        except ShardprepError:
            self._presence.answered(worker)
            raise
        finally:
            self._presence.done_with(worker, lost)
        self._presence.answered(worker)
        return found

    def _ping(self, worker: str) -> None:
        def answered(done: Future[Any]) -> None:
            if done.exception() is None:
                self._presence.answered(worker, is_ping=True)

        self._submit(worker, "answer", "ping").future().add_done_callback(answered)

    # ------------------------------------------------------------------------------------------ who comes and who goes
    def _joined(self, worker: str, info: WorkerInfo) -> None:
        """A worker is there, as a process that was not; have its end known at once."""
        with self._lock:
            self._awaited.discard(worker)
        self._presence.joined(info)

        def reachable(done: Future[Any]) -> None:
            if done.exception() is None and not self._is_over.is_set():
                threading.Thread(
                    target=self._watch, args=(info, done.result()), name="shardprep-lifeline", daemon=True
                ).start()

        def unparked(done: Future[Any]) -> None:
            if self._is_over.is_set() or done.cancelled():
                return
            error = done.exception()
            if error is not None:
                ended = _lost(worker, error)
                if isinstance(ended, WorkerLostError):
                    self._presence.lost(ended)
                self._await_return(worker, FIRST_PAUSE)

        self._submit(worker, "park", "park").future().add_done_callback(unparked)
        self._submit(worker, "answer", "lifeline").future().add_done_callback(reachable)

    def _watch(self, info: WorkerInfo, address: tuple[str, int]) -> None:
        """Return when the process of a worker has ended."""
        try:
            connection = socket.create_connection(address, LIFELINE_TIMEOUT)
        except OSError:
            return
        with connection:
            connection.settimeout(None)
            with self._lock:
                if self._is_over.is_set():
                    return
                self._lifelines[connection] = threading.current_thread()
            with suppress(OSError):
                connection.recv(1)
            with self._lock:
                del self._lifelines[connection]
        known = self._presence.infos().get(info.name)
        if not self._is_over.is_set() and known is not None and known.pid == info.pid:
            message = f"{info.name} is lost: its process has ended, or its connection"
            self._presence.lost(WorkerLostError(message, worker=info.name, is_certain=True))
            self._await_return(info.name, FIRST_PAUSE)

    def _await_return(self, worker: str, pause: float) -> None:
        """Ask a worker that was lost, until Ray has started it again, or says that it will not."""
        with self._lock:
            if worker in self._awaited:
                return
            self._awaited.add(worker)
        self._ask_again(worker, pause)

    def _ask_again(self, worker: str, pause: float) -> None:
        import ray

        def answered(done: Future[Any]) -> None:
            if self._is_over.is_set() or done.cancelled():
                return
            error = done.exception()
            if error is None and not isinstance(done.result(), Failure):
                self._joined(worker, done.result())
                return
            if isinstance(error, ray.exceptions.ActorDiedError):
                return  # for good
            if error is None:  # it could not prepare itself: let Ray try once more
                ray.kill(self._actors[worker], no_restart=False)
            timer = threading.Timer(pause, self._ask_again, (worker, min(MAX_PAUSE, pause * 1.5)))
            timer.daemon = True
            timer.start()

        if not self._is_over.is_set():
            self._submit(worker, "answer", "info").future().add_done_callback(answered)

    def _run(self) -> None:
        """Have steps end whose time is over."""
        while not self._is_over.wait(LOOK_EVERY):
            now = time.monotonic()
            with self._lock:
                late = [flight for flight in self._flights if flight.deadline < now]
            for flight in late:
                flight.give_up()

    def _ended(self, flight: _Flight) -> None:
        with self._lock:
            self._flights.discard(flight)


class _Flight:
    """A step on its way through the actors."""

    def __init__(self, transport: RayTransport, route: Sequence[str], timeout: float) -> None:
        self.output: Future[Output] = Future()
        self.deadline = time.monotonic() + timeout
        self._transport = transport
        self._presence = transport._presence
        self._route = route
        self._timeout = timeout
        self._refs: list[Any] = []
        self._packing = 0.0
        self.output.set_running_or_notify_cancel()

    def begin(self, step: Step, inputs: torch.Tensor) -> None:
        began = time.monotonic()
        try:
            for worker in self._route:
                self._presence.wait_for(worker, self.fail)
        except WorkerLostError as error:
            self.fail(error)
            return
        passed: Any = _Passed(_pack(inputs))
        for worker in self._route:
            passed = self._transport._submit(worker, "compute", "step", step, passed)
            self._refs.append(passed)
        self._packing = time.monotonic() - began
        passed.future().add_done_callback(self._done)

    def fail(self, error: ShardprepError) -> None:
        self._settle(None, error)

    def give_up(self) -> None:
        """The first worker whose result is not there hangs."""
        import ray

        worker = self._route[-1]
        for name, ref in zip(self._route, self._refs, strict=False):
            if not ray.wait([ref], timeout=0)[0]:
                worker = name
                break
        error = WorkerLostError(f"{worker} hangs: no answer in {self._timeout:g} s", worker=worker)
        self._presence.lost(error)
        self.fail(error)

    def _done(self, done: Future[Any]) -> None:
        if self.output.done():
            return
        if done.exception() is not None:
            threading.Thread(target=self._blame, name="shardprep-blame", daemon=True).start()
            return
        passed: _Passed = done.result()
        if isinstance(passed.result, Failure):
            self.fail(raised(passed.result, passed.worker))
            return
        began = time.monotonic()
        logits = _unpack(passed.result)
        self._settle(Output(logits, passed.timings, self._packing + time.monotonic() - began), None)

    def _blame(self) -> None:
        """The first worker whose result cannot be had failed; those behind it only got no input."""
        for worker, ref in zip(self._route, self._refs, strict=True):
            try:
                _get(ref, worker, max(0.0, self.deadline - time.monotonic()))
            except ShardprepError as error:
                if isinstance(error, WorkerLostError):
                    self._presence.lost(error)
                self.fail(error)
                return
        worker = self._route[-1]
        self.fail(WorkerLostError(f"{worker}: its answer was lost", worker=worker))

    def _settle(self, output: Output | None, error: ShardprepError | None) -> None:
        with suppress(InvalidStateError):
            if error is not None:
                self.output.set_exception(error)
            elif output is not None:
                self.output.set_result(output)
        for worker in self._route:
            self._presence.done_with(worker, self.fail)
            if error is None:
                self._presence.answered(worker)
        self._transport._ended(self)


def _get(ref: Any, worker: str, timeout: float) -> Any:
    import ray

    try:
        found = ray.get(ref, timeout=timeout)
    except ray.exceptions.RayError as error:
        raise _lost(worker, error) from None
    if isinstance(found, Failure):
        raise raised(found, worker)
    return found


def _found(done: Future[Any], worker: str) -> Any:
    error = done.exception()
    if error is not None:
        raise _lost(worker, error)
    found = done.result()
    if isinstance(found, Failure):
        raise raised(found, worker)
    return found


def _lost(worker: str, error: BaseException) -> ShardprepError:
    """The error for what Ray raises instead of an answer."""
    import ray

    if isinstance(error, ray.exceptions.GetTimeoutError):
        return WorkerLostError(f"{worker} hangs: no answer in time", worker=worker)
    if isinstance(error, ray.exceptions.RayTaskError):
        return WorkerError(f"{worker}: {_first_line(error)}")
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        # a connection that closed belongs to a process that has ended: after that the actor is another one
        message = "its process has ended, or cannot be reached by Ray, which may start it again"
    else:
        message = _first_line(error)
    return WorkerLostError(f"{worker} is lost: {message}", worker=worker, is_certain=True)


def _first_line(error: BaseException) -> str:
    return quote((str(error).strip().splitlines() or [type(error).__name__])[0], limit=300)
