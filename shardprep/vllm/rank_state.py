"""Write the state of each rank's model in vLLM, and prove that vLLM's own loader gives the same state back.

Parameters and buffers are compared bit for bit, before and after vLLM's post-processing. One model is in memory at a
time.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import (
    IntegrityError,
    UnsupportedError,
    quote,
)
from shardprep_runtime.format.dtypes import TORCH, nbytes
from shardprep_runtime.format.header import dump_header
from shardprep_runtime.format.manifest import Manifest

from ..write.conduct import Conduct
from ..write.mover import write_all
from ..write.staging import Staging, Written
from . import ranks as vllm_ranks
from .record import StateFile

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig

CHUNK: Final = 16 * 2**20
"""Bytes that are written and digested at a time."""

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
"""Errors by which vLLM refuses what it cannot do."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file that will be written: tensor name -> (dtype, shape), in the order of their bytes."""

    path: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(nbytes(dtype, shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank of vLLM's grid, and the files that hold its state."""

    pp_rank: int
    tp_rank: int
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        return f"rank {self.tp_rank} of stage {self.pp_rank}"

    @property
    def marker(self) -> str:
        """Name of the file that says, while the export runs, that this rank's files are written and proved."""
        return f".rank-{self.pp_rank}-{self.tp_rank}.json"


@dataclass(frozen=True, slots=True)
class Proved:
    """The files of a rank, which vLLM was seen to read back as it should."""

    files: tuple[StateFile, ...]
    unprocessed: str
    """The reason why they were not compared after post-processing too; empty where they were."""


@dataclass(slots=True)
class Job:
    """What is exported, for which grid, and by which vLLM."""

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
        """Raise a refusal of vLLM's as an UnsupportedError. `what` says what vLLM does not do."""
        try:
            yield
        except REFUSALS as error:
            raise UnsupportedError(f"vLLM {self.vllm} {what}: {said(error)}; nothing was exported") from error


def write_ranks(job: Job, ranks: Sequence[Rank], staging: Staging) -> list[StateFile]:
    """Write and prove the files of each rank, but those that an earlier run has proved.

    Args:
        ranks: Every rank of the grid, with the files that it gets.
    """
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


def _finished(rank: Rank, staging: Staging) -> Proved | None:
    """Give what an earlier run has proved of a rank, if its files are still there."""
    try:
        read = json.loads((staging.folder / rank.marker).read_bytes())
        found = Proved(tuple(StateFile(**each) for each in read["files"]), read["unprocessed"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    for file in found.files:
        places = [folder / file.path for folder in (staging.folder, staging.destination)]
        if not any(place.is_file() and place.stat().st_size == file.size for place in places):
            return None
    return found if [file.path for file in found.files] == [part.path for part in rank.parts] else None


def _write_rank(job: Job, rank: Rank, staging: Staging) -> Proved:
    """Write the files of one rank, and have vLLM read them back. Raise IntegrityError where it reads another state."""
    with job.playing((rank.pp_rank, rank.tp_rank)):
        with empty_model(job.config) as model:
            with job.asking(f"cannot load {rank.label}"):
                vllm_ranks.load_weights(model, job.config)
            _check_known(job, rank, model)
            tensors = vllm_ranks.state(model)
            files = [_write_part(job, rank, part, tensors, staging) for part in rank.parts]
            before = _digests(model)
            del tensors  # else post-processing could not free the tensors that it packs anew
            after, reason = _processed(model, job.config)
            del model
        try:
            proof = vllm_ranks.build_config(staging.folder, dtype=job.dtype, load_format="sharded_state")
            with empty_model(proof) as model:
                vllm_ranks.load_weights(model, proof)
                _compare(rank, "before", before, _digests(model))
                again, other = _processed(model, proof)
                del model
        except REFUSALS as error:
            raise IntegrityError(
                f"{rank.label}: vLLM {job.vllm} cannot read its own sharded_state back: {said(error)}; nothing was "
                "exported. Please report the model"
            ) from error
    if reason != other:
        raise IntegrityError(
            f"{rank.label}: post-processing ends with {other or 'nothing'} when vLLM reads it back, expected "
            f"{reason or 'nothing'}; nothing was exported. Please report the model"
        )
    _compare(rank, "after", after, again)
    return Proved(tuple(files), reason)


def _check_known(job: Job, rank: Rank, model: nn.Module) -> None:
    """Raise UnsupportedError where loading a checkpoint made tensors that a fresh model does not have.

    vLLM's sharded_state loader would not ask for them.
    """
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
    job: Job, rank: Rank, part: Part, tensors: Mapping[str, torch.Tensor], staging: Staging
) -> StateFile:
    """Write a file front to back, a chunk at a time."""
    header = dump_header(
        part.tensors, {**job.metadata, "pp_rank": str(rank.pp_rank), "tp_rank": str(rank.tp_rank)}
    )
    hasher, size = hashlib.sha256(header), len(header)
    known = kinds()
    fd = staging.create(part.path)
    try:
        write_all(fd, header, 0)
        for name, (dtype, shape) in part.tensors.items():
            tensor = tensors[name]
            if (known[tensor.dtype], tuple(tensor.shape)) != (dtype, shape):
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
    """Give the digests of a model after vLLM's post-processing, or the reason why vLLM cannot do it on this CPU."""
    try:
        vllm_ranks.process_weights(model, config)
    except REFUSALS as error:
        return {}, said(error)
    return _digests(model), ""


def _compare(rank: Rank, when: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise IntegrityError(
                f"{rank.label}: {quote(name)} is {found.get(name, 'missing')} {when} post-processing when vLLM reads it "
                f"back, expected {expected.get(name, 'nothing')}, as it is loaded from the shard set; nothing was exported. "
                "Please report the model"
            )


def _digests(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and buffer, also of those that are not in the state dict -> its dtype, shape and digest."""
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


def kinds() -> dict[torch.dtype, str]:
    import torch

    return {
        getattr(torch, name): kind for kind, name in TORCH.items() if kind != "F4" and hasattr(torch, name)
    }


@contextlib.contextmanager
def empty_model(config: VllmConfig) -> Iterator[nn.Module]:
    """Build a rank's model without weights, and free its memory when the context ends."""
    model = vllm_ranks.build_model(config)
    try:
        yield model
    finally:
        del model
        # vLLM has noted the model's layers here, which would keep it alive
        config.compilation_config.static_forward_context.clear()
        config.compilation_config.static_all_moe_layers.clear()
        gc.collect()


def said(error: BaseException) -> str:
    """Put another library's error on one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {quote(text, limit=400)}"
