"""shardprep vllm"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.shard.shard_set import ShardSet

from . import parse, render


@click.command("vllm")
@click.argument("source", type=parse.STORE)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS OF VLLM SERVE]")
@parse.revision_option
@click.option("--manifest-digest", metavar="sha256:...", help="The digest that the manifest must have.")
@click.option(
    "--verify",
    type=click.Choice(["blocks", "headers", "off"]),
    default="blocks",
    show_default=True,
    help="What each rank checks of its own weights.",
)
@click.option(
    "--folder",
    type=parse.PATH,
    help="Folder for config, tokenizer and manifest of a store's shard set.  [default: in the cache]",
)
@click.option(
    "--no-prefetch", is_flag=True, help="Do not fetch this host's shards while vLLM starts; its ranks will."
)
@parse.set_options
@click.option("--dry-run", is_flag=True, help="Print the command of vLLM instead of running it.")
@parse.json_option
def command(
    shard_set: ShardSet,
    arguments: tuple[str, ...],
    folder: Path | None,
    no_prefetch: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Serve the shard set at SOURCE (s3://bucket/prefix, or a folder) with vLLM: each rank loads its own share alone.

    It fetches the config, the tokenizer and the manifest, begins to fetch the shards of this host's ranks, and becomes
    `vllm serve` with the options that follow --:

        shardprep vllm s3://bucket/llama-70b -- --tensor-parallel-size 4 --port 8000

    Sizes that the shard set does not serve are refused before vLLM is started. SOURCE may also be a folder that `shardprep
    export --format vllm-sharded-state` wrote: it is refused unless it was made for this vLLM and these sizes, which vLLM
    itself does not check.
    """
    from shardprep.vllm.serve import become_vllm, prepare_vllm

    launch = prepare_vllm(shard_set, arguments, folder=folder, prefetch=not no_prefetch)
    if dry_run or as_json:
        if as_json:
            render.print_json(
                {
                    "command": launch.command,
                    "folder": launch.folder,
                    "manifest_digest": launch.shard_set.digest,
                    "ranks": [place.rank for place in launch.places],
                }
            )
        else:
            click.echo(shlex.join(launch.command))
        return
    ranks = ", ".join(str(place.rank) for place in launch.places)
    click.echo(
        f"manifest {launch.shard_set.digest} in {quote(launch.folder or shard_set.source)}"
        + (f"; fetching ranks {ranks}" if ranks else ""),
        err=True,
    )
    become_vllm(launch)
