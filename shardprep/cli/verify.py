"""shardprep verify"""

from __future__ import annotations

from pathlib import Path

import click

from shardprep_runtime.errors import quote

from . import parse, render


@click.command("verify")
@click.argument("shard_set", type=parse.PATH)
@click.option("--fast", is_flag=True, help="Structure, sizes and headers only; reads no tensor data.")
@click.option("--manifest-digest", metavar="sha256:...", help="The digest that the manifest must have.")
@parse.workers_option
@parse.json_option
def command(
    shard_set: Path, fast: bool, manifest_digest: str | None, max_workers: int | None, as_json: bool
) -> None:
    """Check that SHARD_SET is complete and consistent, and that every byte is the one that was split.

    A folder that `export --format vllm-sharded-state` wrote is checked against its record. --manifest-digest is then
    the digest of the record.
    """
    from shardprep.verify import verify
    from shardprep.vllm.record import is_sharded_state, verify_record

    if is_sharded_state(shard_set):
        found = verify_record(shard_set, fast=fast, record_digest=manifest_digest)
        if as_json:
            render.print_json(found)
            return
        what = "sizes and headers" if fast else render.size(found.nbytes)
        grid = f"-tp {found.tensor_parallel_size} -pp {found.pipeline_parallel_size}"
        click.echo(
            f"{quote(shard_set)}: sound: {found.files} sharded_state files of vLLM {quote(found.vllm)}, {grid}, {what}"
        )
        click.echo(f"record {found.record_digest}")
        return
    report = verify(shard_set, fast=fast, manifest_digest=manifest_digest, workers=max_workers)
    if as_json:
        render.print_json(report)
        return
    what = "structure and headers" if fast else f"{report.blocks} blocks, {render.size(report.nbytes)}"
    click.echo(f"{quote(shard_set)}: sound: {report.parts} parts, {report.pieces} pieces, {what}")
    click.echo(f"manifest {report.manifest_digest}")
