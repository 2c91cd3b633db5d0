"""Make a config small, to try a layout on it: the same architecture with the same traits, in a few megabytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

LAYERS: Final = 4
"""Layers of a small model, unless its kinds of layers need more."""

VOCABULARY: Final = 259
"""Tokens of a small model: a prime, so that no number of ranks divides it."""

KINDS: Final = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "attention_layers",
    "block_types",
    "indexer_types",
)
"""Lists that name the kind of each layer; a small model keeps one of each."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a small model. All but the vocabulary divide by 8, so that eight ranks can share it."""

    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 320
    expert: int = 64
    experts: int = 8
    vocabulary: int = VOCABULARY
    layers: int = LAYERS

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


_SIZES: Final[tuple[tuple[str, str], ...]] = (
    (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|decoder_vocab_size", "vocabulary"),
    (
        r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_(en|de)coder_layers|num_blocks",
        "layers",
    ),
    (
        r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|word_embed_proj_dim|(input_|output_)?embedding_size|lru_width"
        r"|ple_embed_dim",
        "hidden",
    ),
    (
        r"num_attention_heads|n_heads?|num_heads|(num_)?(en|de)coder_attention_heads|attention_heads|index_n_heads"
        r"|swa_num_attention_heads|linear_num_heads|linear_num_value_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads",
        "heads",
    ),
    (
        r"(swa_|\w+_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|linear_num_key_heads",
        "kv_heads",
    ),
    (
        r"(swa_|global_|linear_|linear_key_|linear_value_|index_|v_|qk_nope_|\w+_)?head_dim|attention_head_size|kv_channels"
        r"|d_head|dim_head|d_kv|kv_lora_rank|index_head_dim",
        "head_dim",
    ),
    (
        r"(dense_)?intermediate_size(_mlp)?|ffn_dim|(en|de)coder_ffn_dim|ffn_hidden_size|n_inner|dim_ff|dff|d_ff|d_inner"
        r"|feed_forward_size|intermediate_dim",
        "intermediate",
    ),
    (
        r"moe_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size|(moe_)?shared_experts?_intermediate_size"
        r"|shared_intermediate_size",
        "expert",
    ),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", "experts"),
)
_FIXED: Final[tuple[tuple[str, int], ...]] = (
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"qk_rope_head_dim|rotary_dim", 16),
    (r"q_lora_rank|o_lora_rank|attn_rank|gated_norm_rank|laurel_rank|hc_lowrank|adapter_rank", 48),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions", 128),
    (r"sliding_window(_size)?|attention_chunk_size|window_size|attention_window_size|local_attention", 8),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", 1),
    (r"index_topk|index_topk_blocks", 8),
    (r"num_mem_blocks|num_nextn_predict_layers", 1),
)
_TOKENS: Final = re.compile(r".*_token_(id|index)|(pad|bos|eos|unk|mask)_index|lang_id")

_BY_TYPE: Final[Mapping[str, Mapping[str, Any]]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512, "mamba_d_state": 16},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 16,
    },
    "jamba": {"mamba_dt_rank": 16, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "full_attn_idxs": [1, 3],
        "num_hidden_layers": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 16, "time_step_rank": 16, "n_groups": 1},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "ssm_state_size": 16,
        "n_groups": 8,
        "num_hidden_layers": None,
    },
    "nemotron": {"head_dim": 32},
    "rwkv": {"attention_hidden_size": 256},
    "zamba2": {
        "mamba_headdim": 64,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "attention_hidden_size": 512,
        "attention_head_dim": 64,
    },
}
"""Model type -> sizes that depend on one another in ways that their names do not tell, and defaults that it lacks."""


def shrink(config: Mapping[str, Any], sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Make a config of the same architecture with small sizes.

    Biases, ties, experts and kinds of layers stay as they are, and each kind of layer keeps at least one layer. One KV
    head stays one, and a KV head for each head stays so.

    Args:
        sizes: The small sizes.
    """
    keep = _kept_layers(config, sizes.layers)
    small = _shrink(config, sizes, keep)
    if isinstance(config.get("model_type"), str):
        small |= _BY_TYPE.get(config["model_type"], {})
    return {key: value for key, value in small.items() if value is not None or config.get(key) is None}


def _shrink(config: Mapping[str, Any], sizes: Sizes, keep: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    layers = _layers(config)
    for key, value in config.items():
        found[key] = _value(key, value, config, sizes, keep, layers)
    return found


def _value(
    key: str, value: Any, config: Mapping[str, Any], sizes: Sizes, keep: list[int], layers: int | None
) -> Any:
    if value is None and key == "head_dim":
        return sizes.head_dim
    if isinstance(value, Mapping):
        if key == "per_layer_config":  # its keys are numbers of layers
            return {
                f"{at:02}": _shrink(value[name], replace(sizes, head_dim=2 * sizes.head_dim), keep)
                for at, layer in enumerate(keep)
                for name in value
                if int(name) == layer
            }
        if key.startswith(("rope_", "id2label", "label2id")):
            return value
        if key.endswith(("_config", "encoder", "decoder")):
            return _shrink(value, sizes, _kept_layers(value, sizes.layers))
        return value
    if isinstance(value, list) and layers and len(value) == layers:
        return [value[i] if not _is_size(value[i]) else _of(key, value[i], config, sizes) for i in keep]
    if not _is_size(value):
        return value
    return len(keep) if name_of(key) == "layers" else _of(key, value, config, sizes)


def _of(key: str, value: int, config: Mapping[str, Any], sizes: Sizes) -> int:
    """The small value of the size that `key` names."""
    for pattern, fixed in _FIXED:
        if re.fullmatch(pattern, key):
            return min(value, fixed)
    if key == "qk_head_dim" and _is_size(config.get("qk_rope_head_dim")):
        return _of("qk_nope_head_dim", value, config, sizes) + _of("qk_rope_head_dim", value, config, sizes)
    if key == "head_dim" and _is_size(config.get("qk_rope_head_dim")):
        return _of(
            "qk_rope_head_dim", value, config, sizes
        )  # the rotary part of a head that is made from a latent
    if _TOKENS.fullmatch(key):
        return min(value, 3)
    name = name_of(key)
    if name == "kv_heads":
        heads = next((config[k] for k in ("num_attention_heads", "n_head") if _is_size(config.get(k))), None)
        return 1 if value == 1 else sizes.heads if value == heads else sizes.kv_heads
    if name is None or value == 0:
        return value
    found: int = getattr(sizes, name)
    return found


def name_of(key: str) -> str | None:
    """The field of `Sizes` that a config's key stands for, by its name; None for a key that is not a size."""
    return next((name for pattern, name in _SIZES if re.fullmatch(pattern, key)), None)


def is_head_dim(key: str) -> bool:
    """Whether a config's key names the width of a head, or of a part of one."""
    return key.endswith(("head_dim", "head_size", "kv_channels", "mamba_d_head", "mamba_headdim")) or key in (
        "d_kv",
        "d_head",
        "dim_head",
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _layers(config: Mapping[str, Any]) -> int | None:
    return next(
        (value for key, value in config.items() if name_of(key) == "layers" and _is_size(value)), None
    )


def _kept_layers(config: Mapping[str, Any], count: int) -> list[int]:
    """Choose the layers that a small model keeps: the first `count`.

    Where a kind of layer would be lost, a layer of it replaces one whose kind is there twice.
    """
    layers = _layers(config) or 0
    keep = list(range(min(count, layers)))
    lists = [config[key] for key in KINDS if isinstance(config.get(key), list) and len(config[key]) == layers]
    lost = [
        next(i for i, each in enumerate(zip(*lists, strict=True)) if each == kind)
        for kind in dict.fromkeys(zip(*lists, strict=True))
        if kind not in {tuple(each[i] for each in lists) for i in keep}
    ]
    return sorted({*keep, *lost})
