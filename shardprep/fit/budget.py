"""Add up what the workers of one grid hold and have room for: weights, KV cache, what running takes. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardprep_runtime.format.grid import Stages

from ..layout.stages import balance_stages
from .kv_cache import Kept
from .weights import Weights

RUNTIME_BYTES: Final = 2**30
"""What a process takes of a device before it does anything: context, kernels, libraries, buffers of collectives."""

CHUNK_TOKENS: Final = 2048
"""Tokens of prompts that are worked on at a time; engines cut longer ones into chunks of about this."""

HIDDEN_COPIES: Final = 8
"""Tensors as wide as the hidden state that are alive at the widest place of a layer: residual, norms, queries, ..."""

INNER_COPIES: Final = 3
"""Tensors as wide as the MLP's inside: gate, up, and their product."""

LOGIT_BYTES: Final = 4
"""Of one logit of the last token of a sequence; they are gathered and sampled in float32."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a model that what is computed depends on."""

    hidden: int
    inner: int
    """Of the MLP, or of all experts that work on one token."""
    vocabulary: int
    dtype_bytes: int
    """Of one number that is computed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the workers are to do at the same time."""

    context: int
    """Tokens of a sequence, prompt and answer together."""
    batch: int
    """Sequences."""
    reserve: int | None = None
    """Bytes of each device that are for neither weights nor KV cache; None: by the formula."""


@dataclass(frozen=True, slots=True)
class StageFit:
    """One stage: what each of its workers holds. All bytes are of one worker, of the fullest where they differ."""

    layers: tuple[int, int]
    """[start, stop)."""
    memory: int
    """Of the device."""
    weights: int
    rank_weights: tuple[int, ...]
    """Bytes of weights of each tensor rank."""
    kv_token: int
    """Bytes of KV cache that one more token takes, while every window has room."""
    state: int
    """Bytes of a sequence however long it is."""
    kv_needed: int
    """Bytes of all sequences at full length."""
    allowance: int
    """Bytes for the process and what it computes."""
    left: int
    """Bytes that are left for KV cache; negative where not even the weights fit."""
    tokens: int | None
    """Tokens that it has room for, of as many sequences; None: any number."""

    @property
    def spare(self) -> int:
        """Bytes that are left of the device when all sequences are at full length; negative: so many are missing."""
        return self.left - self.kv_needed


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one token of one sequence sends between workers."""

    tensor_bytes: int
    """That each worker sends, through all layers, in all-reduces."""
    tensor_steps: int
    """Times that one waits for its neighbours meanwhile."""
    pipeline_bytes: int
    """From stage to stage, all hops together."""
    hops: int


@dataclass(frozen=True, slots=True)
class GridFit:
    """One way of dividing the model."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel_size: int
    stages: tuple[StageFit, ...]
    transfer: Transfer
    shard_bytes: int
    """Weights of the worker that has most of them."""

    @property
    def devices(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def fits(self) -> bool:
        return all(stage.spare >= 0 for stage in self.stages)

    @property
    def spare(self) -> int:
        """Of the fullest device."""
        return min(stage.spare for stage in self.stages)

    @property
    def tokens(self) -> int | None:
        """Tokens that every stage has room for; None: any number."""
        return min((stage.tokens for stage in self.stages if stage.tokens is not None), default=None)

    @property
    def bounds(self) -> Stages:
        return tuple(stage.layers for stage in self.stages)


def allowance(shape: Shape, workload: Workload, *, ranks: int, last: bool) -> int:
    """Bytes of a worker for its process and for what it computes: docs/planning.md has the formula."""
    if workload.reserve is not None:
        return workload.reserve
    tokens = min(workload.context * workload.batch, CHUNK_TOKENS)
    width = HIDDEN_COPIES * shape.hidden + INNER_COPIES * -(-shape.inner // ranks)
    logits = workload.batch * shape.vocabulary * LOGIT_BYTES if last else 0
    return RUNTIME_BYTES + tokens * width * shape.dtype_bytes + logits


def transfer(shape: Shape, *, layers: int, ranks: int, stages: int) -> Transfer:
    """Two all-reduces of the hidden state a layer, in rings; the hidden state once from stage to stage."""
    state = shape.hidden * shape.dtype_bytes
    # in a ring of n each sends 2 (n - 1) messages of 1/n
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
    """The grid whose stages have devices of `memory`, balanced; None where there are no such stages.

    Args:
        ranks: Tensor ranks of each stage.
        groups: Of expert parallel ranks.
        needs: Groups of layers; each stage must hold one of each group.
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
    """Tokens that `batch` sequences of the same length may have in all in `room` bytes; None: any number."""
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
