"""Keep the key and value caches of one stage, beside places for the layers of the others that know how long they are.

A model's own forward asks its cache, mostly that of layer 0, how many positions are past; in a stage that holds other
layers these places answer. Whoever would read or write what only another stage has gets an error. Imports transformers:
nothing imports this module before a stage is built.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ..errors import CacheLostError, LayoutError, UnsupportedError, quote

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

NAMES: Final = ("past_key_values", "cache_params")
"""What the forwards of models call their cache."""


class StageCache:
    """One sequence's cache, of which layers [start, stop) hold something."""

    def __init__(self, config: PreTrainedConfig, start: int, stop: int, batch: int) -> None:
        self.cache: Any = DynamicCache(config=config.get_text_config(decoder=True))
        layers: list[Any] = self.cache.layers
        if len(layers) < stop:
            raise UnsupportedError(
                f"{quote(config.model_type)}: transformers makes a cache of {len(layers)} layers for it, of {stop} or more"
            )
        self.own: Sequence[Any] = layers[start:stop]
        self.batch = batch
        self.positions = 0
        for number, layer in enumerate(layers):
            if not start <= number < stop and not isinstance(layer, DummyLayer):
                layers[number] = _elsewhere(type(layer), number, vars(layer))
        self._others = [layer for layer in layers if isinstance(layer, _Elsewhere)]
        # what a sliding window has left behind in the last step can be taken back
        for layer in self.own:
            if can_crop_layer(layer) and isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()  # type: ignore[no-untyped-call]

    def begin(self, past: int) -> None:
        """Forget what is past position `past`, so that a step from there can run. Raises CacheLostError where it cannot."""
        if past > self.positions:
            raise CacheLostError(f"{self.positions} positions are cached, the step begins after {past}")
        removed = self.positions - past
        if removed:
            for layer in self.own:
                self._check(layer, removed)
        for layer in self.own:
            if can_crop_layer(layer) and getattr(layer, "is_initialized", False):
                # zero too: a window keeps what the last step left behind until it hears that nothing is taken back
                layer.crop(-removed)
        self._set(past)

    def end(self, positions: int) -> None:
        """A step of so many positions has run."""
        self._set(self.positions + positions)

    def _set(self, positions: int) -> None:
        self.positions = positions
        for layer in self._others:
            layer._positions = positions

    def _check(self, layer: Any, removed: int) -> None:
        """Raises CacheLostError where `removed` positions cannot be taken back."""
        if not can_crop_layer(layer):
            raise CacheLostError(
                f"a {type(layer).__name__} cannot forget its last {removed} positions; send the whole sequence again, "
                "under another name"
            )
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            assert layer.keys is not None
            kept = layer.keys.shape[-2] - removed
            if kept < min(layer.sliding_window - 1, self.positions - removed):
                raise CacheLostError(
                    f"a window of {layer.sliding_window} positions has moved on: it cannot forget its last {removed}; "
                    "send the whole sequence again, under another name"
                )


def cache_name(model: PreTrainedModel, parameters: Container[str]) -> str | None:
    """What the model's forward calls the cache that it takes; None: it takes none that transformers makes generically.

    Args:
        model: Whose forward it is.
        parameters: Names of that forward's parameters.
    """
    known: Any = getattr(model, "_supports_default_dynamic_cache", None)
    if known is None or not known():
        return None
    return next((name for name in NAMES if name in parameters), None)


def can_crop_layer(layer: Any) -> bool:
    """Whether a layer's cache can forget its last step."""
    return isinstance(layer, DynamicLayer | DummyLayer) and not isinstance(
        layer, LinearAttentionCacheLayerMixin
    )


class _Elsewhere:
    """The cache of a layer that another stage holds: how long it is, and nothing else."""

    _number: int
    _positions: int

    def get_seq_length(self) -> int:
        return self._positions

    @property
    def cumulative_length(self) -> int:
        return self._positions

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return dict.fromkeys(range(getattr(self, "number_of_states", 1)), self._positions > 0)

    @property
    def keys(self) -> NoReturn:
        self._refuse()

    values = conv_states = recurrent_states = keys

    def update(self, *_: object, **__: object) -> NoReturn:
        self._refuse()

    update_conv_state = update_recurrent_state = update_indexer = update

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: `_positions` is set."""

    def _refuse(self) -> NoReturn:
        raise LayoutError(
            f"the cache of layer {self._number} was asked for, which is another stage's: these layers cannot be split "
            "here"
        )


def _elsewhere(kind: type, number: int, settings: dict[str, Any]) -> _Elsewhere:
    """In place of a layer's cache of this kind; forwards look at the kind, and at how long a window is."""
    assert issubclass(kind, CacheLayerMixin | LinearAttentionCacheLayerMixin)
    made: Any = _kind_elsewhere(kind)
    found: _Elsewhere = made.__new__(made)
    vars(found).update(settings, _number=number, _positions=0)
    return found


@cache
def _kind_elsewhere(kind: type) -> type:
    return type(f"{kind.__name__}Elsewhere", (_Elsewhere, kind), {"_layer_type": None})
