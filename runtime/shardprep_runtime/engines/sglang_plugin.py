"""Experimental: give SGLang's own weight loaders a rank's shard, where the model's folder is a shard set.

`register` is an entry point of the group `sglang.srt.plugins`, which every process of SGLang calls. A folder without a
shardprep.json is loaded as before. It was tried with the weight loaders of SGLang 0.5.23 (tools/check_sglang.py), and
never with an engine that runs: compare the first tokens with those of the checkpoint before you rely on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import UnsupportedError
from ..format.manifest import FILE_NAME, TORCH
from ..format.view import Place
from ..shard.shard_set import open_set

if TYPE_CHECKING:
    import torch

Weights = Iterator[tuple[str, "torch.Tensor"]]

TARGET: Final = "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights"

ENGINE: Final = "vllm"
"""The engine whose cuts are followed: SGLang pads vocabularies and cuts experts as vLLM does."""


def register() -> None:
    """Ask SGLang to call `weights` around its default loader's."""
    hooks: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(TARGET, weights, hooks.HookType.AROUND)


def weights(original: Callable[..., Weights], loader: Any, model_config: Any, model: Any) -> Weights:
    """Yield (name, tensor) of this rank's shard in full shapes; for any other folder whatever `original` gives.

    Args:
        original: SGLang's own method.
        loader: SGLang's loader, whose method this is.
        model_config: SGLang's config of the model.
        model: The model that is loaded.

    Raises:
        UnsupportedError: For pipeline, expert and data parallelism, which were not tried.
    """
    folder = Path(model_config.model_path)
    if not (folder / FILE_NAME).is_file():
        yield from original(loader, model_config, model)
        return
    from .shardtensor import shard_tensors

    context: Any = importlib.import_module("sglang.srt.runtime_context")
    here = context.get_parallel()
    sizes = {"pp_size": here.pp_size, "moe_ep_size": here.moe_ep_size, "attn_tp_size": here.attn_tp_size}
    if sizes != {"pp_size": 1, "moe_ep_size": 1, "attn_tp_size": here.tp_size}:
        raise UnsupportedError(
            f"{', '.join(f'{key} {size}' for key, size in sizes.items())} of {here.tp_size} tensor ranks: a shard set was "
            "only tried with SGLang's plain tensor parallelism; shardprep export gives the checkpoint back for all others"
        )
    if getattr(model, "secondary_weights", ()):
        raise UnsupportedError(
            "this model has weights in a second place, which are not in the shard set; shardprep export gives the "
            "checkpoint that SGLang itself loads"
        )
    with open_set(folder).load(
        Place(
            rank=here.tp_rank, tensor_parallel_size=here.tp_size, engine=ENGINE if here.tp_size > 1 else TORCH
        )
    ) as shard:
        yield from shard_tensors(shard)
