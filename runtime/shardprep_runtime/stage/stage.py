"""Hold one pipeline stage of a model: build it from a shard set, run positions of sequences through it.

    with build_stage("s3://bucket/llama-70b", pp_rank=1, pipeline_parallel_size=2) as stage:
        hidden = stage.step("a", hidden, past=0)

It serves any causal language model that transformers builds of one list of layers. Others are refused, with the reason.
torch and transformers are imported when a stage is built. In shapes, B is the batch, L positions of a step, H the
hidden size and V the vocabulary.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ..engines.transformers_state import WHOLE
from ..errors import CacheLostError, InputError, LayoutError, UnsupportedError, quote
from ..format import manifest as manifests
from ..format.manifest import TRANSFORMERS, Manifest
from ..format.view import Place
from ..format.write_manifest import dump_manifest
from ..shard.prefetch import Prefetch
from ..shard.shard import Shard
from ..shard.shard_set import ShardSet, open_set

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig

    from .kv_cache import StageCache
    from .relay import Built

Keep = Literal["last", "all"]
"""Which positions of a step the last stage computes logits for: the last one, or all."""

MAX_SEQUENCES: Final = 64
"""How many sequences a stage keeps caches of, unless it is told otherwise."""


class Stage:
    """Layers [start, stop) of a model. The first stage has the embedding too, the last one the norm and the head.

    Safe to use from several threads, which wait for each other. `build_stage` and `stage_of` make it; `close` frees it.
    """

    def __init__(
        self,
        built: Built,
        shard: Shard,
        *,
        config: PreTrainedConfig,
        manifest_digest: str,
        device: torch.device,
        max_sequences: int,
    ) -> None:
        """Wrap a module that was built.

        Args:
            built: The module, and how it is run.
            shard: What it was built from; stays the caller's to close.
            config: The whole model's.
            manifest_digest: `sha256:...` of the set's manifest.
            device: Where the module is.
            max_sequences: How many sequences' caches are kept.
        """
        self.pp_rank = shard.view.pp_rank
        self.pipeline_parallel_size = shard.view.grid.pipeline_parallel_size
        self.layers = shard.view.layers
        self.is_first = self.pp_rank == 0
        self.is_last = self.pp_rank == self.pipeline_parallel_size - 1
        self.config = config
        """The configuration of the whole model, not of its layers here alone."""
        self.hidden_size = built.hidden_size
        text: Any = config.get_text_config(decoder=True)
        self.vocab_size: int = text.vocab_size
        found = getattr(text, "max_position_embeddings", None)
        self.max_positions: int | None = found if isinstance(found, int) and found > 0 else None
        self.dtype = built.dtype
        self.device = device
        self.module: nn.Module = built.module
        self.layer_modules = built.layers
        self.manifest: Manifest = shard.manifest
        self.manifest_digest = manifest_digest
        self.bytes_fetched = shard.bytes_fetched
        """Bytes of tensors that this process brought from a store."""
        self.nbytes = _nbytes(built.module)
        """Bytes of the tensors that the stage holds; tied ones count once."""
        self._built: Built | None = built
        self._max_sequences = max_sequences
        self._caches: OrderedDict[str, StageCache] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def can_crop(self) -> bool:
        """Whether a sequence can forget its last positions. It depends on the architecture alone.

        Linear attention, say, cannot: it does not keep past states. A step that begins before the end of what is cached
        raises CacheLostError there.
        """
        from .kv_cache import can_crop_layer

        return self._can_cache() and all(map(can_crop_layer, self._new_cache(1).own))

    @property
    def sequences(self) -> Mapping[str, int]:
        """Sequence -> how many positions of it are cached; the least recently used first."""
        with self._lock:
            return {name: cache.positions for name, cache in self._caches.items()}

    def step(self, sequence: str, inputs: torch.Tensor, past: int, keep: Keep = "last") -> torch.Tensor:
        """Run positions [past, past + L) of a sequence through the stage, and cache their keys and values.

        Args:
            sequence: The sequence's name, which the caller chooses.
            inputs: The first stage takes ids of tokens, [B, L] int64. Others take what the stage before gave: hidden
                states, [B, L, H], of `dtype`, or float32 where a model keeps them so.
            past: Positions before these. 0 begins the sequence anew. Where more are cached, the rest is forgotten.
            keep: Which positions the last stage computes logits for.

        Returns:
            Hidden states [B, L, H], or logits [B, 1 or L, V] from the last stage, on the stage's device.

        Raises:
            InputError: For inputs that do not fit, or a stage that was closed.
            UnsupportedError: For a model whose caches are not known here.
            CacheLostError: Where less than `past` is cached, or what is cached beyond cannot be forgotten.
        """
        import torch

        with self._lock:
            built = self._open()
            given = self._checked(inputs, past)
            if not self._can_cache():
                raise UnsupportedError(
                    f"{quote(self.config.model_type)}: it keeps its past in a way of its own, which cannot be split"
                )
            cache = self._cache_of(sequence, past, len(inputs))
            try:
                with torch.no_grad():
                    found = self._run(built, given, keep, cache)
                cache.end(inputs.shape[1])
            except BaseException:
                self._caches.pop(sequence, None)  # some layers have cached the positions, others not
                raise
            return found

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run whole sequences through the stage. Caches nothing; gradients can flow back.

        Args:
            inputs: As `step` takes them, from position 0 on.

        Returns:
            Hidden states [B, L, H], or logits [B, L, V] from the last stage.

        Raises:
            InputError: For inputs that do not fit, or a stage that was closed.
        """
        with self._lock:
            return self._run(self._open(), self._checked(inputs, 0), "all", None)

    def reset(self, sequence: str) -> None:
        """Forget a sequence, if it is known."""
        with self._lock:
            self._caches.pop(sequence, None)

    def swap_caches(self, caches: OrderedDict[str, StageCache]) -> OrderedDict[str, StageCache]:
        """Take the caches of another stage of the same layers, and give away this one's.

        It is for layers that are built anew for each step.
        """
        with self._lock:
            found, self._caches = self._caches, caches
            return found

    def close(self) -> None:
        """Forget the caches, and free the model's tensors at once: `module` can no longer be used."""
        import torch

        with self._lock:
            self._caches.clear()
            if self._built is not None:
                # the module refers to itself: Python alone would free it some time later
                for tensor in (*self.module.parameters(), *self.module.buffers()):
                    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
                    local.data = torch.empty(0, dtype=local.dtype, device=local.device)
            self._built = None
            self.layer_modules = []
            self.__dict__.pop("module", None)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- how it is done
    def _open(self) -> Built:
        if self._built is None:
            raise InputError("this stage was closed")
        return self._built

    def _can_cache(self) -> bool:
        return self._open().cache_name is not None

    def _new_cache(self, batch: int) -> StageCache:
        from .kv_cache import StageCache

        return StageCache(self._open().module.config, *self.layers, batch)

    def _checked(self, inputs: torch.Tensor, past: int) -> torch.Tensor:
        """The inputs, moved to the stage's device. Raises InputError for those that do not fit."""
        import torch

        dims, dtypes = (2, [torch.int64]) if self.is_first else (3, [self.dtype, torch.float32])
        what = "ids of tokens" if self.is_first else "hidden states"
        if inputs.dim() != dims or inputs.dtype not in dtypes or not all(inputs.shape):
            raise InputError(
                f"stage {self.pp_rank} takes {what}, {dims} dims of {dtypes[0]}, none empty; this is a tensor of "
                f"{inputs.dtype} and shape {list(inputs.shape)}"
            )
        if self.is_first:
            low, high = inputs.aminmax()
            if int(low) < 0 or int(high) >= self.vocab_size:
                wrong = int(low) if int(low) < 0 else int(high)
                raise InputError(f"token {wrong}: this model knows {self.vocab_size}")
        elif inputs.shape[-1] != self.hidden_size:
            raise InputError(f"hidden states of {inputs.shape[-1]}; this model's are {self.hidden_size}")
        if past < 0:
            raise InputError(f"{past} positions before this step; expected at least 0")
        if self.max_positions is not None and past + inputs.shape[1] > self.max_positions:
            raise InputError(
                f"{past + inputs.shape[1]} positions; this model has at most {self.max_positions}"
            )
        return inputs.to(self.device)

    def _cache_of(self, sequence: str, past: int, batch: int) -> StageCache:
        """The sequence's cache, cut to `past` positions; it becomes the most recently used."""
        if past == 0:
            self._caches.pop(sequence, None)
            while len(self._caches) >= self._max_sequences:
                self._caches.popitem(last=False)
            self._caches[sequence] = self._new_cache(batch)
        cache = self._caches.get(sequence)
        if cache is None:
            raise CacheLostError(f"{quote(sequence)}: no such sequence here; send it from its beginning")
        if cache.batch != batch:
            raise InputError(
                f"{quote(sequence)}: a batch of {batch}, but the sequence began with one of {cache.batch}"
            )
        try:
            cache.begin(past)
        except CacheLostError as error:
            raise CacheLostError(f"{quote(sequence)}: {error}") from None
        self._caches.move_to_end(sequence)
        return cache

    def _run(self, built: Built, given: torch.Tensor, keep: Keep, cache: StageCache | None) -> torch.Tensor:
        import torch

        from .relay import forward

        ids, hidden = given, None
        if not self.is_first:
            ids, hidden = torch.zeros(given.shape[:2], dtype=torch.int64, device=self.device), given
        return forward(built, ids, hidden, keep=1 if keep == "last" else 0, cache=cache)


def build_stage(
    source: str | os.PathLike[str] | ShardSet,
    *,
    pp_rank: int = 0,
    pipeline_parallel_size: int | None = None,
    stages: Sequence[Sequence[int]] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    max_sequences: int = MAX_SEQUENCES,
    trainable: bool = False,
) -> Stage:
    """Build a pipeline stage of a shard set; nothing outside of the stage gets memory.

        with build_stage("s3://bucket/llama-70b", pp_rank=0, pipeline_parallel_size=2) as stage:
            hidden = stage.step("a", torch.tensor([[1, 15043]]), past=0)  # [1, 2, H]

    Args:
        source: A folder, a URI, or what `open_set` gives.
        pp_rank: Which stage, from 0.
        pipeline_parallel_size: How many stages; default: as many as `stages`, else one.
        stages: Layers [start, stop) of each stage; default: those of the split, else even ones.
        device: Where the weights go.
        dtype: Type that the weights are cast to as they load; default: the checkpoint's, whose tensors then stay
            mapped.
        max_sequences: How many sequences' caches are kept; the least recently used are forgotten.
        trainable: Copy the weights, and keep gradients for them.

    Returns:
        The stage, which the caller closes.

    Raises:
        UnsupportedError: For a model that cannot be split so.
        LayoutError: Where its weights would be missing in part.
        ShardprepError: What `ShardSet.load` raises.
    """
    shard_set = open_set(source)
    place = Place.of_stage(pp_rank, stages=stages, pipeline_parallel_size=pipeline_parallel_size)
    with shard_set.side_files() as folder, shard_set.load(place) as shard:
        return stage_of(
            shard,
            folder,
            device=device,
            dtype=dtype,
            max_sequences=max_sequences,
            trainable=trainable,
            manifest_digest=shard_set.digest,
        )


def stage_of(
    source: Shard | Prefetch,
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    max_sequences: int = MAX_SEQUENCES,
    trainable: bool = False,
    manifest_digest: str | None = None,
) -> Stage:
    """Build the stage of a shard that was loaded, or is being fetched, at a `Place.of_stage`.

    Args:
        source: The shard, which stays the caller's to close, or the prefetch of it.
        folder: A folder with the set's config.json.
        device: Where the weights go.
        dtype: As `build_stage` has it.
        mesh: The stage's tensor ranks, in one dim; None where there is one rank.
        max_sequences: As `build_stage` has it.
        trainable: As `build_stage` has it.
        manifest_digest: `sha256:...` of the manifest, where the caller knows it.

    Returns:
        The stage, which the caller closes.

    Raises:
        UnsupportedError, LayoutError: As `build_stage` does.
    """
    shard = source.shard() if isinstance(source, Prefetch) else source
    grid, view = shard.view.grid, shard.view
    if max_sequences < 1:
        raise InputError(f"max_sequences must be at least 1, not {max_sequences}")
    if grid.expert_parallel_size > 1:
        raise UnsupportedError(
            "a stage does not share experts among its tensor ranks: leave expert_parallel_size out"
        )
    if grid.tensor_parallel_size > 1 and view.engine != TRANSFORMERS:
        raise LayoutError(
            f"this shard is cut as {quote(view.engine)} asks; pass engine={TRANSFORMERS!r} to what loads it"
        )
    quantization = shard.manifest.quantization
    if quantization is not None and quantization.method in WHOLE and grid.tensor_parallel_size > 1:
        raise UnsupportedError(
            f"{quote(quantization.method)} at tensor parallel size {grid.tensor_parallel_size}: transformers does not cut "
            "these linears; use more stages of one rank"
        )
    sizes = 1 if mesh is None else mesh.size()
    if sizes != grid.tensor_parallel_size or (mesh is not None and mesh.ndim != 1):
        raise LayoutError(
            f"{grid.tensor_parallel_size} tensor ranks need a mesh of one dim and as many processes; this one has {sizes}"
        )
    import torch

    from .model import build_model, read_config

    config = read_config(Path(folder))
    place = torch.device(device)
    built = build_model(
        config,
        shard,
        _cuts(shard),
        dtype=_dtype(dtype, config),
        device=place,
        mesh=mesh,
        trainable=trainable,
    )
    return Stage(
        built,
        shard,
        config=config,
        manifest_digest=manifest_digest or _digest(shard, Path(folder)),
        device=place,
        max_sequences=max_sequences,
    )


def _cuts(shard: Shard) -> list[int]:
    """The layers in front of which the model is cut, as far as this stage is concerned."""
    start, stop = shard.view.layers
    return [cut for cut in (start, stop) if 0 < cut < shard.manifest.layers]


def _digest(shard: Shard, folder: Path) -> str:
    """The manifest's digest, by its file where that lies in the folder."""
    file = folder / manifests.FILE_NAME
    return manifests.digest_of(file.read_bytes() if file.is_file() else dump_manifest(shard.manifest))


def _nbytes(module: nn.Module) -> int:
    found = {}
    for tensor in (*module.parameters(), *module.buffers()):
        local: Any = getattr(tensor, "_local_tensor", tensor)
        found[id(tensor)] = local.nbytes
    return sum(found.values())


def _dtype(wanted: str | torch.dtype | None, config: PreTrainedConfig) -> torch.dtype:
    import torch

    found: Any = wanted if wanted is not None else config.dtype or config.get_text_config(decoder=True).dtype
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if found is None:
        found = torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {quote(wanted)}: expected float32, bfloat16 or float16")
    return found
