"""A worker of links without a model, in a process of its own, for tests of what carries steps.

    python echo_worker.py

It reads orders from its input, a line of JSON each, and answers with one: "start" forks a worker from this process, in
which everything is imported, and gives its process id; "wait" gives how such a process has ended.

The stages compute `expected`. What a sequence is called says what is to happen to its steps:

    slow-K-..., slow-all-...   stage K sleeps for 0.1 s, or each does
    hang-K-...                 stage K sleeps for a minute
    input-K-..., cache-K-..., integrity-K-..., error-K-...   stage K refuses, in these ways
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch

from shardprep_runtime.errors import CacheLostError, InputError, IntegrityError, WorkerError
from shardprep_runtime.workers.links.served import serve_links
from shardprep_runtime.workers.meeting import join
from shardprep_runtime.workers.transport import Health, Step, Timing, WorkerInfo

SECRET = "a secret of sixteen or more"
DIGEST = "sha256:" + "0" * 64
HIDDEN = int(os.environ.get("ECHO_HIDDEN", "16"))
VOCAB = 23

ERRORS = {
    "input": InputError,
    "cache": CacheLostError,
    "integrity": IntegrityError,
    "error": ZeroDivisionError,
}


def expected(ids: torch.Tensor, stages: int, keep: str = "last") -> torch.Tensor:
    """What comes out of the last of `stages` stages."""
    out = ids
    for stage in range(stages):
        out = compute(out, stage, stages, keep)
    return out


def compute(inputs: torch.Tensor, stage: int, stages: int, keep: str) -> torch.Tensor:
    hidden = inputs[..., None].expand(-1, -1, HIDDEN).to(torch.bfloat16) if inputs.ndim == 2 else inputs
    hidden = hidden * 2 + stage
    if stage < stages - 1:
        return hidden
    logits = hidden[..., :1].expand(-1, -1, VOCAB).float() + torch.arange(VOCAB)
    return (logits if keep == "all" else logits[:, -1:]).contiguous()


class EchoWorker:
    def __init__(self, name: str, pp_rank: int | None, stages: int) -> None:
        self.name = name
        self.pp_rank = pp_rank
        self.stages = stages
        self.past: dict[str, int] = {}
        self._lock = threading.Lock()

    def info(self) -> WorkerInfo:
        stage = None if self.pp_rank is None else (self.pp_rank, self.pp_rank + 1)
        return WorkerInfo(self.name, self.pp_rank, stage, "here", os.getpid(), DIGEST, seconds={"start": 0.0})

    def step(self, step: Step, inputs: torch.Tensor) -> tuple[torch.Tensor, Timing]:
        began = time.perf_counter()
        with self._lock:
            assert self.pp_rank is not None
            what, _, stage = step.sequence.partition("-")
            if stage.partition("-")[0] in (str(self.pp_rank), "all"):
                if what in ERRORS:
                    raise ERRORS[what](f"stage {stage} was told to fail")
                time.sleep({"slow": 0.1, "hang": 60.0}.get(what, 0.0))
            if what in ("first", "second"):
                self._overlap(what, Path(tempfile.gettempdir(), f"shardprep-{stage}"))
            if step.past and self.past.get(step.sequence, 0) < step.past:
                raise CacheLostError(f"no {step.past} positions of {step.sequence}")
            self.past[step.sequence] = step.past + inputs.shape[1]
            out = compute(inputs, self.pp_rank, self.stages, step.keep)
        return out, Timing(self.name, time.perf_counter() - began)

    def _overlap(self, what: str, begun: Path) -> None:
        """In the last stage the first sequence waits until the second has begun in stage 0."""
        if what == "second" and self.pp_rank == 0:
            begun.touch()
        if what == "first" and self.pp_rank == self.stages - 1:
            deadline = time.monotonic() + 60
            while not begun.exists():
                if time.monotonic() > deadline:
                    raise WorkerError("the second sequence did not begin while the first was computed")
                time.sleep(0.002)
            begun.unlink()

    def health(self, *, probe: bool) -> Health:
        if not probe:
            return Health(self.info(), len(self.past))
        with self._lock:
            return Health(self.info(), len(self.past), DIGEST, proven=True, seconds=0.5)

    def reset(self, sequence: str) -> None:
        with self._lock:
            self.past.pop(sequence, None)

    def promote(self, pp_rank: int) -> WorkerInfo:
        if pp_rank >= self.stages:
            raise IntegrityError(f"no stage {pp_rank}")
        time.sleep(0.2)
        self.pp_rank = pp_rank
        return self.info()

    def close(self) -> None:
        pass


def serve(master: str, name: str, pp_rank: int | None, stages: int) -> int:
    """How many threads are left behind."""
    worker = EchoWorker(name, pp_rank, stages)
    serve_links(cast(Any, worker), join(master, worker.info(), secret=SECRET, timeout=60))
    return len([each for each in threading.enumerate() if each.name.startswith("shardprep")])


def main() -> None:
    torch.set_num_threads(1)
    children = set()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            if "start" in order:
                answer = os.fork()
                if not answer:  # ends as an interpreter does: threads that are left in gloo would abort it
                    children.clear()
                    sys.exit(serve(*order["start"]))
                children.add(answer)
            else:
                answer = wait_for(order["wait"], order["timeout"])
                if answer is not None:
                    children.discard(order["wait"])
            print(json.dumps(answer), flush=True)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def wait_for(child: int, timeout: float) -> int | None:
    """The exit status of a child, or minus the signal that ended it; None where it goes on."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


if __name__ == "__main__":
    main()
