"""What the workers of a grid hold adds up, byte for byte, and is what their views hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import header_checkpoints as published
import small_models
from shardprep.fit.budget import RUNTIME_BYTES, Shape, Workload, allowance, fill, transfer
from shardprep.fit.kv_cache import Kept
from shardprep.fit.report import FitOptions, plan_fit
from shardprep.fit.search import Devices
from shardprep.fit.weights import Census
from shardprep.layout import ModelLayout, Placed, derive_layout
from shardprep.split import split
from shardprep_runtime import plan_view, read_manifest
from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format.cut import WHOLE, Layout, Segment
from shardprep_runtime.format.view import Place

GIB = 2**30


def census(config: dict[str, Any]) -> Census:
    tensors = published.llama_tensors(config)
    return Census(derive_layout(config, {name: shape for name, (_, shape) in tensors.items()}), tensors)


MODELS = {
    "llama": small_models.llama_config(),
    "tied, two KV heads, odd vocabulary": small_models.llama_config(tied=True, vocab=53),
    "odd intermediate size": small_models.llama_config(intermediate=50),
    "phi3": small_models.phi3_config(),
    "gpt2": small_models.gpt2_config(),
}


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_what_the_views_of_the_split_hold(tmp_path: Path, model: str) -> None:
    source = small_models.write_model(tmp_path / "source", MODELS[model])
    split(source, tmp_path / "set", tensor_parallel_size=4)
    manifest = read_manifest(tmp_path / "set")
    report = plan_fit(source, Devices(tuple([2 * GIB] * 8), 4))
    grids = [grid for grid in report.grids if grid.devices <= 8]
    assert {grid.tensor_parallel_size for grid in grids} >= {1, 2, 4}
    for grid in grids:
        held = [nbytes for stage in grid.stages for nbytes in stage.rank_weights]
        views = [
            plan_view(
                manifest, Place(rank=rank, tensor_parallel_size=grid.tensor_parallel_size, stages=grid.bounds)
            ).nbytes
            for rank in range(grid.devices)
        ]
        assert held == views
        assert grid.shard_bytes == max(views)


MIXTRAL = {
    **published.LLAMA_3_70B,
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 130,
}


def mixtral_tensors() -> published.Shapes:
    found = {name: form for name, form in published.llama_tensors(MIXTRAL).items() if ".mlp." not in name}
    for layer in range(3):
        moe = f"model.layers.{layer}.block_sparse_moe"
        found[f"{moe}.gate.weight"] = ("BF16", (6, 64))
        for expert in range(6):
            for name, shape in (("w1", (96, 64)), ("w2", (64, 96)), ("w3", (96, 64))):
                found[f"{moe}.experts.{expert}.{name}.weight"] = ("BF16", shape)
    return found


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_weights_of_expert_groups_are_what_their_views_hold(tmp_path: Path, engine: str) -> None:
    source = published.write(tmp_path / "source", MIXTRAL, mixtral_tensors())
    split(source, tmp_path / "set", tensor_parallel_size=4)
    manifest = read_manifest(tmp_path / "set")
    report = plan_fit(source, Devices(tuple([2 * GIB] * 4), 4), FitOptions(engine=engine))
    seen = set()
    for grid in report.grids:
        held = [nbytes for stage in grid.stages for nbytes in stage.rank_weights]
        views = [
            plan_view(
                manifest,
                Place(
                    rank=rank,
                    tensor_parallel_size=grid.tensor_parallel_size,
                    expert_parallel_size=grid.expert_parallel_size,
                    stages=grid.bounds,
                    engine=engine,
                ),
            )
            for rank in range(grid.devices)
        ]
        assert held == [view.nbytes for view in views]
        seen.add((grid.tensor_parallel_size, grid.expert_parallel_size))
    assert seen == {(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)}


def test_all_ranks_of_a_stage_hold_the_model_and_what_they_share() -> None:
    config = {**published.LLAMA_3_70B, "num_hidden_layers": 2}
    found = census(config)
    total = sum(found.weigh(1).stage(0, 2, first=True, last=True))
    norms = 8192 * 2 * 5
    assert sum(found.weigh(8).stage(0, 2, first=True, last=True)) == total + 7 * norms
    # 8 KV heads on 16 ranks: each of them twice
    heads = 2 * 2 * 1024 * 8192 * 2
    assert sum(found.weigh(16).stage(0, 2, first=True, last=True)) == total + 15 * norms + heads


def test_a_tied_embedding_is_on_both_ends() -> None:
    config = {**published.LLAMA_3_70B, "num_hidden_layers": 2, "tie_word_embeddings": True}
    weights = census(config).weigh(1)
    embedding = 128256 * 8192 * 2
    assert weights.beside(first=True, last=False) == (embedding,)
    assert weights.beside(first=False, last=True) == (embedding + 8192 * 2,)
    assert weights.beside(first=True, last=True) == (embedding + 8192 * 2,)
    assert weights.beside(first=False, last=False) == (0,)


def expert_model(experts: int) -> Census:
    """One layer of experts of 64 x 32, each in a tensor of its own, and a router."""
    rows = Layout(0, (Segment(64, 64, uneven=True),))
    names = {f"layers.0.experts.{i}.up": Placed(0, rows, expert=i) for i in range(experts)}
    layout = ModelLayout("any", 1, {**names, "layers.0.router": Placed(0, WHOLE)}, {}, experts=experts)
    shapes = dict.fromkeys(names, ("BF16", (64, 32)))
    return Census(layout, {**shapes, "layers.0.router": ("BF16", (experts, 32))})


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_experts_that_divide_take_the_same_room_in_any_groups(groups: int) -> None:
    assert expert_model(8).weigh(4, groups).layers == ((2 * 64 * 32 * 2 + 8 * 32 * 2,) * 4,)


def test_a_remainder_of_experts_goes_to_the_first_groups() -> None:
    router = 6 * 32 * 2
    expert = 64 * 32 * 2
    assert expert_model(6).weigh(4, 4).layers[0] == tuple(n * expert + router for n in (2, 2, 1, 1))
    assert expert_model(6).weigh(4, 1).layers[0] == (6 * expert // 4 + router,) * 4


def test_more_groups_than_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match="2 experts cannot be shared by 4 groups"):
        expert_model(2).weigh(4, 4)


# ---------------------------------------------------------------------------------------------------------- the rest

SHAPE = Shape(hidden=4096, inner=14336, vocabulary=128256, dtype_bytes=2)


def test_the_allowance_is_what_its_page_says() -> None:
    work = Workload(context=8192, batch=4)
    computed = 2048 * (8 * 4096 + 3 * 14336) * 2
    assert allowance(SHAPE, work, ranks=1, last=False) == RUNTIME_BYTES + computed
    assert allowance(SHAPE, work, ranks=1, last=True) == RUNTIME_BYTES + computed + 4 * 128256 * 4
    shared = 2048 * (8 * 4096 + 3 * 14336 // 2) * 2
    assert allowance(SHAPE, work, ranks=2, last=False) == RUNTIME_BYTES + shared
    short = Workload(context=100, batch=2)
    assert allowance(SHAPE, short, ranks=1, last=False) == RUNTIME_BYTES + 200 * (8 * 4096 + 3 * 14336) * 2
    assert allowance(SHAPE, Workload(8192, 4, reserve=5), ranks=1, last=True) == 5


def test_a_token_is_reduced_twice_a_layer_in_rings_and_handed_on_once_a_stage() -> None:
    alone = transfer(SHAPE, layers=32, ranks=1, stages=1)
    assert (alone.tensor_bytes, alone.tensor_steps, alone.pipeline_bytes, alone.hops) == (0, 0, 0, 0)
    found = transfer(SHAPE, layers=32, ranks=8, stages=3)
    assert found.tensor_bytes == 2 * 32 * 4096 * 2 * 2 * 7 // 8
    assert found.tensor_steps == 2 * 32 * 14
    assert (found.pipeline_bytes, found.hops) == (2 * 4096 * 2, 2)


def one_stage(kept: list[Kept], room: int, batch: int = 1) -> int | None:
    """Tokens that `room` bytes beside the weights hold."""
    config = {**published.LLAMA_3_70B, "num_hidden_layers": len(kept)}
    weights = census(config).weigh(1)
    all_of_it = weights.stage(0, len(kept), first=True, last=True)[0]
    grid = fill(
        weights, kept, SHAPE, Workload(1, batch, reserve=1000), memory=[all_of_it + 1000 + room], ranks=1, groups=1,
        needs=(),
    )  # fmt: skip
    assert grid is not None
    assert grid.stages[0].left == room
    return grid.tokens


def test_the_room_for_tokens_is_what_is_left() -> None:
    full = Kept("full_attention", token=10, heads=2)
    assert one_stage([full, full], 4000) == 100
    assert one_stage([full, full], 4039) == 100
    assert one_stage([full, full], 4000, batch=3) == 99
    assert one_stage([full, full], -1) == 0


def test_windows_that_are_full_leave_room_for_more() -> None:
    full, sliding = Kept("full", token=10, heads=1), Kept("sliding", token=10, heads=1, window=50)
    assert one_stage([full, sliding], 800) == 40
    assert one_stage([full, sliding], 1000) == 50
    assert one_stage([full, sliding], 1500) == 100
    assert one_stage([sliding, sliding], 1000) is None


def test_states_are_there_before_the_first_token() -> None:
    state = Kept("linear", state=300)
    assert one_stage([state, state], 1000, batch=2) == 0
    assert one_stage([state, state], 1200, batch=2) is None
    assert one_stage([state, Kept("full", token=10, heads=1)], 1000) == 70


def test_spare_is_memory_less_all_that_is_held(tmp_path: Path) -> None:
    folder = published.write(
        tmp_path / "model", published.LLAMA_3_70B, published.llama_tensors(published.LLAMA_3_70B)
    )
    report = plan_fit(folder, Devices((40 * GIB,)), FitOptions(context=4096, batch=3))
    for grid in report.grids:
        for stage in grid.stages:
            assert stage.kv_needed == 3 * 4096 * stage.kv_token
            assert stage.left == stage.memory - stage.weights - stage.allowance
            assert stage.spare == stage.left - stage.kv_needed
            assert stage.tokens == max(stage.left, 0) // 3 // stage.kv_token * 3
        assert grid.fits == (min(stage.spare for stage in grid.stages) >= 0)
        assert sum(stage.kv_token for stage in grid.stages) * min(grid.tensor_parallel_size, 8) == 320 * 1024


def test_the_report_can_be_written_as_json(tmp_path: Path) -> None:
    from shardprep.cli.plan import as_object

    source = small_models.write_model(tmp_path / "source")
    report = plan_fit(source, Devices((2 * GIB,)), network=10**8)
    found = json.loads(json.dumps(as_object(report)))
    assert found["recommended"]["stage_list"] == "0-3"
    assert found["recommended"]["fits"]
    assert found["recommended"]["seconds"]["cold_shard"] == report.nbytes / 10**8
