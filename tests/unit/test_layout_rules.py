"""The rules as data: each of them can be read and says what it means; what no rule covers is refused or kept whole."""

from __future__ import annotations

import ast
from typing import Any

import pytest

import golden
from shardprep.layout import derive_layout, known_types
from shardprep.layout.expressions import evaluate
from shardprep.layout.rules import _data, normalize
from shardprep_runtime.errors import LayoutError, ShardprepError, UnsupportedError
from shardprep_runtime.format.cut import WHOLE, Layout, Segment
from shardprep_runtime.format.manifest import PLACEMENTS
from tests.small_models import gpt2_config, gpt2_shapes, llama_config, llama_shapes


def chunks(rows: int, **more: Any) -> Segment:
    return Segment(rows, rows, uneven=True, **more)


# -------------------------------------------------------------------------------------------------------------- data


def test_at_least_a_hundred_and_twenty_types_have_rules() -> None:
    assert len(known_types()) >= 120


@pytest.mark.parametrize("model_type", known_types())
def test_every_rule_of_a_type_can_be_read(model_type: str) -> None:
    rules = _data()[model_type]
    asked = [(p, rule) for engine in rules["engines"].values() for p, rule in engine.items()]
    assert {pattern for pattern, _ in asked} <= set(rules["tensors"])
    for pattern, rule in [*rules["tensors"].items(), *asked]:
        words = rule.split()
        if words[0] in PLACEMENTS:
            assert "{layer}" not in pattern
            del words[0]
        if words[0] == "experts":
            assert rules["experts"]
            del words[0]
        if words in (["whole"], ["vocabulary"]):
            continue
        assert words[0] in ("rows", "columns", "dim1", "dim2")
        names = {name for word in words[1::2] for name in word.split("|")}
        assert set(words[2::2]) <= {"+"}
        assert names == {"any"} or names <= set(rules["sizes"]), pattern
    for indices, units, *shared in rules["sizes"].values():
        ast.parse(indices, mode="eval")
        ast.parse(units, mode="eval")
        assert shared in ([], ["shared"])


@pytest.mark.parametrize("model_type", sorted(path.stem for path in golden.FOLDER.glob("*/*.json")))
def test_a_small_model_of_the_type_has_a_layout_in_which_no_head_is_cut(model_type: str) -> None:
    for path in golden.FOLDER.glob(f"*/{model_type}.json"):
        plan = golden.read(path)
        layout = derive_layout(plan.config, {name: shape for name, (_, shape) in plan.shapes.items()})
        latent = "kv_lora_rank" in plan.config  # its heads have parts of several widths
        width = None if latent else plan.config.get("head_dim")
        for name, placed in layout.tensors.items():
            last = name.split(".")[-2]
            if (
                "self_attn" in name
                and last in ("q_proj", "k_proj", "v_proj")
                and width
                and placed.layout.segments
            ):
                (segment,) = placed.layout.segments
                assert segment.size // segment.units % width == 0, name


# --------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_model_that_sees_is_its_language_model_and_a_tower_at_the_front(prefix: str) -> None:
    text = llama_config(tied=True)
    inner = llama_shapes(text)
    outer = {prefix + name.removeprefix("model."): shape for name, shape in inner.items()}
    tower = {"vision_tower.layers.0.fc.weight": (8, 8), "multi_modal_projector.weight": (32, 8)}
    layout = derive_layout({"model_type": "llava", "text_config": text}, {**outer, **tower})
    alone = derive_layout(text, inner)
    for name, placed in alone.tensors.items():
        assert layout.tensors[prefix + name.removeprefix("model.")] == placed
    assert {layout.tensors[name].layer for name in tower} == {"first"}
    assert {layout.tensors[name].layout for name in tower} == {WHOLE}
    head = "language_model.lm_head.weight" if prefix.startswith("language") else "lm_head.weight"
    assert layout.tied == {head: prefix + "embed_tokens.weight"}
    assert layout.model_type == "llava"


@pytest.mark.parametrize("inner", ["of_mine", ["llama"], {}, None, 1])
def test_a_wrapped_model_that_is_not_known_is_refused(inner: object) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": inner}}
    with pytest.raises(UnsupportedError, match="no layout rules for model_type llava"):
        derive_layout(config, {"a.weight": (2, 2)})


# ----------------------------------------------------------------------------------------------------------- generic


def test_an_unknown_type_is_cut_by_its_rows_when_asked() -> None:
    config = {"model_type": "of_mine", "n_layer": 2, "tie_word_embeddings": False}
    shapes = {
        "embed.weight": (50, 8), "blocks.0.fc.weight": (16, 8), "blocks.0.fc.bias": (16,), "blocks.0.norm.weight": (8,),
        "blocks.1.conv.weight": (4, 1, 3), "blocks.1.scale": (), "blocks.1.odd.bias": (3,),
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="--allow-generic"):
        derive_layout(config, shapes)
    layout = derive_layout(config, shapes, allow_generic=True)
    cut = {name: placed.layout for name, placed in layout.tensors.items() if placed.layout != WHOLE}
    assert cut == {
        "embed.weight": Layout(0, (chunks(50),)),
        "blocks.0.fc.weight": Layout(0, (chunks(16),)),
        "blocks.0.fc.bias": Layout(0, (chunks(16),)),
    }
    assert [placed.layer for placed in layout.tensors.values()] == ["every", 0, 0, 0, 1, 1, 1]
    assert layout.engines == ()  # no engine asks by these rules
    layout.check_grain(8)


def test_a_generic_layout_needs_the_number_of_layers() -> None:
    with pytest.raises(UnsupportedError, match="does not say how many layers"):
        derive_layout({"model_type": "of_mine"}, {"a.weight": (2, 2)}, allow_generic=True)


def test_a_type_that_is_known_is_not_cut_generically() -> None:
    config = llama_config()
    assert derive_layout(config, llama_shapes(config), allow_generic=True) == derive_layout(
        config, llama_shapes(config)
    )


# ------------------------------------------------------------------------------------------------------------ engines


def test_vllm_asks_for_a_padded_vocabulary() -> None:
    config = llama_config(vocab=50)
    layout = derive_layout(config, llama_shapes(config))
    assert layout.tensors["lm_head.weight"].layout == Layout(0, (chunks(50),))
    assert dict(layout.tensors["lm_head.weight"].engines) == {"vllm": Layout(0, (chunks(50, multiple=64),))}
    assert set(layout.engines) == {"transformers", "vllm"}


def test_transformers_asks_for_chunks_of_a_fused_projection() -> None:
    plan = golden.read(golden.FOLDER / "vllm" / "phi3.json")
    layout = derive_layout(plan.config, {name: shape for name, (_, shape) in plan.shapes.items()})
    placed = layout.tensors["model.layers.0.self_attn.qkv_proj.weight"]
    assert [(s.size, s.units, s.shared) for s in placed.layout.segments] == [
        (256, 8, False),
        (128, 4, True),
        (128, 4, True),
    ]
    assert dict(placed.engines) == {"transformers": Layout(0, (chunks(512),))}


# -------------------------------------------------------------------------------------------------------------- names


def test_names_of_a_bare_model_and_leftovers_are_known() -> None:
    config = gpt2_config()
    bare = {name.removeprefix("transformer."): shape for name, shape in gpt2_shapes(config).items()}
    masks = {"h.0.attn.bias": (1, 1, 16, 16), "h.0.attn.masked_bias": ()}
    layout = derive_layout(config, {**bare, **masks})
    full = derive_layout(config, gpt2_shapes(config))
    assert {"transformer." + name: placed for name, placed in layout.tensors.items() if name in bare} == dict(
        full.tensors
    )
    assert all(layout.tensors[name].layout == WHOLE for name in masks)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.7.mlp.up_proj.weight", ("model.layers.{layer}.mlp.up_proj.weight", 7, None)),
        ("a.experts.3", ("a.experts.{layer}", 3, None)),
        ("h.2.mlp.experts.31.w1", ("h.{layer}.mlp.experts.{expert}.w1", 2, 31)),
        ("h.2.adapters.0.1.w", ("h.{layer}.adapters.*.*.w", 2, None)),
        ("h.٣.w", ("h.٣.w", None, None)),
        ("h.12345678901.w", ("h.12345678901.w", None, None)),
    ],
)
def test_numbers_in_names(name: str, pattern: tuple[str, int | None, int | None]) -> None:
    assert normalize(name) == pattern


def test_heads_that_predict_further_tokens_are_on_the_last_stage() -> None:
    plan = golden.read(golden.FOLDER / "vllm" / "deepseek_v3.json")
    shapes = {name: shape for name, (_, shape) in plan.shapes.items()}
    layers = plan.config["num_hidden_layers"]
    own = {
        "mlp.experts.0.up_proj.weight": shapes["model.layers.3.mlp.experts.0.up_proj.weight"],
        "eh_proj.weight": (256, 512), "enorm.weight": (256,), "shared_head.head.weight": (259, 256),
    }  # fmt: skip
    more = {f"model.layers.{layers}.{name}": shape for name, shape in own.items()}
    layout = derive_layout({**plan.config, "num_nextn_predict_layers": 1}, {**shapes, **more})
    assert [layout.tensors[name].layout.dim for name in more] == [0, None, None, 0]
    assert {layout.tensors[name].layer for name in more} == {"last"}
    with pytest.raises(LayoutError, match=f"layer {layers}, but config.json says {layers} layers"):
        derive_layout({**plan.config, "num_nextn_predict_layers": 0}, {**shapes, **more})


# ------------------------------------------------------------------------------------------------------------- layers


def test_a_stage_of_a_hybrid_model_needs_a_full_attention_layer() -> None:
    plan = golden.read(golden.FOLDER / "vllm" / "qwen3_next.json")
    shapes = {name: shape for name, (_, shape) in plan.shapes.items()}
    assert dict(derive_layout(plan.config, shapes).stage_needs) == {"transformers": (3,)}
    older = {key: value for key, value in plan.config.items() if key != "layer_types"}
    assert dict(derive_layout(older, shapes).stage_needs) == {"transformers": (3,)}  # every fourth by default
    assert derive_layout(llama_config(), llama_shapes(llama_config())).stage_needs == {}


@pytest.mark.parametrize(
    ("model_type", "changes", "layers"),
    [
        ("jamba", {}, (2,)),  # every fourth, from the third on
        ("bamba", {}, (1, 3)),
        ("bamba", {"attn_layer_indices": [3, 3, 99, "x", -1]}, (3,)),
        ("granitemoehybrid", {}, (1, 3)),
        ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "mamba", "attention"]}, (3,)),
        ("granitemoehybrid", {"layer_types": ["attention"] * 4}, None),  # none of another kind
        ("nemotron_h", {}, (2,)),
    ],
)
def test_which_layers_a_stage_needs_one_of(
    model_type: str, changes: dict[str, Any], layers: tuple[int, ...] | None
) -> None:
    plan = golden.read(golden.FOLDER / "transformers" / f"{model_type}.json")
    shapes = {name: shape for name, (_, shape) in plan.shapes.items()}
    needs = derive_layout({**plan.config, **changes}, shapes).stage_needs
    assert needs == ({"transformers": layers} if layers else {})


def test_layers_with_values_of_their_own_are_cut_in_their_own_heads() -> None:
    path = golden.FOLDER / "transformers" / "gemma4_text.json"
    plan = golden.read(path)
    layout = derive_layout(plan.config, {name: shape for name, (_, shape) in plan.shapes.items()})
    widths = {
        segment.size // segment.units
        for name, placed in layout.tensors.items()
        if name.endswith("q_proj.weight")
        for segment in placed.layout.segments
    }
    assert widths == {32, 64}


def test_a_config_may_say_a_size_by_another_name() -> None:
    plan = golden.read(golden.FOLDER / "vllm" / "bloom.json")
    shapes = {name: shape for name, (_, shape) in plan.shapes.items()}
    published = {"num_attention_heads": "n_head", "n_embed": "hidden_size"}  # as bigscience/bloom has them
    older = {key: value for key, value in plan.config.items() if key not in published.values()}
    older |= {key: plan.config[own] for key, own in published.items()}
    assert derive_layout(older, shapes) == derive_layout(plan.config, shapes)


# -------------------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("a", 6), ("a * b", 12), ("a / 4", 1), ("c | a", 6), ("a | c", 6), ("2 * (a + b)", 16), ("len(list)", 3),
        ("inner.a", 5), ("inner.c | b", 2), ("c * b | a", 6),
    ],
)  # fmt: skip
def test_expressions(expression: str, value: int) -> None:
    assert evaluate(expression, {"a": 6, "b": 2, "list": [1, 2, 3], "inner": {"a": 5}}) == value


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "8", {}, [4]])
def test_a_value_that_is_no_positive_integer_is_refused(wrong: object) -> None:
    with pytest.raises(LayoutError, match="expected a positive integer"):
        evaluate("a", {"a": wrong})


def test_a_value_that_is_lacking_is_named() -> None:
    with pytest.raises(LayoutError, match=r"config.json lacks what the layout needs: a \* b"):
        evaluate("a * b", {"a": 1})


def test_a_layout_of_a_config_that_belongs_to_another_checkpoint_is_refused() -> None:
    shapes = llama_shapes(llama_config(heads=4))
    with pytest.raises(ShardprepError, match="config and checkpoint do not belong together"):
        derive_layout({**llama_config(heads=4), "num_attention_heads": 8, "head_dim": 8}, shapes)
