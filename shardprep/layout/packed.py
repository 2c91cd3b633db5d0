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

from shardprep_runtime.errors import FormatError, LayoutError, UnsupportedError, quote
from shardprep_runtime.format.cut import WHOLE, Layout, Segment, allows, sizes_that_work

from .quantization import Scheme, check_method, read_scheme
from .rules import ModelLayout, Placed, derive_layout, normalize

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape)."""

Derive = Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], ModelLayout]
"""What derives the layout of a model that is not quantized, from its config and shapes."""

OUT, IN = -2, -1
"""Dims of a weight, out x in."""

ROUTERS: Final = ("gate", "router", "wg", "shared_expert_gate", "classifier", "gating")
"""Last words of the names of linears that quantizers leave alone: a wrong expert costs more than their bytes."""

IN_OUT: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose linears of the layers lie in x out (transformers' Conv1D) until they are quantized."""

BYTES: Final = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats of compressed-tensors that pack two numbers into a byte, not eight into a word."""


@dataclass(frozen=True, slots=True)
class Field:
    """One of the tensors that stand for a quantized weight."""

    suffix: str
    """What its name ends in, in place of the weight's `.weight`."""
    dtype: str
    dims: tuple[tuple[int | None, int], ...]
    """For each dim: which dim of the weight it follows (None: none), and how many of that one's indices make one of its own
    (0: not said; one for all where there is one)."""
    spread: bool = False
    """Whether a run of inputs may need any of it: it stays whole where the weight is cut along its input."""


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
    inputs: bool
    """Whether they are inputs of the linear, which come in groups, or outputs, which come in packed words."""


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
    scheme: Scheme | None = None
    """How it is quantized; None: not at all."""

    def check_grain(self, grain: int) -> None:
        """Raises LayoutError, with the sizes that would work, where `grain` tensor ranks cannot share a tensor."""
        for name, placed in self.layout.tensors.items():
            if allows(placed.layout, grain):
                continue
            own = self.grains.get(name)
            if own is None or not allows(own.layout, grain):
                self.layout.check_grain(grain)  # groups are not what is in the way
                continue
            sizes = sizes_that_work(list({each.layout for each in self.layout.tensors.values()}))
            raise LayoutError(
                f"{self._unaligned(own, grain)}; tensor parallel sizes that work for this checkpoint: "
                f"{', '.join(map(str, sizes))}{self._advice(own, grain)}"
            )

    def _unaligned(self, own: Grain, grain: int) -> str:
        each, rest = divmod(own.size, grain)
        share = f"{own.size} / {grain} = {each}" + (f" rest {rest}" if rest else "")
        group = self.scheme.group if self.scheme else None
        how = "quantized in groups" if group and own.multiple % group == 0 else "packed in words"
        return (
            f"{quote(own.weight)}: {own.size} {'inputs' if own.inputs else 'outputs'}, {how} of {own.multiple}, cannot be "
            f"shared by {grain} tensor ranks: {share} is no multiple of {own.multiple}"
        )

    def _advice(self, own: Grain, grain: int) -> str:
        """What to do about groups that would be split."""
        if not own.inputs or self.scheme is None or self.scheme.group is None:
            return ""
        ways = []
        if all(segment.units == segment.size for segment in own.layout.segments):  # no heads: an MLP's
            ways.append(f"`shardprep quantize --pad-to-tp {grain}`")
        smaller = (64, 32)  # besides 128, what engines take
        fits = [g for g in smaller if g < self.scheme.group and own.size % (grain * g) == 0]
        if fits:
            ways.append(f"`shardprep quantize --group-size {fits[0]}`")
        return f"; {' or '.join(ways)} of the original makes one that {grain} can share" if ways else ""


def fields_of(method: str, *, bits: int = 4, group: int | None = 128) -> tuple[Field, ...]:
    """The tensors of a weight that `method` quantizes, the first of them the weight itself. `group` None: one per row.

    Raises:
        UnsupportedError: For a method that is not known.
    """
    return _fields(Scheme(method, bits, group))


def _fields(scheme: Scheme) -> tuple[Field, ...]:
    words = 8 // scheme.bits if scheme.format in BYTES else 32 // scheme.bits
    rows = 0 if scheme.group is None else scheme.group
    match check_method(scheme.method):
        case "awq":
            return (
                Field(".qweight", "I32", ((IN, 1), (OUT, words))),
                Field(".scales", "F16", ((IN, rows), (OUT, 1))),
                Field(".qzeros", "I32", ((IN, rows), (OUT, words))),
            )
        case "gptq":
            return (
                Field(".qweight", "I32", ((IN, words), (OUT, 1))),
                Field(".scales", "F16", ((IN, rows), (OUT, 1)), scheme.act_order),
                Field(".qzeros", "I32", ((IN, rows), (OUT, words)), scheme.act_order),
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
        case "compressed-tensors":
            packed = "U8" if scheme.format in BYTES else "I32"
            return (
                Field(".weight_packed", packed, ((OUT, 1), (IN, words))),
                Field(".weight_scale", "BF16", ((OUT, 1), (IN, rows)), scheme.act_order),
                Field(".weight_shape", "I64", ((None, 2),)),
                Field(".weight_zero_point", "I32", ((OUT, words), (IN, rows)), scheme.act_order),
                Field(".weight_g_idx", "I32", ((IN, 1),)),
            )
    return (  # ModelOpt's
        Field(".weight", "U8", ((OUT, 1), (IN, 2 if scheme.bits == 4 else 1))),
        Field(".weight_scale", "F8_E4M3", ((OUT, 1), (IN, rows))),
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
    symmetric: bool | None = None,
    act_order: bool = False,
) -> PackedModel:
    """The model as `method` would leave it: the linears of its layers packed, all else as it is.

    Args:
        group: Numbers of a row that share a scale; None: all of them.
        skip: Parts of the names of linears that stay as they are, or patterns behind `re:`.
        symmetric: None: as the method is used, AWQ with zero points and the others without.
    """
    if symmetric is None:
        symmetric = method != "awq"
    scheme = Scheme(method, bits, group, symmetric, act_order, kept=tuple(skip))
    fields = [field for field in _fields(scheme) if field.suffix not in _lacking(scheme)]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    placed: dict[str, Placed] = {}
    grains: dict[str, Grain] = {}
    kept = []
    cutter = _Cutter({field.suffix: field for field in fields}, scheme)
    for name, (dtype, shape) in tensors.items():
        own = layout.tensors[name]
        base = None
        if _is_linear(name, own, shape) and not any(_names(each, name) for each in scheme.kept):
            if scheme.method != "mxfp4":
                base = _upright(name, own, shape, layout.model_type)
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
        for suffix, size in sizes.items():
            # compressed-tensors leaves scales in the dtype that the weight had
            found[stem + suffix] = dtype if suffix == ".weight_scale" else cutter.fields[suffix].dtype, size
        cutter.place(name, own, base[0], base[1], sizes, placed, grains)
    return PackedModel(
        found,
        replace(layout, tensors=placed),
        sum(prod(shape) for _, shape in tensors.values()),
        grains,
        tuple(kept),
        scheme,
    )


def _lacking(scheme: Scheme) -> tuple[str, ...]:
    """Tensors of compressed-tensors that only some schemes write."""
    zeros = (".weight_zero_point",) if scheme.symmetric else ()
    return zeros if scheme.act_order else (*zeros, ".weight_g_idx")


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


def _upright(
    name: str, placed: Placed, shape: tuple[int, ...], model_type: str
) -> tuple[Layout, tuple[int, ...]]:
    """Layout and shape of a weight as out x in: fused experts lie either way, which shows in how they are cut."""
    layout = placed.layout
    if model_type in IN_OUT and len(shape) == 2:
        return _flipped(layout), (shape[1], shape[0])
    if not layout.experts or layout.dim is None or (layout.dim == 1) != ("down" in name):
        return layout, shape
    return replace(layout, dim=3 - layout.dim), (shape[0], shape[2], shape[1])


def _flipped(layout: Layout) -> Layout:
    """The layout of a matrix that is stored transposed."""
    return layout if layout.dim is None else replace(layout, dim=1 - layout.dim)


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


def lay_out(
    config: Mapping[str, Any],
    tensors: Shapes,
    *,
    legacy: Mapping[str, Any] | None = None,
    derive: Derive = derive_layout,
) -> PackedModel:
    """The tensors of a checkpoint, quantized or not, and how each is cut.

    `legacy` is the content of one of `legacy_names`, where config.json does not say how it is quantized; `derive`
    gives the layout of a model that is not. Raises what it raises, and UnsupportedError for a scheme that is not known.
    """
    scheme = read_scheme(config, legacy)
    if scheme is not None:
        return derive_packed(config, tensors, derive, scheme)
    packed = next((name for name in tensors if name.endswith((".qweight", ".weight_packed"))), None)
    if packed is not None:
        raise FormatError(
            f"{quote(packed)}: packed numbers, but neither config.json (quantization_config) nor a quantize_config.json "
            "or quant_config.json beside it says how they are packed"
        )
    layout = derive(config, {name: shape for name, (_, shape) in tensors.items()})
    return PackedModel(tensors, layout, sum(prod(shape) for _, shape in tensors.values()), {})


def derive_packed(
    config: Mapping[str, Any], tensors: Shapes, derive: Derive, scheme: Scheme | None = None
) -> PackedModel:
    """The layout of a quantized checkpoint, from what its headers say and the layout of the model before.

    `derive` is `derive_layout` for the config and shapes of the model as it was before; `scheme` that of config.json
    if None. Raises UnsupportedError for a scheme that is not known, FormatError or LayoutError where the tensors are
    not what it says.
    """
    scheme = scheme or read_scheme(config)
    if scheme is None:
        raise LayoutError("config.json: no quantization_config, which says how the tensors are quantized")
    whole = unpack(tensors, scheme)
    if not whole.linears:
        raise FormatError(
            f"config.json: quantized by {scheme.method}, but no tensor holds packed numbers "
            f"({_fields(scheme)[0].suffix}); config and tensors do not belong together"
        )
    turned = config.get("model_type") in IN_OUT
    shapes = {
        name: (shape[1], shape[0]) if turned and name in whole.linears and len(shape) == 2 else shape
        for name, shape in whole.shapes.items()
    }
    layout = _derived(derive, _plain(config), shapes, whole.linears, turned)
    placed = {}
    for name in whole.beside:
        layer = normalize(name)[1]
        placed[name] = Placed("every" if layer is None else layer, WHOLE)
    grains: dict[str, Grain] = {}
    cutter = _Cutter(whole.fields, scheme)
    for name, shape in whole.shapes.items():
        own = layout.tensors[name]
        if name not in whole.linears:
            placed[name] = own
        else:
            base = _flipped(own.layout) if turned and len(shape) == 2 else own.layout
            cutter.place(name, own, base, shape, whole.linears[name], placed, grains)
    return PackedModel(
        tensors,
        replace(layout, tensors={name: placed[name] for name in tensors}),
        whole.parameters,
        grains,
        scheme=scheme,
    )


def _derived(
    derive: Derive,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    linears: Mapping[str, Any],
    turned: bool,
) -> ModelLayout:
    """The layout of the model before, and of biases that only AutoGPTQ gave it: it wrote one, of zeros, for each linear."""
    try:
        return derive(config, shapes)
    except UnsupportedError:
        weights = {name: f"{name.removesuffix('.bias')}.weight" for name in shapes if name.endswith(".bias")}
        biases = {name: weight for name, weight in weights.items() if weight in linears}
        if not biases:
            raise
        found = derive(config, {name: shape for name, shape in shapes.items() if name not in biases})
    tensors = dict(found.tensors)
    out = 1 if turned else 0
    for name, weight in biases.items():
        own = tensors[weight]
        if own.layout.dim == out:
            engines = tuple((engine, _of_bias(each)) for engine, each in own.engines)
            tensors[name] = replace(own, layout=_of_bias(own.layout), engines=engines)
        else:
            tensors[name] = replace(own, layout=WHOLE, engines=())
    return replace(found, tensors=tensors)


def _of_bias(layout: Layout) -> Layout:
    """The layout of a bias whose weight is cut along its output."""
    return layout if layout.dim is None else replace(layout, dim=0)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What the tensors of a quantized checkpoint stand for."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the tensors of the model before."""
    linears: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Name of a quantized weight -> suffix -> shape, of all tensors that stand for it."""
    beside: tuple[str, ...]
    """Tensors that stand for no weight: scales of the KV cache."""
    fields: Mapping[str, Field]

    @property
    def parameters(self) -> int:
        """Numbers of the model before."""
        return sum(map(prod, self.shapes.values()))


def unpack(tensors: Shapes, scheme: Scheme) -> Unpacked:
    """The shapes of the model before it was quantized, by the names and shapes of its tensors alone."""
    weight, *others = _fields(scheme)
    fields = {suffix: Field(suffix, "", ()) for suffix in SMALL}
    fields |= {each.suffix: each for each in (Field(".weight", "", ((OUT, 0), (IN, 0))), *others, weight)}
    shapes: dict[str, tuple[int, ...]] = {}
    linears: dict[str, dict[str, tuple[int, ...]]] = {}
    rest: list[tuple[str, str, str]] = []
    for name, (dtype, shape) in tensors.items():
        stem, suffix = _suffix(name, fields)
        base = stem if suffix.startswith("_") else f"{stem}.weight"
        if suffix == weight.suffix != ".weight":
            shapes[base] = _before(name, shape, weight)
            linears[base] = {suffix: shape}
        elif suffix == ".weight" and dtype in ("F8_E4M3", "F8_E5M2", "I8", "U8") and len(shape) >= 2:
            # two 4-bit numbers in a byte
            shapes[base] = *shape[:-1], shape[-1] * (2 if dtype == "U8" else 1)
            linears[base] = {suffix: shape}
        else:
            rest.append((name, base, suffix))
    beside = []
    for name, base, suffix in rest:
        if base in linears:
            linears[base][suffix] = tensors[name][1]
        elif suffix in (".k_scale", ".v_scale"):
            beside.append(name)
        else:
            shapes[name] = tensors[name][1]
    return Unpacked(shapes, linears, tuple(beside), fields)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model before, whose language model may have had a quantization_config of its own."""
    keys = ("quantization_config", "compression_config")
    found = {key: value for key, value in config.items() if key not in keys}
    text = found.get("text_config")
    if isinstance(text, Mapping):
        found["text_config"] = {key: value for key, value in text.items() if key not in keys}
    return found


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


def _before(name: str, shape: tuple[int, ...], weight: Field) -> tuple[int, ...]:
    """The shape of the weight, out x in, that a packed tensor stands for."""
    lead = len(shape) - len(weight.dims)
    if lead < 0:
        raise FormatError(
            f"{quote(name)}: a packed weight of shape {list(shape)}; expected {len(weight.dims)} dims"
        )
    base = {OUT: 0, IN: 0}
    for (dim, step), length in zip(weight.dims, shape[lead:], strict=True):
        if dim is not None:
            base[dim] = length * step
    return (*shape[:lead], base[OUT], base[IN])


# ------------------------------------------------------------------------------------------------------- one linear


class _Cutter:
    """Places all tensors of a linear so that they are cut together; linears that are alike are worked out once."""

    def __init__(self, fields: Mapping[str, Field], scheme: Scheme) -> None:
        self.fields = fields
        self.block = (
            scheme.group
            if not scheme.format.endswith(("gptq", "gptq_v2", "gemm", "pack-quantized"))
            else None
        )
        """Rows that may share a scale: float8 may come in squares."""
        self.known: dict[Any, tuple[int, dict[str, tuple[Layout, tuple[tuple[str, Layout], ...]]]]] = {}

    def place(
        self,
        weight: str,
        placed: Placed,
        layout: Layout,
        shape: tuple[int, ...],
        sizes: Mapping[str, tuple[int, ...]],
        into: dict[str, Placed],
        grains: dict[str, Grain],
    ) -> None:
        """Place the tensors of `sizes`, by suffix, of the weight that was `placed`; `layout` and `shape` are out x in."""
        key = layout, placed.engines, shape, tuple(sizes.items())
        if key not in self.known:
            self.known[key] = self._cut(weight, layout, placed.engines, shape, sizes)
        multiple, found = self.known[key]
        grain = None
        if multiple > 1 and layout.dim is not None:
            longest = max(segment.size for segment in layout.segments)
            grain = Grain(weight, layout, longest, multiple, layout.dim == len(shape) + IN)
        stem = weight.removesuffix(".weight")
        for suffix, (own, engines) in found.items():
            into[stem + suffix] = Placed(placed.layer, own, engines, placed.expert)
            if grain is not None and own.dim is not None:
                grains[stem + suffix] = grain

    def _cut(
        self,
        weight: str,
        layout: Layout,
        engines: tuple[tuple[str, Layout], ...],
        shape: tuple[int, ...],
        sizes: Mapping[str, tuple[int, ...]],
    ) -> tuple[int, dict[str, tuple[Layout, tuple[tuple[str, Layout], ...]]]]:
        """Of how many indices a share is a multiple, and the layout of each tensor, its own and what engines ask for."""
        steps = {
            suffix: self._follows(weight, suffix, size, layout.dim, shape) for suffix, size in sizes.items()
        }
        multiple = lcm(*(step[1] for step in steps.values() if step), 1)
        found = {}
        for suffix, size in sizes.items():
            counts_experts = layout.experts and size[:1] == shape[:1]
            own = _of(layout, steps[suffix], multiple, size, counts_experts)
            asked = (
                (engine, _of(each, steps[suffix], multiple, size, counts_experts)) for engine, each in engines
            )
            found[suffix] = own, tuple((engine, each) for engine, each in asked if each != own)
        return multiple, found

    def _follows(
        self, weight: str, suffix: str, size: tuple[int, ...], dim: int | None, shape: tuple[int, ...]
    ) -> tuple[int, int] | None:
        """The dim of a tensor that follows dim `dim` of its weight, and how many indices of that make one of its own.

        Raises:
            FormatError: Where a tensor's size is not what the scheme and the weight's shape make of it.
        """
        field = self.fields[suffix]
        lead = len(size) - len(field.dims)
        at = None
        for i, (base, step) in enumerate(field.dims if lead >= 0 else ()):
            if base is None:
                continue
            length, own = shape[base], size[lead + i]
            if own == 1 and step <= 1:
                continue  # one for all
            if base == OUT and step <= 1 and self.block and own != length and -(-length // self.block) == own:
                step = self.block
            if step == 0 and length % own == 0:
                step = length // own
            if step == 0 or -(-length // step) != own:
                raise FormatError(
                    f"{quote(weight.removesuffix('.weight') + suffix)}: {own} along dim {lead + i} for {length} "
                    f"{'inputs' if base == IN else 'outputs'}"
                    + (
                        f"; expected one for each {step}, by config.json"
                        if step
                        else ", of which it is no divisor"
                    )
                )
            if dim == len(shape) + base and not (field.spread and base == IN):
                at = lead + i, step
        if at is None and (lead < 0 or not field.dims) and size and dim == len(shape) + OUT:
            at = (0, 1) if size[0] == shape[OUT] else None  # a scale for each row
        return at


def _of(
    layout: Layout, step: tuple[int, int] | None, multiple: int, size: tuple[int, ...], counts_experts: bool
) -> Layout:
    """The layout of one tensor of a weight that is cut by `layout` where shares are multiples of `multiple`."""
    if step is None or layout.dim is None:
        return replace(WHOLE, experts=True) if counts_experts else WHOLE
    segments = tuple(_coarsen(segment, multiple) for segment in layout.segments)
    return replace(layout, dim=step[0], segments=_divide(segments, step[1], size[step[0]]))


def _coarsen(segment: Segment, multiple: int) -> Segment:
    """The segment in units of which each is a multiple of `multiple` indices; one unit where there are none such."""
    if multiple == 1:
        return segment
    if (
        segment.multiple > 1 and segment.multiple % multiple == segment.size % multiple == 0
    ):  # a padded vocabulary
        return Segment(
            segment.size, segment.size // multiple, uneven=True, multiple=segment.multiple // multiple
        )
    unit = segment.size // max(segment.units, 1)
    several = multiple // gcd(unit, multiple)
    units = segment.units // several if segment.units % several == 0 else 1
    # ranks that outnumber the units share them, but only units that are the engine's own (a KV head)
    return Segment(segment.size, max(units, 1), shared=segment.shared and several == 1)


def _divide(segments: tuple[Segment, ...], step: int, size: int) -> tuple[Segment, ...]:
    """The segments of a tensor of which one index stands for `step`; one that cannot be cut where they do not divide."""
    if step == 1:
        return segments
    if any(segment.size % step for segment in segments):
        return (Segment(size, 1),)
    return tuple(replace(segment, size=segment.size // step) for segment in segments)
