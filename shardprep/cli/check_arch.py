"""shardprep check-arch"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardprep_runtime.errors import ProblemError
from shardprep_runtime.format.manifest import ENGINES
from shardprep_runtime.stores.store import Access

from . import parse, render

if TYPE_CHECKING:
    from shardprep.check import Proof


def _size_option(short: str, name: str, default: int, text: str) -> Callable[..., Any]:
    """Make the option for a size up to which something is checked."""
    return click.option(
        short, name, type=click.IntRange(1, 64), default=default, show_default=True, help=text
    )


@click.command("check-arch")
@click.argument("model", type=parse.SOURCE)
@_size_option("-tp", "--tensor-parallel-size", 4, "The grain; every size that divides it is checked.")
@_size_option("-pp", "--pipeline-parallel-size", 2, "Stages; every number up to it is checked.")
@_size_option(
    "-ep",
    "--expert-parallel-size",
    2,
    "Groups that share the experts of a model that has some; every size up to it is checked.",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(ENGINES),
    multiple=True,
    help="Engine whose views are checked; may be given several times.  [default: all]",
)
@parse.access_options
@parse.json_option
def command(
    model: Path | str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    expert_parallel_size: int,
    engines: tuple[str, ...],
    access: Access,
    as_json: bool,
) -> None:
    """Prove that the layout rules of MODEL's architecture are right, by running a small model of it.

    MODEL is a checkpoint (a path, s3://bucket/prefix, hf://org/name@revision), a config.json, or the name of a model
    type, such as llama. Only the config is read. The proof is made on a small random model of that architecture, with
    torch and transformers (pip install 'shardprep[transformers]').
    """
    from shardprep.check import check_arch

    def tell(proof: Proof) -> None:
        if not as_json:
            click.echo(f"ok   {proof.name:<8} {proof.text}")

    report = check_arch(
        model,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        expert_parallel_size=expert_parallel_size,
        engines=engines or ENGINES,
        access=access,
        tell=tell,
    )
    if as_json:
        render.print_json({**render.plain(report), "ok": report.ok})
    elif report.ok:
        assembled = sum(proof.assembled for proof in report.proofs)
        click.echo(
            f"{report.model_type}: {len(report.proofs)} proofs hold on a model of {report.tensors} tensors, "
            f"{render.size(report.nbytes)}" + (f"; {assembled} of them assembled" if assembled else "")
        )
    if report.difference is not None:
        raise ProblemError(f"{report.model_type}: {report.difference}")
