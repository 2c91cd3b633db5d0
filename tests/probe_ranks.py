"""Processes that each probe one tensor rank of one stage, for tests: `with ProbeRanks(folder) as ranks: ranks.run("probe", ...)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers_ranks


class ProbeRanks(transformers_ranks.Ranks):
    """Of this file's function."""

    program = __file__


def probe(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Check a stage that `size` ranks hold; with `is_wrong` all of them hold what belongs to the first."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from shardprep_runtime.format.view import Place
    from shardprep_runtime.shard.shard_set import open_set
    from shardprep_runtime.stage.probe import check_stage
    from shardprep_runtime.stage.stage import stage_of

    place = Place.of_stage(
        job["pp_rank"],
        pipeline_parallel_size=job["stages"],
        tp_rank=rank,
        tensor_parallel_size=job["size"],
    )
    mesh = DeviceMesh("cpu", list(range(job["size"])), mesh_dim_names=("tp",))
    shard_set = open_set(job["source"])
    with shard_set.side_files() as folder, shard_set.load(place) as shard:
        stage = stage_of(shard, folder, mesh=mesh, dtype=job["dtype"])
    if job.get("is_wrong"):
        with torch.no_grad():
            for parameter in stage.module.parameters():
                dist.broadcast(getattr(parameter, "_local_tensor", parameter), 0)
    found = [check_stage(stage) for _ in range(2)]
    dist.destroy_process_group()
    return {"proven": found[0].proven, "digests": [each.digest for each in found]}


if __name__ == "__main__":
    transformers_ranks.HOW["probe"] = probe
    transformers_ranks.main()
