"""Make small quantized checkpoints out of others, by rounding to nearest, with the files that real tools write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazily import load_file, save_file, torch
from shardprep.layout.packed import _names
from shardprep.layout.quantization import Scheme
from shardprep.quantize.packing import INTERLEAVED, PACKED, _ones, _shifts
from shardprep_runtime.errors import LayoutError, UnsupportedError, quote

ROUTERS = ("gate", "router", "shared_expert_gate")

LEGACY = {"gptq": "quantize_config.json", "awq": "quant_config.json"}


@contextmanager
def one_thread() -> Iterator[None]:
    """No more than one thread of torch: small tensors are done sooner than they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as torch and safetensors read them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted([] if found else folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether quantizers take this tensor for the weight of a linear of a layer."""
    words = name.split(".")
    in_layer = any(word.isdigit() for word in words) and words[-1] == "weight"
    return in_layer and tensor.ndim == 2 and words[-2] not in ROUTERS


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The fields of a weight (out x in) of which each number is the nearest that its group can hold.

    Scales span each group from its least to its greatest; there is no calibration. With act-order inputs are dealt
    to groups by their norm, the largest first. Raises LayoutError where the weight does not divide into groups and
    words.
    """
    if scheme.method not in PACKED:
        raise UnsupportedError(f"{quote(scheme.method)}: expected one of {', '.join(PACKED)}")
    rows, columns = weight.shape
    size = scheme.group or columns
    words = 32 // scheme.bits
    if columns % size or columns % words or rows % words:
        raise LayoutError(
            f"a weight of {rows} x {columns} does not divide into groups of {size} inputs and words of {words} numbers"
        )
    group = torch.arange(columns, dtype=torch.int32, device=weight.device) // size
    if scheme.act_order:
        order = torch.argsort(weight.float().norm(dim=0), descending=True, stable=True)
        group = torch.empty_like(group).scatter_(0, order, group)
    compressed = scheme.method == "compressed-tensors"
    narrow = torch.float16 if not compressed or weight.dtype == torch.float32 else weight.dtype
    number, zero, scales = _round(weight.float(), group, columns // size, scheme, narrow)
    if compressed:
        fields = {
            "weight_packed": _pack(number, scheme.bits, -1),  # out x in / words
            "weight_scale": scales,  # out x groups
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not scheme.symmetric:
            fields["weight_zero_point"] = _pack(zero, scheme.bits, -2)  # out / words x groups
        return fields | ({"weight_g_idx": group} if scheme.act_order else {})
    order_of_words = INTERLEAVED if scheme.method == "awq" else None
    zeros = _pack(zero.t(), scheme.bits, -1, order_of_words)
    fields = {
        "qweight": _pack(number.t(), scheme.bits, -1 if order_of_words else -2, order_of_words),
        "qzeros": zeros - _ones(scheme.bits) if scheme.format == "gptq" else zeros,
        "scales": scales.t().contiguous(),  # groups x out
    }
    return fields | ({"g_idx": group} if scheme.method == "gptq" else {})


def _round(
    weight: torch.Tensor, group: torch.Tensor, groups: int, scheme: Scheme, narrow: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers (out x in), zero points and scales (out x groups)."""
    top = 2**scheme.bits - 1
    order = torch.argsort(group, stable=True)
    grouped = weight[:, order].reshape(len(weight), groups, -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    elif scheme.format == "gptq":
        low = torch.minimum(low, -high / (top - 1))  # a zero point of 0 cannot be stored less one
    scales = ((high - low) / top).to(narrow)
    scales[scales == 0] = 1
    wide = scales.float()
    zero = torch.full_like(wide, 2 ** (scheme.bits - 1)) if scheme.symmetric else (-low / wide).round()
    zero = zero.clamp(scheme.format == "gptq", top)
    index = group.long()
    number = (weight / wide[:, index]).round() + zero[:, index]
    return number.clamp(0, top).int(), zero.int(), scales


def _pack(numbers: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Words of which each index along `dim` (-1 or -2) holds 32 / bits numbers."""
    shifts = torch.tensor(_shifts(bits, order), dtype=torch.int32, device=numbers.device)
    if dim == -2:
        shifts = shifts[:, None]
    shape = list(numbers.shape)
    at = len(shape) + dim
    shape[at : at + 1] = [shape[at] // (32 // bits), 32 // bits]
    split = numbers.int().reshape(shape)
    # numbers have no bits in common, so that their sum is their union; int32 wraps around
    words: torch.Tensor = (split << shifts).sum(at + 1, dtype=torch.int32)
    return words.contiguous()


def quantized_tensors(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, head: bool = False
) -> dict[str, torch.Tensor]:
    """The state dict with every linear of the layers (and the head where asked for) rounded to nearest."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        chosen = is_linear(name, tensor) or (head and name == "lm_head.weight")
        if not chosen or any(_names(each, name) for each in scheme.kept):
            found[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        found |= {f"{stem}.{suffix}": field for suffix, field in round_to_nearest(tensor, scheme).items()}
    return found


def quantization_config(scheme: Scheme, *, head: bool = False) -> dict[str, Any]:
    """What GPTQModel, AutoAWQ and llm-compressor write into config.json."""
    size = -1 if scheme.group is None else scheme.group
    match scheme.method:
        case "gptq":
            return {
                "bits": scheme.bits,
                "checkpoint_format": scheme.format,
                "desc_act": scheme.act_order,
                "dynamic": {f"-:{each.removeprefix('re:')}": {} for each in scheme.kept} or None,
                "format": scheme.format,
                "group_size": size,
                "lm_head": head,
                "meta": {"damp_percent": 0.05, "quantizer": ["gptqmodel:7.6.0"], "true_sequential": True},
                "method": "gptq",
                "pack_dtype": "int32",
                "quant_method": "gptq",
                "sym": scheme.symmetric,
            }
        case "awq":
            return {
                "bits": scheme.bits,
                "group_size": size,
                "modules_to_not_convert": list(scheme.kept) or None,
                "quant_method": "awq",
                "version": scheme.format,
                "zero_point": not scheme.symmetric,
            }
    weights = {
        "actorder": "group" if scheme.act_order else None,
        "dynamic": False,
        "group_size": scheme.group,
        "num_bits": scheme.bits,
        "observer": "minmax",
        "strategy": "channel" if scheme.group is None else "group",
        "symmetric": scheme.symmetric,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": scheme.format,
        "ignore": list(dict.fromkeys(("lm_head", *scheme.kept))),
        "kv_cache_scheme": None,
        "quant_method": scheme.method,
        "quantization_status": "compressed",
    }


def legacy_config(scheme: Scheme) -> dict[str, Any]:
    """What AutoGPTQ and AutoAWQ wrote into a file of their own."""
    size = -1 if scheme.group is None else scheme.group
    if scheme.method == "awq":
        return {
            "zero_point": not scheme.symmetric,
            "q_group_size": size,
            "w_bit": scheme.bits,
            "version": "GEMM",
        }
    return {
        "bits": scheme.bits,
        "group_size": size,
        "damp_percent": 0.01,
        "desc_act": scheme.act_order,
        "static_groups": False,
        "sym": scheme.symmetric,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": None,
    }


def write_quantized(
    source: Path,
    destination: Path,
    scheme: Scheme,
    *,
    files: str = "safetensors",
    legacy: bool = False,
    head: bool = False,
) -> Path:
    """The checkpoint at `source` with the linears of its layers rounded to nearest.

    files   `safetensors`, or `bin`: what torch.save writes
    legacy  say how in quantize_config.json or quant_config.json alone, as AutoGPTQ and AutoAWQ once did
    head    quantize the lm_head too
    """
    assert scheme.method in PACKED
    destination.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix not in (".bin", ".safetensors") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, destination / path.name)
    config = json.loads((source / "config.json").read_text())
    if legacy:
        (destination / LEGACY[scheme.method]).write_text(json.dumps(legacy_config(scheme), indent=2))
    else:
        config["quantization_config"] = quantization_config(scheme, head=head)
        if scheme.method == "gptq":
            text = json.dumps(config["quantization_config"], indent=2)
            (destination / "quantize_config.json").write_text(text)
    (destination / "config.json").write_text(json.dumps(config, indent=2))
    tensors = quantized_tensors(read_tensors(source), scheme, head=head)
    stem = f"gptq_model-{scheme.bits}bit-{scheme.group}g" if legacy and scheme.method == "gptq" else "model"
    if files == "bin":
        torch.save(tensors, destination / f"{'pytorch_model' if stem == 'model' else stem}.bin")
    else:
        save_file(tensors, destination / f"{stem}.safetensors", metadata={"format": "pt"})
    return destination
