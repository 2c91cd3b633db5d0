"""Run one engine on one job: `ENGINE check|run JOB --progress-fd N`, in a process that its parent outlives.

What it finds and how far it is goes out as lines of JSON on the descriptor; stdout and stderr are the library's to
fill. Importing it needs the standard library only: it runs in environments where shardprep is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ENGINES = ("gptqmodel", "llmcompressor", "autoawq", "auto-gptq")
"""In the order in which they should be preferred."""

PARENT_GONE = 3
"""Exit code where the process that started this one has ended."""


@dataclass(frozen=True)
class Job:
    """What an engine is asked to do."""

    source: str
    """A folder of safetensors with config.json and a tokenizer, in the Hugging Face layout."""
    destination: str
    """A folder that does not exist yet, for the checkpoint."""
    work: str
    """A folder of this engine's own, kept between runs of the same job."""
    method: str
    """`gptq` or `awq`."""
    bits: int
    group_size: int
    """Numbers of a row that share a scale; -1: all of them."""
    symmetric: bool
    act_order: bool
    skip: tuple[str, ...]
    """Linears of the layers that stay as they are: names or parts of names, or patterns behind `re:`."""
    calibration: str
    """A file with one list of token ids a line, as JSON."""
    device: str
    dtype: str
    """In which the model is computed: `bfloat16`, `float16` or `float32`."""
    seed: int
    batch_size: int
    """Sequences that are computed together."""

    @classmethod
    def read(cls, path: str) -> Job:
        fields = json.loads(Path(path).read_text("utf-8"))
        return cls(**{**fields, "skip": tuple(fields["skip"])})

    def sequences(self) -> list[list[int]]:
        """The token ids of the calibration."""
        with Path(self.calibration).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def config(self) -> Any:
        """The source's config.json."""
        return json.loads(Path(self.source, "config.json").read_text("utf-8"))


class Tell(Protocol):
    """Says how far an engine is: `stage` (name), `layer` (done, of), `module` (layer, name, loss)."""

    def __call__(self, event: str, **about: Any) -> None: ...


class Engine(Protocol):
    """What each module `with_...` has."""

    def check(self, job: Job) -> dict[str, Any]:
        """`versions` of what would run, and `problem`: None, or why this job cannot be run and what to do about it.

        Quick: no weights are loaded. Also `resumes`: whether a run that was killed goes on where it was.
        """

    def run(self, job: Job, tell: Tell) -> None:
        """Write the quantized checkpoint into `job.destination`.

        Args:
            job: What to do.
            tell: Is told of progress.
        """


def load(name: str) -> Engine:
    """The module of an engine. Its library is imported when it is used."""
    module: Any = importlib.import_module(f".with_{name.replace('-', '')}", __package__)
    engine: Engine = module
    return engine


def main(arguments: Sequence[str]) -> int:
    name, action, path, option, descriptor = arguments
    assert action in ("check", "run") and option == "--progress-fd", arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as out:
        lock = threading.Lock()

        def tell(event: str, **about: Any) -> None:
            with lock:
                out.write(json.dumps({"event": event, **about}) + "\n")
                out.flush()

        try:
            job = Job.read(path)
            engine = load(name)
            if action == "check":
                tell("checked", **engine.check(job))
            else:
                engine.run(job, tell)
                tell("done")
        except Exception as error:  # noqa: BLE001 - whatever a library may raise is told, and the log has the rest
            traceback.print_exc()
            tell("failed", message=f"{type(error).__name__}: {error}")
            return 1
    return 0


def _end_with_parent() -> None:
    """Wait until the pipe from the parent breaks: nobody would take the result then."""
    while os.read(0, 4096):
        pass
    os._exit(PARENT_GONE)


def sow(seed: int) -> None:
    """Seed every source of chance that a library may draw from."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def missing(package: str, error: ImportError) -> str:
    """The problem that a library is not there, or not whole.

    Args:
        package: As it is imported.
        error: What importing it raised.
    """
    return f"{package} cannot be imported by {sys.executable}: {error}"
