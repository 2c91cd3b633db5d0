"""shardprep prune"""

from __future__ import annotations

from pathlib import Path

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render


@click.command("prune")
@click.argument("store", type=parse.STORE)
@click.option(
    "--grace",
    type=parse.Duration(),
    default="7d",
    show_default=True,
    help="Keep blobs that are younger: they may belong to a push that is not done.",
)
@click.option(
    "--delete-revision",
    "delete_revisions",
    metavar="NAME",
    multiple=True,
    help="Remove this revision first. May be repeated; one revision must stay.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@parse.access_options
@parse.json_option
def command(
    store: Path | str,
    grace: float,
    delete_revisions: tuple[str, ...],
    dry_run: bool,
    access: Access,
    as_json: bool,
) -> None:
    """Remove from STORE (s3://bucket/prefix, or a folder) the blobs that no revision names.

    It refuses, and removes nothing, where it finds no revision, or one that it cannot read. Pushing meanwhile is safe.
    """
    from shardprep.publish.prune import prune

    with render.conduct("prune", None) as conduct:
        report = prune(
            store,
            grace=grace,
            delete_revisions=delete_revisions,
            dry_run=dry_run,
            access=access,
            conduct=conduct,
        )
    if as_json:
        render.print_json(report)
        return
    for revision in report.deleted_revisions:
        click.echo(f"revision {revision} {'would be' if dry_run else 'is'} given up")
    click.echo(
        f"{report.blobs_removed} blobs, {render.size(report.bytes_removed)}, "
        f"{'would be removed' if dry_run else 'removed'} from {quote(report.uri)}"
    )
    click.echo(
        f"{report.blobs_kept} blobs of {len(report.revisions)} revision(s) stay, and {report.blobs_spared} that none "
        "names but are younger than the grace"
    )
    if report.foreign:
        click.echo(f"{report.foreign} objects among the blobs are not shardprep's; they were not touched")
    click.echo(
        "dry run: nothing was removed" if dry_run else f"{report.uploads_aborted} unfinished uploads dropped"
    )
