"""What published models keep of each sequence: KV cache, latents, windows and states."""

from __future__ import annotations

from typing import Any

import pytest

import header_checkpoints as published
from shardprep.fit.kv_cache import Kept, read_kept
from shardprep_runtime.errors import LayoutError

KIB = 2**10
MIB = 2**20


def kept(config: dict[str, Any], kv_bytes: int = 2, **options: Any) -> tuple[Kept, ...]:
    layers = config.get("text_config", config)["num_hidden_layers"]
    return read_kept(config, layers, kv_bytes=kv_bytes, dtype_bytes=2, **options)


def per_token(config: dict[str, Any], ranks: int = 1, **options: Any) -> int:
    return sum(each.per_token(ranks) for each in kept(config, **options))


def of_sequence(config: dict[str, Any], tokens: int, ranks: int = 1, **options: Any) -> int:
    return sum(each.of_sequence(tokens, ranks) for each in kept(config, **options))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (published.LLAMA_3_70B, 320 * KIB),
        (published.LLAMA_2_13B, 800 * KIB),
        (published.LLAMA_31_405B, 504 * KIB),
        (published.QWEN_25_72B, 320 * KIB),
        (published.DEEPSEEK_V3, 576 * 61 * 2),  # 68.6 KiB
    ],
)
def test_a_token_of_published_models_takes_what_is_known_of_them(
    config: dict[str, Any], expected: int
) -> None:
    assert per_token(config) == expected
    assert per_token(config, kv_bytes=1) == expected // 2
    assert of_sequence(config, 4096) == 4096 * expected


def test_ranks_share_kv_heads_and_then_hold_the_same_one() -> None:
    found = [per_token(published.LLAMA_3_70B, ranks) for ranks in (1, 2, 4, 8, 16, 64)]
    assert found == [n * KIB for n in (320, 160, 80, 40, 40, 40)]


def test_kv_heads_that_cannot_be_shared_are_on_every_rank() -> None:
    assert per_token({**published.LLAMA_3_70B, "num_key_value_heads": 3}, 2) == 120 * KIB


def test_a_latent_is_on_every_rank_whole() -> None:
    assert {per_token(published.DEEPSEEK_V3, ranks) for ranks in (1, 2, 8, 16)} == {70272}


def test_transformers_keeps_heads_made_of_the_latent() -> None:
    assert per_token(published.DEEPSEEK_V3, latent=False) == 128 * (128 + 64 + 128) * 2 * 61
    assert per_token(published.DEEPSEEK_V3, 8, latent=False) == 16 * (128 + 64 + 128) * 2 * 61


def test_an_index_of_keys_is_kept_beside_the_latent() -> None:
    assert per_token({**published.DEEPSEEK_V3, "index_head_dim": 128}) == 70272 + 61 * 132


# -------------------------------------------------------------------------------------------------------- windows

GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_size": 2880,
    "sliding_window": 128,
}
GEMMA_3_27B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "hidden_size": 5376,
        "sliding_window": 1024,
    },
}


@pytest.mark.parametrize("named", [False, True])
def test_every_other_layer_of_gpt_oss_keeps_128_tokens(named: bool) -> None:
    config = {**GPT_OSS_120B}
    if named:
        config["layer_types"] = ["sliding_attention", "full_attention"] * 18
    assert per_token(config) == 36 * 2 * KIB
    assert of_sequence(config, 100) == 36 * 2 * KIB * 100
    assert of_sequence(config, 131072) == 18 * 2 * KIB * (131072 + 128)
    assert [each.window for each in kept(config)[:3]] == [128, None, 128]


def test_one_layer_in_six_of_gemma_3_keeps_all_tokens() -> None:
    assert of_sequence(GEMMA_3_27B, 131072) == 10 * 8 * KIB * 131072 + 52 * 8 * KIB * 1024
    assert [i for i, each in enumerate(kept(GEMMA_3_27B)) if each.window is None] == list(range(5, 62, 6))


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "gemma2", "sliding_window": 4096}, 2),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 0),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            1,
        ),
        ({"model_type": "exaone4", "sliding_window": 4096, "sliding_window_pattern": "LLLG"}, 3),
        ({"model_type": "cohere2", "sliding_window": 4096}, 3),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, 3),
    ],
)
def test_the_layers_that_have_a_window_in_configs_that_do_not_name_them(
    more: dict[str, Any], windows: int
) -> None:
    config = {**published.LLAMA_3_70B, "num_hidden_layers": 4, **more}
    assert sum(each.window is not None for each in kept(config)) == windows


# --------------------------------------------------------------------------------------------------------- states

QWEN3_NEXT_80B = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_size": 2048,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def test_three_layers_in_four_of_qwen3_next_keep_a_state_and_no_tokens() -> None:
    state = 32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2
    assert per_token(QWEN3_NEXT_80B) == 12 * 2 * KIB
    assert of_sequence(QWEN3_NEXT_80B, 0) == 36 * state
    assert of_sequence(QWEN3_NEXT_80B, 1000) == 36 * state + 24 * KIB * 1000
    assert of_sequence(QWEN3_NEXT_80B, 0, 2) == 36 * state // 2
    assert of_sequence(QWEN3_NEXT_80B, 0, 32) == 36 * state // 16  # 16 key heads
    named = {**QWEN3_NEXT_80B, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}
    assert kept(named) == kept(QWEN3_NEXT_80B)


def test_one_layer_in_eight_of_jamba_has_attention() -> None:
    config = {
        "model_type": "jamba",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "intermediate_size": 14336,
    }
    layers = kept(config)
    assert [i for i, each in enumerate(layers) if each.token] == [4, 12, 20, 28]
    assert layers[0].kind == "mamba"


def test_mamba_2_keeps_a_matrix_a_head_and_its_convolution() -> None:
    config = {
        "model_type": "bamba",
        "num_hidden_layers": 2,
        "layers_block_type": ["mamba", "attention"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "mamba_n_heads": 128,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
    }
    state = 128 * 64 * 128 * 4 + (128 * 64 + 2 * 128) * 3 * 2
    assert of_sequence(config, 0) == state
    assert of_sequence({**config, "mamba_ssm_cache_dtype": "bfloat16"}, 0) == state - 128 * 64 * 128 * 2
    assert per_token(config) == 4 * KIB


def test_mamba_is_known_where_it_is_named_linear_attention() -> None:
    config = {
        "model_type": "nemotron_h",
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
    }
    state = 128 * 64 * 128 * 4 + (128 * 64 + 2 * 8 * 128) * 3 * 2
    assert of_sequence(config, 0) == state
    assert of_sequence(config, 0, 8) == state // 8
    assert per_token(config) == 4 * KIB


def test_kimi_keeps_a_matrix_a_head() -> None:
    config = {**published.DEEPSEEK_V3, "model_type": "kimi_linear", "num_hidden_layers": 2}
    state = 32 * 128 * 128 * 4 + 3 * 32 * 128 * 3 * 2
    own = {"full_attn_layers": [2], "num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4}
    named = {"layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 32}
    for more in (
        {"linear_attn_config": own},
        {**named, "linear_head_dim": 128, "linear_conv_kernel_dim": 4},
    ):
        assert of_sequence({**config, **more}, 1) == state + 576 * 2


def test_a_layer_that_is_not_shared_is_kept_by_all() -> None:
    full = Kept("full_attention", token=10, heads=8, state=64, units=4)
    assert (full.of_sequence(1, 4), full.uncut().of_sequence(1, 4)) == (20 + 16, 80 + 64)


def test_layers_that_borrow_the_cache_of_others_keep_nothing() -> None:
    config = {**published.LLAMA_3_70B, "num_kv_shared_layers": 20}
    assert per_token(config) == 60 * 4 * KIB


# --------------------------------------------------------------------------------------------------------- refused


def test_a_kind_of_layer_that_is_not_known_is_counted_as_full_attention() -> None:
    config = {**published.LLAMA_3_70B, "layer_types": ["dreaming"] * 40 + ["linear_attention"] * 40}
    assert per_token(config) == 320 * KIB
    assert all(each.guessed for each in kept(config))
    assert not any(each.guessed for each in kept(published.LLAMA_3_70B))


def test_a_config_that_lacks_heads_is_refused() -> None:
    with pytest.raises(LayoutError, match="lacks what the KV cache depends on: num_attention_heads"):
        kept({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64})


def test_a_config_whose_numbers_are_none_is_refused() -> None:
    with pytest.raises(LayoutError, match="head_dim is many, expected a number"):
        kept({**published.LLAMA_3_70B, "head_dim": "many"})


def test_a_list_of_kinds_that_is_too_short_is_refused() -> None:
    with pytest.raises(LayoutError, match="the kinds of 2 layers, the model has 80"):
        kept({**published.LLAMA_3_70B, "layer_types": ["full_attention"] * 2})
