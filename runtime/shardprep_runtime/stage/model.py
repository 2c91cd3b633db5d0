"""Build the module of one stage: the whole model without memory, this stage's tensors in it, and stand-ins around them.

The forward stays the model's own, nothing is numbered anew, and no architecture is known here. Imports torch and
transformers: nothing imports this module before a stage is built.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.quantizers.auto import get_hf_quantizer

from ..engines.quiet import quiet
from ..engines.shardview import shard_slices
from ..errors import LayoutError, UnsupportedError, quote
from .kv_cache import cache_name
from .relay import Built, Relay, StandIn
from .trial import try_cuts
from .weights import (
    Copied,
    Names,
    check_whole,
    fill_buffers,
    find_elsewhere,
    line_of,
    load_tensors,
    make_trainable,
    replace_absent,
    set_module,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..shard.shard import Shard


def read_config(folder: Any) -> PreTrainedConfig:
    """The config.json of a folder, as transformers understands it."""
    try:
        with quiet():
            found: PreTrainedConfig = transformers.AutoConfig.from_pretrained(folder)
            return found
    except Exception as error:  # noqa: BLE001 - its validators raise classes of their own
        raise UnsupportedError(
            f"{quote(folder)}: transformers {transformers.__version__} does not take its config.json: {line_of(error)}"
        ) from None


def build_model(
    config: PreTrainedConfig,
    shard: Shard,
    cuts: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    mesh: Any = None,
    trainable: bool = False,
) -> Built:
    """The module of the stage that a shard holds.

    Args:
        config: Of the whole model.
        shard: Whose view says which layers are the stage's.
        cuts: The layers in front of which the model is cut, as far as this stage is concerned.
        dtype: Of the weights.
        device: Where they lie.
        mesh: Of the stage's tensor ranks, where there are several.
        trainable: Copy the weights, and keep gradients for them.

    Raises:
        LayoutError: Where a weight would be missing or left over.
        UnsupportedError: Where transformers cannot build the model, or it cannot be cut so.
    """
    start, stop = shard.view.layers
    with quiet(), torch.random.fork_rng(devices=[]):
        model, quantizer = _bare(config, dtype, device)
        names = Names(model, quantizer)
        path, layers = _layers_of(model, names, shard)
        if mesh is not None:
            _distribute(model, mesh)
        elsewhere = find_elsewhere(model, shard, names)

        def is_others(key: str) -> bool:
            return key in elsewhere or _is_others(key, f"{path}.", (start, stop))

        slices: Mapping[str, Any] = shard_slices(shard)
        # quantizers change tensors in place, and others may build from the same shard
        state = {
            name: slices[name] if quantizer is None else Copied(slices[name]) for name in shard.view.tensors
        }
        load_tensors(model, state, is_others, dtype=dtype, device=device, quantizer=quantizer)
        fill_buffers(model, is_others, device)
        relay = Relay(start, stop, len(layers))
        for number, layer in enumerate(layers):
            if not start <= number < stop:
                set_module(model, f"{path}.{number}", StandIn(layer, number, relay.stand_in))
        replace_absent(model, path, relay, dtype, device)
        check_whole(model, is_others)
        if quantizer is not None:
            model.hf_quantizer = quantizer
            quantizer.postprocess_model(model)
    own = layers[start:stop]
    own[0].register_forward_pre_hook(relay.enter, with_kwargs=True)
    model.train(False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = frozenset(inspect.signature(model.forward).parameters)
    built = Built(
        model,
        own,
        relay,
        dtype,
        device,
        model.config.get_text_config(decoder=True).hidden_size,
        cache_name(model, parameters),
        parameters,
    )
    if cuts:
        try_cuts(built, path, layers, cuts)
    if trainable:
        make_trainable(model)
    return built


def _bare(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The whole model without memory, and transformers' quantizer where the checkpoint is quantized."""
    auto: Any = transformers.AutoModelForCausalLM
    own, kind = copy.deepcopy(config), quote(config.model_type)
    if type(config) not in auto._model_mapping:
        raise UnsupportedError(
            f"{kind}: transformers {transformers.__version__} has no causal language model of it"
        )
    try:
        find_quantizer: Any = get_hf_quantizer
        quantizer, own, places = find_quantizer(own, None, {"": device}, True, {})
    except Exception as error:  # noqa: BLE001 - each quantizer complains in its own way
        raise UnsupportedError(
            f"transformers cannot run this quantized model here: {line_of(error)}"
        ) from None
    try:
        with (
            torch.device("meta"),
            initialization.no_tie_weights(),
            initialization.meta_device_safe_creation_ops(),
        ):
            model: PreTrainedModel = auto.from_config(own, dtype=dtype)
            if quantizer is not None:
                quantizer.preprocess_model(
                    model=model, dtype=dtype, device_map=places, checkpoint_files=None, use_kernels=False
                )
    except Exception as error:  # noqa: BLE001 - whatever a model of theirs may raise
        raise UnsupportedError(
            f"{kind}: transformers cannot build it: {type(error).__name__}: {line_of(error)}"
        ) from None
    return model, quantizer


def find_layers(model: PreTrainedModel, count: int) -> list[str]:
    """Where in the model lists of modules are that may be its layers.

    Args:
        model: As transformers builds it.
        count: How many modules a list must have.

    Raises:
        UnsupportedError: Where no list has so many.
    """
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise UnsupportedError(
            f"{quote(model.config.model_type)}: transformers does not build it of one list of {count} layers; such a "
            "model cannot be run in parts here"
        )
    return found


def _layers_of(model: PreTrainedModel, names: Names, shard: Shard) -> tuple[str, list[nn.Module]]:
    """Where in the model the list of the layers is that the manifest counts, and the layers."""
    paths = find_layers(model, shard.manifest.layers)
    found: Counter[str] = Counter()
    numbered = (each for each in shard.manifest.tensors.items() if isinstance(each[1].layer, int))
    for name, entry in islice(numbered, 256):
        key, _ = names.key(name)
        found.update(path for path in paths if key.startswith(f"{path}.{entry.layer}."))
    if not found:
        raise LayoutError(
            f"{quote(model.config.model_type)}: none of the checkpoint's layers is one of the model's; load it with the "
            "config.json of the shard set"
        )
    path = found.most_common(1)[0][0]
    return path, list(model.get_submodule(path).children())


def _distribute(model: PreTrainedModel, mesh: Any) -> None:
    """Have transformers cut the model's parameters on the stage's mesh, as `from_pretrained` would."""
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    own: Any = model
    try:
        plan, _, _ = own._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    except ValueError as error:
        raise UnsupportedError(f"{quote(model.config.model_type)}: {line_of(error)}") from None
    own._tp_size = mesh.size()
    own._device_mesh = mesh
    apply_tensor_parallelism(own, mesh, plan)


def _is_others(key: str, layers: str, own: tuple[int, int]) -> bool:
    """Whether a parameter or buffer is in a layer of another stage."""
    if not key.startswith(layers):
        return False
    number = key.removeprefix(layers).partition(".")[0]
    return not (number.isdecimal() and own[0] <= int(number) < own[1])
