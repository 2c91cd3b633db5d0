"""Report what was proved of an architecture, and the first thing that was found wrong."""

from __future__ import annotations

from dataclasses import dataclass

from shardprep_runtime.errors import quote
from shardprep_runtime.format.grid import Grid
from shardprep_runtime.format.manifest import TORCH
from shardprep_runtime.format.view import Place


@dataclass(frozen=True, slots=True)
class Workers(Grid):
    """The workers whose views are checked: their grid and their engine."""

    engine: str | None = None
    """The engine of the workers; None: any."""

    def place_of(self, rank: int) -> Place:
        """Say which shard a rank owns."""
        return Place(
            rank,
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self.expert_parallel_size,
            engine=self.engine or TORCH,
        )

    def __str__(self) -> str:
        words = f"tp {self.tensor_parallel_size}"
        for axis, size in (("pp", self.pipeline_parallel_size), ("ep", self.expert_parallel_size)):
            words += f" {axis} {size}" if size > 1 else ""
        return f"{words}, {self.engine}" if self.engine else words


@dataclass(frozen=True, slots=True)
class Proof:
    """One thing that was proved."""

    name: str
    """Name of the proof: split, views, heads, sums, logits, ranks, stages or export."""
    text: str
    """A sentence that says what holds, and for which workers."""
    assembled: bool = False
    """Whether the engine could not be run, so that the tensors of its ranks were put together instead; `text` says why."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that a proof found wrong."""

    proof: str
    tensor: str
    """Name of the tensor, of the module, or of whatever else differs."""
    rank: int | None
    grid: str
    """Grid and engine of the workers: `tp 4 ep 2, vllm`."""
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"rank {self.rank} of {self.grid}" if self.rank is not None else self.grid
        return f"{self.proof}: {quote(self.tensor)}, {where}: expected {self.expected}; found {self.found}"


class Differs(Exception):  # noqa: N818 - no error but the end of a proof
    """Ends a proof that found something wrong, which `difference` describes."""

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
    """The grain of the small shard set: every size that divides it was checked."""
    pipeline_parallel_size: int
    expert_parallel_size: int
    engines: tuple[str, ...]
    tensors: int
    nbytes: int
    """Bytes of the small model's tensors."""
    proofs: tuple[Proof, ...]
    difference: Difference | None
    """The first thing that was found wrong; None where all proofs hold."""

    @property
    def ok(self) -> bool:
        return self.difference is None
