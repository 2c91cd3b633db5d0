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
    """What convert did."""

    destination: Path
    tensors: int
    nbytes: int
    """Bytes of tensor data."""
    files: tuple[tuple[str, int], ...]
    """(name, size) of each weight file."""
    aliases: dict[str, str]
    left_out: tuple[LeftOut, ...]


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
    """Convert the checkpoint at `source`, a path or a URI, into `destination`, a new or empty folder.

    Args:
        dtype: One of F64, F32, F16, BF16: cast every floating-point tensor of these kinds; None: keep.

    Raises:
        InputError: Before anything is written; WriteError, IntegrityError or SourceError later, in which case nothing
            stands under a final name and the same call resumes.
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
    """Carry out a plan of whole tensors. `prove` is called with the folder of the finished files before they get
    their final names, and raises where they are not what they should be. Side files are those of `beside`, if it is
    given, and what was `written` here."""
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
        if not staging.published:  # else an earlier run was killed while renaming, all proved
            prove(staging.folder)
        staging.publish()


def report(plan: Plan, index: Index, destination: Path) -> ConvertReport:
    """What carrying out `plan` has written."""
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
