"""Begin to fetch a shard before the worker that needs it has finished importing: into the host's cache, in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .shard import Shard


class Prefetch:
    """A shard that a thread is fetching into the host's cache.

    `shard` hands it out in this process. A `load` in another process finds in the cache what has come, and waits.
    """

    def __init__(self, load: Callable[[], Shard]) -> None:
        """Begin in a thread, and return at once.

        Args:
            load: Gives the shard, and raises what can go wrong.
        """
        self._error: BaseException | None = None
        self._shard: Shard | None = None
        self._opened = threading.Event()
        # a daemon: the worker may end before it
        self._thread = threading.Thread(
            target=self._run, args=(load,), name="shardprep-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, load: Callable[[], Shard]) -> None:
        try:
            self._shard = load()
            self._opened.set()
            self._shard.wait()
        except BaseException as error:  # noqa: BLE001 - told to whoever waits, in whose thread it belongs
            self._error = error
        finally:
            self._opened.set()

    @property
    def nbytes(self) -> int:
        """Bytes of the shard; 0 until its manifest has come."""
        return self._shard.nbytes if self._shard is not None else 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes of the shard that this process has brought from the store so far."""
        return self._shard.bytes_fetched if self._shard is not None else 0

    def shard(self) -> Shard:
        """The very shard that is being fetched: nothing is fetched or verified a second time. The caller closes it.

        Raises:
            ShardprepError: What `ShardSet.load` raises.
        """
        self._opened.wait()
        if self._shard is None:
            assert self._error is not None
            raise self._error
        return self._shard

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the whole shard is there.

        Args:
            timeout: Seconds to wait at most; None: however long it takes.

        Returns:
            Whether it is there.

        Raises:
            ShardprepError: What ended the fetch.
        """
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop the fetch, and close the shard. What has come stays in the cache."""
        self._opened.wait()
        if self._shard is not None:
            self._shard.close()
        self._thread.join()
