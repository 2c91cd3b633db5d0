"""A ShardTensor is the full tensor wherever all of a view is there, and an error everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazily import torch
from shardprep_runtime.engines.shardtensor import AwaitedTensor, ShardTensor, shard_tensor
from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format.cut import Layout, Segment, takes
from shardprep_runtime.format.manifest import Form
from shardprep_runtime.format.view import TensorView

View = Callable[[torch.Tensor], torch.Tensor]


def held(full: torch.Tensor, layout: Layout, *, size: int, rank: int, experts: Any = None) -> torch.Tensor:
    """What a rank of `size` gives of `full`."""
    taken = takes(layout, tuple(full.shape), size, size=size, rank=rank)
    local = full if experts is None else full[slice(*experts)]
    if layout.dim is not None:
        ranges = [(each.piece.start + each.start, each.piece.start + each.stop) for each in taken]
        local = torch.cat([local.narrow(layout.dim, a, b - a) for a, b in ranges], layout.dim)
    view = TensorView("w", Form("I64", tuple(full.shape), layout), 0, tuple(local.shape), taken, (), experts)
    return shard_tensor("w", view, local)


def there(shard: torch.Tensor) -> torch.Tensor:
    """Of each element of the full tensor, whether the shard has it."""
    assert isinstance(shard, ShardTensor)
    mask = torch.zeros(shard.shape, dtype=torch.bool)
    for block in product(*shard.held):
        mask[tuple(slice(*span) for span in block)] = True
    return mask


def same(found: torch.Tensor, full: torch.Tensor, mask: torch.Tensor) -> None:
    """`found` is `full` if all of it is there, and otherwise knows exactly what is, and has it."""
    assert found.shape == full.shape == mask.shape
    assert found.dtype == full.dtype
    if mask.all():
        assert not isinstance(found, ShardTensor)
        assert torch.equal(found, full)
        return
    assert isinstance(found, ShardTensor)
    assert found.stride() == full.stride()
    own = torch.zeros_like(mask)
    for block in product(*found.held):
        own[tuple(slice(*span) for span in block)] = True
    assert torch.equal(own, mask)
    assert torch.equal(found.local.reshape(-1), full[mask])
    with pytest.raises(LayoutError):
        torch.empty(found.shape, dtype=found.dtype).copy_(found)


def is_block(mask: torch.Tensor) -> bool:
    """Whether the True elements are all those of some indices of each dim."""
    along = [mask if mask.dim() == 1 else mask.movedim(dim, 0).flatten(1).any(1) for dim in range(mask.dim())]
    return int(mask.sum()) == prod(int(each.sum()) for each in along)


@st.composite
def steps(draw: st.DrawFn, shape: Sequence[int], count: int = 4) -> list[tuple[str, View]]:
    """A chain of views that is legal for a tensor of this shape, each with its words for a failure."""
    tensor = torch.empty(tuple(shape), device="meta")
    found: list[tuple[str, View]] = []
    for _ in range(draw(st.integers(1, count))):
        dims = tensor.dim()
        if not dims or not tensor.numel():
            break
        kind = draw(st.sampled_from(
            ["narrow", "select", "transpose", "unsqueeze", "squeeze", "split", "merge", "cut", "clone", "run", "expand"]
        ))  # fmt: skip
        dim = draw(st.integers(0, dims - 1))
        size = tensor.shape[dim]
        step: View
        if kind == "narrow":
            start = draw(st.integers(0, size - 1))
            length = draw(st.integers(1, size - start))
            words, step = (
                f"narrow {dim} {start} {length}",
                lambda t, d=dim, s=start, n=length: t.narrow(d, s, n),
            )
        elif kind == "select":
            index = draw(st.integers(-size, size - 1))
            words, step = f"select {dim} {index}", lambda t, d=dim, i=index: t.select(d, i)
        elif kind == "transpose":
            other = draw(st.integers(0, dims - 1))
            words, step = f"transpose {dim} {other}", lambda t, a=dim, b=other: t.transpose(a, b)
        elif kind == "unsqueeze":
            words, step = f"unsqueeze {dim}", lambda t, d=dim: t.unsqueeze(d)
        elif kind == "squeeze":
            words, step = "squeeze", lambda t: t.squeeze()
        elif kind == "split":
            pieces = draw(st.integers(1, size))
            which = draw(st.integers(0, len(tensor.chunk(pieces, dim)) - 1))
            words, step = (
                f"chunk {pieces} {dim} [{which}]",
                lambda t, n=pieces, d=dim, i=which: t.chunk(n, d)[i],
            )
        elif kind == "merge" and dims > 1:
            first = draw(st.integers(0, dims - 2))
            words, step = f"flatten {first}", lambda t, d=first: t.flatten(d, d + 1)
        elif kind == "cut":
            outer = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            words = f"unflatten {dim} {outer}"

            def step(t: torch.Tensor, d: int = dim, n: int = outer) -> torch.Tensor:
                return t.reshape(*t.shape[:d], n, t.shape[d] // n, *t.shape[d + 1 :])
        elif kind == "run":
            start = draw(st.integers(0, size - 1))
            picked = torch.arange(start, draw(st.integers(start + 1, size)))
            words, step = f"[{start}:] by a list", lambda t, p=picked: t[p]
            if dim:
                continue
        elif kind == "expand":
            words, step = "expand", lambda t: t.unsqueeze(0).expand(2, *t.shape)
        else:
            words, step = "clone", lambda t: t.contiguous().clone()
        if kind == "run":
            tensor = torch.empty(step(torch.empty(tensor.shape)).shape, device="meta")
        else:
            tensor = step(tensor)
        found.append((words, step))
    return found


@settings(deadline=None)
@given(st.data())
def test_views_of_a_shard_are_the_shard_of_the_views(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([2, 3, 4]), "size")
    segments = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3), "segments")
    total = sum(segments) * size
    shape = [
        *data.draw(st.sampled_from([[], [2], [3, 2]]), "before"),
        total,
        *data.draw(st.sampled_from([[], [2], [2, 3]]), "after"),
    ]
    dim = shape.index(total) if shape.count(total) == 1 else len(shape) - 1
    if shape[dim] != total:
        return
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    layout = Layout(dim, tuple(Segment(each * size, size) for each in segments))
    shard = held(full, layout, size=size, rank=data.draw(st.integers(0, size - 1), "rank"))
    mask = there(shard)
    for words, step in data.draw(steps(shape), "views"):
        full, mask = step(full), step(mask)
        try:
            shard = step(shard)
        except LayoutError as error:
            # it gives up where what is there cannot be said dim by dim, and where a single number is missing
            assert not mask.any() or not is_block(mask), f"{words}: {error}"
            return
        same(shard, full, mask)
        if not isinstance(shard, ShardTensor):
            return


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 4))
def test_experts_are_held_in_runs(first: int, count: int) -> None:
    full = torch.arange(4 * 6 * 2).view(4, 6, 2)
    stop = min(4, first + count)
    layout = Layout(1, (Segment(6, 2),), experts=True)
    shard = held(full, layout, size=2, rank=1, experts=(first, stop))
    for expert in range(4):
        wanted = shard[expert][3:6] if (first, stop) != (0, 4) else shard[expert].narrow(0, 3, 3)
        if first <= expert < stop:
            assert torch.equal(wanted, full[expert][3:6])
        else:
            with pytest.raises(LayoutError):
                torch.empty(3, 2, dtype=torch.int64).copy_(wanted)


ROWS = torch.arange(6 * 4).view(6, 4)


def shard_of_rows() -> ShardTensor:
    found = held(ROWS, Layout(0, (Segment(6, 3),)), size=3, rank=1)
    assert isinstance(found, ShardTensor)
    return found


def test_what_the_rank_holds_comes_out_plain_and_is_not_copied() -> None:
    shard = shard_of_rows()
    found = shard.t()[1:3].t().narrow(0, 2, 2)
    assert type(found) is torch.Tensor
    assert torch.equal(found, ROWS[2:4, 1:3])
    assert found.untyped_storage().data_ptr() == shard.local.untyped_storage().data_ptr()


def test_casts_and_functions_of_single_elements_stay_shards() -> None:
    shard = shard_of_rows()
    assert torch.equal((-shard.to(torch.float64).exp())[2:4], -ROWS[2:4].to(torch.float64).exp())
    assert shard.to(torch.float32).dtype == torch.float32
    assert torch.equal((shard * 2)[2:4], ROWS[2:4] * 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.empty(6, 4, dtype=torch.int64).copy_(w),
        lambda w: torch.cat([w, w]),
        lambda w: w + w,
        lambda w: w.sum(),
        lambda w: w @ w.t(),
        lambda w: w.mul_(2),
        lambda w: w[::2],
        lambda w: w[torch.tensor([0, 3])],
        lambda w: w[0, 0].item(),
        lambda w: w.tolist(),
        lambda w: w.flip(0),
        lambda w: w[1:3].clone().numpy(),
        lambda w: torch.empty(2, 4, dtype=torch.int64).copy_(w[1:3]),
    ],
)
def test_whatever_needs_more_than_the_rank_holds_raises(use: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((LayoutError, RuntimeError)) as refused:
        use(shard_of_rows())
    if isinstance(refused.value, LayoutError):
        assert "of which this rank has [2:4, 0:4]" in str(refused.value)


def test_a_tensor_that_is_held_whole_is_plain() -> None:
    assert type(held(ROWS, Layout(None, ()), size=3, rank=1)) is torch.Tensor


def test_what_is_awaited_comes_when_it_is_touched_and_not_before() -> None:
    brought = []

    def bring() -> torch.Tensor:
        brought.append(1)
        return shard_of_rows()

    awaited = AwaitedTensor(ROWS.shape, ROWS.dtype, bring)
    assert awaited.shape == ROWS.shape and awaited.dtype == ROWS.dtype and awaited.dim() == 2
    assert not brought
    assert torch.equal(torch.empty(2, 4, dtype=torch.int64).copy_(awaited.narrow(0, 2, 2)), ROWS[2:4])
    assert brought
    with pytest.raises(LayoutError, match=r"of which this rank has \[2:4, 0:4\]"):
        torch.empty(6, 4, dtype=torch.int64).copy_(awaited)
