"""Start workers as actors of Ray, which places them on its nodes; links carry the steps between them.

Each actor is a worker's process like any other. Where one is lost its node gets another, as Ray has room.

Ray unpickles and runs what its clients send: whoever reaches its ports runs code as its user, and it listens on all
addresses of a host. Keep it within a private network, with RAY_AUTH_MODE=token.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from ...errors import WorkerError, quote
from ..failures import Failure, failure_of
from ..worker_process import WorkerJob, run_worker
from .crew import MeetingLauncher, Starter
from .launcher import Started

if TYPE_CHECKING:
    from ..worker import WorkerOptions

Placement: TypeAlias = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""Ray's words: on as few nodes as possible, on as many; strictly: on one, or each on its own, or not at all."""

START_TIMEOUT: Final = 600.0
"""Seconds in which Ray must find a place for all actors."""

ANY_BUNDLE: Final = -1
"""Ray's word for whichever place of a group has room."""


class WorkerActor:
    """A worker in a process of Ray's."""

    def __init__(self, job: WorkerJob, secret: str) -> None:
        self._job, self._secret = job, secret

    def run(self) -> Iterator[int | str | Failure]:
        """Be the worker; yields the process, then what it says, then perhaps why it has failed."""
        yield os.getpid()
        said: queue.SimpleQueue[str | Failure | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                run_worker(self._job, secret=self._secret, say=said.put)
            except Exception as error:  # noqa: BLE001 - Ray would send it with its traceback
                said.put(failure_of(error))
            finally:
                said.put(None)

        threading.Thread(target=work, name="shardprep-actor", daemon=True).start()
        while (line := said.get()) is not None:
            yield line


class Actor(Started):
    """An actor that was started."""

    def __init__(self, job: WorkerJob, handle: Any, words: Any) -> None:
        """`words`: what its `run` yields, as Ray brings it."""
        super().__init__(job, None)
        self._handle, self._words = handle, words
        self._over = threading.Event()
        self._how: str | None = None
        self._is_killed = False

    def messages(self) -> Iterator[str | Failure]:
        """What it says, until Ray says that it has ended."""
        import ray

        try:
            for each in self._words:
                found = ray.get(each)
                if isinstance(found, int):
                    self.pid = found
                else:
                    yield found
        except ray.exceptions.RayError as error:
            if not self._is_killed:
                self._how = f"as Ray says: {_first_line(error)}"
        finally:
            self._over.set()

    def has_ended(self) -> bool:
        """Whether Ray has said so."""
        return self._over.is_set()

    def how(self) -> str | None:
        """What Ray says of an end that was not meant."""
        return self._how

    def kill(self) -> None:
        """Have Ray end it, whatever it does."""
        import ray

        self._is_killed = True
        ray.kill(self._handle)

    def wait(self, timeout: float) -> bool:
        """Whether Ray says within so many seconds that it has ended."""
        return self._over.wait(timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayActors(MeetingLauncher):
    """Workers that are actors of Ray, each in a place of its own of one placement group.

    In a process that Ray has put into a placement group itself, as it does with a replica of Serve, that group is taken.
    """

    placement: Placement = "PACK"
    """On which nodes: "STRICT_SPREAD" is one worker a node."""
    cpus: float = 1
    """What Ray sets aside for each process of a worker, which computes with so many threads."""
    address: str | None = None
    """Where Ray is to be found; None: the one that this process is connected to already, or at RAY_ADDRESS, or else one
    of its own on this host, which ends with the workers."""

    @contextmanager
    def ready(self, options: WorkerOptions, workers: int, timeout: float | None) -> Iterator[Starter]:
        """Connect to Ray, and have it set a place aside for each worker.

        Args:
            options, workers, timeout: As `MeetingLauncher.ready` has them; by default a place is waited for 600 seconds.

        Raises:
            WorkerError: Where Ray cannot be reached, or has no place in time.
        """
        import ray

        size = options.tensor_parallel_size
        gpus = 1 if options.compute.device.startswith("cuda") else 0
        with ExitStack() as stack:
            if not ray.is_initialized():
                _connect(self.address, int(workers * size * self.cpus) + 1)
                stack.callback(ray.shutdown)
            group: Any = ray.util.get_current_placement_group()
            is_ours = group is None
            if is_ours:
                bundle = {"CPU": self.cpus * size, "GPU": gpus * size}
                bundles = [{name: count for name, count in bundle.items() if count}] * workers
                group = ray.util.placement_group(bundles, strategy=self.placement)
                stack.callback(_give_back, group)
                patience = START_TIMEOUT if timeout is None else timeout
                if not group.wait(patience):
                    raise WorkerError(
                        f"Ray has no place for {workers} workers with {self.cpus * size:g} CPUs and {gpus * size} GPUs "
                        f"each, placed as {self.placement}, within {patience:g} s; add nodes, or ask for less"
                    )
            nodes = _Nodes(group, workers if is_ours else 0, self.cpus, gpus)
            # the address by which Ray's nodes reach this one
            yield Starter(ray.util.get_node_ip_address(), nodes.start)


class _Nodes:
    """Starts actors within a placement group."""

    def __init__(self, group: Any, bundles: int, cpus: float, gpus: int) -> None:
        """`bundles`: places of the group that hold a whole worker each; 0: they are somebody else's, and any will do."""
        self._group, self._cpus, self._gpus = group, cpus, gpus
        self._bundles: list[tuple[str, list[Actor]]] = [("", [])] * bundles

    def start(self, job: WorkerJob, secret: str) -> Actor:
        """Start an actor.

        Args:
            job: The worker that it is to be.
            secret: What proves it to the front end. It is an argument, since Ray logs the environments that it makes.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        compute = job.options.compute
        if compute.threads is None:
            compute = replace(compute, threads=max(1, int(self._cpus)))
        job = replace(job, options=replace(job.options, compute=compute))
        bundle = self._bundle(job.own_name)
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        actor = ray.remote(WorkerActor).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy=place
        )
        handle = actor.remote(job, secret)
        found = Actor(job, handle, handle.run.options(num_returns="streaming").remote())
        if bundle != ANY_BUNDLE:
            self._bundles[bundle][1].append(found)
        return found

    def _bundle(self, worker: str) -> int:
        """The place of a worker, the same for all of its tensor ranks: one whose worker is no more."""
        for index, (name, _) in enumerate(self._bundles):
            if name == worker:
                return index
        for index, (_, actors) in enumerate(self._bundles):
            if all(each.has_ended() for each in actors):
                self._bundles[index] = worker, []
                return index
        return ANY_BUNDLE


def _connect(address: str | None, cpus: int) -> None:
    """Use the Ray at `address`, or at RAY_ADDRESS, or start one that has a place for as much as is wanted of it."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address is None:
        with suppress(ValueError):  # the CPUs of a Ray that runs already cannot be chosen
            ray.init(include_dashboard=False, num_cpus=max(os.cpu_count() or 1, cpus), **options)
            return
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise WorkerError(f"no Ray at {quote(address or 'RAY_ADDRESS')}: {_first_line(error)}") from None


def _give_back(group: Any) -> None:
    """Let Ray have the places for others."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.util.remove_placement_group(group)


def _first_line(error: BaseException) -> str:
    return quote((str(error).strip().splitlines() or [type(error).__name__])[0], limit=300)
