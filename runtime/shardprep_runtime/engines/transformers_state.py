"""Let transformers' own loader read a rank's shard: each process opens and reads only its own bytes.

    with transformers_state("s3://bucket/llama-70b") as state:
        model = state.from_pretrained(
            AutoModelForCausalLM, config=config, distributed_config=DistributedConfig(tp_size=8)
        )

A state is a mapping that `from_pretrained(None, config=..., state_dict=state)` takes. Its slices have full shapes, of
which only the rank's block is there.

Where transformers finds no weight, it takes random numbers and logs a warning. `TransformersState.from_pretrained`
raises there. So does leaving the `with` of a state that nobody checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from .. import environment
from ..errors import InputError, LayoutError, UnsupportedError, quote
from ..format.manifest import TORCH, TRANSFORMERS
from ..format.view import Place
from ..shard.prefetch import Prefetch
from ..shard.shard import Shard
from ..shard.shard_set import ShardSet, open_set
from .shardview import ShardSlice, shard_slices

WHOLE: Final = ("gptq", "awq")
"""Quantizations whose linears transformers leaves whole on every tensor rank."""


class TransformersState(Mapping[str, ShardSlice]):
    """The tensors of a checkpoint by name, as one rank holds them, for transformers' loader.

    Tied names are here once, as in the checkpoint: transformers ties them. An index outside of what the rank holds
    raises LayoutError. The tensors that were read stay valid after `close`.
    """

    def __init__(self, shard: Shard) -> None:
        """Take a shard over, which `close` closes."""
        self.shard = shard
        self._slices = shard_slices(shard)
        self._asked = self._checked = False

    def from_pretrained(self, model_class: Any, **options: Any) -> Any:
        """Build a model from this state and no other weights.

        Args:
            model_class: A class of transformers, such as `AutoModelForCausalLM` or `LlamaForCausalLM`.
            **options: Those of its `from_pretrained`: `config`, and `distributed_config` where there are several ranks.

        Returns:
            The model; with `output_loading_info=True` the model and what transformers says of its loading.

        Raises:
            LayoutError: Where model and checkpoint differ in a name or a shape, or transformers cuts otherwise than the
                view.
            InputError: For a `state_dict`, which is this state.
        """
        if "state_dict" in options:
            raise InputError("state_dict is this very state; leave it out")
        wants_info = options.pop("output_loading_info", False)
        # a shape that differs is refused by `check`, which names it
        options |= {"state_dict": self, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = _concrete(model_class, options.get("config")).from_pretrained(None, **options)
        self.check(found)
        return (model, found) if wants_info else model

    def check(self, found: Mapping[str, Collection[Any]]) -> None:
        """Call `check_loaded` on what transformers said of the loading; after it the `with` of this state may end."""
        self._checked = True
        check_loaded(found)

    # ------------------------------------------------------------------------------------------------- the mapping
    def __getitem__(self, name: str) -> ShardSlice:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        self._asked = True
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    # ------------------------------------------------------------------------------------------------- bookkeeping
    def close(self) -> None:
        """Close the shard. Tensors that were not read can no longer be had."""
        self.shard.close()

    def __enter__(self) -> TransformersState:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None and self._asked and not self._checked:
            raise LayoutError(
                "nobody checked whether each weight of the model was found; load it with state.from_pretrained, or "
                "pass output_loading_info=True and give what it returns to state.check"
            )


def check_loaded(found: Mapping[str, Collection[Any]]) -> None:
    """Prove that every weight of a model was found, and that every tensor of the checkpoint was used.

    Args:
        found: What `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        LayoutError: Names what is missing, unused, or of another shape.
    """
    wrong = [
        f"{what} {_some(names)}"
        for what, names in (
            ("the checkpoint lacks", sorted(found["missing_keys"])),
            ("the model lacks", sorted(found["unexpected_keys"])),
            ("shapes differ in", sorted({str(each[0]) for each in found["mismatched_keys"]})),
        )
        if names
    ]
    if wrong:
        raise LayoutError(
            f"the model and the checkpoint differ, so its weights would be random in part: {'; '.join(wrong)}; "
            "load the class that `architectures` names, with the config.json of the shard set"
        )


def transformers_state(
    source: str | os.PathLike[str] | ShardSet | Shard | Prefetch,
    *,
    rank: int | None = None,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int = 1,
) -> TransformersState:
    """Load a rank's shard for transformers' own loader.

        with transformers_state(open_set("s3://bucket/llama-70b", digest="sha256:...")) as state:
            model = state.from_pretrained(AutoModelForCausalLM, config=config)

    Args:
        source: A folder, a URI, or what `open_set` gives. Or a shard, or the prefetch of one, of
            `Place(..., engine="transformers")`: the other arguments are then ignored, and the state takes it over.
        rank: pp_rank * tensor_parallel_size + tp_rank; default: torch.distributed's, else RANK, else 0.
        tensor_parallel_size: Default: the processes of torch.distributed, if it is initialized, else WORLD_SIZE, else
            1, divided by the pipeline stages.
        pipeline_parallel_size: Pipeline stages.

    Returns:
        The state, which the caller closes.

    Raises:
        LayoutError: Where the processes do not fit the grid, or the shard was cut for another engine.
        UnsupportedError: For GPTQ and AWQ on several tensor ranks.
        ShardprepError: What `ShardSet.load` raises.
    """
    if isinstance(source, Prefetch):
        return _state_of(source.shard())
    if isinstance(source, Shard):
        return _state_of(source)
    own_rank, size = _place()
    if tensor_parallel_size is None:
        tensor_parallel_size, rest = divmod(size, pipeline_parallel_size)
        if rest:
            raise LayoutError(f"{size} processes cannot be {pipeline_parallel_size} stages of equal size")
    if rank is None:
        if tensor_parallel_size * pipeline_parallel_size not in (1, size):
            raise LayoutError(
                f"there are {size} processes, for a grid of {tensor_parallel_size} x {pipeline_parallel_size}; "
                "pass rank=, of the grid: pp_rank * tensor_parallel_size + tp_rank"
            )
        rank = own_rank if size > 1 and tensor_parallel_size * pipeline_parallel_size > 1 else 0
    # one rank asks for whole tensors, also of a model that transformers cannot cut
    engine = TORCH if tensor_parallel_size == pipeline_parallel_size == 1 else TRANSFORMERS
    place = Place(rank, tensor_parallel_size, pipeline_parallel_size, engine=engine)
    return _state_of(open_set(source).load(place))


def _state_of(shard: Shard) -> TransformersState:
    """The state of a shard, which is closed where it is refused."""
    grid, quantization = shard.view.grid, shard.manifest.quantization
    wrong: LayoutError | UnsupportedError | None = None
    if quantization is not None and quantization.method in WHOLE and grid.tensor_parallel_size > 1:
        wrong = UnsupportedError(
            f"{quote(quantization.method)} at tensor parallel size {grid.tensor_parallel_size}: transformers does not cut "
            "these linears; load on one rank, or serve the same shard set with vLLM"
        )
    elif grid.world_size > 1 and shard.view.engine != TRANSFORMERS:
        wrong = LayoutError(
            f"this shard is cut as {quote(shard.view.engine)} asks; pass engine={TRANSFORMERS!r} to what loads it"
        )
    if wrong is not None:
        shard.close()
        raise wrong
    return TransformersState(shard)


def _place() -> tuple[int, int]:
    """This process's rank, and the number of processes that it is one of."""
    distributed = sys.modules.get("torch.distributed")  # where nobody has imported it, it is not initialized
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return environment.rank() or 0, environment.world_size() or 1


def _concrete(model_class: Any, config: object) -> Any:
    """The model's own class where an auto class is given, which fails without a path (transformers 5.23)."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        raise LayoutError(f"{model_class.__name__} knows no model of a {type(config).__name__}; pass config=")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
