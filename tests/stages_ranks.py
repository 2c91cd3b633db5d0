"""Processes that each hold one tensor rank of one stage, for tests: `StageRanks(folder).run("greedy", ...)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers_ranks
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set


class StageRanks(transformers_ranks.Ranks):
    """Of this file's functions."""

    program = __file__


def greedy(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Greedy tokens of a set that `tp` x the number of `stages` processes hold; logits of the prompt, from the last."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from shardprep_runtime.stage.stage import stage_of

    size, stages = job["tp"], job["stages"]
    pp_rank, tp_rank = divmod(rank, size)
    # every process makes every mesh: groups are made by all together
    meshes = [
        DeviceMesh("cpu", list(range(number * size, (number + 1) * size)), mesh_dim_names=("tp",))
        for number in range(len(stages))
    ]
    place = Place.of_stage(pp_rank, stages=stages, tp_rank=tp_rank, tensor_parallel_size=size)
    shard_set = open_set(job["source"].format(rank=rank))
    with shard_set.side_files() as folder, shard_set.load(place) as shard:
        stage = stage_of(shard, folder, mesh=meshes[pp_rank], dtype="float32")
    ids, past, found = torch.tensor(job["ids"]), 0, []
    logits, last = None, rank - tp_rank == (len(stages) - 1) * size
    for _ in range(job["tokens"]):
        if not stage.is_first:
            given = torch.empty(*ids.shape, stage.hidden_size)
            dist.recv(given, rank - size)
        else:
            given = ids
        out = stage.step("a", given, past)
        if not stage.is_last:
            dist.send(out.contiguous(), rank + size)
        chosen = out[:, -1].argmax(-1, keepdim=True) if last else torch.empty(len(ids), 1, dtype=torch.int64)
        logits = out if last and logits is None else logits
        dist.broadcast(chosen, (len(stages) - 1) * size)
        past, ids = past + ids.shape[1], chosen
        found.append(chosen)
    file = ""
    if logits is not None:
        file = f"{job['folder']}/{rank}.pt"
        torch.save(logits, file)
    dist.destroy_process_group()
    return {"tokens": torch.cat(found, 1).tolist(), "logits": file, "nbytes": stage.nbytes}


def quantized(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Greedy tokens of a quantized set's checkpoint, and of its two stages, the last of which is built twice."""
    import torch

    from shardprep_runtime.stage.stage import build_stage, stage_of
    from stages_models import generated, greedy, whole

    shards, ids, stages = Path(job["source"]), torch.tensor(job["ids"]), job["stages"]
    found = [generated(whole(shards), ids, job["tokens"]).tolist()]
    first = build_stage(shards, stages=stages, dtype="float32")
    with open_set(shards).load(Place(rank=1, stages=stages)) as shard:
        for _ in range(2):
            last = stage_of(shard, shards, dtype="float32")
            found.append(greedy([first, last], ids, job["tokens"]).tolist())
    kinds = sorted({type(each).__name__ for each in last.layer_modules[0].modules()})
    return {"tokens": found, "kinds": kinds}


if __name__ == "__main__":
    transformers_ranks.HOW.update(greedy=greedy, quantized=quantized)
    transformers_ranks.main()
