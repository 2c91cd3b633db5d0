"""Find out whether a model can be cut: whether its later layers need no more of the earlier ones than hidden states.

The model's own forward is tried on two texts while all of its layers stand aside. What they would give is NaN, and so is
what tokens are embedded as. What the later layers are called with, beside hidden states, must be the same, and not NaN.
Imports torch: nothing imports this module before a stage is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from ..errors import InputError, UnsupportedError, quote
from .kv_cache import StageCache
from .relay import Absent, Built, Reached, StandIn, forward, hidden_of, tensors_in, with_hidden
from .weights import line_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RETURNS: Final = (0, 2, 1, 3, 4, 5)
"""What a layer may return, most likely first: 0 the hidden states alone, else a tuple of so many that begins with them."""

TRIAL: Final = ((0, 1, 2), (3, 3, 0))
"""Two texts of tokens with which a model is tried."""


def try_cuts(
    built: Built, path: str, layers: Sequence[nn.Module], cuts: Sequence[int], *, embeds: bool = False
) -> None:
    """Find out whether the model can be cut, and what its layers return.

    Args:
        path: Where in the model the list of its layers is.
        layers: The modules of that list.
        cuts: The layers in front of which it is to be cut.
        embeds: Whether each part has the tokens and their embedding, so that its layers may need those too.

    Raises:
        UnsupportedError: Where a later stage's layers need more than the hidden states of the stage before.
    """
    model, kind = built.module, quote(built.module.config.model_type)
    _check_shared_caches(model, cuts)
    problem, pairs = "", None
    spoiled = contextlib.nullcontext() if embeds else _spoiled(model)
    with spoiled, _standing_aside(model.get_submodule(path)) as container:
        for returns in RETURNS:
            try:
                pairs = [
                    [_tried(built, container, layers, returns, tokens, caches=caches) for tokens in TRIAL]
                    for caches in ((True, False) if built.cache_name is not None else (False,))
                ]
                break
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a forward raises that is given the wrong thing
                problem = problem or f"{type(error).__name__}: {line_of(error)}"
    if pairs is None:
        raise UnsupportedError(
            f"{kind}: its layers cannot stand aside ({problem}); such a model cannot be run in parts here"
        )
    built.relay.returns = returns
    shape = pairs[0][0].given[0].shape
    # several streams a token are handed on within a process, but not from one stage to another
    if (len(shape) != 3 and not embeds) or tuple(shape[:2]) != (2, len(TRIAL[0])):
        raise UnsupportedError(
            f"{kind}: its layers hand on a tensor of shape {list(shape)} for {[2, len(TRIAL[0])]} tokens, not one hidden "
            "state for each; such a model cannot be run in parts here"
        )
    built.hidden_size = shape[-1]
    for number in range(min(cuts, default=len(layers)), len(layers)):
        if not all(_depends_on_hidden_alone(number, *pair, embeds=embeds) for pair in pairs):
            raise UnsupportedError(
                f"{kind}: layer {number} needs more of the layers before it than their hidden states, so that it cannot "
                "be run without them"
            )


@dataclass
class _Trial:
    """What a model calls its layers with, all of which stand aside."""

    returns: int
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)
    """What each layer was to have made."""

    def answer(self, number: int, args: Any, kwargs: Any) -> Any:
        if number != len(self.calls):
            raise _OtherReturnsError(f"layer {number} runs where layer {len(self.calls)} was expected")
        hidden = hidden_of(args, kwargs)
        if not isinstance(hidden, torch.Tensor) or (self.given and hidden.shape != self.given[-1].shape):
            raise _OtherReturnsError(f"layer {number} is given no hidden states of the layer before it")
        self.calls.append((args, kwargs))
        self.given.append(torch.full_like(hidden, float("nan")))
        if self.returns == 0:
            return self.given[-1]
        own = [torch.full((1,), float("nan"), device=hidden.device) for _ in range(self.returns - 1)]
        return (self.given[-1], *own)


class _OtherReturnsError(Exception):
    pass


def _tried(
    built: Built,
    container: nn.ModuleList,
    layers: Sequence[nn.Module],
    returns: int,
    tokens: Sequence[int],
    *,
    caches: bool,
) -> _Trial:
    trial = _Trial(returns)
    for number, layer in enumerate(layers):
        container[number] = StandIn(layer, number, _ending(trial, len(layers) - 1))
    ids = torch.tensor([tokens, tokens], device=built.device)
    ids %= built.module.config.get_text_config(decoder=True).vocab_size
    cache = StageCache(built.module.config, built.relay.start, built.relay.stop, 2) if caches else None
    with torch.no_grad():
        forward(built, ids, None, keep=1, cache=cache)
    return trial


@contextlib.contextmanager
def _spoiled(model: PreTrainedModel) -> Iterator[None]:
    """What tokens are embedded as, and what modules of other stages give, is NaN."""

    def spoil(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, float("nan"))

    absent = [each for each in model.modules() if isinstance(each, Absent)]
    embedding: Any = model.get_input_embeddings()
    hook = None if isinstance(embedding, Absent) else embedding.register_forward_hook(spoil)
    for each in absent:
        each.value = float("nan")
    try:
        yield
    finally:
        for each in absent:
            each.value = 0.0
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def _standing_aside(container: Any) -> Iterator[nn.ModuleList]:
    """The list of a model's layers, which are put back afterwards."""
    layers = list(container.children())
    try:
        yield container
    finally:
        for number, layer in enumerate(layers):
            container[number] = layer


def _ending(trial: _Trial, last: int) -> Callable[[int, Any, Any], Any]:
    def answer(number: int, args: Any, kwargs: Any) -> Any:
        found = trial.answer(number, args, kwargs)
        if number == last:
            raise Reached(trial.given[-1])
        return found

    return answer


def _depends_on_hidden_alone(number: int, one: _Trial, other: _Trial, *, embeds: bool) -> bool:
    """Whether what a layer is called with beside hidden states is the same whatever the layers before it give.

    So that it is the same whatever the tokens are, too, where not every part `embeds` them.
    """
    own, others = (tensors_in(with_hidden(*each.calls[number], None)) for each in (one, other))
    return len(own) == len(others) and all(
        _is_sound(a) and _is_sound(b) and (embeds or _is_same(a, b)) for a, b in zip(own, others, strict=True)
    )


def _is_sound(tensor: torch.Tensor) -> bool:
    """Whether a value was made of nothing that another stage has."""
    return not tensor.is_meta and not (tensor.is_floating_point() and bool(tensor.isnan().any()))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _check_shared_caches(model: PreTrainedModel, cuts: Sequence[int]) -> None:
    """Raises UnsupportedError where layers of a stage take keys and values of an earlier stage's layer."""
    modes = getattr(model.config.get_text_config(decoder=True), "kv_sharing_modes", None)
    if not modes:
        return
    for cut in cuts:
        if any(mode == "store" for mode in modes[:cut]) and any(
            str(mode).startswith("reuse") for mode in modes[cut:]
        ):
            raise UnsupportedError(
                f"{quote(model.config.model_type)}: layers from {cut} on use keys and values of layers before it; it "
                "cannot be split there"
            )
