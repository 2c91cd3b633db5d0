"""Give models with one rank's tensors each the results that an engine's ranks would exchange inside a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .models import head_dim, is_flipped

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Exchanges:
    """A context in which each rank's model gets the results that an engine would exchange inside a module.

    A projection that is cut along its input gives every rank the sum of all ranks' results, which `settle` compares. A
    norm over all heads sees all heads. What a rank computes from such a result is its own again.
    """

    def __init__(self, model: PreTrainedModel, others: Sequence[PreTrainedModel]) -> None:
        self.model = model
        self.others = others
        self.handles: list[Any] = []
        self.whole: dict[str, list[torch.Tensor]] = {}
        """Path -> results of the whole model's module, in the order of its calls."""
        self.parts: dict[str, list[list[torch.Tensor]]] = {}
        """Path -> for each rank's model: results of its module, in the order of its calls."""

    def settle(self, path: str) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
        """Yield (path, whole model's result, ranks' results) for each sum within a module, and forget them.

        Args:
            path: The module.
        """
        for inner in [each for each in self.parts if each == path or each.startswith(path + ".")]:
            for call, whole in enumerate(self.whole[inner]):
                if all(call < len(part) for part in self.parts[inner]):
                    yield inner, whole, [part[call] for part in self.parts[inner]]
            for part in self.parts[inner]:
                part.clear()
        for inner in [each for each in self.whole if each == path or each.startswith(path + ".")]:
            self.whole[inner].clear()

    def __enter__(self) -> None:
        width = min((w for m in self.model.modules() if isinstance(w := head_dim(m), int)), default=0)
        for path, module in self.model.named_modules():
            own = [other.get_submodule(path) for other in self.others]
            weight = getattr(module, "weight", None)
            if weight is None:
                continue
            if _is_cut_along_input(module, own):
                self.parts[path] = [[] for _ in own]
            elif "Norm" not in type(module).__name__ or weight.ndim != 1 or weight.numel() <= width:
                continue
            whole = self.whole[path] = []
            self.handles.append(module.register_forward_hook(_keep(whole)))
            for number, other in enumerate(own):
                give = (
                    _give_sum(whole, self.parts[path][number]) if path in self.parts else _give_share(whole)
                )
                self.handles.append(other.register_forward_hook(give))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _keep(whole: list[torch.Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        whole.append(output.clone())  # the module that gets the output may change it in place

    return keep


def _give_sum(whole: list[torch.Tensor], parts: list[torch.Tensor]) -> Callable[..., Any]:
    def give(_: nn.Module, __: Any, output: torch.Tensor) -> Any:
        parts.append(output.clone())
        call = len(parts) - 1
        return whole[call].clone() if call < len(whole) and whole[call].shape == output.shape else None

    return give


def _give_share(whole: list[torch.Tensor]) -> Callable[..., Any]:
    def give(module: Any, arguments: Any, output: torch.Tensor) -> Any:
        given = arguments[0] if arguments else None
        if len(whole) != 1 or given is None or whole[0].shape != given.shape:
            return None
        if module.weight.numel() != given.shape[-1]:
            return None
        return whole[0] * (given != 0) * (module.weight != 0)

    return give


def _is_cut_along_input(module: nn.Module, others: Sequence[nn.Module]) -> bool:
    """Whether each rank has some whole columns of a projection, and so reads some of its input."""
    from torch import nn

    flipped = is_flipped(module)
    if not isinstance(module, nn.Linear) and not flipped:
        return False
    kept = []
    for other in others:
        held: Any = other.weight != 0
        held = held.T if flipped else held
        there = held.any(0)
        if not bool((held.float().mean(0)[there] > 0.99).all()):  # 0.99, since a random weight may be 0
            return False
        kept.append(bool(there.all()))
    return not any(kept)
