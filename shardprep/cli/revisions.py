"""shardprep revisions"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render


@click.command("revisions")
@click.argument("store", type=parse.STORE)
@parse.access_options
@parse.json_option
def command(store: Path | str, access: Access, as_json: bool) -> None:
    """List the revisions in STORE (s3://bucket/prefix, or a folder) and the digests of their manifests."""
    from shardprep.publish.prune import revisions

    found = revisions(store, access=access)
    if as_json:
        render.print_json(found)
        return
    if not found:
        click.echo(f"no revisions in {quote(store)}")
        return
    render.table(
        [
            ("revision", "pushed", "grain", "tensors", "stored", "manifest"),
            *(
                (
                    each.revision,
                    datetime.fromtimestamp(each.modified, UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
                    str(each.grain or "-"),
                    render.size(each.nbytes) if not each.problem else "-",
                    render.size(each.size) if not each.problem else "-",
                    each.manifest_digest or "-",
                )
                for each in found
            ),
        ],
        right=(2, 3, 4),
    )
    for each in found:
        if each.problem:
            click.echo(f"{each.revision} cannot be loaded: {each.problem}")
