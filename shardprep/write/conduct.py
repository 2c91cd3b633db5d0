"""Say how a long job is run, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def silent(_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Conduct:
    """Passed to every job that moves bytes; the same for all of them."""

    workers: int | None = None
    """Threads that move bytes; None: the cores of this process, at most 8."""
    begin: Callable[[int], None] = silent
    """Called once, with the bytes that will be moved."""
    progress: Callable[[int], None] = silent
    """Called with the number of bytes that were just done, from several threads."""
    warn: Callable[[str], None] = silent
    """Called with a line for the user."""
