"""The main job end to end on a real checkpoint: convert, split, push to S3, workers that start from there and fetch
only their own shard, and the proof. Then the same of what quantize makes of it.

The S3 server is the embedded one of the tests: it checks signatures, payloads and conditions as Amazon's does.

Every claim in the report is checked as it is made: the run ends with a failure where one does not hold.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3server import S3Server

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 'def read(self, path):\n    """'
TOKENS = 32
GRIDS = [(tp, pp) for pp in (1, 2, 3) for tp in (1, 2, 4)]
GRAIN = 4
BUCKET = "models"
STORE = f"s3://{BUCKET}/tiny-llama"
GROUP = 32
QUANTIZED_GRIDS = [(1, 1), (2, 2), (4, 1)]
MAX_KL = 0.005


class Report:
    """Prints what happened as it happens, and keeps it for --json."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.facts: dict[str, Any] = {}

    def line(self, text: str = "") -> None:
        if not self.quiet:
            print(text, flush=True)

    def fact(self, name: str, value: Any, text: str) -> None:
        self.facts[name] = value
        self.line(f"  {text}")

    def claim(self, name: str, holds: bool, text: str) -> None:
        """A claim of the proof. Ends the run where it does not hold."""
        self.fact(name, holds, f"{'ok  ' if holds else 'FAIL'} {text}")
        if not holds:
            raise SystemExit(f"demo: not so: {text}")


def command(*args: str | Path) -> tuple[dict[str, Any], float]:
    """Run one shardprep command; its report and the seconds it took."""
    started = time.perf_counter()
    script = Path(sys.executable).parent / "shardprep"
    done = subprocess.run([script, *args, "--json"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - started


def uneven(layers: int, pp: int) -> list[list[int]]:
    """Stages that are uneven on purpose: the first is one layer shorter than an even share where it can be."""
    bounds = [0, *sorted(max(i, layers * i // pp - 1) for i in range(1, pp)), layers]
    return [list(pair) for pair in pairwise(bounds)]


def run_workers(
    server: S3Server, store: str, tp: int, stages: list[list[int]], cache: Path
) -> tuple[list[dict[str, Any]], int]:
    """Start one process a rank from the store, all on one host with an empty cache; what they report, and the bytes
    of blobs that the store has sent for all of them."""
    server.reset_stats()
    reports = []
    for rank in range(tp * len(stages)):
        args = [store, rank, tp, len(stages), json.dumps(stages), "blocks", cache]
        done = subprocess.run(
            [sys.executable, "-P", ROOT / "scripts" / "worker.py", *map(str, args)],
            check=True,
            stdout=subprocess.PIPE,
        )
        reports.append(json.loads(done.stdout))
    sent = sum(each["sent"] for each in server.stats()["log"] if "/blobs/" in f"/{each['key']}")
    return reports, sent


def assemble(shards: Path, tp: int, stages: list[list[int]], workers: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's tensors put together from the shards of all ranks, each proved to be what its worker mapped.

    Along the cut dim each index comes from the first rank that holds it; the others that hold it (a shared KV head)
    must hold the same.
    """
    import torch

    import shardprep_runtime

    held: dict[str, list[tuple[Any, Any]]] = {}
    for worker in workers:
        shard = shardprep_runtime.load(
            shards, rank=worker["rank"], tensor_parallel_size=tp, stages=stages, verify="headers"
        )
        for name, tensor in shard.items():
            if hashlib.sha256(shard.memory(name)).hexdigest() != worker["digests"][name]:
                raise SystemExit(f"demo: rank {worker['rank']} mapped other bytes of {name}")
            held.setdefault(name, []).append((shard.describe(name), tensor))
    state = {}
    for name, own in held.items():
        form = own[0][0].form
        dim = form.layout.dim
        if dim is None:
            state[name] = own[0][1]
            continue
        full = torch.zeros(form.shape, dtype=own[0][1].dtype)
        seen = torch.zeros(form.shape[dim], dtype=torch.bool)
        for view, tensor in own:
            at = 0
            for take in view.takes:
                start, count = take.piece.start + take.start, take.stop - take.start
                target, source = full.narrow(dim, start, count), tensor.narrow(dim, at, count)
                if seen[start : start + count].any() and not torch.equal(target, source):
                    raise SystemExit(f"demo: two ranks hold different values of {name}")
                target.copy_(source)
                seen[start : start + count] = True
                at += count
        if not seen.all():
            raise SystemExit(f"demo: no rank holds some of {name}")
        state[name] = full
    return state


def answers(model: Any, tokenizer: Any) -> tuple[Any, list[int]]:
    """Logits of the prompt, and greedy tokens after it."""
    import torch

    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return logits, tokens[0, ids.shape[1] :].tolist()


def prove(
    report: Report, checkpoint: Path, shards: Path, grids: dict[tuple[int, int], Any], cache: Path
) -> None:
    """Compare what the shards compute with what transformers computes from the original checkpoint."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import shardprep_runtime

    # torch says that no process group is initialized: there is one process
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logits, tokens = answers(original, tokenizer)
    report.facts["text"] = tokenizer.decode(tokens)
    report.facts["tokens"] = tokens
    equal = 0
    for (tp, _), (stages, workers) in grids.items():
        state = assemble(shards, tp, stages, workers)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
        own_logits, own_tokens = answers(model.eval(), tokenizer)
        equal += torch.equal(own_logits, logits) and own_tokens == tokens
    report.claim(
        "logits_equal",
        equal == len(grids),
        f"logits bit-equal and {TOKENS} greedy tokens equal to transformers on the original .bin, in {equal} of"
        f" {len(grids)} grids",
    )
    folder = AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32)
    own_logits, own_tokens = answers(folder, tokenizer)
    report.claim(
        "from_pretrained_equal",
        torch.equal(own_logits, logits) and own_tokens == tokens,
        "transformers.from_pretrained reads the shard set's folder as it is: the same",
    )
    with shardprep_runtime.transformers_state(STORE, cache=cache) as state:
        started = state.from_pretrained(
            AutoModelForCausalLM,
            config=AutoConfig.from_pretrained(shards),
            generation_config=original.generation_config,
            dtype=torch.float32,
        )
    own_logits, own_tokens = answers(started, tokenizer)
    report.claim(
        "transformers_state_equal",
        torch.equal(own_logits, logits) and own_tokens == tokens,
        "transformers started from S3 by transformers_state: the same",
    )
    report.claim(
        "dcp_equal",
        _dcp_equal(shards, checkpoint),
        "torch.distributed.checkpoint reads it as it is: every tensor equal",
    )
    report.line()
    report.line(f"  {PROMPT!r} goes on: {report.facts['text']!r}")


def _dcp_equal(shards: Path, checkpoint: Path) -> bool:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    expected: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.bin")):
        expected.update(torch.load(path, weights_only=True))
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(shards)), no_dist=True)
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2f} MiB"


def shard_map(report: Report, split: dict[str, Any]) -> None:
    """One line a part: who owns it, which layers, how large."""
    report.line("  part                                          ranks   layers      bytes")
    for path, nbytes, ranks, layers in split["parts"]:
        report.line(f"  {path:45} {span(ranks):7} {span(layers):7} {nbytes:9,}")


def span(bounds: list[int]) -> str:
    """[start, stop) by its first and last."""
    start, stop = bounds
    return "-" if start == stop else str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def workers_line(
    report: Report, tp: int, stages: list[list[int]], workers: list[dict[str, Any]], sent: int, stored: int
) -> None:
    """One line a grid."""
    kept = [worker["bytes_kept"] for worker in workers]
    mapped = sum(worker["bytes_mapped"] for worker in workers) / sum(kept)
    anonymous = max(worker["anonymous_kib"] or 0 for worker in workers)
    report.line(
        f"  {tp:2}  {len(stages):2}  {','.join(map(span, stages)):11}  {len(workers):7}  "
        f"{mib(min(kept)):>9} to {mib(max(kept)):>8}  {mib(sum(kept)):>9}  {mib(sent):>9}  {sent / stored:6.3f}  "
        f"{mapped:5.0%}  {anonymous:6} KiB  {sorted(worker['milliseconds'] for worker in workers)[len(workers) // 2]:5.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "tests" / "data" / "tiny-llama")
    parser.add_argument("--work", type=Path, help="keep the results in this new folder")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON instead of the report")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    report = Report(quiet=options.json)
    work = options.work or Path(tempfile.mkdtemp(prefix="shardprep-demo-"))
    try:
        work.mkdir(exist_ok=True)
        sys.path.insert(0, str(ROOT / "tests"))
        from s3server import S3Server

        (work / "s3").mkdir()
        with S3Server(work / "s3") as server:
            server.make_bucket(BUCKET)
            os.environ.update(server.environment())
            run(report, options.checkpoint, work, server)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    if options.json:
        print(json.dumps(report.facts, indent=2))


def run(report: Report, checkpoint: Path, work: Path, server: S3Server) -> None:
    shown = checkpoint.relative_to(ROOT) if checkpoint.is_relative_to(ROOT) else checkpoint
    report.line(f"shardprep demo: {shown}, from pickles to workers that fetch only their own shard from S3")
    found, seconds = command("inspect", checkpoint)
    layers = len(found["by_layer"]) - 1
    report.line()
    report.line("What is there")
    report.fact(
        "parameters",
        found["parameters"],
        f"inspect  {seconds:5.2f} s  {found['kind']}, {found['parameters']:,} parameters, {mib(found['nbytes'])} in"
        f" {len(found['files'])} files, {layers} layers; no pickle was run",
    )
    memory = "4MiB,3MiB"
    plan, seconds = command(
        "plan", checkpoint, "--device-memory", memory, "--reserve", "64KiB", "--context", "64"
    )
    best = plan["recommended"]
    report.fact(
        "plan",
        best,
        f"plan     {seconds:5.2f} s  on devices of {memory}: PP {best['pipeline_parallel_size']}, --stages "
        f"{best['stage_list']}, {' and '.join(mib(stage['weights']) for stage in best['stages'])} of weights",
    )
    report.line()
    report.line("Preparing, on the CPU of one machine")
    done, seconds = command("convert", checkpoint, work / "converted")
    report.fact(
        "convert_seconds", seconds, f"convert  {seconds:5.2f} s  {mib(done['nbytes'])} as safetensors"
    )
    split, seconds = command(
        "split", checkpoint, work / "shards", "-tp", str(GRAIN), "--max-part-size", "1MiB"
    )
    report.fact(
        "split_seconds",
        seconds,
        f"split    {seconds:5.2f} s  grain {GRAIN}, {len(split['parts'])} parts,"
        f" stored {split['stored_bytes'] / split['source_bytes']:.3f} x the model (headers weigh on one this small)",
    )
    checked, seconds = command("verify", work / "shards")
    report.fact(
        "blocks",
        checked["blocks"],
        f"verify   {seconds:5.2f} s  {checked['blocks']} blocks match their digests",
    )
    report.line()
    report.line("The shard set: one stored copy for every layout")
    shard_map(report, split)
    report.line(f"  manifest {split['manifest_digest']}")
    report.line()
    report.line(f"The store: {STORE} on an S3-speaking server of our own")
    pushed, seconds = command("push", work / "shards", STORE)
    weights = sum(size for _, size, _, _ in split["parts"])
    report.facts["stored"] = weights
    report.fact(
        "push",
        pushed,
        f"push     {seconds:5.2f} s  {pushed['blobs_sent']} blobs, {mib(pushed['bytes_sent'])}, the manifest last",
    )
    again, seconds = command("push", work / "shards", STORE)
    report.claim(
        "push_again_sends_nothing", again["bytes_sent"] == 0, f"push again {seconds:.2f} s: nothing was sent"
    )
    report.line()
    report.line(
        "Workers: one process a rank, from S3 through an empty cache of the host, every block verified, no torch"
    )
    report.line(
        "  TP  PP  stages       workers  kept by each                kept    fetched  of all  mapped    anon max  start"
    )
    grids: dict[tuple[int, int], Any] = {}
    traffic: dict[tuple[int, int], int] = {}
    for tp, pp in GRIDS:
        stages = uneven(layers, pp)
        workers, sent = run_workers(server, STORE, tp, stages, work / f"cache-{tp}-{pp}")
        grids[tp, pp] = (stages, workers)
        traffic[tp, pp] = sent
        workers_line(report, tp, stages, workers, sent, weights)
    report.facts["grids"] = [
        {
            "tp": tp,
            "pp": pp,
            "stages": stages,
            "bytes_fetched": traffic[tp, pp],
            "workers": [{k: v for k, v in w.items() if k != "digests"} for w in ws],
        }
        for (tp, pp), (stages, ws) in grids.items()
    ]
    report.claim(
        "fleet_fetches_the_model_once",
        all(sent <= weights for sent in traffic.values()),
        f"each of the {len(grids)} fleets fetched at most the {mib(weights)} that are stored, whatever its layout",
    )
    everywhere, _ = command("plan", checkpoint, "--device-memory", "8MiB", "--reserve", "64KiB")
    foretold = {
        grid["tensor_parallel_size"]: grid["stages"][0]["rank_weights"]
        for grid in everywhere["grids"]
        if grid["pipeline_parallel_size"] == 1
    }
    report.claim(
        "plan_is_exact",
        all(
            foretold[tp] == [worker["bytes_kept"] for worker in workers]
            for (tp, pp), (_, workers) in grids.items()
            if pp == 1
        ),
        "plan had foretold the bytes that each worker keeps",
    )
    pulled, seconds = command("pull", STORE, work / "pulled", "--all")
    report.claim(
        "pull_equals_split",
        _same_files(work / "shards", work / "pulled"),
        f"pull --all {seconds:.2f} s: {mib(pulled['bytes_fetched'])} fetched, the folder equals what was split, byte for byte",
    )
    report.line()
    report.line("The proof")
    prove(report, checkpoint, work / "shards", grids, work / "cache-transformers")
    command("export", work / "shards", work / "exported")
    checked, seconds = command("check-arch", checkpoint, "-tp", "4", "-pp", "2")
    report.line()
    report.claim(
        "architecture_is_proved",
        checked["ok"],
        f"check-arch {seconds:.1f} s: {len(checked['proofs'])} proofs hold on a small random model of this "
        "architecture, real tensor parallel processes among them",
    )
    report.claim(
        "export_equals_convert",
        _same_files(work / "converted", work / "exported"),
        "export equals convert, byte for byte",
    )
    quantized(report, checkpoint, layers, work, server)


def quantized(report: Report, checkpoint: Path, layers: int, work: Path, server: S3Server) -> None:
    """The same with 4 bits: quantize, split, workers, and that they compute what the unsplit one computes."""
    report.line()
    report.line(
        f"Quantized: GPTQ, 4 bits in groups of {GROUP}, on the CPU; calibrated with the built-in text"
    )
    made, seconds = command(
        "quantize",
        work / "converted",
        work / "quantized",
        "--method",
        "gptq",
        "--group-size",
        str(GROUP),
        "--samples",
        "128",
        "--sequence-length",
        "256",
        "--evaluate",
        checkpoint / "heldout.txt",
        "--max-kl",
        str(MAX_KL),
        "-tp",
        str(GRAIN),
    )
    quality = made["quality"]
    report.fact(
        "quantized",
        {key: made[key] for key in ("source_bytes", "nbytes", "versions", "measured")},
        f"quantize {seconds:5.1f} s  {mib(made['source_bytes'])} -> {mib(made['nbytes'])}, {made['quantized']} linears,"
        f" by {made['engine']} {made['versions'][made['engine']]}",
    )
    report.claim(
        "quantized_is_good",
        quality["kl"] <= MAX_KL,
        f"on {quality['tokens']:,} held-out tokens: perplexity {quality['perplexity_before']:.2f} ->"
        f" {quality['perplexity']:.2f}, KL {quality['kl']:.6f}, the same first choice {quality['agreement']:.1%}",
    )
    report.facts["quality"] = {key: value for key, value in quality.items() if key != "layers"}
    store = f"{STORE}-gptq"
    shards = work / "quantized-shards"
    split, seconds = command(
        "split", work / "quantized", shards, "-tp", str(GRAIN), "--max-part-size", "1MiB"
    )
    stored = sum(size for _, size, _, _ in split["parts"])
    report.fact(
        "quantized_split_seconds",
        seconds,
        f"split    {seconds:5.2f} s  grain {GRAIN}, {len(split['parts'])} parts",
    )
    command("push", shards, store)
    report.line(
        "  TP  PP  stages       workers  kept by each                kept    fetched  of all  mapped    anon max  start"
    )
    grids: dict[tuple[int, int], Any] = {}
    for tp, pp in QUANTIZED_GRIDS:
        stages = uneven(layers, pp)
        workers, sent = run_workers(server, store, tp, stages, work / f"quantized-cache-{tp}-{pp}")
        grids[tp, pp] = (stages, workers)
        workers_line(report, tp, stages, workers, sent, stored)
    report.claim(
        "quantized_logits_equal",
        _dequantized_equal(work / "quantized", shards, grids),
        f"dequantized, the shards of {len(grids)} grids give logits bit-equal to those of the unsplit checkpoint",
    )


def _dequantized_equal(folder: Path, shards: Path, grids: dict[tuple[int, int], Any]) -> bool:
    """Whether what the ranks hold computes what the unsplit checkpoint does, both dequantized to float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from shardprep.layout import read_scheme
    from shardprep.packing import dequantized

    config = AutoConfig.from_pretrained(folder)
    scheme = read_scheme(config.to_dict())
    assert scheme is not None
    del config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def computed(state: dict[str, Any]) -> Any:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain = {name: tensor.float() for name, tensor in dequantized(state, scheme).items()}
        model.load_state_dict(plain, strict=True)
        return answers(model.eval(), tokenizer)

    logits, tokens = computed(load_file(folder / "model.safetensors"))
    found = [computed(assemble(shards, tp, stages, workers)) for (tp, _), (stages, workers) in grids.items()]
    return all(torch.equal(own, logits) and said == tokens for own, said in found)


def _same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    _, different, failed = filecmp.cmpfiles(one, other, names, shallow=False)
    return names == sorted(path.name for path in other.iterdir()) and not different and not failed


if __name__ == "__main__":
    main()
