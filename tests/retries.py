"""What this process's stores try again meanwhile, so that tests count tries and do not measure time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from shardprep_runtime.stores.retry import Patience, Transient


@dataclass(frozen=True, slots=True)
class Retry:
    """A failure that was not the end at once."""

    error: str
    deadline: float
    """Seconds without progress after which that job ends."""


@contextmanager
def retries() -> Iterator[list[Retry]]:
    """Those of all stores of this process, in order; none: what was refused was refused at once."""
    found: list[Retry] = []
    pause = Patience.pause

    def counted(patience: Patience, error: Transient, *, where: str) -> None:
        found.append(Retry(str(error), patience.deadline))
        pause(patience, error, where=where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Patience, "pause", counted)
        yield found
