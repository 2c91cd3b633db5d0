"""Checkpoints of published models that hold headers alone: their data is a hole in a sparse file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from shardprep_runtime.format.dtypes import BITS

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def write(folder: Path, config: Mapping[str, Any], tensors: Shapes) -> Path:
    """A checkpoint of these tensors in one file of its full length, of which the header alone takes room."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


LLAMA_3_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_31_405B = {
    **LLAMA_3_70B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "max_position_embeddings": 131072,
}
LLAMA_2_13B = {
    **LLAMA_3_70B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
QWEN_25_72B = {
    **LLAMA_3_70B,
    "model_type": "qwen2",
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 70,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}


def llama_tensors(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a Llama, or of a Qwen 2 with its biases."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    dtype = {"bfloat16": "BF16", "float16": "F16"}[config["torch_dtype"]]
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config["model_type"] == "qwen2":
        layer |= {
            f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", hidden), ("k", kv), ("v", kv))
        }
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: (dtype, shape) for name, shape in found.items()}


def deepseek_tensors(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a DeepSeek-V3 as it is published: fp8 in blocks of 128 x 128, each with a scale."""
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value, q_rank = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    found: Shapes = {
        "model.embed_tokens.weight": ("BF16", (vocab, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
        "lm_head.weight": ("BF16", (vocab, hidden)),
    }

    def mlp(name: str, inner: int) -> dict[str, tuple[int, int]]:
        return {
            f"{name}.gate_proj": (inner, hidden),
            f"{name}.up_proj": (inner, hidden),
            f"{name}.down_proj": (hidden, inner),
        }

    for i in range(config["num_hidden_layers"]):
        linears = {
            "self_attn.q_a_proj": (q_rank, hidden),
            "self_attn.q_b_proj": (heads * (nope + rope), q_rank),
            "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
            "self_attn.kv_b_proj": (heads * (nope + value), rank),
            "self_attn.o_proj": (hidden, heads * value),
        }
        others: dict[str, tuple[str, tuple[int, ...]]] = {
            "input_layernorm.weight": ("BF16", (hidden,)),
            "post_attention_layernorm.weight": ("BF16", (hidden,)),
            "self_attn.q_a_layernorm.weight": ("BF16", (q_rank,)),
            "self_attn.kv_a_layernorm.weight": ("BF16", (rank,)),
        }
        if i < config["first_k_dense_replace"]:
            linears |= mlp("mlp", config["intermediate_size"])
        else:
            inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
            linears |= mlp("mlp.shared_experts", inner * config["n_shared_experts"])
            for expert in range(experts):
                linears |= mlp(f"mlp.experts.{expert}", inner)
            others["mlp.gate.weight"] = ("BF16", (experts, hidden))
            others["mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
        for name, (rows, columns) in linears.items():
            others[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
            others[f"{name}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))
        found |= {f"model.layers.{i}.{name}": form for name, form in others.items()}
    return found
