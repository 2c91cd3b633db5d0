"""Begin to fetch a shard before the worker that needs it has finished importing: into the host's cache, in threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from .cache import Cache
from .load import Verify, load
from .remote import DEFAULT_REVISION
from .store import Access


class Prefetch:
    """A shard that is being fetched into the host's cache."""

    def __init__(self, source: str, arguments: dict[str, Any]) -> None:
        self._error: BaseException | None = None
        self.nbytes = 0
        """Bytes of the shard; 0 until its manifest has come."""
        self.bytes_fetched = 0
        """Of them, those that this process brought; 0 until all have come."""
        # a daemon: the worker may end before it
        self._thread = threading.Thread(
            target=self._run, args=(source, arguments), name="shardprep-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, source: str, arguments: dict[str, Any]) -> None:
        try:
            with load(source, **arguments) as shard:
                self.nbytes = shard.nbytes
                shard.wait()
                self.bytes_fetched = shard.bytes_fetched
        except BaseException as error:  # noqa: BLE001 - told to whoever waits, in whose thread it belongs
            self._error = error

    def wait(self, timeout: float | None = None) -> bool:
        """Whether all has come within `timeout` seconds (None: however long it takes). Raises what went wrong."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()


def prefetch(
    source: str,
    *,
    rank: int = 0,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int | None = None,
    stages: Sequence[Sequence[int]] | None = None,
    verify: Verify = "blocks",
    manifest_digest: str | None = None,
    vocab_multiple: int = 1,
    workers: int | None = None,
    processes: int = 1,
    revision: str = DEFAULT_REVISION,
    cache: Cache | str | os.PathLike[str] = "host",
    access: Access | None = None,
) -> Prefetch:
    """Begin to fetch the shard of `rank` into the host's cache; returns at once, before any request.

    The arguments are those of `load`, which the worker calls later with the same. Nothing fails here: a fetch that
    ends early leaves the rest to `load`.
    """
    arguments = {name: value for name, value in locals().items() if name != "source"}
    return Prefetch(source, arguments)
