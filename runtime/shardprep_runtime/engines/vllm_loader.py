"""Load a rank of vLLM from a shard set: what belongs to it and nothing else, through vLLM's own weight loaders.

vLLM's loaders are given tensors with the checkpoint's names and shapes, of which only this rank's blocks are there
(shardtensor.py). So they make of them what they would make of the checkpoint, or raise. This module imports vLLM: only
the entry point that vLLM calls imports it (vllm_plugin.py).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm.config import LoadConfig, ModelConfig
from vllm.distributed import get_ep_group, get_pp_group, get_tp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..errors import LayoutError, ManifestError, quote
from ..format.grid import Grid, Stages
from ..format.manifest import Manifest
from ..format.view import Place
from ..shard.shard import Shard
from .options import find_shard_set, read_options
from .shardtensor import shard_tensors

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

WEIGHTS: Final = ("weight", "qweight", "qzeros", "scales", "weight_packed", "weight_scale")
"""Ends of the names of parameters that every checkpoint has values for."""

logger = logging.getLogger("vllm.shardprep")


class ShardprepLoader(BaseModelLoader):
    """Loads `--load-format shardprep`. The model is a shard set's folder, or one with its side files (`uri`)."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        extra = load_config.model_loader_extra_config
        self.options = read_options(extra if isinstance(extra, Mapping) else {})

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: a rank fetches its own bytes when it loads."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill this rank's model.

        Args:
            model: The module that vLLM has built for this rank.
            model_config: What vLLM knows of the model.

        Raises:
            ShardprepError: And then nothing of the model may be used.
        """
        folder = Path(getattr(model_config, "model_weights", "") or model_config.model)
        found = find_shard_set(folder, self.options, is_draft=_is_draft(model_config))
        if found is None:
            self._load_default(model, model_config)
            return
        shard_set, manifest = found
        began = time.perf_counter()
        rank, grid = _place(model_config, manifest)
        place = Place(
            rank,
            grid.tensor_parallel_size,
            expert_parallel_size=grid.expert_parallel_size,
            stages=_stages(model_config, manifest),
            engine="vllm",
        )

        def load_more(name: str) -> Shard:
            logger.info("shardprep: rank %d has %s too, which another stage uses", rank, name)
            return shard_set.load(place, tensors=[name])

        with shard_set.load(place) as shard:
            more = load_more if grid.pipeline_parallel_size > 1 else None
            loaded = model.load_weights(shard_tensors(shard, more))  # type: ignore[operator]
            self._check_filled(model, model_config, loaded)
            logger.info(
                "shardprep: rank %d of %d: %d tensors, %d bytes of %d kept, %d read, %d of them fetched by this "
                "process, verify %s, in %.2f s",
                shard.view.rank,
                shard.view.grid.world_size,
                len(shard.view.tensors),
                shard.nbytes,
                manifest.nbytes,
                shard.bytes_read,
                shard.bytes_fetched,
                shard_set.verify,
                time.perf_counter() - began,
            )

    def _load_default(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load an ordinary checkpoint as vLLM itself would."""
        if not self.options.drafts:
            raise ManifestError(
                f"{quote(model_config.model)}: not a shard set, and `drafts` forbids ordinary checkpoints"
            )
        logger.info(
            "shardprep: %s is not a shard set; vLLM's own loader loads it, unverified", model_config.model
        )
        _default(self.load_config).load_weights(model, model_config)

    def _check_filled(
        self, model: torch.nn.Module, model_config: ModelConfig, loaded: set[str] | None
    ) -> None:
        """Raises LayoutError where a parameter that holds weights has got nothing."""
        if loaded is None:  # a model that does not say
            return
        # vLLM's own check leaves out quantized models, and every module that is post-processed: all linears
        missing = sorted(
            name
            for name, parameter in model.named_parameters()
            if name not in loaded and parameter.numel() and name.endswith(WEIGHTS)
        )
        if missing:
            raise LayoutError(
                f"{quote(missing[0])}"
                + (f" and {len(missing) - 1} more parameters" if missing[1:] else "")
                + " of this rank got nothing from the shard set: it is not this model's, or this version of vLLM wants "
                "more than the split knew; nothing may be served from it"
            )
        check = getattr(DefaultModelLoader, "track_weights_loading", None)
        if check is not None and model_config.quantization is None:
            check(_default(self.load_config), model, loaded)


def _default(load_config: LoadConfig) -> DefaultModelLoader:
    return DefaultModelLoader(
        dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
    )


def _is_draft(model_config: ModelConfig) -> bool:
    """Whether this is the draft model of speculative decoding, which is loaded beside the served one."""
    config = _vllm_config()
    speculative = config.speculative_config if config is not None else None
    return speculative is not None and getattr(speculative, "draft_model_config", None) is model_config


def _vllm_config() -> VllmConfig | None:
    from vllm.config import get_current_vllm_config_or_none  # not in all versions that can register a loader

    return get_current_vllm_config_or_none()


def _place(model_config: ModelConfig, manifest: Manifest) -> tuple[int, Grid]:
    """This process's rank, and the grid, as vLLM's groups have them. Raises LayoutError."""
    tensor, pipeline = get_tp_group(), get_pp_group()
    rank = pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group
    grid = Grid(tensor.world_size, pipeline.world_size)
    config = _vllm_config()
    experts = getattr(model_config, "get_num_experts", lambda: manifest.experts)()
    if config is None or not experts:
        return rank, grid
    parallel = config.parallel_config
    if parallel.enable_expert_parallel and tensor.world_size > 1 and not manifest.experts:
        raise LayoutError(
            "each expert of this shard set is cut, so ranks cannot have whole ones; run without "
            "--enable-expert-parallel"
        )
    if parallel.enable_expert_parallel and tensor.world_size > 1:
        group = get_ep_group()
        if (group.world_size, group.rank_in_group) != (tensor.world_size, tensor.rank_in_group):
            raise LayoutError(
                f"experts are shared by {group.world_size} ranks (data parallel ones too), and a shard set shares them "
                f"among the {tensor.world_size} tensor parallel ranks of a stage; run data parallel size 1"
            )
        if getattr(parallel, "enable_eplb", False):
            raise LayoutError(
                "--enable-eplb moves experts between ranks, each of which has its own alone; leave it out"
            )
        if getattr(parallel, "expert_placement_strategy", "linear") != "linear":
            raise LayoutError("experts are dealt out in runs: use --expert-placement-strategy linear")
        return rank, dataclasses.replace(grid, expert_parallel_size=tensor.world_size)
    if parallel.data_parallel_size > 1:
        raise LayoutError(
            f"vLLM shares the experts among data parallel ranks too, {parallel.data_parallel_size} here; a shard set "
            "shares them among the tensor parallel ranks: run data parallel size 1"
        )
    return rank, grid


def _stages(model_config: ModelConfig, manifest: Manifest) -> Stages:
    """The layers [start, stop) of each stage, as vLLM deals them out. The last stage has what follows too."""
    size = get_pp_group().world_size
    if size == 1:
        return ((0, manifest.layers),)
    layers = int(model_config.get_total_num_hidden_layers())
    if layers > manifest.layers:
        raise LayoutError(
            f"the model has {layers} layers, the shard set {manifest.layers}: not the same model"
        )
    stages = [get_pp_indices(layers, rank, size) for rank in range(size)]
    stages[-1] = (stages[-1][0], manifest.layers)
    return tuple(stages)
