"""A slice of a shard is the checkpoint's where the rank holds it, and an error everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import shardprep_runtime
from lazily import torch
from shardprep.split import split
from shardprep_runtime.engines.shardview import ShardSlice, runs_of, shard_slices
from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format.cut import WHOLE, Layout, Segment, takes
from shardprep_runtime.format.manifest import Form
from shardprep_runtime.format.view import TensorView
from small_models import phi3_config, write_model


def sliced(
    full: torch.Tensor, layout: Layout, *, size: int, rank: int, experts: tuple[int, int] | None = None
) -> ShardSlice:
    """What a rank of `size` has of `full`."""
    form = Form("I64", tuple(full.shape), layout)
    taken = takes(layout, form.shape, size, size=size, rank=rank)
    local = full if experts is None else full[slice(*experts)]
    if layout.dim is not None:
        ranges = [(each.piece.start + each.start, each.piece.start + each.stop) for each in taken]
        dim = layout.dim
        local = torch.cat([local.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    view = TensorView("w", form, 0, tuple(local.shape), taken, (), experts)
    return ShardSlice("w", form, view, lambda: local)


FULL = torch.arange(6 * 8).view(6, 8)
ROWS = Layout(0, (Segment(6, 3),))
FUSED = Layout(1, (Segment(4, 2), Segment(4, 2)))


def test_a_slice_has_the_shape_and_dtype_of_the_full_tensor() -> None:
    found = sliced(FULL, ROWS, size=3, rank=1)
    assert found.get_shape() == [6, 8]
    assert found.get_dtype() == "I64"


def test_what_the_rank_holds_is_given_by_its_place_in_the_full_tensor() -> None:
    found = sliced(FULL, ROWS, size=3, rank=1)
    assert torch.equal(found[2:4], FULL[2:4])
    assert torch.equal(found[3:4, 2:5], FULL[3:4, 2:5])
    assert torch.equal(found[-4:-2, ...], FULL[2:4])
    assert torch.equal(found[3], FULL[3])
    assert torch.equal(found[2:4, -1], FULL[2:4, -1])


@pytest.mark.parametrize("index", [..., slice(None), slice(0, 2), slice(3, 5), slice(1, 4), 0, 5, -1])
def test_what_it_does_not_hold_raises(index: object) -> None:
    found = sliced(FULL, ROWS, size=3, rank=1)
    with pytest.raises(LayoutError, match=r"of dim 0 of \[6, 8\] was asked for, this rank holds \[2, 4\)"):
        found[index]


def test_each_block_of_a_fused_tensor_is_given_and_none_that_spans_two() -> None:
    found = sliced(FULL, FUSED, size=2, rank=1)
    assert torch.equal(found[:, 2:4], FULL[:, 2:4])
    assert torch.equal(found[0:3, 6:8], FULL[0:3, 6:8])
    with pytest.raises(LayoutError, match=r"\[2, 8\) of dim 1 .* holds \[2, 4\), \[6, 8\)"):
        found[:, 2:8]


def test_blocks_that_touch_are_one() -> None:
    found = sliced(FULL, Layout(1, (Segment(4, 1, shared=True), Segment(4, 2))), size=2, rank=0)
    assert torch.equal(found[:, 0:6], FULL[:, 0:6])


def test_a_whole_tensor_is_given_as_it_is() -> None:
    found = sliced(FULL, WHOLE, size=2, rank=1)
    assert torch.equal(found[...], FULL)
    assert torch.equal(found[1:5, 3], FULL[1:5, 3])


def test_experts_are_rows_of_which_a_rank_has_some() -> None:
    full = torch.arange(4 * 6 * 2).view(4, 6, 2)
    found = sliced(full, Layout(1, (Segment(6, 3),), experts=True), size=3, rank=2, experts=(2, 4))
    assert torch.equal(found[2:4, 4:6], full[2:4, 4:6])
    assert torch.equal(found[3, 4:6, 0:1], full[3, 4:6, 0:1])
    with pytest.raises(LayoutError, match=r"\[0, 4\) of dim 0 .* holds \[2, 4\)"):
        found[:, 4:6]
    with pytest.raises(LayoutError, match=r"\[0, 6\) of dim 1"):
        found[2:4]


def test_nothing_of_it_is_nothing_wherever_it_is_asked_for() -> None:
    assert sliced(FULL, ROWS, size=3, rank=1)[0:0].shape == (0, 8)


def test_a_rank_beyond_the_last_row_holds_nothing() -> None:
    found = sliced(FULL[:2], Layout(0, (Segment(2, 2, uneven=True),)), size=4, rank=1)
    assert torch.equal(found[1:2], FULL[1:2])
    uneven = Layout(0, (Segment(3, 3, uneven=True),))
    form = Form("I64", (3,), uneven)
    view = TensorView("w", form, 0, (0,), takes(uneven, (3,), 4, size=4, rank=3), ())
    assert runs_of(view) == ()
    with pytest.raises(LayoutError, match="holds nothing"):
        ShardSlice("w", form, view, lambda: torch.empty(0))[0:1]


def test_what_is_no_plain_block_is_refused() -> None:
    found = sliced(FULL, WHOLE, size=1, rank=0)
    with pytest.raises(LayoutError, match="a step of 2 was asked for"):
        found[::2]
    with pytest.raises(LayoutError, match="3 indices for its 2 dims"):
        found[0:1, 0:1, 0:1]
    with pytest.raises(LayoutError, match="index 6 of a dim of 6"):
        found[6]


@given(st.data())
def test_a_slice_is_the_full_tensors_or_an_error_never_anything_else(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 4]))
    rank = data.draw(st.integers(0, size - 1))
    units = data.draw(st.lists(st.integers(1, 3).map(lambda n: n * size), min_size=1, max_size=3))
    widths = data.draw(st.lists(st.integers(1, 3), min_size=len(units), max_size=len(units)))
    layout = Layout(0, tuple(Segment(n * width, n) for n, width in zip(units, widths, strict=True)))
    total = sum(segment.size for segment in layout.segments)
    full = torch.arange(total * 2).view(total, 2)
    found = sliced(full, layout, size=size, rank=rank)
    held = {
        index
        for take in takes(layout, (total, 2), size, size=size, rank=rank)
        for index in range(take.piece.start + take.start, take.piece.start + take.stop)
    }
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    if set(range(start, stop)) <= held:
        assert torch.equal(found[start:stop], full[start:stop])
    else:
        with pytest.raises(LayoutError):
            found[start:stop]


# ------------------------------------------------------------------------------------------------------ of a shard


def test_the_slices_of_a_shard_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_model(tmp_path / "in", phi3_config(), kind="safetensors")
    split(tmp_path / "in", tmp_path / "shards", tensor_parallel_size=2)
    given = 0
    with safe_open(tmp_path / "in" / "model.safetensors", "pt") as original:
        for rank in range(2):
            with shardprep_runtime.load(tmp_path / "shards", rank=rank, tensor_parallel_size=2) as shard:
                found = shard_slices(shard)
                assert found.keys() == set(original.keys())
                for name, view in shard.view.tensors.items():
                    theirs = original.get_slice(name)
                    assert found[name].get_shape() == theirs.get_shape()
                    assert found[name].get_dtype() == theirs.get_dtype()
                    for run in runs_of(view):
                        index = (slice(None),) * (view.form.layout.dim or 0) + (slice(run.start, run.stop),)
                        assert torch.equal(found[name][index], theirs[index])
                        given += 1
    assert given > 40


def test_a_tensor_of_another_stage_is_there_and_raises_when_it_is_read(tmp_path: Path) -> None:
    write_model(tmp_path / "in", kind="safetensors")
    split(tmp_path / "in", tmp_path / "shards", tensor_parallel_size=1)
    with shardprep_runtime.load(tmp_path / "shards", rank=1, pipeline_parallel_size=2) as shard:
        found = shard_slices(shard)
        assert found["model.embed_tokens.weight"].get_shape() == [50, 32]
        with pytest.raises(LayoutError, match="nothing of it belongs to this rank"):
            found["model.embed_tokens.weight"][...]
        assert found["lm_head.weight"][...].shape == (50, 32)
