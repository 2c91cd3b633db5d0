"""Have an engine quantize a small random model of the same architecture, so that what it cannot do shows before the work."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import ProblemError, UnsupportedError, quote

from ..layout import Scheme
from ..layout.ties import settle_aliases
from ..model import skeleton
from ..model.shrink import Sizes, shrink
from ..source import open_source, read_checkpoint
from .engine import Engine, EngineError
from .engines.main import Job
from .names import names_of, rename_as_source
from .result import check_made

SIZES: Final = Sizes(heads=8, kv_heads=4, head_dim=32, intermediate=320, expert=64, layers=2, vocabulary=288)
"""Every linear of such a model divides into groups of 32."""

GROUP: Final = 32
SEQUENCES, TOKENS = 8, 64

WORTH: Final = 600.0
"""Seconds of work, at the most, above which a trial is worth its quarter of a minute."""


def try_out(config: Mapping[str, Any], tokenizer: Path, job: Job, engine: Engine, scheme: Scheme) -> None:
    """Quantize a small random model of an architecture, and check what was made.

    Args:
        config: The architecture.
        tokenizer: A folder with a tokenizer's files, in which the trial lies in a folder of its own.
        job: What is to be done, but for its folders and sizes.
        engine: Which is tried.
        scheme: What it should make.

    Raises:
        UnsupportedError: Where the engine cannot, or makes something else than was asked for.
    """
    model_type = quote(config.get("model_type"))
    folder = tokenizer / "trial"
    small = shrink(config, SIZES)
    model = skeleton.build(small, dtype="bfloat16")
    with skeleton.quiet():
        model.save_pretrained(folder / "source")
    del model
    for path in tokenizer.glob("*token*"):
        (folder / "source" / path.name).write_bytes(path.read_bytes())
    draw = random.Random(0)  # noqa: S311 - any tokens do
    lines = [json.dumps([draw.randrange(3, 250) for _ in range(TOKENS)]) for _ in range(SEQUENCES)]
    (folder / "calibration.jsonl").write_text("\n".join(lines), "utf-8")
    asked = replace(scheme, group=None if scheme.group is None else GROUP)
    trial = replace(
        job,
        source=str(folder / "source"),
        destination=str(folder / "made"),
        work=str(folder / "work"),
        calibration=str(folder / "calibration.jsonl"),
        group_size=-1 if asked.group is None else GROUP,
        batch_size=4,
    )
    try:
        engine.run(trial, lambda _: None)
        with open_source(folder / "source") as before, open_source(folder / "made") as after:
            source = settle_aliases(read_checkpoint(before))
            names = names_of(source)
            check_made(rename_as_source(read_checkpoint(after), source, names), source, asked)
    except ProblemError as error:
        problem = error.problem if isinstance(error, EngineError) else str(error)
        raise UnsupportedError(
            f"a small random {model_type} could not be quantized so: {problem}; "
            "another --method or --engine may; --no-trial goes on all the same"
        ) from None
