#!/usr/bin/env python3
"""One process that cold_start.py starts, and the hooks that say in each process of an engine what it is doing.

    python benchmarks/cold_start_worker.py vllm|serve|ranks|transformers|one SPEC

As `sitecustomize` on PYTHONPATH (a link to this file) it is imported by every Python process of a measured start, those
that vLLM starts too. It then notes when the interpreter was there, and puts itself around the few functions in which
engines and shardprep_runtime build, map, verify, wait and load. Notes are lines of JSON in the folder BENCH_EVENTS, a
file for each process, on the clock that all processes share. It imports nothing that an engine would not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from typing import Any

EVENTS = "BENCH_EVENTS"
PROMPT = [1, 20, 300, 4000, 50, 600, 7000, 80]
SPENT = {"fetch": 0.0, "verify": 0.0, "map": 0.0}
"""Seconds of this process within functions of shardprep_runtime that have ended."""
SINCE: dict[str, tuple[float, float]] = {}
"""When those that run now began, and what `within_map` was then."""
INSIDE = dict.fromkeys(SPENT, 0)
"""How many threads are in them."""
COUNTING = RLock()


# --------------------------------------------------------------------------------------------------------------- notes
def note(event: str, **more: object) -> None:
    """Write down that something has just begun or ended."""
    line = json.dumps({"event": event, "at": time.monotonic(), "pid": os.getpid(), **more}) + "\n"
    file = os.open(f"{os.environ[EVENTS]}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, line.encode())
    os.close(file)


def disk_read() -> int:
    """Bytes that this process has had read from the disk."""
    with open("/proc/self/io") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("read_bytes"))


# --------------------------------------------------------------------------------------------------------------- hooks
def between(owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Have a function call `before` and `after`."""
    inner = next(vars(each)[name] for each in getattr(owner, "__mro__", (owner,)) if name in vars(each))
    static = isinstance(inner, staticmethod)
    function = inner.__func__ if static else inner

    def outer(*words: Any, **more: Any) -> Any:
        before()
        found = function(*words, **more)
        after()
        return found

    setattr(owner, name, staticmethod(outer) if static else outer)


def spent() -> dict[str, float]:
    """Seconds of each stage so far, none counted twice: what `load` spends otherwise than on digests is mapping."""
    with COUNTING:
        now, found = time.monotonic(), dict(SPENT)
        for stage in found:  # map last
            if stage in SINCE:
                began, before = SINCE[stage]
                found[stage] += now - began - (within_map(found) - before if stage == "map" else 0.0)
        return found


def within_map(seconds: dict[str, float]) -> float:
    return seconds["fetch"] + seconds["verify"]


def spend(owner: Any, name: str, stage: str) -> None:
    """Count the seconds while any thread is in a function as a stage's."""
    function = owner.__dict__[name]

    def outer(*words: Any, **more: Any) -> Any:
        with COUNTING:
            if INSIDE[stage] == 0:
                SINCE[stage] = time.monotonic(), within_map(spent())
            INSIDE[stage] += 1
        try:
            return function(*words, **more)
        finally:
            with COUNTING:
                INSIDE[stage] -= 1
                if INSIDE[stage] == 0:
                    SPENT[stage] = spent()[stage]
                    del SINCE[stage]

    setattr(owner, name, outer)


def nothing() -> None:
    pass


def in_base_loader(module: Any) -> None:
    """vLLM: a rank builds its model, loads, and packs weights for its kernels."""
    between(
        module,
        "initialize_model",
        lambda: note("build", disk=disk_read()),
        lambda: note("built"),
    )
    between(
        module,
        "process_weights_after_loading",
        lambda: note("loaded", disk=disk_read(), **spent()),
        lambda: note("processed"),
    )


def in_modeling_utils(module: Any) -> None:
    """transformers: a rank has built its model and begins to load."""
    for name in ("_load_pretrained_model", "_load_and_finalize_distributed_pretrained_model"):
        if hasattr(module.PreTrainedModel, name):
            between(module.PreTrainedModel, name, lambda: note("built"), nothing)


def in_shard(module: Any) -> None:
    spend(module.Shard, "check", "verify")


def in_shard_set(module: Any) -> None:
    spend(module.ShardSet, "load", "map")


def in_fetch(module: Any) -> None:
    spend(module.Fetch, "wait", "fetch")
    spend(module.Fetch, "wait_all", "fetch")


HOOKS: dict[str, Callable[[Any], None]] = {
    "vllm.model_executor.model_loader.base_loader": in_base_loader,
    "transformers.modeling_utils": in_modeling_utils,
    "shardprep_runtime.shard.shard": in_shard,
    "shardprep_runtime.shard.shard_set": in_shard_set,
    "shardprep_runtime.shard.fetch": in_fetch,
}


class Finder:
    """Calls a module's hook when it has been imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        hook = HOOKS.get(name)
        spec = PathFinder.find_spec(name, path, target) if hook else None
        if hook is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# ---------------------------------------------------------------------------------------------------------------- vLLM
def serve(spec: dict[str, Any]) -> None:
    """What `shardprep vllm` does before it becomes `vllm serve`; becomes the engine of `vllm` instead."""
    from shardprep.vllm.serve import prepare_vllm
    from shardprep_runtime.shard.prefetch_command import fetch_beside

    launch = prepare_vllm(spec["source"], ["--tensor-parallel-size", str(spec["size"])])
    fetch_beside(launch.shard_set, launch.places)
    extra = launch.command[launch.command.index("--model-loader-extra-config") + 1]
    note("launched")
    options = {"model": str(launch.folder), "load_format": "shardprep", "extra": json.loads(extra)}
    os.execv(sys.executable, [sys.executable, __file__, "vllm", json.dumps({**spec, **options})])


def vllm(spec: dict[str, Any]) -> None:
    """An engine until its first token."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    note("imported", main=True)
    more = {"model_loader_extra_config": spec["extra"]} if spec.get("extra") else {}
    engine = LLM(
        spec["model"],
        load_format=spec["load_format"],
        tensor_parallel_size=spec["size"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        gpu_memory_utilization=0.5,
        seed=0,
        disable_log_stats=True,
        **more,
    )
    note("ready")
    (answer,) = engine.generate(
        [TokensPrompt(prompt_token_ids=PROMPT)],
        SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True),
        use_tqdm=False,
    )
    note("first", token=answer.outputs[0].token_ids[0])
    engine.llm_engine.engine_core.shutdown()  # the ranks' processes and their shared memory
    os._exit(0)


def one(spec: dict[str, Any]) -> None:
    """A rank of vLLM in this process alone: its model is built, filled and made ready, and not run."""
    from shardprep.vllm.ranks import as_rank, build_config, build_model, load_weights, process_weights

    config = build_config(spec["model"], load_format=spec["load_format"], extra=spec.get("extra"))
    if spec.get("weights"):
        config.model_config.model_weights = spec["weights"]
    with as_rank(tp_rank=spec["rank"], tp_size=spec["size"]):
        began = time.monotonic()
        note("imported", main=True)
        model = build_model(config)
        note("built")
        before, built = disk_read(), time.monotonic()
        load_weights(model, config)
        note("one", disk=disk_read() - before, load=time.monotonic() - built, build=built - began, **so_far())
        process_weights(model, config)


def so_far() -> dict[str, float]:
    """What the hooks have counted: they are another copy of this module."""
    found: dict[str, float] = sys.modules["sitecustomize"].spent()
    return found


# -------------------------------------------------------------------------------------------------------- transformers
def ranks(spec: dict[str, Any]) -> None:
    """The ranks of a host, as torchrun starts them; ends when they have. Fails as soon as one fails."""
    note("launched")
    text, running = json.dumps(spec), {}
    for rank in range(spec["size"]):
        place = {"RANK": str(rank), "WORLD_SIZE": str(spec["size"])}
        words = [sys.executable, __file__, "transformers", text]
        running[os.spawnve(os.P_NOWAIT, sys.executable, words, {**os.environ, **place})] = rank
    failed = 0
    while running:
        child, status = os.waitpid(-1, 0)
        running.pop(child)
        if status and not failed:
            failed = 1
            for other in running:
                os.kill(other, 9)
    sys.exit(failed)


def transformers(spec: dict[str, Any]) -> None:
    """A rank of transformers until it has the first token."""
    rank = int(os.environ["RANK"])
    if spec.get("begun"):
        from shardprep_runtime import Place, open_set

        note("begun", disk=disk_read())
        pin, verify = spec["manifest_digest"], spec["verify"]
        begun = open_set(spec["source"], verify=verify, digest=pin).prefetch(
            Place(rank=rank, tensor_parallel_size=spec["size"], engine="transformers")
        )
    import torch
    import torch.distributed
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    note("imported", main=rank == 0)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ[EVENTS]}.meet", rank=rank, world_size=spec["size"]
    )
    options: dict[str, Any] = {
        "distributed_config": DistributedConfig(tp_size=spec["size"]),
        "dtype": torch.bfloat16,
    }
    note("grouped", disk=disk_read(), **so_far())
    if spec["how"] == "ours":
        from shardprep_runtime import open_set
        from shardprep_runtime.engines.transformers_state import transformers_state

        config = LlamaConfig.from_pretrained(spec["side_files"])
        pin, verify = spec["manifest_digest"], spec["verify"]
        source = begun if spec.get("begun") else open_set(spec["source"], digest=pin, verify=verify)
        with transformers_state(source) as state:
            note("opened")
            model = state.from_pretrained(LlamaForCausalLM, config=config, **options)
    else:
        note("opened")
        model = LlamaForCausalLM.from_pretrained(spec["source"], **options)
    note("loaded", disk=disk_read(), **so_far())
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits
    note("first", token=int(logits[0, -1].argmax()), disk=disk_read())  # what is mapped is read by now
    torch.distributed.barrier()
    os._exit(0)


STARTS = {each.__name__: each for each in (serve, vllm, one, ranks, transformers)}


def main() -> None:
    os.dup2(2, 1)  # whatever an engine prints is no report
    STARTS[sys.argv[1]](json.loads(sys.argv[2]))


if __name__ == "sitecustomize" and EVENTS in os.environ:
    note("start", began=float(os.environ["BENCH_BEGAN"]), fetched=float(os.environ.get("BENCH_FETCHED", 0)))
    sys.meta_path.insert(0, Finder)
if __name__ == "__main__":
    main()
