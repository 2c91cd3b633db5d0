"""What was proved of an architecture, what was found wrong first, and of which workers."""

from __future__ import annotations

from dataclasses import dataclass

from shardprep_runtime.errors import quote
from shardprep_runtime.format.grid import Grid


@dataclass(frozen=True, slots=True)
class Workers(Grid):
    """The workers whose views are looked at: their grid, and their engine."""

    engine: str | None = None
    """None: any."""

    def __str__(self) -> str:
        words = f"tp {self.tensor_parallel_size}"
        for axis, size in (("pp", self.pipeline_parallel_size), ("ep", self.expert_parallel_size)):
            words += f" {axis} {size}" if size > 1 else ""
        return f"{words}, {self.engine}" if self.engine else words


@dataclass(frozen=True, slots=True)
class Proof:
    """One thing that was proved."""

    name: str
    """split, views, heads, sums, logits, ranks, stages or export."""
    text: str
    """What holds, and how far."""
    assembled: bool = False
    """Whether the engine itself could not be run, so that its ranks' tensors were put together instead; `text` says why."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that is not as it should be."""

    proof: str
    tensor: str
    """Or the module, or what else differs."""
    rank: int | None
    grid: str
    """`tp 4 ep 2, vllm`."""
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"rank {self.rank} of {self.grid}" if self.rank is not None else self.grid
        return f"{self.proof}: {quote(self.tensor)}, {where}: expected {self.expected}; found {self.found}"


class Differs(Exception):  # noqa: N818 - no error but the end of a proof
    """Something is not as it should be; see Difference."""

    def __init__(
        self, proof: str, tensor: str, rank: int | None, workers: Workers, *, expected: str, found: str
    ) -> None:
        self.difference = Difference(proof, tensor, rank, str(workers), expected, found)
        super().__init__(str(self.difference))


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was proved of an architecture, and what was not."""

    model_type: str
    tensor_parallel_size: int
    """The grain: every size that divides it was checked."""
    pipeline_parallel_size: int
    expert_parallel_size: int
    engines: tuple[str, ...]
    tensors: int
    nbytes: int
    """Of the small model."""
    proofs: tuple[Proof, ...]
    difference: Difference | None
    """None: all proofs hold."""

    @property
    def ok(self) -> bool:
        return self.difference is None
