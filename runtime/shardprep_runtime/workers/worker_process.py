"""Be a worker: a process that prepares its stage, joins the meeting of a front end, and serves it until it goes.

`shardprep worker` calls `run_worker`. A front end that starts workers itself runs `main` in processes of its own, and
tells them by their standard input what they are; the secret comes in the environment, which no other user can read.
They end with the front end, however that ends: its end of their standard input is closed by the system, if by nobody
else.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from .. import environment
from ..engines.quiet import hush_loggers
from ..errors import InputError, WorkerError, quote
from ..shard.options import read_set, words_of
from .addresses import address_towards
from .failures import failure_of
from .kinds import kind_named
from .meeting import Invitation, RefusedError, find_meeting
from .sealed import check_secret
from .tensor_group import Ranks, TensorGroup, form_group
from .transport import WorkerInfo, check_name
from .worker import Clock, Compute, Worker, WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """What a worker's process is to be."""

    options: WorkerOptions
    """What it holds. Its stages may be empty: as the front end says; the shard is then fetched after torch is imported."""
    master: str
    """host:port of the front end's meeting."""
    name: str | None = None
    """What the front end is to call it; None: stage-N, or spare."""
    group: str | None = None
    """What its tensor ranks have in common, and no others; None: the name."""
    wait: float = 600.0
    """Seconds for which the front end is waited for."""
    reconnect: bool = False
    """Wait for the next front end at `master` when this one goes, and keep the stage meanwhile."""

    @property
    def own_name(self) -> str:
        """The name that it asks for. Raises InputError where nothing can be called so."""
        if self.name is not None:
            return check_name(self.name)
        return "spare" if self.options.pp_rank is None else f"stage-{self.options.pp_rank}"


def run_worker(job: WorkerJob, *, secret: str | None = None, say: Callable[[str], None]) -> None:
    """Be the worker that `job` describes; returns when its front end says that this is the end.

    After a signal that raises here, end the process by `os._exit`: threads of torch still wait, which would abort it.

    Args:
        secret: What it shares with the front end; default: SHARDPREP_SECRET.
        say: Is told what happens, in a line each.

    Raises:
        RefusedError: Where the front end does not want it.
        WorkerError: Where the front end goes away.
        ShardprepError: What fetching, verifying and building do.
    """
    secret = environment.secret() if secret is None else secret
    if secret is None:
        raise InputError(
            "SHARDPREP_SECRET is not set; set it to what the front end has, for example what `openssl rand -hex 32` "
            "printed there"
        )
    check_secret(secret)
    quiet()
    process = _Process(job, secret, say)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            process.run()
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    # not in the main thread, which would hear of no signal while it waits in torch
    thread = threading.Thread(target=work, name="shardprep-worker", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        process.clean()
        raise
    if failures:
        raise failures[0]


class _Process:
    """A worker's process from its start to its end."""

    def __init__(self, job: WorkerJob, secret: str, say: Callable[[str], None]) -> None:
        self._job, self._secret, self._say = job, secret, say
        self._clock = Clock()
        self._invitation: Invitation | None = None
        self._worker: Worker | None = None

    def run(self) -> None:
        options = self._job.options
        if options.stages:
            # the shard is on its way while torch is imported and the front end is looked for
            self._worker = self._make(options)
            self._worker.begin()
        try:
            import torch.distributed  # noqa: F401 - for what it takes

            self._clock.end("imports")
            self._find()
            self._clock.end("front end")
            worker = self._prepared()
            if options.tp_rank > 0:
                self._say(f"{worker.name}: tensor rank {options.tp_rank}: {_ready(worker.info())}")
                worker.follow()
                return
            self._say(f"{worker.name}: {_ready(worker.info())}")
            while self._served(worker):
                self._find()
                self._check_plan()
                worker.forget()
        finally:
            if self._worker is not None:
                self._worker.close()

    def clean(self) -> None:
        """For a process that ends in the middle of it."""
        if self._worker is not None:
            self._worker.clean()

    def _make(self, options: WorkerOptions) -> Worker:
        meet = self._meet if options.tensor_parallel_size > 1 else None
        worker = Worker(self._job.own_name, options, meet=meet, clock=self._clock)
        worker.on_broken = self._end_now
        return worker

    def _find(self) -> None:
        self._invitation = find_meeting(self._job.master, secret=self._secret, timeout=self._job.wait)
        try:
            self._kind = kind_named(self._invitation.plan.transport)
        except InputError as error:
            raise RefusedError(f"the front end at {self._invitation.address}: {error}") from None

    def _prepared(self) -> Worker:
        assert self._invitation is not None
        plan = self._invitation.plan
        options = self._job.options
        options = replace(
            options,
            stages=options.stages or plan.stages,
            tensor_parallel_size=options.tensor_parallel_size
            if options.stages
            else plan.tensor_parallel_size,
            compute=replace(options.compute, dtype=options.compute.dtype or plan.dtype),
            shard_set=replace(options.shard_set, digest=options.shard_set.digest or plan.manifest_digest),
        )
        if self._worker is None:
            self._worker = self._make(options)
        else:
            self._worker.options = options
        self._check_plan()
        self._worker.prepare()
        return self._worker

    def _check_plan(self) -> None:
        """Raises RefusedError where the front end runs something else than this worker was made for."""
        assert self._invitation is not None and self._worker is not None
        plan, options = self._invitation.plan, self._worker.options
        wanted: Mapping[str, tuple[object, object]] = {
            "stages": (options.stages, plan.stages),
            "tensor_parallel_size": (options.tensor_parallel_size, plan.tensor_parallel_size),
            "dtype": (options.compute.dtype, plan.dtype),
            "manifest_digest": (options.shard_set.digest, plan.manifest_digest),
        }
        for name, (own, theirs) in wanted.items():
            if own != theirs:
                raise RefusedError(
                    f"the front end at {self._invitation.address} runs {name} {quote(theirs)}, this worker was "
                    f"started for {quote(own)}; give both the same, or leave it to the front end"
                )

    def _meet(self) -> TensorGroup:
        assert self._invitation is not None and self._worker is not None
        options, invitation = self._worker.options, self._invitation
        ranks = Ranks(
            name=check_name(self._job.group or self._job.own_name),
            tp_rank=options.tp_rank,
            size=options.tensor_parallel_size,
            device=options.compute.device,
        )
        return form_group(
            invitation.store,
            ranks,
            host=address_towards(invitation.host, invitation.port),
            secret=self._secret,
            nonce=invitation.plan.nonce,
            timeout=self._job.wait,
        )

    def _served(self, worker: Worker) -> bool:
        """Join, and serve until the front end goes; whether another is to be waited for. Raises WorkerError."""
        assert self._invitation is not None
        invitation, self._invitation = self._invitation, None
        can_come_again = self._job.reconnect and self._kind.outlives_front_end
        why = f"the front end at {invitation.address} has gone"
        try:
            membership = invitation.join(worker.info())
            worker.name = membership.name
            self._say(f"{worker.name}: serves the front end at {invitation.address}")
            is_told = self._kind.serve(worker, membership)
            if is_told or membership.is_over():
                why = ""
        except RefusedError:
            raise
        except WorkerError as error:
            why = str(error)
        if can_come_again:
            ended = why or "the front end has ended"
            self._say(f"{worker.name}: {ended}; waits for the next at {invitation.address}")
        elif why:
            raise WorkerError(why)
        return can_come_again

    def _end_now(self, why: str) -> None:
        """End this process, so that whoever waits for it knows at once: torch has no way to bring its tensor ranks
        together again."""
        self._say(f"{self._job.own_name}: {why}; this process ends")
        os._exit(1)


def _ready(info: WorkerInfo) -> str:
    """One line of what a worker has done so far."""
    held = "spare, holds the shards of its stages"
    if info.layers is not None:
        held = f"stage {info.pp_rank}, layers {info.layers[0]} to {info.layers[1] - 1}"
    took = info.seconds or {}
    each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in took.items())
    return (
        f"{held}: {info.nbytes:,} bytes, {info.bytes_fetched:,} of them fetched; "
        f"ready in {sum(took.values()):.2f} s: {each}"
    )


def quiet() -> None:
    """Keep from our user what libraries say of themselves in a worker's process. Before torch is imported."""
    environment.quiet_torch()
    hush_loggers()


# ---------------------------------------------------------------------------------- a process that a front end started
def dump_job(job: WorkerJob) -> bytes:
    """As a front end tells a worker's process: one line of JSON."""
    said = asdict(job)
    said["options"]["shard_set"] = words_of(job.options.shard_set)
    return json.dumps(said).encode() + b"\n"


def read_job(line: bytes) -> WorkerJob:
    """What `dump_job` wrote."""
    said: dict[str, Any] = json.loads(line)
    options = said.pop("options")
    options["shard_set"] = read_set(options["shard_set"])
    options["compute"] = Compute(**options["compute"])
    options["stages"] = tuple((start, stop) for start, stop in options["stages"])
    if options["spare_for"] is not None:
        options["spare_for"] = tuple(options["spare_for"])
    return WorkerJob(options=WorkerOptions(**options), **said)


def main() -> NoReturn:
    """What such a process does; what happens is said in lines of JSON, which nothing else writes between."""
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 2**16)
        if not more:
            os._exit(2)
        line += more
    threading.Thread(target=_end_with_front_end, name="shardprep-parent", daemon=True).start()
    spoken = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not a line of ours

    def tell(said: Mapping[str, object]) -> None:
        os.write(spoken, json.dumps(said).encode() + b"\n")

    status = 0
    try:
        run_worker(read_job(line), say=lambda text: tell({"say": text}))
    except Exception as error:  # noqa: BLE001 - told to the front end, which raises it
        tell(asdict(failure_of(error)))
        status = 2 if isinstance(error, InputError) else 1
    finally:
        sys.stderr.flush()
        os._exit(status)  # torch's threads would be waited for


def _end_with_front_end() -> None:
    """Nothing is ever written after the job: a read returns when the front end has ended or wants this."""
    while os.read(0, 2**10):
        pass
    os._exit(1)
