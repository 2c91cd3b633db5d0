"""The hook for SGLang stands around its loader: a rank's shard from a shard set, all else as ever.

SGLang itself is not here: `tools/check_sglang.py` runs its own loaders. What stands for its context is the three
things that are asked of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import small_models
from lazily import torch
from shardprep.split import split
from shardprep_runtime.engines.sglang_plugin import weights
from shardprep_runtime.errors import LayoutError, UnsupportedError
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set


def from_files(loader: Any, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield "from files", torch.zeros(1)


def asked(folder: Path, model: Any = None) -> dict[str, torch.Tensor]:
    config = SimpleNamespace(model_path=str(folder))
    return dict(weights(from_files, SimpleNamespace(), config, model or SimpleNamespace()))


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, **other: int) -> None:
    here = {"tp_rank": rank, "tp_size": size, "attn_tp_size": size, "pp_size": 1, "moe_ep_size": 1, **other}
    context = SimpleNamespace(get_parallel=lambda: SimpleNamespace(**here))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    for parent in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sglang")
    source = small_models.write_model(folder / "in", small_models.llama_config(tied=True, vocab=128))
    split(source, folder / "set", tensor_parallel_size=2)
    return folder / "set"


def test_an_ordinary_checkpoint_is_loaded_as_ever(tmp_path: Path) -> None:
    assert asked(tmp_path).keys() == {"from files"}


def test_a_rank_gets_full_shapes_of_which_it_has_its_block(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(monkeypatch, 1, 2)
    found = asked(shards)
    name = "model.layers.0.self_attn.o_proj.weight"
    with open_set(shards).load(Place(rank=1, tensor_parallel_size=2, engine="vllm")) as shard:
        assert found.keys() == shard.view.tensors.keys(), (
            "names that the config ties are not the checkpoint's"
        )
        assert found[name].shape == (32, 32)
        assert torch.equal(found[name].narrow(1, 16, 16), shard[name])
    with pytest.raises(LayoutError, match=r"o_proj.*of which this rank has"):
        torch.empty(32, 16, dtype=torch.bfloat16).copy_(found[name].narrow(1, 0, 16))


@pytest.mark.parametrize("other", [{"pp_size": 2}, {"moe_ep_size": 2}, {"attn_tp_size": 1}])
def test_what_was_not_tried_is_refused(
    other: dict[str, int], shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(monkeypatch, 0, 2, **other)
    with pytest.raises(UnsupportedError, match=r"plain tensor parallelism; shardprep export"):
        asked(shards)


def test_weights_in_a_second_place_are_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, 0, 2)
    with pytest.raises(UnsupportedError, match="second place"):
        asked(shards, SimpleNamespace(secondary_weights=["elsewhere"]))
