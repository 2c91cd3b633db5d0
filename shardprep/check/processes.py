"""Run processes of this machine that compute with transformers' own tensor parallelism, each from its own rank's view.

`Ranks` asks and `worker` answers, by a line of JSON each way. The worker imports torch and transformers once, and forks
the ranks of every job.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from types import TracebackType

from shardprep_runtime.errors import ProblemError


@dataclass(frozen=True, slots=True)
class Job:
    """One model on `size` ranks."""

    checkpoint: str
    """Folder of config.json and model.safetensors."""
    shard_set: str | None
    """The shard set that the ranks load from; None: they load the checkpoint, as transformers does by itself."""
    size: int
    expert_parallel_size: int
    prompt: list[list[int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a job."""

    status: str
    """`ok`; `refused`: a rank was asked for a block that its view does not hold; `failed`: transformers raised an error."""
    rank: int
    """The first rank with that status."""
    detail: str
    """The block that was refused, or the error."""
    logits: str | None = None
    """File with the logits of rank 0, if all ranks have the same."""
    tokens: list[list[int]] | None = None


class Ranks:
    """A process that forks ranks. It starts at once and imports torch meanwhile. Use as a context manager."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DEACTIVATE_ASYNC_LOAD": "1",  # else an error is raised in another thread than the one that loads
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": _loopback(),  # so that ranks cannot be reached from another machine
        }
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", f"{__package__}.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, job: Job) -> Answer:
        """Run a job on as many processes as it has ranks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-3:]
            raise ProblemError(f"the processes of tensor ranks could not be started: {' / '.join(last)}")
        return Answer(**json.loads(line))

    def close(self) -> None:
        """End the process, and with it the ranks of a job that still runs."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0] if names else "lo")
