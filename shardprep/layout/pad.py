"""Decide where zeros go so that tensor ranks can share an MLP in whole quantization groups. Arithmetic only.

A unit of an MLP whose weights are all zero adds nothing to the MLP's output: whatever its activation makes of 0, its
column of the last linear is zero. So the intermediate size can grow, and the model computes the same. That is not true
where something looks at all units together (a norm over them, the largest few of them). Nor is it true for heads,
since attention is scaled by their width. Only the MLPs of types for which it was proved are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, lcm, prod
from typing import Any, Final

from shardprep_runtime.errors import InputError, LayoutError, UnsupportedError, quote
from shardprep_runtime.format import dtypes
from shardprep_runtime.format.cut import Layout, allows

from ..index import CASTABLE, Extent, Index, Tensor
from . import ModelLayout, derive_layout, known_types
from .packed import pack as pack_layout

HARMLESS: Final = frozenset((
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam", "biogpt",
    "codegen", "cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "doge", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "flex_olmo", "flint", "gemma",
    "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granite_swa", "granitemoe_swa", "granitemoehybrid", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jamba",
    "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "llama", "llama4_text", "mellum",
    "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3",
    "mistral", "mixtral", "modernbert", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma", "youtu", "zaya",
))  # fmt: skip
"""Model types whose MLPs may be padded: a small model of each gives the same logits before and after, in float64 to
1e-12 of the largest (tests/integration/test_pad.py)."""

SIZES: Final = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "shared_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "ffn_dim",
    "n_inner",
)
"""Keys of configs that give the number of an MLP's units."""

SHARED_COUNTS: Final = (
    "n_shared_experts",
    "num_shared_experts",
    "num_shared_expert",
    "moe_num_shared_experts",
)
"""Keys of configs by which the shared expert has several times the units of a routed one."""


@dataclass(frozen=True, slots=True)
class Padding:
    """The sizes and tensors that were padded."""

    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Key of config.json -> its value before and after. Empty where no padding was needed."""
    tensors: int = 0
    """Number of tensors that were padded."""
    nbytes: int = 0
    """Bytes of zeros that were added."""

    def as_json(self) -> dict[str, Any]:
        """The padding as a JSON object, for a report."""
        sizes = {key: {"before": before, "after": after} for key, (before, after) in self.sizes.items()}
        return {"sizes": sizes, "tensors": self.tensors, "bytes": self.nbytes}


def share_evenly(size: int, multiple: int, ranks: int) -> int:
    """Round `size` up until `ranks` equal shares of it are multiples of `multiple`.

    Args:
        size: A number of units.
        multiple: Units that must stay together.
    """
    step = multiple * ranks
    return -(-size // step) * step


def pad_to(
    index: Index,
    *,
    tensor_parallel_size: int,
    group: int | None,
    pack: int = 8,
    skip: Sequence[str] = (),
) -> tuple[Index, Padding]:
    """Pad a checkpoint's MLPs with zeros so that tensor ranks can share them once it is quantized.

    Args:
        tensor_parallel_size: Ranks that shall share each MLP.
        group: Numbers of a row, along the input, that share a scale; None: all of them.
        pack: Numbers in a packed word.
        skip: Names of linears that are not quantized, as `layout.packed.pack` takes them.

    Returns:
        The index, whose padded tensors have extents of zeros and whose config has the new sizes, and what was padded. A
        plan of that index (`plan_convert`) writes both. The same index where no padding is needed.

    Raises:
        UnsupportedError: For a type whose MLPs are not known to stay right when padded.
        LayoutError: Where it is the heads or the hidden size that cannot be shared.
        InputError: For a shard set or a quantized checkpoint.
    """
    if index.kind == "shard set":
        raise InputError(
            f"{index.folder.where()}: a shard set is not padded; `shardprep export` restores the checkpoint"
        )
    if index.config.get("quantization_config"):
        raise InputError(f"{index.folder.where()}: quantized already; pad it before that")
    layout = _layout(index)
    layout.check_grain(tensor_parallel_size)
    model_type, at = _text(index.config)
    config: Mapping[str, Any] = index.config[at] if at else index.config
    step = lcm(group or 1, pack)
    mlps = list(_mlps(index, layout))
    if all(share_evenly(mlp.units, step, tensor_parallel_size) == mlp.units for mlp in mlps):
        _check(index, mlps, tensor_parallel_size, group, pack, skip)
        return index, Padding()
    if model_type not in HARMLESS:
        raise UnsupportedError(
            f"the MLPs of a {quote(model_type)} are not known to bear padding with zeros, as those of {len(HARMLESS)} "
            "other types do (shardprep.layout.pad.HARMLESS); use a size that can be shared as it is, or a smaller group"
        )
    sizes = _grown(mlps, config, step * tensor_parallel_size)
    padded, count, nbytes = _apply(index, mlps, sizes)
    keys = _keys(config, sizes)
    inner = {**config, **{key: after for key, (_, after) in keys.items()}}
    padded = replace(padded, config={**index.config, at: inner} if at else inner, edited=True)
    _check(padded, mlps, tensor_parallel_size, group, pack, skip)
    return padded, Padding(keys, count, nbytes)


def _layout(index: Index) -> ModelLayout:
    return derive_layout(index.config, {name: tensor.shape for name, tensor in index.tensors.items()})


def _text(config: Mapping[str, Any]) -> tuple[str, str]:
    """Give the type of the language model, and the key of config.json that holds its config (empty: config.json itself)."""
    text = config.get("text_config")
    if config.get("model_type") not in known_types() and isinstance(text, Mapping):
        return str(text.get("model_type")), "text_config"
    return str(config.get("model_type")), ""


# ----------------------------------------------------------------------------------------------------- what is padded


@dataclass(frozen=True, slots=True)
class _Mlp:
    """The linears of one MLP, or of a layer's experts."""

    path: str
    units: int
    tensors: Mapping[str, Layout]
    """Tensors that are cut along the MLP's units; a fused block is as long as all units, or a multiple of that."""


def _mlps(index: Index, layout: ModelLayout) -> Iterator[_Mlp]:
    """Find the MLPs of the layers: modules whose cut tensors are all linears that may be cut between any two indices."""
    modules: dict[str, dict[str, Layout]] = {}
    for name, placed in layout.tensors.items():
        if isinstance(placed.layer, int) and placed.layout.dim is not None:
            modules.setdefault(_module(name), {})[name] = placed.layout
    whole: dict[str, list[str]] = {}
    for name in index.tensors:
        whole.setdefault(_module(name), []).append(name)
    for path, tensors in modules.items():
        tensors = {name: own for name, own in tensors.items() if _anywhere(own)}
        weights = [name for name, own in tensors.items() if _is_matrix(index.tensors[name], own)]
        if len(weights) < 2 or not all(_is_linear(index.tensors[name], own) for name, own in tensors.items()):
            continue
        units = min(segment.size for own in tensors.values() for segment in own.segments)
        odd = next((n for n, own in tensors.items() if any(s.size % units for s in own.segments)), None)
        beside = next((n for n in whole[path] if n not in tensors and _spans(index.tensors[n], units)), None)
        if odd or beside:
            raise LayoutError(
                f"{quote(odd or beside)}: not a part of an MLP of {units} units that can be padded"
            )
        yield _Mlp(path, units, tensors)


def _module(name: str) -> str:
    """The module that a linear is part of: its name without `.weight` or `.bias` and without its own last word."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]


def _anywhere(layout: Layout) -> bool:
    """Whether a layout allows a cut between any two indices, as those of heads and of a mixer's groups do not."""
    return all(s.uneven and s.units == s.size and s.multiple == 1 for s in layout.segments)


def _is_matrix(tensor: Tensor, layout: Layout) -> bool:
    return len(tensor.shape) == (3 if layout.experts else 2) and not tensor.name.endswith("bias")


def _is_linear(tensor: Tensor, layout: Layout) -> bool:
    lead = 1 if layout.experts else 0
    is_bias = tensor.name.endswith("bias") and len(tensor.shape) == lead + 1
    return is_bias or _is_matrix(tensor, layout)


def _spans(tensor: Tensor, units: int) -> bool:
    """Whether a vector has a number for each unit, as a norm over them has."""
    return tensor.shape == (units,) and not tensor.name.endswith(".bias")


# --------------------------------------------------------------------------------------------------------- new sizes


def _grown(mlps: Sequence[_Mlp], config: Mapping[str, Any], step: int) -> dict[int, int]:
    """Number of units in config.json -> the new number, so that the units of every MLP are a multiple of `step`."""
    times: dict[int, set[int]] = {}
    for mlp in mlps:
        size, count = _sized_by(mlp, config)
        times.setdefault(size, set()).add(count)
    steps = {size: lcm(*(step // gcd(step, count) for count in counts)) for size, counts in times.items()}
    return {size: share_evenly(size, each, 1) for size, each in steps.items() if size % each}


def _sized_by(mlp: _Mlp, config: Mapping[str, Any]) -> tuple[int, int]:
    """Find the size in config.json that an MLP's units are a multiple of, and how many times; else raise LayoutError."""
    said = {config[key] for key in SIZES if type(config.get(key)) is int}
    counts = {1}
    if "shared" in mlp.path.rpartition("layers.")[2]:
        counts |= {config[key] for key in SHARED_COUNTS if type(config.get(key)) is int and config[key] > 0}
    found = {(size, count) for size in said for count in counts if size * count == mlp.units}
    if len({size for size, _ in found}) != 1:
        raise LayoutError(
            f"{quote(mlp.path)}: {mlp.units} units, and {'several sizes' if found else 'no size'} of config.json "
            f"({', '.join(SIZES)}) can be theirs; what is padded must be known"
        )
    return min(found, key=lambda each: each[1])


def _keys(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, tuple[int, int]]:
    """Keys of config.json whose value is one of `sizes` -> the value before and after."""
    return {key: (config[key], sizes[config[key]]) for key in SIZES if config.get(key) in sizes}


def _apply(index: Index, mlps: Sequence[_Mlp], sizes: Mapping[int, int]) -> tuple[Index, int, int]:
    """Pad the MLPs' tensors; give the index, the number of padded tensors, and the bytes of zeros."""
    tensors = dict(index.tensors)
    count = nbytes = 0
    for mlp in mlps:
        said = [size for size in sizes if mlp.units % size == 0]
        if not said:
            continue
        size = max(said)
        for name, layout in mlp.tensors.items():
            tensor = tensors[name]
            if tensor.dtype not in CASTABLE:
                raise UnsupportedError(
                    f"{quote(name)}: {tensor.dtype} is not padded; known are {', '.join(CASTABLE)}"
                )
            lengths = [(s.size, s.size // size * sizes[size]) for s in layout.segments]
            tensors[name] = pad_tensor(tensor, layout.dim or 0, lengths)
            count += 1
            nbytes += tensors[name].nbytes - tensor.nbytes
    return replace(index, tensors=tensors), count, nbytes


def pad_tensor(tensor: Tensor, dim: int, lengths: Sequence[tuple[int, int]]) -> Tensor:
    """Add zeros after each block of a dim.

    Args:
        dim: The dim that is padded.
        lengths: Indices of each block along the dim, before and after.
    """
    (whole,) = tensor.extents
    strides = whole.strides or tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    # a block of the outermost dim is one run of bytes wherever the whole tensor is one
    plain = whole.strides is None and prod(tensor.shape[:dim]) == 1
    extents = []
    at = start = 0
    for before, after in lengths:
        offset = whole.offset + at * strides[dim] * dtypes.BITS[tensor.dtype] // 8
        block = replace(whole, offset=offset, start=start, stop=start + before)
        extents.append(block if plain or len(lengths) == 1 else replace(block, strides=strides))
        if after > before:
            extents.append(Extent("", 0, start + before, start + after))
        at += before
        start += after
    shape = (*tensor.shape[:dim], start, *tensor.shape[dim + 1 :])
    return replace(tensor, shape=shape, extents=tuple(extents), dim=dim)


def _check(
    index: Index, mlps: Sequence[_Mlp], size: int, group: int | None, pack: int, skip: Sequence[str]
) -> None:
    """Raise LayoutError where the index cannot be quantized so, or `size` ranks cannot share the quantized tensors."""
    layout = _layout(index)
    layout.check_grain(size)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()}
    packed = pack_layout(layout, shapes, method="gptq", bits=32 // pack, group=group, skip=skip)
    own = {name for mlp in mlps for name in mlp.tensors}
    odd = next((name for name in packed.kept if name in own), None)
    if odd is not None:
        raise LayoutError(
            f"{quote(odd)}: its sizes {list(shapes[odd][1])} are not multiples of {group} and {pack}; only an MLP's "
            "intermediate size can be padded, not the hidden size: use a group size that divides it"
        )
    for name, grain in packed.grains.items():
        if not allows(packed.layout.tensors[name].layout, size):
            raise LayoutError(
                f"{quote(grain.weight)}: {grain.size} / {size} is not a multiple of {grain.multiple}, in which its "
                "quantization comes, and only an MLP can be padded: use fewer ranks or a smaller group, or leave "
                "it as it is (--skip)"
            )
