"""An MLP that tensor ranks cannot share in whole quantization groups gets units of zeros, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import header_checkpoints as published
from shardprep.files import LocalFolder
from shardprep.index import Extent, Index, SourceFile, Tensor
from shardprep.layout import known_types, pad
from shardprep.layout.pad import Padding, pad_tensor, pad_to
from shardprep.source import bytes as read
from shardprep.source import open_source, read_checkpoint
from shardprep.source.bytes import Sources, open_reader
from shardprep.write.mover import fingerprint
from shardprep.write.plan import plan_convert
from shardprep_runtime.errors import InputError, LayoutError, UnsupportedError

Shapes = dict[str, tuple[str, tuple[int, ...]]]

CONFIG = {
    **published.QWEN_25_72B,
    "hidden_size": 1024,
    "intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}


def index_of(folder: Path, config: Mapping[str, Any], tensors: Shapes) -> Index:
    """The index of a checkpoint that holds headers alone."""
    with open_source(published.write(folder, config, tensors), data=False) as opened:
        return read_checkpoint(opened)


def test_qwen_72b_is_padded_to_29696_for_8_ranks(tmp_path: Path) -> None:
    config = published.QWEN_25_72B | {"num_hidden_layers": 2}
    index = index_of(tmp_path / "in", config, published.llama_tensors(config))
    padded, padding = pad_to(index, tensor_parallel_size=8, group=128)
    assert padding.sizes == {"intermediate_size": (29568, 29696)}
    assert padded.config == {**index.config, "intermediate_size": 29696}
    assert padded.edited
    assert not index.edited
    changed = {name for name, tensor in padded.tensors.items() if tensor != index.tensors[name]}
    assert changed == {
        f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("gate", "up", "down")
    }
    assert padding.tensors == 6
    assert padding.nbytes == 6 * 8192 * (29696 - 29568) * 2 == padded.nbytes - index.nbytes
    assert padded.tensors["model.layers.1.mlp.down_proj.weight"].shape == (8192, 29696)
    assert padded.tensors["model.layers.1.mlp.gate_proj.weight"].shape == (29696, 8192)


def test_what_can_be_shared_as_it_is_stays_as_it_is(tmp_path: Path) -> None:
    config = published.LLAMA_3_70B | {"num_hidden_layers": 1}
    index = index_of(tmp_path / "in", config, published.llama_tensors(config))
    padded, padding = pad_to(index, tensor_parallel_size=8, group=128)
    assert padded is index
    assert padding == Padding()


def test_without_groups_shares_are_whole_words(tmp_path: Path) -> None:
    config = CONFIG | {"intermediate_size": 1412}
    index = index_of(tmp_path / "in", config, published.llama_tensors(config))
    _, padding = pad_to(index, tensor_parallel_size=4, group=None)
    assert padding.sizes == {"intermediate_size": (1412, 1440)}  # 4 x 8 x 45


def test_heads_are_not_padded(tmp_path: Path) -> None:
    index = index_of(tmp_path / "in", CONFIG, published.llama_tensors(CONFIG))
    with pytest.raises(LayoutError, match=r"self_attn\.o_proj\.weight: 1024 / 16 is not a multiple of 128"):
        pad_to(index, tensor_parallel_size=16, group=128)
    _, padding = pad_to(index, tensor_parallel_size=16, group=128, skip=["o_proj"])
    assert padding.sizes == {"intermediate_size": (1408, 2048)}
    config = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 8}
    index = index_of(tmp_path / "few", config, published.llama_tensors(config))
    with pytest.raises(LayoutError, match=r"8 units along dim \d cannot be shared by 16"):
        pad_to(index, tensor_parallel_size=16, group=32)


def test_the_hidden_size_is_not_padded(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5}
    index = index_of(tmp_path / "in", config, published.llama_tensors(config))
    with pytest.raises(
        LayoutError, match=r"\[\d+, 960\] are not multiples of 128 and 8; .* not the hidden size"
    ):
        pad_to(index, tensor_parallel_size=1, group=128)


def test_a_type_of_which_it_is_not_proved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(tmp_path / "in", CONFIG, published.llama_tensors(CONFIG))
    monkeypatch.setattr(pad, "HARMLESS", frozenset({"llama"}))
    with pytest.raises(UnsupportedError, match="a qwen2 are not known to bear padding with zeros"):
        pad_to(index, tensor_parallel_size=4, group=128)


def test_every_type_that_is_padded_has_rules() -> None:
    assert set(known_types()) >= pad.HARMLESS


def test_an_mlp_with_a_norm_over_its_units_is_refused(tmp_path: Path) -> None:
    tensors = published.llama_tensors(CONFIG)
    for name in [name for name in tensors if name.endswith("_proj.bias")]:
        del tensors[name]
    for i in range(2):
        tensors[f"model.layers.{i}.mlp.ffn_sub_norm.weight"] = "BF16", (1408,)
        tensors[f"model.layers.{i}.self_attn.attn_sub_norm.weight"] = "BF16", (1024,)
    index = index_of(tmp_path / "in", CONFIG | {"model_type": "bitnet"}, tensors)
    with pytest.raises(LayoutError, match=r"ffn_sub_norm\.weight: not a part of an MLP of 1408 units"):
        pad_to(index, tensor_parallel_size=4, group=128)


def test_shard_sets_and_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path / "in", CONFIG, published.llama_tensors(CONFIG))
    with pytest.raises(InputError, match="a shard set is not padded; `shardprep export`"):
        pad_to(replace(index, kind="shard set"), tensor_parallel_size=2, group=128)
    quantized = {**index.config, "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(InputError, match="quantized already"):
        pad_to(replace(index, config=quantized), tensor_parallel_size=2, group=128)


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    tensors = published.llama_tensors(CONFIG)
    name = "model.layers.0.mlp.up_proj.weight"
    index = index_of(tmp_path / "in", CONFIG, tensors | {name: ("I8", tensors[name][1])})
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight: I8 is not padded"):
        pad_to(index, tensor_parallel_size=4, group=128)


DEEPSEEK = {
    **published.DEEPSEEK_V3,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 192,
    "n_shared_experts": 2,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "v_head_dim": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
}


def deepseek_tensors(config: Mapping[str, Any]) -> Shapes:
    found = published.deepseek_tensors(config)
    return {
        name: ("BF16" if dtype == "F8_E4M3" else dtype, shape)
        for name, (dtype, shape) in found.items()
        if not name.endswith("_scale_inv")
    }


def test_experts_and_the_shared_one_grow_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pad, "HARMLESS", frozenset({"deepseek_v3"}))
    index = index_of(tmp_path / "in", DEEPSEEK, deepseek_tensors(DEEPSEEK))
    padded, padding = pad_to(index, tensor_parallel_size=2, group=64)
    assert padding.sizes == {"moe_intermediate_size": (192, 256)}  # 1024 is a multiple of 2 x 64 already
    shapes = {name: tensor.shape for name, tensor in padded.tensors.items()}
    assert shapes["model.layers.1.mlp.experts.3.down_proj.weight"] == (512, 256)
    assert shapes["model.layers.1.mlp.shared_experts.down_proj.weight"] == (512, 512)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (512, 1024)


def test_the_language_model_of_one_that_sees_is_padded_in_its_own_config(tmp_path: Path) -> None:
    tower = "vision_tower.layers.0.mlp.fc1.weight"
    tensors = {f"language_model.{name}": form for name, form in published.llama_tensors(CONFIG).items()}
    config = {"model_type": "llava", "text_config": CONFIG, "vision_config": {"intermediate_size": 1408}}
    index = index_of(tmp_path / "in", config, tensors | {tower: ("BF16", (1408, 64))})
    padded, padding = pad_to(index, tensor_parallel_size=4, group=128)
    assert padding.sizes == {"intermediate_size": (1408, 1536)}
    assert padded.config == {**config, "text_config": CONFIG | {"intermediate_size": 1536}}
    assert padded.tensors[tower] == index.tensors[tower]
    assert padded.tensors["language_model.model.layers.1.mlp.down_proj.weight"].shape == (1024, 1536)


def test_units_that_no_size_of_the_config_explains_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pad, "HARMLESS", frozenset({"deepseek_v3"}))
    config = DEEPSEEK | {
        "intermediate_size": 384
    }  # as long as the two shared experts: whose would be padded?
    index = index_of(tmp_path / "in", config, deepseek_tensors(config))
    with pytest.raises(LayoutError, match=r"several sizes of config\.json"):
        pad_to(index, tensor_parallel_size=2, group=128)
    del config["intermediate_size"]
    index = index_of(tmp_path / "other", config, deepseek_tensors(config | {"intermediate_size": 400}))
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp: 400 units, and no size of config\.json"):
        pad_to(index, tensor_parallel_size=2, group=32)


def test_each_fused_block_has_zeros_of_its_own() -> None:
    tensor = Tensor("w", "F32", (12, 5), (Extent("f", 100),))
    padded = pad_tensor(tensor, 0, [(4, 6), (8, 9)])
    assert padded.shape == (15, 5)
    assert [(e.file, e.offset, e.start, e.stop) for e in padded.extents] == [
        ("f", 100, 0, 4),
        ("", 0, 4, 6),
        ("f", 100 + 4 * 5 * 4, 6, 14),
        ("", 0, 14, 15),
    ]


def test_a_plan_tells_where_the_zeros_are_and_what_the_config_says() -> None:
    tensor = Tensor("w", "F32", (12, 5), (Extent("f", 0),))
    found = set()
    for lengths in ([(4, 6), (8, 9)], [(4, 5), (8, 10)], [(12, 15)]):
        padded = pad_tensor(tensor, 0, lengths)
        for config in ({"intermediate_size": 1}, {"intermediate_size": 2}):
            index = Index(
                LocalFolder(Path()), "safetensors", {"w": padded}, {}, (), config=config, edited=True
            )
            found.add(fingerprint(plan_convert(index, max_part_bytes=100, aliases={}), index))
    assert len(found) == 6


# ------------------------------------------------------------------------------------------------------------ reading


@st.composite
def padded_tensors(draw: st.DrawFn) -> tuple[bytes, Tensor, str, np.ndarray[Any, Any]]:
    """The bytes of a file, a tensor in it that is padded, the dtype in which it is read, and what is to be read."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    order = draw(st.permutations(range(len(shape))))
    lies = np.arange(1, prod(shape) + 1, dtype="f4").reshape([shape[i] for i in order])
    big = draw(st.booleans())
    before = draw(st.integers(0, 3)) * 4
    raw = b"x" * before + lies.astype(">f4" if big else "<f4").tobytes()
    values = lies.transpose(np.argsort(order))
    strides = tuple(stride // 4 for stride in values.strides)
    packed = values.flags.c_contiguous and draw(st.booleans())
    extent = Extent("f", before, strides=None if packed else strides, big_endian=big)
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.sets(st.integers(1, shape[dim] - 1), max_size=2))) if shape[dim] > 1 else []
    bounds = [0, *cuts, shape[dim]]
    lengths = [(b - a, b - a + draw(st.integers(0, 3))) for a, b in pairwise(bounds)]
    blocks = []
    for (a, b), (_, length) in zip(pairwise(bounds), lengths, strict=True):
        block = np.take(values, range(a, b), dim)
        after = [(0, length - (b - a) if i == dim else 0) for i in range(len(shape))]
        blocks.append(np.pad(block, after))
    dtype = draw(st.sampled_from(["F32", "F16", "F64"]))
    expected = np.concatenate(blocks, dim).astype({"F32": "f4", "F16": "f2", "F64": "f8"}[dtype])
    padded = pad_tensor(Tensor("w", "F32", shape, (extent,)), dim, lengths)
    return raw, padded, dtype, expected


@given(padded_tensors(), st.integers(1, 200), st.sampled_from([8, 64, 2**18]))
@settings(deadline=None)
def test_any_padded_tensor_is_read_with_its_zeros(
    case: tuple[bytes, Tensor, str, np.ndarray[Any, Any]], step: int, chunk: int
) -> None:
    raw, tensor, dtype, expected = case
    size = expected.itemsize
    with pytest.MonkeyPatch.context() as patch, _file(raw) as index, Sources(index) as sources:
        patch.setattr(read, "CHUNK", chunk)  # below a row or above it, as in large tensors and in small ones
        reader = open_reader(sources, tensor, dtype)
        found = b"".join(
            bytes(reader.read(at, min(at + step * size, expected.nbytes)))
            for at in range(0, expected.nbytes, step * size)
        )
        reader.finish()
    assert np.frombuffer(found, expected.dtype).reshape(expected.shape).tolist() == expected.tolist()
    assert tensor.shape == expected.shape


class _file:  # noqa: N801 - used like a function
    """The index of one file of these bytes."""

    def __init__(self, raw: bytes) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name, "f")
        path.write_bytes(raw)
        source = SourceFile("f", len(raw), str(path.stat().st_mtime_ns), "sha256:" + "0" * 64)
        self.index = Index(LocalFolder(Path(self.folder.name)), "safetensors", {}, {}, (source,))

    def __enter__(self) -> Index:
        return self.index

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def test_a_padding_is_told_as_json() -> None:
    padding = Padding({"intermediate_size": (29568, 29696)}, 6, 100)
    assert json.loads(json.dumps(padding.as_json())) == {
        "sizes": {"intermediate_size": {"before": 29568, "after": 29696}},
        "tensors": 6,
        "bytes": 100,
    }
