"""Run an engine in a process of its own, hear how far it is, and end it with this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import InputError, ProblemError, UnsupportedError, quote

from .engines.main import ENGINES, Job

START: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from engines.main import main; "
    "sys.path.pop(0); sys.exit(main(sys.argv[1:]))"
)
"""What an interpreter that may not have shardprep runs: the folder of engines is a package by itself."""


class EngineError(ProblemError):
    """An engine failed."""

    def __init__(self, message: str, *, problem: str | None = None) -> None:
        """Keep what failed.

        Args:
            message: What people read, with where the log is.
            problem: The same without the log; None where the message names no log.
        """
        super().__init__(message)
        self.problem = message if problem is None else problem


MEMORY: Final = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**17),
}
"""So that glibc gives back what a layer took: otherwise its heap grows by most of each layer, up to the whole model."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A library that quantizes, and the interpreter that has it."""

    name: str
    python: Path = Path(sys.executable)

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise InputError(f"no engine {quote(self.name)}; known are {', '.join(ENGINES)}")
        if not self.python.is_file() or not os.access(self.python, os.X_OK):
            raise InputError(f"{quote(self.python)}: no such interpreter; --engine-python names a python")

    def check(self, job: Job) -> Mapping[str, Any]:
        """What would run this job. Raises UnsupportedError where it cannot, with what to do."""
        found: Mapping[str, Any] = {}
        for event in self._events("check", job, Path(job.work, "check.log")):
            if event["event"] == "checked":
                found = event
        if found.get("problem"):
            raise UnsupportedError(f"engine {self.name}: {found['problem']}")
        return found

    def run(
        self, job: Job, hear: Callable[[Mapping[str, Any]], None], *, inherits: Sequence[int] = ()
    ) -> None:
        """Quantize.

        Args:
            job: What to do, and where.
            hear: Given each event of the engine.
            inherits: Descriptors that the process inherits: locks that are to be held while it lives.

        Raises:
            EngineError: Where it fails.
        """
        for event in self._events("run", job, Path(job.work, "engine.log"), inherits):
            hear(event)

    def _events(
        self, action: str, job: Job, log: Path, inherits: Sequence[int] = ()
    ) -> Iterator[Mapping[str, Any]]:
        """The events of one run, in order; the process ends before this does."""
        log.parent.mkdir(parents=True, exist_ok=True)
        path = log.with_suffix(".job.json")
        path.write_text(json.dumps(asdict(job)), "utf-8")
        command = [str(self.python.absolute()), "-c", START, str(Path(__file__).parent.absolute())]
        command += [self.name, action, str(path.absolute())]
        reading, writing = os.pipe()
        command += ["--progress-fd", str(writing)]
        with open(log, "ab") as out:
            try:
                process = subprocess.Popen(  # noqa: S603 - the user's own interpreter, on our file
                    command,
                    cwd=log.parent,  # where it may leave what it likes: GPTQModel makes a folder of logs
                    stdin=subprocess.PIPE,  # never written: that it breaks tells the engine that we are gone
                    stdout=out,
                    stderr=out,
                    pass_fds=(writing, *inherits),
                    env={
                        **MEMORY,
                        **os.environ,
                        "PYTHONHASHSEED": "0",
                    },  # no set's order may differ between runs
                )
            except OSError as error:
                os.close(reading)
                raise InputError(f"{quote(self.python)}: cannot be run: {error.strerror}") from None
            finally:
                os.close(writing)
        failure = None
        try:
            with os.fdopen(reading, encoding="utf-8") as lines:
                for line in lines:
                    event = json.loads(line)
                    if event["event"] == "failed":
                        failure = event["message"]
                    else:
                        yield event
            code = process.wait()
        finally:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
            if process.poll() is None:
                process.kill()
                process.wait()
        if failure is not None or code:
            problem = f"engine {self.name}: {quote(failure or ended(code, log))}"
            raise EngineError(f"{problem}; its log is {quote(log)}", problem=problem)


def ended(code: int, log: Path) -> str:
    """How a process ended that said nothing.

    Args:
        code: Its exit code; a negative one is a signal.
        log: What it wrote, of which the last line is told.
    """
    if code == -9:
        return "it was killed, most likely because memory ran out"
    lines = log.read_bytes()[-16384:].decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"it ended with {how}; the last that it said is: {last}"
