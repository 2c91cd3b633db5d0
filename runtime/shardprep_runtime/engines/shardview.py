"""Let an engine's own loader read a shard as if it were the checkpoint: tensors of full shape that hold only the shard.

A loader that asks for its rank's block gets it, and does not notice that nothing else is there. A loader that asks for
anything outside gets an error. Wrong weights never load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import LayoutError, quote
from ..format.manifest import Form
from ..format.view import TensorView

if TYPE_CHECKING:
    import torch

    from ..shard.shard import Shard


@dataclass(frozen=True, slots=True)
class Run:
    """Indices [start, stop) of a dim of the full tensor, which lie at index `at` of the rank's own block."""

    start: int
    stop: int
    at: int


def runs_of(view: TensorView) -> tuple[Run, ...]:
    """List what a rank holds along the dim that is cut, with neighbouring runs joined; empty for a whole tensor."""
    found: list[Run] = []
    at = 0
    if view.form.layout.dim is None:
        return ()
    for take in view.takes:
        start, stop = take.piece.start + take.start, take.piece.start + take.stop
        if found and found[-1].stop == start:
            found[-1] = Run(found[-1].start, stop, found[-1].at)
        else:
            found.append(Run(start, stop, at))
        at += stop - start
    return tuple(found)


class ShardSlice:
    """A tensor of the checkpoint of which a rank holds a block, with the methods of safetensors' slices.

    `[...]` reads what is asked for, and raises LayoutError for an index outside the block.
    """

    __slots__ = ("_experts", "_form", "_name", "_read", "_runs")

    def __init__(
        self, name: str, form: Form, view: TensorView | None, read: Callable[[], torch.Tensor] | None
    ) -> None:
        """`view` describes the rank's block and `read` gives it; both are None where the rank holds nothing."""
        self._name = name
        self._form = form
        self._runs = runs_of(view) if view is not None else ()
        self._experts = view.experts if view is not None else None
        self._read = read

    def get_shape(self) -> list[int]:
        """The shape of the full tensor."""
        return list(self._form.shape)

    def get_dtype(self) -> str:
        """The dtype as safetensors names it."""
        return self._form.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._read is None:
            raise LayoutError(
                f"{quote(self._name)}: it was asked for, but nothing of it belongs to this rank "
                "(it is another stage's or another expert's)"
            )
        local: list[slice | int] = []
        for dim, (start, stop, single) in enumerate(self._bounds(index)):
            low = self._local(dim, start, stop)
            local.append(low if single else slice(low, low + stop - start))
        return self._read()[tuple(local)]

    def _bounds(self, index: Any) -> Iterator[tuple[int, int, bool]]:
        """Yield, for each dim, the indices [start, stop) asked for, and whether a single number asked, which drops the dim."""
        shape = self._form.shape
        given = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in given:
            at = given.index(Ellipsis)
            given[at : at + 1] = [slice(None)] * (len(shape) - len(given) + 1)
        given += [slice(None)] * (len(shape) - len(given))
        if len(given) != len(shape):
            raise LayoutError(f"{quote(self._name)}: {len(given)} indices for its {len(shape)} dims")
        for each, size in zip(given, shape, strict=True):
            if isinstance(each, slice):
                start, stop, step = each.indices(size)
                if step != 1:
                    raise LayoutError(f"{quote(self._name)}: a step of {step} was asked for; only 1 is known")
                yield start, max(start, stop), False
            else:
                at = int(each) + (size if each < 0 else 0)
                if not 0 <= at < size:
                    raise LayoutError(f"{quote(self._name)}: index {each} of a dim of {size}")
                yield at, at + 1, True

    def _local(self, dim: int, start: int, stop: int) -> int:
        """The index at which [start, stop) of `dim` begins in the rank's block. Raise LayoutError where it is not all held."""
        if start == stop:
            return 0
        if dim == self._form.layout.dim:
            held = self._runs
        elif dim == 0 and self._experts is not None:
            held = (Run(*self._experts, 0),)
        else:
            return start
        for run in held:
            if run.start <= start and stop <= run.stop:
                return run.at + start - run.start
        own = ", ".join(f"[{run.start}, {run.stop})" for run in held) or "nothing"
        raise LayoutError(
            f"{quote(self._name)}: [{start}, {stop}) of dim {dim} of {list(self._form.shape)} was asked for, this rank "
            f"holds {own}; the engine cuts it otherwise than the view: load it with `engine=` as that engine asks"
        )


class _Reader(threading.local):
    """Reads tensors for several slices of each, and keeps only the last tensor of each thread.

    So a loader that copies tensors to a device needs no second copy of the shard in memory.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.name = ""
        self.tensor: torch.Tensor | None = None

    def __call__(self, name: str) -> torch.Tensor:
        if self.name != name or self.tensor is None:
            self.tensor = None  # free it before the next is read
            self.name, self.tensor = name, self.shard.read(name)
        return self.tensor


def shard_slices(shard: Shard) -> Mapping[str, ShardSlice]:
    """Give every tensor of the checkpoint by name. One that the shard does not hold raises LayoutError when it is read.

    slices = shard_slices(shard)
    rows = slices["lm_head.weight"][0:8]
    """
    found, read = {}, _Reader(shard)
    for name, entry in shard.manifest.tensors.items():
        if name in shard.view.tensors:
            found[name] = ShardSlice(name, entry.form, shard.view.tensors[name], partial(read, name))
        else:
            found[name] = ShardSlice(name, entry.form, None, None)
    return found
