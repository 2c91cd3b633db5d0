"""Lay out a model that is quantized, or will be: which tensors stand for each weight, and how they are cut with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from shardprep_runtime.errors import FormatError, LayoutError, UnsupportedError, quote
from shardprep_runtime.format.cut import WHOLE, Layout, allows, sizes_that_work

from .packed_linear import IN, OUT, Cutter, Field, Grain, fields_of_scheme
from .quantization import Scheme, read_scheme
from .rules import ModelLayout, Placed, derive_layout, normalize

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape)."""

Derive = Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], ModelLayout]
"""A function that derives the layout of a model that is not quantized, from its config and shapes."""

ROUTERS: Final = ("gate", "router", "wg", "shared_expert_gate", "classifier", "gating")
"""Last words in the names of routers. Quantizers leave them alone: a wrong choice of expert costs more than their bytes."""

IN_OUT: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose layers store linears in x out (transformers' Conv1D) until they are quantized."""


@dataclass(frozen=True, slots=True)
class PackedModel:
    """The tensors of a model, quantized or not, and how each is cut."""

    tensors: Shapes
    layout: ModelLayout
    parameters: int
    """Number of parameters that the tensors stand for."""
    grains: Mapping[str, Grain]
    """Names of tensors that are cut in groups or packed words -> the places at which they may be cut."""
    kept: tuple[str, ...] = ()
    """Linears that are not quantized because their sizes do not divide into groups."""
    scheme: Scheme | None = None
    """The scheme of quantization; None where the model is not quantized."""

    def check_grain(self, grain: int) -> None:
        """Check that `grain` tensor ranks can share every tensor.

        Raises:
            LayoutError: Where they cannot; it names the sizes that would work, and what would make this one work.
        """
        for name, placed in self.layout.tensors.items():
            if allows(placed.layout, grain):
                continue
            own = self.grains.get(name)
            if own is None or not allows(own.layout, grain):
                self.layout.check_grain(grain)  # the weight itself cannot be shared, whatever its groups are
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
            f"shared by {grain} tensor ranks: {share} is not a multiple of {own.multiple}"
        )

    def _advice(self, own: Grain, grain: int) -> str:
        """Say what to do where a cut would split groups."""
        if not own.inputs or self.scheme is None or self.scheme.group is None:
            return ""
        ways = []
        if all(
            segment.units == segment.size for segment in own.layout.segments
        ):  # without heads: it is an MLP's
            ways.append(f"`shardprep quantize --pad-to-tp {grain}`")
        smaller = (64, 32)  # the group sizes below 128 that engines take
        fits = [g for g in smaller if g < self.scheme.group and own.size % (grain * g) == 0]
        if fits:
            ways.append(f"`shardprep quantize --group-size {fits[0]}`")
        return f"; {' or '.join(ways)} of the original makes one that {grain} can share" if ways else ""


def fields_of(method: str, *, bits: int = 4, group: int | None = 128) -> tuple[Field, ...]:
    """List the tensors that stand for a quantized weight; the first holds its packed numbers.

    Args:
        method: One of METHODS.
        bits: Bits of a packed number.
        group: Numbers of a row that share a scale; None: the whole row.

    Raises:
        UnsupportedError: For a method that is not known.
    """
    return fields_of_scheme(Scheme(method, bits, group))


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
    """Lay out a model as `method` would leave it: the linears of its layers are packed, all else stays as it is.

    Args:
        layout: The layout of the model before.
        tensors: The tensors of the model before.
        method: One of METHODS.
        bits: Bits of a packed number.
        group: Numbers of a row that share a scale; None: all of them.
        skip: Linears that stay as they are: parts of their names, or patterns after `re:`.
        symmetric: Whether zero points are left out; None: as the method is used, AWQ with them and the others without.
        act_order: Whether inputs belong to groups by a permutation (`g_idx`).
    """
    if symmetric is None:
        symmetric = method != "awq"
    scheme = Scheme(method, bits, group, symmetric, act_order, kept=tuple(skip))
    fields = [field for field in fields_of_scheme(scheme) if field.suffix not in _lacking(scheme)]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    placed: dict[str, Placed] = {}
    grains: dict[str, Grain] = {}
    kept = []
    cutter = Cutter({field.suffix: field for field in fields}, scheme)
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
            # compressed-tensors stores scales in the dtype that the weight had
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
    """The suffixes that compressed-tensors does not write for this scheme."""
    zeros = (".weight_zero_point",) if scheme.symmetric else ()
    return zeros if scheme.act_order else (*zeros, ".weight_g_idx")


def _names(pattern: str, name: str) -> bool:
    """Whether an entry of a quantizer's list of linears that it leaves alone means this tensor."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name.removesuffix(".weight")) is not None
        except re.error:
            raise LayoutError(f"config.json: {quote(pattern)} is not a pattern") from None
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
    """Give layout and shape of a weight as out x in. Fused experts are stored either way; how they are cut tells which."""
    layout = placed.layout
    if model_type in IN_OUT and len(shape) == 2:
        return _flipped(layout), (shape[1], shape[0])
    if not layout.experts or layout.dim is None or (layout.dim == 1) != ("down" in name):
        return layout, shape
    return replace(layout, dim=3 - layout.dim), (shape[0], shape[2], shape[1])


def _flipped(layout: Layout) -> Layout:
    """The layout of a matrix that is transposed."""
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
        if length % step and field.suffix != ".weight_scale_inv":  # the last block of float8 may be smaller
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
    """Lay out a checkpoint, quantized or not.

    Args:
        config: The parsed config.json.
        tensors: Name -> (dtype, shape) of every tensor of the checkpoint.
        legacy: The content of one of `legacy_names`, for a config.json that does not say how it is quantized.
        derive: Gives the layout of a model that is not quantized.

    Raises:
        UnsupportedError: For a scheme that is not known, and for whatever `derive` does not know.
        FormatError, LayoutError: Where the tensors are not what the config says.
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
    """Lay out a quantized checkpoint, from its headers and the layout of the model before.

    Args:
        config: The parsed config.json.
        tensors: Name -> (dtype, shape) of every tensor of the checkpoint.
        derive: Gives the layout of the model before, from its config and shapes.
        scheme: How the checkpoint is quantized; default: what config.json says.

    Raises:
        UnsupportedError: For a scheme that is not known, and for whatever `derive` does not know.
        FormatError, LayoutError: Where the tensors are not what the scheme says.
    """
    scheme = scheme or read_scheme(config)
    if scheme is None:
        raise LayoutError("config.json: no quantization_config, which says how the tensors are quantized")
    whole = unpack(tensors, scheme)
    if not whole.linears:
        raise FormatError(
            f"config.json: quantized by {scheme.method}, but no tensor holds packed numbers "
            f"({fields_of_scheme(scheme)[0].suffix}); config and tensors do not belong together"
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
    cutter = Cutter(whole.fields, scheme)
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
    """Derive the layout of the model before, and of biases that it did not have: AutoGPTQ adds zeros to each linear."""
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
    """The model that a quantized checkpoint stands for."""

    shapes: Mapping[str, tuple[int, ...]]
    """Name -> shape of each tensor of the model before it was quantized."""
    linears: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Name of a quantized weight -> suffix -> shape of each tensor that stands for it."""
    beside: tuple[str, ...]
    """Tensors that do not stand for a weight: scales of the KV cache."""
    fields: Mapping[str, Field]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model before."""
        return sum(map(prod, self.shapes.values()))


def unpack(tensors: Shapes, scheme: Scheme) -> Unpacked:
    """Find the shapes of the model before it was quantized, from the names and shapes of its tensors alone.

    Args:
        tensors: Name -> (dtype, shape) of every tensor of the checkpoint.

    Raises:
        FormatError: For a packed weight with too few dims.
    """
    weight, *others = fields_of_scheme(scheme)
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
            # U8 holds two 4-bit numbers in a byte
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
    """The config of the model before: without quantization_config, also in the config of its language model."""
    keys = ("quantization_config", "compression_config")
    found = {key: value for key, value in config.items() if key not in keys}
    text = found.get("text_config")
    if isinstance(text, Mapping):
        found["text_config"] = {key: value for key, value in text.items() if key not in keys}
    return found


def _suffix(name: str, fields: Mapping[str, Field]) -> tuple[str, str]:
    """Split a tensor's name into its stem and the suffix that says which field it is; empty where it is not a field."""
    stem, dot, word = name.rpartition(".")
    if dot + word in fields:
        return stem, dot + word
    stem, dash, word = name.rpartition("_")
    return (stem, dash + word) if dash + word in fields else (name, "")


SMALL: Final = (
    ".weight_scale", ".weight_scale_2", ".weight_shape", ".input_scale", ".input_global_scale",
    ".weight_global_scale", ".k_scale", ".v_scale", ".weight_zero_point", ".activation_scale", ".scale",
)  # fmt: skip
"""Suffixes of further tensors beside a quantized weight: each holds one number, or one for each row of the weight."""


def _before(name: str, shape: tuple[int, ...], weight: Field) -> tuple[int, ...]:
    """The shape, out x in, of the weight that a packed tensor stands for."""
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
