"""Wait for workers that somebody starts elsewhere, by `shardprep worker`, and say what is to be started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import environment
from ...errors import InputError, quote
from ..addresses import default_host
from .crew import MeetingLauncher, Starter

if TYPE_CHECKING:
    from ..meeting import Meeting
    from ..worker import WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere(MeetingLauncher):
    """Workers that join from this host or others; `secret` is by default what SHARDPREP_SECRET says."""

    @contextmanager
    def ready(self, options: WorkerOptions, workers: int, timeout: float | None) -> Iterator[Starter]:
        """Start nobody.

        Args:
            options, workers, timeout: As `MeetingLauncher.ready` has them.
        """
        yield Starter(default_host(), None)

    def chosen_secret(self) -> str:
        """The one that is set. Raises InputError where none is."""
        found = self.secret or environment.secret()
        if found is None:
            raise InputError(
                "SHARDPREP_SECRET is not set; set it to the same random text here and for all workers, for example "
                "what `openssl rand -hex 32` prints"
            )
        return found

    def say_how(self, say: Callable[[str], None], meeting: Meeting, options: WorkerOptions) -> None:
        """Tell the operator what is to be started on the other hosts.

        Args:
            say, meeting, options: As `MeetingLauncher.say_how` has them.
        """
        ranks = " --tp-rank N" if options.tensor_parallel_size > 1 else ""
        for pp_rank, (start, stop) in enumerate(options.stages):
            say(
                f"waiting for stage {pp_rank} (layers {start} to {stop - 1}): shardprep worker --manifest "
                f"{quote(options.shard_set.source)} --pp-rank {pp_rank}{ranks} --master {meeting.address}"
            )
