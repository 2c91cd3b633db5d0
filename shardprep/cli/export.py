"""shardprep export"""

from __future__ import annotations

from pathlib import Path

import click

from shardprep_runtime.errors import quote

from . import parse, render


@click.command("export")
@click.argument("shard_set", type=parse.PATH)
@click.argument("destination", type=parse.PATH)
@click.option("--max-part-size", type=parse.Size(), default="5GB", show_default=True, help="Of one file.")
@parse.workers_option
@parse.json_option
def command(
    shard_set: Path, destination: Path, max_part_size: int, max_workers: int | None, as_json: bool
) -> None:
    """Restore the checkpoint of SHARD_SET in DESTINATION: the very files that convert writes.

    Every block of what was written is read again and compared with its digest before a file gets its name.
    """
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
