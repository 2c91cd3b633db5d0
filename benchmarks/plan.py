#!/usr/bin/env python3
"""Measure planning alone: cutting DeepSeek-V3's 91,000 tensors at grain 8, and what a worker does before it has tensors.

    .venv/bin/python benchmarks/plan.py

The index is synthetic: names, dtypes and shapes of the published checkpoint (fp8 with a scale for each block of 128 x 128,
a layer that predicts a second token behind the last), no data. Each step runs in a process of its own. The whole command
`split --dry-run` reads a checkpoint of 163 files whose data are holes: bf16, with twice the experts at half the width, so
that there are as many tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import benchlib
from benchlib import MIB, Goal, Variant
from shardprep.files import LocalFolder
from shardprep.index import Extent, Index, Tensor
from shardprep.layout import ModelLayout, Placed
from shardprep.split import DEFAULT_PART_BYTES
from shardprep.write.plan import Plan, plan_split
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.cut import WHOLE, Layout, Segment
from shardprep_runtime.format.dtypes import nbytes
from shardprep_runtime.format.header import dump_header
from shardprep_runtime.format.manifest import Entry, Manifest, Part
from shardprep_runtime.format.read_manifest import parse_manifest
from shardprep_runtime.format.view import Place, View, plan_view
from shardprep_runtime.format.write_manifest import dump_manifest
from shardprep_runtime.shard.shard_set import ShardSet

GRAIN = 8
STAGES = 8
RANK = STAGES // 2 * GRAIN + 3
LAYERS, DENSE, EXPERTS = 61, 3, 256
HIDDEN, HEADS, VOCABULARY = 7168, 128, 129280
QUERY_RANK, KV_RANK, NOPE, ROPE, VALUE = 1536, 512, 128, 64, 128
INTERMEDIATE, EXPERT = 18432, 2048
BLOCK = 128
FILES = 163

MODELS = {"DeepSeek-V3": (LAYERS, True), "its first ten layers": (10, False)}
"""Name -> layers, and whether the layer behind the last is there."""


# ------------------------------------------------------------------------------------------------ the synthetic index


def tensors_of(
    layers: int, *, more: bool, experts: int = EXPERTS
) -> Iterator[tuple[str, str, tuple[int, ...], Placed]]:
    """(name, dtype, shape, how it is cut) of each tensor of a DeepSeek-V3 of so many layers."""
    rows = Segment(VOCABULARY, VOCABULARY, uneven=True)
    padded = Segment(VOCABULARY, VOCABULARY, uneven=True, multiple=64)
    vocabulary = Layout(0, (rows,)), (("vllm", Layout(0, (padded,))),)
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN), Placed("first", *vocabulary)
    for number in range(layers + more):
        layer: int | str = number if number < layers else "last"
        stem = f"model.layers.{number}"
        for name, dtype, shape, layout, expert in layer_of(stem, experts, dense=number < DENSE):
            yield name, dtype, shape, Placed(layer, layout, expert=expert)
        if number == layers:
            for word in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
                yield f"{stem}.{word}", "BF16", (HIDDEN,), Placed("last", WHOLE)
            yield f"{stem}.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN), Placed("last", WHOLE)
            for word in ("embed_tokens.weight", "shared_head.head.weight"):
                yield f"{stem}.{word}", "BF16", (VOCABULARY, HIDDEN), Placed("last", *vocabulary)
    yield "model.norm.weight", "BF16", (HIDDEN,), Placed("last", WHOLE)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN), Placed("last", *vocabulary)


def layer_of(
    stem: str, experts: int, *, dense: bool
) -> Iterator[tuple[str, str, tuple[int, ...], Layout, int | None]]:
    head = NOPE + ROPE
    yield f"{stem}.input_layernorm.weight", "BF16", (HIDDEN,), WHOLE, None
    yield f"{stem}.post_attention_layernorm.weight", "BF16", (HIDDEN,), WHOLE, None
    yield f"{stem}.self_attn.q_a_layernorm.weight", "BF16", (QUERY_RANK,), WHOLE, None
    yield f"{stem}.self_attn.kv_a_layernorm.weight", "BF16", (KV_RANK,), WHOLE, None
    yield from quantized(f"{stem}.self_attn.q_a_proj", (QUERY_RANK, HIDDEN), None)
    yield from quantized(f"{stem}.self_attn.kv_a_proj_with_mqa", (KV_RANK + ROPE, HIDDEN), None)
    yield from quantized(f"{stem}.self_attn.q_b_proj", (HEADS * head, QUERY_RANK), 0)
    yield from quantized(f"{stem}.self_attn.kv_b_proj", (HEADS * (NOPE + VALUE), KV_RANK), 0)
    yield from quantized(f"{stem}.self_attn.o_proj", (HIDDEN, HEADS * VALUE), 1)
    if dense:
        yield from mlp(f"{stem}.mlp", INTERMEDIATE, None)
        return
    width = EXPERT * EXPERTS // experts
    yield f"{stem}.mlp.gate.weight", "BF16", (experts, HIDDEN), WHOLE, None
    yield f"{stem}.mlp.gate.e_score_correction_bias", "F32", (experts,), WHOLE, None
    yield from mlp(f"{stem}.mlp.shared_experts", width, None)
    for expert in range(experts):
        yield from mlp(f"{stem}.mlp.experts.{expert}", width, expert)


def mlp(
    stem: str, width: int, expert: int | None
) -> Iterator[tuple[str, str, tuple[int, ...], Layout, int | None]]:
    for name, shape, dim in (
        ("gate_proj", (width, HIDDEN), 0),
        ("up_proj", (width, HIDDEN), 0),
        ("down_proj", (HIDDEN, width), 1),
    ):
        for found in quantized(f"{stem}.{name}", shape, dim):
            yield *found[:4], expert


def quantized(
    stem: str, shape: tuple[int, int], dim: int | None
) -> Iterator[tuple[str, str, tuple[int, ...], Layout, int | None]]:
    """A weight in fp8 and the scales of its blocks, cut in blocks along `dim`."""
    scales = -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
    weight_layout = scale_layout = WHOLE
    if dim is not None:
        weight_layout = Layout(dim, (Segment(shape[dim], scales[dim]),))
        scale_layout = Layout(dim, (Segment(scales[dim], scales[dim]),))
    yield f"{stem}.weight", "F8_E4M3", shape, weight_layout, None
    yield f"{stem}.weight_scale_inv", "F32", scales, scale_layout, None


def made(model: str) -> tuple[Index, ModelLayout]:
    """The index of one of the MODELS, as if its tensors lay in one file, and their layouts."""
    layers, more = MODELS[model]
    tensors, placed, offset = {}, {}, 0
    layouts: dict[Layout, Layout] = {}  # one for all that are alike, as rules give it
    engines: dict[tuple[tuple[str, Layout], ...], tuple[tuple[str, Layout], ...]] = {}
    for name, dtype, shape, own in tensors_of(layers, more=more):
        tensors[name] = Tensor(name, dtype, shape, (Extent("model.safetensors", offset),))
        placed[name] = replace(
            own,
            layout=layouts.setdefault(own.layout, own.layout),
            engines=engines.setdefault(own.engines, own.engines),
        )
        offset += tensors[name].nbytes
    index = Index(LocalFolder(Path()), "safetensors", dict(sorted(tensors.items())), {}, ())
    layout = ModelLayout("deepseek_v3", layers, placed, {}, experts=EXPERTS)
    return index, layout


def make_checkpoint(folder: Path, model: str) -> None:
    """A checkpoint in bf16 with as many tensors as one of the MODELS, of which the headers alone take room."""
    layers, more = MODELS[model]
    forms = {
        name: ("BF16" if dtype == "F8_E4M3" else dtype, shape)
        for name, dtype, shape, _ in tensors_of(layers, more=more, experts=2 * EXPERTS)
        if not name.endswith("_scale_inv")
    }
    each = sum(nbytes(*form) for form in forms.values()) / FILES
    files: dict[int, list[str]] = {}
    end = 0
    for name, form in forms.items():
        files.setdefault(int(end / each), []).append(name)
        end += nbytes(*form)
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate(files.values()):
        path = f"model-{number + 1:05}-of-{len(files):06}.safetensors"
        header = dump_header({name: forms[name] for name in names}, {"format": "pt"})
        sparse(folder / path, header, len(header) + sum(nbytes(*forms[name]) for name in names))
        weight_map.update(dict.fromkeys(names, path))
    about = {"metadata": {"total_size": end}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": int(more),
        "n_routed_experts": 2 * EXPERTS,
        "first_k_dense_replace": DENSE,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": EXPERT // 2,
        "n_shared_experts": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": QUERY_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def sparse(path: Path, header: bytes, size: int) -> None:
    """A file of `size` bytes that are a hole behind the header."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


def manifest_of(index: Index, layout: ModelLayout, plan: Plan, digests: Mapping[str, str]) -> Manifest:
    """The manifest as split would write it; parts whose header has no digest here are not opened."""
    entries = {
        move.tensor.name: Entry(move.pieces[0].form, own.layer, own.expert)
        for move in plan.moves
        for own in [layout.tensors[move.tensor.name]]
    }
    parts = tuple(
        Part(
            part.path,
            part.size,
            part.header_size,
            digests.get(part.path, "sha256:" + "0" * 64),
            part.ranks,
            part.layers,
            part.placements,
        )
        for part in plan.parts
    )
    return Manifest(
        model={"architecture": "DeepseekV3ForCausalLM", "model_type": layout.model_type},
        layers=layout.layers,
        grain=GRAIN,
        stages=None,
        block_bytes=manifests.MAX_BLOCK_BYTES,
        tensors=entries,
        aliases={},
        tied={},
        parts=parts,
        side_files=(),
        experts=layout.experts,
        engines=layout.engines,
    )


# ------------------------------------------------------------------------------------------------ what is measured


def cut(model: str, file: str) -> dict[str, float]:
    """Plan the split; write its manifest to `file`, and the headers that the worker reads beside it."""
    index, layout = made(model)
    resident = resident_bytes()
    began, cpu = time.perf_counter(), time.process_time()
    plan = plan_split(
        index,
        layout,
        grain=GRAIN,
        stages=None,
        max_part_bytes=DEFAULT_PART_BYTES,
        block_bytes=manifests.MAX_BLOCK_BYTES,
    )
    found = {
        "plan_split s": time.perf_counter() - began,
        "plan_split CPU s": time.process_time() - cpu,
        "tensors": len(plan.moves),
        "pieces": sum(len(part.pieces) for part in plan.parts),
        "parts": len(plan.parts),
        "index MiB": resident / MIB,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    began = time.perf_counter()
    manifest = manifest_of(index, layout, plan, {})
    raw = dump_manifest(manifest)
    found["dump s"] = time.perf_counter() - began
    found["manifest MB"] = len(raw) / 1e6
    needed = {part.path for part in view_of(manifest).parts}
    digests = {}
    for part in plan.parts:
        if part.path in needed:
            header = plan.header(part, None)
            digests[part.path] = manifests.digest_of(header)
            sparse(Path(file).with_name(part.path), header, part.size)
    Path(file).write_bytes(dump_manifest(manifest_of(index, layout, plan, digests)))
    return found


def view_of(manifest: Manifest) -> View:
    """That of a rank in the middle."""
    return plan_view(
        manifest, Place(rank=RANK, tensor_parallel_size=GRAIN, pipeline_parallel_size=STAGES, engine="vllm")
    )


def headers(model: str, _: str) -> dict[str, float]:
    """Plan the split and make the header of every part, once."""
    index, layout = made(model)
    plan = plan_split(
        index,
        layout,
        grain=GRAIN,
        stages=None,
        max_part_bytes=DEFAULT_PART_BYTES,
        block_bytes=manifests.MAX_BLOCK_BYTES,
    )
    began = time.perf_counter()
    size = sum(len(plan.header(part, None)) for part in plan.parts)
    return {
        "headers s": time.perf_counter() - began,
        "headers MB": size / 1e6,
        "of the model": size / index.nbytes,
        "headers peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def worker(_: str, file: str) -> dict[str, float]:
    """What each worker does first: parse the manifest, and plan its own view. Then all of it, until it has a shard."""
    raw = Path(file).read_bytes()
    before = resident_bytes()
    began = time.perf_counter()
    manifest = parse_manifest(raw)
    parsed = time.perf_counter()
    view = view_of(manifest)
    ended = time.perf_counter()
    grown = resident_bytes() - before
    again = time.perf_counter()
    ShardSet(str(file), verify="headers", io="mmap").load(
        Place(rank=RANK, tensor_parallel_size=GRAIN, pipeline_parallel_size=STAGES, engine="vllm")
    ).close()
    loaded = time.perf_counter()
    return {
        "parse ms": (parsed - began) * 1000,
        "view ms": (ended - parsed) * 1000,
        "worker ms": (ended - began) * 1000,
        "worker MiB": grown / MIB,
        "view tensors": len(view.tensors),
        "view parts": len(view.parts),
        "load ms": (loaded - again) * 1000,
    }


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


STEPS: dict[str, Callable[[str, str], dict[str, float]]] = {"cut": cut, "headers": headers, "worker": worker}


def run(step: str, model: str, file: Path | str) -> dict[str, float]:
    """A step in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "step", step, model, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def dry_run(checkpoint: Path) -> dict[str, float]:
    """The whole command, on a checkpoint whose headers were just written or read."""
    command = (
        str(benchlib.SHARDPREP),
        "split",
        "--dry-run",
        "-tp",
        str(GRAIN),
        str(checkpoint),
        f"{checkpoint}-split",
    )
    found = benchlib.measure(Variant("split --dry-run", command, ()), cold=False)
    return {
        "dry run s": found.seconds,
        "dry run CPU s": found.cpu_seconds,
        "dry run peak MiB": found.resident / MIB,
    }


def measure(model: str, rounds: int) -> list[dict[str, float]]:
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        file = Path(folder) / "shardprep.json"
        checkpoint = Path(folder) / "checkpoint"
        make_checkpoint(checkpoint, model)
        for number in range(rounds):
            own = run("cut", model, file)
            own |= run("headers", model, "")
            own |= run("worker", model, file)
            own |= dry_run(checkpoint)
            benchlib.say(
                f"{model} {number + 1}/{rounds}: " + ", ".join(f"{k} {v:.4g}" for k, v in own.items())
            )
            found.append(own)
    return found


def middle(runs: Sequence[dict[str, float]], key: str) -> float:
    return median(each[key] for each in runs)


def main() -> None:
    if sys.argv[1:2] == ["step"]:
        print(json.dumps(STEPS[sys.argv[2]](sys.argv[3], sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each step (default: 5)")
    parser.add_argument(
        "--json", action="store_true", help="every run as JSON on stdout; the table to stderr"
    )
    chosen = parser.parse_args()
    found = {model: measure(model, chosen.rounds) for model in MODELS}
    out = sys.stderr if chosen.json else sys.stdout
    keys = list(dict.fromkeys(itertools.chain.from_iterable(runs[0] for runs in found.values())))
    rows = [["", *found], *([key, *(f"{middle(runs, key):,.4g}" for runs in found.values())] for key in keys)]
    print(f"\nplanning at grain {GRAIN}, no data; a worker of TP {GRAIN} x PP {STAGES}", file=out)
    print(
        f"command: {shlex.join(['benchmarks/plan.py', *sys.argv[1:]])}   commit: {benchlib.commit()}   "
        f"rounds: {chosen.rounds}, medians",
        file=out,
    )
    print("machine: " + ", ".join(f"{key} {value}" for key, value in benchlib.machine().items()), file=out)
    print("\n" + benchlib.table(rows), file=out)
    large = found["DeepSeek-V3"]
    for goal in (
        Goal("plan_split", middle(large, "plan_split s"), 5.0, unit="s"),
        Goal("peak memory of planning, index included", middle(large, "peak MiB"), 512, unit="MiB"),
        Goal("manifest", middle(large, "manifest MB"), 10.0, unit="MB"),
        Goal("a worker: parse and view", middle(large, "worker ms"), 150, unit="ms"),
        Goal("split --dry-run, the whole command", middle(large, "dry run s"), 5.0, unit="s"),
    ):
        print(goal.line(), file=out)
    if chosen.json:
        about: dict[str, Any] = {"commit": benchlib.commit(), "machine": benchlib.machine(), "runs": found}
        print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
