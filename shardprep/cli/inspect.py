"""shardprep inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render
from .split import span

if TYPE_CHECKING:
    from shardprep.layout import Scheme


@click.command("inspect")
@click.argument("path", type=parse.SOURCE)
@parse.access_options
@parse.json_option
def command(path: Path | str, access: Access, as_json: bool) -> None:
    """Show what PATH (a checkpoint, one weight file or a shard set) holds, without tensor data and without running pickles.

    PATH may also be a URI, s3://bucket/prefix (also gs://, az://) or hf://org/name@revision. No weights are fetched.
    """
    from shardprep.inspect import inspect

    report = inspect(path, access=access)
    if as_json:
        render.print_json({**render.plain(report), "tied": report.tied})
        return
    render.table(
        [
            ("tensor", "dtype", "shape", "bytes", "file"),
            *(
                (
                    quote(tensor.name),
                    tensor.dtype,
                    "x".join(map(str, tensor.shape)) or "scalar",
                    f"{tensor.nbytes:,}",
                    quote(tensor.extents[0].file)
                    + (f" +{len(tensor.extents) - 1}" if len(tensor.extents) > 1 else ""),
                )
                for tensor in report.tensors
            ),
        ],
        right=(3,),
    )
    click.echo()
    render.table(
        [
            ("layer", "tensors", "bytes"),
            *(
                (quote(layer), str(count), f"{nbytes:,}")
                for layer, (count, nbytes) in report.by_layer.items()
            ),
        ],
        right=(1, 2),
    )
    click.echo()
    render.table(
        [
            ("dtype", "tensors", "bytes"),
            *((dtype, str(count), f"{nbytes:,}") for dtype, (count, nbytes) in report.by_dtype.items()),
        ],
        right=(1, 2),
    )
    click.echo()
    if report.parts:
        render.table(
            [
                ("part", "ranks", "layers", "bytes"),
                *((quote(p.path), span(p.ranks), span(p.layers) or "-", f"{p.size:,}") for p in report.parts),
            ],
            right=(3,),
        )
        dealt = f", {report.experts} experts" if report.experts else ""
        probed = "; with a probe of each layer" if report.probe else ""
        click.echo(f"grain {report.grain}{dealt}; views for {', '.join(map(quote, report.engines))}{probed}")
    click.echo(
        f"{report.kind}, {quote(report.model_type or 'no model_type')}: {len(report.tensors)} tensors, "
        f"{report.parameters:,} parameters, {render.size(report.nbytes)} in {len(report.files)} file(s)"
    )
    if report.quantization is not None:
        click.echo(_quantization(report.quantization))
    if report.unknown_quantization is not None:
        click.echo(f"quantized in a way that is not known: {report.unknown_quantization}")
    render.notes(report.aliases, report.left_out)


def _quantization(scheme: Scheme) -> str:
    groups = "a scale for each row" if scheme.group is None else f"groups of {scheme.group}"
    zeros = "symmetric" if scheme.symmetric else "with zero points"
    order = "act-order" if scheme.act_order else "no act-order"
    return (
        f"quantized: {scheme.method}, {scheme.bits} bits, {groups}, {zeros}, {order} "
        f"(packed as {quote(scheme.format)})"
    )
