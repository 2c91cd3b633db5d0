"""Build the very small checkpoints behind manifests/v1 and tests/data/v1, the same bytes everywhere and for ever.

Their files are written here byte by byte, with no library whose next version could write them otherwise. What each
worker must hold of the frozen ones is cut here too, in the words of the engines and without any code of shardprep.

    python tests/frozen_models.py FOLDER            every checkpoint, in FOLDER/<name>
    python tests/frozen_models.py --shards NAME     what every worker must hold of NAME, as JSON
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

import numpy as np

Shapes = dict[str, tuple[int, ...]]
Stages = list[tuple[int, int]]

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}

WHOLE: dict[str, Any] = {"cut": "whole"}


def units(dim: int, *segments: Any, experts: bool = False) -> dict[str, Any]:
    """A layout as a manifest has it: segments are [size, units, shared] or, uneven, {size, units, multiple}."""
    return {"cut": "units", "dim": dim, "segments": segments, **({"experts": True} if experts else {})}


def uneven(size: int, multiple: int = 1) -> dict[str, Any]:
    """A segment that is shared in chunks."""
    return {"size": size, "units": size, "uneven": True, "multiple": multiple}


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the options with which it is split."""

    config: Mapping[str, Any]
    shapes: Shapes
    dtype: str
    """Of all tensors but packed ones."""
    tensor_parallel_size: int
    pipeline_parallel_size: int | None = None
    block_bytes: int | None = None
    """Where they are not the command's, which has no option for them."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """JSON files beside config.json."""
    layouts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None
    """Word of a name -> how it is stored, and engine -> how that asks for it; None: by the rules of its model type."""


def llama(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    tied: bool = False,
) -> tuple[dict[str, Any], Shapes]:
    """A Llama. Weights are out x in."""
    kv = hidden // heads * kv_heads
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
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
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    return config, shapes


def phi3() -> tuple[dict[str, Any], Shapes]:
    """A Phi-3: q, k and v are one tensor, gate and up another. One KV head for four heads."""
    config, shapes = llama(layers=2, hidden=16, heads=4, kv_heads=1, intermediate=24, vocabulary=11)
    fused: Shapes = {}
    for name, shape in shapes.items():
        if ".q_proj." in name:
            fused[name.replace(".q_proj.", ".qkv_proj.")] = (16 + 4 + 4, 16)
        elif ".gate_proj." in name:
            fused[name.replace(".gate_proj.", ".gate_up_proj.")] = (24 + 24, 16)
        elif not any(word in name for word in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[name] = shape
    return {
        **config,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "dtype": "float16",
    }, fused


def llama_gptq() -> tuple[dict[str, Any], Shapes]:
    """A Llama in 4 bits, groups of 16: two KV heads, two groups along the input of every linear."""
    config, shapes = llama(layers=1, hidden=32, heads=4, kv_heads=2, intermediate=32, vocabulary=7)
    packed: Shapes = {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith("_proj"):
            packed[name] = shape
            continue
        out, columns = shape
        packed |= {
            f"{stem}.qweight": (columns // 8, out),
            f"{stem}.qzeros": (columns // 16, out // 8),
            f"{stem}.scales": (columns // 16, out),
            f"{stem}.g_idx": (columns,),
        }
    how = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 16,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    return {**config, "dtype": "float16", "quantization_config": how}, packed


def mixtral() -> tuple[dict[str, Any], Shapes]:
    """A Mixtral of two experts."""
    config, shapes = llama(layers=2, hidden=8, heads=4, kv_heads=2, intermediate=12, vocabulary=9)
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
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    return config, shapes


def gpt2() -> tuple[dict[str, Any], Shapes]:
    """A GPT-2 as it lies on the Hub: no prefix, no head, no dtype, the causal mask stored. Weights are in x out."""
    shapes: Shapes = {"wte.weight": (13, 16), "wpe.weight": (8, 16)}
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


HEADS = units(0, [8, 4, False])
ROWS, PADDED_ROWS = units(0, uneven(70)), units(0, uneven(70, 64))

ENGINES = ("transformers", "vllm")
"""Those that the sets with layouts of their own know. What they ask for is made up, to show all that a set can serve."""


def experts_each() -> tuple[dict[str, Any], Shapes, dict[str, Any]]:
    """A dense layer and one of five experts, each with tensors of its own; ten does not divide by four."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (70, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        "model.layers.0.mlp.up_proj.weight": (10, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 10),
        "model.layers.1.mlp.gate.weight": (5, 8),
    }
    for expert in range(5):
        shapes[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] = (10, 8)
        shapes[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = (8, 10)
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (70, 8)}
    layouts = {
        "embed_tokens": (ROWS, {"vllm": PADDED_ROWS}),
        "lm_head": (ROWS, {"vllm": PADDED_ROWS, "transformers": WHOLE}),
        "q_proj": (HEADS, {}),
        "o_proj": (units(1, [8, 4, False]), {"transformers": WHOLE}),
        "up_proj": (units(0, uneven(10)), {"vllm": units(0, uneven(10, 8))}),
        "down_proj": (units(1, uneven(10)), {"vllm": units(1, uneven(10, 8))}),
    }
    return _moe_config(), shapes, layouts


def experts_fused() -> tuple[dict[str, Any], Shapes, dict[str, Any]]:
    """Two layers of five experts in one tensor each; gate and up beside each other, seven wide."""
    shapes: Shapes = {"model.embed_tokens.weight": (70, 8)}
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (8, 8),
            f"model.layers.{i}.mlp.gate.weight": (5, 8),
            f"model.layers.{i}.mlp.experts.gate_up_proj": (5, 14, 8),
            f"model.layers.{i}.mlp.experts.gate_up_proj_bias": (5, 14),
            f"model.layers.{i}.mlp.experts.down_proj": (5, 8, 7),
            f"model.layers.{i}.mlp.experts.down_proj_bias": (5, 8),
        }
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (70, 8)}
    gate_up = units(1, uneven(7), uneven(7), experts=True)
    layouts = {
        "embed_tokens": (ROWS, {"vllm": PADDED_ROWS}),
        "lm_head": (ROWS, {"vllm": PADDED_ROWS, "transformers": WHOLE}),
        "q_proj": (HEADS, {}),
        "gate_up_proj": (gate_up, {"vllm": units(1, uneven(14), experts=True), "transformers": WHOLE}),
        "gate_up_proj_bias": (gate_up, {}),
        "down_proj": (units(2, uneven(7), experts=True), {"vllm": units(2, uneven(7, 4), experts=True)}),
        "down_proj_bias": ({"cut": "whole", "experts": True}, {}),
    }
    return _moe_config(), shapes, layouts


def _moe_config() -> dict[str, Any]:
    return {
        "architectures": ["MixtureForCausalLM"],
        "model_type": "mixture",
        "dtype": "bfloat16",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_local_experts": 5,
        "tie_word_embeddings": False,
    }


def _moe(parts: tuple[dict[str, Any], Shapes, dict[str, Any]]) -> Model:
    config, shapes, layouts = parts
    return Model(config, shapes, "BF16", tensor_parallel_size=4, block_bytes=128, layouts=layouts)


MODELS = {
    "smallest": Model(
        *llama(layers=1, hidden=4, heads=2, kv_heads=1, intermediate=6, vocabulary=5, tied=True),
        "BF16",
        tensor_parallel_size=2,
    ),
    "llama-tp4-pp2": Model(
        *llama(layers=4, hidden=16, heads=4, kv_heads=4, intermediate=24, vocabulary=12),
        "BF16",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        others={
            "generation_config.json": {"eos_token_id": 1},
            "tokenizer_config.json": {"eos_token": "</s>"},
        },
    ),
    "llama-tied-kv2-tp4": Model(
        *llama(layers=3, hidden=16, heads=4, kv_heads=2, intermediate=24, vocabulary=10, tied=True),
        "BF16",
        tensor_parallel_size=4,
    ),
    "phi3-fused-tp2": Model(
        *phi3(), "F16", tensor_parallel_size=2, pipeline_parallel_size=2, block_bytes=256
    ),
    "gpt2-tp2": Model(*gpt2(), "F32", tensor_parallel_size=2),
    "mixtral-tp2": Model(*mixtral(), "BF16", tensor_parallel_size=2),
    "llama-gptq-tp2": Model(
        *llama_gptq(),
        "F16",
        tensor_parallel_size=2,
        others={"quantization_report.json": {"summary": {"kl": 0.0002, "perplexity": 57.9}}},
    ),
    "experts-each-tp4": _moe(experts_each()),
    "experts-fused-tp4": _moe(experts_fused()),
}
"""`smallest` is the example of docs/manifest-format.md; the others are those of manifests/v1."""

FROZEN = ("llama-tied-kv2-tp4", "phi3-fused-tp2", "experts-each-tp4", "experts-fused-tp4")
"""Those whose whole shard sets are in tests/data/v1."""


# --------------------------------------------------------------------------------------------------- the checkpoints


def tensor_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Any bits that the tensor's name gives, but finite numbers: the exponent's highest bit is never set."""
    data = bytearray(hashlib.shake_256(name.encode()).digest(prod(shape) * WIDTH[dtype]))
    high = slice(WIDTH[dtype] - 1, None, WIDTH[dtype])  # little-endian: the last byte has sign and exponent
    data[high] = bytes(byte & 0xBF for byte in data[high])
    return bytes(data)


def dtype_of(name: str, model: Model) -> str:
    """The dtype of one of a model's tensors."""
    return "I32" if name.rpartition(".")[2] in ("qweight", "qzeros", "g_idx") else model.dtype


def write_checkpoint(name: str, folder: Path) -> Path:
    """Checkpoint `name` as model.safetensors and config.json in `folder`/`name`, which is returned."""
    model, root = MODELS[name], folder / name
    root.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for tensor, shape in sorted(model.shapes.items()):
        dtype = dtype_of(tensor, model)
        own = tensor_bytes(tensor, dtype, shape)
        header[tensor] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(own)],
        }
        data += own
    text = json.dumps(header, separators=(",", ":")).encode()
    (root / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    for path, fields in {"config.json": model.config, **model.others}.items():
        (root / path).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    return root


# --------------------------------------------------------------------------------------- what each worker must hold


def shards(name: str) -> dict[str, Any]:
    """What every worker of a frozen model must hold: which names in each stage, and which bytes in each tensor rank."""
    model = MODELS[name]
    layers: int = model.config["num_hidden_layers"]
    even = {2: {1: [(0, 2)], 2: [(0, 1), (1, 2)]}, 3: {1: [(0, 3)], 2: [(0, 2), (2, 3)]}}[layers]
    stages: list[tuple[Stages, bool]] = [(bounds, False) for bounds in even.values()]
    if layers == 3:
        stages += [([(0, 1), (1, 2), (2, 3)], False), ([(0, 1), (1, 3)], True)]
    sizes = [size for size in (1, 2, 4) if model.tensor_parallel_size % size == 0]
    groups = [(size, ep) for size in sizes for ep in (1, 2, 4) if size % ep == 0]
    if model.layouts is None:
        ranks = [(size, 1, rank, "torch") for size in sizes for rank in range(size)]
    else:
        ranks = [
            (size, ep, rank, engine)
            for engine in ("torch", *ENGINES)
            for size, ep in groups
            for rank in range(size)
        ]
    return {
        "stages": [
            {
                "pipeline_parallel_size": len(bounds),
                "stages": bounds if asked_for else None,
                "names": [list(_names(model, bounds, pp_rank)) for pp_rank in range(len(bounds))],
            }
            for bounds, asked_for in stages
        ],
        "ranks": [
            {
                "tensor_parallel_size": size,
                "expert_parallel_size": ep,
                "tp_rank": rank,
                "engine": engine,
                "tensors": dict(_tensors(model, size, ep, rank, engine)),
            }
            for size, ep, rank, engine in ranks
        ],
    }


def _names(model: Model, stages: Stages, pp_rank: int) -> Iterator[str]:
    first, last = pp_rank == 0, pp_rank == len(stages) - 1
    tied = model.config["tie_word_embeddings"]
    for name in model.shapes:
        if name.startswith("model.layers."):
            start, stop = stages[pp_rank]
            wanted = start <= int(name.split(".")[2]) < stop
        elif name == "model.embed_tokens.weight":
            wanted = first or (last and tied)
        else:  # the last norm and the head
            wanted = last
        if wanted:
            yield name
    if tied and (first or last):
        yield "lm_head.weight"


def _tensors(model: Model, size: int, ep: int, rank: int, engine: str) -> Iterator[tuple[str, str]]:
    for name, shape in model.shapes.items():
        full = np.frombuffer(tensor_bytes(name, model.dtype, shape), f"u{WIDTH[model.dtype]}").reshape(shape)
        if model.layouts is None:
            own: np.ndarray | None = _own(name, full, model.config, size, rank)
        else:
            own = _own_of_mixture(name, full, size, ep, rank, engine)
        if own is None:
            continue
        text = f"{model.dtype} {'x'.join(map(str, own.shape))} {hashlib.sha256(own.tobytes()).hexdigest()}"
        yield name, text
        if name == "model.embed_tokens.weight" and model.config["tie_word_embeddings"]:
            yield "lm_head.weight", text


def _own(name: str, full: np.ndarray, config: Mapping[str, Any], size: int, rank: int) -> np.ndarray:
    """The block of tensor rank `rank`, as Megatron and vLLM cut Llama and Phi-3."""
    kv_heads = config["num_key_value_heads"]
    head = config["hidden_size"] // config["num_attention_heads"]

    def rows(block: np.ndarray) -> np.ndarray:
        return np.split(block, size)[rank]

    def kv_rows(block: np.ndarray) -> np.ndarray:
        if size <= kv_heads:
            return rows(block)
        mine = rank // (size // kv_heads)  # ranks beside each other keep the same head
        return block[mine * head : (mine + 1) * head]

    match name.split(".")[-2]:
        case "embed_tokens" | "lm_head":
            return _chunk(full, 0, size, rank)
        case "q_proj" | "gate_proj" | "up_proj":
            return rows(full)
        case "k_proj" | "v_proj":
            return kv_rows(full)
        case "o_proj" | "down_proj":
            return np.split(full, size, axis=1)[rank]
        case "qkv_proj":
            q, k, v = np.split(full, [len(full) - 2 * kv_heads * head, len(full) - kv_heads * head])
            return np.concatenate([rows(q), kv_rows(k), kv_rows(v)])
        case "gate_up_proj":
            gate, up = np.split(full, 2)
            return np.concatenate([rows(gate), rows(up)])
        case _:
            return full


def _own_of_mixture(
    name: str, full: np.ndarray, size: int, ep: int, rank: int, engine: str
) -> np.ndarray | None:
    """The block of a worker of one of the mixtures; None: an expert that others have."""
    words = name.split(".")
    group = size // ep
    mine = np.array_split(np.arange(5), ep)[rank // group]  # a remainder goes to the first, as in vLLM
    vllm, transformers = engine == "vllm", engine == "transformers"
    if "experts" in words:
        size, rank = group, rank % group
        if words[-1] == "weight":
            if int(words[5]) not in mine:
                return None
            return _chunk(full, 0 if "up_proj" in words else 1, size, rank, 8 if vllm else 1)
        if words[-1] == "gate_up_proj" and transformers:
            return full
        full = full[mine]
        match words[-1]:
            case "gate_up_proj" if vllm:
                return _chunk(full, 1, size, rank)
            case "gate_up_proj" | "gate_up_proj_bias":
                gate, up = np.split(full, 2, axis=1)
                return np.concatenate([_chunk(gate, 1, size, rank), _chunk(up, 1, size, rank)], axis=1)
            case "down_proj":
                return _chunk(full, 2, size, rank, 4 if vllm else 1)
            case _:
                return full
    match words[-2]:
        case "lm_head" if transformers:
            return full
        case "embed_tokens" | "lm_head":
            return _chunk(full, 0, size, rank, 64 if vllm else 1)
        case "q_proj":
            return np.split(full, size)[rank]
        case "o_proj":
            return full if transformers else np.split(full, size, axis=1)[rank]
        case "up_proj":
            return _chunk(full, 0, size, rank, 8 if vllm else 1)
        case "down_proj":
            return _chunk(full, 1, size, rank, 8 if vllm else 1)
        case _:
            return full


def _chunk(full: np.ndarray, axis: int, size: int, rank: int, multiple: int = 1) -> np.ndarray:
    """What is left of the rank's equal share of the axis, padded to `multiple` and then to `size`."""
    padded = -(-full.shape[axis] // multiple) * multiple
    width = -(-padded // size)
    return full.take(range(full.shape[axis])[rank * width : (rank + 1) * width], axis=axis)


if __name__ == "__main__":
    if sys.argv[1] == "--shards":
        print(json.dumps(shards(sys.argv[2]), indent=1))
    else:
        for each in MODELS:
            write_checkpoint(each, Path(sys.argv[1]))
