"""Bring a stage's tensors into its model through transformers' own conversions, and nothing else; refuse what is missing.

Imports torch and transformers: nothing imports this module before a stage is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import LayoutError, UnsupportedError, quote
from .relay import Absent, Relay, is_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engines.shardview import ShardSlice
    from ..shard.shard import Shard


class Names:
    """Which of the model's parameters a tensor of the checkpoint goes into: by transformers' own rules."""

    def __init__(self, model: PreTrainedModel, quantizer: Any) -> None:
        mapping: Any = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def key(self, name: str) -> tuple[str, str | None]:
        """The first parameter, and the pattern of the conversion, if it is more than a renaming."""
        key, pattern = loading.rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if key not in self._state and name in self._state:
            return loading.rename_source_key(name, [], [], self._prefix, self._state)
        return key, pattern

    def keys(self, name: str) -> set[str]:
        """All parameters that it goes into."""
        key, pattern = self.key(name)
        if pattern is None:
            return {key}
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        first = converter.target_patterns[0]
        return {key, *(key.replace(first, each) for each in converter.target_patterns)}


def load_tensors(
    model: PreTrainedModel,
    state: Mapping[str, Any],
    is_others: Callable[[str], bool],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantizer: Any = None,
) -> None:
    """Assign tensors of a checkpoint to the model's parameters, through transformers' own conversions.

    Args:
        state: Tensors by the checkpoint's names, or slices that are read once they are needed.
        is_others: Whether a parameter may stay without a tensor: another stage has it.
        dtype: To which they are cast.
        device: On which they are to lie.
        quantizer: Of transformers, where the checkpoint is quantized and is to stay so.

    Raises:
        LayoutError: Where a parameter would lack its tensor, a tensor its parameter, or one does not fit the other.
    """
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        hf_quantizer=quantizer,
        # not that of `names`: some of its rules remember what they have seen
        weight_mapping=get_model_conversion_mapping(model, None, quantizer),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        info, _ = loading.convert_and_load_state_dict_in_model(model, dict(state), settings)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    tied = dict(model.all_tied_weights_keys)
    lacking = sorted(
        key for key in info.missing_keys if not is_others(key) and not (key in tied and is_others(tied[key]))
    )
    for key, problem in info.conversion_errors.items():
        raise LayoutError(
            f"{quote(key)}: it cannot be made of its tensors: {line_of(problem.splitlines()[-1])}"
        )
    wrong = [
        f"{what} {some(names)}"
        for what, names in (
            ("the checkpoint lacks", lacking),
            ("the model lacks", sorted(info.unexpected_keys)),
            ("shapes differ in", sorted({_mismatch(*each) for each in info.mismatched_keys})),
        )
        if names
    ]
    if wrong:
        raise LayoutError(
            f"the model and the checkpoint differ, so its weights would be random in part: {'; '.join(wrong)}; "
            "load it with the config.json of the shard set"
        )


def _mismatch(key: str, found: Sequence[int], expected: Sequence[int]) -> str:
    return f"{key} (shape {list(found)}, expected {list(expected)})"


class Copied:
    """A slice whose tensors are nobody else's."""

    def __init__(self, kept: ShardSlice) -> None:
        self._kept = kept
        self.get_shape = kept.get_shape
        self.get_dtype = kept.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._kept[index].clone()


def find_elsewhere(model: PreTrainedModel, shard: Shard, names: Names) -> set[str]:
    """The model's parameters outside of its layers that other stages have tensors for, and those tied to them.

    Args:
        model: The whole one.
        shard: What this stage has.
        names: Which parameters a tensor goes into.
    """
    found: set[str] = set()
    for name, entry in shard.manifest.tensors.items():
        if not isinstance(entry.layer, int) and name not in shard.view.tensors:
            found |= names.keys(name)
    tied = dict(model.all_tied_weights_keys)
    return found.union(*(pair for pair in tied.items() if found & set(pair)))


def replace_absent(
    model: PreTrainedModel, layers: str, relay: Relay, dtype: torch.dtype, device: torch.device
) -> None:
    """Put stand-ins for the modules outside of the layers that found no tensors: they are another stage's.

    Args:
        model: Which is changed.
        layers: Where in it the list of layers is.
        relay: Which knows whether the stage's layers have begun.
        dtype: Of what the stand-ins give.
        device: Where that lies.
    """
    gone: tuple[str, ...] = ()
    for path, module in list(model.named_modules()):
        if path.startswith((f"{layers}.", *gone)) or f"{layers}.".startswith(f"{path}.") or not path:
            continue
        if any(is_meta(each) for _, each in _stored(module)):
            set_module(model, path, Absent(path, module, relay, dtype, device))
            gone += (f"{path}.",)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def check_whole(model: PreTrainedModel, is_others: Callable[[str], bool]) -> None:
    """See that every parameter that is left has a tensor.

    Args:
        model: With its stand-ins.
        is_others: Whether a parameter is in a layer of another stage, or belongs to one.

    Raises:
        LayoutError: Where one has none.
        UnsupportedError: Where only another stage has it.
    """
    lacking = sorted(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, each in _stored(module)
        if is_meta(each)
    )
    if lacking and all(map(is_others, lacking)):
        raise UnsupportedError(
            f"{quote(model.config.model_type)}: {some(lacking)} belongs to another stage, and to no module that can "
            "stand aside; such a model cannot be split into stages here"
        )
    if lacking:
        raise LayoutError(f"this stage's shard has no tensor for {some(lacking)}")


def _stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and buffers that checkpoints have."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def fill_buffers(model: PreTrainedModel, is_others: Callable[[str], bool], device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, as from_pretrained does; not those of other stages.

    Args:
        model: Which is changed.
        is_others: Whether a buffer is another stage's.
        device: Where they are to lie.
    """
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or is_others(f"{path}.{name}" if path else name):
                continue
            if name in module._non_persistent_buffers_set or is_meta(buffer):
                module._buffers[name] = torch.empty_like(buffer, device=device)
            else:
                buffer._is_hf_initialized = True
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    initialize: Any = model.initialize_weights
    initialize()


def make_trainable(model: PreTrainedModel) -> None:
    """Copy what is mapped, which cannot be written, and let gradients be kept for it."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        parameter.detach().clone(), requires_grad=parameter.is_floating_point()
                    )
                module._parameters[name] = made[id(parameter)]


def some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def line_of(error: object) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200]
