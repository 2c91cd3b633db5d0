"""shardprep plan"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.format.manifest import ENGINES, TORCH
from shardprep_runtime.stores.store import Access

from . import parse, render

if TYPE_CHECKING:
    from shardprep.fit.budget import GridFit
    from shardprep.fit.report import FitOptions, FitReport
    from shardprep.fit.search import Refused

    _MemoryType = click.ParamType[tuple[int, ...]]
    _RateType = click.ParamType[int]
else:  # only the newest clicks let the class be subscripted when it runs
    _MemoryType = _RateType = click.ParamType

ROWS = 20
"""Grids that are shown to people; --json has all."""


KV_DTYPES = ("auto", "fp8", "bf16", "fp16", "fp32")
POWERS = tuple(2**i for i in range(7))


class DeviceMemory(_MemoryType):
    """The memory of one device (24GiB), or of each of several devices (24GiB,16GiB or 8x80GiB)."""

    name = "memory"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for word in value.split(","):
            times, _, size = word.strip().rpartition("x")
            if times and not re.fullmatch(r"[1-9]\d{0,3}", times.strip()):
                self.fail(f"{word.strip()!r}: write 24GiB, or 8x24GiB for eight of them", param, ctx)
            found += [parse.Size().convert(size, param, ctx)] * int(times or 1)
        if len(found) > 4096:
            self.fail(f"{len(found)} devices are more than 4096", param, ctx)
        return tuple(found)


class Rate(_RateType):
    """Bytes a second, given as bits (1Gbps, 100Mbit/s) or bytes (500MB/s, 1GiB/s)."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)(bps|bit/s|b/s|B/s|Bps)", value.strip())
        if not found:
            self.fail(f"{value!r} is not a rate; write 1Gbps, 100Mbit/s or 500MB/s", param, ctx)
        number, prefix, binary, unit = found.groups()
        scale = (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1 if prefix else 0)
        rate = int(float(number) * scale / (1 if unit.startswith("B") else 8))
        if rate < 1:
            self.fail("must be at least one byte a second", param, ctx)
        return rate


@click.command("plan")
@click.argument("source", type=parse.SOURCE)
@click.option(
    "--device-memory",
    type=DeviceMemory(),
    required=True,
    help="Memory of a device, for any number of devices: 24GiB. Or of each device, in the order of ranks, if all are "
    "to be used: 24GiB,16GiB or 8x80GiB.",
)
@click.option(
    "--devices-per-host",
    type=click.IntRange(1, 4096),
    default=8,
    show_default=True,
    help="Devices that reach each other without the network.",
)
@click.option(
    "--context",
    type=click.IntRange(1, 2**40),
    help="Tokens of a sequence, prompt and answer.  [default: the model's, at most 8192]",
)
@click.option(
    "--batch", type=click.IntRange(1, 2**20), default=1, show_default=True, help="Sequences at the same time."
)
@click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    default="auto",
    show_default=True,
    help="dtype of the KV cache; auto: that of the model.",
)
@click.option(
    "--reserve",
    type=parse.Size(),
    help="Memory of each device that neither weights nor KV cache may use.  [default: 1 GiB and activations]",
)
@click.option(
    "--quantize",
    type=click.Choice(["awq", "gptq"]),
    help="Plan for 4-bit weights of a model that has others.",
)
@click.option(
    "--group-size",
    type=click.IntRange(-1, 2**20),
    default=128,
    show_default=True,
    help="Numbers that share a scale, with --quantize; -1: a whole row.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=TORCH,
    show_default=True,
    help="Engine whose cuts are planned, where engines differ.",
)
@click.option(
    "--allow-generic", is_flag=True, help="Plan for a model type without rules: cut the rows of its linears."
)
@click.option("--network", type=Rate(), help="Rate between hosts: 1Gbps, 500MB/s.")
@click.option("--bandwidth", type=Rate(), help="Rate from the weights to each worker.  [default: --network]")
@parse.access_options
@parse.json_option
@click.pass_context
def command(
    ctx: click.Context,
    source: Path | str,
    device_memory: tuple[int, ...],
    devices_per_host: int,
    context: int | None,
    batch: int,
    kv_dtype: str,
    reserve: int | None,
    quantize: str | None,
    group_size: int,
    engine: str,
    allow_generic: bool,
    network: int | None,
    bandwidth: int | None,
    access: Access,
    as_json: bool,
) -> None:
    """Say whether the model at SOURCE fits given devices, and how it is best divided among them.

    SOURCE is a checkpoint or a shard set (a path, s3://bucket/prefix, hf://org/name@revision); only its headers are
    read. Or it is a config.json, which needs transformers.

    The exit status is 1 where nothing fits; the command then says what would make the model fit.
    """
    from shardprep.fit.report import FitOptions, plan_fit
    from shardprep.fit.search import Devices

    report = plan_fit(
        source,
        Devices(device_memory, devices_per_host),
        FitOptions(
            context=context,
            batch=batch,
            kv_dtype=kv_dtype,
            reserve=reserve,
            quantize=quantize,
            group_size=group_size,
            engine=engine,
            allow_generic=allow_generic,
        ),
        network=network,
        bandwidth=bandwidth,
        access=access,
    )
    if as_json:
        render.print_json(as_object(report))
    else:
        _show(report)
    ctx.exit(0 if report.recommended else 1)


def as_object(report: FitReport) -> dict[str, Any]:
    """Turn the report into an object for JSON, together with the values that its properties compute."""

    def of_grid(grid: GridFit) -> dict[str, Any]:
        times = report.times(grid)
        return {
            **render.plain(grid),
            "stages": [{**render.plain(stage), "spare": stage.spare} for stage in grid.stages],
            "devices": grid.devices,
            "fits": grid.fits,
            "spare": grid.spare,
            "tokens": grid.tokens,
            "stage_list": written(grid),
            "seconds": dataclasses.asdict(times) if times else None,
        }

    return {
        **render.plain(dataclasses.replace(report, grids=(), recommended=None)),
        "grids": [of_grid(grid) for grid in report.grids],
        "recommended": of_grid(report.recommended) if report.recommended else None,
    }


def recommended(source: Path | str, memory: tuple[int, ...], options: FitOptions, access: Access) -> GridFit:
    """Give the grid that `plan` recommends.

    Args:
        source: As `plan_fit` takes it.
        memory: Bytes of each device.
        options: What is asked for.
        access: Endpoint, profile and the like of a store.

    Raises:
        LayoutError: Where nothing fits; it says what would.
    """
    from shardprep.fit.report import plan_fit
    from shardprep.fit.search import Devices
    from shardprep_runtime.errors import LayoutError

    report = plan_fit(source, Devices(memory), options, access=access)
    if report.recommended is None:
        advice = "".join(f"\n  {each}" for each in report.advice)
        raise LayoutError(
            f"{quote(source)}: does not fit these devices: {'; '.join(report.reasons)}"
            + (f"; any of these would make it fit:{advice}" if advice else "")
        )
    return report.recommended


def written(grid: GridFit) -> str:
    """Write the stages as --stages takes them: by first and last layer."""
    return ",".join(f"{start}-{stop - 1}" for start, stop in grid.bounds)


# ------------------------------------------------------------------------------------------------------ for people


def _as_on_disk(nbytes: int) -> str:
    """Write a number of bytes as people say the size of a model: in powers of ten."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _show(report: FitReport) -> None:
    work = report.workload
    kinds = ", ".join(f"{n} {quote(kind)}" for kind, n in report.attention.items())
    held = ", ".join(f"{dtype} {_as_on_disk(nbytes)}" for dtype, nbytes in report.dtypes.items())
    count = report.parameters
    parameters = f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count:,}"
    click.echo(
        f"{quote(report.model_type)}: {parameters} parameters, {_as_on_disk(report.nbytes)} "
        f"({render.size(report.nbytes)}): {held}"
    )
    click.echo(f"{report.layers} layers: {kinds}" + (f"; {report.experts} experts" if report.experts else ""))
    state = f", {render.size(report.state)} a sequence besides" if report.state else ""
    click.echo(f"KV cache in {report.kv_dtype}: {render.size(report.kv_token)} a token{state}")
    several = f"{work.batch} sequences of {work.context:,} tokens"
    if work.batch == 1:
        several = f"a sequence of {work.context:,} tokens"
    click.echo(f"{several}: {render.size(work.batch * report.kv_sequence)}")
    click.echo()
    rows = _rows(report)
    if rows:
        _table(report, rows)
        hidden = len(report.grids) - sum(map(len, rows))
        if hidden:
            click.echo(f"{hidden} more grids: --json")
    for refused in _worth_a_word(report):
        click.echo(f"TP {refused.tensor_parallel_size} is not possible: {refused.why}")
    click.echo()
    if report.recommended:
        _recommend(report, report.recommended)
    else:
        click.echo("nothing fits")
        for reason in report.reasons:
            click.echo(f"  {reason}")
        if report.advice:
            click.echo("any of these would make it fit:")
        for advice in report.advice:
            click.echo(f"  {advice}")
    for note in report.notes:
        click.echo(f"note: {note}")


def _rows(report: FitReport) -> list[list[GridFit]]:
    """Choose the grids that get a line. Grids that differ only in groups of experts, and hold the same, share one."""
    best = report.recommended
    lines: dict[tuple[int, int, int, int], list[GridFit]] = {}
    for grid in report.grids:
        key = grid.tensor_parallel_size, grid.pipeline_parallel_size, grid.shard_bytes, grid.spare
        lines.setdefault(key, []).append(grid)
    found = list(lines.values())
    if best is not None and len(report.devices.memory) == 1:
        most = max(2 * best.devices, report.devices.per_host)
        found = [line for line in found if line[0].devices <= most]
    if len(found) > ROWS:
        low = (best or found[0][0]).devices
        near = sorted(found, key=lambda line: (best not in line, abs(line[0].devices - low)))[:ROWS]
        found = [line for line in found if line in near]
    return found


def _worth_a_word(report: FitReport) -> list[Refused]:
    """Choose the refused sizes that people would ask for: powers of two, or all that the given devices allow."""
    sizes = [
        each
        for each in report.refused
        if len(report.devices.memory) > 1 or each.tensor_parallel_size in POWERS
    ]
    return sizes[:4]


def _table(report: FitReport, rows: list[list[GridFit]]) -> None:
    head = ("", "TP", "PP", "EP", "devices", "weights", "KV a token", "KV needed", "allowance", "tokens", "")
    lines = [head]
    for line in rows:
        grid = line[0]
        fullest = min(grid.stages, key=lambda stage: stage.spare)
        lines.append(
            (
                "*" if report.recommended in line else "",
                str(grid.tensor_parallel_size),
                str(grid.pipeline_parallel_size),
                ",".join(str(each.expert_parallel_size) for each in line),
                str(grid.devices),
                render.size(fullest.weights),
                render.size(fullest.kv_token),
                render.size(fullest.kv_needed),
                render.size(fullest.allowance),
                "any" if grid.tokens is None else f"{grid.tokens:,}",
                f"{render.size(grid.spare)} to spare" if grid.fits else f"{render.size(-grid.spare)} short",
            )
        )
    click.echo("of the fullest device:")
    render.table(lines, right=(1, 2, 4, 5, 6, 7, 8, 9, 10))


def _recommend(report: FitReport, best: GridFit) -> None:
    sizes = [f"-tp {best.tensor_parallel_size}"]
    if best.pipeline_parallel_size > 1:
        sizes.append(f"--stages {written(best)}")
    many = "device" if best.devices == 1 else "devices"
    expert = f" x EP {best.expert_parallel_size}" if best.expert_parallel_size > 1 else ""
    click.echo(
        f"recommended: TP {best.tensor_parallel_size} x PP {best.pipeline_parallel_size}{expert} on {best.devices} {many}"
    )
    source = "CHECKPOINT" if report.quantize or str(report.source).endswith(".json") else quote(report.source)
    click.echo(f"  shardprep split {source} DESTINATION {' '.join(sizes)}")
    for reason in report.reasons:
        click.echo(f"  {reason}")
    click.echo()
    render.table(
        [
            ("stage", "layers", "device", "weights", "KV a token", "KV needed", "left for KV", "tokens"),
            *(
                (
                    str(i),
                    f"{stage.layers[0]}-{stage.layers[1] - 1}",
                    render.size(stage.memory),
                    render.size(stage.weights),
                    render.size(stage.kv_token),
                    render.size(stage.kv_needed),
                    render.size(stage.left),
                    "any" if stage.tokens is None else f"{stage.tokens:,}",
                )
                for i, stage in enumerate(best.stages)
            ),
        ],
        right=(2, 3, 4, 5, 6, 7),
    )
    _transfer(report, best)


def _transfer(report: FitReport, best: GridFit) -> None:
    moved, times = best.transfer, report.times(best)
    context = report.workload.context
    if best.devices > 1:
        click.echo()
    if moved.tensor_steps:
        click.echo(
            f"all-reduces: {render.size(moved.tensor_bytes)} a token from each worker in {moved.tensor_steps} steps"
            + (f", {_seconds(times.tensor_token)} over the network" if times else "")
            + _a_prompt(moved.tensor_bytes, context, times.tensor_prefill if times else None)
        )
    if moved.hops:
        click.echo(
            f"between stages: {render.size(moved.pipeline_bytes)} a token in {moved.hops} hop(s)"
            + (f", {_seconds(times.pipeline_token)}" if times else "")
            + _a_prompt(moved.pipeline_bytes, context, times.pipeline_prefill if times else None)
        )
    if times:
        click.echo(
            f"cold start: the whole checkpoint {_seconds(times.cold_checkpoint)}, "
            f"a worker's own shard {_seconds(times.cold_shard)}"
        )


def _a_prompt(nbytes: int, context: int, seconds: float | None) -> str:
    """Say how many bytes a prompt that fills the context moves, at `nbytes` a token."""
    return f"; {render.size(nbytes * context)} a prompt of {context:,}" + (
        f", {_seconds(seconds)}" if seconds is not None else ""
    )


def _seconds(value: float) -> str:
    """Write a time for people."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
