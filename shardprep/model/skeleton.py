"""Have transformers build the model of a config.json: its tensors without data, or a small model with random weights.

Planning from a config.json needs transformers and torch only here, so they are imported when a function is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardprep_runtime.engines.quiet import hush_loggers, quiet
from shardprep_runtime.errors import UnsupportedError, quote
from shardprep_runtime.format import dtypes

from .shrink import shrink

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Shapes", "bare", "build", "default_config", "quiet", "shapes_of", "shrink"]

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a checkpoint's tensor -> its dtype and shape."""


def default_config(model_type: str) -> dict[str, Any]:
    """Give transformers' default config of a model type, as its config.json would hold it.

    Raises:
        UnsupportedError: Where transformers has no such type, or no defaults for it.
    """
    kind = _mapping()(model_type)
    try:
        found: dict[str, Any] = kind().to_diff_dict()
    except Exception as error:  # noqa: BLE001 - its validators raise classes of their own
        raise UnsupportedError(
            f"transformers' {model_type} has no default config ({' '.join(str(error).split())}); give a config.json"
        ) from None
    return {**found, "model_type": model_type}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """List the tensors of a checkpoint with this config.json, under the names by which transformers writes them.

    The model is built without memory for its weights. Tied tensors are listed once, as in a checkpoint.

    Raises:
        UnsupportedError: Where transformers is not installed or cannot build the model.
    """
    _mapping()  # refuses where transformers is not installed
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = _build(config, dtype=_dtype(config))
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    ignored = {re.sub(r"\\(.)", r"\1", name) for name in model._keys_to_ignore_on_save or ()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored and id(tensor) not in seen:
            tensors[name] = tensor.detach()
        seen.add(id(tensor))
    named = {dtype: name for name, dtype in _torch_dtypes().items()}
    return {
        name: (named[tensor.dtype], tuple(tensor.shape))
        for name, tensor in revert_weight_conversion(model, tensors).items()
    }


def build(config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32") -> PreTrainedModel:
    """Build a model of this config, ready to run. All weights are random, those of norms and biases too.

    Args:
        seed: The same seed gives the same weights.
        dtype: torch's name of the weights' dtype.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _build(config, dtype=getattr(torch, dtype))
        for parameter in model.parameters():
            if parameter.is_floating_point():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.normal_(0, 0.08)
    model.train(False)
    return model


def bare(config: Mapping[str, Any]) -> PreTrainedModel:
    """Build a causal language model of this config in float32: its parameters have no memory, its buffers are computed.

    Raises:
        UnsupportedError: Where transformers has no such model, or cannot build it.
    """
    import torch

    with torch.device("meta"):
        model = _build(config, dtype=torch.float32, causal=True)
    for parameter in model.parameters():
        # from_pretrained marks loaded parameters so, and initialize_weights leaves them alone
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def class_of(model_type: str) -> type[PreTrainedModel]:
    """Find transformers' class of causal language models of this type.

    Raises:
        UnsupportedError: Where it has none.
    """
    import transformers

    parsed = _mapping()(model_type)
    auto: Any
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM):
        if parsed in auto._model_mapping:
            found: type[PreTrainedModel] = auto._model_mapping[parsed]
            return found
    raise UnsupportedError(f"transformers has no language model of type {quote(model_type)}")


def _build(config: Mapping[str, Any], *, dtype: Any, causal: bool = False) -> PreTrainedModel:
    import transformers
    from transformers.initialization import meta_device_safe_creation_ops

    parsed = _parse(config)
    kinds: tuple[Any, ...] = (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM)
    auto: Any
    for auto in kinds[:1] if causal else kinds:
        if type(parsed) in auto._model_mapping:
            try:
                with quiet(), meta_device_safe_creation_ops():
                    model: PreTrainedModel = auto.from_config(
                        parsed, dtype=dtype, attn_implementation="eager"
                    )
                    return model
            except Exception as error:  # noqa: BLE001 - whatever a model of theirs may raise
                raise UnsupportedError(
                    f"transformers cannot build a {parsed.model_type} of this config: {type(error).__name__}: {error}"
                ) from None
    kind = "causal language model" if causal else "language model"
    raise UnsupportedError(f"transformers has no {kind} of type {quote(parsed.model_type)}")


def _parse(config: Mapping[str, Any]) -> PreTrainedConfig:
    kind = _mapping()(config.get("model_type"))
    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        with quiet():
            found: PreTrainedConfig = kind.from_dict(_floats(fields))
            return found
    except Exception as error:  # noqa: BLE001 - its validators raise classes of their own
        raise UnsupportedError(
            f"config.json: transformers refuses it: {' '.join(str(error).split())}"
        ) from None


def _floats(value: Any) -> Any:
    """Turn {"__float__": "Infinity"} back into floats: transformers writes so what JSON cannot."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _floats(each) for key, each in value.items()}
    return [_floats(each) for each in value] if isinstance(value, list) else value


def _mapping() -> Any:
    """Give a function from a model type to transformers' config class."""
    hush_loggers()
    try:
        import torch  # noqa: F401 - transformers without it builds nothing
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise UnsupportedError(
            "a model without its checkpoint is built by transformers, which is not installed: "
            "pip install 'shardprep[transformers]'; of a checkpoint (hf://org/name too) its headers suffice"
        ) from None

    def find(model_type: Any) -> Any:
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise UnsupportedError(f"transformers knows no model_type {quote(model_type)}")
        return CONFIG_MAPPING[model_type]

    return find


def _dtype(config: Mapping[str, Any]) -> Any:
    import torch

    text = config.get("text_config") or {}
    name = next(
        (c.get(key) for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), "float32"
    )
    return getattr(torch, str(name).removeprefix("torch."))


def _torch_dtypes() -> dict[str, Any]:
    import torch

    return {name: getattr(torch, own) for name, own in dtypes.TORCH.items() if own and hasattr(torch, own)}
