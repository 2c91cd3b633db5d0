"""Say how a model can be divided so that its weights, its KV cache and what running takes fit the devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import InputError, LayoutError, quote
from shardprep_runtime.format.manifest import TORCH
from shardprep_runtime.stores.store import Access

from ..layout.rules import text_config
from ..model.describe import QUANTIZERS, quantized, read_model
from .budget import GridFit, Workload
from .search import KV_BYTES, MOST_DEVICES, Devices, Refused, Search, gib

CONTEXT: Final = 8192
"""Tokens of a sequence by default; fewer where the model was made for fewer."""

TRIES: Final = 24
"""Number of shorter contexts that are tried when looking for one that fits."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that the bytes of a grid take over the network."""

    tensor_token: float
    """Seconds of a token's all-reduces, if tensor ranks are on several hosts."""
    pipeline_token: float
    """Seconds that a token takes from stage to stage."""
    tensor_prefill: float
    """Seconds of the all-reduces of a prompt that fills the context."""
    pipeline_prefill: float
    """Seconds that such a prompt takes from stage to stage."""
    cold_checkpoint: float
    """Seconds until a worker has read the whole checkpoint."""
    cold_shard: float
    """Seconds until a worker has read its own shard alone."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a model fits the devices, and what would make it fit where it does not."""

    source: Path | str
    model_type: str
    architecture: str | None
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    quantization: str | None
    """The method by which the model is quantized; None where it is not."""
    quantize: bool
    """Whether the model would have to be quantized so first."""
    layers: int
    experts: int
    engine: str
    workload: Workload
    kv_dtype: str
    kv_token: int
    """Bytes of KV cache that one token takes in all layers together."""
    kv_sequence: int
    """Bytes that one sequence of the whole context takes, with its state."""
    state: int
    """Bytes that one sequence takes, however long it is."""
    attention: Mapping[str, int]
    """Type of layer -> number of layers."""
    devices: Devices
    grids: tuple[GridFit, ...]
    """All grids that were looked at, the fewest devices first."""
    refused: tuple[Refused, ...]
    """Tensor parallel sizes that the model does not allow."""
    recommended: GridFit | None
    """The best grid that fits; None where none does."""
    reasons: tuple[str, ...]
    """Sentences that say why this grid is recommended, or why none is."""
    advice: tuple[str, ...]
    """Changes that would make the model fit, where no grid does; each was tried."""
    notes: tuple[str, ...]
    """Sentences about what had to be assumed."""
    network: int | None
    """Bytes a second between hosts."""
    bandwidth: int | None
    """Bytes a second from where the weights lie to each worker."""

    def times(self, grid: GridFit) -> Times | None:
        """Give the seconds that a grid's bytes take; None where the speed of the network is unknown."""
        network, bandwidth = self.network or self.bandwidth, self.bandwidth or self.network
        if network is None or bandwidth is None:
            return None
        tensor, pipeline = grid.transfer.tensor_bytes / network, grid.transfer.pipeline_bytes / network
        tokens = self.workload.context
        whole, own = self.nbytes / bandwidth, grid.shard_bytes / bandwidth
        return Times(tensor, pipeline, tensor * tokens, pipeline * tokens, whole, own)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """What the workers are to do, and how the model may be divided among them."""

    context: int | None = None
    """Tokens of a sequence, prompt and answer together; None: the model's, at most 8192."""
    batch: int = 1
    """Sequences at a time."""
    kv_dtype: str = "auto"
    """dtype of the KV cache: `auto` (as the model), fp8, bf16, fp16 or fp32."""
    reserve: int | None = None
    """Bytes of each device that neither weights nor KV cache may use; None: by a formula."""
    quantize: str | None = None
    """Plan for a model that is not quantized as awq or gptq would leave it, in 4 bits."""
    group_size: int = 128
    """Numbers of a row that share a scale, where `quantize` is given."""
    engine: str = TORCH
    """Engine whose cuts are planned, where engines differ: torch, transformers or vllm."""
    allow_generic: bool = False
    """Cut the rows of the linears of a model type that has no rules."""
    tensor_parallel_size: int | None = None
    """The largest tensor parallel size that may be recommended; None: any."""


def plan_fit(
    source: Path | str,
    devices: Devices,
    options: FitOptions = FitOptions(),
    *,
    network: int | None = None,
    bandwidth: int | None = None,
    access: Access | None = None,
) -> FitReport:
    """Find out how a model fits devices, and which grid is best. Reads headers alone, or a config.json alone.

        report = plan_fit("hf://org/name", Devices((24 * 2**30,)), FitOptions(context=8192, batch=4))
        if report.recommended:
            print(report.recommended.tensor_parallel_size, report.recommended.bounds)

    Args:
        source: A checkpoint, a shard set, a URI or a config.json.
        devices: The devices that the model may be divided among.
        options: What is asked for.
        network: Bytes a second between hosts.
        bandwidth: Bytes a second from where the weights lie to each worker.
        access: Endpoint, profile and the like of a store.

    Raises:
        InputError: For a model, or for devices, that cannot be planned.
    """
    model = read_model(
        source,
        quantize=options.quantize,
        group_size=options.group_size,
        allow_generic=options.allow_generic,
        access=access,
    )
    text = text_config(model.config)
    longest = next((text[key] for key in POSITIONS if type(text.get(key)) is int), None)
    context = min(longest or CONTEXT, CONTEXT) if options.context is None else options.context
    batch, engine = options.batch, options.engine
    if context < 1 or batch < 1:
        raise InputError(f"{batch} sequences of {context} tokens: at least one of one is needed")
    notes = [*model.notes]
    if longest is not None and context > longest:
        notes.append(
            f"{context} tokens are more than the {longest} that config.json says the model was made for"
        )
    if engine != TORCH and engine not in model.layout.engines:
        known = ", ".join((TORCH, *model.layout.engines))
        raise LayoutError(
            f"how {engine} cuts a {quote(model.layout.model_type)} is not known; known are {known}"
        )
    workload = Workload(context, batch, options.reserve)
    search = Search(model, workload, devices, options.kv_dtype, engine, options.tensor_parallel_size)
    search.run()
    best = search.best()
    kept = search.kept
    return FitReport(
        source=source,
        model_type=model.layout.model_type,
        architecture=_architecture(model.config),
        parameters=model.packed.parameters,
        nbytes=model.nbytes,
        dtypes=model.dtypes(),
        quantization=model.quantization,
        quantize=options.quantize is not None,
        layers=model.layout.layers,
        experts=model.layout.experts,
        engine=engine,
        workload=workload,
        kv_dtype=search.kv_dtype,
        kv_token=sum(each.per_token(1) for each in kept),
        kv_sequence=sum(each.of_sequence(context, 1) for each in kept),
        state=sum(each.constant(1) for each in kept),
        attention=Counter(each.kind for each in kept),
        devices=search.devices,
        grids=tuple(sorted(search.grids, key=_order)),
        refused=tuple(search.refused.values()),
        recommended=best,
        reasons=tuple(_reasons(search, best)),
        advice=() if best else tuple(_advise(search, options.group_size)),
        notes=(*notes, *search.notes()),
        network=network,
        bandwidth=bandwidth,
    )


POSITIONS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Keys of configs for the longest sequence that the model was made for."""


def _architecture(config: Mapping[str, Any]) -> str | None:
    found = config.get("architectures")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else None


def _order(grid: GridFit) -> tuple[int, int, int]:
    return grid.devices, -grid.tensor_parallel_size, grid.expert_parallel_size


def _named(grid: GridFit) -> str:
    expert = f" x EP {grid.expert_parallel_size}" if grid.expert_parallel_size > 1 else ""
    return f"TP {grid.tensor_parallel_size} x PP {grid.pipeline_parallel_size}{expert}"


def _reasons(search: Search, best: GridFit | None) -> Iterator[str]:
    """Say why this grid and no other; without a grid, what the nearest one lacks."""
    if best is None:
        nearest = max(search.grids, key=lambda grid: grid.spare, default=None)
        if nearest is not None:
            yield f"the nearest, {_named(nearest)}, is short of {gib(-nearest.spare)} on its fullest device"
        else:
            yield "no grid of these devices can be made of this model"
        return
    given = len(search.devices.memory)
    lacking = [grid for grid in search.grids if grid.devices < best.devices]
    fewer = min((grid for grid in lacking if grid.fits), key=_order, default=None)
    if fewer is not None:
        yield f"all {given} devices are used; {fewer.devices} would do: {_named(fewer)}"
    elif lacking:
        nearest = max(lacking, key=lambda grid: (grid.devices, grid.spare))
        yield (
            f"fewer devices do not fit: {_named(nearest)} is short of {gib(-nearest.spare)} on its fullest device"
        )
    size = best.tensor_parallel_size
    finer = [each for each in search.refused if size < each <= best.devices and best.devices % each == 0]
    if best.pipeline_parallel_size > 1 and finer:
        yield f"stages rather than more tensor ranks: TP {finer[0]} is not possible"
    elif 1 < size <= search.devices.per_host:
        yield f"tensor ranks within a host of {search.devices.per_host} before stages: they work on a token together"
    if size > search.devices.per_host:
        yield f"TP {size} goes beyond a host of {search.devices.per_host}: its all-reduces cross the network"
    together = [
        grid
        for grid in search.grids
        if grid.fits and grid.pipeline_parallel_size == 1 and grid.devices <= search.devices.per_host
    ]
    faster = min(together, key=_order, default=None)
    if best.pipeline_parallel_size > 1 and given == 1 and faster is not None:
        more = faster.devices - best.devices
        yield f"{more} more would allow {_named(faster)}, whose ranks work on a token together: faster for one sequence"
    grouped = [
        grid
        for grid in search.grids
        if grid.expert_parallel_size > 1 and (grid.tensor_parallel_size, grid.bounds) == (size, best.bounds)
    ]
    if grouped and all(grid.shard_bytes == best.shard_bytes for grid in grouped):
        yield "expert parallelism holds the same bytes here; take it for speed, not for room"
    if best.tokens is not None:
        yield (
            f"the fullest device has {gib(best.spare)} to spare; there is room for {best.tokens:,} tokens "
            f"where {search.workload.context * search.workload.batch:,} are asked for"
        )


def _advise(search: Search, group_size: int) -> Iterator[str]:
    """Say what would make the model fit; each change is tried before it is named."""
    memory, workload = search.devices.memory, search.workload
    found = None
    if len(memory) > 1:
        largest = max(memory)
        needed = search.model.nbytes + workload.batch * sum(
            each.of_sequence(workload.context, 1) for each in search.kept
        )
        least_extra = max((needed - sum(memory)) // largest, 1)
        for extra in range(least_extra, least_extra + 32):
            more = tuple(sorted((*memory, *(largest,) * extra), reverse=True))
            found = search.again(devices=replace(search.devices, memory=more))
            if found is not None:
                yield f"{extra} more of {gib(largest)}: {_named(found)} on {found.devices} devices"
                break
    elif search.most == MOST_DEVICES:
        found = search.again(most=8 * MOST_DEVICES)
        if found is not None:
            yield f"more devices: {_named(found)} on {found.devices}"
    if workload.batch > 1 and search.again(workload=replace(workload, batch=1)) is not None:
        yield "one sequence at a time (--batch 1)"
    least = search.again(workload=replace(workload, context=1))
    if least is not None and least.tokens is not None:
        context = least.tokens // workload.batch
        # by trying: another context gets other stages, and other room to compute
        for _ in range(TRIES):
            if not context or search.again(workload=replace(workload, context=context)) is not None:
                break
            context = context * 15 // 16
        else:
            context = 0
        if context:
            yield f"a shorter context: --context {context}"
    if KV_BYTES[search.kv_dtype] > 1 and search.again(kv_dtype="fp8") is not None:
        yield "a KV cache of half the size (--kv-dtype fp8)"
    if search.model.quantization is None:
        small = quantized(search.model, QUANTIZERS[0], group_size)
        found = search.again(model=small)
        if found is not None:
            yield (
                f"4-bit weights (--quantize {QUANTIZERS[0]}), {small.nbytes / 1e9:.1f} GB instead of "
                f"{search.model.nbytes / 1e9:.1f}: {_named(found)} on {found.devices} device(s)"
            )
