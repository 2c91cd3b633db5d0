"""Processes of this machine that compute with transformers' own tensor parallelism, each from its own rank's view.

`Ranks` is the side that asks, `worker` the one that answers: it imports torch and transformers once and forks the
ranks of every job from there, a line of JSON each way.
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
    """What the ranks load from; None: from the checkpoint itself, to see what transformers does with that."""
    size: int
    expert_parallel_size: int
    prompt: list[list[int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a job."""

    status: str
    """`ok`; `refused`: a rank was asked for what its view does not hold; `failed`: transformers raised an error."""
    rank: int
    """The first rank with that status."""
    detail: str
    """What was refused, or the error."""
    logits: str | None = None
    """File of the logits of rank 0, where all ranks have the same."""
    tokens: list[list[int]] | None = None


class Ranks:
    """A process from which ranks are forked. It is started at once and imports meanwhile; use as a context manager."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DEACTIVATE_ASYNC_LOAD": "1",  # an error is then raised where it was made
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": _loopback(),  # no rank is reached from another machine
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
        """End the process; ranks of a job that was not waited for end with it."""
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
