"""Processes that tests start end with the tests, also with those that fail."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def ended(processes: Sequence[subprocess.Popen[Any]] | subprocess.Popen[Any]) -> Iterator[None]:
    """Kill what still runs of these afterwards, await it and close its pipes; a later test inherits nothing."""
    started = [processes] if isinstance(processes, subprocess.Popen) else list(processes)
    try:
        yield
    finally:
        for each in started:
            each.kill()
        for each in started:
            each.wait()
            for stream in (each.stdin, each.stdout, each.stderr):
                if stream is not None:
                    stream.close()
