"""Prove that the results which ranks compute from their own tensors add up to the results of the whole model.

The modules are each attention, each MLP, the embedding and the head. Each rank's tensors are put in their places among
zeros. Every module with cut tensors is run once for each rank, on the input that it has in the whole model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import quote

from .blocks import Views, blocks_of
from .exchanges import Exchanges
from .models import forward, tensor_of
from .report import Differs, Proof, Workers
from .small import SmallModel

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

PARTIAL: Final = 1e-4
"""Share of the largest number in a result by which the sum of the ranks' results may differ from it."""

Compare = Callable[[str, str, "torch.Tensor", Sequence["torch.Tensor"]], None]
"""Compares results of a module: its path, the place within it, the whole model's result, the ranks' results."""


def prove_sums(small: SmallModel) -> Iterator[Proof]:
    """Make one proof for each size, for the cut as it is stored. Engines with other cuts may gather ranks' results."""
    for size in small.sizes()[1:]:
        for ep in small.expert_sizes(size):
            workers = Workers(size, expert_parallel_size=ep, engine="torch")
            ranks = small.plan(workers)
            if ep > 1:
                ranks = [
                    _counted(small, views, workers.place_in_group(rank)[1])
                    for rank, views in enumerate(ranks)
                ]
            modules, cut = _add_up(small, ranks, workers)
            yield Proof(
                "sums",
                f"{workers}: partial results of {size} ranks add up to the model's in {modules} "
                f"modules with {cut} cut tensors",
            )


def _counted(small: SmallModel, views: Views, rank_in_group: int) -> Views:
    """Leave out tensors that all ranks of an expert group have whole (experts' biases), so that they count once."""
    return {
        name: view
        for name, view in views.items()
        if rank_in_group == 0
        or not (view.experts is not None or small.manifest.tensors[name].expert is not None)
        or math.prod(view.shape[1:]) != math.prod(view.form.shape[1:])
        or (view.experts is None and view.shape != view.form.shape)
    }


def _add_up(small: SmallModel, ranks: Sequence[Views], workers: Workers) -> tuple[int, int]:
    """Compare each module's result with the sum of the ranks' results; count modules and cut tensors. May raise Differs."""
    import torch

    states = [_masked(small, views) for views in ranks]
    cut = {
        name
        for name, full in small.tensors.items()
        if not all(torch.equal(state[name], full) for state in states)
    }
    bare = {name: torch.zeros_like(full) if name in cut else full for name, full in small.tensors.items()}
    models = [small.model_of(state) for state in (*states, bare)]

    def compare(path: str, where: str, whole: torch.Tensor, partial: Sequence[torch.Tensor]) -> None:
        *own, bare = partial
        # a tensor that every rank has whole (a bias, a shared expert) is in every partial result, and counts once
        total = torch.stack(own).sum(0) - (len(own) - 1) * bare
        off = float((total - whole).abs().max()) / max(float(whole.abs().max()), 1e-6)
        if not off <= PARTIAL:
            names = [name for name in sorted(cut) if _is_under(name, path)]
            raise Differs(
                "sums",
                path,
                None,
                workers,
                expected=f"partial results that add up to the model's behind {where}",
                found=f"a sum that is off by {off:.2g} of the largest: its ranks hold parts of tensors that do not belong "
                f"together ({', '.join(map(quote, names[:6]))})",
            )

    paths = _boundaries(small, models)
    _run(small, models, paths, compare)
    return len(paths), len(cut)


def _masked(small: SmallModel, views: Views) -> dict[str, torch.Tensor]:
    """The model's tensors at full shape, zero where this rank does not hold them."""
    import torch

    state = {}
    for name, full in small.tensors.items():
        state[name] = torch.zeros_like(full)
        for block, _ in blocks_of(views[name]) if name in views else ():
            state[name][block] = full[block]
    return state


def _is_under(name: str, path: str) -> bool:
    """Whether a checkpoint's tensor belongs to a module, whatever the prefix of its name."""
    return name.startswith(path + ".") or f".{path.partition('.')[2]}." in f".{name}"


def _boundaries(small: SmallModel, models: Sequence[PreTrainedModel]) -> list[str]:
    """List the modules whose results ranks add up: the layers' own children, and outside the layers those with weights."""
    import torch

    layers = small.layers_path()
    found = []

    def is_cut(path: str) -> bool:
        own = dict(small.model.get_submodule(path).named_parameters())
        return any(
            not torch.equal(own[name], parameter)
            for model in models
            for name, parameter in model.get_submodule(path).named_parameters()
        )

    for path, module in small.model.named_modules():
        if layers is not None and path.startswith(f"{layers}."):
            if path.removeprefix(f"{layers}.").count(".") != 1:
                continue
        elif not list(module.parameters(recurse=False)):
            continue
        if path and is_cut(path):
            found.append(path)
    return found


def _run(
    small: SmallModel, models: Sequence[PreTrainedModel], paths: Sequence[str], compare: Compare
) -> None:
    """Run the model; at each path run the module of every rank's model on the same input, and compare the results."""
    exchanges = Exchanges(small.model, models)
    handles = []
    for path in paths:
        others = [model.get_submodule(path) for model in models]

        def run_others(
            _: nn.Module,
            arguments: Any,
            options: Any,
            output: Any,
            path: str = path,
            others: Sequence[nn.Module] = others,
        ) -> None:
            whole = tensor_of(output)
            partial = [tensor_of(other(*_copied(arguments), **_copied(options))) for other in others]
            for inner, summed, parts in exchanges.settle(path):
                compare(path, inner, summed, parts)
            compare(path, path, whole, partial)

        handles.append(small.model.get_submodule(path).register_forward_hook(run_others, with_kwargs=True))
    try:
        with exchanges:
            forward(small.model, small.prompt)
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    """Copy arguments, so that a module that changes them in place does not change those of another."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_copied(each) for each in value)
    return copy.copy(value)
