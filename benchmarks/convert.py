#!/usr/bin/env python3
"""Measure shardprep convert beside cp of the same bytes and torch's own recipes, as whole commands.

.venv/bin/python benchmarks/convert.py --size 2GiB
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import benchlib
from benchlib import SHARDPREP, Goal, Variant, middle

OURS = "shardprep convert"
LOAD = "torch.load(weights_only) + save_file"
MAPPED = "torch.load(mmap) + save_file"


def torch_recipe(source: str, out: str, mapped: str) -> None:
    """What people run: load each file, save it again."""
    import torch
    from safetensors.torch import save_file

    benchlib.ready()
    for file in sorted(Path(source).glob("*.bin")):
        tensors = torch.load(file, weights_only=True, mmap=mapped == "mmap", map_location="cpu")
        save_file(tensors, Path(out) / f"{file.stem}.safetensors", metadata={"format": "pt"})
        del tensors


def variants(checkpoint: Path, out: Path) -> list[Variant]:
    files = sorted(checkpoint.glob("*.bin"))
    size = sum(file.stat().st_size for file in files)
    words = {
        "cp": ("cp", *map(str, files), str(out)),
        "cp + sync": benchlib.cp_and_sync(files, out),
        OURS: (str(SHARDPREP), "convert", str(checkpoint), str(out)),
        f"{OURS}, fsync left out": (*benchlib.WITHOUT_FSYNC, "convert", str(checkpoint), str(out)),
        MAPPED: benchlib.peer("torch_recipe", checkpoint, out, "mmap"),
        LOAD: benchlib.peer("torch_recipe", checkpoint, out, "read"),
    }
    return [
        Variant(name, command, tuple(files), out, primes=max(2 * size, 2**31))
        for name, command in words.items()
    ]


def main() -> None:
    if benchlib.run_peer({"torch_recipe": torch_recipe}):
        return
    chosen = benchlib.options(__doc__)
    with benchlib.workspace(chosen) as work:
        checkpoint = chosen.checkpoint or benchlib.make_checkpoint(chosen, work / "checkpoint")
        if benchlib.imports_torch(SHARDPREP, "convert", checkpoint, work / "first"):
            sys.exit("shardprep convert imports torch")
        shutil.rmtree(work / "first")
        all_variants = variants(checkpoint, work / "out")
        found = benchlib.compare_states(all_variants, chosen)
        size = sum(file.stat().st_size for file in all_variants[0].reads)

    goals = []
    for state, runs in found.items():
        seconds = {name: middle(each, lambda run: run.seconds) for name, each in runs.items()}
        aim = 1.15 if state == "warm" else 1.25
        goals += [
            Goal(f"{state}: convert / cp", seconds[OURS] / seconds["cp"], 1.3, aim),
            Goal(f"{state}: convert / (cp + sync)", seconds[OURS] / seconds["cp + sync"], 1.3, 1.0),
            Goal(f"{state}: convert / ({LOAD})", seconds[OURS] / seconds[LOAD], 0.35, 0.2),
            benchlib.memory_goal(state, runs[OURS], limit=128, aim=16),
        ]
    sections = [
        (f"{state} page cache", benchlib.of_commands(runs, ours=OURS)) for state, runs in found.items()
    ]
    about = (
        f"convert {size / 1e9:.2f} GB of .bin to safetensors: whole commands, interpreter and imports included; "
        "convert imports no torch, checks every crc32 and ends on disk (fsync)"
    )
    benchlib.publish(chosen, about, sections, goals, found)


if __name__ == "__main__":
    main()
