"""shardprep push"""

from __future__ import annotations

from pathlib import Path

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render


@click.command("push")
@click.argument("shard_set", type=parse.PATH)
@click.argument("store", type=parse.STORE)
@parse.revision_option
@click.option("--manifest-digest", metavar="sha256:...", help="The digest that the manifest must have.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent; send nothing.")
@parse.access_options
@parse.connections_option
@parse.json_option
def command(
    shard_set: Path,
    store: Path | str,
    revision: str,
    manifest_digest: str | None,
    dry_run: bool,
    access: Access,
    max_workers: int | None,
    as_json: bool,
) -> None:
    """Put SHARD_SET, a folder that split wrote, into STORE (s3://bucket/prefix, or a folder).

    Only blobs that the store lacks are sent, and every byte is compared with its digest on the way. The revision
    changes at the very end; the same command resumes after a kill.
    """
    from shardprep.publish.push import push

    with render.conduct("push", max_workers) as conduct:
        report = push(
            shard_set,
            store,
            revision=revision,
            access=access,
            manifest_digest=manifest_digest,
            dry_run=dry_run,
            conduct=conduct,
        )
    if as_json:
        render.print_json(report)
        return
    rate = "" if dry_run or not report.bytes_sent else f" in {report.seconds:.1f} s"
    click.echo(
        f"{report.blobs_sent} of {report.blobs} blobs, {render.size(report.bytes_sent)}, "
        f"{'would be sent' if dry_run else 'sent'}{rate}; {render.size(report.bytes_present)} were there"
    )
    if dry_run:
        click.echo("dry run: nothing was sent")
        return
    if report.replaced:
        click.echo(f"replaced {report.replaced}")
    click.echo(f"manifest {report.manifest_digest} is revision {report.revision} in {quote(report.uri)}")
