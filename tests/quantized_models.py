"""Make small quantized checkpoints out of others, by rounding to nearest, with the files that real tools write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shardprep.layout.packed import _names
from shardprep.layout.quantization import Scheme
from shardprep.packing import PACKED, round_to_nearest

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
