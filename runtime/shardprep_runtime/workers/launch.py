"""Put a pipeline together: the meeting, workers of this host or of others, the transport that reaches them.

    with launch("s3://bucket/llama-70b", stages=2, spares=1) as running:
        running.pipeline ...

Workers that are started here are processes of this host, and end with this one, however it ends. What a worker that
fails at its start says is raised here, as the error that it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from .. import environment
from ..errors import InputError, ShardprepError, WorkerError, quote
from ..format.grid import Stages
from ..format.manifest import Manifest
from ..format.view import Place, choose_stages, plan_view
from ..shard.shard_set import ShardSet, open_set
from .failures import Failure, raised
from .meeting import (
    Meeting,
    Plan,
    RpcPlan,
    default_host,
    new_secret,
    open_meeting,
)
from .pipeline import Event, Pipeline, Policy
from .worker import CPU, Compute, WorkerOptions
from .worker_process import WorkerJob, dump_job, quiet

if TYPE_CHECKING:
    from .transport import Transport

TRANSPORTS: Final = ("links", "rpc", "ray", "local")

LAST_LINES: Final = 20
"""Of what a worker's process printed that are kept, for when it ends without a word of ours."""

END_TIMEOUT: Final = 2.0
"""Seconds in which a worker's process that was told to end may do so by itself."""

LOOK_EVERY: Final = 0.05
"""Seconds between two looks whether all workers are there."""


@dataclass(eq=False, slots=True)
class Process:
    """A process of a worker that was started here: one of them, or one for each of its tensor ranks."""

    worker: str
    """The name that the front end calls it by."""
    pp_rank: int | None
    tp_rank: int
    process: subprocess.Popen[bytes]
    failure: Failure | None = None
    """What it said of its end."""
    has_begun: bool = False
    """It has said something: its imports are done."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    reader: threading.Thread | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def error(self) -> ShardprepError | None:
        """Why it has ended; None while it runs, and where it was to end."""
        status = self.process.poll()
        if status is None:
            return None
        if self.reader is not None and self.reader is not threading.current_thread():
            self.reader.join(1)  # what it said last is on its way
        if self.failure is not None:
            return raised(self.failure, self.worker)
        if status == 0:
            return None
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        last = f"; it printed last: {quote(' | '.join(self.lines), limit=1000)}" if self.lines else ""
        return WorkerError(f"{self.worker}: its process has ended {how}{last}")


class Launch:
    """What runs: a pipeline, what reaches its workers, and the processes that were started here."""

    pipeline: Pipeline
    transport: Transport

    def __init__(
        self,
        options: WorkerOptions,
        say: Callable[[str], None],
        *,
        meeting: Meeting | None = None,
        secret: str = "",
    ) -> None:
        """`options`: what all workers have in common."""
        self.meeting = meeting
        self._options = options
        self._say = say
        self._secret = secret
        self.spares = 0
        """So many are kept ready."""
        self._lock = threading.Lock()
        self._refilling = threading.Lock()
        self._processes: list[Process] = []
        self._names: set[str] = set()
        self._joined: set[str] = set()
        self._lost: set[str] = set()
        self._is_closed = False

    @property
    def workers(self) -> Mapping[str, list[Process]]:
        """Processes that were started here and run, by the name of their worker; tensor rank 0 first."""
        found: dict[str, list[Process]] = {}
        with self._lock:
            for each in self._processes:
                if each.process.poll() is None:
                    found.setdefault(each.worker, []).append(each)
        return found

    # -------------------------------------------------------------------------------------------------- the processes
    def start(self, pp_rank: int | None, *, spare_for: tuple[int, ...] | None = None) -> str:
        """Start a worker for a stage, or a spare; its name. Returns at once."""
        assert self.meeting is not None
        with self._lock:
            if self._is_closed:
                raise WorkerError("this front end has ended")
            name = base = "spare" if pp_rank is None else f"stage-{pp_rank}"
            count = 1
            while name in self._names:
                count += 1
                name = f"{base}-{count}"
            self._names.add(name)
            for tp_rank in range(self._options.tensor_parallel_size):
                device = _device_of(self._options, pp_rank, tp_rank)
                options = dataclasses.replace(
                    self._options,
                    pp_rank=pp_rank,
                    tp_rank=tp_rank,
                    spare_for=spare_for,
                    compute=dataclasses.replace(self._options.compute, device=device),
                )
                job = WorkerJob(options=options, master=self.meeting.address, name=name)
                process = Process(name, pp_rank, tp_rank, start_worker(job, secret=self._secret))
                process.reader = threading.Thread(
                    target=self._listen, args=(process,), name=f"shardprep-{name}", daemon=True
                )
                process.reader.start()
                self._processes.append(process)
        return name

    def _listen(self, process: Process) -> None:
        """Read what a process says until it ends; then end those that cannot go on without it."""
        assert process.process.stdout is not None
        for raw in process.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            said = _message(line)
            if "say" in said:
                process.has_begun = True
                self._say(said["say"])
            elif "error" in said:
                process.failure = Failure(said.get("kind", ""), said["error"])
            elif line:
                process.lines.append(line)
        process.process.stdout.close()
        process.process.wait()
        if process.process.stdin is not None:
            process.process.stdin.close()
        with self._lock:
            others = [
                each for each in self._processes if each.worker == process.worker and each is not process
            ]
            is_closed = self._is_closed
        for other in others:
            _end_without(other)
        error = process.error()
        if error is not None and not is_closed:
            self._say(str(error))

    def replace(self, pp_rank: int) -> None:
        """Start a worker for a stage that was lost, unless one is on its way; it joins when it is ready."""
        if self._coming(pp_rank):
            return
        self._say(f"stage {pp_rank}: starting another worker")
        there = self.transport.workers()
        with self._lock:
            hung = [
                each for each in self._processes if each.worker in self._lost and each.worker not in there
            ]
        for each in hung:
            each.process.kill()  # the stage's memory is wanted
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

    def watch(self, transport: Transport) -> None:
        """Take `transport` for the one that says which workers are lost."""
        self.transport = transport
        transport.watch(self._on_lost)

    def _on_lost(self, worker: str, _: str) -> None:
        with self._lock:
            self._lost.add(worker)
        self.refill()

    def check(self) -> None:
        """Raise what the first process that has failed said of it."""
        with self._lock:
            processes = list(self._processes)
        for each in processes:
            error = each.error()
            if error is not None:
                raise error

    # -------------------------------------------------------------------------------------------------------- the end
    def close(self) -> None:
        """End everything that was started here."""
        with self._lock:
            self._is_closed = True
            processes = list(self._processes)
        for each in processes:
            if not each.has_begun:
                each.process.kill()  # it still imports, and would hear of its end when that is done
        _wait_for_end(processes)  # those that serve were told
        for each in processes:
            with contextlib.suppress(OSError):
                if each.process.stdin is not None:
                    each.process.stdin.close()  # tells the others
        _wait_for_end(processes)
        for each in processes:
            if each.process.poll() is None:
                each.process.kill()  # it may be stopped: nothing else ends it then
        for each in processes:
            each.process.wait()
            if each.reader is not None:
                each.reader.join()


def _wait_for_end(processes: Sequence[Process]) -> None:
    deadline = time.monotonic() + END_TIMEOUT
    for each in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(max(0.0, deadline - time.monotonic()))


def start_worker(job: WorkerJob, *, secret: str) -> subprocess.Popen[bytes]:
    """Start a process of this host that is the worker which `job` describes. It ends with this process."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from shardprep_runtime.workers.worker_process import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment.of_child(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), SHARDPREP_SECRET=secret),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: its status says so
        process.stdin.write(dump_job(job))
        process.stdin.flush()  # stays open: that it is closed tells the process to end
    return process


def _end_without(other: Process) -> None:
    """A tensor rank whose neighbour has ended ends by itself, unless it is stopped or waits for the network."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        other.process.wait(2)
        return
    other.process.kill()


def _message(line: str) -> dict[str, str]:
    """A line of a worker's process that is one of ours; else nothing."""
    if not line.startswith('{"'):
        return {}
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and all(isinstance(each, str) for each in said.values()) else {}


def _device_of(options: WorkerOptions, pp_rank: int | None, tp_rank: int) -> str:
    """cuda alone: a device for each process in turn."""
    if options.compute.device != "cuda":
        return options.compute.device
    import torch

    place = (len(options.stages) if pp_rank is None else pp_rank) * options.tensor_parallel_size + tp_rank
    return f"cuda:{place % max(1, torch.cuda.device_count())}"


# ------------------------------------------------------------------------------------------------------------- launch
@contextlib.contextmanager
def launch(
    source: str | os.PathLike[str] | ShardSet,
    *,
    stages: Sequence[Sequence[int]] | int | None = None,
    tensor_parallel_size: int = 1,
    spares: int = 0,
    transport: str = "links",
    workers: Literal["here", "elsewhere"] = "here",
    host: str | None = None,
    port: int = 0,
    allow_public: bool = False,
    secret: str | None = None,
    replace: bool = True,
    fallback: bool = True,
    compute: Compute = CPU,
    policy: Policy | None = None,
    timeout: float | None = None,
    say: Callable[[str], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Iterator[Launch]:
    """Start, or wait for, the workers of a split model; end them at the end of the `with`.

    allow_public serve there also where the Internet may reach it

    Raises what makes the start hopeless before anything is started, and then what the first worker that fails says.

    Args:
        stages: Layers [start, stop) of each, or how many; default: those of the split, else one.
        spares: Workers more, which take the stage of one that is lost.
        workers: "here": processes of this host; "elsewhere": `shardprep worker`s that join, here or on other hosts.
        host: Where workers meet; default: loopback for those started here, else this host's private address.
        port: At which they meet; 0: any that is free.
        secret: What workers share; default: a new one for those started here, else SHARDPREP_SECRET.
        replace: Start another worker for one that is lost, and another spare for one that was used, where the transport
            takes new ones.
        fallback: Go on in this process when no worker is left, as far as its memory allows.
        compute: What each worker computes with. Device "cuda": one for each process in turn. Threads: those started
            here share this host's cores by default.
        timeout: Seconds in which all must be there; None: however long it takes.
        say: Is told of progress, in lines, from any thread.
    """
    say = say or _silent
    shard_set, manifest = open_set(source).pinned()
    chosen = _stages_of(manifest, stages, tensor_parallel_size)
    if transport not in TRANSPORTS:
        raise InputError(f"no transport {quote(transport)}; there are {', '.join(TRANSPORTS)}")
    if workers == "elsewhere" and transport not in ("links", "rpc"):
        raise InputError(
            f"transport {transport} starts its workers itself; use links or rpc for those from elsewhere"
        )
    if spares < 0:
        raise InputError(f"spares must be at least 0, not {spares}")
    if spares and shard_set.is_remote and shard_set.cache is None and len(chosen) > 1:
        raise InputError("spares need a cache: without one they would hold the whole model in memory")
    if compute.threads is None and workers == "here" and transport != "local":
        threads = max(1, len(os.sched_getaffinity(0)) // (len(chosen) * tensor_parallel_size))
        compute = dataclasses.replace(compute, threads=threads)
    options = WorkerOptions(
        shard_set=shard_set, stages=chosen, tensor_parallel_size=tensor_parallel_size, compute=compute
    )
    with contextlib.ExitStack() as stack:
        if transport in ("links", "rpc"):
            own = secret or (new_secret() if workers == "here" else environment.secret())
            if own is None:
                raise InputError(
                    "SHARDPREP_SECRET is not set; set it to the same random text here and for all workers, for example "
                    "what `openssl rand -hex 32` prints"
                )
            count = len(chosen) + spares
            plan = Plan(
                transport=transport,
                stages=chosen,
                tensor_parallel_size=tensor_parallel_size,
                dtype=compute.dtype,
                manifest_digest=shard_set.digest or "",
                revision=shard_set.revision,
                rpc=RpcPlan(port=0, world_size=count + 1) if transport == "rpc" else None,
            )
            quiet()
            meeting = open_meeting(
                host or ("127.0.0.1" if workers == "here" else default_host()),
                port,
                plan=plan,
                secret=own,
                allow_public=allow_public,
            )
            stack.callback(meeting.close)
            running = Launch(options, say, meeting=meeting, secret=own)
            stack.callback(running.close)
            stack.callback(meeting.end)  # before the transport is closed, which tells the workers to end
            if workers == "here":
                for pp_rank in range(len(chosen)):
                    running.start(pp_rank)
                for _ in range(spares):
                    running.start(None)
            else:
                _say_how(say, meeting, shard_set.source, tensor_parallel_size)
            running.watch(_transport_of(running, meeting, count, timeout))
            ending = contextlib.ExitStack()
            ending.callback(running.transport.close)
            with contextlib.ExitStack() as undo:
                undo.push(ending)
                _wait_for_all(running, len(chosen), spares if workers == "here" else 0, timeout)
                undo.pop_all()
        else:
            running = Launch(options, say)
            running.transport = _other_transport(transport, options, spares, replace=replace)
        starts = (
            replace and workers == "here" and running.meeting is not None and running.transport.can_replace
        )

        def happened(event: Event) -> None:
            if event.kind in ("promoted", "dropped"):
                running.refill()
            if on_event is not None:
                on_event(event)

        running.spares = spares if starts else 0
        policy = policy or Policy()
        if workers == "here" and not replace:
            policy = dataclasses.replace(policy, replacement_timeout=0.0)  # nobody will come
        running.pipeline = Pipeline(
            running.transport,
            chosen,
            policy,
            fallback=_fallback_of(options) if fallback and transport != "local" else None,
            replace=running.replace if starts else None,
            on_event=happened,
        )
        stack.callback(running.pipeline.close)
        if running.meeting is not None:
            stack.callback(running.meeting.end)
        stack.callback(setattr, running, "spares", 0)  # those that end now were not lost
        yield running


def _silent(_: str) -> None:
    pass


def _say_how(say: Callable[[str], None], meeting: Meeting, source: str, tensor_parallel_size: int) -> None:
    """Tell the operator what is to be started on the other hosts."""
    ranks = " --tp-rank N" if tensor_parallel_size > 1 else ""
    for pp_rank, (start, stop) in enumerate(meeting.plan.stages):
        say(
            f"waiting for stage {pp_rank} (layers {start} to {stop - 1}): shardprep worker --manifest {quote(source)} "
            f"--pp-rank {pp_rank}{ranks} --master {meeting.address}"
        )


def _transport_of(running: Launch, meeting: Meeting, count: int, timeout: float | None) -> Transport:
    if meeting.plan.transport == "links":
        from .links.transport import LinkTransport

        return LinkTransport(meeting)
    from .rpc import RpcTransport

    # its processes must all be there from the start
    deadline = None if timeout is None else time.monotonic() + timeout
    welcome = 0
    while welcome < count:
        running.check()
        member = meeting.joined(LOOK_EVERY)
        if member is not None:
            welcome = meeting.welcome(member)
        _check_time(deadline, f"{count - welcome} of {count} workers")
    return RpcTransport(meeting)


def _wait_for_all(running: Launch, stages: int, spares: int, timeout: float | None) -> None:
    """Return once each stage has a worker, and all spares are warm. Raises what one that has failed says."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        held = [info.pp_rank for info in running.transport.workers().values()]
        missing = [f"of stage {pp_rank}" for pp_rank in range(stages) if pp_rank not in held]
        if held.count(None) < spares:
            missing.append(f"that are spares ({spares - held.count(None)})")
        if not missing:
            return
        running.check()
        _check_time(deadline, f"the workers {', '.join(missing)}")
        time.sleep(LOOK_EVERY)


def _check_time(deadline: float | None, what: str) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise WorkerError(
            f"{what} did not come in time; look at what they print, or give them longer (timeout)"
        )


def _other_transport(name: str, options: WorkerOptions, spares: int, *, replace: bool) -> Transport:
    """One whose workers need no meeting."""
    if options.tensor_parallel_size > 1:
        raise InputError(
            f"transport {name}: a stage of {options.tensor_parallel_size} tensor ranks is several processes, which only "
            "links and rpc bring together; use one of these, or one tensor rank"
        )
    if name == "ray":
        from .ray_actors import start_actors

        gpus = 1 if options.compute.device.startswith("cuda") else 0
        return start_actors(options, spares=spares, gpus=gpus, max_restarts=-1 if replace else 0)
    from .local import open_local

    return open_local(open_set(options.shard_set), stages=options.stages, compute=options.compute)


def _fallback_of(options: WorkerOptions) -> Callable[[], Transport]:
    """Makes what goes on in this process."""

    def open_here() -> Transport:
        from .local import open_fallback

        return open_fallback(
            open_set(options.shard_set),
            compute=dataclasses.replace(options.compute, device="cpu", threads=None),
        )

    return open_here


def _stages_of(
    manifest: Manifest, stages: Sequence[Sequence[int]] | int | None, tensor_parallel_size: int
) -> Stages:
    """The stages that are run. Raises LayoutError where the shard set cannot be cut so."""
    if stages is None:
        chosen = manifest.stages or choose_stages(manifest)
    elif isinstance(stages, int):
        chosen = choose_stages(manifest, pipeline_parallel_size=stages)
    else:
        chosen = choose_stages(manifest, stages=stages)
    for pp_rank in range(len(chosen)):
        plan_view(
            manifest,
            Place.of_stage(pp_rank, stages=chosen, tensor_parallel_size=tensor_parallel_size),
        )
    return chosen
