"""shardprep convert"""

from __future__ import annotations

from pathlib import Path

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render


@click.command("convert")
@click.argument("source", type=parse.SOURCE)
@click.argument("destination", type=parse.PATH)
@click.option("--max-part-size", type=parse.Size(), default="5GB", show_default=True, help="Bytes of a file.")
@click.option(
    "--dtype",
    type=click.Choice(list(parse.DTYPES)),
    default="keep",
    show_default=True,
    help="Cast floating-point tensors (64, 32 and 16 bits) to this.",
)
@click.option("--include-code", is_flag=True, help="Copy *.py files too; they are code that others may run.")
@parse.access_options
@parse.workers_option
@parse.json_option
def command(
    source: Path | str,
    destination: Path,
    max_part_size: int,
    dtype: str,
    include_code: bool,
    access: Access,
    max_workers: int | None,
    as_json: bool,
) -> None:
    """Turn the checkpoint SOURCE (a folder or a file, pickle or safetensors) into safetensors in DESTINATION.

    SOURCE is a path, s3://bucket/prefix (also gs://, az://) or hf://org/name@revision. From a store only the tensors
    are fetched, straight into DESTINATION.

    No pickle is run. DESTINATION must be new or empty. No file there has its final name before all are whole, and the
    same command resumes after a kill.
    """
    from shardprep.convert import convert

    with render.conduct("convert", max_workers) as conduct:
        report = convert(
            source,
            destination,
            max_part_bytes=max_part_size,
            dtype=parse.DTYPES[dtype],
            include_code=include_code,
            access=access,
            conduct=conduct,
        )
    if as_json:
        render.print_json(report)
        return
    click.echo(
        f"{report.tensors} tensors, {render.size(report.nbytes)}, in {len(report.files)} file(s) in {quote(destination)}"
    )
    render.notes(report.aliases, report.left_out)
