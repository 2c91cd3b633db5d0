"""Turn a checkpoint into safetensors in the Hugging Face layout: the plan with whole tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

from shardprep_runtime.errors import InputError, quote
from shardprep_runtime.stores.store import Access

from .index import Index, LeftOut
from .layout.ties import settle_aliases
from .source import open_source, read_checkpoint
from .write.conduct import Conduct
from .write.mover import carry_out, fingerprint
from .write.plan import Plan, check_cast, plan_convert
from .write.side_files import copy_side_files
from .write.staging import Staging

INDEX_NAME = "model.safetensors.index.json"
DEFAULT_PART_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What convert wrote."""

    destination: Path
    tensors: int
    """Number of tensors, tied ones once."""
    nbytes: int
    """Bytes of tensor data."""
    files: tuple[tuple[str, int], ...]
    """(name, size) of each weight file."""
    aliases: dict[str, str]
    """Other names of tied tensors -> the name that is stored."""
    left_out: tuple[LeftOut, ...]
    """Contents of the source that are not weights, each with the reason."""


def convert(
    source: Path | str,
    destination: Path,
    *,
    max_part_bytes: int = DEFAULT_PART_BYTES,
    dtype: str | None = None,
    include_code: bool = False,
    access: Access | None = None,
    conduct: Conduct | None = None,
) -> ConvertReport:
    """Convert a checkpoint into safetensors files in the Hugging Face layout.

        report = convert("llama-70b", Path("llama-70b-safetensors"), dtype="BF16")
        print(report.tensors, report.nbytes)

    Args:
        source: A path or a URI, as `open_source` takes it.
        destination: A new or empty folder.
        max_part_bytes: Bytes of tensor data in a file at most, unless one tensor is larger.
        dtype: F64, F32, F16 or BF16: cast every tensor of these four dtypes to it; None: keep.
        include_code: Copy *.py files too.
        access: Endpoint, profile and the like of a store.
        conduct: Threads, and who is told of the progress.

    Raises:
        InputError: Before anything is written.
        WriteError, IntegrityError, SourceError: Later; no file then has its final name, and the same call resumes.
    """
    with open_source(source, access) as opened:
        index = settle_aliases(read_checkpoint(opened, include_code=include_code))
        if index.kind == "shard set":
            raise InputError(f"{quote(source)}: a shard set; `shardprep export` restores the checkpoint")
        plan = plan_convert(
            index,
            max_part_bytes=max_part_bytes,
            dtype=check_cast(dtype) if dtype else None,
            aliases=index.aliases,
        )
        write_checkpoint(plan, index, destination, dtype=dtype, conduct=conduct or Conduct())
    return report(plan, index, destination)


def write_checkpoint(
    plan: Plan,
    index: Index,
    destination: Path,
    *,
    dtype: str | None = None,
    conduct: Conduct,
    prove: Callable[[Path], None] = lambda _: None,
    beside: Index | None = None,
    written: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Carry out a plan of whole tensors, and write the side files and index.json beside them.

    Args:
        plan: What `plan_convert` gives.
        index: The checkpoint that the plan was made from.
        destination: A new or empty folder.
        dtype: The dtype that tensors are cast to; None: they are kept.
        prove: Called with the folder of the finished files before they get their final names; raises where one is wrong.
        beside: The checkpoint whose side files are copied; default: `index`.
        written: Name -> bytes of further files.
    """
    beside = beside or index
    parts = [part.path for part in plan.parts]
    last = INDEX_NAME if len(parts) > 1 else parts.pop()
    files = [*parts, *beside.side_files, *written, last]
    with Staging(destination, fingerprint(plan, index), files, warn=conduct.warn) as staging:
        copy_side_files(beside, staging, dtype=dtype, name_dtype=False)
        for name, data in written.items():
            staging.write(name, data)
        carry_out(plan, index, staging, conduct)
        if last == INDEX_NAME:
            staging.write(INDEX_NAME, _index_json(plan))
        if not staging.published:  # else an earlier run had proved all, and was killed while it renamed
            prove(staging.folder)
        staging.publish()


def report(plan: Plan, index: Index, destination: Path) -> ConvertReport:
    """Report what carrying out `plan` has written.

    Args:
        index: The checkpoint that the plan was made from.
    """
    return ConvertReport(
        destination=destination,
        tensors=len(plan.moves),
        nbytes=plan.nbytes,
        files=tuple((part.path, part.size) for part in plan.parts),
        aliases=dict(index.aliases),
        left_out=index.left_out,
    )


def _index_json(plan: Plan) -> bytes:
    fields = {
        "metadata": {
            "total_parameters": sum(prod(move.tensor.shape) for move in plan.moves),
            "total_size": plan.nbytes,
        },
        "weight_map": dict(sorted((piece.name, part.path) for part in plan.parts for piece in part.pieces)),
    }
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
