"""Start workers as processes of this host, which end with this process, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ... import environment
from ...errors import quote
from ..failures import Failure, read_failure
from ..worker_process import WorkerJob, dump_job
from .crew import MeetingLauncher, Starter
from .launcher import Started

if TYPE_CHECKING:
    from ..worker import Compute, WorkerOptions

LAST_LINES: Final = 20
"""How many of the lines that a process printed are kept, for when it ends without a word of ours."""


class Process(Started):
    """A worker's process of this host."""

    def __init__(self, job: WorkerJob, process: subprocess.Popen[bytes]) -> None:
        super().__init__(job, process.pid)
        self.process = process
        self._lines: deque[str] = deque(maxlen=LAST_LINES)

    def messages(self) -> Iterator[str | Failure]:
        """Read its standard output until it ends; lines that libraries print are kept for `how`."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            said = _message(line)
            if isinstance(said.get("say"), str):
                yield said["say"]
            elif said:
                yield read_failure(said)
            elif line:
                self._lines.append(line)
        self.process.stdout.close()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def has_ended(self) -> bool:
        """Whether the process is no more."""
        return self.process.poll() is not None

    def how(self) -> str | None:
        """By which signal or with which status it has ended, and what it printed last."""
        status = self.process.poll()
        if not status:
            return None
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"{how}; it printed last: {quote(' | '.join(self._lines), limit=1000)}" if self._lines else how

    def end(self) -> None:
        """Close its standard input, which tells it."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def kill(self) -> None:
        """End it, also where it is stopped."""
        self.process.kill()

    def wait(self, timeout: float) -> bool:
        """Whether it has ended within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.has_ended()


def start_worker(job: WorkerJob, secret: str) -> Process:
    """Start a process of this host. It ends with this process.

    Args:
        job: The worker that it is to be.
        secret: What proves it to the front end; it goes through the environment, which no other user can read.
    """
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
    return Process(job, process)


def _message(line: str) -> dict[str, Any]:
    """A line of a worker's process that is one of ours; else nothing."""
    if not line.startswith('{"'):
        return {}
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and ("say" in said or "kind" in said) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes(MeetingLauncher):
    """Workers that are processes of this host, and meet the front end at loopback."""

    @contextlib.contextmanager
    def ready(self, options: WorkerOptions, workers: int, timeout: float | None) -> Iterator[Starter]:
        """Start them so that they share this host's cores and devices.

        Args:
            options, workers, timeout: As `MeetingLauncher.ready` has them.
        """
        yield Starter(
            "127.0.0.1",
            lambda job, secret: start_worker(replace(job, options=_share(job.options)), secret),
        )


def _share(options: WorkerOptions) -> WorkerOptions:
    """With threads: this host's cores, shared out. With device "cuda": a device for each process in turn."""
    compute: Compute = options.compute
    count = len(options.stages)
    if compute.threads is None:
        cores = len(os.sched_getaffinity(0))
        compute = replace(compute, threads=max(1, cores // (count * options.tensor_parallel_size)))
    if compute.device == "cuda":
        import torch

        pp_rank = count if options.pp_rank is None else options.pp_rank
        place = pp_rank * options.tensor_parallel_size + options.tp_rank
        compute = replace(compute, device=f"cuda:{place % max(1, torch.cuda.device_count())}")
    return replace(options, compute=compute)
