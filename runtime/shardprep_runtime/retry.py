"""Decide whether a failed request is tried again, and when: full jitter, under a deadline that progress renews."""

from __future__ import annotations

import random
import time
from typing import Final

from .errors import StoreError

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 20.0


class Transient(Exception):  # noqa: N818 - never leaves the store: it is tried again, or becomes a StoreError
    """A failure that may pass: a 503, a reset, a stall, a truncated body."""

    def __init__(self, message: str, *, most: int | None = None) -> None:
        """`most` is how often in a row it may happen: an answer that makes no sense will rarely make more later."""
        super().__init__(message)
        self.most = most


class Patience:
    """Of one job: how long it has gone without progress.

    Pauses are drawn evenly from 0 to a bound that doubles (AWS Architecture Blog, "Exponential Backoff And Jitter":
    full jitter), so that a fleet that was refused at once does not come back at once.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        """Seconds without progress after which it ends."""
        self._tries = 0
        self._last = time.monotonic()

    @property
    def tries(self) -> int:
        """Failures since the last progress."""
        return self._tries

    def progress(self) -> None:
        """Something landed: the next failure is the first again."""
        self._tries = 0
        self._last = time.monotonic()

    def pause(self, error: Transient, *, where: str) -> None:
        """Sleep before the next try. Raises StoreError once the deadline would pass without progress."""
        bound = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._tries)
        self._tries += 1
        pause = random.uniform(0, bound)  # noqa: S311 - spreads retries, keeps no secret
        late = time.monotonic() + pause - self._last > self.deadline
        if late or self._tries == error.most:
            seconds = time.monotonic() - self._last
            raise StoreError(
                f"{where}: {error}; given up after {self._tries} tries in {seconds:.1f} s without progress"
            ) from None
        time.sleep(pause)
