"""Ask transformers itself which ranges of each checkpoint tensor every rank reads; write them down as golden plans.

    python tools/trace_transformers.py [--into FOLDER] [MODEL_TYPE...]

No weights are needed: the model of each rank is built on the meta device in a fake process group, and transformers'
own loader is fed slices that record what is asked of them. Each rank has a process of its own, since transformers
keeps what it knows of a mesh. tests/golden/transformers/*.json is what this wrote; its format is in docs/layouts.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import golden
from shardprep.model import skeleton
from shardprep_runtime.errors import ShardprepError
from shardprep_runtime.format import dtypes

SIZES = (2, 4, 8)
ENCODERS = ("bert", "distilbert", "electra", "modernbert", "nomic_bert", "roberta", "xlm-roberta")


class Recording:
    """A safetensors slice without bytes: it notes which block of which tensor is asked for."""

    def __init__(self, name: str, dtype: str, shape: Sequence[int], log: golden.Log) -> None:
        self.name, self.dtype, self.shape, self.log = name, dtype, tuple(shape), log

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        block = [[0, size] for size in self.shape]
        given = index if isinstance(index, tuple) else (index,)
        if given and given[0] is not Ellipsis:
            for dim, each in enumerate(given):
                if each.step not in (None, 1):
                    raise NotImplementedError(f"{self.name}: step {each.step}")
                start, stop, _ = each.indices(self.shape[dim])
                block[dim] = [start, max(start, stop)]
        self.log.append((self.name, block))
        whole = torch.empty(self.shape, dtype=getattr(torch, dtypes.TORCH[self.dtype]), device="meta")
        return whole[index]


def reads(
    config: dict[str, Any], shapes: skeleton.Shapes, *, size: int, rank: int, experts: bool
) -> golden.Log:
    """The blocks that `rank` of `size` reads, in the order in which it reads them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    with torch.device("meta"), initialization.no_tie_weights():
        model = skeleton._build(config, dtype=torch.float32)
    asked = {"tp_size": size, "ep_size": size} if experts else {"tp_size": size, "tp_plan": "auto"}
    distributed = DistributedConfig(**asked)
    _, mesh = initialize_distributed_mesh(distributed)
    model = type(model).maybe_distribute_model(model, distributed, mesh)
    log: golden.Log = []
    slices = {name: Recording(name, dtype, shape, log) for name, (dtype, shape) in shapes.items()}
    how = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]  # as transformers calls it
    )
    info, _ = convert_and_load_state_dict_in_model(model, slices, how)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    lacking = sorted(set(info.missing_keys) - tied)
    if lacking or info.mismatched_keys or info.conversion_errors:
        raise RuntimeError(
            f"missing {lacking[:3]}, mismatched {info.mismatched_keys}, {info.conversion_errors}"
        )
    return log


def in_a_process(*args: Any, **more: Any) -> golden.Log:
    """`reads` in a process of its own. Raises RuntimeError with what it raised."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            said: Any = reads(*args, **more)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if os.environ.get("TRACE"):
                traceback.print_exc()
        with os.fdopen(theirs, "w") as stream:
            json.dump(said, stream)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    found = json.loads(said or '"died"')
    if isinstance(found, str):
        raise RuntimeError(found)
    return [(name, block) for name, block in found]


def trace(model_type: str) -> golden.Golden:
    """The golden plan of a model type. Raises RuntimeError or ShardprepError."""
    *better, last = golden.small_configs(model_type)
    for config in better:
        with contextlib.suppress(ShardprepError, RuntimeError):
            return trace_config(config)
    return trace_config(last)


def trace_config(config: dict[str, Any]) -> golden.Golden:
    """The golden plan of a small config. Raises RuntimeError or ShardprepError."""
    shapes = skeleton.shapes_of(config)
    plans: dict[str, list[golden.Log]] = {}
    for size in SIZES:
        plans[f"tp{size}"] = [
            in_a_process(config, shapes, size=size, rank=rank, experts=False) for rank in range(size)
        ]
    if any("experts" in name for name in shapes):
        with contextlib.suppress(RuntimeError):  # has no plan for experts, or none for this number of them
            plans["tp4ep4"] = [
                in_a_process(config, shapes, size=4, rank=rank, experts=True) for rank in range(4)
            ]
    return golden.Golden(
        "transformers",
        transformers.__version__,
        config,
        shapes,
        {plan: golden.reads_of(ranks, shapes) for plan, ranks in plans.items()},
    )


@skeleton.quiet()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=Path("tests/golden/transformers"))
    parser.add_argument("model_types", nargs="*", help="default: every causal type, and a few encoders")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # reads in order, in this thread
    torch.set_num_threads(1)
    given.into.mkdir(parents=True, exist_ok=True)
    failed = 0
    wanted = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ENCODERS} - set(golden.LEFT_OUT)
    for model_type in given.model_types or sorted(wanted):
        try:
            found = trace(model_type)
        except (ShardprepError, RuntimeError) as error:
            print(f"{model_type}: {' '.join(str(error).split())[:300]}", flush=True)
            failed += 1
        else:
            (given.into / f"{model_type}.json").write_text(golden.dump(found))
            print(f"{model_type}: ok", flush=True)
    print(f"{failed} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
