"""Build the very small checkpoints behind manifests/v1 and tests/data/v1, the same bytes everywhere and for ever.

Their files are written here byte by byte, with no library whose next version could write them otherwise. What each
worker must hold of them is cut here as well, by the words of the engines and without any code of shardprep.

    python tests/frozen_models.py FOLDER              every checkpoint, in FOLDER/<name>
    python tests/frozen_models.py --shards NAME       what every worker must hold of checkpoint NAME, as JSON
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the options with which it is split."""

    config: Mapping[str, Any]
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    tensor_parallel_size: int
    pipeline_parallel_size: int | None = None
    block_bytes: int | None = None
    """Where it is not the command's: no option of the command line gives another."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Side files beside config.json."""


def llama(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    tied: bool = False,
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and shapes of a Llama: weights are out x in."""
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": tied,
    }
    return config, shapes


def phi3() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A Phi-3: q, k and v are one tensor, gate and up another. One KV head for four heads."""
    config, shapes = llama(layers=2, hidden=16, heads=4, kv_heads=1, intermediate=24, vocabulary=11)
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    fused: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if ".q_proj." in name:
            fused[name.replace(".q_proj.", ".qkv_proj.")] = (16 + 4 + 4, 16)
        elif ".gate_proj." in name:
            fused[name.replace(".gate_proj.", ".gate_up_proj.")] = (24 + 24, 16)
        elif not any(word in name for word in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[name] = shape
    return config, fused


def mixtral() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A Mixtral of two experts."""
    config, shapes = llama(layers=2, hidden=8, heads=4, kv_heads=2, intermediate=12, vocabulary=9)
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    for i in range(2):
        block = f"model.layers.{i}.block_sparse_moe"
        shapes[f"{block}.gate.weight"] = (2, 8)
        for expert in range(2):
            shapes |= {
                f"{block}.experts.{expert}.w1.weight": (12, 8),
                f"{block}.experts.{expert}.w2.weight": (8, 12),
                f"{block}.experts.{expert}.w3.weight": (12, 8),
            }
    return config, shapes


def gpt2() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A GPT-2 as it lies on the Hub: no prefix, no head, the causal mask stored, weights in x out."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (13, 16), "wpe.weight": (8, 16)}
    for i in range(2):
        shapes |= {
            f"h.{i}.ln_1.weight": (16,),
            f"h.{i}.ln_1.bias": (16,),
            f"h.{i}.attn.bias": (1, 1, 8, 8),
            f"h.{i}.attn.c_attn.weight": (16, 48),
            f"h.{i}.attn.c_attn.bias": (48,),
            f"h.{i}.attn.c_proj.weight": (16, 16),
            f"h.{i}.attn.c_proj.bias": (16,),
            f"h.{i}.ln_2.weight": (16,),
            f"h.{i}.ln_2.bias": (16,),
            f"h.{i}.mlp.c_fc.weight": (16, 64),
            f"h.{i}.mlp.c_fc.bias": (64,),
            f"h.{i}.mlp.c_proj.weight": (64, 16),
            f"h.{i}.mlp.c_proj.bias": (16,),
        }
    shapes |= {"ln_f.weight": (16,), "ln_f.bias": (16,)}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 16,
        "n_positions": 8,
        "vocab_size": 13,
    }
    return config, shapes


MODELS = {
    "smallest": Model(
        *_swap(
            llama(layers=1, hidden=4, heads=2, kv_heads=1, intermediate=6, vocabulary=5, tied=True), "BF16"
        ),
        tensor_parallel_size=2,
    ),
    "llama-tp4-pp2": Model(
        *_swap(llama(layers=4, hidden=16, heads=4, kv_heads=4, intermediate=24, vocabulary=12), "BF16"),
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        others={"generation_config.json": {"eos_token_id": 1}, "tokenizer_config.json": {"eos_token": "</s>"}},
    ),
    "llama-tied-kv2-tp4": Model(
        *_swap(
            llama(layers=3, hidden=16, heads=4, kv_heads=2, intermediate=24, vocabulary=10, tied=True), "BF16"
        ),
        tensor_parallel_size=4,
    ),
    "phi3-fused-tp2": Model(
        *_swap(phi3(), "F16"), tensor_parallel_size=2, pipeline_parallel_size=2, block_bytes=256
    ),
    "gpt2-tp2": Model(*_swap(gpt2(), "F32"), tensor_parallel_size=2),
    "mixtral-tp2": Model(*_swap(mixtral(), "BF16"), tensor_parallel_size=2),
}
