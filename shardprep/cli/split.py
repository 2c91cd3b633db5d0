"""shardprep split"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.stores.store import Access

from . import parse, render
from .plan import KV_DTYPES, DeviceMemory, recommended, written

WORTH_A_WORD: Final = 0.01
"""Share of the model that must stay whole for split to say a word about it."""


@click.command("split")
@click.argument("source", type=parse.SOURCE)
@click.argument("destination", type=parse.STORE)
@click.option(
    "-tp",
    "--tensor-parallel-size",
    type=click.IntRange(1, 4096),
    help="The largest size that will be wanted; every size that divides it can be loaded from the same copy. "
    "Needed unless --device-memory is given.",
)
@click.option(
    "-pp",
    "--pipeline-parallel-size",
    type=click.IntRange(1, 4096),
    help="Number of even stages, at which parts end. Any other stages can be loaded as well.",
)
@click.option(
    "--stages", type=parse.StageList(), help="Stages of any size, by first and last layer: 0-15,16-31."
)
@click.option(
    "--device-memory",
    type=DeviceMemory(),
    help="Divide the model as `shardprep plan` recommends for such devices: 24GiB, or of each: 24GiB,12GiB.",
)
@click.option(
    "--context",
    type=click.IntRange(1, 2**40),
    help="With --device-memory: tokens of a sequence, as plan takes it.",
)
@click.option(
    "--batch", type=click.IntRange(1, 2**20), help="With --device-memory: sequences at a time.  [default: 1]"
)
@click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    help="With --device-memory: dtype of the KV cache.  [default: auto]",
)
@click.option(
    "--reserve", type=parse.Size(), help="With --device-memory: memory of each device, as plan takes it."
)
@click.option(
    "--max-part-size", type=parse.Size(), default="1GiB", show_default=True, help="Bytes of a file."
)
@click.option("--include-code", is_flag=True, help="Copy *.py files too; they are code that others may run.")
@click.option(
    "--allow-generic", is_flag=True, help="Split a model type without rules: cut the rows of its linears."
)
@click.option(
    "--probe",
    is_flag=True,
    help="Record what each layer gives for fixed inputs, so that workers can prove what they serve; needs transformers.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be written; write nothing.")
@click.option("--revision", help="The name under which a store publishes the set.  [default: main]")
@click.option(
    "--scratch",
    type=parse.PATH,
    help="Folder for parts on their way to a store.  [default: that for temporary files]",
)
@parse.access_options
@parse.workers_option
@parse.json_option
def command(
    source: Path | str,
    destination: Path | str,
    tensor_parallel_size: int | None,
    pipeline_parallel_size: int | None,
    stages: list[tuple[int, int]] | None,
    device_memory: tuple[int, ...] | None,
    context: int | None,
    batch: int | None,
    kv_dtype: str | None,
    reserve: int | None,
    max_part_size: int,
    include_code: bool,
    allow_generic: bool,
    probe: bool,
    dry_run: bool,
    revision: str | None,
    scratch: Path | None,
    access: Access,
    max_workers: int | None,
    as_json: bool,
) -> None:
    """Cut the checkpoint SOURCE (a folder, pickle or safetensors) into a shard set in DESTINATION.

    SOURCE is a path, s3://bucket/prefix (also gs://, az://) or hf://org/name@revision.

    One copy serves every tensor parallel size that divides -tp, and any pipeline stages. DESTINATION must be new
    or empty. The manifest is written last, and the same command resumes after a kill.

    Where DESTINATION is a URI (s3://bucket/prefix), each part is sent to that store as soon as it is whole, as
    `shardprep push` sends it. About 2 GiB for each rank of -tp, at the default size of parts, lie on this machine
    meanwhile.
    """
    from shardprep.split import SplitOptions, split

    planned = None
    if device_memory is None:
        lone = {"--context": context, "--batch": batch, "--kv-dtype": kv_dtype, "--reserve": reserve}
        for name, value in lone.items():
            if value is not None:
                raise click.UsageError(f"{name} says for what devices are planned; give --device-memory too")
        if tensor_parallel_size is None:
            raise click.UsageError("Missing option '-tp' / '--tensor-parallel-size'.")
    else:
        if pipeline_parallel_size is not None or stages is not None:
            raise click.UsageError("--device-memory decides the stages; leave -pp and --stages out")
        from shardprep.fit.report import FitOptions

        planned = recommended(
            source,
            device_memory,
            FitOptions(
                context=context,
                batch=batch or 1,
                kv_dtype=kv_dtype or "auto",
                reserve=reserve,
                allow_generic=allow_generic,
                tensor_parallel_size=tensor_parallel_size,
            ),
            access,
        )
        tensor_parallel_size = tensor_parallel_size or planned.tensor_parallel_size
        stages = list(planned.bounds) if planned.pipeline_parallel_size > 1 else None
    with render.conduct("split", max_workers) as conduct:
        report = split(
            source,
            destination,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            stages=stages,
            options=SplitOptions(
                max_part_bytes=max_part_size,
                include_code=include_code,
                allow_generic=allow_generic,
                probe=probe,
                dry_run=dry_run,
                revision=revision,
                scratch=scratch,
            ),
            access=access,
            conduct=conduct,
        )
    if as_json:
        render.print_json(report)
        return
    render.table(
        [
            ("part", "ranks", "layers", "bytes"),
            *(
                (path, span(ranks), span(layers) or "-", f"{nbytes:,}")
                for path, nbytes, ranks, layers in report.parts
            ),
        ],
        right=(3,),
    )
    click.echo(
        f"{report.model_type}: {report.tensors} tensors, {render.size(report.source_bytes)}, "
        f"{report.layers} layers, grain {report.grain}"
    )
    click.echo(
        f"each rank keeps {render.size(min(report.rank_bytes))} to {render.size(max(report.rank_bytes))}, "
        f"of it {render.size(report.shared_bytes)} whole; stored {report.stored_bytes / max(report.source_bytes, 1):.4f} x the model"
    )
    whole = sum(nbytes for _, nbytes in report.whole)
    if whole > WORTH_A_WORD * report.source_bytes:
        most = ", ".join(f"{quote(names)} {render.size(nbytes)}" for names, nbytes in report.whole[:3])
        click.echo(
            f"not cut: {render.size(whole)}, {whole / report.source_bytes:.1%} of the model, which each of the "
            f"{report.grain} ranks holds: {render.size((report.grain - 1) * whole)} more in all than if it could be "
            f"cut; most of it: {most}"
        )
    if planned is not None:
        click.echo(
            f"for these devices: -tp {planned.tensor_parallel_size} --stages {written(planned)}, "
            f"room for {'any number of' if planned.tokens is None else format(planned.tokens, ',')} tokens"
        )
    if report.probe:
        click.echo(
            f"probe: what the embedding, each of the {report.layers} layers and the head give for fixed inputs"
        )
    render.notes(report.aliases, report.left_out)
    if report.manifest_digest:
        click.echo(f"manifest {report.manifest_digest} in {quote(destination)}")
    else:
        click.echo("dry run: nothing was written")


def span(bounds: tuple[int, int]) -> str:
    """Write [start, stop) for people: 0-3."""
    start, stop = bounds
    return "" if start == stop else str(start) if stop - start == 1 else f"{start}-{stop - 1}"
