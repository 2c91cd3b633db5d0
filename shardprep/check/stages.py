"""Prove that each pipeline stage computes with its own tensors and the hidden states of the stage before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .blocks import Views
from .models import forward, tensor_of
from .report import Differs, Proof, Workers
from .small import SmallModel

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .small import Tensors


def prove_stages(small: SmallModel) -> Iterator[Proof]:
    """Make one proof for each number of stages that some engine can run."""
    import torch

    for pp in range(2, small.pp + 1):
        workers = Workers(1, pp)
        engine = next((each for each in small.engines if small.refusal(each, pp) is None), None)
        if engine is None:
            continue
        stages = small.plan(replace(workers, engine=engine))
        states = [{name: small.tensors[name] for name in views} for views in stages]
        found = _relay(small, stages, states)
        if isinstance(found, str):
            yield Proof("stages", f"{workers}: assembled, for {found}", assembled=True)
        elif torch.equal(found, small.logits):
            yield Proof(
                "stages",
                f"{workers}: {pp} stages, each with its own tensors, compute the model's logits, bit for bit",
            )
        else:
            yield _blame(small, stages, states, workers)


def _blame(small: SmallModel, stages: Sequence[Views], states: Sequence[Tensors], workers: Workers) -> Proof:
    """Find the tensor that a stage lacks, or say that the model's layers need more than hidden states."""

    def computes(states: Sequence[Tensors]) -> bool:
        import torch

        found = _relay(small, stages, states)
        return not isinstance(found, str) and torch.equal(found, small.logits)

    outside = {name for views in stages for name, view in views.items() if not isinstance(view.layer, int)}
    everything = {name: small.tensors[name] for name in outside}
    if not computes([{**everything, **state} for state in states]):
        return Proof(
            "stages",
            f"{workers}: assembled, for its layers need more of earlier ones than their hidden states",
            assembled=True,
        )
    for rank, state in enumerate(states):
        for name in sorted(outside - state.keys()):
            rest = {each: tensor for each, tensor in everything.items() if each != name}
            if not computes(
                [{**(rest if number == rank else everything), **own} for number, own in enumerate(states)]
            ):
                raise Differs(
                    "stages",
                    name,
                    rank,
                    workers,
                    expected="it on this stage, which computes with it",
                    found="no view of it",
                )
    raise Differs("stages", "the model", None, workers, expected="the model's logits", found="others")


def _relay(small: SmallModel, stages: Sequence[Views], states: Sequence[Tensors]) -> torch.Tensor | str:
    """Compute the logits by one stage after another, or say why that is impossible.

    Every tensor that a stage does not hold is NaN, so that its use shows in the logits.
    """
    layers = small.layers_path()
    if layers is None:
        return "transformers builds it of no one list of layers"
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    for views, state in zip(stages, states, strict=True):
        numbers = [view.layer for view in views.values() if isinstance(view.layer, int)]
        model = small.model_of(
            {name: state[name] if name in state else _poison(full) for name, full in small.tensors.items()}
        )
        own = list(model.get_submodule(layers).children())
        seen: list[torch.Tensor] = []

        def inject(_: nn.Module, arguments: Any, options: Any, given: torch.Tensor | None = hidden) -> Any:
            if given is None:
                return None
            if arguments:
                return (given, *arguments[1:]), options
            return arguments, {**options, "hidden_states": given}

        def catch(_: nn.Module, __: Any, output: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(tensor_of(output))

        own[min(numbers)].register_forward_pre_hook(inject, with_kwargs=True)
        own[max(numbers)].register_forward_hook(catch)
        logits = forward(model, small.prompt)
        hidden = seen[-1]
    assert logits is not None
    return logits


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
