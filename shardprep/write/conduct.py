"""Say how many threads a long job may use, and who is told of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def silent(_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Conduct:
    """How a job that moves bytes runs. Every such job takes one."""

    workers: int | None = None
    """Threads that move bytes; None: the cores of this process, at most 8."""
    begin: Callable[[int], None] = silent
    """Called once, with the number of bytes that will be moved."""
    progress: Callable[[int], None] = silent
    """Called from several threads, each time with the number of bytes that were just moved."""
    warn: Callable[[str], None] = silent
    """Called with each warning, one line for the user."""
