"""Hand an engine's own loader tensors of the checkpoint's full shape that hold only this rank's block.

A loader narrows, transposes and views a full tensor until it has its rank's block, and copies that. Views of a
ShardTensor move its window in the same way. A view in which nothing is missing is a plain tensor, without a copy. A
loader that reads outside the block gets an error. This module imports torch, so it is imported when tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from math import prod
from typing import Any, Final

import torch
from torch.utils._pytree import tree_map_only

from ..errors import LayoutError, quote
from ..format.dtypes import TORCH
from ..format.manifest import Form
from ..format.view import TensorView
from ..shard.shard import Shard
from .shardview import runs_of

aten = torch.ops.aten

Span = tuple[int, int]
"""Indices [start, stop) of a dim."""

Spans = tuple[Span, ...]
"""The held indices of a dim: ascending spans, none empty, none touching the next. In `local` they lie side by side."""

MAX_SPANS: Final = 2**16
"""Spans that a dim may have: a view that would need more is refused rather than computed."""


class ShardTensor(torch.Tensor):
    """A tensor of full shape that holds only `local`: along each dim the indices in `held`, side by side.

    It has no storage of its own. Views, copies (casts and moves to a device too) and functions of single elements give
    ShardTensors, or plain tensors where nothing is missing in the result. Every other operation raises LayoutError.
    """

    local: torch.Tensor
    held: tuple[Spans, ...]
    twin: torch.Tensor
    origin: str

    # composite functions then reach __torch_dispatch__ as the basic operations that they are made of
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, local: torch.Tensor, held: Sequence[Spans], twin: torch.Tensor, origin: str
    ) -> ShardTensor:
        """`twin` is a tensor of the full shape and strides on the meta device; `origin` names the tensor in messages."""
        made: ShardTensor = torch.Tensor._make_wrapper_subclass(
            cls, twin.shape, strides=twin.stride(), storage_offset=twin.storage_offset(), dtype=local.dtype,
            device=local.device, requires_grad=False,
        )  # fmt: skip
        made.local, made.held, made.twin, made.origin = local, tuple(held), twin, origin
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardTensor({self.origin}: {list(self.shape)} of which it has {_show(self.held)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        source = args[0] if args else None
        if isinstance(source, ShardTensor) and not function._schema.is_mutable:
            known = VIEWS.get(function)
            if known is not None:
                return known(source, *args[1:], **kwargs)
            others = (*args[1:], *kwargs.values())
            alone = not any(isinstance(each, (torch.Tensor, list, tuple)) for each in others)
            if function in COPIES or (alone and torch.Tag.pointwise in function.tags):
                named = {
                    key: value
                    for key, value in kwargs.items()
                    if key not in ("device", "pin_memory", "layout")
                }
                twin = function(source.twin, *args[1:], **named)
                return _wrap(source, function(source.local, *args[1:], **kwargs), source.held, twin)
        asked = next(
            (each for each in (*args, *kwargs.values()) if isinstance(each, ShardTensor)),
            next((each for given in args if isinstance(given, (list, tuple)) for each in given
                  if isinstance(each, ShardTensor)), None),
        )  # fmt: skip
        raise LayoutError(_refusal(asked, str(function)))


class AwaitedTensor(torch.Tensor):
    """A tensor that is loaded when it is first touched: `bring` then gives the tensor that stands in for it."""

    bring: Callable[[], torch.Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, bring: Callable[[], torch.Tensor]
    ) -> AwaitedTensor:
        made: AwaitedTensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        made.bring = bring
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AwaitedTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, named = tree_map_only(
            AwaitedTensor, lambda each: each.bring(), (tuple(args), dict(kwargs or {}))
        )
        return function(*args, **named)


def shard_tensor(name: str, view: TensorView, local: torch.Tensor) -> torch.Tensor:
    """Make the full tensor of which a rank holds a block.

    Args:
        name: The tensor's name in the checkpoint.
        view: What the rank holds of it: `local`.

    Raises:
        LayoutError: Where the rank's blocks do not lie in the order of the tensor.
    """
    form: Form = view.form
    shape = form.shape
    if form.dtype == "F4":  # torch counts pairs
        if form.layout.dim == len(shape) - 1:
            raise LayoutError(f"{quote(name)}: pairs of F4 numbers are cut; load it without a view")
        shape = (*shape[:-1], shape[-1] // 2)
    if tuple(local.shape) == shape:
        return local
    held: list[Spans] = [((0, size),) if size else () for size in shape]
    if form.layout.dim is not None:
        runs = runs_of(view)
        if any(run.at != at for run, at in zip(runs, _places((r.start, r.stop) for r in runs), strict=True)):
            raise LayoutError(f"{quote(name)}: this rank's blocks of it do not lie in their order")
        held[form.layout.dim] = tuple((run.start, run.stop) for run in runs)
    if view.experts is not None:
        held[0] = (view.experts,)
    twin = torch.empty(shape, dtype=local.dtype, device="meta")
    return ShardTensor(
        local, held, twin, f"{quote(name)} {list(shape)}, of which this rank has {_show(held)}"
    )


def shard_tensors(
    shard: Shard, more: Callable[[str], Shard] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for all that a shard holds, under all names of the checkpoint, in the order of a forward pass.

    Args:
        shard: This rank's shard. Tensors that it does not hold are left out.
        more: Loads one tensor that is in no layer. With it, such tensors are yielded too, and loaded when they are
            touched: some models have an embedding or a head in stages that never use it.
    """
    manifest = shard.manifest
    for name, tensor in shard.iter_tensors():
        if name not in manifest.tied:  # the checkpoint does not have tied names
            yield name, shard_tensor(name, shard.describe(name), tensor)
    if more is None:
        return
    for name, (form, layer, _) in manifest.tensors.items():
        if isinstance(layer, str) and name not in shard:
            aliases = [alias for alias, stored in manifest.aliases.items() if stored == name]
            dtype, shape = getattr(torch, TORCH[form.dtype]), form.shape
            bring = cache(partial(_bring, name, more))
            for each in (name, *aliases):
                yield each, AwaitedTensor(shape, dtype, bring)


def _bring(name: str, more: Callable[[str], Shard]) -> torch.Tensor:
    with more(name) as shard:
        return shard_tensor(name, shard.describe(name), shard[name])


# --------------------------------------------------------------------------------------------------------- arithmetic


def _places(spans: Iterator[Span] | Sequence[Span]) -> Iterator[int]:
    """The places at which spans begin among the held indices."""
    at = 0
    for start, stop in spans:
        yield at
        at += stop - start


def _count(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _is_whole(spans: Spans, size: int) -> bool:
    return _count(spans) == size


def _clip(spans: Spans, start: int, stop: int) -> tuple[Spans, int]:
    """Cut spans to [start, stop), counted from `start`; also give the place of the first among the held indices."""
    kept: list[Span] = []
    first = 0
    for (low, high), at in zip(spans, _places(spans), strict=True):
        low_, high_ = max(low, start), min(high, stop)
        if low_ < high_:
            if not kept:
                first = at + low_ - low
            kept.append((low_ - start, high_ - start))
    return tuple(kept), first


def _merge(sizes: Sequence[int], held: Sequence[Spans]) -> Spans:
    """Give the spans of the dim that several dims become when they are flattened."""
    found: Spans = ((0, 1),)
    for size, spans in zip(sizes, held, strict=True):
        if _is_whole(spans, size):
            found = tuple((start * size, stop * size) for start, stop in found)
            continue
        if _count(found) * len(spans) > MAX_SPANS:
            raise _UnsayableError
        found = _joined(
            (index * size + start, index * size + stop)
            for first, last in found
            for index in range(first, last)
            for start, stop in spans
        )
    return found


def _joined(spans: Iterator[Span]) -> Spans:
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return tuple(found)


def _unmerge(spans: Spans, sizes: Sequence[int]) -> list[Spans]:
    """Give the spans of each dim that one dim is divided into. Raise _UnsayableError where they are not a block there."""
    if not sizes:
        return []
    inner = prod(sizes[1:])
    if all(start % inner == 0 and stop % inner == 0 for start, stop in spans):
        return [
            tuple((start // inner, stop // inner) for start, stop in spans),
            *(((0, size),) for size in sizes[1:]),
        ]
    rows: dict[int, list[Span]] = {}
    for start, stop in spans:
        if (stop - start) // inner > MAX_SPANS:
            raise _UnsayableError
        while start < stop:
            row = start // inner
            end = min(stop, (row + 1) * inner)
            rows.setdefault(row, []).append((start - row * inner, end - row * inner))
            start = end
    first = next(iter(rows.values()))
    if any(each != first for each in rows.values()):
        raise _UnsayableError
    return [_joined((row, row + 1) for row in rows), *_unmerge(tuple(first), sizes[1:])]


class _UnsayableError(Exception):
    """The held elements of a view cannot be described dim by dim."""


def _wrap(
    source: ShardTensor, local: torch.Tensor, held: Sequence[Spans], twin: torch.Tensor
) -> torch.Tensor:
    """Make a view of `source`: a plain tensor where nothing is missing in it."""
    if all(_is_whole(spans, size) for spans, size in zip(held, twin.shape, strict=True)):
        return local
    return ShardTensor(local, held, twin, source.origin)


def _show(held: Sequence[Spans]) -> str:
    if not all(held):
        return "nothing"
    shown = ["|".join(f"{a}:{b}" for a, b in spans[:4]) + ("|..." if spans[4:] else "") for spans in held]
    return f"[{', '.join(shown)}]"


def _refusal(asked: ShardTensor | None, function: str) -> str:
    if asked is None:
        return f"{function}: called on part of a tensor in a way that is not known"
    return (
        f"{asked.origin}: {function} was called on a block {list(asked.shape)} of it of which "
        f"{_show(asked.held)} is there: the engine cuts the tensor otherwise than the view; "
        "nothing was loaded. Check that the engine runs the sizes that it was started with, and please report the model"
    )


# -------------------------------------------------------------------------------------------------------------- views


def _dim(source: ShardTensor, dim: int) -> int:
    return dim % source.dim()


def _replaced(held: Sequence[Spans], dim: int, spans: Spans) -> list[Spans]:
    return [*held[:dim], spans, *held[dim + 1 :]]


def _slice(
    source: ShardTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    dim = _dim(source, dim)
    twin = aten.slice.Tensor(source.twin, dim, start, end, step)
    spans, size = source.held[dim], source.shape[dim]
    first, last, _ = slice(start, end, 1).indices(size)
    if step != 1:
        if not _is_whole(spans, size):
            raise LayoutError(_refusal(source, f"a slice in steps of {step}"))
        local = aten.slice.Tensor(source.local, dim, start, end, step)
        return _wrap(source, local, _replaced(source.held, dim, ((0, local.shape[dim]),)), twin)
    kept, at = _clip(spans, first, max(first, last))
    local = source.local.narrow(dim, at, _count(kept))
    return _wrap(source, local, _replaced(source.held, dim, kept), twin)


def _drop(source: torch.Tensor, dim: int) -> torch.Tensor:
    """Remove the dim `dim`, which has size 1."""
    if not isinstance(source, ShardTensor):
        return source.squeeze(dim)
    held = source.held
    if not held[dim]:  # the result must still know that nothing of it is held
        held = tuple(() for _ in held)
    twin = source.twin.squeeze(dim)
    rest = [*held[:dim], *held[dim + 1 :]]
    if not held[dim]:
        if not rest:
            raise LayoutError(_refusal(source, "the value of an element"))
        return ShardTensor(source.local.new_empty([0] * len(rest)), rest, twin, source.origin)
    return _wrap(source, source.local.squeeze(dim), rest, twin)


def _select(source: ShardTensor, dim: int, index: int) -> torch.Tensor:
    dim = _dim(source, dim)
    source.twin.select(dim, index)  # raises for an index out of range
    index %= source.shape[dim]
    return _drop(_slice(source, dim, index, index + 1), dim)


def _index(source: ShardTensor, indices: Sequence[Any]) -> torch.Tensor:
    """Index by a list along one dim: a run of indices is a slice; any other list needs a dim that is whole."""
    twin = aten.index.Tensor(source.twin, [each if each is None else each.to("meta") for each in indices])
    given = [(dim, each) for dim, each in enumerate(indices) if each is not None]
    if len(given) != 1 or given[0][1].dim() != 1 or given[0][1].dtype == torch.bool:
        raise LayoutError(_refusal(source, "an index by several lists"))
    dim, picked = given[0][0], [int(each) % source.shape[given[0][0]] for each in given[0][1].tolist()]
    if picked and picked == list(range(picked[0], picked[0] + len(picked))):
        found = _slice(source, dim, picked[0], picked[0] + len(picked))
        if isinstance(found, ShardTensor):  # torch gives a copy here, whose strides are not those of a slice
            return ShardTensor(found.local, found.held, twin, source.origin)
        return found
    place = {
        index: at + index - start
        for (start, stop), at in zip(source.held[dim], _places(source.held[dim]), strict=True)
        for index in range(start, stop)
    }
    if not all(each in place for each in picked):
        raise LayoutError(_refusal(source, "an index by a list"))
    local = source.local.index_select(
        dim, torch.tensor([place[each] for each in picked], device=source.local.device)
    )
    return _wrap(source, local, _replaced(source.held, dim, ((0, len(picked)),)), twin)


def _squeeze(source: ShardTensor, dim: int | Sequence[int] | None = None) -> torch.Tensor:
    dims = range(source.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    found = _wrap(source, source.local, source.held, source.twin)  # a view is never the tensor itself
    for each in sorted((_dim(source, each) for each in dims), reverse=True):
        if source.shape[each] == 1:
            found = _drop(found, each)
    return found


def _unsqueeze(source: ShardTensor, dim: int) -> torch.Tensor:
    dim %= source.dim() + 1
    held = [*source.held[:dim], ((0, 1),), *source.held[dim:]]
    return _wrap(source, source.local.unsqueeze(dim), held, source.twin.unsqueeze(dim))


def _permute(source: ShardTensor, dims: Sequence[int]) -> torch.Tensor:
    dims = [_dim(source, dim) for dim in dims]
    return _wrap(
        source, source.local.permute(dims), [source.held[d] for d in dims], source.twin.permute(dims)
    )


def _transpose(source: ShardTensor, one: int, other: int) -> torch.Tensor:
    dims = list(range(source.dim()))
    one, other = _dim(source, one), _dim(source, other)
    dims[one], dims[other] = other, one
    return _permute(source, dims)


def _t(source: ShardTensor) -> torch.Tensor:
    return _permute(source, range(source.dim())[::-1])


def _expand(source: ShardTensor, size: Sequence[int], *, implicit: bool = False) -> torch.Tensor:
    twin = source.twin.expand(*size)
    new = twin.dim() - source.dim()
    held: list[Spans] = [((0, n),) for n in twin.shape[:new]]
    for dim, spans in enumerate(source.held):
        same = source.shape[dim] == twin.shape[new + dim]
        held.append(spans if same or not spans else ((0, twin.shape[new + dim]),))
    return _wrap(source, source.local.expand(*(_count(spans) for spans in held)), held, twin)


def _split(source: ShardTensor, size: int, dim: int = 0) -> list[torch.Tensor]:
    n = source.shape[_dim(source, dim)]
    return [_slice(source, dim, at, min(n, at + size)) for at in range(0, n, size)]


def _split_with_sizes(source: ShardTensor, sizes: Sequence[int], dim: int = 0) -> list[torch.Tensor]:
    aten.split_with_sizes.default(source.twin, sizes, dim)  # raises for sizes that do not add up
    return [
        _slice(source, dim, at, at + size)
        for size, at in zip(sizes, _places([(0, n) for n in sizes]), strict=True)
    ]


def _unbind(source: ShardTensor, dim: int = 0) -> list[torch.Tensor]:
    return [_select(source, dim, index) for index in range(source.shape[_dim(source, dim)])]


def _view(source: ShardTensor, size: Sequence[int]) -> torch.Tensor:
    """Give another shape: neighbouring dims with as many elements before and after are flattened and divided anew."""
    twin = source.twin.view(size)
    if not all(source.held):
        rest = tuple(() for _ in twin.shape)
        if not rest:
            raise LayoutError(_refusal(source, "the value of an element"))
        return ShardTensor(source.local.new_empty([0] * len(rest)), rest, twin, source.origin)
    old, new = list(source.shape), list(twin.shape)
    held: list[Spans] = []
    i = j = 0
    try:
        while i < len(old) or j < len(new):
            first, start = i, j
            i, j = min(i + 1, len(old)), min(j + 1, len(new))
            while prod(old[first:i]) != prod(new[start:j]):
                if prod(old[first:i]) < prod(new[start:j]):
                    i += 1
                else:
                    j += 1
            if i == len(old):  # dims of size 1 may follow
                j = len(new)
            if j == len(new):
                i = len(old)
            held += _unmerge(_merge(old[first:i], source.held[first:i]), new[start:j])
    except _UnsayableError:
        raise LayoutError(_refusal(source, f"a view as {list(twin.shape)}")) from None
    return _wrap(source, source.local.reshape([_count(spans) for spans in held]), held, twin)


def _view_dtype(source: ShardTensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize != source.dtype.itemsize:
        raise LayoutError(_refusal(source, f"a view as {dtype}"))
    return _wrap(source, source.local.view(dtype), source.held, source.twin.view(dtype))


VIEWS: Final[Mapping[Any, Callable[..., Any]]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.expand.default: _expand,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.view.dtype: _view_dtype,
}

COPIES: Final = {
    aten.clone.default,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
}
"""Operations that give the same elements."""
