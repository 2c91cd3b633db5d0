"""Decide whether a failed request is tried again, and when: full jitter, under a deadline that progress renews."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from ..errors import StoreError

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 20.0

LOOK_EVERY: Final = 0.25
"""Seconds of a pause after which it is looked whether it is still wanted."""


class Transient(Exception):  # noqa: N818 - never leaves the store: it is tried again, or becomes a StoreError
    """A failure that may pass: a 503, a reset, a stall, a truncated body."""

    def __init__(
        self,
        message: str,
        *,
        most: int | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        """Keep what the StoreError will say that it may become.

        Args:
            message: What people read.
            most: How often in a row it may happen: an answer that makes no sense will rarely make more later.
            status: The status of the HTTP answer, as a StoreError's.
            code: The store's own name of the error, as a StoreError's.
        """
        super().__init__(message)
        self.most = most
        self.status = status
        self.code = code


class Patience:
    """Knows how long one job has gone without progress.

    Pauses are drawn evenly from 0 to a bound that doubles (AWS Architecture Blog, "Exponential Backoff And Jitter":
    full jitter), so that a fleet that was refused at once does not come back at once.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        """Seconds without progress after which it ends."""
        self.look: Callable[[], None] = _nothing
        """Called often during a pause; raises where nobody wants the job done any more."""
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
        """Sleep before the next try.

        Args:
            error: Why the last one failed.
            where: The object, for the message.

        Raises:
            StoreError: Once the deadline has passed without progress, with the facts of `error`.
        """
        bound = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._tries)
        self._tries += 1
        pause = random.uniform(0, bound)  # noqa: S311 - spreads retries, keeps no secret
        seconds = time.monotonic() - self._last
        if seconds >= self.deadline or self._tries == error.most:
            raise StoreError(
                f"{where}: {error}; given up after {self._tries} tries in {seconds:.1f} s without progress",
                status=error.status,
                code=error.code,
            ) from None
        until = time.monotonic() + min(pause, self.deadline - seconds)  # the last try is at the deadline
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_EVERY))
            self.look()


def _nothing() -> None:
    pass
