"""Processes that load models with transformers and torch.distributed, for tests: `with Ranks() as ranks: ranks.run(...)`.

As a program it imports torch and transformers once, then forks the ranks of each job that it reads, a line of JSON
each way: importing them in every rank of every test would take minutes.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT = 120
"""Seconds after which ranks that hang are ended."""


class Ranks:
    """The program, as tests use it."""

    program = __file__
    """A subclass with functions of its own names its own file, which adds them to HOW."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._errors = (folder / "stderr").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, self.program],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, how: str, size: int = 1, **job: Any) -> list[dict[str, Any]]:
        """What each of `size` ranks says: `error` and `message`, or what the function named `how` returns."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder = tempfile.mkdtemp(dir=self._folder)
        self._process.stdin.write(json.dumps({"how": how, "size": size, "folder": folder, **job}) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), self.errors()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]

    def errors(self) -> str:
        """What the ranks wrote to stderr so far."""
        return Path(self._errors.name).read_text(errors="replace")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


# ------------------------------------------------------------------------------------------------ in the processes


def main() -> None:
    """Answer jobs from standard input until it ends."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import torch
    import transformers  # what every rank needs is imported once
    import transformers.distributed.tensor_parallel
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    torch.set_num_threads(1)
    logging: Any = transformers.logging
    logging.disable_progress_bar()
    for line in sys.stdin:
        job = json.loads(line)
        children = {}
        for rank in range(job["size"]):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # makes its pool of threads anew, which two threads at once must not
                _rank(job, rank)
            children[child] = rank
        _await(children)
        for rank in range(job["size"]):
            file = Path(job["folder"], f"{rank}.json")
            if not file.exists():
                file.write_text(
                    json.dumps({"error": "Ended", "message": f"rank {rank} ended without an answer"})
                )
        lines.write("done\n")
        lines.flush()


def _await(children: Mapping[int, int]) -> None:
    left, deadline = set(children), time.monotonic() + TIMEOUT
    while left:
        done, status = os.waitpid(-1, os.WNOHANG)
        left.discard(done)
        if done and status:  # its peers wait for it in vain
            deadline = min(deadline, time.monotonic() + 5)
        elif time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
            deadline += 5
        elif not done:
            time.sleep(0.005)


def _rank(job: dict[str, Any], rank: int) -> None:
    """Be one rank: write an answer and end."""
    status = 1
    try:
        import torch.distributed as dist

        if job["size"] > 1 or job.get("group"):
            dist.init_process_group(
                "gloo",
                init_method=f"file://{job['folder']}/meet",
                rank=rank,
                world_size=job["size"],
                timeout=datetime.timedelta(seconds=TIMEOUT),
            )
        os.environ.update(job.get("environment", {}))
        answer = {"error": "", **HOW[job["how"]](job, rank)}
        status = 0
    except BaseException as error:  # noqa: BLE001 - it is the answer; errors of DCP are no Exceptions
        traceback.print_exc()
        answer = {"error": type(error).__name__, "message": str(error)}
    file = Path(job["folder"], f"{rank}.json")
    file.with_suffix(".tmp").write_text(json.dumps(answer))
    file.with_suffix(".tmp").rename(file)
    sys.stderr.flush()
    os._exit(status)


def _options(job: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from transformers.distributed import DistributedConfig

    grid = {key: job[key] for key in ("tp_size", "pp_size", "ep_size") if key in job}
    found: dict[str, Any] = {"dtype": getattr(torch, job["dtype"])} if "dtype" in job else {}
    if grid:
        found["distributed_config"] = DistributedConfig(**grid)
    return {**found, **job.get("options", {})}


def _answers(model: Any, job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The logits and greedy tokens of the model, in files and words."""
    import torch

    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 12:].tolist()
    file = f"{job['folder']}/{rank}.pt"
    torch.save(logits, file)
    return {"logits": file, "tokens": tokens}


def state(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Load with `transformers_state`; `how_loaded`: by transformers' own call, `checked` or not."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    from shardprep_runtime.engines.transformers_state import transformers_state
    from shardprep_runtime.format.view import Place
    from shardprep_runtime.shard.shard_set import open_set

    config = AutoConfig.from_pretrained(job["config"])
    for key, value in job.get("changes", {}).items():
        setattr(config, key, value)
    source: Any = open_set(job["source"].format(rank=rank), cache=job.get("cache", "host"))
    if "experts" in job:
        place = Place(rank, job["tp_size"], expert_parallel_size=job["experts"], engine="transformers")
        source = source.load(place)
    with transformers_state(source, **job.get("load", {})) as state:
        how = job.get("how_loaded")
        if how is None:
            model = state.from_pretrained(AutoModelForCausalLM, config=config, **_options(job))
        else:
            model, info = LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, **_options(job)
            )
            if how == "checked":
                state.check(info)
        shard = state.shard
        found = {"bytes_read": shard.bytes_read, "nbytes": shard.nbytes, "mapped": shard.bytes_mapped}
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        **_answers(model, job, rank),
        **found,
        "fetched": shard.bytes_fetched,
        "parameters_mapped": sum(map(_mapped_bytes, model.state_dict().values())),
        "one_tensor": getattr(head, "weight", None) is getattr(inputs, "weight", None),
    }


def _mapped_bytes(tensor: Any) -> int:
    """Bytes of this rank's part of a parameter, where its memory is that of a part's mapping."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= local.data_ptr() < stop:
            return int(local.nbytes) if line.endswith(".safetensors") else 0
    return 0


def folder(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Load a folder as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["source"], **_options(job))
    return _answers(model, job, rank)


def make(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Save a model of random weights as transformers saves checkpoints."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(**{**job["config"], "dtype": "bfloat16"})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(job["to"])
    return {}


def dcp(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Load all tensors of a folder on a mesh, cut along `dims`, and count those that are the checkpoint's."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, zeros

    mesh = init_device_mesh("cpu", tuple(job["mesh"]))
    before = load_file(Path(job["checkpoint"], "model.safetensors"))
    into: dict[str, DTensor] = {}
    for name, tensor in before.items():
        dims = [dim % tensor.dim() if dim < 0 else dim for dim in job["dims"]]
        placements = [Shard(dim) if dim < tensor.dim() else Replicate() for dim in dims]
        into[name] = zeros(tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=placements)
    dcp.load(into, storage_reader=HuggingFaceStorageReader(job["source"]))
    return {"equal": sum(torch.equal(into[name].full_tensor(), tensor) for name, tensor in before.items())}


def consolidate(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Put the pieces of a folder together again."""
    from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

    consolidate_distributed_checkpoint(job["source"], job["to"])
    return {}


HOW = {each.__name__: each for each in (consolidate, dcp, folder, make, state)}

if __name__ == "__main__":
    main()
