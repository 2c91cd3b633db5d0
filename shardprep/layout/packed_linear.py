"""Say how the tensors of one quantized linear are cut, from how its weight is: packed numbers, scales and zero points.

A rank's share must hold whole groups and whole packed words. A weight that could be cut anywhere can then be cut at
fewer places, and there all tensors of the linear are cut together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any, Final

from shardprep_runtime.errors import FormatError, quote
from shardprep_runtime.format.cut import WHOLE, Layout, Segment

from .quantization import Scheme, check_method
from .rules import Placed

OUT, IN = -2, -1
"""Dims of a weight, out x in."""

BYTES: Final = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats of compressed-tensors that pack two numbers into a byte, not eight into a word."""


@dataclass(frozen=True, slots=True)
class Field:
    """One of the tensors that stand for a quantized weight: its numbers, scales, zero points or permutation."""

    suffix: str
    """The end of the tensor's name, which replaces the weight's `.weight`."""
    dtype: str
    dims: tuple[tuple[int | None, int], ...]
    """For each dim of the tensor: the dim of the weight that it follows (None: it follows none), and how many indices of
    that dim share one index here (0: the scheme does not say, and a single index stands for all)."""
    spread: bool = False
    """Whether any run of inputs may need all of the tensor: it then stays whole where the weight is cut along its input."""


@dataclass(frozen=True, slots=True)
class Grain:
    """The places at which a quantized weight may be cut."""

    weight: str
    layout: Layout
    """The layout that the weight had before it was quantized."""
    size: int
    """Indices along the dim that is cut, or along its longest fused block."""
    multiple: int
    """A rank's share of the indices must be a multiple of this."""
    inputs: bool
    """Whether the indices are inputs of the linear, which come in groups, or outputs, which come in packed words."""


def fields_of_scheme(scheme: Scheme) -> tuple[Field, ...]:
    """List the tensors that stand for a weight quantized by `scheme`; the first holds its packed numbers.

    Raises:
        UnsupportedError: For a method that is not known.
    """
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


class Cutter:
    """Places all tensors of a linear so that they are cut together. Linears that are alike are worked out once."""

    def __init__(self, fields: Mapping[str, Field], scheme: Scheme) -> None:
        self.fields = fields
        self.block = (
            scheme.group
            if not scheme.format.endswith(("gptq", "gptq_v2", "gemm", "pack-quantized"))
            else None
        )
        """Rows that may share a scale, since float8 may be scaled in squares; None where each row has its own."""
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
        """Place all tensors of one weight.

        Args:
            weight: The weight's name before it was quantized.
            placed: The weight's place before it was quantized.
            layout: The weight's layout as out x in.
            shape: The weight's shape as out x in.
            sizes: Suffix -> shape of each tensor that stands for the weight.
            into: Takes the place of each tensor, by name.
            grains: Takes the grain of each tensor that is cut in groups or words, by name.
        """
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
        """Give the number of indices that a share must be a multiple of, and each tensor's layouts (own and engines')."""
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
        """Find the dim of a tensor that follows dim `dim` of its weight, and how many indices of the weight share one.

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
                continue  # one number for the whole dim
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
                        else ", which it does not divide"
                    )
                )
            if dim == len(shape) + base and not (field.spread and base == IN):
                at = lead + i, step
        if at is None and (lead < 0 or not field.dims) and size and dim == len(shape) + OUT:
            at = (0, 1) if size[0] == shape[OUT] else None  # one number for each row
        return at


def _of(
    layout: Layout, step: tuple[int, int] | None, multiple: int, size: tuple[int, ...], counts_experts: bool
) -> Layout:
    """The layout of one tensor of a weight that is cut by `layout` into shares that are multiples of `multiple`."""
    if step is None or layout.dim is None:
        return replace(WHOLE, experts=True) if counts_experts else WHOLE
    segments = tuple(_coarsen(segment, multiple) for segment in layout.segments)
    return replace(layout, dim=step[0], segments=_divide(segments, step[1], size[step[0]]))


def _coarsen(segment: Segment, multiple: int) -> Segment:
    """The segment with larger units, each a multiple of `multiple` indices; a single unit where that is impossible."""
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
    # ranks that outnumber the units share them, but only if a unit is one of the engine's own (a KV head)
    return Segment(segment.size, max(units, 1), shared=segment.shared and several == 1)


def _divide(segments: tuple[Segment, ...], step: int, size: int) -> tuple[Segment, ...]:
    """The segments of a tensor whose every index stands for `step` of the weight's.

    Where `step` does not divide a segment, the tensor has one segment that cannot be cut.
    """
    if step == 1:
        return segments
    if any(segment.size % step for segment in segments):
        return (Segment(size, 1),)
    return tuple(replace(segment, size=segment.size // step) for segment in segments)
