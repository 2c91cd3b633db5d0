#!/usr/bin/env python3
"""Compare what `shardprep quantize` makes with the library's plain API and with rounding, on a checkpoint that was trained.

    .venv/bin/python benchmarks/quantize.py
    .venv/bin/python benchmarks/quantize.py --methods gptq --groups 128 --samples 64

Each way of quantizing runs in a process of its own, on the same token ids and with the same seed; what each wrote is
measured by the same code, on the same held-out text. Library: GPTQModel as its README uses it. Its best settings: GPTQ
with act-order, which vLLM refuses, and with a search for the scale of least squared error; AWQ in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shardprep.convert import convert
from shardprep.layout import Scheme
from shardprep.quantize.calibration import Tokens, read_calibration, read_heldout, write_tokens
from shardprep.quantize.quality import Quality, measure
from shardprep.source import open_source, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

LIBRARY = """
import json, random, sys
source, out, ids, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
import numpy, torch
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
dtype = getattr(torch, settings.pop("dtype"))
method = settings["method"]
model = GPTQModel.load(source, QuantizeConfig(**settings), dtype=dtype)
sequences = [{"input_ids": each, "attention_mask": [1] * len(each)} for each in map(json.loads, open(ids))]
options = {"backend": BACKEND.AWQ_TORCH} if method == "awq" else {}
model.quantize(sequences, batch_size=8, calibration_data_min_length=2, **options)
model.save(out)
"""


def main() -> None:
    chosen = _options()
    with tempfile.TemporaryDirectory(dir=chosen.scratch, prefix="bench-quantize-") as scratch:
        folder = Path(scratch)
        source = folder / "source"
        convert(chosen.checkpoint, source)
        ids = read_calibration(
            chosen.calibration, source, samples=chosen.samples, length=chosen.length, seed=0
        )
        write_tokens(ids, folder / "ids.jsonl")
        heldout = read_heldout(chosen.heldout, source, length=chosen.length)
        rows = []
        for method in chosen.methods:
            for group in chosen.groups:
                rows += _compare(method, group, source, folder, chosen, heldout)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {ids.count:,} tokens"
    )
    print(f"of calibration, {heldout.count:,} held-out tokens; {' '.join(sys.argv)}\n")
    print("| | seconds | CPU | perplexity | KL | of rounding | same first choice |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _compare(
    method: str, group: int, source: Path, folder: Path, chosen: argparse.Namespace, heldout: Tokens
) -> list[tuple[str, ...]]:
    """A row for each way."""
    out = folder / "out"
    asked = ["--method", method, "--group-size", str(group), "--samples", str(chosen.samples)]
    asked += ["--sequence-length", str(chosen.length), "--no-evaluate"]
    asked += ["--calibration", str(chosen.calibration)] if chosen.calibration else []
    shardprep = str(Path(sys.executable).with_name("shardprep"))
    ways: dict[str, Callable[[], Mapping[str, float]]] = {
        "**shardprep quantize**": lambda: _timed(
            folder, [shardprep, "quantize", str(source), str(out), *asked]
        )
    }
    for name, settings in _settings(method, group).items():
        command = [sys.executable, "-c", LIBRARY, str(source), str(out), str(folder / "ids.jsonl")]
        ways[name] = partial(_timed, folder, [*command, json.dumps(settings)])
    ways["round to nearest"] = lambda: _round(source, out, method, group)
    found: dict[str, tuple[Quality, Mapping[str, float]]] = {}
    for name, way in ways.items():
        spent = way()
        with open_source(source) as before, open_source(out) as after:
            quality = measure(read_checkpoint(before), read_checkpoint(after), heldout.sequences)
        found[name] = quality, spent
        shutil.rmtree(out)
        print(f"{method} {group} {name}: KL {quality.kl:.6f}", file=sys.stderr, flush=True)
    least = found["round to nearest"][0].kl
    first = next(iter(found.values()))[0].perplexity_before
    rows: list[tuple[str, ...]] = [
        (f"{method}, group {group}: the original", "", "", f"{first:.3f}", "", "", "")
    ]
    for name, (quality, spent) in found.items():
        rows.append(
            (
                name,
                *(f"{spent[key]:.0f}" if key in spent else "" for key in ("wall", "cpu")),
                f"{quality.perplexity:.3f}",
                f"{quality.kl:.6f}",
                f"{quality.kl / least:.2f} x",
                f"{quality.agreement:.2%}",
            )
        )
    return rows


def _settings(method: str, group: int) -> dict[str, dict[str, Any]]:
    """Ways of using the library."""
    plain: dict[str, Any] = {"bits": 4, "group_size": group, "method": method, "device": "cpu"}
    if method == "gptq":
        own = {**plain, "sym": True, "desc_act": False, "dtype": "bfloat16"}
        return {
            "library, the same settings": own,
            "library, act-order": {**own, "desc_act": True, "act_group_aware": False},
            "library, least squared error": {**own, "mse": 2.4},
        }
    own = {**plain, "format": "gemm", "sym": False, "dtype": "float16"}
    return {"library, the same settings": own, "library, in bfloat16": {**own, "dtype": "bfloat16"}}


def _timed(folder: Path, command: list[str]) -> dict[str, float]:
    """Run a command, where it may leave what it likes; the time it took, by the clock and of the CPU."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_OFFLINE": "1"}
    if (os.cpu_count() or 1) < 4:
        env["GPTQMODEL_CPU_WORKERS"] = "2"  # it asks two threads of a pool that has one otherwise
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode("utf-8", "replace")[-4000:])
    return {
        "wall": time.perf_counter() - started,
        "cpu": usage.ru_utime + usage.ru_stime,
    }


def _round(source: Path, out: Path, method: str, group: int) -> dict[str, float]:
    from quantized_models import write_quantized

    write_quantized(source, out, Scheme(method, 4, group, symmetric=method == "gptq"))
    return {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = ROOT / "tests" / "data" / "tiny-llama"
    parser.add_argument("--checkpoint", type=Path, default=data)
    parser.add_argument("--heldout", type=Path, default=data / "heldout.txt")
    parser.add_argument("--calibration", type=Path, help="text; the built-in one if not given")
    parser.add_argument("--methods", nargs="+", choices=["gptq", "awq"], default=["gptq", "awq"])
    parser.add_argument("--groups", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scratch", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
