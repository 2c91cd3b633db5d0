"""Cut a checkpoint into a shard set that serves every layout up to its grain: the plan with pieces, and the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardprep_runtime import __version__
from shardprep_runtime.errors import FormatError, InputError, quote
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.grid import Stages, check_stage_needs, check_stages, even_stages
from shardprep_runtime.format.manifest import (
    Entry,
    Form,
    Manifest,
    Part,
    Quantization,
    QuantizationReport,
    SideFile,
)
from shardprep_runtime.format.read_manifest import parse_manifest
from shardprep_runtime.format.write_manifest import dump_manifest
from shardprep_runtime.shard.revisions import DEFAULT_REVISION, check_revision
from shardprep_runtime.stores.open import is_uri
from shardprep_runtime.stores.store import Access

from .index import Index, LeftOut
from .layout import ModelLayout, Scheme, normalize
from .layout.quantization import spell, with_lists
from .layout.ties import settle_aliases
from .model.describe import lay_out_index, read_legacy
from .probe import check_can_probe, record_probe
from .publish.store_staging import StoreStaging
from .source import Source, open_source, read_checkpoint
from .source.checkpoint import read_json
from .write.conduct import Conduct
from .write.mover import carry_out, fingerprint
from .write.plan import Plan, plan_split, uncollected
from .write.side_files import copy_side_files
from .write.staging import Destination, Staging, Written

DEFAULT_PART_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What split did, or would do."""

    destination: Path | str
    """A folder, or the URI of a store."""
    model_type: str
    layers: int
    grain: int
    stages: Stages | None
    tensors: int
    """Number of tensors, tied ones once."""
    source_bytes: int
    """Bytes of the checkpoint's tensors, tied ones once."""
    stored_bytes: int
    """Bytes of all parts, their headers included."""
    parts: tuple[tuple[str, int, tuple[int, int], tuple[int, int]], ...]
    """(path, size, ranks [start, stop), layers [start, stop)) of each part."""
    rank_bytes: tuple[int, ...]
    """Bytes of tensors that each rank of the grain keeps in all stages together."""
    shared_bytes: int
    """Bytes of tensors that every rank needs whole."""
    whole: tuple[tuple[str, int], ...]
    """(name, bytes) of tensors that are not cut, the largest first; {layer} and {expert} stand for numbers in a name."""
    aliases: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    probe: bool
    """Whether the manifest says what the model gives for fixed inputs."""
    manifest_digest: str | None
    """`sha256:...` of the manifest, the root of the chain of trust; None in a dry run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOptions:
    """How `split` goes about it; the defaults are right for most checkpoints."""

    max_part_bytes: int = DEFAULT_PART_BYTES
    """Bytes of a part at most, unless one piece is larger."""
    block_bytes: int = manifests.MAX_BLOCK_BYTES
    """Bytes of a piece that share one digest."""
    include_code: bool = False
    """Copy Python files beside the weights too, which transformers may run."""
    allow_generic: bool = False
    """Cut the rows of the linears of a model type that has no rules (see `generic_layout`)."""
    probe: bool = False
    """Record what each layer gives for fixed inputs, so that a worker can prove its stage. Transformers computes each
    layer once."""
    dry_run: bool = False
    """Plan and check everything, write nothing."""
    revision: str | None = None
    """The name under which a store publishes the set; None: `main`. For a destination at a URI."""
    scratch: Path | None = None
    """Where parts lie on their way to a store; None: the system's folder for temporary files."""


def split(
    source: Path | str,
    destination: Path | str,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int | None = None,
    stages: Sequence[Sequence[int]] | None = None,
    options: SplitOptions = SplitOptions(),
    access: Access | None = None,
    conduct: Conduct | None = None,
) -> SplitReport:
    """Cut a checkpoint, pickle or safetensors, into a shard set. Every source byte is read once.

        report = split("llama-70b", "llama-70b-tp8", tensor_parallel_size=8)
        print(report.manifest_digest)  # pin this where the set is loaded

    Args:
        source: A path or a URI, as `open_source` takes it.
        destination: A new or empty folder; or the URI of a store, which needs no full copy on this machine.
        tensor_parallel_size: The grain: workers may load at this size and at every size that divides it.
        pipeline_parallel_size: Make parts end where this many even stages do.
        stages: The same for given stages: layers [start, stop) of each. Workers may still load any other stages.
        options: How the parts are made, and where they go.
        access: Endpoint, profile and the like of stores.
        conduct: Threads, and who is told of the progress.

    Raises:
        InputError: Before anything is written.
        WriteError, IntegrityError, SourceError: Later; no file then has its final name, and the same call resumes.
    """
    with open_source(source, access) as opened:
        with uncollected():
            index = settle_aliases(read_checkpoint(opened, include_code=options.include_code))
            if index.kind == "shard set":
                raise InputError(
                    f"{quote(source)}: a shard set already; it serves every size that divides its grain"
                )
            packed = lay_out_index(index, allow_generic=options.allow_generic)
            layout = packed.layout
            packed.check_grain(tensor_parallel_size)
            index = _spelled(index, packed.scheme)
            summary = _summary(index)
            chosen = _stages(layout, pipeline_parallel_size, stages)
            plan = plan_split(
                index,
                layout,
                grain=tensor_parallel_size,
                stages=chosen,
                max_part_bytes=options.max_part_bytes,
                block_bytes=options.block_bytes,
            )
        remote = is_uri(destination)
        if remote:
            check_revision(options.revision or DEFAULT_REVISION)
        elif options.revision is not None or options.scratch is not None:
            raise InputError(
                f"{quote(destination)}: a folder has neither revisions nor scratch space; they are for a store at a URI"
            )
        if options.probe:
            check_can_probe(index.config, layout.layers)
        if options.dry_run:
            return _report(
                plan, index, layout, destination, tensor_parallel_size, chosen, options.probe, None
            )
        conduct = conduct or Conduct()
        files = [*(part.path for part in plan.parts), *index.side_files, manifests.FILE_NAME]
        begun: AbstractContextManager[Destination, None]
        if remote:
            begun = into = StoreStaging(
                str(destination),
                plan,
                fingerprint(plan, index),
                revision=options.revision or DEFAULT_REVISION,
                scratch=options.scratch,
                access=access,
                conduct=conduct,
            )
            conduct = into.mover
        else:
            begun = Staging(Path(destination), fingerprint(plan, index), files, warn=conduct.warn)
        with begun as staging:
            side_files = copy_side_files(index, staging, dtype=None, name_dtype=True)
            written = carry_out(plan, index, staging, conduct)
            manifest = _manifest(
                plan,
                index,
                layout,
                written,
                side_files,
                opened,
                grain=tensor_parallel_size,
                stages=chosen,
            )
            quantization = _quantization(packed.scheme, summary, side_files)
            manifest = replace(manifest, quantization=quantization)
            if options.probe:
                manifest = replace(manifest, probe=record_probe(manifest, staging, workers=conduct.workers))
            raw = dump_manifest(manifest)
            parse_manifest(raw)  # a manifest that readers would refuse must not be published
            staging.complete(manifests.FILE_NAME, raw)
    digest = manifests.digest_of(raw)
    return _report(plan, index, layout, destination, tensor_parallel_size, chosen, options.probe, digest)


def _spelled(index: Index, scheme: Scheme | None) -> Index:
    """Complete the quantization_config of config.json, and give the index with it.

    Older tools wrote it into a file beside config.json. And it lists what is quantized, since an engine cannot look into
    the parts of a shard set to find out.
    """
    if scheme is None:
        return index
    legacy = read_legacy(index)
    how = index.config.get("quantization_config")
    if legacy is not None:
        how = spell(scheme, legacy=legacy, head="lm_head.qweight" in index.tensors)
    if not isinstance(how, Mapping):  # a model that reads images: the config of its language model says it
        return index
    listed = with_lists(how, {name: tensor.shape for name, tensor in index.tensors.items()})
    if listed == index.config.get("quantization_config"):
        return index
    return replace(index, config={**index.config, "quantization_config": listed}, edited=True)


def _stages(
    layout: ModelLayout, pipeline_parallel_size: int | None, stages: Sequence[Sequence[int]] | None
) -> Stages | None:
    if stages is not None:
        if pipeline_parallel_size not in (None, len(stages)):
            raise InputError(
                f"{len(stages)} stages were given for pipeline parallel size {pipeline_parallel_size}"
            )
        chosen = check_stages(stages, layout.layers)
    elif pipeline_parallel_size is not None and pipeline_parallel_size > 1:
        chosen = even_stages(layout.layers, pipeline_parallel_size)
    else:
        return None
    for engine, needs in layout.stage_needs.items():
        check_stage_needs(chosen, needs, engine=engine)
    return chosen


def _manifest(
    plan: Plan,
    index: Index,
    layout: ModelLayout,
    written: Sequence[Written],
    side_files: Sequence[SideFile],
    source: Source,
    *,
    grain: int,
    stages: Stages | None,
) -> Manifest:
    tensors = {}
    for move in plan.moves:
        tensor, placed = move.tensor, layout.tensors[move.tensor.name]
        # the form of the pieces is one object for all tensors that are alike; an empty tensor has no pieces
        form = (
            move.pieces[0].form
            if move.pieces
            else Form(move.dtype, tensor.shape, placed.layout, placed.engines)
        )
        tensors[tensor.name] = Entry(form, placed.layer, placed.expert)
    architectures = index.config.get("architectures")
    config = [side.digest for side in side_files if side.path == "config.json"]
    assert plan.block_bytes is not None
    return Manifest(
        model={
            "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
            "model_type": layout.model_type,
            "config_digest": config[0] if config else None,
            "source": {
                "uri": source.uri,
                "revision": source.revision,
                "kind": index.kind,
                "files": [{"path": f.path, "size": f.size, "index_digest": f.digest} for f in index.files],
            },
            "tool": f"shardprep {__version__}",
        },
        layers=layout.layers,
        grain=grain,
        stages=stages,
        block_bytes=plan.block_bytes,
        tensors=tensors,
        aliases=index.aliases,
        tied={name: target for name, target in layout.tied.items() if name not in index.aliases},
        parts=tuple(
            Part(
                part.path, done.size, done.header_size, done.digest, part.ranks, part.layers, part.placements
            )
            for part, done in zip(plan.parts, written, strict=True)
        ),
        side_files=tuple(side_files),
        experts=layout.experts,
        engines=layout.engines,
        stage_needs=layout.stage_needs,
    )


def _summary(index: Index) -> Mapping[str, Any]:
    """Read the summary in the report that `shardprep quantize` leaves beside the weights; empty where there is none."""
    name = manifests.QUANTIZATION_REPORT
    found = read_json(index.folder, name).get("summary", {}) if name in index.side_files else {}
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise FormatError(f"{index.folder.where(name)}: a number in its summary is not finite") from None
    if not isinstance(found, dict):
        raise FormatError(f"{index.folder.where(name)}: summary is {quote(found)}, expected an object")
    return found


def _quantization(
    scheme: Scheme | None, summary: Mapping[str, Any], side_files: Sequence[SideFile]
) -> Quantization | None:
    if scheme is None:
        return None
    report = next((side for side in side_files if side.path == manifests.QUANTIZATION_REPORT), None)
    return Quantization(
        scheme.method,
        scheme.bits,
        scheme.group,
        scheme.symmetric,
        scheme.act_order,
        scheme.format,
        None if report is None else QuantizationReport(report.digest, summary),
    )


def _report(
    plan: Plan,
    index: Index,
    layout: ModelLayout,
    destination: Path | str,
    grain: int,
    stages: Stages | None,
    probe: bool,
    digest: str | None,
) -> SplitReport:
    rank_bytes, shared_bytes = [0] * grain, 0
    for part in plan.parts:  # all pieces of a part have the same owners
        for rank in range(*part.ranks):
            rank_bytes[rank] += part.nbytes
        if grain > 1 and part.ranks == (0, grain):
            shared_bytes += part.nbytes
    whole: Counter[str] = Counter()
    for name, placed in layout.tensors.items():
        if grain > 1 and placed.layout.dim is None:
            whole[normalize(name)[0]] += index.tensors[name].nbytes
    return SplitReport(
        destination=destination,
        model_type=layout.model_type,
        layers=layout.layers,
        grain=grain,
        stages=stages,
        tensors=len(plan.moves),
        source_bytes=index.nbytes,
        stored_bytes=sum(part.size for part in plan.parts),
        parts=tuple((part.path, part.size, part.ranks, part.layers) for part in plan.parts),
        rank_bytes=tuple(rank_bytes),
        shared_bytes=shared_bytes,
        whole=tuple(whole.most_common()),
        aliases=index.aliases,
        left_out=index.left_out,
        probe=probe,
        manifest_digest=digest,
    )
