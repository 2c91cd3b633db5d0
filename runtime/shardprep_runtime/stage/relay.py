"""Run the model's own forward in one stage, with stand-ins for what the others hold.

Layers of other stages are stand-ins that hand on what they are given: the first of this stage is given the hidden states
of the stage before, and the forward ends where the first layer of the next stage is called. Imports torch: nothing
imports this module before a stage is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import LayoutError, quote

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .kv_cache import StageCache


@dataclass
class Built:
    """The module of a stage and what is known of it."""

    module: PreTrainedModel
    layers: list[nn.Module]
    """The stage's own, in order."""
    relay: Relay
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    cache_name: str | None
    """What the forward calls its cache; None: it takes none that is known."""
    parameters: frozenset[str]
    """Names of what the model's forward takes."""


class Relay:
    """Hands hidden states into the stage's first layer, and out in front of the layer after its last."""

    def __init__(self, start: int, stop: int, layers: int) -> None:
        self.start = start
        self.stop = stop
        self.layers = layers
        self.given: torch.Tensor | None = None
        """Hidden states of the stage before."""
        self.returns = 0
        """What a layer returns, as in RETURNS."""
        self.begun = False
        """Whether the stage's own layers have begun."""

    def run(self, forward: Callable[[], Any], given: torch.Tensor | None) -> Any:
        """What the forward gives: the model's output, or, where another stage follows, hidden states.

        Args:
            forward: Calls the model.
            given: Hidden states of the stage before; None in the first.
        """
        self.given, self.begun = given, False
        try:
            return forward()
        except Reached as reached:
            return reached.hidden
        finally:
            self.given = None

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """A hook in front of the stage's first layer.

        Args:
            args: What the forward calls it with, by place.
            kwargs: And by name.
        """
        self.begun = True
        return None if self.given is None else with_hidden(args, kwargs, self.given)

    def stand_in(self, number: int, args: Any, kwargs: Any) -> Any:
        """Be a layer that is not of this stage: hand on what it is given, or end the forward.

        Args:
            number: The layer's.
            args: What the forward calls it with, by place.
            kwargs: And by name.
        """
        hidden = hidden_of(args, kwargs)
        if number == self.stop:
            raise Reached(hidden)
        if number == self.layers - 1:  # no layer is this stage's own, but what follows them is
            hidden = self.given
        return hidden if self.returns == 0 else (hidden, *[None] * (self.returns - 1))

    def leave(self, _: nn.Module, __: Any, output: Any) -> NoReturn:
        """A hook behind the model's last layer, where what follows the layers is a stage of its own.

        Args:
            output: What the layer returned.
        """
        raise Reached(output if isinstance(output, torch.Tensor) else output[0])


class Reached(Exception):  # noqa: N818 - no error: the forward came to the next stage
    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden


class StandIn(nn.Module):
    """Where another stage's layer would be. Its other attributes are the layer's: forwards look at the kind of a layer."""

    def __init__(self, layer: nn.Module, number: int, answer: Callable[[int, Any, Any], Any]) -> None:
        super().__init__()
        self._stand_in = number, answer
        self.__dict__["_layer"] = layer  # no module of the model: it has no tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number, answer = self._stand_in
        return answer(number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class Absent(nn.Module):
    """Where a module outside of the layers would be whose tensors another stage has.

    Before the stage's layers it may run, for what comes out is replaced by the hidden states that the stage is given.
    """

    def __init__(
        self, path: str, module: nn.Module, relay: Relay, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._path = path
        self._relay = relay
        self._dtype = dtype
        self._device = device
        self._width: int | None = None
        self._is_embedding = isinstance(module, nn.Embedding)
        if isinstance(module, nn.Embedding):
            self._width = module.embedding_dim
        elif isinstance(module, nn.Linear):
            self._width = module.out_features
        self.__dict__["_module"] = module
        self.weight = torch.empty(0, dtype=dtype, device=device)  # forwards ask it for dtype and device
        self.value = 0.0

    def forward(self, given: Any = None, *_: Any, **__: Any) -> Any:
        if self._relay.begun:
            raise LayoutError(
                f"{quote(self._path)}: it runs within or after this stage's layers, but its tensors belong to another "
                "stage; split the checkpoint again with this version of shardprep"
            )
        if self._width is None or not isinstance(given, torch.Tensor):
            return given
        shape = given.shape if self._is_embedding else given.shape[:-1]
        return torch.full((*shape, self._width), self.value, dtype=self._dtype, device=self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def forward(
    built: Built,
    ids: torch.Tensor,
    given: torch.Tensor | None,
    *,
    keep: int | torch.Tensor,
    cache: StageCache | None,
) -> torch.Tensor:
    """Run the model's forward for one stage.

    Args:
        ids: Of tokens, texts x positions; only their number counts where `given` replaces what they are embedded as.
        given: Hidden states of the stage before.
        keep: The positions whose logits are wanted: 1 for the last, 0 for all, or their numbers.
        cache: Keys and values of the positions before these.

    Returns:
        Hidden states, texts x positions x hidden size, or logits of the last stage.
    """
    options: dict[str, Any] = {}
    if cache is not None:
        assert built.cache_name is not None
        options[built.cache_name] = cache.cache
        options["use_cache"] = True
    elif built.cache_name is not None or hasattr(
        built.module.config.get_text_config(decoder=True), "use_cache"
    ):
        options["use_cache"] = False
    if "logits_to_keep" in built.parameters:
        options["logits_to_keep"] = keep
    if cache is not None and "position_ids" in built.parameters:
        options["position_ids"] = _positions(built.module, ids, cache.positions)
    found = built.relay.run(lambda: built.module(ids, **options), given)
    if isinstance(found, torch.Tensor):
        return found
    logits: torch.Tensor = found.logits
    if "logits_to_keep" in built.parameters:
        return logits
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def _positions(model: Any, ids: torch.Tensor, past: int) -> torch.Tensor:
    """As generate computes them: forwards that are given none do not all count what is past."""
    mask = torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.int64, device=ids.device)
    found: torch.Tensor = model._prepare_position_ids_for_generation(ids, {"attention_mask": mask})
    return found[..., -ids.shape[1] :]


def hidden_of(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def with_hidden(args: Any, kwargs: Any, hidden: torch.Tensor | None) -> Any:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in arguments, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [found for each in value for found in tensors_in(each)] if isinstance(value, tuple | list) else []


def is_meta(tensor: torch.Tensor) -> bool:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.is_meta
