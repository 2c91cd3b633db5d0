"""Ask transformers' models for their class, for what they compute, and for the width of their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import LayoutError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

TOKENS: Final = 4
"""Number of greedy tokens that are compared."""


def model_class(config: Any) -> Any:
    """Find the class by which transformers builds a language model of this config."""
    import transformers

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            return auto
    raise LayoutError(f"transformers has no language model of type {config.model_type}")


def answers(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of a prompt and the greedy tokens after it, or, for a model that fills masks, at its places.

    Every token is computed from the whole text, since a cache belongs to an engine.

    Args:
        prompt: Ids of tokens, texts x tokens.
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
    """Compute the logits of texts without a cache.

    Args:
        text: Ids of tokens, texts x tokens.
    """
    import torch

    options = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    with torch.no_grad():
        found: torch.Tensor = model(text, **options).logits
    return found


def tensor_of(output: Any) -> torch.Tensor:
    """Pick the tensor that a module passes on from everything that it returns."""
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
    """The width of a head of an attention module, if the module says it."""
    for name in ("head_dim", "attention_head_size", "head_size"):
        found = getattr(module, name, None)
        if isinstance(found, int):
            return found
    return None


def is_flipped(module: object) -> bool:
    """Whether the weight of a projection is in x out."""
    return type(module).__name__ == "Conv1D"
