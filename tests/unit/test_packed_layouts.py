"""The tensors of a quantized linear are cut together, at whole groups and whole packed words."""

from __future__ import annotations

from typing import Any

import pytest

import header_checkpoints as published
from shardprep.layout import ModelLayout, Placed, derive_layout
from shardprep.layout.packed import PackedModel, derive_packed, pack
from shardprep_runtime.cut import WHOLE, Layout, Segment, allows
from shardprep_runtime.errors import InputError, UnsupportedError

CONFIG = {
    **published.LLAMA_3_70B,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}
TENSORS = published.llama_tensors(CONFIG)


def layout() -> ModelLayout:
    return derive_layout(CONFIG, {name: shape for name, (_, shape) in TENSORS.items()})


def packed(method: str = "awq", **options: Any) -> PackedModel:
    return pack(layout(), TENSORS, method=method, **options)


DOWN = "model.layers.0.mlp.down_proj"
GATE = "model.layers.0.mlp.gate_proj"
VALUE = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        ("awq", {"qweight": (1536, 128), "scales": (12, 1024), "qzeros": (12, 128)}),
        ("gptq", {"qweight": (192, 1024), "scales": (12, 1024), "qzeros": (12, 128), "g_idx": (1536,)}),
    ],
)
def test_a_weight_becomes_packed_numbers_scales_and_zeros(
    method: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    found = packed(method).tensors
    own = {name.removeprefix(f"{DOWN}."): shape for name, (_, shape) in found.items() if DOWN in name}
    assert own == shapes
    assert found[f"{DOWN}.scales"][0] == "F16"


def test_embedding_norms_and_head_stay() -> None:
    found = packed().tensors
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert found[name] == TENSORS[name]


def test_a_weight_that_was_cut_along_its_input_is_cut_in_groups() -> None:
    tensors = packed().layout.tensors
    assert tensors[f"{DOWN}.qweight"].layout == Layout(0, (Segment(1536, 12),))
    assert tensors[f"{DOWN}.scales"].layout == Layout(0, (Segment(12, 12),))
    assert tensors[f"{DOWN}.qzeros"].layout == Layout(0, (Segment(12, 12),))


def test_a_weight_that_was_cut_along_its_output_is_cut_in_words() -> None:
    tensors = packed().layout.tensors
    assert tensors[f"{GATE}.qweight"].layout == Layout(1, (Segment(192, 192),))
    assert tensors[f"{GATE}.scales"].layout == Layout(1, (Segment(1536, 192),))


def test_kv_heads_are_still_shared_by_neighbours() -> None:
    tensors = packed().layout.tensors
    assert tensors[f"{VALUE}.scales"].layout == Layout(1, (Segment(256, 4, shared=True),))
    assert tensors[f"{VALUE}.qweight"].layout == Layout(1, (Segment(32, 4, shared=True),))


def test_gptq_keeps_its_order_of_groups_where_the_output_is_cut() -> None:
    tensors = packed("gptq").layout.tensors
    assert tensors[f"{GATE}.g_idx"].layout == WHOLE
    assert tensors[f"{DOWN}.g_idx"].layout == Layout(0, (Segment(1536, 12),))


def test_a_size_that_splits_a_group_is_not_allowed() -> None:
    tensors = packed().layout.tensors
    own = [tensors[f"{DOWN}.{name}"].layout for name in ("qweight", "scales", "qzeros")]
    assert [size for size in range(1, 17) if all(allows(each, size) for each in own)] == [1, 2, 3, 4, 6, 12]


def test_one_scale_for_a_whole_row_puts_no_group_in_the_way() -> None:
    tensors = packed("gptq", group=None)
    assert tensors.tensors[f"{DOWN}.scales"][1] == (1, 1024)
    assert tensors.layout.tensors[f"{DOWN}.scales"].layout == WHOLE
    assert tensors.layout.tensors[f"{DOWN}.qweight"].layout == Layout(0, (Segment(192, 192),))


def test_a_linear_that_does_not_divide_into_groups_stays() -> None:
    found = packed(group=1000)
    assert found.tensors[f"{DOWN}.weight"] == TENSORS[f"{DOWN}.weight"]
    assert f"{DOWN}.weight" in found.kept


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_quantized_checkpoint_is_cut_as_was_planned_for_it(method: str) -> None:
    planned = packed(method)
    config = {**CONFIG, "quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
    found = derive_packed(config, planned.tensors, derive_layout)
    assert found.layout.tensors == planned.layout.tensors
    assert found.parameters == planned.parameters
    assert found.grains == planned.grains


def test_compressed_tensors_are_read_from_their_headers() -> None:
    tensors = dict(TENSORS)
    for name, (_, (rows, columns)) in [(n, f) for n, f in TENSORS.items() if "proj.weight" in n]:
        del tensors[name]
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.weight_packed"] = ("I32", (rows, columns // 8))
        tensors[f"{stem}.weight_scale"] = ("BF16", (rows, columns // 128))
        tensors[f"{stem}.weight_shape"] = ("I64", (2,))
    how = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    found = derive_packed({**CONFIG, "quantization_config": how}, tensors, derive_layout)
    assert found.layout.tensors[f"{DOWN}.weight_packed"].layout == Layout(1, (Segment(192, 12),))
    assert found.layout.tensors[f"{DOWN}.weight_scale"].layout == Layout(1, (Segment(12, 12),))
    assert found.layout.tensors[f"{GATE}.weight_scale"].layout.dim == 0
    assert found.layout.tensors[f"{GATE}.weight_shape"].layout == WHOLE
    assert found.parameters == packed().parameters


@pytest.mark.parametrize("scale", [(), (1,), "rows"])
def test_fp8_with_a_scale_for_all_or_for_each_row(scale: Any) -> None:
    tensors = dict(TENSORS)
    for name, (_, shape) in [(n, f) for n, f in TENSORS.items() if "proj.weight" in n]:
        tensors[name] = ("F8_E4M3", shape)
        tensors[f"{name}_scale"] = ("F32", (shape[0], 1) if scale == "rows" else scale)
    how = {"quant_method": "compressed-tensors"}
    found = derive_packed({**CONFIG, "quantization_config": how}, tensors, derive_layout).layout.tensors
    plain = layout().tensors
    assert found[f"{DOWN}.weight"].layout == plain[f"{DOWN}.weight"].layout
    assert found[f"{DOWN}.weight_scale"].layout == WHOLE
    rows = found[f"{GATE}.weight_scale"].layout
    assert rows == (plain[f"{GATE}.weight"].layout if scale == "rows" else WHOLE)


def test_fp8_in_blocks_is_cut_at_blocks() -> None:
    tensors = dict(TENSORS)
    for name, (_, shape) in [(n, f) for n, f in TENSORS.items() if "proj.weight" in n]:
        tensors[name] = ("F8_E4M3", shape)
        tensors[f"{name}_scale_inv"] = ("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))
    config = {**CONFIG, "quantization_config": published.FP8_BLOCKS}
    found = derive_packed(config, tensors, derive_layout).layout.tensors
    assert found[f"{GATE}.weight"].layout == Layout(0, (Segment(1536, 12),))
    assert found[f"{GATE}.weight_scale_inv"].layout == Layout(0, (Segment(12, 12),))
    # heads of 64: two of them to a block
    assert found["model.layers.0.self_attn.q_proj.weight"].layout == Layout(0, (Segment(1024, 8),))


def test_fused_experts_in_mxfp4_are_cut_as_their_weights_are() -> None:
    """gpt-oss: experts in x out, whose blocks lie out x in / 32 x 16 bytes."""
    name = "model.layers.0.mlp.experts.down_proj"
    segments = (Segment(256, 256, uneven=True),)

    def derive(_: Any, shapes: Any) -> ModelLayout:
        assert shapes == {name: (8, 256, 512)}
        return ModelLayout("gpt_oss", 1, {name: Placed(0, Layout(1, segments, experts=True))}, {}, experts=8)

    tensors = {f"{name}_blocks": ("U8", (8, 512, 8, 16)), f"{name}_scales": ("U8", (8, 512, 8))}
    found = derive_packed({"quantization_config": {"quant_method": "mxfp4"}}, tensors, derive)
    assert found.layout.tensors[f"{name}_blocks"].layout == Layout(2, (Segment(8, 8),), experts=True)
    assert found.layout.tensors[f"{name}_scales"].layout == Layout(2, (Segment(8, 8),), experts=True)
    assert found.parameters == 8 * 256 * 512


def test_a_method_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="quantized by magic; known are awq, gptq, fp8"):
        derive_packed({**CONFIG, "quantization_config": {"quant_method": "magic"}}, TENSORS, derive_layout)


def test_a_tensor_that_belongs_to_no_weight_is_refused() -> None:
    tensors = {**packed().tensors, f"{DOWN}.surprise": ("F32", (3,))}
    with pytest.raises(InputError, match=r"down_proj\.surprise"):
        derive_packed({**CONFIG, "quantization_config": {"quant_method": "awq"}}, tensors, derive_layout)
