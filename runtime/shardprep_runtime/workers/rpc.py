"""Reach workers by torch.distributed.rpc: a star, in which the front end calls each stage in turn.

All workers and spares are in it from the start: torch cannot take another one in once a process of it was killed, nor
the same one again. Those that are left stay reachable, so a spare can take a lost worker's stage; a worker that is
started later cannot. Tensors travel from CPU to CPU.

torch.distributed.rpc runs whatever function a peer names, with arguments that it unpickles: whoever reaches its port
runs code as this user. Its ports are opened at the address by which a process reaches the front end, and at no other;
let that be one of a private network.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from ..errors import InputError, ShardprepError, WorkerError, WorkerLostError, quote
from .failures import Failure, failure_of, raised
from .meeting import address_towards, interface_of
from .presence import HANG_TIMEOUT, PING_PERIOD, Presence
from .transport import Health, Output, Step, Timing, Transport, WorkerInfo

if TYPE_CHECKING:
    import torch

    from .meeting import Meeting, Membership
    from .worker import Worker

START_TIMEOUT: Final = 120.0
"""Seconds in which all processes must have found each other."""

SILENCE: Final = 30.0
"""Seconds without a ping after which a worker takes its front end for gone: one whose host lost power says nothing."""

SHUTDOWN_TIMEOUT: Final = 10.0
"""Seconds for torch's threads to end in; it has been seen to wait for ever."""

END_TIMEOUT: Final = 1.0
"""Seconds for workers to say that they end."""

RESET_TIMEOUT: Final = 60.0
"""Seconds after which a worker that does not answer has, one may say, forgotten a sequence."""

PAUSE: Final = 0.02
"""Seconds between two looks at the store."""

THREADS: Final = 4
"""That answer; what computes has a thread of its own, so none of them is ever held up."""

SCHEME: Final = "shardprep-rpc"
"""Of the URL by which torch finds the store that we have already."""

STORE: Final = "shardprep/rpc"
"""Before the keys that torch puts into it."""

FRONT_END: Final = 0
"""Its rank; that of a worker is the place in which it was welcomed."""


# ----------------------------------------------------------------------------------------------- what a worker answers


class _Served:
    """A worker, and one thread that computes: its threads of OpenMP are those of one thread, and steps keep order."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.heard = time.monotonic()
        self.is_over = threading.Event()
        self.is_told = False
        """The front end has said that this is the end."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="shardprep-compute", daemon=True)
        self._thread.start()

    def take(self, job: str, arguments: tuple[Any, ...], answer: torch.futures.Future[Any]) -> None:
        """Do a job now, if it takes no time, or else in its turn."""
        self.heard = time.monotonic()
        worker = self.worker
        if job == "ping":
            answer.set_result(None)
        elif job == "info":
            _settle(answer, worker.info)
        elif job == "end":
            answer.set_result(None)
            self.is_told = True
            self.is_over.set()
        elif job == "health" and not arguments[0]:
            _settle(answer, lambda: worker.health(probe=False))
        elif job == "health":
            self._jobs.put(lambda: _settle(answer, lambda: worker.health(probe=True)))
        elif job == "step":
            self._jobs.put(lambda: _settle(answer, lambda: worker.step(*arguments)))
        elif job == "reset":
            self._jobs.put(lambda: _settle(answer, lambda: worker.reset(*arguments)))
        elif job == "promote":
            self._jobs.put(lambda: _settle(answer, lambda: worker.promote(*arguments)))
        else:
            answer.set_result(Failure(WorkerError.__name__, f"cannot {quote(job)}"))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(SHUTDOWN_TIMEOUT)

    def _compute(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(answer: torch.futures.Future[Any], work: Callable[[], Any]) -> None:
    try:
        found = work()
    except Exception as error:  # noqa: BLE001 - torch would print a traceback here and send it there
        found = failure_of(error)
    with contextlib.suppress(RuntimeError):  # who asked is gone
        answer.set_result(found)


_served: _Served | None = None
"""What this process serves: a function that is called from afar is found by its name, and has nothing else."""

_place: tuple[Any, int, int] | None = None
"""Store, rank and size of the group that this process is about to enter."""

_group = ""
"""What the names of its processes have in common."""

_parked: list[Any] = []
"""Calls that are never answered: they fail at the caller's as soon as this process ends."""


def _answer(job: str, *arguments: Any) -> torch.futures.Future[Any]:
    import torch

    answer: torch.futures.Future[Any] = torch.futures.Future()
    if _served is None:
        answer.set_result(Failure(WorkerError.__name__, "serves nothing any more"))
    else:
        _served.take(job, arguments, answer)
    return answer


def _park() -> torch.futures.Future[Any]:
    import torch

    answer: torch.futures.Future[Any] = torch.futures.Future()
    _parked.append(answer)
    return answer


def serve_rpc(
    worker: Worker,
    membership: Membership,
    *,
    timeout: float = START_TIMEOUT,
    silence: float = SILENCE,
) -> bool:
    """Answer for `worker` until the front end says end (True), or is gone (False). Raises WorkerError where the group does
    not meet."""
    global _served
    served = _served = _Served(worker)
    try:
        _enter(membership, membership.rank, timeout)
        try:
            gone = _call(FRONT_END, _park, timeout=0)
            gone.add_done_callback(lambda _: served.is_over.set())
            served.heard = time.monotonic()
            while not served.is_over.wait(PING_PERIOD) and time.monotonic() - served.heard < silence:
                pass
        finally:
            _leave()
    finally:
        _served = None
        served.close()
    return served.is_told


# ---------------------------------------------------------------------------------------------- in and out of the group


def _enter(meeting: Meeting | Membership, rank: int, timeout: float) -> None:
    """Become one of the processes that call each other; returns when all of them are there. Raises WorkerError."""
    import torch.distributed
    from torch.distributed.rpc import constants

    global _answer, _park, _place, _group
    dist: Any = torch.distributed  # its types say little of this part
    rpc: Any = dist.rpc
    if meeting.plan.rpc is None:
        raise InputError(f"the front end runs workers of {quote(meeting.plan.transport)}, not of rpc")
    if not hasattr(_answer, "__wrapped__"):
        # torch marks functions whose answer comes later; where this module is imported torch may not be
        _answer = rpc.functions.async_execution(_answer)
        _park = rpc.functions.async_execution(_park)
        dist.register_rendezvous_handler(SCHEME, _rendezvous)
    if _is_inside():
        raise InputError(
            "torch.distributed.rpc is in use in this process, which can be in one group at a time"
        )
    world_size = meeting.plan.rpc.world_size
    connection: Any = meeting.store
    store = dist.PrefixStore(STORE, connection.clone())
    _wait_for_all(store, rank, world_size, timeout)
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=THREADS,
        rpc_timeout=timeout,
        init_method=f"{SCHEME}://",
        _transports=["uv"],  # the other one, for processes of one host, spins: a whole core for each of them
    )
    _place = store, rank, world_size
    # torch counts the groups that a process was in, also by their names, and lets only those processes meet that have
    # been in equally many
    rpc._init_counter = 0
    _group = meeting.plan.nonce[:16]
    patience = constants.DEFAULT_PROCESS_GROUP_TIMEOUT
    # half an hour, if a peer ends just now
    constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(seconds=timeout)
    try:
        atexit.register(_leave)  # torch's threads abort a process that ends without
        with _only_at(interface_of(address_towards(meeting.host))), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using a Backend", UserWarning)  # torch, of torch
            rpc.init_rpc(_name(rank), rank=rank, world_size=world_size, rpc_backend_options=options)
    except (RuntimeError, ValueError) as error:
        _leave()
        raise WorkerError(f"the workers did not find each other: {_first_line(error)}") from None
    finally:
        _place = None
        constants.DEFAULT_PROCESS_GROUP_TIMEOUT = patience


def _rendezvous(_: str, **__: Any) -> Iterator[tuple[Any, int, int]]:
    assert _place is not None
    yield _place


def _wait_for_all(store: Any, rank: int, world_size: int, timeout: float) -> None:
    """torch waits for a process that will never come for half an hour, and cannot be stopped."""
    keys = [f"here/{each}" for each in range(world_size)]
    deadline = time.monotonic() + timeout
    try:
        store.set(keys[rank], b"")
        while missing := [key for key in keys if not store.check([key])]:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{len(missing)} of {world_size} processes did not come in {timeout:g} seconds; all workers and "
                    "spares of rpc must be there from the start"
                )
            time.sleep(PAUSE)
    except RuntimeError as error:
        raise WorkerError(f"the front end has gone: {_first_line(error)}") from None


def _leave() -> None:
    """End torch's threads. Where they cannot be ended they are left: they end with the process."""
    from torch.distributed import rpc

    atexit.unregister(_leave)
    _parked.clear()
    if not _is_inside():
        return
    ending = threading.Thread(
        target=lambda: rpc.shutdown(graceful=False), name="shardprep-leave", daemon=True
    )
    ending.start()
    ending.join(SHUTDOWN_TIMEOUT)


def _is_inside() -> bool:
    from torch.distributed import rpc

    api: Any = rpc.api
    return bool(api._is_current_rpc_agent_set())


def _name(rank: int) -> str:
    """Within the group: torch takes no dots, which names of workers may have."""
    return f"shardprep-{_group}-{rank}"


def _call(rank: int, function: Any, *arguments: Any, timeout: float) -> torch.futures.Future[Any]:
    """Have a process of the group run a function; its answer comes later, and never if `timeout` is 0."""
    from torch.distributed import rpc

    call: torch.futures.Future[Any] = rpc.rpc_async(_name(rank), function, args=arguments, timeout=timeout)
    return call


@contextlib.contextmanager
def _only_at(interface: str | None) -> Iterator[None]:
    """torch opens its ports at the address that the host's name stands for, unless it is told otherwise just so."""
    names = [name for name in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if name not in os.environ]
    if interface is not None:
        os.environ.update(dict.fromkeys(names, interface))
    try:
        yield
    finally:
        if interface is not None:
            for name in names:
                del os.environ[name]


# ------------------------------------------------------------------------------------------------------ the front end


class RpcTransport(Transport):
    """The front end of a group of processes that call each other: made when all workers wait for it.

    Args:
        start_timeout: Seconds in which all must be there.
        ping_period: Seconds between two pings of a worker that answers.
        hang_timeout: Seconds without an answer to a ping after which a worker is lost.
    """

    name = "rpc"

    def __init__(
        self,
        meeting: Meeting,
        *,
        start_timeout: float = START_TIMEOUT,
        ping_period: float = PING_PERIOD,
        hang_timeout: float = HANG_TIMEOUT,
    ) -> None:
        self._ranks: dict[str, int] = {}
        self._presence = Presence(self._ping, period=ping_period, hang_timeout=hang_timeout)
        self._is_closed = False
        self._closing = threading.Lock()
        _enter(meeting, FRONT_END, start_timeout)
        assert meeting.plan.rpc is not None
        try:
            asked = {
                rank: _call(rank, _answer, "info", timeout=start_timeout)
                for rank in range(1, meeting.plan.rpc.world_size)
            }
            for rank, call in asked.items():
                info = _found(call, f"worker {rank}")
                self._ranks[info.name] = rank
                self._presence.joined(info)
                self._park(info.name)
        except BaseException:
            _leave()
            raise
        self._presence.start()
        atexit.register(self.close)

    def workers(self) -> Mapping[str, WorkerInfo]:
        return self._presence.infos()

    def watch(self, lost: Callable[[str, str], None]) -> None:
        self._presence.watch(lost)

    def step(
        self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
    ) -> Future[Output]:
        return _Flight(self._ask, route, step, timeout).begin(inputs)

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        found: Health = self._ask(worker, "health", probe, timeout=timeout).result().found
        self._presence.joined(found.info)
        return found

    def reset(self, worker: str, sequence: str) -> None:
        self._ask(worker, "reset", sequence, timeout=RESET_TIMEOUT)

    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        info: WorkerInfo = self._ask(worker, "promote", pp_rank, timeout=timeout).result().found
        self._presence.joined(info)
        return info

    def close(self) -> None:
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            atexit.unregister(self.close)
            self._presence.stop()
            told = [self._ask(name, "end", timeout=END_TIMEOUT) for name in self.workers()]
            wait(told, END_TIMEOUT)
            self._presence.close()
            _leave()

    def _ask(self, worker: str, job: str, *arguments: Any, timeout: float) -> Future[_Reply]:
        """Have a worker do a job; at once. The future has one of the errors that `Transport` names, or the reply."""
        reply: Future[_Reply] = Future()

        def lost(error: WorkerLostError) -> None:
            with contextlib.suppress(InvalidStateError):  # the answer was there first
                reply.set_exception(error)

        def answered(call: torch.futures.Future[Any]) -> None:
            self._presence.done_with(worker, lost)
            try:
                found = _found(call, worker)
            except WorkerLostError as error:
                self._presence.lost(error)
                lost(error)
            except ShardprepError as error:
                self._presence.answered(worker)
                with contextlib.suppress(InvalidStateError):
                    reply.set_exception(error)
            else:
                self._presence.answered(worker)
                with contextlib.suppress(InvalidStateError):
                    reply.set_result(_Reply(found, packing))

        try:
            if self._is_closed and job != "end":
                raise WorkerLostError(f"{worker}: the front end was closed", worker=worker, is_certain=True)
            self._presence.wait_for(worker, lost)
            began = time.monotonic()
            call = _call(self._ranks[worker], _answer, job, *arguments, timeout=timeout)
            packing = time.monotonic() - began
        except WorkerLostError as error:
            lost(error)
        except RuntimeError as error:  # from torch, of a connection that is closed already
            self._presence.done_with(worker, lost)
            ended = _lost(worker, error)
            self._presence.lost(ended)
            lost(ended)
        else:
            call.add_done_callback(answered)
        return reply

    def _ping(self, worker: str) -> None:
        def answered(call: torch.futures.Future[Any]) -> None:
            try:
                call.wait()
            except RuntimeError as error:
                self._presence.lost(_lost(worker, error))
            else:
                self._presence.answered(worker, is_ping=True)

        try:
            call = _call(self._ranks[worker], _answer, "ping", timeout=0)
        except RuntimeError as error:
            self._presence.lost(_lost(worker, error))
        else:
            call.add_done_callback(answered)

    def _park(self, worker: str) -> None:
        """A call that is answered by the end of the worker's process alone: that is known at once, idle or not."""

        def ended(call: torch.futures.Future[Any]) -> None:
            try:
                call.wait()
            except RuntimeError as error:
                self._presence.lost(_lost(worker, error))

        _call(self._ranks[worker], _park, timeout=0).add_done_callback(ended)


class _Flight:
    """A step on its way through the stages: each answer sends it on, from the thread that brought it."""

    def __init__(
        self, ask: Callable[..., Future[_Reply]], route: Sequence[str], step: Step, timeout: float
    ) -> None:
        self._ask = ask
        self._route = route
        self._step = step
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._timings: list[Timing] = []
        self._packing = 0.0
        self._output: Future[Output] = Future()

    def begin(self, inputs: torch.Tensor) -> Future[Output]:
        self._output.set_running_or_notify_cancel()
        self._send(inputs)
        return self._output

    def _send(self, inputs: torch.Tensor) -> None:
        worker = self._route[len(self._timings)]
        left = self._deadline - time.monotonic()
        if left > 0:
            self._ask(worker, "step", self._step, inputs, timeout=left).add_done_callback(self._received)
        else:
            message = f"{worker} was not reached: the step had taken {self._timeout:g} s before"
            self._output.set_exception(WorkerLostError(message, worker=worker))

    def _received(self, reply: Future[_Reply]) -> None:
        error = reply.exception()
        if error is not None:
            self._output.set_exception(error)
            return
        found, timing = reply.result().found
        self._timings.append(timing)
        self._packing += reply.result().packing
        if len(self._timings) < len(self._route):
            self._send(found)
        else:
            self._output.set_result(Output(found, tuple(self._timings), self._packing))


@dataclass(frozen=True, slots=True)
class _Reply:
    found: Any
    packing: float
    """Seconds that it took to have the call packed and on its way."""


def _found(call: torch.futures.Future[Any], worker: str) -> Any:
    """What a call that is done, or will be, has brought. Raises one of the errors that `Transport` names."""
    try:
        found = call.wait()
    except RuntimeError as error:
        raise _lost(worker, error) from None
    if isinstance(found, Failure):
        raise raised(found, worker)
    return found


def _lost(worker: str, error: RuntimeError) -> WorkerLostError:
    """torch has one class for all that goes wrong on the way; what closes a connection closes it for good."""
    message = _first_line(error).partition(" (this error originated")[0]
    if "timeout" in message:
        return WorkerLostError(f"{worker} hangs: no answer in time", worker=worker)
    return WorkerLostError(
        f"{worker} has ended, or its connection: {message}", worker=worker, is_certain=True
    )


def _first_line(error: BaseException) -> str:
    return quote((str(error).splitlines() or [type(error).__name__])[0])
