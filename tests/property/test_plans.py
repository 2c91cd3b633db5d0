"""Facts about plans that hold for every layout, name and size: arithmetic only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shardprep.files import LocalFolder
from shardprep.index import Extent, Index, SourceFile, Tensor
from shardprep.layout import ModelLayout, Placed
from shardprep.write.mover import fingerprint
from shardprep.write.plan import Plan, plan_convert, plan_split
from shardprep_runtime.format.cut import WHOLE, Layout, Segment
from shardprep_runtime.format.dtypes import BITS
from shardprep_runtime.format.header import parse_header

GRAIN = 4
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # half a surrogate pair is no name
LAYOUTS = st.sampled_from(
    [
        WHOLE,
        Layout(0, (Segment(16, 16),)),
        Layout(0, (Segment(16, 2, shared=True),)),
        Layout(0, (Segment(8, 8), Segment(8, 4))),
        Layout(0, (Segment(16, 16, uneven=True, multiple=64),)),
        Layout(1, (Segment(12, 4),)),
    ]
)
SHAPE = 16, 12


@st.composite
def models(draw: st.DrawFn) -> tuple[Index, ModelLayout]:
    """Tensors with any names, and how each is cut; what a cut gives no rows, and scalars, among them."""
    tensors, placed = {}, {}
    for name in draw(st.lists(NAMES, max_size=8, unique=True)):
        layout = draw(LAYOUTS)
        shape = SHAPE if layout != WHOLE else draw(st.sampled_from([SHAPE, (), (0, 3), (100, 30)]))
        dtype = draw(st.sampled_from([dtype for dtype in BITS if BITS[dtype] % 8 == 0]))
        tensors[name] = Tensor(name, dtype, shape, (Extent("model.safetensors", 0),))
        placed[name] = Placed(draw(st.sampled_from([0, 1, "first", "last", "every"])), layout)
    source = SourceFile("model.safetensors", 100, "1", "sha256:" + "0" * 64)
    return Index(LocalFolder(Path()), "safetensors", tensors, {}, (source,)), ModelLayout("", 2, placed, {})


def split(model: tuple[Index, ModelLayout], *, part_bytes: int = 4096, block_bytes: int = 512) -> Plan:
    index, layout = model
    return plan_split(
        index, layout, grain=GRAIN, stages=None, max_part_bytes=part_bytes, block_bytes=block_bytes
    )


@given(models(), st.integers(1, 5000), st.sampled_from([100, 4096, 10**6]))
def test_a_header_has_the_size_that_was_planned(
    model: tuple[Index, ModelLayout], part_bytes: int, block_bytes: int
) -> None:
    plan = split(model, part_bytes=part_bytes, block_bytes=block_bytes)
    index, _ = model
    aliases = {f"other {name}": name for name in index.tensors}
    converted = plan_convert(index, max_part_bytes=part_bytes, aliases=aliases)
    for each in (plan, converted):
        for part in each.parts:
            raw = each.header(part, None)
            assert len(raw) == part.header_size
            spans = parse_header(raw, part.size, where="part").tensors
            assert [(name, span.start) for name, span in spans.items()] == sorted(
                ((piece.name, part.header_size + piece.start) for piece in part.pieces),
                key=lambda own: ((span := spans[own[0]]).start, span.stop),
            )


def test_a_fingerprint_tells_rows_from_columns_of_a_square_tensor() -> None:
    tensor = Tensor("w", "U8", (8, 8), (Extent("model.safetensors", 0),))
    index = Index(LocalFolder(Path()), "safetensors", {"w": tensor}, {}, ())
    found = set()
    for dim in (0, 1):
        placed = Placed("every", Layout(dim, (Segment(8, 8),)))
        found.add(fingerprint(split((index, ModelLayout("", 0, {"w": placed}, {}))), index))
    assert len(found) == 2


@given(models().filter(lambda model: bool(model[0].tensors)), st.data())
def test_a_fingerprint_tells_plans_apart_that_write_other_bytes(
    model: tuple[Index, ModelLayout], data: st.DataObject
) -> None:
    index, layout = model
    own = fingerprint(split(model), index)
    assert fingerprint(split(model), index) == own

    name = data.draw(st.sampled_from(sorted(index.tensors)))
    tensor, placed = index.tensors[name], layout.tensors[name]
    others = [
        replace(tensor, dtype="I8" if tensor.dtype == "U8" else "U8"),
        replace(tensor, shape=(*tensor.shape, 1)),
    ]
    for other in others:
        changed = replace(index, tensors={**index.tensors, name: other})
        assert fingerprint(split((changed, layout)), changed) != own
    if placed.layout.dim is not None:
        whole = replace(layout, tensors={**layout.tensors, name: replace(placed, layout=WHOLE)})
        assert fingerprint(split((index, whole)), index) != own
    source = replace(index, files=(replace(index.files[0], version="2"),))
    assert fingerprint(split((source, layout)), source) != own
    assert fingerprint(split(model, block_bytes=256), index) != own
