"""shardprep pull"""

from __future__ import annotations

from pathlib import Path

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.format.manifest import TORCH
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import ShardSet

from . import parse, render


@click.command("pull")
@click.argument("source", type=parse.STORE)
@click.argument("destination", type=parse.PATH, required=False)
@parse.revision_option
@click.option(
    "-tp", "--tensor-parallel-size", type=click.IntRange(1, 4096), help="Tensor ranks of each stage."
)
@click.option("-pp", "--pipeline-parallel-size", type=click.IntRange(1, 4096), help="Number of even stages.")
@click.option(
    "-ep",
    "--expert-parallel-size",
    type=click.IntRange(1, 4096),
    help="Groups of a stage's tensor ranks that share its experts.  [default: 1]",
)
@click.option(
    "--stages", type=parse.StageList(), help="Stages of any size, by first and last layer: 0-15,16-31."
)
@parse.engine_option
@click.option(
    "--rank",
    type=click.IntRange(0),
    help="Pull this rank's share alone.  [default: RANK, as torchrun sets it, where -tp, -pp or --stages is given]",
)
@click.option("--all", "everything", is_flag=True, help="Pull the whole shard set.")
@click.option("--no-weights", is_flag=True, help="Pull the side files and the manifest alone.")
@click.option("--manifest-digest", metavar="sha256:...", help="The digest that the manifest must have.")
@parse.connections_option
@parse.set_options
@parse.json_option
def command(
    shard_set: ShardSet,
    destination: Path | None,
    tensor_parallel_size: int | None,
    pipeline_parallel_size: int | None,
    expert_parallel_size: int | None,
    stages: list[tuple[int, int]] | None,
    engine: str | None,
    rank: int | None,
    everything: bool,
    no_weights: bool,
    as_json: bool,
) -> None:
    """Bring the shard set at SOURCE (s3://bucket/prefix), or one rank's share of it, into the folder DESTINATION.

    Without DESTINATION the folder is a new one here, named by the last word of SOURCE.
    Only the ranges that the rank needs are fetched. Every block is checked as it lands. The same command goes on after
    a kill. Several ranks may be pulled into one folder, also at the same time.
    """
    from shardprep.publish.pull import choose_rank, pull

    rank = choose_rank(
        rank,
        everything=everything or no_weights,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=len(stages) if stages else pipeline_parallel_size,
        expert_parallel_size=expert_parallel_size,
        engine=engine,
    )
    place = None
    if rank is not None:
        place = Place(
            rank,
            tensor_parallel_size or 1,
            pipeline_parallel_size,
            expert_parallel_size or 1,
            stages,
            engine or TORCH,
        )
    destination = destination or Path(Path(shard_set.source.rstrip("/")).name)
    with render.conduct("pull", shard_set.connections) as conduct:
        report = pull(shard_set, destination, place=place, weights=not no_weights, conduct=conduct)
    if as_json:
        render.print_json(report)
        return
    if no_weights:
        click.echo(f"side files alone, manifest {report.manifest_digest} in {quote(report.destination)}")
        return
    what = "all of it" if report.rank is None else f"rank {report.rank}"
    whole = sum(whole for _, whole in report.parts)
    click.echo(
        f"{what}: {render.size(report.nbytes)} in {len(report.parts)} parts ({whole} of them whole), "
        f"{render.size(report.bytes_fetched)} fetched in {report.seconds:.1f} s"
    )
    click.echo(f"manifest {report.manifest_digest} in {quote(report.destination)}")
