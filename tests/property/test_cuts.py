"""Facts about cuts and views that hold for every layout, shape and size: arithmetic only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from math import gcd

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lazily import torch
from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format import cut
from shardprep_runtime.format.grid import (
    Grid,
    check_stage_needs,
    check_stages,
    even_stages,
    experts_of,
    stages_with,
)

GRAINS = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])


@st.composite
def cases(draw: st.DrawFn) -> tuple[cut.Layout, tuple[int, ...], int]:
    """A layout, a shape that it fits and a grain that it allows."""
    grain = draw(GRAINS)
    dims = draw(st.integers(1, 3))
    dim = draw(st.integers(0, dims - 1))
    shape = [draw(st.integers(1, 5)) for _ in range(dims)]
    if draw(st.integers(0, 4)) == 0:
        return cut.WHOLE, tuple(shape), grain
    even = draw(st.booleans())
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        if not even and draw(st.booleans()):
            units = draw(st.integers(1, 60))
            multiple = draw(st.sampled_from([1, 1, 8, 64]))
            width = draw(st.integers(0, 3))
            segments.append(cut.Segment(units * width, units, uneven=True, multiple=multiple))
            continue
        shared = draw(st.booleans())
        if shared and draw(st.booleans()):
            units = draw(st.sampled_from([n for n in range(1, grain + 1) if grain % n == 0]))
        else:
            units = grain * draw(st.integers(1, 4))
        segments.append(cut.Segment(units * draw(st.integers(1, 4)), units, shared))
    shape[dim] = sum(segment.size for segment in segments)
    return cut.Layout(dim, tuple(segments)), tuple(shape), grain


@st.composite
def asked_otherwise(draw: st.DrawFn) -> tuple[cut.Layout, cut.Layout, tuple[int, ...], int]:
    """A case, and a layout by which an engine may ask for it: whole, or in other segments along the same dim."""
    layout, shape, grain = draw(cases())
    if layout.dim is None or draw(st.integers(0, 3)) == 0:
        return layout, cut.WHOLE, shape, grain
    left = shape[layout.dim]
    segments = []
    while left:
        size = draw(st.integers(1, left))
        multiple = draw(st.sampled_from([1, 8, 64]))
        segments.append(cut.Segment(size, size, uneven=True, multiple=multiple))
        left -= size
    return layout, cut.Layout(layout.dim, tuple(segments)), shape, grain


def uneven(layout: cut.Layout) -> bool:
    return any(segment.uneven for segment in layout.segments)


def indices(taken: Iterable[cut.Take]) -> list[int]:
    """Along the dim, in the order in which they join."""
    return [t.piece.start + i for t in taken for i in range(t.start, t.stop)]


def divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]


@given(cases())
def test_pieces_tile_the_tensor_exactly_once(case: tuple[cut.Layout, tuple[int, ...], int]) -> None:
    layout, shape, grain = case
    pieces = cut.pieces(layout, shape, grain)
    if layout.dim is None:
        assert pieces == (cut.Piece(0, 0, 0, 0, grain),)
        return
    assert [piece.start for piece in pieces[:1]] in ([], [0])
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    assert sum(piece.stop - piece.start for piece in pieces) == shape[layout.dim]


@given(cases())
def test_every_rank_of_the_grain_owns_its_share_of_each_segment(
    case: tuple[cut.Layout, tuple[int, ...], int],
) -> None:
    layout, shape, grain = case
    pieces = cut.pieces(layout, shape, grain)
    for index, segment in enumerate(layout.segments):
        owners = [r for p in pieces if p.segment == index for r in range(p.first_rank, p.last_rank)]
        assert owners == list(range(len(owners) if segment.uneven or not segment.size else grain))


@given(asked_otherwise())
def test_a_view_at_one_rank_takes_every_piece_whole_and_in_order(
    case: tuple[cut.Layout, cut.Layout, tuple[int, ...], int],
) -> None:
    layout, asked, shape, grain = case
    taken = cut.takes(layout, shape, grain, size=1, rank=0, asked=asked)
    assert [take.piece for take in taken] == list(cut.pieces(layout, shape, grain))
    assert all(take.all_of_it for take in taken)


@given(cases(), st.data())
def test_the_ranks_of_a_view_take_each_index_once_or_share_whole_units(
    case: tuple[cut.Layout, tuple[int, ...], int], data: st.DataObject
) -> None:
    layout, shape, grain = case
    size = data.draw(st.sampled_from(divisors(grain)))
    assume(cut.allows(layout, size))
    assume(layout.dim is not None)
    assert layout.dim is not None
    counts = Counter(
        i for rank in range(size) for i in indices(cut.takes(layout, shape, grain, size=size, rank=rank))
    )
    base = 0
    for segment in layout.segments:
        copies = 1 if segment.uneven else size // min(size, segment.units)
        assert all(counts[i] == copies for i in range(base, base + segment.size))
        base += segment.size


@given(asked_otherwise(), st.data())
def test_whoever_asks_otherwise_gets_what_he_asks_for_in_order(
    case: tuple[cut.Layout, cut.Layout, tuple[int, ...], int], data: st.DataObject
) -> None:
    """By brute force: the indices of each segment, padded, chunked and clipped."""
    layout, asked, shape, grain = case
    assume(layout.dim is not None)
    assert layout.dim is not None
    size = data.draw(st.sampled_from(divisors(grain)))
    everything = list(range(shape[layout.dim]))
    for rank in range(size):
        taken = cut.takes(layout, shape, grain, size=size, rank=rank, asked=asked)
        expected, base = [], 0
        for segment in asked.segments:
            own = everything[base : base + segment.size]
            width = -(-(-(-segment.size // segment.multiple) * segment.multiple) // size)
            expected += own[rank * width : (rank + 1) * width]
            base += segment.size
        assert indices(taken) == (expected if asked.dim is not None else everything)
        assert all(0 <= t.start < t.stop <= t.piece.stop - t.piece.start for t in taken)


@given(st.integers(1, 300), st.integers(1, 3), GRAINS, st.data())
def test_uneven_units_at_the_grain_are_torch_chunks_and_one_piece_each(
    units: int, width: int, grain: int, data: st.DataObject
) -> None:
    layout = cut.Layout(0, (cut.Segment(units * width, units, uneven=True),))
    shape = (units * width,)
    chunks = torch.arange(units * width).view(units, width).chunk(grain)
    assert len(cut.pieces(layout, shape, grain)) == len(chunks)
    for rank in range(grain):
        taken = cut.takes(layout, shape, grain, size=grain, rank=rank)
        expected = chunks[rank].flatten().tolist() if rank < len(chunks) else []
        assert indices(taken) == expected
        assert len(taken) <= 1
        assert all(take.all_of_it for take in taken)


def test_a_coarser_chunk_may_begin_inside_a_piece() -> None:
    layout = cut.Layout(1, (cut.Segment(97, 97, uneven=True),))
    assert [p.stop for p in cut.pieces(layout, (4, 97), 8)] == [13, 26, 39, 52, 65, 78, 91, 97]
    taken = cut.takes(layout, (4, 97), 8, size=2, rank=1)
    assert [(t.piece.start, t.start, t.stop) for t in taken] == [(39, 10, 13), (52, 0, 13), (65, 0, 13),
                                                                (78, 0, 13), (91, 0, 6)]  # fmt: skip


def test_what_is_asked_for_along_another_dim_is_refused() -> None:
    heads = cut.Segment(8, 4)
    for stored, asked in [
        (cut.Layout(0, (heads,)), cut.Layout(1, (heads,))),
        (cut.WHOLE, cut.Layout(0, (heads,))),
        (cut.Layout(0, (heads,)), cut.Layout(0, (heads, heads))),
        (cut.Layout(1, (heads,)), cut.Layout(1, (heads,), experts=True)),
    ]:
        with pytest.raises(LayoutError, match="asked for"):
            cut.takes(stored, (8, 8), 4, size=2, rank=0, asked=asked)


def test_segments_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"segments of 8 along dim 1 do not fit \[8, 4\]"):
        cut.pieces(cut.Layout(1, (cut.Segment(8, 8),)), (8, 4), 2)


@given(cases(), st.data())
def test_a_view_needs_no_byte_that_is_not_its_own(
    case: tuple[cut.Layout, tuple[int, ...], int], data: st.DataObject
) -> None:
    """Units come as whole pieces, so every block that must be digested is kept; rows may begin inside a piece."""
    layout, shape, grain = case
    size = data.draw(st.sampled_from(divisors(grain)))
    assume(cut.allows(layout, size) and not uneven(layout))
    rank = data.draw(st.integers(0, size - 1))
    assert all(take.all_of_it for take in cut.takes(layout, shape, grain, size=size, rank=rank))


@given(cases(), st.data())
def test_views_compose(case: tuple[cut.Layout, tuple[int, ...], int], data: st.DataObject) -> None:
    """What a rank holds at a coarse size is what its ranks at a finer size hold, segment by segment."""
    layout, shape, grain = case
    fine = data.draw(st.sampled_from(divisors(grain)))
    coarse = data.draw(st.sampled_from(divisors(fine)))
    assume(cut.allows(layout, fine) and cut.allows(layout, coarse) and not uneven(layout))
    rank = data.draw(st.integers(0, coarse - 1))
    whole = cut.takes(layout, shape, grain, size=coarse, rank=rank)
    children = range(rank * fine // coarse, (rank + 1) * fine // coarse)
    parts = [take for child in children for take in cut.takes(layout, shape, grain, size=fine, rank=child)]
    assert sorted(set(parts), key=lambda take: take.piece.start) == list(whole)


@given(st.integers(0, 5000), st.integers(1, 64))
def test_chunks_are_torch_chunks(size: int, parts: int) -> None:
    width = -(-size // parts)
    found = [cut.chunk(size, parts, i) for i in range(parts)]
    assert [stop - start for start, stop in found] == [
        max(0, min(width, size - i * width)) for i in range(parts)
    ]


@given(st.integers(1, 200_000), st.sampled_from([1, 2, 4, 8]))
def test_padded_rows_are_cut_as_vllm_cuts_them(vocab: int, size: int) -> None:
    """vllm/model_executor/layers/vocab_parallel_embedding.py: pad to 64, divide, clip to the rows that exist."""
    padded = (vocab + 63) // 64 * 64
    assume(padded % size == 0)
    per = padded // size
    for rank in range(size):
        start, stop = cut.chunk(vocab, size, rank, multiple=64)
        assert (start, stop) == (min(rank * per, vocab), min((rank + 1) * per, vocab))


def test_query_heads_are_never_shared() -> None:
    heads, kv_heads = cut.Segment(32 * 64, 32), cut.Segment(4 * 64, 4, shared=True)
    assert cut.allows(cut.Layout(0, (kv_heads,)), 8)
    assert not cut.allows(cut.Layout(0, (heads,)), 64)
    with pytest.raises(
        LayoutError, match=r"32 units .* 64 tensor ranks; sizes that work: 1, 2, 4, 8, 16, 32"
    ):
        cut.pieces(cut.Layout(0, (heads,)), (2048, 8), 64)


def test_ranks_share_a_kv_head_only_when_heads_run_out() -> None:
    layout = cut.Layout(0, (cut.Segment(4 * 16, 4, shared=True),))
    assert [(p.first_rank, p.last_rank) for p in cut.pieces(layout, (64, 8), 2)] == [(0, 1), (1, 2)]
    assert [(p.first_rank, p.last_rank) for p in cut.pieces(layout, (64, 8), 8)] == [
        (0, 2),
        (2, 4),
        (4, 6),
        (6, 8),
    ]


def test_a_size_that_would_split_a_shared_unit_is_refused() -> None:
    layout = cut.Layout(0, (cut.Segment(4 * 16, 4, shared=True),))
    with pytest.raises(LayoutError, match=r"4 units cannot be shared by 3"):
        cut.takes(layout, (64, 8), 12, size=3, rank=0)


def test_a_size_that_does_not_divide_the_grain_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        LayoutError, match=r"grain 8 cannot be viewed at tensor parallel size 3; it serves 1, 2, 4, 8"
    ):
        cut.takes(cut.WHOLE, (4,), 8, size=3, rank=0)


@given(st.integers(1, 200), st.integers(1, 64))
def test_even_stages_cover_the_layers_and_differ_by_one_at_most(layers: int, size: int) -> None:
    assume(size <= layers)
    stages = even_stages(layers, size)
    assert check_stages(stages, layers) == stages
    lengths = {stop - start for start, stop in stages}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("layers", "size", "expected"),
    [(7, 3, [2, 3, 2]), (8, 3, [3, 3, 2]), (10, 4, [2, 3, 3, 2]), (4, 4, [1, 1, 1, 1])],
)
def test_a_remainder_goes_to_the_stages_before_the_last(layers: int, size: int, expected: list[int]) -> None:
    assert [stop - start for start, stop in even_stages(layers, size)] == expected


@given(st.integers(1, 16), st.integers(1, 16))
def test_ranks_count_through_a_stage_first(tp: int, pp: int) -> None:
    grid = Grid(tp, pp)
    places = [grid.place(rank) for rank in range(grid.world_size)]
    assert places == [(stage, rank) for stage in range(pp) for rank in range(tp)]
    with pytest.raises(LayoutError, match=f"ranks go from 0 to {grid.world_size - 1}"):
        grid.place(grid.world_size)


@given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), min_size=1, max_size=4))
def test_sizes_that_work_are_just_those(units: list[tuple[int, bool]]) -> None:
    layouts = [cut.Layout(0, (cut.Segment(n * 2, n, shared),)) for n, shared in units]
    sizes = cut.sizes_that_work(layouts)
    assert 1 in sizes
    strict = [n for n, shared in units if not shared]
    if strict:
        assert all(gcd(*strict, size) == size for size in sizes)


# --------------------------------------------------------------------------------------------- experts and stages


@given(st.integers(1, 300), st.integers(1, 64))
def test_experts_are_shared_as_vllm_shares_them(experts: int, size: int) -> None:
    """vllm/model_executor/layers/fused_moe/layer.py, determine_expert_map: the remainder to the first ranks."""
    assume(size <= experts)
    runs = [experts_of(experts, size, rank) for rank in range(size)]
    assert [start for start, _ in runs[:1]] == [0]
    assert all(a[1] == b[0] for a, b in pairwise(runs))
    assert [stop - start for start, stop in runs] == [
        experts // size + (rank < experts % size) for rank in range(size)
    ]
    assert runs[-1][1] == experts


def test_more_expert_ranks_than_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match="expert_parallel_size 8: the model has 4 experts; use at most 4"):
        experts_of(4, 8, 0)


def test_an_expert_group_is_a_run_of_tensor_ranks() -> None:
    grid = Grid(8, 2, 2)
    assert grid.world_size == 16
    assert [grid.place_in_group(rank) for rank in range(8)] == [(ep, r) for ep in range(2) for r in range(4)]
    with pytest.raises(
        LayoutError, match=r"expert_parallel_size 3 does not divide tensor_parallel_size 8.*: 1, 2, 4, 8"
    ):
        Grid(8, 1, 3)


@given(st.sets(st.integers(0, 80), min_size=1), st.integers(1, 30), st.data())
def test_advised_stages_hold_a_needed_layer_each(needed: set[int], more: int, data: st.DataObject) -> None:
    needs = sorted(needed)
    layers = needs[-1] + more
    size = data.draw(st.integers(1, len(needs)))
    stages = check_stages(stages_with(needs, layers, size), layers)
    assert len(stages) == size
    check_stage_needs(stages, needs, engine="torch")


def test_a_stage_without_a_needed_layer_is_refused_with_stages_that_work() -> None:
    with pytest.raises(LayoutError) as caught:
        check_stage_needs(((0, 2), (2, 8)), (3, 7), engine="transformers")
    words = str(caught.value)
    assert "transformers needs one of the layers 3, 7 in every pipeline stage, and 0-1 has none" in words
    assert "use at most 2 stages, for example --stages 0-3,4-7" in words
