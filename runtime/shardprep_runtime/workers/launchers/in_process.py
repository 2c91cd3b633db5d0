"""Hold all stages in this process: nothing is started, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError
from .crew import Crew

if TYPE_CHECKING:
    from ..policy import Policy
    from ..worker import WorkerOptions
    from .launcher import Listener


@dataclass(frozen=True, slots=True)
class InThisProcess:
    """A worker of this process for each stage."""

    @contextmanager
    def gather(
        self, options: WorkerOptions, policy: Policy, timeout: float | None, listener: Listener
    ) -> Iterator[Crew]:
        """Open them.

        Args:
            options, listener: As `Launcher.gather` has them.
            policy, timeout: Say nothing here, since no worker is lost.
        """
        from ..local import open_local

        if options.tensor_parallel_size > 1:
            raise InputError(
                f"transport local: a stage of {options.tensor_parallel_size} tensor ranks is several processes, which "
                "only links and rpc bring together; use one of these, or one tensor rank"
            )
        crew = Crew(options, listener.say)
        with closing(open_local(options.shard_set, stages=options.stages, compute=options.compute)) as opened:
            crew.transport = opened
            yield crew
