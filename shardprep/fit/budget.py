"""Add up the memory of the workers of one grid: weights, KV cache, and what running takes. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardprep_runtime.format.grid import Stages

from ..layout.stages import balance_stages
from .kv_cache import Kept
from .weights import Weights

RUNTIME_BYTES: Final = 2**30
"""Bytes that a process takes of a device before it does anything: context, kernels, libraries, buffers of collectives."""

CHUNK_TOKENS: Final = 2048
"""Tokens of prompts that are computed at a time. Engines cut longer prompts into chunks of about this size."""

HIDDEN_COPIES: Final = 8
"""Tensors as wide as the hidden state that a layer holds at the same time at most: residual, norms, queries, ..."""

INNER_COPIES: Final = 3
"""Tensors as wide as the MLP's units that an MLP holds at the same time: gate, up, and their product."""

LOGIT_BYTES: Final = 4
"""Bytes of a logit. Those of the last token of each sequence are gathered and sampled in float32."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a model on which the memory for computing depends."""

    hidden: int
    inner: int
    """Units of the MLP, or of all experts together that work on one token."""
    vocabulary: int
    dtype_bytes: int
    """Bytes of one number in the dtype that the model computes in."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The sequences that the workers have to hold at the same time."""

    context: int
    """Tokens of a sequence, prompt and answer together."""
    batch: int
    """Number of sequences."""
    reserve: int | None = None
    """Bytes of each device that neither weights nor KV cache may use; None: by the formula of `allowance`."""


@dataclass(frozen=True, slots=True)
class StageFit:
    """The memory of one stage. All bytes are those of one worker: the fullest, where workers differ."""

    layers: tuple[int, int]
    """Layers [start, stop) of the stage."""
    memory: int
    """Bytes of the device."""
    weights: int
    """Bytes of weights."""
    rank_weights: tuple[int, ...]
    """Bytes of weights of each tensor rank."""
    kv_token: int
    """Bytes of KV cache that one more token takes, while every sliding window has room."""
    state: int
    """Bytes that each sequence takes, however long it is."""
    kv_needed: int
    """Bytes that all sequences take at full length."""
    allowance: int
    """Bytes for the process and for what it computes."""
    left: int
    """Bytes that are left for KV cache; negative where not even the weights fit."""
    tokens: int | None
    """Tokens of all sequences together that the worker has room for; None: any number."""

    @property
    def spare(self) -> int:
        """Bytes of the device that are free when all sequences have full length; negative where so many are missing."""
        return self.left - self.kv_needed


@dataclass(frozen=True, slots=True)
class Transfer:
    """The traffic between workers for one token of one sequence."""

    tensor_bytes: int
    """Bytes that each worker sends in the all-reduces of all layers."""
    tensor_steps: int
    """Times that a worker waits for its neighbours in those all-reduces."""
    pipeline_bytes: int
    """Bytes sent from stage to stage, all hops together."""
    hops: int
    """Number of times that the token goes from one stage to the next."""


@dataclass(frozen=True, slots=True)
class GridFit:
    """One way of dividing the model, with the memory of each stage."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel_size: int
    stages: tuple[StageFit, ...]
    transfer: Transfer
    shard_bytes: int
    """Bytes of weights of the worker that has the most."""

    @property
    def devices(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def fits(self) -> bool:
        return all(stage.spare >= 0 for stage in self.stages)

    @property
    def spare(self) -> int:
        """Bytes that are free on the fullest device."""
        return min(stage.spare for stage in self.stages)

    @property
    def tokens(self) -> int | None:
        """Tokens that every stage has room for; None: any number."""
        return min((stage.tokens for stage in self.stages if stage.tokens is not None), default=None)

    @property
    def bounds(self) -> Stages:
        return tuple(stage.layers for stage in self.stages)


def allowance(shape: Shape, workload: Workload, *, ranks: int, last: bool) -> int:
    """Estimate the bytes that a worker needs for its process and for what it computes; docs/planning.md has the formula.

    Args:
        ranks: Tensor ranks of a stage.
        last: Whether the stage is the last one, which computes logits.
    """
    if workload.reserve is not None:
        return workload.reserve
    tokens = min(workload.context * workload.batch, CHUNK_TOKENS)
    width = HIDDEN_COPIES * shape.hidden + INNER_COPIES * -(-shape.inner // ranks)
    logits = workload.batch * shape.vocabulary * LOGIT_BYTES if last else 0
    return RUNTIME_BYTES + tokens * width * shape.dtype_bytes + logits


def transfer(shape: Shape, *, layers: int, ranks: int, stages: int) -> Transfer:
    """Count the traffic of a token: two all-reduces of the hidden state in each layer, and one hop from stage to stage.

    Args:
        layers: Layers of the model.
        ranks: Tensor ranks of each stage.
        stages: Number of stages.
    """
    state = shape.hidden * shape.dtype_bytes
    # in an all-reduce over a ring of n, each sends 2 (n - 1) messages of 1/n of the state
    return Transfer(
        tensor_bytes=2 * layers * state * 2 * (ranks - 1) // ranks,
        tensor_steps=2 * layers * 2 * (ranks - 1),
        pipeline_bytes=(stages - 1) * state,
        hops=stages - 1,
    )


def fill(
    weights: Weights,
    kept: Sequence[Kept],
    shape: Shape,
    workload: Workload,
    *,
    memory: Sequence[int],
    ranks: int,
    groups: int,
    needs: Sequence[Sequence[int]],
) -> GridFit | None:
    """Divide the model over devices so that the fullest is as empty as possible.

    Args:
        weights: Bytes of weights of each layer.
        kept: What each layer keeps of a sequence.
        memory: Bytes of each stage's device.
        ranks: Tensor ranks of each stage.
        groups: Groups of expert parallel ranks.
        needs: Groups of layers; each stage must hold at least one layer of each group.

    Returns:
        The grid; None where no such stages exist.
    """
    count = len(memory)
    beside = [weights.beside(first=i == 0, last=i == count - 1) for i in range(count)]
    reserve = [allowance(shape, workload, ranks=ranks, last=i == count - 1) for i in range(count)]
    sequence = [each.of_sequence(workload.context, ranks) for each in kept]
    stages = balance_stages(
        [max(own) + workload.batch * held for own, held in zip(weights.layers, sequence, strict=True)],
        [max(own) + more for own, more in zip(beside, reserve, strict=True)],
        memory,
        needs,
    )
    if stages is None:
        return None
    found = []
    for i, (start, stop) in enumerate(stages):
        own = weights.stage(start, stop, first=i == 0, last=i == count - 1)
        left = memory[i] - max(own) - reserve[i]
        found.append(
            StageFit(
                layers=(start, stop),
                memory=memory[i],
                weights=max(own),
                rank_weights=own,
                kv_token=sum(each.per_token(ranks) for each in kept[start:stop]),
                state=sum(each.constant(ranks) for each in kept[start:stop]),
                kv_needed=workload.batch * sum(sequence[start:stop]),
                allowance=reserve[i],
                left=left,
                tokens=_tokens(kept[start:stop], left, workload.batch, ranks),
            )
        )
    return GridFit(
        ranks,
        count,
        groups,
        tuple(found),
        transfer(shape, layers=len(kept), ranks=ranks, stages=count),
        max(stage.weights for stage in found),
    )


def _tokens(kept: Sequence[Kept], room: int, batch: int, ranks: int) -> int | None:
    """Tokens that `batch` sequences of the same length may have together in `room` bytes; None: any number."""
    room = room // batch - sum(each.constant(ranks) for each in kept)
    if room < 0:
        return 0
    growing = sum(each.per_token(ranks) for each in kept)
    length = 0
    windows = sorted((each.window, each.per_token(ranks)) for each in kept if each.window is not None)
    for window, token in windows:
        longest = length + room // growing if growing else None
        if longest is not None and longest < window:
            return batch * longest
        room -= growing * (window - length)
        length = window
        growing -= token
    return batch * (length + room // growing) if growing else None
