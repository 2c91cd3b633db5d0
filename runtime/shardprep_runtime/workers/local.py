"""Run the stages in this process: all of them side by side, or, where memory is short, a few layers at a time.

    with Pipeline(open_fallback("s3://bucket/llama-70b"), 1) as pipeline:
        ...

It is what `--transport local` means, what holds a draft model, and what takes over where no worker can be had.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import InputError, ShardprepError, WorkerError, WorkerLostError, quote
from ..format.grid import Stages
from ..format.read_manifest import find_manifest
from ..format.view import Place
from ..shard.filesystem import choose_io
from ..shard.shard_set import ShardSet
from .memory import SHARE, choose_cuts, dtype_of, free_memory
from .transport import Health, Output, Step, Timing, Transport, WorkerInfo, check_name
from .worker import CPU, Compute, Worker, WorkerOptions

if TYPE_CHECKING:
    import torch

    from ..stage.stage import Stage

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
"""glibc's malloc.h."""

LARGE: Final = 2**20
"""Bytes from which on a block is mapped on its own."""

CLOSED: Final = "the workers of this process were closed"


class AnyWorker(Protocol):
    """What holds a stage, or may. Of `worker.Worker`, or made for a test."""

    name: str

    def info(self) -> WorkerInfo: ...
    def step(self, step: Step, inputs: torch.Tensor) -> tuple[torch.Tensor, Timing]: ...
    def health(self, *, probe: bool) -> Health: ...
    def reset(self, sequence: str) -> None: ...
    def promote(self, pp_rank: int) -> WorkerInfo: ...
    def close(self) -> None: ...


class LocalTransport(Transport):
    """Workers of this process, each with a thread of its own: while one sequence is in the second stage, another is in
    the first. Nothing is ever lost, and a step takes as long as it takes: `timeout` is not looked at."""

    name = "local"
    can_replace = False

    def __init__(self, workers: Sequence[AnyWorker]) -> None:
        """`workers` are ready, and are closed with this."""
        self._workers = {check_name(worker.name): worker for worker in workers}
        if len(self._workers) < len(workers):
            raise InputError("two workers have the same name")
        self._threads = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"shardprep-{name}") for name in self._workers
        }
        self._closing = threading.Lock()
        self._is_closed = False

    def workers(self) -> Mapping[str, WorkerInfo]:
        return {name: worker.info() for name, worker in self._workers.items()}

    def step(
        self,
        route: Sequence[str],
        step: Step,
        inputs: torch.Tensor,
        *,
        timeout: float,
    ) -> Future[Output]:
        outcome: Future[Output] = Future()
        timings: list[Timing] = []

        def run(place: int, given: torch.Tensor) -> None:
            try:
                if self._is_closed:
                    raise WorkerError(CLOSED)
                found, timing = self._workers[route[place]].step(step, given)
                timings.append(timing)
                if place + 1 < len(route):
                    send(place + 1, found)
                else:
                    outcome.set_result(Output(found, tuple(timings)))
            except BaseException as error:  # noqa: BLE001 - raised by whoever asks for the outcome
                outcome.set_exception(error)

        def send(place: int, given: torch.Tensor) -> None:
            self._submit(route[place], run, place, given)

        try:
            send(0, inputs)
        except WorkerError as error:
            outcome.set_exception(error)
        return outcome

    def _submit(self, worker: str, work: Callable[..., Any], *args: Any) -> Future[Any]:
        if worker not in self._threads:
            raise WorkerLostError(f"there is no worker {quote(worker)}", worker=worker, is_certain=True)
        try:
            return self._threads[worker].submit(work, *args)
        except RuntimeError:  # of an executor that was shut down
            raise WorkerError(CLOSED) from None

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        found: Health = self._submit(worker, lambda: self._workers[worker].health(probe=probe)).result()
        return found

    def reset(self, worker: str, sequence: str) -> None:
        with contextlib.suppress(WorkerError):
            self._submit(worker, lambda: self._workers[worker].reset(sequence))

    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        found: WorkerInfo = self._submit(worker, lambda: self._workers[worker].promote(pp_rank)).result()
        return found

    def close(self) -> None:
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        for worker in self._workers.values():
            worker.close()


class LayerByLayer(Transport):
    """A whole model on a host whose memory is short: each step builds `cuts` one after the other from the mapped shard
    set, gives each the caches that it had, runs it and lets go of it. Slow, and right."""

    name = "local"
    can_replace = False

    def __init__(self, shard_set: ShardSet, cuts: Stages, compute: Compute) -> None:
        """Proves each of the cuts once. `cuts`: layers [start, stop) that are in memory together, in order."""
        self._shard_set, self._cuts, self._compute = shard_set, cuts, compute
        self._caches: list[OrderedDict[str, Any]] = [OrderedDict() for _ in cuts]
        self._worker = "layer-by-layer"
        self._nbytes = 0  # of the largest
        self._seconds: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shardprep-layers")
        self._is_closed = False
        self._stack = ExitStack()
        _give_memory_back()
        try:
            self._folder = self._stack.enter_context(shard_set.side_files())
            self._digest = shard_set.digest or ""
            self._prove()
        except BaseException:
            self.close()
            raise

    def _prove(self) -> None:
        from ..stage.probe import check_stage

        began = time.monotonic()
        for place in range(len(self._cuts)):
            with self._build(place) as stage:
                self._digest = stage.manifest_digest
                self._nbytes = max(self._nbytes, stage.nbytes)
                check_stage(stage)
        self._shard_set = replace(
            self._shard_set, verify="off"
        )  # from now on: what was proved is built again
        self._seconds["verify and prove"] = time.monotonic() - began

    def _build(self, place: int) -> Stage:
        from ..stage.stage import stage_of

        compute = self._compute
        with self._shard_set.load(Place.of_stage(place, stages=self._cuts)) as shard:
            return stage_of(
                shard,
                self._folder,
                device=compute.device,
                dtype=compute.dtype,
                max_sequences=compute.max_sequences,
                manifest_digest=self._shard_set.digest,
            )

    def workers(self) -> Mapping[str, WorkerInfo]:
        return {
            self._worker: WorkerInfo(
                name=self._worker,
                pp_rank=0,
                layers=(self._cuts[0][0], self._cuts[-1][1]),
                host=socket.gethostname(),
                pid=os.getpid(),
                manifest_digest=self._digest,
                nbytes=self._nbytes,
                seconds=dict(self._seconds),
            )
        }

    def step(
        self,
        route: Sequence[str],
        step: Step,
        inputs: torch.Tensor,
        *,
        timeout: float,
    ) -> Future[Output]:
        try:
            return self._thread.submit(self._run, step, inputs)
        except RuntimeError:
            outcome: Future[Output] = Future()
            outcome.set_exception(WorkerError(CLOSED))
            return outcome

    def _run(self, step: Step, inputs: torch.Tensor) -> Output:
        began = time.monotonic()
        given = inputs
        try:
            for place, caches in enumerate(self._caches):
                with self._build(place) as stage:
                    stage.swap_caches(caches)
                    try:
                        given = stage.step(step.sequence, given, step.past, step.keep)
                    finally:
                        self._caches[place] = stage.swap_caches(OrderedDict())
        except ShardprepError:
            self._forget(step.sequence)  # some layers have cached these positions, others not
            raise
        except Exception as error:
            self._forget(step.sequence)
            raise WorkerError(f"{type(error).__name__}: {quote(error, limit=500)}") from error
        return Output(given.cpu(), (Timing(self._worker, time.monotonic() - began),))

    def _forget(self, sequence: str) -> None:
        for caches in self._caches:
            caches.pop(sequence, None)

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        """Tell how the layers are, without a forward: one takes as long as a token, and the first proved each layer.

        Args:
            worker: There is but one.
            probe: Makes no difference.
            timeout: Nothing is waited for.
        """
        if self._is_closed:
            raise WorkerError(CLOSED)
        return Health(self.workers()[self._worker], len(self._caches[0]))

    def reset(self, worker: str, sequence: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._thread.submit(self._forget, sequence)

    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        raise WorkerError("holds all layers already, and takes no stage")

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._thread.shutdown(wait=True)
            self._caches = []
            self._stack.close()


def _give_memory_back() -> None:
    """Have what tensors free go back to the system at once, in all of this process.

    Otherwise glibc keeps it for later: with each large block that is freed it maps fewer of them (mallopt(3),
    M_MMAP_THRESHOLD). After a few runs of layers twice as much is held as any of them needs.
    """
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # glibc's
        set_option(M_MMAP_THRESHOLD, LARGE)
        set_option(M_TRIM_THRESHOLD, LARGE)


# --------------------------------------------------------------------------------------------------------- which of both
def open_local(
    shard_set: ShardSet, *, stages: Stages | None = None, compute: Compute = CPU
) -> LocalTransport:
    """Open a worker of this process for each stage.

    Args:
        stages: Layers [start, stop) of each; default: one stage, the whole model.
        compute: What they compute with.

    Raises:
        ShardprepError: What fetching, verifying and building do.
    """
    if stages is None:
        shard_set, manifest = shard_set.pinned()
        stages = ((0, manifest.layers),)
    workers: list[Worker] = []
    with ExitStack() as stack:
        for pp_rank in range(len(stages)):
            options = WorkerOptions(shard_set=shard_set, stages=stages, pp_rank=pp_rank, compute=compute)
            workers.append(Worker(f"local-{pp_rank}", options))
            stack.callback(workers[-1].close)
            workers[-1].begin()
        for worker in workers:
            worker.prepare()
        stack.pop_all()
    return LocalTransport(workers)


def open_fallback(shard_set: ShardSet, *, memory: int | None = None, compute: Compute = CPU) -> Transport:
    """The whole model in this process: at once where `memory` bytes suffice for it, else layer by layer.

    Args:
        memory: That it may take beside what is mapped, which the system takes back as it likes; default: a share of
            what is free. A dtype other than the stored one, tensors joined of several pieces and fused experts take it.

    Raises:
        WorkerError: Where not even the largest layer fits.
    """
    shard_set, manifest = shard_set.pinned()
    if memory is None:
        memory = int(SHARE * free_memory())
    if shard_set.is_remote:
        is_read = shard_set.cache is None
    else:
        is_read = choose_io(find_manifest(shard_set.source).parent, shard_set.io) == "read"
    with shard_set.side_files() as folder:
        cuts = choose_cuts(manifest, memory, dtype=compute.dtype or dtype_of(folder), is_read=is_read)
    if len(cuts) == 1:
        return open_local(shard_set, stages=cuts, compute=compute)
    return LayerByLayer(shard_set, cuts, compute)
