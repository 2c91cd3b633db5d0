"""Be one of the processes that call each other by torch.distributed.rpc, and answer there for a worker.

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
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from ...errors import InputError, WorkerError, quote
from ..addresses import address_towards, interface_of
from ..failures import Failure, failure_of
from .presence import PING_PERIOD

if TYPE_CHECKING:
    import torch

    from ..meeting import Meeting, Membership, Plan
    from ..worker import Worker

START_TIMEOUT: Final = 120.0
"""Seconds in which all processes must have found each other."""

SILENCE: Final = 30.0
"""Seconds without a ping after which a worker takes its front end for gone: one whose host lost power says nothing."""

SHUTDOWN_TIMEOUT: Final = 10.0
"""Seconds for torch's threads to end in; it has been seen to wait for ever."""

PAUSE: Final = 0.02
"""Seconds between two looks at the store."""

THREADS: Final = 4
"""How many threads answer; what computes has a thread of its own, so none of them is ever held up."""

WORLD_SIZE: Final = "world_size"
"""What the plan of a meeting says for rpc: how many processes call each other, the front end included."""

SCHEME: Final = "shardprep-rpc"
"""Scheme of the URL by which torch finds the store that we have already."""

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
        """Do a job now, if it takes no time, or else in its turn.

        Args:
            job: What to do, by name.
            arguments: As the front end has sent them.
            answer: Is given what comes of it.
        """
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


def answer(job: str, *arguments: Any) -> torch.futures.Future[Any]:
    """Do a job in this process, as another one has asked."""
    import torch

    found: torch.futures.Future[Any] = torch.futures.Future()
    if _served is None:
        found.set_result(Failure(WorkerError.__name__, "serves nothing any more"))
    else:
        _served.take(job, arguments, found)
    return found


def park() -> torch.futures.Future[Any]:
    """Never answer: whoever asks learns of the end of this process."""
    import torch

    found: torch.futures.Future[Any] = torch.futures.Future()
    _parked.append(found)
    return found


def serve_rpc(
    worker: Worker,
    membership: Membership,
    *,
    timeout: float = START_TIMEOUT,
    silence: float = SILENCE,
) -> bool:
    """Answer for a worker.

    Args:
        timeout: Seconds in which all processes of the group must be there.
        silence: Seconds without a ping after which the front end is taken for gone.

    Returns:
        Whether the front end has said that this is the end; else it is gone.

    Raises:
        WorkerError: Where the group does not meet.
    """
    global _served
    served = _served = _Served(worker)
    try:
        enter(membership, membership.rank, timeout)
        try:
            gone = call(FRONT_END, park, timeout=0)
            gone.add_done_callback(lambda _: served.is_over.set())
            served.heard = time.monotonic()
            while not served.is_over.wait(PING_PERIOD) and time.monotonic() - served.heard < silence:
                pass
        finally:
            leave()
    finally:
        _served = None
        served.close()
    return served.is_told


# ---------------------------------------------------------------------------------------------- in and out of the group


def world_size_of(plan: Plan) -> int:
    """How many processes the group of a plan has; the front end is the first. Raises InputError where it says none."""
    found = plan.details.get(WORLD_SIZE)
    if found is None:
        raise InputError(f"the front end runs workers of {quote(plan.transport)}, not of rpc")
    return found


def enter(meeting: Meeting | Membership, rank: int, timeout: float) -> None:
    """Become one of the processes that call each other; returns when all of them are there.

    Args:
        rank: Which of them; 0 is the front end.
        timeout: Seconds in which all must be there.

    Raises:
        InputError: Where the plan is not one of rpc, or this process is in such a group already.
        WorkerError: Where not all come in time, or they do not find each other.
    """
    import torch.distributed
    from torch.distributed.rpc import constants

    global answer, park, _place, _group
    dist: Any = torch.distributed  # its types say little of this part
    rpc: Any = dist.rpc
    if not hasattr(answer, "__wrapped__"):
        # torch marks functions whose answer comes later; where this module is imported torch may not be
        answer = rpc.functions.async_execution(answer)
        park = rpc.functions.async_execution(park)
        dist.register_rendezvous_handler(SCHEME, _rendezvous)
    if _is_inside():
        raise InputError(
            "torch.distributed.rpc is in use in this process, which can be in one group at a time"
        )
    world_size = world_size_of(meeting.plan)
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
        atexit.register(leave)  # torch's threads abort a process that ends without
        with _only_at(interface_of(address_towards(meeting.host))), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using a Backend", UserWarning)  # torch, of torch
            rpc.init_rpc(_name(rank), rank=rank, world_size=world_size, rpc_backend_options=options)
    except (RuntimeError, ValueError) as error:
        leave()
        raise WorkerError(f"the workers did not find each other: {first_line(error)}") from None
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
        raise WorkerError(f"the front end has gone: {first_line(error)}") from None


def leave() -> None:
    """End torch's threads. Where they cannot be ended they are left: they end with the process."""
    from torch.distributed import rpc

    atexit.unregister(leave)
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
    """What a process is called within the group: torch takes no dots, which names of workers may have."""
    return f"shardprep-{_group}-{rank}"


def call(rank: int, function: Any, *arguments: Any, timeout: float) -> torch.futures.Future[Any]:
    """Have a process of the group run a function; its answer comes later.

    Args:
        rank: Which process.
        function: One of this module, which it has too.
        arguments: What the function is given.
        timeout: Seconds after which the call fails; 0: never.
    """
    from torch.distributed import rpc

    found: torch.futures.Future[Any] = rpc.rpc_async(_name(rank), function, args=arguments, timeout=timeout)
    return found


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


def first_line(error: BaseException) -> str:
    return quote((str(error).splitlines() or [type(error).__name__])[0])
