"""Load a rank of vLLM from a shard set: what belongs to it and nothing else, through vLLM's own weight loaders.

They are given tensors of the checkpoint's names and shapes of which this rank's blocks alone are there
(shardtensor.py), so what they make of them is what they would make of the checkpoint, or an error. Imports vLLM:
nothing imports this module but the entry point that vLLM calls (vllm_plugin.py).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm.config import LoadConfig, ModelConfig
from vllm.distributed import get_ep_group, get_pp_group, get_tp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from . import manifest as manifests
from .errors import InputError, LayoutError, ManifestError, quote
from .grid import Grid, Stages
from .load import load
from .manifest import Manifest
from .remote import DEFAULT_REVISION, read_manifest
from .shardtensor import shard_tensors
from .store import Access, is_uri, open_store

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

CONFIG: Final = "config.json"

WEIGHTS: Final = ("weight", "qweight", "qzeros", "scales", "weight_packed", "weight_scale")
"""What the names of parameters end in that a quantized checkpoint always has values for."""

logger = logging.getLogger("vllm.shardprep")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `--model-loader-extra-config` may say; the words are those of `shardprep_runtime.load`."""

    uri: str | None = None
    """Of the store that has the parts; None: they are in the model's folder."""
    revision: str = DEFAULT_REVISION
    manifest_digest: str | None = None
    verify: str = "blocks"
    cache: str | None = "host"
    workers: int | None = None
    processes: int = 1
    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False
    drafts: bool = True
    """Whether an ordinary checkpoint may be loaded beside the shard set: the draft model of speculative decoding."""

    @property
    def access(self) -> Access:
        return Access(
            endpoint_url=self.endpoint_url,
            profile=self.profile,
            region=self.region,
            anonymous=self.anonymous,
        )


def read_options(given: Mapping[str, Any]) -> Options:
    """Options from the JSON that vLLM was given. Raises InputError for what is not known, or of another type."""
    known = {field.name: field for field in dataclasses.fields(Options)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"--model-loader-extra-config: {quote(unknown[0])} is not known; shardprep takes {', '.join(known)}"
        )
    kinds = {
        "str": (str,), "str | None": (str, type(None)), "int": (int,), "int | None": (int, type(None)),
        "bool": (bool,),
    }  # fmt: skip
    for name, value in given.items():
        kind = str(known[name].type)
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise InputError(
                f"--model-loader-extra-config: {name} is {quote(value)}, expected {kind.replace('None', 'null')}"
            )
    options = Options(**given)
    if options.verify not in ("blocks", "headers", "off"):
        raise InputError(
            f"--model-loader-extra-config: verify is {quote(options.verify)}; use blocks, headers or off"
        )
    return options


class ShardprepLoader(BaseModelLoader):
    """`--load-format shardprep`. The model is a folder: a shard set's, or one with its side files (`Options.uri`)."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        extra = load_config.model_loader_extra_config
        self.options = read_options(extra if isinstance(extra, Mapping) else {})

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: a rank fetches its own when it loads."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill `model`, which is this rank's. Raises ShardprepError, and then nothing of the model may be used."""
        found = find_shard_set(model_config, self.options, is_draft=_is_draft(model_config))
        if found is None:
            self._load_default(model, model_config)
            return
        source, manifest, digest = found
        began = time.perf_counter()
        rank, grid = _place(manifest)
        stages = _stages(model_config, manifest)
        own = {name for name, _ in model.named_parameters()}
        options = self.options
        with load(
            source,
            rank=rank,
            tensor_parallel_size=grid.tensor_parallel_size,
            pipeline_parallel_size=grid.pipeline_parallel_size,
            expert_parallel_size=grid.expert_parallel_size,
            stages=stages,
            engine="vllm",
            also=[
                name
                for name, entry in manifest.tensors.items()
                if name in own and isinstance(entry.layer, str)
            ],
            verify=options.verify,  # type: ignore[arg-type] # read_options has looked
            manifest_digest=digest,
            workers=options.workers,
            processes=options.processes,
            revision=options.revision,
            cache=options.cache,
            access=options.access,
        ) as shard:
            loaded = model.load_weights(shard_tensors(shard, manifest))  # type: ignore[operator]
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
                options.verify,
                time.perf_counter() - began,
            )

    def _load_default(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load an ordinary checkpoint as vLLM itself would."""
        if not self.options.drafts:
            raise ManifestError(
                f"{quote(model_config.model)}: no shard set, and ordinary checkpoints were not allowed (drafts)"
            )
        logger.info(
            "shardprep: %s is no shard set; vLLM's own loader loads it, unverified", model_config.model
        )
        _default(self.load_config).load_weights(model, model_config)

    def _check_filled(
        self, model: torch.nn.Module, model_config: ModelConfig, loaded: set[str] | None
    ) -> None:
        """Raises where a parameter that holds weights has got nothing."""
        if loaded is None:  # a model that does not say
            return
        if model_config.quantization is None:
            # vLLM's own check, which knows what no checkpoint has; in some versions a matter of each loader
            check = getattr(DefaultModelLoader, "track_weights_loading", None)
            if check is not None:
                check(_default(self.load_config), model, loaded)
                return
        # of a quantized model vLLM checks nothing: some of its parameters are in no checkpoint
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


def _default(load_config: LoadConfig) -> DefaultModelLoader:
    return DefaultModelLoader(
        dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
    )


def find_shard_set(
    model_config: ModelConfig, options: Options, *, is_draft: bool = False
) -> tuple[str | Path, Manifest, str] | None:
    """(where its parts are, manifest, its digest) of the shard set that `model_config` means; None: no shard set.

    The manifest in the model's folder says which it is, wherever the parts are; without one there `options.uri` does,
    and config.json in the folder must be that shard set's. Raises ManifestError or InputError.
    """
    folder = Path(getattr(model_config, "model_weights", "") or model_config.model)
    if (folder / manifests.FILE_NAME).is_file():
        raw = (folder / manifests.FILE_NAME).read_bytes()
        digest = manifests.digest_of(raw)
        pinned = None if is_draft else options.manifest_digest
        manifest = manifests.read(folder, digest=pinned or digest)
        _check_config(folder, manifest)
        store = None if is_draft else options.uri
        whole = all((folder / part.path).exists() for part in manifest.parts)
        return (store if store is not None and not whole else folder), manifest, digest
    if options.uri is None or is_draft:
        return None
    if not is_uri(options.uri):
        raise InputError(f"uri is {quote(options.uri)}; expected s3://bucket/prefix, gs:// or az://")
    with open_store(options.uri, options.access) as opened:
        raw, manifest = read_manifest(opened, options.revision, options.manifest_digest)
    _check_config(folder, manifest)
    return options.uri, manifest, manifests.digest_of(raw)


def _check_config(folder: Path, manifest: Manifest) -> None:
    """Raises ManifestError where the model that vLLM has built is not the shard set's, by its config.json."""
    expected = next((side for side in manifest.side_files if side.path == CONFIG), None)
    if expected is None:
        raise ManifestError(
            f"the shard set has no {CONFIG}: nothing says that its weights are those of {quote(folder)}"
        )
    try:
        found = manifests.digest_of((folder / CONFIG).read_bytes())
    except OSError as error:
        raise ManifestError(f"{quote(folder / CONFIG)}: cannot be read: {error.strerror}") from None
    if found != expected.digest:
        raise ManifestError(
            f"{quote(folder / CONFIG)}: {found}, but the shard set's is {expected.digest}: another model's, or an "
            f"edited one. Fetch it with `shardprep pull --no-weights`, and change values with vLLM's --hf-overrides"
        )


def _is_draft(model_config: ModelConfig) -> bool:
    """Whether this is the draft model of speculative decoding, which is loaded beside the model that is served."""
    config = _vllm_config()
    speculative = config.speculative_config if config is not None else None
    return speculative is not None and getattr(speculative, "draft_model_config", None) is model_config


def _vllm_config() -> VllmConfig | None:
    from vllm.config import get_current_vllm_config_or_none  # not in all versions that can register a loader

    return get_current_vllm_config_or_none()


def _place(manifest: Manifest) -> tuple[int, Grid]:
    """This process's rank, and the grid, as vLLM's groups have them. Raises LayoutError."""
    tensor, pipeline = get_tp_group(), get_pp_group()
    rank = pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group
    grid = Grid(tensor.world_size, pipeline.world_size)
    config = _vllm_config()
    if config is None or not manifest.experts:
        return rank, grid
    parallel = config.parallel_config
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
    """The layers of each stage, as vLLM deals them out. What follows the last belongs to the last stage."""
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
