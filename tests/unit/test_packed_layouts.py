"""The tensors of a quantized linear are cut together, at whole groups and whole packed words."""

from __future__ import annotations

from typing import Any

import pytest

import header_checkpoints as published
import small_models
from quantized_models import is_linear, one_thread, quantization_config, quantized_tensors
from shardprep.layout import ModelLayout, Placed, Scheme, derive_layout, lay_out
from shardprep.layout.packed import PackedModel, derive_packed, pack
from shardprep_runtime.errors import FormatError, InputError, LayoutError, UnsupportedError
from shardprep_runtime.format.cut import WHOLE, Layout, Segment, allows, chunk

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


NAMES = {
    "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int32": "I32", "torch.int64": "I64",
}  # fmt: skip
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


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("awq", symmetric=False),
        Scheme("gptq"),
        Scheme("gptq", act_order=True),
        Scheme("gptq", bits=8, group=None),
        Scheme("compressed-tensors"),
        Scheme("compressed-tensors", symmetric=False, act_order=True),
    ],
    ids=str,
)
def test_a_quantized_checkpoint_is_cut_as_was_planned_for_it(scheme: Scheme) -> None:
    planned = packed(
        scheme.method,
        bits=scheme.bits,
        group=scheme.group,
        symmetric=scheme.symmetric,
        act_order=scheme.act_order,
    )
    found = derive_packed(
        {**CONFIG, "quantization_config": quantization_config(scheme)}, planned.tensors, derive_layout
    )
    assert found.layout.tensors == planned.layout.tensors
    assert found.parameters == planned.parameters
    assert found.grains == planned.grains


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("awq", group=16, symmetric=False),
        Scheme("gptq", group=16),
        Scheme("compressed-tensors", group=16),
        Scheme("compressed-tensors", group=None, symmetric=False, act_order=True),
    ],
    ids=str,
)
def test_what_is_planned_is_what_a_tool_makes(scheme: Scheme) -> None:
    """Names, dtypes and shapes, of a GPT-2 too, whose linears lie in x out until then."""
    for config in (small_models.llama_config(heads=8), small_models.gpt2_config(heads=8)):
        plain = small_models.random_tensors(small_models.SHAPES[config["model_type"]](config))
        if config["model_type"] == "gpt2":
            upright = {n: t.t().contiguous() if is_linear(n, t) else t for n, t in plain.items()}
        else:
            upright = plain
        with one_thread():
            made = quantized_tensors(upright, scheme)
        shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
        planned = pack(
            derive_layout(config, shapes),
            {name: ("BF16", shape) for name, shape in shapes.items()},
            method=scheme.method,
            group=scheme.group,
            symmetric=scheme.symmetric,
            act_order=scheme.act_order,
        )
        headers = {name: (NAMES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in made.items()}
        assert dict(planned.tensors) == headers
        found = derive_packed(config, headers, derive_layout, scheme)
        assert found.layout.tensors == planned.layout.tensors


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


# ------------------------------------------------------------------------------------------- where it must be exact


def of_one(
    scheme: Scheme,
    fields: dict[str, tuple[str, tuple[int, ...]]],
    layout: Layout,
    engines: tuple[tuple[str, Layout], ...] = (),
    *,
    model_type: str = "any",
) -> dict[str, Placed]:
    """How the tensors of a linear are cut, by their suffixes, whose weight (as it was stored) is cut by `layout`."""

    def derive(_: Any, shapes: Any) -> ModelLayout:
        return ModelLayout(model_type, 1, {name: Placed(0, layout, engines) for name in shapes}, {})

    tensors = {f"h.0.w.{suffix}": header for suffix, header in fields.items()}
    found = derive_packed({"model_type": model_type}, tensors, derive, scheme).layout.tensors
    return {name.removeprefix("h.0.w."): placed for name, placed in found.items()}


def gptq(rows: int, columns: int, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The headers of a weight of rows x columns (out x in)."""
    return {
        "qweight": ("I32", (columns // 8, rows)),
        "qzeros": ("I32", (columns // group, rows // 8)),
        "scales": ("F16", (columns // group, rows)),
        "g_idx": ("I32", (columns,)),
    }


def test_the_one_head_of_multi_query_attention_is_shared_by_all_ranks() -> None:
    found = of_one(Scheme("gptq"), gptq(64, 128, 128), Layout(0, (Segment(64, 1, shared=True),)))
    assert found["qweight"].layout == Layout(1, (Segment(64, 1, shared=True),))
    assert found["qzeros"].layout == Layout(1, (Segment(8, 1, shared=True),))


def test_kv_heads_of_less_than_a_word_stay_in_pairs_and_pairs_are_not_shared() -> None:
    """Four ranks would each be given two heads where the engine expects one."""
    found = of_one(Scheme("gptq"), gptq(16, 128, 128), Layout(0, (Segment(16, 4, shared=True),)))
    assert found["scales"].layout == Layout(1, (Segment(16, 2),))
    assert [size for size in (1, 2, 4, 8) if allows(found["scales"].layout, size)] == [1, 2]


def test_act_order_cuts_the_numbers_along_the_input_and_keeps_scales_and_zeros_whole() -> None:
    columns = Layout(1, (Segment(256, 256, uneven=True),))
    found = of_one(Scheme("gptq", group=64, act_order=True), gptq(64, 256, 64), columns)
    assert found["qweight"].layout == Layout(0, (Segment(32, 32),))
    assert found["g_idx"].layout == Layout(0, (Segment(256, 32),))
    assert found["scales"].layout == found["qzeros"].layout == WHOLE
    rows = Layout(0, (Segment(64, 64, uneven=True),))
    found = of_one(Scheme("gptq", group=64, act_order=True), gptq(64, 256, 64), rows)
    assert found["scales"].layout == Layout(1, (Segment(64, 8),))
    assert found["g_idx"].layout == WHOLE


def test_a_group_that_is_as_long_as_the_row_is_not_split_unless_rows_have_one_scale_by_the_scheme() -> None:
    columns = Layout(1, (Segment(128, 128, uneven=True),))
    found = of_one(Scheme("gptq", group=128), gptq(64, 128, 128), columns)
    assert not allows(found["qweight"].layout, 2)
    found = of_one(Scheme("gptq", group=None), gptq(64, 128, 128), columns)
    assert found["qweight"].layout == Layout(0, (Segment(16, 16),))
    assert found["scales"].layout == WHOLE


def test_what_an_engine_asks_for_is_packed_too() -> None:
    """Phi-3's qkv, of which transformers takes a run of rows; a layer that vLLM does not cut; a head that it pads."""
    heads = Segment(64, 8), Segment(16, 2, shared=True), Segment(16, 2, shared=True)
    rows = Layout(0, (Segment(96, 96, uneven=True),))
    found = of_one(
        Scheme("gptq", group=32),
        gptq(96, 64, 32),
        Layout(0, heads),
        (("transformers", rows), ("vllm", WHOLE)),
    )
    assert found["qweight"].engines == (("transformers", Layout(1, (Segment(96, 12),))), ("vllm", WHOLE))
    assert found["qzeros"].engines == (("transformers", Layout(1, (Segment(12, 12),))), ("vllm", WHOLE))
    assert found["g_idx"].engines == ()  # whole for all
    stored = Layout(0, (Segment(1000, 1000, uneven=True),))
    padded = Layout(0, (Segment(1000, 1000, uneven=True, multiple=64),))
    found = of_one(Scheme("gptq", group=32), gptq(1000, 64, 32), stored, (("vllm", padded),))
    assert found["qzeros"].layout == Layout(1, (Segment(125, 125),))
    (_, asked), *_ = found["qzeros"].engines
    for size in (2, 4, 8):
        for rank in range(size):
            rows_of_rank = chunk(1000, size, rank, multiple=64)
            words = chunk(125, size, rank, multiple=asked.segments[0].multiple)
            assert tuple(word * 8 for word in words) == rows_of_rank


def test_a_linear_that_lay_in_x_out_is_cut_as_it_lies_once_it_is_packed() -> None:
    """GPT-2's c_attn: columns of x out, which GPTQ packs like any other."""
    thirds = (Segment(64, 8),) * 3
    found = of_one(Scheme("gptq", group=32), gptq(192, 64, 32), Layout(1, thirds), model_type="gpt2")
    assert found["qweight"].layout == Layout(1, thirds)
    assert found["qzeros"].layout == Layout(1, (Segment(8, 8),) * 3)
    found = of_one(
        Scheme("gptq", group=32), gptq(64, 192, 32), Layout(0, (Segment(192, 6),)), model_type="gpt2"
    )
    assert found["scales"].layout == Layout(0, (Segment(6, 6),))


def test_blocks_of_float8_that_do_not_divide_are_not_taken_for_smaller_ones() -> None:
    """192 rows in blocks of 128 have two scales, but no cut at 96 is between them."""
    fields = {"weight": ("F8_E4M3", (192, 256)), "weight_scale_inv": ("F32", (2, 2))}
    found = of_one(Scheme("fp8", 8, 128), fields, Layout(0, (Segment(192, 192, uneven=True),)))
    assert not allows(found["weight"].layout, 2)
    fields = {"weight": ("F8_E4M3", (256, 192)), "weight_scale": ("F32", (2, 2))}
    scheme = Scheme("compressed-tensors", 8, 128, format="float-quantized")
    found = of_one(scheme, fields, Layout(0, (Segment(256, 256, uneven=True),)))
    assert found["weight"].layout == Layout(0, (Segment(256, 2),))
    assert found["weight_scale"].layout == Layout(0, (Segment(2, 2),))


def test_four_bit_floats_come_in_bytes() -> None:
    fields = {
        "weight_packed": ("U8", (64, 64)),
        "weight_scale": ("F8_E4M3", (64, 8)),
        "weight_global_scale": ("F32", (1,)),
    }
    scheme = Scheme("compressed-tensors", 4, 16, format="nvfp4-pack-quantized")
    found = of_one(scheme, fields, Layout(1, (Segment(128, 128, uneven=True),)))
    assert found["weight_packed"].layout == Layout(1, (Segment(64, 8),))
    assert found["weight_scale"].layout == Layout(1, (Segment(8, 8),))
    assert found["weight_global_scale"].layout == WHOLE


def test_tensors_of_another_size_than_the_scheme_makes_are_refused() -> None:
    layout = Layout(0, (Segment(64, 64, uneven=True),))
    with pytest.raises(
        FormatError, match=r"w\.qzeros: 4 along dim 0 for 128 inputs; expected one for each 64"
    ):
        of_one(Scheme("gptq", group=64), gptq(64, 128, 32), layout)
    with pytest.raises(FormatError, match="no tensor holds packed numbers"):
        of_one(Scheme("gptq"), {"weight": ("F16", (64, 128))}, layout)
    with pytest.raises(FormatError, match=r"packed numbers, but neither config\.json"):
        lay_out(CONFIG, packed("gptq").tensors)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_mlp_of_qwen_72b_in_groups_of_128(size: int) -> None:
    layout = Layout(1, (Segment(29568, 29568, uneven=True),))
    tensors = {f"h.0.w.{name}": header for name, header in gptq(8192, 29568, 128).items()}

    def derive(_: Any, shapes: Any) -> ModelLayout:
        return ModelLayout("any", 1, {name: Placed(0, layout) for name in shapes}, {})

    found = derive_packed({}, tensors, derive, Scheme("gptq"))
    with pytest.raises(LayoutError) as error:
        found.check_grain(size)
    assert f"29568 / {size} = {29568 // size} is not a multiple of 128" in str(error.value)
    assert "sizes that work for this checkpoint: 1, 3, 7, 11, 21, 33;" in str(error.value)
    assert f"--pad-to-tp {size}" in str(error.value)
    assert ("--group-size" in str(error.value)) == (size < 8)  # 3696 is not a multiple of 32
    found.check_grain(3)


def test_biases_that_autogptq_gave_to_linears_that_have_none_go_with_their_weights() -> None:
    """Mistral has none; old versions wrote one of zeros for each linear."""
    config = {**CONFIG, "model_type": "mistral", "head_dim": 64}
    tensors = dict(packed("gptq").tensors)
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name.replace(".scales", ".bias")] = ("F16", tensors[name][1][1:])
    found = derive_packed(config, tensors, derive_layout, Scheme("gptq")).layout.tensors
    assert found[f"{GATE}.bias"].layout == Layout(0, (Segment(1536, 1536, uneven=True),))
    assert found[f"{VALUE}.bias"].layout == Layout(0, (Segment(256, 4, shared=True),))
    assert found[f"{DOWN}.bias"].layout == WHOLE
    assert found[f"{VALUE}.bias"].layer == 1
    tensors["model.layers.0.surprise.bias"] = ("F16", (3,))
    with pytest.raises(UnsupportedError, match=r"surprise\.bias"):
        derive_packed(config, tensors, derive_layout, Scheme("gptq"))


@pytest.mark.parametrize(
    ("model_type", "names", "fused"),
    [
        ("phi3", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "self_attn.qkv_proj"),
        ("mixtral", tuple(f"mlp.experts.1.{each}_proj" for each in ("gate", "up", "down")), None),
    ],
)
def test_what_gptqmodel_takes_apart_is_cut_as_in_other_models(
    model_type: str, names: tuple[str, ...], fused: str | None
) -> None:
    """It saves Phi-3's gate and up, and Mixtral's experts, under names that no original has."""
    config = {**CONFIG, "model_type": model_type, "num_local_experts": 2}
    tensors = {}
    for name, header in packed("gptq").tensors.items():
        stem, _, suffix = name.rpartition(".")
        word = stem.rpartition(".")[2]
        if f"mlp.{word}" in names:
            tensors[name] = header
        elif "mlp" in stem and fused is None:
            for expert in range(2):
                tensors[name.replace("mlp.", f"mlp.experts.{expert}.")] = header
        elif fused is None or word not in ("q_proj", "k_proj", "v_proj"):
            tensors[name] = header
        elif word == "q_proj":
            rows = 1024 + 2 * 256
            headers = gptq(rows, 1024, 128)
            tensors[f"{stem.removesuffix('q_proj')}qkv_proj.{suffix}"] = headers[suffix]
    found = derive_packed(config, tensors, derive_layout, Scheme("gptq")).layout.tensors
    gate, up, down = (f"model.layers.0.{name}.scales" for name in names)
    assert found[gate].layout == found[up].layout == Layout(1, (Segment(1536, 192),))
    assert found[down].layout == Layout(0, (Segment(12, 12),))
    assert found[down].expert == (None if fused else 1)
    if fused:
        heads, kv = Segment(1024, 16), Segment(256, 4, shared=True)
        assert found[f"model.layers.0.{fused}.scales"].layout == Layout(1, (heads, kv, kv))
