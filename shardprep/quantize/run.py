"""Bring a checkpoint to few bits: refuse first what could fail later, let an engine do it, check and measure what it made.

Nothing stands in the destination before all of it is whole; what was done so far lies in a folder beside it, from
which the same call goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from shardprep_runtime import __version__
from shardprep_runtime.errors import InputError, LayoutError, ProblemError, UnsupportedError, quote
from shardprep_runtime.manifest import QUANTIZATION_REPORT
from shardprep_runtime.store import Access

from ..conduct import Conduct, silent
from ..convert import DEFAULT_PART_BYTES, write_checkpoint
from ..index import Index
from ..layout import Scheme
from ..layout.packed import pack
from ..layout.quantization import BITS
from ..memory import text_config
from ..model import Model, model_of, scheme_of
from ..pad import Padding, pad_to
from ..plan import plan_convert, settle_aliases
from ..side_files import read_chunks
from ..source import open_source, read_checkpoint
from .calibration import Tokens, read_calibration, read_heldout, write_tokens
from .engine import Engine
from .engines.main import Job
from .forecast import Forecast, forecast
from .names import rename_as_source
from .quality import Quality, measure
from .result import check_made, configured
from .trial import WORTH, try_out
from .walk import Walk, check_kind
from .work import SUFFIX, Work

SAMPLES: Final = 128
LENGTH: Final = 512
"""Tokens of a calibration sequence, where the model takes so many; AutoAWQ's default."""

BATCH: Final = 8
"""Sequences that an engine computes together."""

SEQUENCES_MEASURED: Final = 8
"""Sequences of the calibration on which quality is measured where no other text is given."""

TOKENS_MEASURED: Final = 2**15
"""Tokens of a text that are measured at most, unless more are asked for."""

REPORT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantize."""

    method: str
    """`gptq` or `awq`."""
    bits: int = 4
    group_size: int = 128
    """Numbers of a row that share a scale; -1: all of them."""
    symmetric: bool | None = None
    """Whether scales alone are kept, and no zero points; None: GPTQ does, AWQ does not, as engines expect."""
    act_order: bool = False
    """GPTQ: whether inputs are put into groups in the order of their activations (desc_act)."""
    skip: tuple[str, ...] = ()
    """Linears of the layers that stay as they are: names, parts of names, or patterns behind `re:`."""
    tensor_parallel_size: int | None = None
    """Ranks that must be able to share the result; None: not asked."""
    pad_to_tp: int | None = None
    """Ranks for which MLPs are made longer, with zeros, so that they can share the result."""
    device: str = "cpu"
    dtype: str | None = None
    """In which the model is computed and its other tensors are written; None: its own, float16 for AWQ."""
    calibration: str | Path | None = None
    """As `read_calibration` takes it."""
    samples: int = SAMPLES
    length: int | None = None
    """Tokens of a calibration sequence; None: 512, or as many as the model takes."""
    column: str = "text"
    seed: int = 0
    batch_size: int = BATCH

    @property
    def group(self) -> int | None:
        return self.group_size if self.group_size > 0 else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """On what the quality of a result is measured."""

    text: str | Path | None = None
    """As `read_heldout` takes it; None: a part of the calibration, on which every method looks better than it is."""
    tokens: int = TOKENS_MEASURED
    max_kl: float | None = None
    """Above which the result is not published."""
    skip: bool = False


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how far a run is."""

    stage: Callable[[str], None] = silent
    """Called with what is begun now."""
    layer: Callable[[int, int], None] = lambda done, of: None
    """Called with the layers that are done and how many there are; of a run that goes on, first with those of before."""


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What quantize did, or would do."""

    destination: Path
    scheme: Scheme
    engine: str
    versions: Mapping[str, str]
    resumes: bool
    """Whether the engine goes on at the layer at which it was killed."""
    forecast: Forecast
    calibration: Mapping[str, Any]
    padding: Padding
    quantized: int = 0
    """Linears that are quantized."""
    kept: tuple[str, ...] = ()
    """Modules with matrices that are not."""
    source_bytes: int = 0
    nbytes: int = 0
    """Bytes of the result's tensors; as forecast in a dry run."""
    quality: Quality | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    """On what text."""
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    """(name, size) of each weight file; none in a dry run."""


def quantize(
    source: Path | str,
    destination: Path,
    recipe: Recipe,
    *,
    engine: Engine | None = None,
    evaluation: Evaluation | None = None,
    work: Path | None = None,
    max_part_bytes: int = DEFAULT_PART_BYTES,
    dry_run: bool = False,
    trial: bool | None = None,
    access: Access | None = None,
    conduct: Conduct | None = None,
    watch: Watch | None = None,
) -> QuantizeReport:
    """Quantize the checkpoint at `source`, a path or a URI, into `destination`, a new or empty folder.

    engine         GPTQModel in this interpreter if None
    work           the folder for what lies there meanwhile; beside the destination, with `.quantizing` behind its
                   name, if None. It is removed at the end
    dry_run        check everything, forecast, write nothing
    trial          whether the engine first quantizes a small random model of this architecture; if None, it does in a
                   dry run and where the work may take more than ten minutes
    Raises InputError for what cannot be quantized so, before the work begins; EngineError where the engine fails,
    ProblemError where the result is not what was asked for or worse than `evaluation.max_kl`: nothing stands in the
    destination then, and the same call goes on where it was.
    """
    engine, evaluation = engine or Engine("gptqmodel"), evaluation or Evaluation()
    conduct, watch = conduct or Conduct(), watch or Watch()
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(source, access))
        index = settle_aliases(read_checkpoint(opened))
        recipe, scheme = _settled(recipe, index)
        _check_empty(destination)
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
        folder = _plain_folder(index)
        length = _length(recipe, index)
        expected = _forecast(model, recipe, length, staged=folder is None)
        beside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardprep-")))
        _copy_small(index, beside)
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
            heldout = _heldout(evaluation, calibration, beside, length, recipe.column)
            _check_measurable(index, heldout, recipe.device)
        work = work or destination.with_name(destination.name + SUFFIX)
        _check_room(destination, work, expected)
        job = _job(recipe, beside, work, engine)
        checked = engine.check(replace(job, work=str(beside)))
        if trial if trial is not None else dry_run or expected.seconds[1] > WORTH:
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
            notes=tuple(dict.fromkeys((*calibration.notes, *heldout.notes, *checked.get("notes", ())))),
        )
        if dry_run:
            return report
        mark = _fingerprint(index, recipe, report, engine)
        held = stack.enter_context(Work(work, mark, warn=conduct.warn))
        made = _make(held, index, folder, job, calibration, engine, conduct, watch)
        made_index = settle_aliases(read_checkpoint(stack.enter_context(open_source(made))))
        made_index = rename_as_source(made_index, index)
        found = check_made(made_index, index, scheme)
        measured = None
        if not evaluation.skip:
            watch.stage("measuring")
            measured = measure(
                index, made_index, heldout.sequences, device=recipe.device, progress=watch.layer
            )
        report = replace(
            report,
            quantized=found.quantized,
            kept=found.kept,
            nbytes=made_index.nbytes,
            quality=measured,
            measured={} if evaluation.skip else _about(heldout, evaluation),
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
        plan = plan_convert(made_index, max_part_bytes=max_part_bytes, aliases=made_index.aliases)
        config = configured(index.config, made_index, found, job.dtype)
        write_checkpoint(
            plan,
            made_index,
            destination,
            conduct=conduct,
            beside=replace(index, config=config, edited=True),
            written={
                "quantize_config.json": _json(config["quantization_config"]),
                QUANTIZATION_REPORT: _json(told),
            },
        )
        held.discard()
    return replace(report, files=tuple((part.path, part.size) for part in plan.parts))


# ------------------------------------------------------------------------------------------------------------- before


def _settled(recipe: Recipe, index: Index) -> tuple[Recipe, Scheme]:
    """The recipe without open questions. Raises InputError for what no engine could do."""
    if not index.config:
        raise InputError(
            f"{index.folder.where()}: no config.json, which says what architecture the tensors belong to"
        )
    already = scheme_of(index)
    if already is not None:
        raise InputError(
            f"{index.folder.where()}: quantized already ({already.method}, {already.bits} bits); "
            "quantize the original"
        )
    method = recipe.method
    if method not in ("gptq", "awq"):
        raise InputError(f"{quote(method)}: methods are gptq and awq")
    if recipe.bits not in BITS[method]:
        raise UnsupportedError(
            f"{method} of {recipe.bits} bits; expected {' or '.join(map(str, BITS[method]))}"
        )
    if recipe.group_size == 0 or recipe.group_size < -1:
        raise InputError(f"groups of {recipe.group_size} numbers: at least 1, or -1 for a whole row")
    if recipe.act_order and method == "awq":
        raise InputError("AWQ knows no act-order; it is a way of GPTQ")
    symmetric = recipe.symmetric if recipe.symmetric is not None else method == "gptq"
    own = text_config(index.config)
    named = str(own.get("dtype") or own.get("torch_dtype") or "").removeprefix("torch.")
    dtype = recipe.dtype
    if dtype is None:
        dtype = "float16" if method == "awq" else named if named in ("float16", "bfloat16") else "bfloat16"
    settled = replace(recipe, symmetric=symmetric, dtype=dtype)
    return settled, Scheme(method, recipe.bits, recipe.group, symmetric, recipe.act_order)


def _check_empty(destination: Path) -> None:
    """Refuse before the work what the writer would refuse after it."""
    if destination.is_dir():
        there = sorted(entry.name for entry in destination.iterdir() if entry.name != ".shardprep-partial")
        if there and not (destination / ".shardprep-partial").is_dir():
            raise InputError(
                f"{quote(destination)}: holds {quote(there[0])}; nothing is overwritten: choose an empty or new folder"
            )
    elif destination.exists() or destination.is_symlink():
        raise InputError(f"{quote(destination)}: exists and is no folder; choose another destination")


def _forecast(model: Model, recipe: Recipe, length: int, *, staged: bool) -> Forecast:
    """What it will take. Raises LayoutError where the sizes do not fit groups, or the ranks that were asked for."""
    for each in recipe.skip:
        _check_skip(model, recipe, each)
    found = forecast(
        model,
        method=recipe.method,
        bits=recipe.bits,
        group=recipe.group,
        symmetric=bool(recipe.symmetric),
        act_order=recipe.act_order,
        skip=recipe.skip,
        samples=recipe.samples,
        length=length,
        batch=recipe.batch_size,
        device=recipe.device,
        tensor_parallel_size=recipe.tensor_parallel_size or 1,
        staged=staged,
    )
    if found.kept:
        name = found.kept[0]
        shape = model.packed.tensors[name][1]
        fits = [size for size in (256, 128, 64, 32, 16) if shape[-1] % size == 0 and size < recipe.group_size]
        ways = [f"--group-size {fits[0]}"] if fits else []
        raise LayoutError(
            f"{quote(name)}: {list(shape)} does not divide into groups of {recipe.group_size} and words of "
            f"{32 // recipe.bits} numbers ({len(found.kept)} linears do not); "
            f"{' or '.join([*ways, f'--skip {_last_word(name)} to keep them as they are'])}"
        )
    if not found.quantized:
        raise LayoutError("no linear of a layer would be quantized; is everything in --skip?")
    if found.problems and recipe.tensor_parallel_size is not None:
        more = f"; --pad-to-tp {recipe.tensor_parallel_size} makes it {found.pad_to}" if found.pad_to else ""
        raise LayoutError(f"{found.problems[0]}{more}")
    return found


def _check_skip(model: Model, recipe: Recipe, pattern: str) -> None:
    """Raises InputError for a pattern that names no linear: it was meant to."""
    tensors = model.packed.tensors
    options: Mapping[str, Any] = {"method": recipe.method, "bits": recipe.bits, "group": None}
    with_it = pack(model.layout, tensors, **options)
    without = pack(model.layout, tensors, **options, skip=[pattern])
    if with_it.tensors.keys() == without.tensors.keys():
        raise InputError(f"--skip {quote(pattern)}: no linear of the model is called so")


def _last_word(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _length(recipe: Recipe, index: Index) -> int:
    """Tokens of a calibration sequence. Raises InputError for more than the model takes."""
    config = text_config(index.config)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(longest, int) or longest < 1:
        return recipe.length or LENGTH
    if recipe.length is not None and recipe.length > longest:
        raise InputError(
            f"--sequence-length {recipe.length}: the model takes at most {longest} tokens (max_position_embeddings)"
        )
    return recipe.length or min(LENGTH, longest)


def _heldout(
    evaluation: Evaluation, calibration: Tokens, tokenizer: Path, length: int, column: str
) -> Tokens:
    """The text on which the result is measured; a part of the calibration where there is no other."""
    if evaluation.text is None:
        return replace(calibration, sequences=calibration.sequences[:SEQUENCES_MEASURED])
    return read_heldout(evaluation.text, tokenizer, length=length, limit=evaluation.tokens, column=column)


def _check_measurable(index: Index, heldout: Tokens, device: str) -> None:
    """Refuse before the work what could not be measured after it. Raises InputError with the way around."""
    try:
        check_kind(index.config)
        Walk(index, {token for each in heldout.sequences for token in each}, device=device)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; --no-evaluate quantizes it unmeasured") from None


def _plain_folder(index: Index) -> Path | None:
    """The folder where an engine can read the checkpoint as it is; None: it must be staged."""
    folder = index.folder.path
    if folder is None or index.kind != "safetensors" or index.edited or "config.json" not in index.side_files:
        return None
    extents = (extent for tensor in index.tensors.values() for extent in tensor.extents)
    return folder if all(extent.file for extent in extents) else None


def _copy_small(index: Index, into: Path) -> None:
    """Copy the side files, where a tokenizer and an engine's check find them; its config.json is the index's."""
    for name in index.side_files:
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with index.folder.open(name) as file, open(path, "wb") as out:
            for chunk in read_chunks(file):
                out.write(chunk)
    (into / "config.json").write_text(json.dumps(dict(index.config)), "utf-8")


def _check_room(destination: Path, work: Path, expected: Forecast) -> None:
    """Raises ProblemError where the disks have no room for what will lie there at the same time."""
    needs: Counter[Path] = Counter()
    needs[_existing(destination)] += expected.disk.result
    # what the engine makes is copied into the destination, and removed after that
    needs[_existing(work)] += expected.disk.staged + expected.disk.journal + expected.disk.result
    devices: dict[int, tuple[Path, int]] = {}
    for path, needed in needs.items():
        before = devices.get(path.stat().st_dev, (path, 0))
        devices[path.stat().st_dev] = before[0], before[1] + needed
    for path, needed in devices.values():
        free = shutil.disk_usage(path).free
        if needed > free:
            raise InputError(
                f"{quote(path)}: about {needed:,} bytes are needed, {free:,} are free; make room, or put the work "
                "elsewhere with --work"
            )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _job(recipe: Recipe, source: Path, work: Path, engine: Engine) -> Job:
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


def _fingerprint(index: Index, recipe: Recipe, report: QuantizeReport, engine: Engine) -> str:
    """What decides the result: the source as indexed, the recipe, the tokens, the versions of what computes."""
    digest = hashlib.sha256(__version__.encode())
    for file in index.files:
        digest.update(repr((file.path, file.size, file.version, file.digest)).encode())
    digest.update(json.dumps(dict(index.config), sort_keys=True).encode())
    asked = {**asdict(recipe), "calibration": report.calibration["digest"], "tensor_parallel_size": None}
    digest.update(json.dumps([asked, engine.name, dict(report.versions)], sort_keys=True).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- during


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
    engine.run(replace(job, source=str(folder.absolute())), hear)
    if not (made / "config.json").is_file():
        raise ProblemError(f"engine {engine.name}: it ended without a checkpoint in {quote(made)}")
    held.write("made.json", {"losses": sorted(losses, key=lambda each: (each["layer"], each["name"]))})
    return made


# -------------------------------------------------------------------------------------------------------------- after


def _about(heldout: Tokens, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "source": heldout.source,
        "sequences": len(heldout.sequences),
        "tokens": heldout.count,
        "digest": heldout.digest,
        "calibrated_on": evaluation.text is None,
    }


def as_told(report: QuantizeReport, made: Mapping[str, Any]) -> dict[str, Any]:
    """The content of quantization_report.json: facts alone that a second run finds again, so no times."""
    scheme, quality = report.scheme, report.quality
    summary: dict[str, Any] = {
        "method": scheme.method,
        "bits": scheme.bits,
        "group_size": -1 if scheme.group is None else scheme.group,
        "symmetric": scheme.symmetric,
        "act_order": scheme.act_order,
        "engine": f"{report.engine} {report.versions.get(report.engine, '')}".strip(),
        "calibration": report.calibration,
    }
    if quality is not None:
        summary |= {
            "measured_on": report.measured,
            "perplexity_before": quality.perplexity_before,
            "perplexity": quality.perplexity,
            "kl": quality.kl,
            "top1_agreement": quality.agreement,
        }
    losses: dict[int, dict[str, float]] = {}
    for each in made.get("losses", ()):
        losses.setdefault(each["layer"], {})[each["name"]] = each["loss"]
    layers = [
        {
            "layer": number,
            **({"error": own.error, "drift": own.drift} if own is not None else {}),
            **({"losses": losses[number]} if number in losses else {}),
        }
        for number, own in (
            [(each.layer, each) for each in quality.layers]
            if quality is not None
            else [(n, None) for n in sorted(losses)]
        )
    ]
    return {
        "version": REPORT_VERSION,
        "tool": f"shardprep {__version__}",
        "summary": summary,
        "versions": dict(report.versions),
        "linears_quantized": report.quantized,
        "kept": list(report.kept),
        "padding": report.padding.as_json(),
        "bytes": {"before": report.source_bytes, "after": report.nbytes},
        "notes": list(report.notes),
        "layers": layers,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
