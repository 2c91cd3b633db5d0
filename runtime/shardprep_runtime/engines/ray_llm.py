"""Have ray.serve.llm start vLLM from a shard set: each node gets side files and its own ranks' bytes.

    LLMConfig(
        model_loading_config={"model_id": "llama-70b", "model_source": "/var/lib/shardprep/llama-70b"},
        engine_kwargs={
            "tensor_parallel_size": 8,
            "load_format": "shardprep",
            "model_loader_extra_config": {"uri": "s3://bucket/llama-70b"},
        },
        callback_config={"callback_class": "shardprep_runtime.engines.ray_llm.ShardprepCallback"},
    )

`model_source` is a folder that is made on each node. Only the options of vLLM's loader (vllm_loader.py) say where the
weights come from. This module imports Ray, and only Ray imports it, by its name.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.common.utils.download_utils import NodeModelDownloadable

from ..errors import InputError, quote
from ..format.grid import even_stages
from ..format.read_manifest import read_named
from ..shard.options import words_of
from ..shard.shard_set import ShardSet
from ..stores.open import is_uri
from .options import read_options
from .vllm_plugin import LOAD_FORMAT

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The shard set and the grid that an LLMConfig asks for."""

    shard_set: ShardSet
    """The set that vLLM's `model_loader_extra_config` names."""
    folder: Path
    """The folder that vLLM takes as its model; every node makes one at the same path."""
    tensor_parallel_size: int
    pipeline_parallel_size: int
    is_expert_parallel: bool


def read_config(llm_config: Any) -> Wanted:
    """Read an LLMConfig.

    Raises:
        InputError: Where Ray or vLLM would take the weights from elsewhere.
    """
    engine = llm_config.engine_kwargs
    source = llm_config.model_loading_config.model_source
    if engine.get("load_format") != LOAD_FORMAT:
        raise InputError(
            f"engine_kwargs: load_format is {quote(engine.get('load_format'))}, expected {LOAD_FORMAT}"
        )
    shard_set = read_options(engine.get("model_loader_extra_config") or {}).shard_set
    uri = shard_set.source
    if not is_uri(uri):
        raise InputError(
            f"engine_kwargs: model_loader_extra_config has {quote(uri)} as uri, expected s3://bucket/prefix of the shard set"
        )
    if not isinstance(source, str) or is_uri(source) or not Path(source).is_absolute():
        raise InputError(
            f"model_loading_config: model_source is {quote(source)}, expected the path of a folder that each node makes "
            f"for itself (/var/lib/shardprep/NAME); the weights come from {quote(uri)}"
        )
    return Wanted(
        shard_set,
        Path(source),
        engine.get("tensor_parallel_size", 1),
        engine.get("pipeline_parallel_size", 1),
        bool(engine.get("enable_expert_parallel")),
    )


class ShardprepCallback(CallbackBase):
    """Ray's callback: on each node it puts side files and the manifest into the folder, and begins to fetch its ranks.

    Args:
        prefetch: False where others fill the nodes' caches, or where VLLM_RAY_BUNDLE_INDICES or VLLM_PP_LAYER_PARTITION
            give ranks and layers an order of their own. It is said in `callback_kwargs`.
        kwargs: Ray's own arguments.
    """

    def __init__(self, *, prefetch: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._prefetch = prefetch
        self._engine_node: str | None = None
        self.wanted = read_config(self.llm_config)
        self.ctx.worker_node_download_model = NodeModelDownloadable.NONE

    async def on_before_node_init(self) -> None:
        """Run in the replica, beside the engine. Its node gets the first ranks from vLLM."""
        import ray

        self._engine_node = ray.get_runtime_context().get_node_id()

    def on_before_download_model_files_distributed(self) -> None:
        """Run on each node of the replica.

        Raises:
            ShardprepError: Where the side files cannot be fetched.
        """
        wanted = self.wanted
        wanted.shard_set.fetch_side_files(wanted.folder)
        if not self._prefetch or wanted.shard_set.cache is None:
            return
        ranks = self._own_ranks()
        if not ranks:
            logger.info("shardprep: which ranks this node gets is not known yet; they fetch when they load")
            return
        # a process of its own outlives this task; vLLM's workers find in the cache what it has fetched
        subprocess.run(  # noqa: S603 - our own command
            [
                sys.executable,
                "-m",
                "shardprep_runtime.shard.prefetch_command",
                *prefetch_arguments(wanted, ranks),
            ],
            stdin=subprocess.DEVNULL,
            check=True,
        )
        logger.info("shardprep: began to fetch ranks %d to %d into the host's cache", ranks[0], ranks[-1])

    def _own_ranks(self) -> range:
        """The ranks that vLLM will put on this node; empty where that is not known."""
        import ray

        size = self.wanted.tensor_parallel_size * self.wanted.pipeline_parallel_size
        table = ray.util.placement_group_table(self.ctx.placement_group)
        return ranks_of(
            table["bundles"],
            table["bundles_to_node_id"],
            size=size,
            node=ray.get_runtime_context().get_node_id(),
            engine_node=self._engine_node,
        )


def ranks_of(
    bundles: Mapping[int, Mapping[str, float]],
    nodes: Mapping[int, str],
    *,
    size: int,
    node: str,
    engine_node: str | None,
) -> range:
    """Find the ranks that vLLM will put on a node: it fills the engine's node first, then the others.

    Versions of vLLM differ in the order of nodes after the first. So with three nodes or more only the ranks of the
    engine's node are known.

    Args:
        bundles: Number of a bundle -> its resources, of Ray's placement group.
        nodes: Number of a bundle -> id of its node.
        size: Ranks in all.
        node: Id of the node.
        engine_node: Id of the engine's node; None: not known.

    Returns:
        The ranks; empty where they are not known.
    """
    with_device = [
        index for index in sorted(bundles) if bundles[index].get("GPU") or bundles[index].get("TPU")
    ]
    chosen = [nodes[index] for index in (with_device or sorted(bundles))[:size]]
    if len(chosen) < size:
        return range(0)
    if set(chosen) == {node}:
        return range(size)
    first = chosen.count(engine_node) if engine_node is not None else 0
    if not first:
        return range(0)
    if node == engine_node:
        return range(first)
    return range(first, size) if set(chosen) == {node, engine_node} else range(0)


def prefetch_arguments(wanted: Wanted, ranks: range) -> list[str]:
    """Make the arguments of `shardprep-prefetch` that fetch `ranks` as vLLM loads them.

    Args:
        wanted: The set and the grid; its folder has the manifest, to whose digest the fetch is pinned.
        ranks: Ranks of this node.
    """
    manifest, digest = read_named(wanted.folder)
    arguments = [wanted.shard_set.source, "--engine", "vllm", "--ranks", f"{ranks[0]}-{ranks[-1]}"]
    arguments += ["--manifest-digest", digest]
    arguments += ["--tensor-parallel-size", str(wanted.tensor_parallel_size)]
    if wanted.pipeline_parallel_size > 1:
        stages = even_stages(
            manifest.layers, wanted.pipeline_parallel_size
        )  # vLLM's stages, which may differ from those of the split
        arguments += ["--stages", ",".join(f"{start}-{stop - 1}" for start, stop in stages)]
    if wanted.is_expert_parallel:
        arguments += ["--expert-parallel-size", str(wanted.tensor_parallel_size)]
    said = words_of(wanted.shard_set)
    for name in ("revision", "cache", "max_workers", "processes", "endpoint_url", "profile", "region"):
        if said[name] is not None:
            arguments += [f"--{name.replace('_', '-')}", str(said[name])]
    if said["no_sign_request"]:
        arguments.append("--no-sign-request")
    return [*arguments, "--", "true"]
