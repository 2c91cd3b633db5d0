#!/usr/bin/env python3
"""Measure shardprep split, from .bin in one pass, beside cp of the same bytes and the recipes that people write.

    .venv/bin/python benchmarks/split.py --size 2GiB

A recipe that starts from safetensors is given the checkpoint in that format; converting it is not counted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import benchlib
from benchlib import SHARDPREP, Goal, Variant, middle

if TYPE_CHECKING:
    import torch

OURS = "shardprep split"
LOAD = "torch.load + chunk + save_file"
ROWWISE = ("o_proj.weight", "down_proj.weight")


def dim_of(name: str) -> int | None:
    """The dim along which a Llama's tensor is shared by tensor ranks; None: each has all of it."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(ROWWISE) else 0


def save_chunks(tensors: Mapping[str, torch.Tensor], grain: int, out: Path, stem: str) -> None:
    """One file per rank, of its blocks."""
    from safetensors.torch import save_file

    for rank in range(grain):
        own = {}
        for name, tensor in tensors.items():
            dim = dim_of(name)
            own[name] = tensor if dim is None else tensor.chunk(grain, dim)[rank].contiguous()
        save_file(own, out / f"rank-{rank}-{stem}.safetensors", metadata={"format": "pt"})


def from_pickle(source: str, out: str, grain: str, mapped: str) -> None:
    import torch
    from safetensors.torch import save_file  # noqa: F401 - imported before the clock runs

    benchlib.ready()
    for file in sorted(Path(source).glob("*.bin")):
        tensors = torch.load(file, weights_only=True, mmap=mapped == "mmap", map_location="cpu")
        save_chunks(tensors, int(grain), Path(out), file.stem)
        del tensors


def from_safetensors(source: str, out: str, grain: str) -> None:
    from safetensors.torch import load_file

    benchlib.ready()
    for file in sorted(Path(source).glob("*.safetensors")):
        save_chunks(load_file(file), int(grain), Path(out), file.stem)


def by_slices(source: str, out: str, grain: str) -> None:
    """safe_open + get_slice: reads what a rank needs, holds one rank at a time."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    benchlib.ready()
    files: list[Any] = [
        safe_open(file, framework="pt") for file in sorted(Path(source).glob("*.safetensors"))
    ]
    for rank in range(int(grain)):
        own = {}
        for file in files:
            for name in file.keys():  # noqa: SIM118 - no mapping
                dim, stored = dim_of(name), file.get_slice(name)
                if dim is None:
                    own[name] = stored[:]
                    continue
                width = stored.get_shape()[dim] // int(grain)
                block = slice(rank * width, (rank + 1) * width)
                own[name] = stored[block] if dim == 0 else stored[:, block].contiguous()
        save_file(own, Path(out) / f"rank-{rank}.safetensors", metadata={"format": "pt"})


def variants(checkpoint: Path, safetensors: Path, out: Path, grain: int) -> list[Variant]:
    files = sorted(checkpoint.glob("*.bin"))
    others = tuple(sorted(safetensors.glob("*.safetensors")))
    size = sum(file.stat().st_size for file in files)
    ours = ("split", str(checkpoint), str(out), "--tensor-parallel-size", str(grain))
    pickled = {
        "cp": ("cp", *map(str, files), str(out)),
        "cp + sync": benchlib.cp_and_sync(files, out),
        OURS: (str(SHARDPREP), *ours),
        f"{OURS}, fsync left out": (*benchlib.WITHOUT_FSYNC, *ours),
        "torch.load(mmap) + chunk + save_file": benchlib.peer("from_pickle", checkpoint, out, grain, "mmap"),
        LOAD: benchlib.peer("from_pickle", checkpoint, out, grain, "read"),
    }
    stored = {
        "get_slice + save_file": benchlib.peer("by_slices", safetensors, out, grain),
        "load_file + chunk + save_file": benchlib.peer("from_safetensors", safetensors, out, grain),
    }
    return [
        *(
            Variant(name, words, tuple(files), out, primes=max(2 * size, 2**31))
            for name, words in pickled.items()
        ),
        *(Variant(name, words, others, out, primes=max(2 * size, 2**31)) for name, words in stored.items()),
    ]


def main() -> None:
    if benchlib.run_peer(
        {"from_pickle": from_pickle, "from_safetensors": from_safetensors, "by_slices": by_slices}
    ):
        return
    chosen = benchlib.options(
        __doc__, extra=lambda parser: parser.add_argument("--grain", type=int, default=8, help="default: 8")
    )
    with benchlib.workspace(chosen) as work:
        checkpoint = chosen.checkpoint or benchlib.make_checkpoint(chosen, work / "checkpoint")
        safetensors = work / "safetensors"
        benchlib.run_once(SHARDPREP, "convert", checkpoint, safetensors, "--max-part-size", "1GB")
        words = ("split", checkpoint, work / "first", "--tensor-parallel-size", str(chosen.grain))
        if benchlib.imports_torch(SHARDPREP, *words):
            sys.exit("shardprep split imports torch")
        shutil.rmtree(work / "first")
        all_variants = variants(checkpoint, safetensors, work / "out", chosen.grain)
        found = benchlib.compare_states(all_variants, chosen)
        size = sum(file.stat().st_size for file in all_variants[0].reads)

    goals = []
    for state, runs in found.items():
        seconds = {name: middle(each, lambda run: run.seconds) for name, each in runs.items()}
        best = min(value for name, value in seconds.items() if "save_file" in name)
        goals += [
            Goal(
                f"{state}: split / cp", seconds[OURS] / seconds["cp"], 2.0, 1.1 if state == "warm" else 1.35
            ),
            Goal(f"{state}: split / (cp + sync)", seconds[OURS] / seconds["cp + sync"], 2.0, 1.1),
            Goal(f"{state}: split / ({LOAD})", seconds[OURS] / seconds[LOAD], 0.35, 0.2),
            Goal(f"{state}: split / the best recipe", seconds[OURS] / best, 1.0, 0.3),
            benchlib.memory_goal(state, runs[OURS], limit=512, aim=16),
        ]
    sections = [
        (f"{state} page cache", benchlib.of_commands(runs, ours=OURS)) for state, runs in found.items()
    ]
    about = (
        f"split {size / 1e9:.2f} GB of .bin at grain {chosen.grain}: whole commands, interpreter and imports included; "
        "split imports no torch, checks every crc32, writes a blake3 digest of every block and ends on disk (fsync)"
    )
    benchlib.publish(chosen, about, sections, goals, found)


if __name__ == "__main__":
    main()
