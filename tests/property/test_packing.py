"""A rank's part of packed tensors, unpacked, is its part of the weight: every format, both cuts, any shape and grain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazily import torch
from quantized_models import one_thread, round_to_nearest
from shardprep.layout import ModelLayout, PackedModel, Placed, Scheme
from shardprep.layout.packed import derive_packed
from shardprep.quantize.packing import dequantize
from shardprep_runtime.format.cut import Layout, Segment, allows, takes

SIZES = (1, 2, 3, 4, 8)
NAMES = {"torch.int32": "I32", "torch.int64": "I64", "torch.float16": "F16", "torch.bfloat16": "BF16"}

FORMATS = {
    "gptq": Scheme("gptq"),
    "gptq with zero points": Scheme("gptq", symmetric=False),
    "gptq act-order": Scheme("gptq", act_order=True),
    "gptq v2": Scheme("gptq", symmetric=False, format="gptq_v2"),
    "gptq 8 bits": Scheme("gptq", bits=8),
    "gptq 2 bits": Scheme("gptq", bits=2, symmetric=False),
    "awq": Scheme("awq", symmetric=False),
    "compressed-tensors": Scheme("compressed-tensors"),
    "compressed-tensors with zero points": Scheme("compressed-tensors", symmetric=False),
    "compressed-tensors act-order": Scheme("compressed-tensors", symmetric=False, act_order=True),
    "compressed-tensors 8 bits": Scheme("compressed-tensors", bits=8),
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


class Case(NamedTuple):
    """A weight (out x in), how it is cut before it is quantized, and by what scheme that is."""

    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    seed: int

    @property
    def multiple(self) -> int:
        """Of how many indices a rank's share must be a multiple."""
        words = 32 // self.scheme.bits
        if self.layout.dim == 0:
            plain = self.scheme.method == "compressed-tensors" and self.scheme.symmetric
            return 1 if plain else words
        group = 1 if self.scheme.act_order or self.scheme.group is None else self.scheme.group
        return lcm(group, 1 if self.scheme.method == "awq" else words)


def scheme_of(kind: Scheme, group: int | None) -> Scheme:
    return Scheme(kind.method, kind.bits, group, kind.symmetric, kind.act_order, kind.format)


@st.composite
def cases(draw: st.DrawFn, kind: Scheme) -> Case:
    words = 32 // kind.bits
    group = draw(st.sampled_from([None, 8, 16, 32, 24]))
    scheme = scheme_of(kind, group)
    dim = draw(st.sampled_from([0, 1]))
    step = words if dim == 0 else lcm(words, group or 1)
    other = draw(st.integers(1, 3)) * (lcm(words, group or 1) if dim == 0 else words)
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        units = draw(st.sampled_from([1, 2, 4, 6, 8]))
        width = draw(st.sampled_from([1, 4, 8, step, step]))
        uneven = width == 1
        segments.append(
            Segment(units * width, units, shared=not uneven and draw(st.booleans()), uneven=uneven)
        )
    rest = -sum(segment.size for segment in segments) % step  # the whole must divide
    if rest:
        segments.append(Segment(rest, rest, uneven=True))
    total = sum(segment.size for segment in segments)
    shape = (total, other) if dim == 0 else (other, total)
    return Case(scheme, Layout(dim, tuple(segments)), shape, draw(st.integers(0, 2**20)))


def fields_of(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    weight = torch.randn(case.shape, generator=generator) + (0 if case.scheme.symmetric else 0.3)
    return round_to_nearest(weight, case.scheme)


def placed(case: Case, fields: Mapping[str, torch.Tensor]) -> PackedModel:
    """How the fields are cut, by their headers and a config.json that says the scheme."""

    def derive(_: Any, shapes: Mapping[str, tuple[int, ...]]) -> ModelLayout:
        assert shapes == {"layers.0.w.weight": case.shape}
        return ModelLayout("any", 1, {"layers.0.w.weight": Placed(0, case.layout)}, {})

    headers = {f"layers.0.w.{name}": (NAMES[str(t.dtype)], tuple(t.shape)) for name, t in fields.items()}
    return derive_packed({}, headers, derive, case.scheme)


def view(tensor: torch.Tensor, layout: Layout, *, grain: int, size: int, rank: int) -> torch.Tensor:
    """What a rank of `size` has of a tensor whose pieces are cut at `grain`."""
    if layout.dim is None:
        return tensor
    found = takes(layout, tuple(tensor.shape), grain, size=size, rank=rank)
    if not found:
        return tensor.narrow(layout.dim, 0, 0)
    blocks = [
        tensor.narrow(layout.dim, take.piece.start + take.start, take.stop - take.start) for take in found
    ]
    return torch.cat(blocks, layout.dim)


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_view_unpacked_is_that_part_of_the_weight_unpacked(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(FORMATS[kind]))
    fields = fields_of(case)
    layouts = {
        name.rpartition(".")[2]: own.layout for name, own in placed(case, fields).layout.tensors.items()
    }
    whole = dequantize(fields, case.scheme)
    for grain in SIZES:
        if not all(allows(layout, grain) for layout in layouts.values()):
            continue
        for size in (size for size in SIZES if grain % size == 0):
            for rank in range(size):
                own = {
                    name: view(tensor, layouts[name], grain=grain, size=size, rank=rank)
                    for name, tensor in fields.items()
                }
                expected = view(whole, case.layout, grain=size, size=size, rank=rank)
                assert torch.equal(dequantize(own, case.scheme), expected)


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_size_is_allowed_where_each_share_is_whole_groups_and_words_and_nowhere_else(
    kind: str, data: st.DataObject
) -> None:
    case = data.draw(cases(FORMATS[kind]))
    packed = placed(case, fields_of(case))
    for size in SIZES:
        shares = []
        for segment in case.layout.segments:
            if segment.shared and size % segment.units == 0:
                shares.append(segment.size / segment.units)
            elif segment.uneven or segment.units % size == 0:
                shares.append(segment.size / size)
            else:
                shares.append(0.5)  # a unit would be split
        found = all(allows(own.layout, size) for own in packed.layout.tensors.values())
        aligned = size == 1 or all(share % case.multiple == 0 for share in shares)
        assert found == (allows(case.layout, size) if case.multiple == 1 else aligned)


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(FORMATS[kind]))
    weight = torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed))
    fields = round_to_nearest(weight, case.scheme)
    scales = fields["scales"].t() if "scales" in fields else fields["weight_scale"]
    step = scales.float().amax(1, keepdim=True)
    off = (dequantize(fields, case.scheme) - weight).abs()
    # what lies beyond the last number of a group, by the rounding of its zero point and of its scale
    assert torch.all(off <= step * (0.5 + 0.6 + 2**-9 * 2**case.scheme.bits))
    assert (off <= step * 0.51).float().mean() > 0.6
