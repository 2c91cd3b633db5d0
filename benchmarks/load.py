#!/usr/bin/env python3
"""Measure how one rank gets its own shard: shardprep's load beside safetensors, torch.load and torch's DCP.

    .venv/bin/python benchmarks/load.py --size 2GiB

Times begin when a process has imported what it needs: `exist` is until every tensor is there, `touched` until every
byte of them was copied once into 8 MiB of hot memory, as an upload to a device would. load_file is given a file
that holds exactly this rank's tensors, which is its best case; somebody has to have made it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import benchlib
from benchlib import MIB, SHARDPREP, Goal, Run, Variant, middle

if TYPE_CHECKING:
    import torch

GRAIN = 8
RANK = 1
SCRATCH = 8 * MIB
BLOCK = 16 * MIB
DIGEST = "blake3 of memory, the same threads"


# ------------------------------------------------------------------------------------------------------------- peers
def clock(load: Callable[[], Iterable[torch.Tensor]]) -> None:
    """Load, touch, and report both. Everything is imported by now."""
    import torch

    scratch = torch.ones(SCRATCH, dtype=torch.uint8)
    benchlib.ready()
    before, held = benchlib.counters(), benchlib.anonymous()
    began = time.perf_counter()
    tensors = list(load())
    exist = time.perf_counter() - began
    torch.set_num_threads(1)  # as an upload has one; two that wait for each other measure who else is running
    nbytes = sum(_touch(tensor, scratch) for tensor in tensors)
    touched = time.perf_counter() - began
    after = benchlib.counters()
    benchlib.report(
        exist_ms=exist * 1e3,
        touched_ms=touched * 1e3,
        anon_mib=(benchlib.anonymous() - held) / MIB,
        disk_mb=(after["read_bytes"] - before["read_bytes"]) / 1e6,
        rchar_mb=(after["rchar"] - before["rchar"]) / 1e6,
        mb=nbytes / 1e6,
        tensors=len(tensors),
    )


def _touch(tensor: torch.Tensor, scratch: torch.Tensor) -> int:
    """Copy all of it through `scratch`, in blocks of rows."""
    rows = tensor.view(1, -1) if tensor.ndim < 2 else tensor
    count = max(1, SCRATCH // (rows[0].numel() * rows.itemsize))
    for block in rows.split(count):  # type: ignore[no-untyped-call]
        scratch[: block.nbytes].view(block.dtype).view(block.shape).copy_(block)
    return tensor.nbytes


def ours(folder: str, size: str, verify: str) -> None:
    import torch  # noqa: F401

    from shardprep_runtime import load

    if verify == "blocks":
        import blake3  # noqa: F401

    def run() -> Iterable[torch.Tensor]:
        shard = load(folder, rank=RANK, tensor_parallel_size=int(size), verify=verify)  # type: ignore[arg-type]
        return [shard[name] for name in shard]

    clock(run)


def own_file(file: str) -> None:
    from safetensors.torch import load_file

    clock(lambda: load_file(file).values())


def whole_pickle(folder: str, spec: str) -> None:
    """torch.load(mmap=True) of every file, narrowed to what is this rank's."""
    import torch

    wanted = json.loads(Path(spec).read_text())

    def run() -> Iterable[torch.Tensor]:
        for file in sorted(Path(folder).glob("*.bin")):
            for name, tensor in torch.load(file, mmap=True, weights_only=True).items():
                dim, start, length = wanted[name]["cut"]
                yield tensor if dim is None else tensor.narrow(dim, start, length)

    clock(run)


def slices(folder: str, spec: str) -> None:
    """safe_open + get_slice of every file: what engines do with an ordinary checkpoint."""
    from safetensors import safe_open

    wanted = json.loads(Path(spec).read_text())

    def run() -> Iterable[torch.Tensor]:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    dim, start, length = wanted[name]["cut"]
                    stored, block = file.get_slice(name), slice(start, start + length)
                    yield stored[:] if dim is None else stored[block] if dim == 0 else stored[:, block]

    clock(run)


def dcp(folder: str, spec: str) -> None:
    """torch.distributed.checkpoint on our folder, as it is, without a process group: a planner asks for the blocks."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import LoadPlan
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
    from torch.distributed.checkpoint.state_dict_loader import load

    wanted = json.loads(Path(spec).read_text())

    class Planner(DefaultLoadPlanner):
        def create_local_plan(self) -> LoadPlan:
            assert self.metadata is not None
            items = []
            for name, tensor in self.state_dict.items():
                dim, start, _ = wanted[name]["cut"]
                offsets = [start if i == dim else 0 for i in range(tensor.ndim)]
                own = ChunkStorageMetadata(torch.Size(offsets), tensor.size())
                stored = self.metadata.state_dict_metadata[name]
                assert isinstance(stored, TensorStorageMetadata)
                items += create_read_items_for_chunk_list(name, stored, [own])
            return LoadPlan(items)

        def lookup_tensor(self, index: Any) -> torch.Tensor:
            return self.state_dict[index.fqn]

    def run() -> Iterable[torch.Tensor]:
        state = {
            name: torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
            for name, tensor in wanted.items()
        }
        load(state, storage_reader=HuggingFaceStorageReader(folder), planner=Planner(), no_dist=True)
        return state.values()

    clock(run)


def digest(size: str, threads: str) -> None:
    """blake3 by itself: memory that is there and hot, in blocks of 16 MiB."""
    from blake3 import blake3

    nbytes = int(size)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    for start in range(0, nbytes, BLOCK):
        view[start : start + BLOCK] = bytes(range(256)) * (len(view[start : start + BLOCK]) // 256) + bytes(
            len(view[start : start + BLOCK]) % 256
        )
    benchlib.ready()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with ThreadPoolExecutor(int(threads)) as pool:
            list(pool.map(lambda at: blake3(view[at : at + BLOCK]).hexdigest(), range(0, nbytes, BLOCK)))
        seconds.append(time.perf_counter() - began)
    benchlib.report(exist_ms=median(seconds) * 1e3, mb=nbytes / 1e6)


# -------------------------------------------------------------------------------------------------------- preparation
def describe(folder: str, size: str, spec: str, file: str) -> None:
    """Write down what rank RANK of `size` holds, and give load_file a file of exactly that."""
    from safetensors.torch import save_file

    from shardprep_runtime import load

    shard = load(folder, rank=RANK, tensor_parallel_size=int(size))
    found = {}
    for name, view in shard.view.tensors.items():
        dim, takes, tensor = view.form.layout.dim, view.takes, shard[name]
        start = takes[0].piece.start + takes[0].start
        length = 0 if dim is None else view.shape[dim]
        if dim is not None and takes[-1].piece.start + takes[-1].stop != start + length:
            sys.exit(f"{name}: not one block; this benchmark knows Llamas")
        found[name] = {
            "cut": [dim, start, length],
            "shape": view.shape,
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    Path(spec).write_text(json.dumps(found))
    save_file({name: shard[name].clone() for name in found}, file, metadata={"format": "pt"})


PEERS = {each.__name__: each for each in (ours, own_file, whole_pickle, slices, dcp, digest, describe)}


def split(checkpoint: Path, out: Path) -> Path:
    benchlib.run_once(SHARDPREP, "split", checkpoint, out, "--tensor-parallel-size", str(GRAIN))
    return out


def files_of(folder: Path, ending: str) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob(f"*{ending}")))


def variants(work: Path, checkpoint: Path, size: int) -> list[Variant]:
    """The ways to get the shard of rank RANK of `size`."""
    spec, own = work / f"spec-{size}.json", work / f"own-{size}.safetensors"
    shards, stored = work / "shards", work / "safetensors"
    benchlib.run_once(*benchlib.peer("describe", shards, size, spec, own))
    nbytes = own.stat().st_size
    parts = files_of(shards, ".safetensors")
    found = [
        Variant(f"shardprep, verify={verify}", benchlib.peer("ours", shards, size, verify), parts)
        for verify in ("headers", "blocks")
    ]
    found += [
        Variant("load_file of its own file", benchlib.peer("own_file", own), (own,)),
        Variant("DCP, of shardprep's folder", benchlib.peer("dcp", shards, spec), parts),
        Variant(
            "torch.load(mmap) of the whole",
            benchlib.peer("whole_pickle", checkpoint, spec),
            files_of(checkpoint, ".bin"),
        ),
        Variant(
            "get_slice of the whole", benchlib.peer("slices", stored, spec), files_of(stored, ".safetensors")
        ),
    ]
    if size == GRAIN:
        small = files_of(work / "small-shards", ".safetensors")
        found.append(
            Variant(
                "shardprep, headers, a smaller model",
                benchlib.peer("ours", work / "small-shards", size, "headers"),
                small,
            )
        )
    threads = min(8, len(os.sched_getaffinity(0)))
    found.append(Variant(DIGEST, benchlib.peer("digest", nbytes, threads), ()))
    return [Variant(each.name, each.command, each.reads, primes=max(2 * nbytes, 2**31)) for each in found]


# ------------------------------------------------------------------------------------------------------------- output
def of_own(runs: Sequence[Run], key: str) -> float:
    return middle(runs, lambda run: run.own.get(key, 0.0))


def of_loads(found: dict[str, list[Run]]) -> str:
    rows = [
        (
            "",
            "MB",
            "tensors",
            "exist ms",
            "touched ms",
            "disk MB",
            "x need",
            "rchar MB",
            "anon MiB",
            "process s",
        )
    ]
    for name, runs in found.items():
        if name == DIGEST:
            rows.append(
                (name, f"{of_own(runs, 'mb'):.0f}", "-", f"{of_own(runs, 'exist_ms'):.1f}", *"------")
            )
            continue
        rows.append(
            (
                name,
                f"{of_own(runs, 'mb'):.0f}",
                f"{of_own(runs, 'tensors'):.0f}",
                f"{of_own(runs, 'exist_ms'):.1f}",
                f"{of_own(runs, 'touched_ms'):.1f}",
                f"{of_own(runs, 'disk_mb'):.0f}",
                f"{of_own(runs, 'disk_mb') / of_own(runs, 'mb'):.2f}",
                f"{of_own(runs, 'rchar_mb'):.1f}",
                f"{of_own(runs, 'anon_mib'):.1f}",
                f"{middle(runs, lambda run: run.seconds):.2f}",
            )
        )
    return benchlib.table(rows)


def goals_of(label: str, found: dict[str, list[Run]], *, size: int, cold: bool) -> list[Goal]:
    headers, blocks = found["shardprep, verify=headers"], found["shardprep, verify=blocks"]
    peer = found["load_file of its own file"]
    touched, exist = of_own(headers, "touched_ms"), of_own(headers, "exist_ms")
    goals = [
        Goal(f"{label}: headers / load_file, touched", touched / of_own(peer, "touched_ms"), 1.1, 0.75),
    ]
    if size == GRAIN:
        goals.append(Goal(f"{label}: tensors exist (headers)", exist, 50, 10, unit="ms"))
    if cold:
        need = of_own(headers, "mb")
        goals += [
            Goal(f"{label}: read from disk / kept (headers)", of_own(headers, "disk_mb") / need, 1.05, 1.02),
            Goal(f"{label}: read from disk / kept (blocks)", of_own(blocks, "disk_mb") / need, 1.05, 1.02),
        ]
    elif size == GRAIN:
        share = of_own(found[DIGEST], "exist_ms") / of_own(blocks, "exist_ms")
        goals.append(Goal(f"{label}: verify=blocks, of blake3's own speed", share, 0.8, 0.9, at_least=True))
        goals.append(
            Goal(f"{label}: anonymous memory (headers)", of_own(headers, "anon_mib"), 16, 2, unit="MiB")
        )
    return goals


def main() -> None:
    if benchlib.run_peer(PEERS):
        return
    chosen = benchlib.options(
        __doc__,
        extra=lambda parser: parser.add_argument(
            "--small-size", default="512MiB", help="of a second model, to see what the size decides"
        ),
    )
    found: dict[str, dict[str, list[Run]]] = {}
    goals: list[Goal] = []
    with benchlib.workspace(chosen) as work:
        checkpoint = chosen.checkpoint or benchlib.make_checkpoint(chosen, work / "checkpoint")
        benchlib.run_once(SHARDPREP, "convert", checkpoint, work / "safetensors", "--max-part-size", "1GB")
        split(checkpoint, work / "shards")
        split(benchlib.make_checkpoint(chosen, work / "small", size=chosen.small_size), work / "small-shards")
        for size in (GRAIN, GRAIN // 2):
            those = variants(work, checkpoint, size)
            for cold in chosen.states:
                label = f"TP {size}, {'cold' if cold else 'warm'}"
                found[label] = benchlib.compare(those, rounds=chosen.rounds, cold=cold, say=benchlib.say)
                goals += goals_of(label, found[label], size=size, cold=cold)
        nbytes = sum(file.stat().st_size for file in files_of(checkpoint, ".bin"))
    about = (
        f"one rank's shard of {nbytes / 1e9:.2f} GB split at grain {GRAIN}: exist = all tensors there, touched = and "
        "every byte copied once; imports are not in either, but in process s; anon = added by loading and touching"
    )
    benchlib.publish(chosen, about, [(label, of_loads(runs)) for label, runs in found.items()], goals, found)


if __name__ == "__main__":
    main()
