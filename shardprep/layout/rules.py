"""Turn the data of architectures.json, a config and the checkpoint's names and shapes into a layout for each tensor."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Final

from shardprep_runtime.errors import LayoutError, UnsupportedError, quote
from shardprep_runtime.format.cut import WHOLE, Layout, Segment, allows, sizes_that_work
from shardprep_runtime.format.manifest import ENGINES, PLACEMENTS, TORCH, Layer

from .expressions import evaluate

VOCABULARY_MULTIPLE: Final = 64
"""vLLM and SGLang pad the rows of a vocabulary to a multiple of this before ranks share them (vLLM's
DEFAULT_VOCAB_PADDING_SIZE)."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the config of the language model in a config.json that may describe other models beside it."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


@dataclass(frozen=True, slots=True)
class Placed:
    """The layer that a tensor belongs to, and how the tensor may be cut."""

    layer: Layer
    layout: Layout
    engines: tuple[tuple[str, Layout], ...] = ()
    """Engines that cut the tensor otherwise than it is stored, each with the layout that it asks for."""
    expert: int | None = None
    """Number of the expert, where each expert has a tensor of its own."""


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The layout of every tensor of one checkpoint."""

    model_type: str
    layers: int
    tensors: Mapping[str, Placed]
    tied: Mapping[str, str]
    """Names that the checkpoint lacks because its config ties them -> the tensor that they are tied to."""
    experts: int = 0
    """Routed experts of a layer; 0 where it has none."""
    engines: tuple[str, ...] = tuple(engine for engine in ENGINES if engine != TORCH)
    """Engines for which the layouts are known."""
    stage_needs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Engine -> numbers of layers; each of the engine's pipeline stages must hold at least one of these layers."""

    def check_grain(self, grain: int) -> None:
        """Check that `grain` tensor ranks can share every tensor.

        Raises:
            LayoutError: Where they cannot; it names the sizes that would work.
        """
        for name, placed in self.tensors.items():
            if not allows(placed.layout, grain):
                sizes = sizes_that_work([each.layout for each in self.tensors.values()])
                units = " + ".join(str(segment.units) for segment in placed.layout.segments)
                raise LayoutError(
                    f"{quote(name)}: {units} units along dim {placed.layout.dim} cannot be shared by {grain} tensor "
                    f"ranks; tensor parallel sizes that work for this model: {', '.join(map(str, sizes))}"
                )


def known_types() -> list[str]:
    """List the model types that have layout rules."""
    return sorted(_data())


def ties_head(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Names of the head and the embedding where this config makes one tensor serve as both, else None.

    For a model type without rules the config's own tie_word_embeddings decides.
    """
    rules = _data().get(config.get("model_type"), {})
    if not config.get("tie_word_embeddings", rules.get("tied", False)):
        return None
    head, embedding = rules.get("tied_pair") or ("lm_head.weight", "model.embed_tokens.weight")
    return head, embedding


def derive_layout(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, allow_generic: bool = False
) -> ModelLayout:
    """Derive the layout of every tensor of a model.

    Args:
        config: The parsed config.json.
        shapes: Tensor name -> full shape.
        allow_generic: Give a model type without rules the `generic_layout`.

    Raises:
        UnsupportedError: For a model type or a tensor without rules.
        LayoutError: Where the config and the shapes contradict each other.
    """
    model_type = config.get("model_type")
    rules = _data().get(model_type) if isinstance(model_type, str) else None
    if config.get("quantization_config"):
        raise UnsupportedError(
            "config.json: a quantized checkpoint; the rules are those of the model before (see shardprep.layout.lay_out)"
        )
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if rules is None and isinstance(inner, str) and inner in _data():
        assert isinstance(text, Mapping)
        return _derive_wrapped(config, text, shapes)
    if rules is None:
        if allow_generic:
            return generic_layout(config, shapes)
        raise UnsupportedError(
            f"config.json: no layout rules for model_type {quote(model_type)}{_meant(model_type)}; "
            f"{len(known_types())} types have rules (docs/architectures.md); --allow-generic cuts any other by its rows"
        )
    said = {key: value for key, value in config.items() if value is not None}
    also = {key: said[other] for key, other in rules.get("also", {}).items() if other in said}
    values = {**rules.get("defaults", {}), **also, **said}
    segments = _Segments(rules["sizes"], values)
    of_layer: dict[int, _Segments] = {}
    layers = evaluate(rules["layers"], values)
    beyond = values.get("num_nextn_predict_layers")  # heads that predict further tokens
    end = layers + (beyond if type(beyond) is int else 0)
    tensors = {}
    rule_of: dict[
        str, tuple[str, str] | None
    ] = {}  # tensors with the same pattern are looked up and cut once
    known: dict[tuple[int, str, str, tuple[int, ...]], tuple[Layout, tuple[tuple[str, Layout], ...]]] = {}
    for name, shape in shapes.items():
        pattern, layer, expert = normalize(name)
        if pattern not in rule_of:
            rule_of[pattern] = _find(rules, pattern)
        found = rule_of[pattern]
        if found is None and layer is not None and layers <= layer < end:
            found = pattern, "vocabulary" if len(shape) == 2 and _is_vocabulary(name) else "whole"
        if found is None:
            raise UnsupportedError(
                f"{quote(name)}: no layout rule for this tensor in a {model_type} model; "
                "the checkpoint may hold something beside the model, or the rules lack it"
            )
        pattern, rule = found
        placement, _, cut = rule.partition(" ") if rule.split()[0] in PLACEMENTS else (None, "", rule)
        if layer is not None and placement is None and layer >= layers:
            if layer >= end:
                raise LayoutError(f"{quote(name)}: layer {layer}, but config.json says {layers} layers")
            placement = "last"
        own = segments
        if layer is not None and layer < layers:
            if layer not in of_layer:
                differing = _values_of(layer, rules, values)
                of_layer[layer] = (
                    _Segments(rules["sizes"], {**values, **differing}) if differing else segments
                )
            own = of_layer[layer]
        key = id(own), pattern, cut, shape
        if key not in known:
            layout = own.layout(cut, shape, name)
            known[key] = layout, tuple(_asked(rules, pattern, cut, own, layout, shape, name))
        tensors[name] = Placed(
            layer if placement is None and layer is not None else placement or "every", *known[key], expert
        )
    _check_layers({placed.layer for placed in tensors.values()}, layers, rules["layers"])
    experts = rules.get("experts")
    placed, tied = _tie(config, tensors)
    return ModelLayout(
        model_type or "",
        layers,
        placed,
        tied,
        experts=evaluate(experts, values) if experts else 0,
        engines=tuple(rules["known_by"]),
        stage_needs=_stage_needs(rules, values, layers),
    )


def _asked(
    rules: Mapping[str, Any],
    pattern: str,
    cut: str,
    own: _Segments,
    layout: Layout,
    shape: tuple[int, ...],
    name: str,
) -> Iterator[tuple[str, Layout]]:
    """Yield each engine that cuts a tensor otherwise than `layout` does, with the layout that it asks for."""
    for engine in rules["known_by"]:
        text = rules.get("engines", {}).get(engine, {}).get(pattern)
        other = layout
        if text is not None:
            other = replace(own.layout(text, shape, name), experts=layout.experts)
        elif engine == "vllm" and cut == "vocabulary":
            padded = replace(layout.segments[0], multiple=VOCABULARY_MULTIPLE)
            other = replace(layout, segments=(padded,))
        if other != layout:
            yield engine, other


def _is_vocabulary(name: str) -> bool:
    """Whether a tensor of a head that predicts further tokens has a row for each token (DeepSeek-V3's names)."""
    return name.endswith(("embed_tokens.weight", "shared_head.head.weight"))


def _values_of(layer: int, rules: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config values in which one layer differs from the rest: by a list, by its kind, or by per_layer_config."""
    found = {}
    for key, of_all in rules.get("by_layer", {}).items():
        each = values.get(of_all)
        if isinstance(each, list) and layer < len(each):
            found[key] = each[layer]
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds) and isinstance(kinds[layer], str):
        for key, other in rules.get("by_kind", {}).get(kinds[layer], {}).items():
            if values.get(other) is not None:
                found[key] = values[other]
    own = values.get("per_layer_config")
    for key in (str(layer), f"{layer:02}"):  # transformers writes both
        if isinstance(own, Mapping) and isinstance(own.get(key), Mapping):
            found |= own[key]
    return found


def _meant(model_type: object) -> str:
    close = difflib.get_close_matches(str(model_type), known_types(), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _derive_wrapped(
    config: Mapping[str, Any], text: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> ModelLayout:
    """Derive the layout of a model that reads images or sound.

    The rules of its language model apply to that, and its towers stay whole in the first stage.
    """
    rules = _data()[text["model_type"]]
    inner: dict[str, str] = {}
    for name in shapes:
        words = name.split(".")
        kept = [word for word in words if word != "language_model"]
        own = ".".join(kept if kept[0] in ("model", "lm_head") else ["model", *kept])
        if "language_model" in words[:2] or _find(rules, normalize(own)[0]) is not None:
            inner[name] = own
    tie = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    found = derive_layout(
        {**text, **({} if tie is None else {"tie_word_embeddings": tie})},
        {own: shapes[name] for name, own in inner.items()},
    )
    outer = {own: name for name, own in inner.items()}
    tied = {}
    for head, embedding in found.tied.items():
        before = "language_model." if outer[embedding].startswith("language_model.") else ""
        tied[before + head] = outer[embedding]
    return replace(
        found,
        model_type=str(config.get("model_type") or ""),
        tensors={
            name: found.tensors[inner[name]] if name in inner else Placed("first", WHOLE) for name in shapes
        },
        tied=tied,
    )


def generic_layout(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelLayout:
    """Cut the rows of every two-dimensional weight, and of its bias, in chunks; all else stays whole.

    This is right for any linear layer whose outputs are gathered (transformers' `colwise_gather_output`). An engine
    that asks for another cut has rules of its own.

    Args:
        config: The parsed config.json.
        shapes: Tensor name -> full shape.

    Raises:
        UnsupportedError: Where the config does not say how many layers there are.
    """
    layers = next((config[key] for key in LAYER_COUNTS if type(config.get(key)) is int), None)
    if layers is None:
        raise UnsupportedError(
            f"config.json: none of {', '.join(LAYER_COUNTS)}: it does not say how many layers there are"
        )
    tensors = {}
    for name, shape in shapes.items():
        _, layer, expert = normalize(name)
        if layer is not None and layer >= layers:
            layer = None
        weight = shapes.get(name.removesuffix(".bias") + ".weight", ())
        rows = len(shape) == 2 and name.endswith(".weight")
        bias = len(shape) == 1 and name.endswith(".bias") and len(weight) == 2 and weight[0] == shape[0]
        layout = Layout(0, (Segment(shape[0], shape[0], uneven=True),)) if rows or bias else WHOLE
        tensors[name] = Placed(layer if layer is not None else "every", layout, (), expert)
    _check_layers({placed.layer for placed in tensors.values()}, layers, "layers")
    placed, tied = _tie(config, tensors)
    return ModelLayout(str(config.get("model_type") or ""), layers, placed, tied, engines=())


LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys under which configs of unknown types may say how many layers there are."""


def _check_layers(present: set[Layer], layers: int, key: str) -> None:
    missing = next((layer for layer in range(layers) if layer not in present), None)
    if missing is not None:
        raise LayoutError(
            f"config.json says {layers} layers ({key}), but layer {missing} has no tensors in the checkpoint"
        )


def _find(rules: Mapping[str, Any], pattern: str) -> tuple[str, str] | None:
    """Find the pattern and the rule of a tensor. Its name may lack the base model's prefix, or have it once too often."""
    tensors = rules["tensors"]
    base = rules.get("base", "")
    for each in (pattern, base + pattern, pattern.removeprefix(base)):
        if each in tensors:
            return each, tensors[each]
    if pattern.endswith(tuple(_overrides()["leftovers"])):
        return pattern, "whole" if "{layer}" in pattern else "every whole"
    return None


def _tie(config: Mapping[str, Any], tensors: dict[str, Placed]) -> tuple[dict[str, Placed], dict[str, str]]:
    """Place a tied embedding at both ends, and name the head that the checkpoint then lacks."""
    pair = ties_head(config)
    if pair is None:
        return tensors, {}
    head = pair[0]
    embedding = next((name for name in tensors if name == pair[1] or pair[1].endswith(f".{name}")), None)
    if embedding is None or head in tensors:
        return tensors, {}
    if tensors[embedding].layer != "every":
        tensors[embedding] = replace(tensors[embedding], layer="ends")
    return tensors, {head: embedding}


def _stage_needs(
    rules: Mapping[str, Any], values: Mapping[str, Any], layers: int
) -> dict[str, tuple[int, ...]]:
    """Engine -> the layers of which each stage needs one, where this config has layers of several kinds."""
    needs = {}
    for engine, need in rules.get("stage_needs", {}).items():
        kinds, listed = values.get(need.get("kinds", "")), values.get(need.get("listed", ""))
        period, offset = values.get(need.get("every", "")), values.get(need.get("offset", ""))
        found: tuple[int, ...] = ()
        if isinstance(kinds, list) and len(kinds) == layers:
            found = tuple(i for i, kind in enumerate(kinds) if kind in need["any_of"])
        elif isinstance(listed, list):
            found = tuple(sorted({i for i in listed if type(i) is int and 0 <= i < layers}))
        elif type(period) is int and period > 0:
            first = offset if type(offset) is int and offset >= 0 else period - 1
            found = tuple(range(first, layers, period))
        if engine in rules["known_by"] and found and len(found) < layers:
            needs[engine] = found
    return needs


class _Segments:
    """Turns the names of sizes in the rules of a model type into segments, by the numbers of one config."""

    def __init__(self, sizes: Mapping[str, Sequence[str]], values: Mapping[str, Any]) -> None:
        self.sizes = sizes
        self.values = values
        self.known: dict[tuple[str, int], tuple[Segment, ...]] = {}

    def layout(self, cut: str, shape: tuple[int, ...], name: str) -> Layout:
        experts = cut.startswith("experts ")
        cut = cut.removeprefix("experts ")
        if cut == "whole":
            return Layout(experts=experts)
        if not shape:
            raise LayoutError(f"{quote(name)}: a scalar, but the rules cut it ({cut})")
        if cut == "vocabulary":
            return Layout(0, (Segment(shape[0], shape[0], uneven=True),))
        along, _, names = cut.partition(" ")
        dim = (
            0 if along == "rows" else len(shape) - 1 if along == "columns" else int(along.removeprefix("dim"))
        )
        if dim >= len(shape) or (experts and dim == 0):
            raise LayoutError(f"{quote(name)}: the rules cut dim {dim} ({cut}), its shape is {list(shape)}")
        total = shape[dim]
        if (names, total) not in self.known:
            self.known[names, total] = self._segments(names, total, name, dim, shape)
        return Layout(dim, self.known[names, total], experts=experts)

    def _segments(
        self, names: str, total: int, tensor: str, dim: int, shape: tuple[int, ...]
    ) -> tuple[Segment, ...]:
        words = [each.strip() for each in names.split(" + ")]
        if all(word == "any" for word in words):
            if total % len(words):
                raise LayoutError(
                    f"{quote(tensor)}: dim {dim} of {list(shape)} holds {len(words)} equal blocks, but {total} is not a "
                    f"multiple of {len(words)}"
                )
            size = total // len(words)
            return (Segment(size, size, uneven=True),) * len(words)
        for choice in self._choices(words):
            if sum(segment.size for segment in choice) == total:
                return choice
        raise LayoutError(
            f"{quote(tensor)}: dim {dim} of {list(shape)} should be "
            f"{' or '.join(str(sum(s.size for s in choice)) for choice in self._choices(words))} by config.json "
            f"({self._explained(words)}); config and checkpoint do not belong together"
        )

    def _choices(self, words: Sequence[str]) -> Iterator[tuple[Segment, ...]]:
        """Yield the segments for each kind of layer: a word such as heads|global_heads names one size for each kind."""
        for i in range(max(word.count("|") + 1 for word in words)):
            chosen = [word.split("|")[min(i, word.count("|"))] for word in words]
            yield tuple(self._segment(each) for each in chosen)

    def _explained(self, words: Sequence[str]) -> str:
        return " + ".join(self.sizes[name][0] for word in words for name in word.split("|"))

    def _segment(self, name: str) -> Segment:
        size, units, *shared = self.sizes[name]
        found = Segment(evaluate(size, self.values), evaluate(units, self.values), bool(shared))
        if found.units < 1 or found.size % found.units:
            raise LayoutError(
                f"config.json: {found.size} ({quote(size)}) is not a multiple of {found.units} ({quote(units)})"
            )
        return found


def normalize(name: str) -> tuple[str, int | None, int | None]:
    """Take the numbers out of a tensor's name.

    Returns:
        The name as a pattern, the number of the layer (the first in the name), and that of the expert (after
        `experts`); None for a number that the name lacks.
    """
    layer = expert = None
    words = name.split(".")
    for i, word in enumerate(words):
        if word.isdigit() and word.isascii() and len(word) < 10:
            if layer is None:
                layer, words[i] = int(word), "{layer}"
            elif expert is None and words[i - 1].endswith("experts"):
                expert, words[i] = int(word), "{expert}"
            else:
                words[i] = "*"
    return ".".join(words), layer, expert


@cache
def _data() -> dict[Any, dict[str, Any]]:
    """Model type -> its rules: those that were derived, with the overrides on top."""
    derived = _read("architectures.json")
    found = {}
    for name in (*derived, *(name for name in _overrides()["types"] if name not in derived)):
        rules = {**derived.get(name, {})}
        for key, value in _overrides()["types"].get(name, {}).items():
            rules[key] = _merged(rules.get(key), value)
        found[name] = rules
    return found


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
    return above


@cache
def _overrides() -> Any:
    return _read("overrides.json")


def _read(name: str) -> Any:
    return json.loads(resources.files(__package__).joinpath(name).read_text("utf-8"))
