"""Prove that views hold the right bytes of every tensor, and that the ranks of a grid together hold all bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from shardprep_runtime.format.view import TensorView
from shardprep_runtime.shard.shard_set import open_set

from .blocks import Block, Views, blocks_of, same_bits
from .report import Differs, Proof, Workers
from .small import SmallModel

READ: Final = 1.02
"""Bytes that a rank may read for each byte that it keeps."""


def prove_views(small: SmallModel) -> Iterator[Proof]:
    """Make one proof for each engine, over all its grids."""
    proved: set[tuple[Any, ...]] = set()
    for engine in small.engines:
        grids = 0
        for workers in _grids(small, engine):
            ranks = small.plan(workers)
            _cover(small, ranks, workers)
            for rank, views in enumerate(ranks):
                _check_reads(views, rank, workers)
                new = {_key(view) for view in views.values()} - proved
                if new:
                    _check_bytes(small, {name for name, *_ in new}, views, rank, workers)
                    proved |= new
            grids += 1
        largest = Workers(small.grain, small.pp, small.expert_sizes(small.grain)[-1])
        yield Proof(
            "views",
            f"{engine}: {grids} grids up to {largest}: every byte of every tensor is held, and is the original's",
        )


def _grids(small: SmallModel, engine: str) -> Iterator[Workers]:
    """Yield all grids that an engine can run."""
    for size in small.sizes():
        for ep in small.expert_sizes(size):
            for pp in range(1, small.pp + 1):
                if small.refusal(engine, pp) is None:
                    yield Workers(size, pp, ep, engine)


def _cover(small: SmallModel, ranks: Sequence[Views], workers: Workers) -> None:
    """Check that the ranks hold every tensor, every expert, and every index along the dim that is cut."""
    import torch

    for name, full in small.tensors.items():
        seen = None
        for views in ranks:
            if name not in views:
                continue
            seen = torch.zeros(_cut_shape(views[name]), dtype=torch.bool) if seen is None else seen
            for block, _ in blocks_of(views[name]):
                seen[
                    tuple(
                        each if size > 1 else slice(None)
                        for each, size in zip(block, seen.shape, strict=True)
                    )
                ] = True
        if seen is None:
            raise Differs(
                "views", name, None, workers, expected="some rank to hold it", found="that none does"
            )
        if not seen.all():
            missing = torch.nonzero(~seen)[0].tolist()
            dim, index = next((dim, index) for dim, index in enumerate(missing) if seen.shape[dim] > 1)
            raise Differs(
                "views",
                name,
                None,
                workers,
                expected=f"each of the {full.shape[dim]} indices of dim {dim} on some rank",
                found=f"index {index} on none",
            )
    extra = {name for views in ranks for name in views} - small.tensors.keys()
    if extra:
        raise Differs("views", min(extra), None, workers, expected="no such tensor", found="a view of it")


def _check_reads(views: Views, rank: int, workers: Workers) -> None:
    """Check that a rank reads at most `READ` bytes for each byte that it keeps of evenly cut tensors."""
    even = [
        view
        for view in views.values()
        if not view.form.engines and not any(segment.uneven for segment in view.form.layout.segments)
    ]
    read = sum(each.width * each.count for view in even for each in view.stripes)
    kept = sum(view.nbytes for view in even)
    if read > kept * READ:
        most = f"at most {READ} x {kept} bytes"
        raise Differs("views", "what is read", rank, workers, expected=most, found=f"{read} bytes")


def _check_bytes(small: SmallModel, names: set[str], views: Views, rank: int, workers: Workers) -> None:
    """Check that a rank loads the very blocks of the original that its view names."""
    with open_set(small.shard_set).load(workers.place_of(rank)) as shard:
        for name in names:
            tensor = shard[name]
            held = 0
            for block, local in blocks_of(views[name]):
                held += tensor[local].numel()
                if not same_bits(small.tensors[name][block], tensor[local]):
                    original = f"the original's {_show(block)}"
                    raise Differs("views", name, rank, workers, expected=original, found="other bytes")
            if held != tensor.numel():
                blocks = " + ".join(_show(block) for block, _ in blocks_of(views[name]))
                found = f"a tensor of shape {list(tensor.shape)}"
                raise Differs("views", name, rank, workers, expected=blocks, found=found)


def _key(view: TensorView) -> tuple[Any, ...]:
    """A key that is the same for views of the same block of the same tensor."""
    return view.name, view.takes, view.experts


def _cut_shape(view: TensorView) -> tuple[int, ...]:
    """The shape of a tensor, with 1 for dims along which every rank holds all of it."""
    return tuple(
        size if dim == view.form.layout.dim or (dim == 0 and view.form.layout.experts) else 1
        for dim, size in enumerate(view.form.shape)
    )


def _show(block: Block) -> str:
    return "[" + ", ".join(f"{each.start}:{each.stop}" for each in block) + "]"
