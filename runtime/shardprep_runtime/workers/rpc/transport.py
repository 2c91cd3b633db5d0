"""Reach workers by torch.distributed.rpc: a star, in which the front end calls each stage in turn.

All workers and spares are in it from the start: torch cannot take another one in once a process of it was killed, nor
the same one again. Those that are left stay reachable, so a spare can take a lost worker's stage; a worker that is
started later cannot. Tensors travel from CPU to CPU.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...errors import ShardprepError, WorkerLostError
from ..failures import Failure, raised
from ..transport import Health, Output, Step, Timing, Transport, WorkerInfo
from . import group
from .presence import HANG_TIMEOUT, PING_PERIOD, Presence

if TYPE_CHECKING:
    import torch

    from ..meeting import Meeting

END_TIMEOUT: Final = 1.0
"""Seconds for workers to say that they end."""

RESET_TIMEOUT: Final = 60.0
"""Seconds after which a worker that does not answer has, one may say, forgotten a sequence."""


LOOK_EVERY: Final = 0.05
"""Seconds between two looks whether another worker is there."""


def open_rpc(meeting: Meeting, still_missing: Callable[[str], None]) -> RpcTransport:
    """Welcome all workers of a meeting, then be one group with them: torch takes nobody in later.

    Args:
        still_missing: As `TransportKind.open` has it.
    """
    count, welcome = group.world_size_of(meeting.plan) - 1, 0
    while welcome < count:
        still_missing(f"{count - welcome} of {count} workers")
        member = meeting.joined(LOOK_EVERY)
        if member is not None:
            welcome = meeting.welcome(member)
    return RpcTransport(meeting)


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
        start_timeout: float = group.START_TIMEOUT,
        ping_period: float = PING_PERIOD,
        hang_timeout: float = HANG_TIMEOUT,
    ) -> None:
        self._ranks: dict[str, int] = {}
        self._presence = Presence(self._ping, period=ping_period, hang_timeout=hang_timeout)
        self._is_closed = False
        self._closing = threading.Lock()
        group.enter(meeting, group.FRONT_END, start_timeout)
        try:
            asked = {
                rank: group.call(rank, group.answer, "info", timeout=start_timeout)
                for rank in range(1, group.world_size_of(meeting.plan))
            }
            for rank, call in asked.items():
                info = _found(call, f"worker {rank}")
                self._ranks[info.name] = rank
                self._presence.joined(info)
                self._park(info.name)
        except BaseException:
            group.leave()
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
            group.leave()

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
            call = group.call(self._ranks[worker], group.answer, job, *arguments, timeout=timeout)
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
            call = group.call(self._ranks[worker], group.answer, "ping", timeout=0)
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

        group.call(self._ranks[worker], group.park, timeout=0).add_done_callback(ended)


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
    message = group.first_line(error).partition(" (this error originated")[0]
    if "timeout" in message:
        return WorkerLostError(f"{worker} hangs: no answer in time", worker=worker)
    return WorkerLostError(
        f"{worker} has ended, or its connection: {message}", worker=worker, is_certain=True
    )
