"""What is asked of transformers' models: their class, what they compute, and how wide their heads are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import LayoutError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

TOKENS: Final = 4
"""Greedy tokens that are compared."""


def model_class(config: Any) -> Any:
    """The class by which transformers builds a language model of this config."""
    import transformers

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            return auto
    raise LayoutError(f"transformers has no language model of type {config.model_type}")


def answers(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a prompt, and the greedy tokens after it (for a model that fills masks: those at its places).

    Every token is computed from the whole text: what a cache does is its engine's matter.
    """
    import torch

    logits = last = forward(model, prompt)
    if not model.can_generate():
        return logits, logits.argmax(-1)
    text = prompt
    for step in range(TOKENS):
        if step:
            last = forward(model, text)
        text = torch.cat([text, last[:, -1:].argmax(-1)], 1)
    return logits, text[:, prompt.shape[1] :]


def forward(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    """The logits of a text, without a cache."""
    import torch

    options = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    with torch.no_grad():
        found: torch.Tensor = model(text, **options).logits
    return found


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor that a module gives on, of all that it returns."""
    found = _first(output)
    assert found is not None, "a module that gave a tensor once gives one again"
    return found


def _first(output: Any) -> torch.Tensor | None:
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((found for each in output if (found := _first(each)) is not None), None)
    return None


def head_dim(module: nn.Module) -> int | None:
    """How wide a head of an attention module is, where it says so."""
    for name in ("head_dim", "attention_head_size", "head_size"):
        found = getattr(module, name, None)
        if isinstance(found, int):
            return found
    return None


def is_flipped(module: object) -> bool:
    """Whether the weight of a projection is in x out."""
    return type(module).__name__ == "Conv1D"
