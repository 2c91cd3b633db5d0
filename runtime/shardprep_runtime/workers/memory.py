"""Say how much memory stages of a model take in one process, and cut the model into runs of layers that fit."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Final

from ..errors import InputError, WorkerError, quote
from ..format import dtypes
from ..format.grid import Stages, even_stages, stages_with
from ..format.manifest import TRANSFORMERS, Manifest
from ..format.view import Place, View, plan_view

SHARE: Final = 0.8
"""Share of the free memory that weights may take: the rest is for caches of sequences, and for what a forward needs."""

MEMINFO: Final = Path("/proc/meminfo")
CGROUP: Final = Path("/sys/fs/cgroup")

FLOATS: Final = {"BF16", "F16", "F32", "F64"}
"""Stored dtypes that transformers casts one to another as it loads."""


def choose_cuts(
    manifest: Manifest, memory: int, *, dtype: str | None = None, is_read: bool = False
) -> Stages:
    """The fewest runs of layers of which each alone takes at most `memory` bytes. Raises WorkerError.

    Args:
        is_read: Parts are read into memory, not mapped.
    """
    needs = manifest.stage_needs.get(TRANSFORMERS, ())
    most = len(needs) or max(manifest.layers, 1)
    taken = 0
    for count in range(1, most + 1):
        if count == 1:
            cuts: Stages = ((0, manifest.layers),)
        elif needs:
            cuts = stages_with(needs, manifest.layers, count)
        else:
            cuts = even_stages(manifest.layers, count)
        views = [plan_view(manifest, Place(rank, stages=cuts)) for rank in range(count)]
        taken = max(memory_of_view(view, manifest, dtype=dtype, is_read=is_read) for view in views)
        if taken <= memory:
            return cuts
    raise WorkerError(
        f"this host has {memory:,} bytes of memory to spare, and even with {most} runs of layers, one after the other, "
        f"the largest takes {taken:,}; run the model on a larger host"
    )


def memory_of_view(view: View, manifest: Manifest, *, dtype: str | None = None, is_read: bool = False) -> int:
    """Bytes of memory that the tensors of a view take, beside what stays mapped.

    Args:
        dtype: What they are computed in; None: as they are stored.
        is_read: Parts are read into memory, not mapped.
    """
    wanted = _stored(dtype) if dtype is not None else None
    total = 0
    for name, tensor in view.tensors.items():
        stored = tensor.form.dtype
        is_cast = wanted is not None and stored in FLOATS and stored != wanted
        is_joined = len(tensor.takes) != 1 or tensor.stripes[0].count != 1
        is_fused = manifest.tensors[name].expert is not None  # transformers stacks the experts of a layer
        if is_cast and wanted is not None:
            total += math.prod(tensor.shape) * dtypes.BITS[wanted] // 8
        if is_read or ((is_joined or is_fused) and not is_cast):
            total += tensor.nbytes
    return total


def _stored(dtype: str) -> str:
    """Our name of torch's dtype. Raises InputError."""
    for name, torch_name in dtypes.TORCH.items():
        if torch_name == dtype and name in FLOATS:
            return name
    raise InputError(f"dtype is {quote(dtype)}; write float32, bfloat16 or float16")


def dtype_of(folder: Path) -> str | None:
    """The dtype that a config.json asks for, as `build_stage` understands it."""
    with contextlib.suppress(OSError, ValueError):  # whoever builds says what is wrong with it
        config = json.loads((folder / "config.json").read_text())
        for fields in (config, config.get("text_config") or {}):
            found = fields.get("dtype") or fields.get("torch_dtype")
            if isinstance(found, str):
                return found if found in dtypes.TORCH.values() else None
    return "float32"


def free_memory() -> int:
    """Bytes that this host gives without pushing others out, or this container where it has less."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            break
    else:
        raise WorkerError(f"{MEMINFO} does not say how much memory is available; pass memory=")
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        found = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(found.get("inactive_file", 0))))
    return free
