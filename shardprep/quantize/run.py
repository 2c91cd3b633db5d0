"""Bring a checkpoint to few bits: refuse first what could fail later, let an engine do it, check and measure what it made.

Nothing stands in the destination before all of it is whole; what was done so far lies in a folder beside it, from
which the same call goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shardprep_runtime import __version__
from shardprep_runtime.errors import ProblemError, quote
from shardprep_runtime.format.manifest import QUANTIZATION_REPORT
from shardprep_runtime.shard.filesystem import sync_folder
from shardprep_runtime.stores.store import Access

from ..convert import DEFAULT_PART_BYTES, write_checkpoint
from ..index import Index
from ..layout.pad import Padding, pad_to
from ..layout.ties import settle_aliases
from ..model.describe import model_of
from ..source import open_source, read_checkpoint
from ..write.conduct import Conduct, silent
from ..write.plan import plan_convert
from .calibration import Tokens, read_calibration, write_tokens
from .checks import (
    Evaluation,
    check_empty,
    check_measurable,
    check_room,
    copy_small,
    draw_heldout,
    foretell,
    plain_folder,
    sequence_length,
)
from .engine import Engine
from .engines.main import Job
from .names import Names, names_of, rename_as_source
from .quality import measure
from .recipe import CLASSIC, Recipe, settle
from .report import QuantizeReport, about, as_told
from .result import check_made, configured
from .trial import WORTH, try_out
from .work import SUFFIX, Work


@dataclass(frozen=True, slots=True)
class Way:
    """By what a recipe is carried out, and what is checked, measured and written."""

    engine: Engine = field(default_factory=lambda: Engine("gptqmodel"))
    """By default GPTQModel, in this interpreter."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    work: Path | None = None
    """The folder for what lies there meanwhile; beside the destination, with `.quantizing` behind its name, if None. It is
    removed at the end."""
    max_part_bytes: int = DEFAULT_PART_BYTES
    dry_run: bool = False
    """Check everything, forecast, write nothing."""
    trial: bool | None = None
    """Whether the engine first quantizes a small random model of this architecture; if None, it does in a dry run and where
    the work may take more than ten minutes."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how far a run is."""

    stage: Callable[[str], None] = silent
    """Called with what is begun now."""
    layer: Callable[[int, int], None] = lambda done, of: None
    """Called with the layers that are done and how many there are; of a run that goes on, first with those of before."""


def quantize(
    source: Path | str,
    destination: Path,
    recipe: Recipe,
    way: Way | None = None,
    *,
    access: Access | None = None,
    conduct: Conduct | None = None,
    watch: Watch | None = None,
) -> QuantizeReport:
    """Quantize a checkpoint.

    Args:
        source: A path or a URI.
        destination: A new or empty folder.
        recipe: How.
        way: By what engine, and so on; by default GPTQModel in this interpreter.
        access: How a store is reached, where the source is in one.
        conduct: How files are written, and who is warned.
        watch: Who is told how far it is.

    Returns:
        What was done, or in a dry run would be.

    Raises:
        InputError: For what cannot be quantized so, before the work begins.
        EngineError: Where the engine fails.
        ProblemError: Where the result is not what was asked for or worse than `max_kl` of the evaluation: nothing
            stands in the destination then, and the same call goes on where it was.
    """
    way = way or Way()
    engine, evaluation = way.engine, way.evaluation
    conduct, watch = conduct or Conduct(), watch or Watch()
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(source, access))
        index = settle_aliases(read_checkpoint(opened))
        recipe, scheme = settle(recipe, index)
        check_empty(destination)
        padding = Padding()
        if recipe.pad_to_tp is not None:
            index, padding = pad_to(
                index,
                tensor_parallel_size=recipe.pad_to_tp,
                group=recipe.group,
                pack=32 // recipe.bits,
                skip=recipe.skip,
            )
        model = model_of(index)
        folder = plain_folder(index)
        length = sequence_length(recipe, index)
        expected = foretell(model, recipe, length, staged=folder is None)
        beside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardprep-")))
        copy_small(index, beside)
        calibration = read_calibration(
            recipe.calibration,
            beside,
            samples=recipe.samples,
            length=length,
            seed=recipe.seed,
            column=recipe.column,
        )
        heldout = calibration
        if not evaluation.skip:
            heldout = draw_heldout(evaluation, calibration, beside, length, recipe.column)
            check_measurable(index, heldout, recipe.device)
        names = names_of(index)
        work = (way.work or destination.with_name(destination.name + SUFFIX)).absolute()
        check_room(destination, work, expected)
        job = job_of(recipe, beside, work, engine)
        checked = engine.check(replace(job, work=str(beside)))
        if way.trial if way.trial is not None else way.dry_run or expected.seconds[1] > WORTH:
            watch.stage("trying the engine on a small random model")
            try_out(index.config, beside, replace(job, work=str(beside)), engine, scheme)
        report = QuantizeReport(
            destination=destination,
            scheme=scheme,
            engine=engine.name,
            versions=checked["versions"],
            resumes=bool(checked.get("resumes")),
            forecast=expected,
            calibration={
                "source": calibration.source,
                "sequences": len(calibration.sequences),
                "tokens": calibration.count,
                "distinct": calibration.distinct,
                "digest": calibration.digest,
                "seed": recipe.seed,
            },
            padding=padding,
            source_bytes=index.nbytes - padding.nbytes,
            nbytes=expected.result,
            notes=tuple(
                dict.fromkeys(
                    (*_left_out(names), *calibration.notes, *heldout.notes, *checked.get("notes", ()))
                )
            ),
        )
        if way.dry_run:
            return report
        mark = fingerprint(index, recipe, report, engine)
        held = stack.enter_context(Work(work, mark, warn=conduct.warn))
        made = _make(held, index, folder, job, calibration, engine, conduct, watch)
        made_index = settle_aliases(read_checkpoint(stack.enter_context(open_source(made))))
        made_index = rename_as_source(made_index, index, names)
        found = check_made(made_index, index, scheme, without=names.unknown)
        measured = None
        if not evaluation.skip:
            watch.stage("measuring")
            measured = measure(
                index, made_index, heldout.sequences, device=recipe.device, progress=watch.layer
            )
        report = replace(
            report,
            quantized=found.modules.count,
            kept=found.modules.kept,
            nbytes=made_index.nbytes,
            quality=measured,
            measured={} if evaluation.skip else about(heldout, evaluation),
        )
        told = as_told(report, held.read("made.json") or {})
        if evaluation.max_kl is not None and measured is not None and not measured.kl <= evaluation.max_kl:
            held.write(QUANTIZATION_REPORT, told)
            raise ProblemError(
                f"KL to the original is {measured.kl:.6f}, above --max-kl {evaluation.max_kl}; nothing was written to "
                f"{quote(destination)}. The result and its report lie in {quote(work)}: a larger --max-kl publishes "
                "it without quantizing again"
            )
        watch.stage("writing")
        plan = plan_convert(made_index, max_part_bytes=way.max_part_bytes, aliases=made_index.aliases)
        config = configured(index.config, made_index, found, job.dtype)
        write_checkpoint(
            plan,
            made_index,
            destination,
            conduct=conduct,
            beside=replace(index, config=config, edited=True),
            written={
                **(_older(config) if found.scheme.method in CLASSIC else {}),
                QUANTIZATION_REPORT: as_json(told),
            },
        )
        held.discard()
    return replace(report, files=tuple((part.path, part.size) for part in plan.parts))


def job_of(recipe: Recipe, source: Path, work: Path, engine: Engine) -> Job:
    assert recipe.dtype is not None and recipe.symmetric is not None
    return Job(
        source=str(source),
        destination=str(work / "made"),
        work=str(work / engine.name),
        method=recipe.method,
        bits=recipe.bits,
        group_size=recipe.group_size,
        symmetric=recipe.symmetric,
        act_order=recipe.act_order,
        skip=recipe.skip,
        calibration=str(work / "calibration.jsonl"),
        device=recipe.device,
        dtype=recipe.dtype,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )


def fingerprint(index: Index, recipe: Recipe, report: QuantizeReport, engine: Engine) -> str:
    """A digest of what decides the result.

    Args:
        index: The source, whose files it names by their versions.
        recipe: All of it but the ranks, which decide nothing.
        report: Where the digest of the tokens stands, and the versions of what computes.
        engine: By its name.
    """
    digest = hashlib.sha256(__version__.encode())
    for file in index.files:
        digest.update(repr((file.path, file.size, file.version, file.digest)).encode())
    digest.update(json.dumps(dict(index.config), sort_keys=True).encode())
    asked = {**asdict(recipe), "calibration": report.calibration["digest"], "tensor_parallel_size": None}
    digest.update(json.dumps([asked, engine.name, dict(report.versions)], sort_keys=True).encode())
    return digest.hexdigest()


def _left_out(names: Names) -> list[str]:
    """A note of the tensors that the result will not have."""
    if not names.unknown:
        return []
    return [
        f"left out, since transformers loads no such tensor: {quote(names.unknown[0])}"
        + (f" and {len(names.unknown) - 1} more" if len(names.unknown) > 1 else "")
    ]


def _make(
    held: Work,
    index: Index,
    folder: Path | None,
    job: Job,
    calibration: Tokens,
    engine: Engine,
    conduct: Conduct,
    watch: Watch,
) -> Path:
    """Have the engine make the checkpoint, unless an earlier run has; the folder in which it lies."""
    made = Path(job.destination)
    if held.read("made.json") is not None and made.is_dir():
        return made
    if folder is None:
        watch.stage("staging")
        folder = held.folder / "source"
        if held.read("staged.json") is None:
            plan = plan_convert(index, max_part_bytes=DEFAULT_PART_BYTES, aliases=index.aliases)
            write_checkpoint(plan, index, folder, conduct=conduct)
            held.write("staged.json", {})
    write_tokens(calibration, Path(job.calibration))
    losses: list[dict[str, Any]] = []

    def hear(event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "stage":
                watch.stage(str(event["name"]))
            case "layer":
                watch.layer(int(event["done"]), int(event["of"]))
            case "note":
                conduct.warn(str(event["text"]))
            case "module":
                losses.append(
                    {"layer": event["layer"], "name": str(event["name"]), "loss": float(event["loss"])}
                )

    shutil.rmtree(made, ignore_errors=True)
    engine.run(replace(job, source=str(folder.absolute())), hear, inherits=(held.lock,))
    if not (made / "config.json").is_file():
        raise ProblemError(f"engine {engine.name}: it ended without a checkpoint in {quote(made)}")
    _bring_to_disk(made)
    held.write("made.json", {"losses": sorted(losses, key=lambda each: (each["layer"], each["name"]))})
    return made


def _bring_to_disk(folder: Path) -> None:
    """What a library wrote, before it is said to be there."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_folder(folder)


def _older(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Where readers look that were made before config.json said how a checkpoint is quantized."""
    return {"quantize_config.json": as_json(config["quantization_config"])}


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
