"""Check `shardprep export --format vllm-sharded-state` against vLLM's own loaders, on CPUs: states of ranks, and engines.

Runs in an environment with vLLM and shardprep (scripts/test_vllm makes one):

    tools/check_sharded_state.py states < JOBS          export, and compare what is read back with the checkpoint
    tools/check_sharded_state.py engines [--no-store]   greedy tokens of a trained model, TP 2

states   Each line of standard input is a job: {"name", "checkpoint", "shards", "folder", "tp", "pp", "ep", "dtype"}. Of
         every rank, the model that vLLM's default loader fills from `checkpoint` must be, bit for bit, the one that its
         `sharded_state` loader fills from `folder`, to which `shards` was exported. Answers are lines of JSON.
engines  From the checkpoint by the default loader, from the exported folder by `sharded_state`, and from a loopback S3
         server by `runai_streamer_sharded`, for which runai-model-streamer, runai-model-streamer-s3 and boto3 must be
         importable. Exits with 1 where tokens differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from apart import QUIET, ask, tell

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PATIENCE: Final = 400
"""Seconds that one engine may take."""

PROMPTS: Final = ([0, 40, 41, 42, 43, 44], [0, 100, 7, 300, 21], [0, 5])
NEW_TOKENS: Final = 24


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=("states", "engines", "engine"), metavar="states|engines")
    parser.add_argument("--no-store", action="store_true", help="engines: no S3")
    options = parser.parse_args()
    if options.check == "engine":
        tell(tokens_of(json.loads(sys.stdin.read())))
        return 0
    os.environ |= QUIET
    if options.check == "engines":
        return engines(store=not options.no_store)
    for line in sys.stdin:
        tell(check_states(json.loads(line)))
    return 0


# --------------------------------------------------------------------------------------------------------------- states


def check_states(job: Mapping[str, Any]) -> dict[str, Any]:
    """Export one shard set, and compare every rank's model with the default loader's."""
    from shardprep.cli.render import plain
    from shardprep.vllm.ranks import as_rank, build_config, build_model, load_weights, state
    from shardprep.vllm.sharded_state import export_sharded_state
    from shardprep_runtime import ShardprepError

    began = time.monotonic()
    folder = Path(job["folder"])
    try:
        report = export_sharded_state(
            Path(job["shards"]),
            folder,
            tensor_parallel_size=job["tp"],
            pipeline_parallel_size=job["pp"],
            expert_parallel=job["ep"],
            dtype=job["dtype"],
            max_part_bytes=job.get("max_part_bytes", 5 * 10**9),
        )
    except ShardprepError as error:
        return {"name": job["name"], "error": f"{type(error).__name__}: {error}"}
    differ: list[str] = []
    compared = 0
    for pp_rank in range(job["pp"]):
        for tp_rank in range(job["tp"]):
            found = []
            for model_folder, load_format in ((job["checkpoint"], "auto"), (folder, "sharded_state")):
                config = build_config(model_folder, dtype=report.dtype, load_format=load_format)
                with as_rank(
                    tp_rank=tp_rank,
                    tp_size=job["tp"],
                    pp_rank=pp_rank,
                    pp_size=job["pp"],
                    expert_parallel=job["ep"],
                ):
                    model = build_model(config)
                    load_weights(model, config)
                    found.append(digests(state(model)))
            theirs, ours = found
            compared += len(theirs)
            differ += [
                f"{pp_rank}.{tp_rank} {name}"
                for name in {**theirs, **ours}
                if theirs.get(name) != ours.get(name)
            ]
    seconds = round(time.monotonic() - began, 1)
    return {
        "name": job["name"],
        "compared": compared,
        "differ": differ[:5],
        "report": plain(report),
        "seconds": seconds,
    }


def digests(tensors: Mapping[str, Any]) -> dict[str, str]:
    import torch
    from blake3 import blake3

    return {
        name: f"{tensor.dtype} {list(tensor.shape)} "
        + blake3(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


# -------------------------------------------------------------------------------------------------------------- engines


def engines(*, store: bool) -> int:
    """Print a line for each way of starting an engine; 1 where one gives other tokens than the default loader."""
    failed = False
    expected: list[list[int]] | None = None
    with tempfile.TemporaryDirectory(prefix="shardprep-sharded-state-") as scratch:
        for name, found in starts(Path(scratch), store=store):
            if "tokens" not in found:
                verdict, failed = found["error"], True
            elif expected is None:
                expected = found["tokens"]
                verdict = f"tokens {expected[0][:8]}..."
            else:
                same = found["tokens"] == expected
                verdict, failed = (
                    "the same tokens" if same else f"OTHER: {found['tokens']}",
                    failed or not same,
                )
            more = f"; {found['sent']}" if "sent" in found else ""
            seconds = found.get("seconds", 0.0)
            print(f"engine   {name}: {verdict}{more} ({seconds:.1f} s)", flush=True)
    return int(failed)


def starts(scratch: Path, *, store: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, answer) of the default loader first."""
    from s3server import S3Server
    from shardprep.split import split
    from shardprep.vllm.sharded_state import export_sharded_state

    checkpoint, shards, folder = ROOT / "tests/data/tiny-llama", scratch / "shards", scratch / "exported"
    split(checkpoint, shards, tensor_parallel_size=2)
    began = time.monotonic()
    made = export_sharded_state(shards, folder, tensor_parallel_size=2, dtype="float32")
    print(
        f"exported {made.tensors} tensors, {made.nbytes:,} bytes, {len(made.files)} files for vLLM {made.vllm} in "
        f"{time.monotonic() - began:.1f} s",
        flush=True,
    )
    yield "checkpoint, default loader, TP 2", engine({"model": str(checkpoint), "load_format": "auto"}, {})
    yield "folder, sharded_state, TP 2", engine({"model": str(folder), "load_format": "sharded_state"}, {})
    if not store:
        return
    missing = [
        name for name in ("boto3", "runai_model_streamer", "runai_model_streamer_s3") if not find_spec(name)
    ]
    if missing:
        yield (
            "S3, runai_streamer_sharded, TP 2",
            {"error": f"not run: {', '.join(missing)} cannot be imported"},
        )
        return
    with S3Server(scratch / "s3") as server:
        server.make_bucket("models")
        for path in folder.iterdir():
            (scratch / "s3/models" / f"tiny%2F{path.name}").write_bytes(path.read_bytes())
        environment = {
            **server.environment(),
            "RUNAI_STREAMER_S3_ENDPOINT": server.endpoint,
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        answer = engine({"model": "s3://models/tiny", "load_format": "runai_streamer_sharded"}, environment)
        sent = server.stats()["operations"].get("GetObject", {})
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        answer["sent"] = (
            f"{sent.get('requests', 0)} GETs, {sent.get('sent', 0):,} bytes, side files with them, of {weights:,} of weights"
        )
        yield "S3, runai_streamer_sharded, TP 2", answer


def engine(start: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What an engine finds, run by a process of its own."""
    return ask([sys.executable, __file__, "engine"], environment, patience=PATIENCE, given=json.dumps(start))


def tokens_of(start: Mapping[str, str]) -> dict[str, Any]:
    """Greedy tokens of an engine of two processes that this one starts."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    began = time.monotonic()
    engine = LLM(
        start["model"],
        load_format=start["load_format"],
        tensor_parallel_size=2,
        dtype="float32",  # in bfloat16 sums in another order give other tokens
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        gpu_memory_utilization=0.5,
        seed=0,
        disable_log_stats=True,
    )
    answers = engine.generate(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids in PROMPTS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True),
        use_tqdm=False,
    )
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    return {"tokens": tokens, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
