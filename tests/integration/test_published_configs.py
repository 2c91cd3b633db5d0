"""Configs as well-known checkpoints publish them: their keys are understood, and a rank's share is what it should be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shardprep.fit.weights import Census
from shardprep.index import natural
from shardprep.layout import derive_layout
from shardprep.model.skeleton import shapes_of
from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format import dtypes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]  # which takes seconds to import

PUBLISHED: dict[str, tuple[dict[str, Any], float, int]] = {
    "Qwen2.5-7B": ({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 7.62e9, 4),
    "Qwen3-30B-A3B": ({
        "model_type": "qwen3_moe", "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936, "decoder_sparse_step": 1,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 30.5e9, 8),
    "Mixtral-8x7B": ({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 46.7e9, 8),
    "gemma-2-9b": ({
        "model_type": "gemma2", "head_dim": 256, "hidden_size": 3584, "intermediate_size": 14336, "query_pre_attn_scalar": 256,
        "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "vocab_size": 256000,
        "torch_dtype": "float32",
    }, 9.24e9, 8),
    "Phi-3-mini": ({
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32064, "pad_token_id": 32000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 3.82e9, 8),
    "DeepSeek-V2-Lite": ({
        "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "topk_group": 1, "topk_method": "greedy",
        "v_head_dim": 128, "vocab_size": 102400, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 15.7e9, 8),
    "GLM-4.5-Air": ({
        "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "topk_group": 1, "vocab_size": 151552, "use_qk_norm": False,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 107e9, 8),
    "bloom-7b1": ({
        "model_type": "bloom", "n_embed": 4096, "n_layer": 30, "num_attention_heads": 32, "vocab_size": 250880,
        "torch_dtype": "float16",
    }, 7.07e9, 8),
    "falcon-40b": ({
        "model_type": "falcon", "hidden_size": 8192, "new_decoder_architecture": True, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "vocab_size": 65024, "bias": False, "torch_dtype": "bfloat16",
    }, 41.3e9, 0),
    "gpt-neox-20b": ({
        "model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64,
        "num_hidden_layers": 44, "vocab_size": 50432, "tie_word_embeddings": False, "torch_dtype": "float16",
    }, 20.6e9, 8),
    "starcoder2-15b": ({
        "model_type": "starcoder2", "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
        "num_hidden_layers": 40, "num_key_value_heads": 4, "use_bias": True, "vocab_size": 49152,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 15.96e9, 8),
    "c4ai-command-r-v01": ({
        "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_attention_heads": 64,
        "num_hidden_layers": 40, "num_key_value_heads": 64, "vocab_size": 256000, "torch_dtype": "float16",
    }, 35.0e9, 8),
    "OLMo-2-7B": ({
        "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 100352, "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }, 7.30e9, 8),
    "granite-3.1-8b": ({
        "model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "vocab_size": 49155, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }, 8.17e9, 8),
    "Mistral-Nemo": ({
        "model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "vocab_size": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }, 12.2e9, 8),
    "gpt-oss-20b": ({
        "model_type": "gpt_oss", "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "vocab_size": 201088, "attention_bias": True, "sliding_window": 128, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "torch_dtype": "bfloat16",
    }, 20.9e9, 8),
    "bert-base": ({
        "model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "vocab_size": 30522, "torch_dtype": "float32",
    }, 0.1095e9, 4),
}  # fmt: skip
"""Name -> what its config.json says of its architecture, its parameters as its authors count them, and the largest
tensor parallel size up to 8 at which its tensors are cut evenly (0: not all of them are)."""


@pytest.mark.parametrize("name", sorted(PUBLISHED, key=natural))
def test_a_published_config_gives_every_rank_its_share(name: str) -> None:
    config, parameters, size = PUBLISHED[name]
    shapes = shapes_of(config)
    elements = sum(math.prod(shape) for _, shape in shapes.values())
    assert elements == pytest.approx(parameters, rel=0.01)
    layout = derive_layout(config, {key: shape for key, (_, shape) in shapes.items()})
    census = Census(layout, shapes)
    model = sum(dtypes.nbytes(dtype, shape) for dtype, shape in shapes.values())
    if size:
        held = max(census.weigh(size).stage(0, layout.layers, first=True, last=True))
        assert model / size <= held <= 1.03 * model / size
    if 0 < size < 8:
        with pytest.raises(LayoutError, match="cannot be shared"):
            census.weigh(8)
