#!/usr/bin/env python3
"""Measure what splitting a model over workers costs: a token's time by transport and number of stages, and where it goes.

    .venv/bin/python benchmarks/workers.py --rounds 7
    .venv/bin/python benchmarks/workers.py --only tokens,overlap --ray

tokens    one sequence: transformers' generate in one process, our stage in one process, PP 2 and 3 by transport, TP 2
hops      what a step costs beside the stages' compute, by bytes of hidden states, against raw TCP in the same run
overlap   PP 2 with 1, 2 and 4 sequences in flight

A random Llama of 22 million parameters in float32 (6 layers, hidden size 512), one thread a process, all on this host.
Every variant's workers run from the start and wait for their turn; rounds are interleaved. All tokens are compared with
transformers' own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import benchlib
from benchlib import Goal
from shardprep_runtime.workers.launch import Launch, launch
from shardprep_runtime.workers.launchers.words import LAUNCHERS
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.text.breakdown import Breakdown
from shardprep_runtime.workers.text.breakdown import table as where_it_goes
from shardprep_runtime.workers.text.generate import Generator, Sampling
from shardprep_runtime.workers.worker import Compute

HIDDEN, VOCABULARY = 512, 4096
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
PROMPT = list(range(3, 27))
TOKENS = 48
BATCHES = (1, 8, 64)
ROUND_TRIPS = 200
ONE = "transformers' generate, one process"
TASKS = ("tokens", "hops", "overlap")

ECHO = """
import socket, sys
size = int(sys.argv[1])
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(size)
    with peer:
        while True:
            got = 0
            while got < size:
                count = peer.recv_into(memoryview(buffer)[got:])
                if not count:
                    sys.exit()
                got += count
            peer.sendall(buffer)
"""


def make_model(work: Path) -> tuple[Path, Any]:
    """The shard set, and the model as transformers has it."""
    from transformers import AutoModelForCausalLM

    from shardprep.model import skeleton

    model: Any = skeleton.build(CONFIG)
    model.save_pretrained(work / "checkpoint")
    split = [
        str(benchlib.SHARDPREP),
        "split",
        str(work / "checkpoint"),
        str(work / "shards"),
        "-tp",
        "2",
        "--json",
    ]
    subprocess.run(split, check=True, stdout=subprocess.DEVNULL)
    with skeleton.quiet():
        return work / "shards", AutoModelForCausalLM.from_pretrained(work / "checkpoint")


def generate_alone(model: Any, tokens: int) -> tuple[list[int], list[float]]:
    """transformers' own loop; its tokens and the seconds of each but the first."""
    import torch

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    given = torch.tensor([PROMPT])
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        streamer=clock,
    )
    times = clock.times[1:]  # the first is the prompt
    return found[0, len(PROMPT) :].tolist(), [b - a for a, b in itertools.pairwise(times)]


def generate_split(generator: Generator, tokens: int) -> tuple[list[int], list[float], list[Breakdown]]:
    ids, times, breakdowns = [], [], []
    for token in generator.stream(PROMPT, Sampling(max_tokens=tokens, ignore_eos=True)):
        ids.append(token.id)
        times.append(time.perf_counter())
        if token.breakdown is not None:
            breakdowns.append(token.breakdown)
    return ids, [b - a for a, b in itertools.pairwise(times)], breakdowns


def start(stack: ExitStack, shards: Path, transport: str, **options: Any) -> Launch:
    return stack.enter_context(
        launch(
            shards,
            launcher=LAUNCHERS[transport],
            compute=Compute(threads=1),
            policy=Policy(fallback=False, probe_period=0),
            **options,
        )
    )


def tokens(options: argparse.Namespace, shards: Path, model: Any, say: Callable[[str], None]) -> Any:
    """One sequence, by transport and number of stages. A process is in one group of RPC at a time, hence two runs."""
    two: dict[str, dict[str, Any]] = {
        "our stage, one process": {"stages": 1, "transport": "local"},
        "PP 2, threads of one process": {"stages": 2, "transport": "local"},
        "PP 2, links": {"stages": 2, "transport": "links"},
        "PP 2, rpc": {"stages": 2, "transport": "rpc"},
        "TP 2, links": {"stages": 1, "transport": "links", "tensor_parallel_size": 2},
    }
    if options.ray:
        two["PP 2, ray"] = {"stages": 2, "transport": "ray"}
    three: dict[str, dict[str, Any]] = {
        "PP 3, links": {"stages": 3, "transport": "links"},
        "PP 3, rpc": {"stages": 3, "transport": "rpc"},
    }
    right, _ = generate_alone(model, TOKENS)
    rows = [("token by token", "p50 ms", "p10 ms", "x one process", "more ms")]
    every: dict[str, list[float]] = {}
    went: dict[str, list[Breakdown]] = {}
    for grids in (two, three):
        found: dict[str, list[float]] = {name: [] for name in (ONE, *grids)}
        with ExitStack() as stack:
            generators = {
                name: Generator(start(stack, shards, **grid).pipeline) for name, grid in grids.items()
            }
            for number in range(options.rounds + 1):
                alone = generate_alone(model, TOKENS)[1]
                for name, generator in generators.items():
                    ids, seconds, breakdowns = generate_split(generator, TOKENS)
                    if ids != right:
                        sys.exit(f"{name}: its tokens are not those of transformers")
                    if number:  # the first warms
                        found[name] += seconds
                        went.setdefault(name, []).extend(breakdowns)
                if number:
                    found[ONE] += alone
        base = median(found[ONE])
        for name, seconds in found.items():
            p50, p10 = median(seconds), sorted(seconds)[len(seconds) // 10]
            rows.append(
                (
                    name,
                    f"{1000 * p50:.2f}",
                    f"{1000 * p10:.2f}",
                    f"{p50 / base:.2f}",
                    f"{1000 * (p50 - base):.2f}",
                )
            )
            every.setdefault(name, []).extend(seconds)
    say(f"all tokens are transformers' own\n{benchlib.table(rows)}")
    for name in ("PP 2, links", "PP 2, rpc", *(["PP 2, ray"] if options.ray else [])):
        say(f"\n{name}\n{where_it_goes(went[name])}")
    return every


def hops(options: argparse.Namespace, shards: Path, model: Any, say: Callable[[str], None]) -> Any:
    """What is left of a step's time without the stages' compute."""
    import torch

    found: dict[tuple[str, int], list[float]] = {}
    transports = ["links", "rpc", *(["ray"] if options.ray else [])]
    with ExitStack() as stack:
        running = {name: start(stack, shards, stages=2, transport=name) for name in transports}
        for _ in range(options.rounds):
            for batch in BATCHES:
                size = batch * HIDDEN * 4
                found.setdefault(("raw TCP, round trip", batch), []).extend(raw_round_trips(size))
                for name, each in running.items():
                    with each.pipeline.sequence() as sequence:
                        sequence.feed(torch.tensor([PROMPT] * batch))
                        for _ in range(ROUND_TRIPS // 8):
                            sequence.feed(torch.zeros(batch, 1, dtype=torch.int64))
                            assert sequence.output is not None
                            compute = sum(timing.compute for timing in sequence.output.timings)
                            found.setdefault((name, batch), []).append(sequence.seconds - compute)
    bandwidth = raw_bandwidth()
    rows = [("beside compute, ms", *(f"{batch * HIDDEN * 4 // 1024} KiB" for batch in BATCHES))]
    for name in ("raw TCP, round trip", *transports):
        rows.append(
            (
                f"{name}" if "raw" in name else f"PP 2, {name}",
                *(f"{1000 * median(found[name, b]):.3f}" for b in BATCHES),
            )
        )
    say(f"raw TCP on loopback: {bandwidth / 1e9:.2f} GB/s\n{benchlib.table(rows)}")
    for batch in BATCHES:
        # hidden states once; logits of 4096 float32 and ids besides
        nbytes = batch * (HIDDEN + VOCABULARY) * 4
        limit = 1 + 1000 * nbytes / bandwidth
        say(
            Goal(
                f"links, {batch} row(s), {nbytes // 1024} KiB",
                1000 * median(found["links", batch]),
                limit,
                unit="ms",
            ).line()
        )
    return {f"{name}, {batch}": seconds for (name, batch), seconds in found.items()}


def raw_round_trips(size: int) -> list[float]:
    """Seconds of round trips of `size` bytes each way, between two processes."""
    with subprocess.Popen([sys.executable, "-S", "-c", ECHO, str(size)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = []
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline()))) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            out, back = bytes(size), memoryview(bytearray(size))
            for _ in range(ROUND_TRIPS):
                began = time.perf_counter()
                peer.sendall(out)
                got = 0
                while got < size:
                    got += peer.recv_into(back[got:])
                found.append(time.perf_counter() - began)
        return found[ROUND_TRIPS // 10 :]


def raw_bandwidth(size: int = 256 * 2**20) -> float:
    """Bytes a second through one TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(
            target=lambda: socket.create_connection(server.getsockname()).sendall(bytes(size))
        )
        began = time.perf_counter()
        thread.start()
        peer, _ = server.accept()
        with peer:
            buffer = bytearray(2**20)
            got = 0
            while got < size:
                got += peer.recv_into(buffer)
        thread.join()
    return size / (time.perf_counter() - began)


def overlap(options: argparse.Namespace, shards: Path, model: Any, say: Callable[[str], None]) -> Any:
    """Tokens a second of several sequences in flight."""
    found: dict[tuple[str, int], list[float]] = {}
    right, _ = generate_alone(model, TOKENS)
    with ExitStack() as stack:
        generators = {
            name: Generator(start(stack, shards, stages=2, transport=name).pipeline)
            for name in ("links", "rpc")
        }
        for number in range(options.rounds + 1):
            for count in (1, 2, 4):
                for name, generator in generators.items():
                    began = time.perf_counter()
                    done = generator.generate([PROMPT] * count, Sampling(max_tokens=TOKENS, ignore_eos=True))
                    seconds = time.perf_counter() - began
                    if any(list(each.tokens) != right for each in done):
                        sys.exit(f"{name}: its tokens are not those of transformers")
                    if number:
                        found.setdefault((name, count), []).append(count * TOKENS / seconds)
    rows = [("tokens a second, PP 2", "1 sequence", "2", "4", "4 against 1")]
    for name in generators:
        one, two, four = (median(found[name, count]) for count in (1, 2, 4))
        rows.append((name, f"{one:.0f}", f"{two:.0f}", f"{four:.0f}", f"{four / one:.2f}"))
    say(benchlib.table(rows))
    ratio = median(found["links", 4]) / median(found["links", 1])
    say(Goal("links, 4 sequences against 1", ratio, 1.6, at_least=True).line())
    return {f"{name}, {count}": values for (name, count), values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each variant, interleaved (default: 7)")
    parser.add_argument("--only", default=",".join(TASKS), help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--ray", action="store_true", help="Ray's actors too")
    parser.add_argument(
        "--json", action="store_true", help="every figure as JSON on stdout; tables to stderr"
    )
    options = parser.parse_args()
    chosen = options.only.split(",")
    if set(chosen) - set(TASKS):
        parser.error(f"--only: there are {', '.join(TASKS)}")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    found = {}
    with tempfile.TemporaryDirectory(prefix="shardprep-bench-") as work:
        shards, model = make_model(Path(work))
        for name, task in (("tokens", tokens), ("hops", hops), ("overlap", overlap)):
            if name in chosen:
                say(f"\n{name}")
                found[name] = task(options, shards, model, say)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
