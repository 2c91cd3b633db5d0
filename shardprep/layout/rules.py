"""Turn the data of architectures.json, a config and the checkpoint's names and shapes into a layout for each tensor."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from shardprep_runtime.cut import WHOLE, Layout, Segment, allows, sizes_that_work
from shardprep_runtime.errors import LayoutError, UnsupportedError, quote
from shardprep_runtime.manifest import PLACEMENTS, Layer


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a tensor belongs and how it may be cut."""

    layer: Layer
    layout: Layout


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The layout of every tensor of one checkpoint."""

    model_type: str
    layers: int
    tensors: Mapping[str, Placed]
    tied: Mapping[str, str]
    """Names that the checkpoint lacks because its config ties them -> the tensor they are tied to."""

    def check_grain(self, grain: int) -> None:
        """Raises LayoutError, with the sizes that would work, where `grain` tensor ranks cannot share a tensor."""
        for name, placed in self.tensors.items():
            if not allows(placed.layout, grain):
                sizes = sizes_that_work([each.layout for each in self.tensors.values()])
                units = " + ".join(str(segment.units) for segment in placed.layout.segments)
                raise LayoutError(
                    f"{quote(name)}: {units} units along dim {placed.layout.dim} cannot be shared by {grain} tensor "
                    f"ranks; tensor parallel sizes that work for this model: {', '.join(map(str, sizes))}"
                )


def known_types() -> list[str]:
    """The model types that have rules."""
    return sorted(_data()["types"])


def ties_head(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(head, embedding) where this config makes one tensor serve as both, else None. Unknown types: as it says itself."""
    rules = _data()["types"].get(config.get("model_type"), {})
    if not config.get("tie_word_embeddings", rules.get("tied", False)):
        return None
    return rules.get("head", "lm_head.weight"), rules.get("embedding", "model.embed_tokens.weight")


def derive_layout(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelLayout:
    """The layout of each of the tensors in `shapes` (name -> full shape) of a model with this config.json.

    Raises UnsupportedError for a model type or a tensor without rules, LayoutError where the config and the shapes
    contradict each other.
    """
    model_type = config.get("model_type")
    rules = _data()["types"].get(model_type) if isinstance(model_type, str) else None
    if rules is None:
        raise UnsupportedError(
            f"config.json: no layout rules for model_type {quote(model_type)}; known are {', '.join(known_types())}"
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            "config.json: a quantized checkpoint; the layout of packed tensors is not known yet"
        )
    values = {
        **rules.get("defaults", {}),
        **{key: value for key, value in config.items() if value is not None},
    }
    sizes, patterns = _collect(rules)
    segments = _Segments(sizes, values)
    layers = _evaluate(rules["layers"], values)
    prefixes = rules.get("prefixes", [""])
    tensors = {}
    for name, shape in shapes.items():
        pattern, layer = _normalize(name)
        rule = next((patterns[p + pattern] for p in prefixes if p + pattern in patterns), None)
        if rule is None:
            raise UnsupportedError(
                f"{quote(name)}: no layout rule for this tensor in a {model_type} model; "
                "the checkpoint may hold something beside the model, or the rules lack it"
            )
        placement, _, cut = rule.partition(" ") if rule.split()[0] in PLACEMENTS else (None, "", rule)
        if layer is not None and layer >= layers:
            raise LayoutError(f"{quote(name)}: layer {layer}, but config.json says {layers} layers")
        tensors[name] = Placed(
            layer if placement is None and layer is not None else placement or "every",
            segments.layout(cut, shape, name),
        )
    present = {placed.layer for placed in tensors.values() if isinstance(placed.layer, int)}
    if len(present) < layers:
        missing = next(layer for layer in range(layers) if layer not in present)
        raise LayoutError(
            f"config.json says {layers} layers, but layer {missing} has no tensors in the checkpoint"
        )
    return ModelLayout(model_type or "", layers, *_tie(config, tensors))


def _tie(config: Mapping[str, Any], tensors: dict[str, Placed]) -> tuple[dict[str, Placed], dict[str, str]]:
    """Place a tied embedding at both ends, and name the head that the checkpoint then lacks."""
    pair = ties_head(config)
    if pair is None:
        return tensors, {}
    head = pair[0]
    embedding = next((name for name in tensors if name == pair[1] or pair[1].endswith(f".{name}")), None)
    if embedding is None or head in tensors:
        return tensors, {}
    tensors[embedding] = Placed("ends", tensors[embedding].layout)
    return tensors, {head: embedding}


class _Segments:
    """The segments that the size names of a model type stand for, with the numbers of one config."""

    def __init__(self, sizes: Mapping[str, list[str]], values: Mapping[str, Any]) -> None:
        self.sizes = sizes
        self.values = values
        self.known: dict[str, tuple[str, tuple[Segment, ...]]] = {}

    def layout(self, cut: str, shape: tuple[int, ...], name: str) -> Layout:
        if cut == "whole":
            return WHOLE
        if not shape:
            raise LayoutError(f"{quote(name)}: a scalar, but the rules cut it ({cut})")
        if cut == "vocabulary":
            return Layout(0, uneven=True)
        if cut not in self.known:
            along, _, names = cut.partition(" ")
            self.known[cut] = along, tuple(self._segment(each.strip()) for each in names.split("+"))
        along, segments = self.known[cut]
        dim = 0 if along == "rows" else len(shape) - 1
        total = sum(segment.size for segment in segments)
        if total != shape[dim]:
            raise LayoutError(
                f"{quote(name)}: dim {dim} of {list(shape)} should be {total} by config.json ({cut}); "
                "config and checkpoint do not belong together"
            )
        return Layout(dim, segments)

    def _segment(self, name: str) -> Segment:
        size, units, *shared = self.sizes[name]
        found = Segment(_evaluate(size, self.values), _evaluate(units, self.values), bool(shared))
        if found.units < 1 or found.size % found.units:
            raise LayoutError(
                f"config.json: {found.size} ({quote(size)}) is no multiple of {found.units} ({quote(units)})"
            )
        return found


def _normalize(name: str) -> tuple[str, int | None]:
    """The pattern of a tensor's name, and the number of its layer: the first number in it."""
    layer = None
    words = name.split(".")
    for i, word in enumerate(words):
        if word.isascii() and word.isdigit() and len(word) < 10:
            words[i] = "*" if layer is not None else "{layer}"
            layer = int(word) if layer is None else layer
    return ".".join(words), layer


def _collect(rules: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The sizes and tensor patterns of a model type, those of the blocks it uses included."""
    sizes: dict[str, list[str]] = {}
    tensors: dict[str, str] = {}
    for block in (*(_data()["blocks"][name] for name in rules["use"]), rules):
        sizes.update(block.get("sizes", {}))
        tensors.update(block.get("tensors", {}))
    return sizes, tensors


def _evaluate(expression: str, values: Mapping[str, Any]) -> int:
    """An integer expression over config values; `a | b` is a where the config has it, else b."""

    def walk(node: ast.expr) -> int | None:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=key):
                found = values.get(key)
                if found is not None and (type(found) is not int or found < 1):
                    raise LayoutError(f"config.json: {key} is {quote(found)}, expected a positive integer")
                return found
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                first = walk(left)
                return first if first is not None else walk(right)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as operator, right=right):
                a, b = walk(left), walk(right)
                if a is None or b is None:
                    return None
                return a * b if isinstance(operator, ast.Mult) else a // b
        raise AssertionError(f"architectures.json: {expression!r}")

    found = walk(ast.parse(expression, mode="eval").body)
    if found is None:
        raise LayoutError(f"config.json lacks what the layout needs: {expression}")
    return found


@cache
def _data() -> Any:
    return json.loads(resources.files(__package__).joinpath("architectures.json").read_text("utf-8"))
