"""Make tiny checkpoints of random weights, shaped as real models are, with nothing but torch.save and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lazily import save_file, torch

Tensors = dict[str, Any]  # of torch, which nothing needs yet


def llama_config(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 4,
    vocab: int = 50,
    intermediate: int = 48,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The config.json of a small Llama; `more` overrides or adds keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads * head_dim,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **more,
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that the config stands for."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def gpt2_config(*, heads: int = 4, head_dim: int = 8, layers: int = 2, vocab: int = 50) -> dict[str, Any]:
    """The config.json of a small GPT-2: one fused projection, tied embeddings, weights stored in x out."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": heads * head_dim,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": 16,
        "vocab_size": vocab,
        "torch_dtype": "float32",
    }


def gpt2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that the config stands for."""
    width = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    for i in range(config["n_layer"]):
        layer = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, 4 * width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (4 * width, width),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    return {**shapes, "transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


def phi3_config(**sizes: Any) -> dict[str, Any]:
    """The config.json of a small Phi-3: Llama with q, k and v in one tensor, and gate and up in another."""
    return llama_config(**sizes) | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def phi3_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that the config stands for."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    shapes = {name: shape for name, shape in llama_shapes(config).items() if name.split(".")[-2] not in apart}
    for i in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{i}.self_attn.qkv_proj.weight"] = (hidden + 2 * kv, hidden)
        shapes[f"model.layers.{i}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
    return shapes


SHAPES = {"llama": llama_shapes, "gpt2": gpt2_shapes, "phi3": phi3_shapes}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], *, dtype: Any = None, seed: int = 0) -> Tensors:
    """A tensor of each shape, in bfloat16 unless `dtype` says otherwise; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype or torch.bfloat16)
        for name, shape in shapes.items()
    }


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    *,
    kind: str = "torch",
    shards: int = 1,
) -> Path:
    """Write `tensors` as Hugging Face lays them out, in `shards` files of kind `torch` or `safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix, stem = ("bin", "pytorch_model") if kind == "torch" else ("safetensors", "model")
    names = list(tensors)
    groups = [names[len(names) * i // shards : len(names) * (i + 1) // shards] for i in range(shards)]
    weight_map = {}
    for i, group in enumerate(groups):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        chosen = {name: tensors[name] for name in group}
        if kind == "torch":
            torch.save(chosen, folder / file)
        else:
            save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
        (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


def write_model(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    kind: str = "torch",
    shards: int = 1,
    dtype: Any = None,
    seed: int = 0,
) -> Path:
    """A small model of random weights (a Llama unless `config` says otherwise) with its config and side files."""
    config = config or llama_config()
    tensors = random_tensors(SHAPES[config["model_type"]](config), dtype=dtype, seed=seed)
    return write_checkpoint(folder, tensors, config, kind=kind, shards=shards)
