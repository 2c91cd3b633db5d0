"""Say how the tensors of a quantized linear are cut, from how its weight is: packed numbers, scales and zero points.

A rank's share must hold whole groups and whole packed words: a weight that could be cut anywhere can then be cut at
fewer places, at which all tensors of the linear are cut together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm, prod
from typing import Any, Final

from shardprep_runtime.cut import WHOLE, Layout, Segment
from shardprep_runtime.errors import FormatError, LayoutError, UnsupportedError, quote

from .rules import ModelLayout, Placed, normalize

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape)."""

Derive = Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], ModelLayout]
"""What derives the layout of a model that is not quantized, from its config and shapes."""

OUT, IN = -2, -1
"""Dims of a weight, out x in."""

ROUTERS: Final = ("gate", "router", "wg", "shared_expert_gate", "classifier", "gating")
"""Last words of the names of linears that quantizers leave alone: a wrong expert costs more than their bytes."""


@dataclass(frozen=True, slots=True)
class Field:
    """One of the tensors that stand for a quantized weight."""

    suffix: str
    """What its name ends in, in place of the weight's `.weight`."""
    dtype: str
    dims: tuple[tuple[int | None, int], ...]
    """For each dim: which dim of the weight it follows (None: none), and how many of that one's indices make one of its own."""


@dataclass(frozen=True, slots=True)
class Grain:
    """Where a quantized weight may be cut."""

    weight: str
    layout: Layout
    """Of the weight before it was quantized."""
    size: int
    """Indices of the dim that is cut, or of its longest fused block."""
    multiple: int
    """A rank's share of them must be a multiple of this."""


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A quantized model's tensors and how each is cut."""

    tensors: Shapes
    layout: ModelLayout
    parameters: int
    """Numbers that the tensors stand for."""
    grains: Mapping[str, Grain]
    """Tensors that are cut in groups or packed words -> where they may be."""
    kept: tuple[str, ...] = ()
    """Linears that stay as they are because their sizes do not divide into groups."""


def fields_of(method: str, *, bits: int = 4, group: int | None = 128) -> tuple[Field, ...]:
    """The tensors of a weight that `method` quantizes, the first of them the weight itself. `group` None: one per row.

    Raises UnsupportedError for a method that is not known.
    """
    words = 32 // bits
    rows = 0 if group is None else group
    match method:
        case "awq":
            return (
                Field(".qweight", "I32", ((IN, 1), (OUT, words))),
                Field(".scales", "F16", ((IN, rows), (OUT, 1))),
                Field(".qzeros", "I32", ((IN, rows), (OUT, words))),
            )
        case "gptq":
            return (
                Field(".qweight", "I32", ((IN, words), (OUT, 1))),
                Field(".scales", "F16", ((IN, rows), (OUT, 1))),
                Field(".qzeros", "I32", ((IN, rows), (OUT, words))),
                Field(".g_idx", "I32", ((IN, 1),)),
            )
        case "fp8":
            return (
                Field(".weight", "F8_E4M3", ((OUT, 1), (IN, 1))),
                Field(".weight_scale_inv", "F32", ((OUT, rows), (IN, rows))),
            )
        case "mxfp4":  # gpt-oss, whose experts are in x out
            return (
                Field("_blocks", "U8", ((IN, 1), (OUT, 32), (None, 16))),
                Field("_scales", "U8", ((IN, 1), (OUT, 32))),
            )
        case "compressed-tensors" | "modelopt":
            return (
                Field(".weight_packed", "I32", ((OUT, 1), (IN, words))),
                Field(".weight_scale", "BF16", ((OUT, 1), (IN, rows))),
                Field(".weight_zero_point", "I32", ((OUT, words), (IN, rows))),
                Field(".weight_g_idx", "I32", ((IN, 1),)),
            )
    raise UnsupportedError(
        f"config.json: quantized by {quote(method)}; known are awq, gptq, fp8, mxfp4, compressed-tensors and modelopt"
    )


# ------------------------------------------------------------------------------------- a model that will be quantized


def pack(
    layout: ModelLayout,
    tensors: Shapes,
    *,
    method: str,
    bits: int = 4,
    group: int | None = 128,
    skip: Sequence[str] = (),
) -> PackedModel:
    """The model as `method` would leave it: the linears of its layers packed, all else as it is.

    group          numbers of a row that share a scale; None: all of them
    skip           parts of the names of linears that stay as they are, or patterns behind `re:`
    """
    fields = fields_of(method, bits=bits, group=group)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    placed: dict[str, Placed] = {}
    grains: dict[str, Grain] = {}
    kept = []
    cutter = _Cutter({field.suffix: field for field in fields})
    for name, (dtype, shape) in tensors.items():
        own = layout.tensors[name]
        base = None
        if _is_linear(name, own, shape) and not any(_names(each, name) for each in skip):
            if method != "mxfp4":
                base = _upright(name, own, shape)
            elif own.layout.experts:
                base = own.layout, shape
        made = base and {field.suffix: _size(field, base[1]) for field in fields}
        if base is None or made is None or None in made.values():
            found[name], placed[name] = (dtype, shape), own
            if base is not None:
                kept.append(name)
            continue
        stem = name.removesuffix(".weight")
        sizes = {suffix: size for suffix, size in made.items() if size is not None}
        found |= {stem + suffix: (cutter.fields[suffix].dtype, size) for suffix, size in sizes.items()}
        cutter.place(name, Placed(own.layer, base[0], (), own.expert), base[1], sizes, placed, grains)
    return PackedModel(
        found,
        replace(layout, tensors=placed),
        sum(prod(shape) for _, shape in tensors.values()),
        grains,
        tuple(kept),
    )


def _names(pattern: str, name: str) -> bool:
    """Whether a quantizer's list of what it leaves alone means this tensor."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name.removesuffix(".weight")) is not None
        except re.error:
            raise LayoutError(f"config.json: {quote(pattern)} is no pattern") from None
    words = [".*" if word == "*" else re.escape(word) for word in re.split(r"(\*)", pattern)]
    return re.search(rf"(^|\.){''.join(words)}(\.|$)", name) is not None


def _is_linear(name: str, placed: Placed, shape: tuple[int, ...]) -> bool:
    words = name.split(".")
    if not isinstance(placed.layer, int) or (words[-2:-1] and words[-2] in ROUTERS):
        return False
    if placed.layout.experts:
        return len(shape) == 3 and words[-1] not in ("bias", *ROUTERS)
    return len(shape) == 2 and words[-1] == "weight" and min(shape) > 1


def _upright(name: str, placed: Placed, shape: tuple[int, ...]) -> tuple[Layout, tuple[int, ...]]:
    """Layout and shape of a weight as out x in: fused experts lie either way, which shows in how they are cut."""
    layout = placed.layout
    if not layout.experts or layout.dim is None or (layout.dim == 1) != ("down" in name):
        return layout, shape
    return replace(layout, dim=3 - layout.dim), (shape[0], shape[2], shape[1])


def _size(field: Field, base: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a field of a weight; None where the weight does not divide into its groups."""
    size = list(base[:-2])
    for dim, step in field.dims:
        if dim is None:
            size.append(step)
            continue
        length = base[dim]
        step = step or length
        if length % step and field.suffix != ".weight_scale_inv":  # whose last block may be smaller
            return None
        size.append(-(-length // step))
    return tuple(size)


# --------------------------------------------------------------------------------------- a model that was quantized


def derive_packed(config: Mapping[str, Any], tensors: Shapes, derive: Derive) -> PackedModel:
    """The layout of a quantized checkpoint, from what its headers say and the layout of the model before.

    `derive` is `derive_layout` for the config and shapes of the model as it was before.
    Raises UnsupportedError for a method that is not known.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    weight, *others = fields_of(str(method))
    fields = {suffix: Field(suffix, "", ()) for suffix in SMALL}
    fields |= {each.suffix: each for each in (Field(".weight", "", ((OUT, 1), (IN, 1))), *others, weight)}
    before: dict[str, tuple[int, ...]] = {}
    linears: dict[
        str, dict[str, tuple[int, ...]]
    ] = {}  # weight -> suffix -> shape, of all that stands for it
    rest: list[tuple[str, str, str]] = []
    for name, (dtype, shape) in tensors.items():
        stem, suffix = _suffix(name, fields)
        base = stem if suffix.startswith("_") else f"{stem}.weight"
        if suffix == weight.suffix != ".weight":
            before[base] = _before(name, shape, weight, quantization or {})
            linears[base] = {suffix: shape}
        elif suffix == ".weight" and dtype in ("F8_E4M3", "F8_E5M2", "I8", "U8") and len(shape) >= 2:
            before[base] = (
                *shape[:-1],
                shape[-1] * (2 if dtype == "U8" else 1),
            )  # two 4-bit numbers in a byte
            linears[base] = {suffix: shape}
        else:
            rest.append((name, base, suffix))
    placed: dict[str, Placed] = {}
    for name, base, suffix in rest:
        shape = tensors[name][1]
        if base in linears:
            linears[base][suffix] = shape
        elif suffix in (".k_scale", ".v_scale"):  # of the KV cache
            layer = normalize(name)[1]
            placed[name] = Placed("every" if layer is None else layer, WHOLE)
        else:
            before[name] = shape
    layout = derive({**config, "quantization_config": None}, before)
    grains: dict[str, Grain] = {}
    cutter = _Cutter(fields)
    for name, shape in before.items():
        if name not in linears:
            placed[name] = layout.tensors[name]
        else:
            cutter.place(name, layout.tensors[name], shape, linears[name], placed, grains)
    return PackedModel(
        tensors,
        replace(layout, tensors={name: placed[name] for name in tensors}),
        sum(map(prod, before.values())),
        grains,
    )


def _suffix(name: str, fields: Mapping[str, Field]) -> tuple[str, str]:
    """A tensor's name up to the suffix that says what it is of its weight, and that; an empty one where it has none."""
    stem, dot, word = name.rpartition(".")
    if dot + word in fields:
        return stem, dot + word
    stem, dash, word = name.rpartition("_")
    return (stem, dash + word) if dash + word in fields else (name, "")


SMALL: Final = (
    ".weight_scale", ".weight_scale_2", ".weight_shape", ".input_scale", ".input_global_scale",
    ".weight_global_scale", ".k_scale", ".v_scale", ".weight_zero_point", ".activation_scale", ".scale",
)  # fmt: skip
"""What else may lie beside a quantized weight: one number, or one for each of its rows."""


def _before(
    name: str, shape: tuple[int, ...], weight: Field, quantization: Mapping[str, Any]
) -> tuple[int, ...]:
    """The shape of the weight, out x in, that a packed tensor stands for."""
    bits = quantization.get("bits") or quantization.get("w_bit")
    if bits is None:
        groups = quantization.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
    bits = 4 if bits is None else bits
    if type(bits) is not int or bits not in (2, 4, 8):
        raise LayoutError(f"config.json: a quantization of {quote(bits)} bits; expected 2, 4 or 8")
    lead = len(shape) - len(weight.dims)
    if lead < 0:
        raise FormatError(
            f"{quote(name)}: a packed weight of shape {list(shape)}; expected {len(weight.dims)} dims"
        )
    base = {OUT: 0, IN: 0}
    for (dim, step), length in zip(weight.dims, shape[lead:], strict=True):
        if dim is not None:
            base[dim] = length * (32 // bits if step == 8 else step)
    return (*shape[:lead], base[OUT], base[IN])


# ------------------------------------------------------------------------------------------------------- one linear


class _Cutter:
    """Places all tensors of a linear so that they are cut together; linears that are alike are worked out once."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self.fields = fields
        self.known: dict[Any, tuple[int, dict[str, Layout]]] = {}

    def place(
        self,
        weight: str,
        placed: Placed,
        shape: tuple[int, ...],
        sizes: Mapping[str, tuple[int, ...]],
        into: dict[str, Placed],
        grains: dict[str, Grain],
    ) -> None:
        """Place the tensors of `sizes`, by suffix, of the weight of `shape` that was `placed`."""
        layout = placed.layout
        key = layout, shape, tuple(sizes.items())
        if key not in self.known:
            self.known[key] = self._cut(layout, shape, sizes)
        multiple, found = self.known[key]
        grain = None
        if multiple > 1:
            grain = Grain(weight, layout, max(segment.size for segment in layout.segments), multiple)
        stem = weight.removesuffix(".weight")
        for suffix, own in found.items():
            into[stem + suffix] = Placed(placed.layer, own, (), placed.expert)
            if grain is not None and own.dim is not None:
                grains[stem + suffix] = grain

    def _cut(
        self, layout: Layout, shape: tuple[int, ...], sizes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, dict[str, Layout]]:
        """Of how many indices a share is a multiple, and the layout of each tensor."""
        steps = {
            suffix: None if layout.dim is None else _follows(self.fields[suffix], size, layout.dim, shape)
            for suffix, size in sizes.items()
        }
        multiple = lcm(*(step[1] for step in steps.values() if step), 1)
        segments = tuple(_coarsen(segment, multiple) for segment in layout.segments)
        found = {}
        for suffix, size in sizes.items():
            step = steps[suffix]
            if step is not None:
                found[suffix] = replace(
                    layout, dim=step[0], segments=_divide(segments, step[1], size[step[0]])
                )
            else:
                counts_experts = layout.experts and size[:1] == shape[:1]
                found[suffix] = replace(WHOLE, experts=True) if counts_experts else WHOLE
        return multiple, found


def _follows(field: Field, size: tuple[int, ...], dim: int, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The dim of a tensor that follows dim `dim` of its weight, and how many indices of that make one of its own."""
    lead = len(size) - len(field.dims)
    if lead >= 0:
        for i, (base, _) in enumerate(field.dims):
            if base is not None and len(shape) + base == dim and size[lead + i] > 1:
                return lead + i, -(-shape[dim] // size[lead + i])
    if (lead < 0 or not field.dims) and size and size[0] == shape[dim] and dim == len(shape) + OUT:
        return 0, 1  # a scale for each row
    return None


def _coarsen(segment: Segment, multiple: int) -> Segment:
    """The segment in units of which each is a multiple of `multiple` indices; one unit where there are none such."""
    if multiple == 1:
        return segment
    unit = segment.size // max(segment.units, 1)
    several = multiple // gcd(unit, multiple)
    units = segment.units // several if segment.units % several == 0 else 1
    return Segment(segment.size, max(units, 1), shared=segment.shared and units > 1)


def _divide(segments: tuple[Segment, ...], step: int, size: int) -> tuple[Segment, ...]:
    """The segments of a tensor of which one index stands for `step`; one that cannot be cut where they do not divide."""
    if step == 1:
        return segments
    if any(segment.size % step for segment in segments):
        return (Segment(size, 1),)
    return tuple(replace(segment, size=segment.size // step) for segment in segments)
