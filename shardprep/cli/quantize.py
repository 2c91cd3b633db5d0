"""shardprep quantize"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardprep.quantize.engines.main import ENGINES
from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render

if TYPE_CHECKING:
    from tqdm import tqdm

    from shardprep.quantize.report import QuantizeReport
    from shardprep.quantize.run import Watch


@click.command("quantize")
@click.argument("source", type=parse.SOURCE)
@click.argument("destination", type=parse.PATH)
@click.option("--method", type=click.Choice(["gptq", "awq"]), required=True)
@click.option(
    "--bits", type=click.IntRange(2, 8), default=4, show_default=True, help="GPTQ: 2, 4, 8; AWQ: 4."
)
@click.option(
    "--group-size",
    type=click.IntRange(-1, 2**20),
    default=128,
    show_default=True,
    help="Numbers of a row that share a scale; -1: a whole row.",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without or with zero points.  [default: without for gptq, with for awq, as engines expect]",
)
@click.option(
    "--act-order",
    is_flag=True,
    help="GPTQ: group inputs by their activations; vLLM refuses that with groups.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="NAME",
    help="Leave linears of the layers as they are: a name, a part of one, or a pattern behind re:. May be repeated.",
)
@click.option(
    "-tp",
    "--tensor-parallel-size",
    type=click.IntRange(1, 4096),
    help="Refuse, before the work, what so many ranks could not share.",
)
@click.option(
    "--pad-to-tp",
    type=click.IntRange(1, 4096),
    help="Make MLPs longer, with zeros, so that so many ranks can share them. Harmless.",
)
@click.option(
    "--engine", type=click.Choice(ENGINES), default=ENGINES[0], show_default=True, help="What quantizes."
)
@click.option(
    "--engine-python",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The interpreter of an environment that has the engine.  [default: this one]",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where it is computed: cpu, cuda:0.", metavar="DEVICE"
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="In which the model is computed, and what is not quantized is written.  [default: its own; float16 for awq]",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="A .txt, .jsonl or .parquet file, a folder of such, or hf://datasets/org/name.  [default: a small built-in "
    "text, for trying]",
)
@click.option(
    "--samples",
    type=click.IntRange(2, 2**20),
    default=128,
    show_default=True,
    help="Sequences of calibration text.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(16, 2**20),
    help="Tokens of each.  [default: 512, or what the model takes]",
)
@click.option(
    "--column", default="text", show_default=True, help="Of a JSON line or a table: where its text is."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the draw of sequences.",
)
@click.option(
    "--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Sequences at a time."
)
@click.option(
    "--evaluate",
    metavar="TEXT",
    help="Measure perplexity and KL to the original on this text.  [default: on a part of the calibration]",
)
@click.option(
    "--evaluate-tokens",
    type=click.IntRange(2, 2**40),
    default=2**15,
    show_default=True,
    help="Of that text at most.",
)
@click.option("--no-evaluate", is_flag=True, help="Measure nothing.")
@click.option("--max-kl", type=click.FloatRange(0), help="Fail where the KL to the original is larger.")
@click.option(
    "--work",
    type=parse.PATH,
    help="Folder for what lies there meanwhile, from which a killed run goes on.  [default: DESTINATION.quantizing]",
)
@click.option("--max-part-size", type=parse.Size(), default="5GB", show_default=True, help="Of one file.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything and forecast time, memory and disk; write nothing."
)
@click.option(
    "--trial/--no-trial",
    default=None,
    help="Let the engine first quantize a small random model of this architecture.  [default: where the work may take "
    "more than ten minutes, and in a dry run]",
)
@parse.access_options
@parse.json_option
def command(
    source: Path | str,
    destination: Path,
    method: str,
    bits: int,
    group_size: int,
    symmetric: bool | None,
    act_order: bool,
    skip: tuple[str, ...],
    tensor_parallel_size: int | None,
    pad_to_tp: int | None,
    engine: str,
    engine_python: Path | None,
    device: str,
    dtype: str | None,
    calibration: str | None,
    samples: int,
    sequence_length: int | None,
    column: str,
    seed: int,
    batch_size: int,
    evaluate: str | None,
    evaluate_tokens: int,
    no_evaluate: bool,
    max_kl: float | None,
    work: Path | None,
    max_part_size: int,
    dry_run: bool,
    trial: bool | None,
    access: Access,
    as_json: bool,
) -> None:
    """Bring the checkpoint SOURCE (a folder, pickle or safetensors) to 4 bits in DESTINATION by GPTQ or AWQ.

    SOURCE is a path, s3://bucket/prefix (also gs://, az://) or hf://org/name@revision.

    vLLM and transformers load the result as it is, and `shardprep split` splits it. What it cost is measured against
    the original and written to quantization_report.json. DESTINATION must be new or empty; nothing stands there before
    all is whole, and the same command goes on after a kill.
    """
    if no_evaluate and (evaluate is not None or max_kl is not None):
        raise click.UsageError("--no-evaluate measures nothing; leave --evaluate and --max-kl out")
    if group_size == 0:
        raise click.UsageError("--group-size 0: at least 1, or -1 for a whole row")

    from shardprep.quantize.checks import Evaluation
    from shardprep.quantize.engine import Engine
    from shardprep.quantize.recipe import Recipe
    from shardprep.quantize.run import Way, quantize

    recipe = Recipe(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        skip=skip,
        tensor_parallel_size=tensor_parallel_size,
        pad_to_tp=pad_to_tp,
        device=device,
        dtype=dtype,
        calibration=calibration,
        samples=samples,
        length=sequence_length,
        column=column,
        seed=seed,
        batch_size=batch_size,
    )
    with watched() as watch, render.conduct("quantize", None) as conduct:
        report = quantize(
            source,
            destination,
            recipe,
            Way(
                engine=Engine(engine, engine_python) if engine_python is not None else Engine(engine),
                evaluation=Evaluation(evaluate, evaluate_tokens, max_kl, no_evaluate),
                work=work,
                max_part_bytes=max_part_size,
                dry_run=dry_run,
                trial=trial,
            ),
            access=access,
            conduct=conduct,
            watch=watch,
        )
    if as_json:
        render.print_json(report)
    else:
        _print(report, dry_run=dry_run)


def _print(report: QuantizeReport, *, dry_run: bool) -> None:
    for key, (before, after) in report.padding.sizes.items():
        click.echo(f"padded: {key} {before} -> {after}, {render.size(report.padding.nbytes)} of zeros")
    about = report.calibration
    click.echo(
        f"calibration: {about['sequences']} sequences, {about['tokens']:,} tokens ({about['distinct']:,} different) "
        f"of {quote(about['source'])}"
    )
    for note in report.notes:
        click.echo(f"note: {note}")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    if dry_run:
        click.echo(f"engine {report.engine}: {versions}")
        for line in report.forecast.lines():
            click.echo(line)
        if not report.resumes:
            click.echo(
                "a run that is killed begins anew: this engine keeps no journal for this model and these options"
            )
        click.echo("dry run: nothing was written")
        return
    click.echo(f"engine {report.engine}: {versions}")
    if report.quality is not None:
        quality = report.quality
        render.table(
            [
                ("layer", "error", "drift"),
                *((str(each.layer), f"{each.error:.4f}", f"{each.drift:.4f}") for each in quality.layers),
            ],
            right=(0, 1, 2),
        )
        on = (
            "the calibration, on which it looks better than it is"
            if report.measured["calibrated_on"]
            else "held-out text"
        )
        click.echo(
            f"on {quality.tokens:,} tokens of {on}: perplexity {quality.perplexity_before:.4f} -> "
            f"{quality.perplexity:.4f}, KL {quality.kl:.6f}, the same first choice {quality.agreement:.2%}"
        )
    click.echo(
        f"{report.quantized} linears of {report.scheme.bits} bits, {render.size(report.source_bytes)} -> "
        f"{render.size(report.nbytes)}, in {len(report.files)} file(s) in {quote(report.destination)}"
    )


@contextmanager
def watched() -> Iterator[Watch]:
    """Layers as a bar with the time left on a terminal, a line each elsewhere (a log); on stderr."""
    from shardprep.quantize.run import Watch

    bar: tqdm[Any] | None = None
    doing = ""
    times: list[float] = []

    def close() -> None:
        nonlocal bar
        if bar is not None:
            bar.close()
        bar = None

    def stage(name: str) -> None:
        nonlocal doing
        close()
        doing = name
        times.clear()
        click.echo(f"{name} ...", err=True)

    def layer(done: int, of: int) -> None:
        nonlocal bar
        times.append(time.monotonic())
        if sys.stderr.isatty():
            from tqdm import tqdm

            if bar is None:
                bar = tqdm(total=of, initial=done, desc=doing, unit="layer", leave=False)
            bar.update(done - bar.n)
            return
        each = [later - earlier for earlier, later in pairwise(times)]
        left = f", about {clock(statistics.median(each) * (of - done))} left" if each and done < of else ""
        click.echo(f"{doing}: layer {done} of {of}{left}", err=True)

    try:
        yield Watch(stage, layer)
    finally:
        close()


def clock(seconds: float) -> str:
    """A time as people read it: 1:05:10."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
