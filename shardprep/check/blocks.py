"""Say which blocks of the full tensors a rank holds, and whether two tensors have the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from shardprep_runtime.engines.shardview import runs_of
from shardprep_runtime.format.view import TensorView

if TYPE_CHECKING:
    import torch

Views = Mapping[str, TensorView]
"""Tensor name -> what one rank holds of it."""

Block = tuple[slice, ...]


def blocks_of(view: TensorView) -> Iterator[tuple[Block, Block]]:
    """Yield each block of the full tensor that a rank holds, and the place of the block in the rank's own tensor."""
    dim = view.form.layout.dim
    full = [slice(0, size) for size in view.form.shape]
    local = [slice(0, size) for size in view.shape]
    if view.experts is not None:
        full[0] = slice(*view.experts)
    if dim is None:
        yield tuple(full), tuple(local)
        return
    for run in runs_of(view):
        full[dim] = slice(run.start, run.stop)
        local[dim] = slice(run.at, run.at + run.stop - run.start)
        yield tuple(full), tuple(local)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )
