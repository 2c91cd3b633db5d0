#!/usr/bin/env python3
"""Kill workers of a split model while it generates, and measure how long the text stands still.

    .venv/bin/python benchmarks/failover.py --rounds 5
    .venv/bin/python benchmarks/failover.py --kills 200

Each way of carrying on (a spare over links, a spare over rpc, a cold replacement, this process) is tried --rounds times,
interleaved: a worker of three, each in turn, ends by SIGKILL in the middle of a text. Noticed: from the signal until the
front end knows. Gap: from the signal until the next token. With --kills, workers are killed at random places of random
texts instead, over links with spares, until that many have died; every token is compared with an undisturbed run's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import benchlib
from benchlib import ROOT, Goal
from shardprep_runtime.engines.quiet import quiet
from shardprep_runtime.workers.launch import Launch, launch
from shardprep_runtime.workers.launchers.launcher import Listener
from shardprep_runtime.workers.launchers.words import LAUNCHERS
from shardprep_runtime.workers.policy import Event, Policy
from shardprep_runtime.workers.text.generate import Generator, Sampling
from shardprep_runtime.workers.worker import Compute

CHECKPOINT = ROOT / "tests/data/tiny-llama"
STAGES = 3
TOKENS = 96
PROMPTS = ("def read(self, path):", "class Store:\n", "import os\n\n\ndef main(", "    for name in names:\n")
WAYS = ("links, a spare", "rpc, a spare", "links, a cold replacement", "links, this process")
SPARE_TIMEOUT = 120.0


@dataclass(slots=True)
class Kill:
    """What one kill cost, in seconds."""

    stage: int
    noticed: float
    gap: float
    token: float
    """Of an undisturbed token of the same text."""
    is_right: bool


@dataclass(slots=True)
class Way:
    """A way of carrying on, with what runs for it."""

    name: str
    running: Launch
    generator: Generator
    events: list[Event] = field(default_factory=list)

    @property
    def spares(self) -> int:
        return sum(each.pp_rank is None for each in self.running.transport.workers().values())


@contextmanager
def open_way(name: str, shards: Path, spares: int = 0) -> Iterator[Way]:
    """Start what a way needs; with `spares`, so many are kept ready, others started for those that are used."""
    transport, _, how = name.partition(", ")
    events: list[Event] = []
    with launch(
        shards,
        stages=STAGES,
        launcher=LAUNCHERS[transport],
        compute=Compute(threads=1, dtype="float32"),
        policy=Policy(
            spares=spares or (1 if how == "a spare" else 0),
            replace=bool(spares) or how == "a cold replacement",
            fallback=how == "this process",
            replacement_timeout=60 if how == "a cold replacement" else 0,
            probe_period=0,
        ),
        listener=Listener(event=events.append),
    ) as running:
        yield Way(name, running, Generator.from_folder(running.pipeline, shards), events)


def wait_for_spare(way: Way) -> None:
    deadline = time.monotonic() + SPARE_TIMEOUT
    while not way.spares:
        if time.monotonic() > deadline:
            sys.exit(f"{way.name}: no spare came")
        time.sleep(0.01)


def kill(way: Way, stage: int) -> float:
    """End the worker that holds a stage; when."""
    route = way.running.pipeline.route
    assert route is not None
    pid = way.running.transport.workers()[route[stage]].pid
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    return at


def disturbed(way: Way, prompt: str, stage: int, after: int, right: list[int]) -> Kill:
    """Generate, and kill the worker of a stage between two tokens."""
    way.events.clear()
    times: list[float] = []
    found: list[int] = []
    killed = 0.0
    for token in way.generator.stream(prompt, Sampling(max_tokens=len(right), ignore_eos=True)):
        times.append(time.time())
        found.append(token.id)
        if len(found) == after:
            killed = kill(way, stage)
    lost = [each for each in way.events if each.kind == "lost"]
    steps = sorted(b - a for a, b in itertools.pairwise(times))
    return Kill(
        stage, min(each.time for each in lost) - killed, times[after] - killed, median(steps), found == right
    )


@quiet()
def undisturbed(shards: Path) -> dict[str, list[int]]:
    """What transformers generates from the checkpoint in one process."""
    import torch
    import transformers

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **options)
        found[prompt] = tokens[0, ids.shape[1] :].tolist()
    return found


def compare(
    options: argparse.Namespace, shards: Path, right: dict[str, list[int]], say: Callable[[str], None]
) -> Any:
    """Each way, interleaved: a launch of its own each time, for some of them end with a worker less."""
    found: dict[str, list[Kill]] = {name: [] for name in WAYS}
    for number in range(options.rounds):
        for name in WAYS:
            with open_way(name, shards) as way:
                if "spare" in name:
                    wait_for_spare(way)
                prompt = PROMPTS[number % len(PROMPTS)]
                list(way.generator.stream(prompt, Sampling(max_tokens=16, ignore_eos=True)))  # warm
                one = disturbed(way, prompt, number % STAGES, 20 + 7 * number % 40, right[prompt])
            found[name].append(one)
            say(
                f"{number + 1}/{options.rounds}  {name}: stage {one.stage}, noticed {1000 * one.noticed:.0f} ms, gap "
                f"{1000 * one.gap:.0f} ms, tokens {'equal' if one.is_right else 'DIFFER'}"
            )
    rows: list[tuple[str, ...]] = [
        ("", "kills", "noticed ms", "max", "gap ms", "max", "a token ms", "wrong texts")
    ]
    for name, kills in found.items():
        rows.append(
            (
                name,
                str(len(kills)),
                *(
                    f"{1000 * value:.0f}"
                    for pick in ("noticed", "gap")
                    for value in (
                        median(getattr(k, pick) for k in kills),
                        max(getattr(k, pick) for k in kills),
                    )
                ),
                f"{1000 * median(k.token for k in kills):.1f}",
                str(sum(not k.is_right for k in kills)),
            )
        )
    say(benchlib.table(rows))
    spare, cold = ([k.gap for k in found[name]] for name in (WAYS[0], WAYS[2]))
    goals = [
        Goal("kill noticed, links", 1000 * max(k.noticed for k in found[WAYS[0]]), 100, unit="ms"),
        Goal("gap with a spare, links", max(spare), 1, unit="s"),
        Goal("gap with a spare, rpc", max(k.gap for k in found[WAYS[1]]), 1, unit="s"),
        Goal("a cold replacement against a spare", median(cold) / median(spare), 5, at_least=True),
        Goal("wrong texts", sum(not k.is_right for kills in found.values() for k in kills), 0, unit=""),
    ]
    for goal in goals:
        say(goal.line())
    return {
        name: [{slot: getattr(k, slot) for slot in Kill.__slots__} for k in kills]
        for name, kills in found.items()
    }


def kill_many(
    options: argparse.Namespace, shards: Path, right: dict[str, list[int]], say: Callable[[str], None]
) -> Any:
    """Random kills until there were enough; texts run on in threads of their own meanwhile."""
    chance = random.Random(options.seed)
    wrong: list[str] = []
    texts = 0
    gaps: list[float] = []
    noticed: list[float] = []
    is_over = threading.Event()
    lock = threading.Lock()
    with ExitStack() as stack:
        way = stack.enter_context(open_way(WAYS[0], shards, options.spares))

        def write(seed: int) -> None:
            nonlocal texts
            own = random.Random(seed)
            while not is_over.is_set():
                prompt = own.choice(PROMPTS)
                count = own.randint(1, TOKENS)
                found = way.generator.generate([prompt], Sampling(max_tokens=count, ignore_eos=True))[0]
                with lock:
                    texts += 1
                    if list(found.tokens) != right[prompt][:count]:
                        wrong.append(f"{prompt!r}: {found.tokens} instead of {right[prompt][:count]}")

        writers = [threading.Thread(target=write, args=(options.seed + n,)) for n in range(options.sequences)]
        for writer in writers:
            writer.start()
        try:
            for number in range(options.kills):
                wait_for_spare(way)
                time.sleep(chance.uniform(0, 0.3))
                way.events.clear()
                while way.running.pipeline.route is None:
                    time.sleep(0.001)
                at = kill(way, chance.randrange(STAGES))
                deadline = time.monotonic() + 60
                while not any(each.kind in ("promoted", "replaced", "fallback") for each in list(way.events)):
                    if time.monotonic() > deadline:
                        sys.exit(f"kill {number}: nobody took the stage in 60 s: {way.events}")
                    time.sleep(0.001)
                events = list(way.events)
                noticed += [min(each.time for each in events if each.kind == "lost") - at]
                gaps += [min(e.time for e in events if e.kind in ("promoted", "replaced", "fallback")) - at]
                if (number + 1) % 10 == 0:
                    say(
                        f"{number + 1} kills, {texts} texts, {len(wrong)} wrong; counters {dict(way.running.pipeline.counters)}"
                    )
        finally:
            is_over.set()
            for writer in writers:
                writer.join()
        counters = dict(way.running.pipeline.counters)
    say(
        f"{options.kills} kills in {texts} texts of {options.sequences} at a time: {len(wrong)} wrong; noticed "
        f"{1000 * median(noticed):.0f} ms (max {1000 * max(noticed):.0f}), stage taken after {1000 * median(gaps):.0f} ms "
        f"(max {1000 * max(gaps):.0f}); {counters}"
    )
    for each in wrong[:5]:
        say(each)
    say(Goal("wrong texts", len(wrong), 0, unit="").line())
    return {
        "kills": options.kills,
        "texts": texts,
        "wrong": wrong,
        "noticed": noticed,
        "taken": gaps,
        "counters": counters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="kills of each way (default: 5)")
    parser.add_argument("--kills", type=int, default=0, help="random kills instead, over links with spares")
    parser.add_argument("--spares", type=int, default=2, help="of the random kills (default: 2)")
    parser.add_argument(
        "--sequences", type=int, default=2, help="texts at a time, of the random kills (default: 2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", action="store_true", help="every kill as JSON on stdout; the rest to stderr"
    )
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory(prefix="shardprep-bench-") as work:
        shards = Path(work, "shards")
        split = [str(benchlib.SHARDPREP), "split", str(CHECKPOINT), str(shards), "-tp", "1", "--json"]
        subprocess.run(split, check=True, stdout=subprocess.DEVNULL)
        right = undisturbed(shards)
        found = (kill_many if options.kills else compare)(options, shards, right, say)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
