"""Read the files of a checkpoint in a store by ranges, so that only the bytes that are needed travel."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Protocol

from shardprep_runtime.errors import FormatError, quote
from shardprep_runtime.stores.store import BufferSink, Sink, Stat

from ..files import File, Stretch

WORKERS: Final = 16
"""Requests at a time. One request to a store waits long for its first byte, and many of them wait together."""

WINDOW: Final = 8 * 2**20
"""Bytes of one request where a tensor is read front to back; each thread holds so many in memory."""

NEAR: Final = 4096
"""Small ranges that are no further apart than this are fetched by one request, with what lies between them."""

HELD: Final = 256 * 2**20
"""Bytes of small ranges that are held at most, so that no file can make them fill the memory."""


class Ranges(Protocol):
    """The methods of a store that reading needs."""

    @property
    def uri(self) -> str: ...

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        """Bring a range into `sink`, as `Store.get` does.

        Args:
            start: First byte; the last is where the sink is full (exclusive).
            version: The version of the object that the bytes must come from; None: any.
        """

    def close(self) -> None: ...


class StoreFile:
    """An object that is read by ranges. Each range must come from the version of the object that was opened."""

    fd = None

    def __init__(self, folder: StoreFolder, stat: Stat) -> None:
        self.folder, self.name, self.size, self.version = folder, stat.key, stat.size, stat.version
        self.where = folder.where(stat.key)
        self._starts: list[int] = []
        self._held: list[bytearray] = []

    def __enter__(self) -> StoreFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._starts, self._held = [], []

    def read_into(self, into: memoryview, offset: int) -> None:
        i = bisect_right(self._starts, offset) - 1
        if i >= 0 and offset + len(into) <= self._starts[i] + len(self._held[i]):
            at = offset - self._starts[i]
            into[:] = self._held[i][at : at + len(into)]
        elif into:
            self.folder.store.get(self.name, offset, BufferSink(into), version=self.version)

    def stretch(self, start: int, stop: int) -> Stretch:
        return _Window(self, start, stop)

    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        most = HELD
        for start, stop in sorted(ranges):
            most -= stop - start
            if most < 0:
                break  # the rest is fetched when it is read
            if joined and start <= joined[-1][1] + NEAR:
                joined[-1] = joined[-1][0], max(stop, joined[-1][1])
            else:
                joined.append((start, stop))

        def fetch(bounds: tuple[int, int]) -> bytearray:
            found = bytearray(bounds[1] - bounds[0])
            if found:
                self.read_into(memoryview(found), bounds[0])
            return found

        self._held = list(self.folder.pool.map(fetch, joined))
        self._starts = [start for start, _ in joined]

    def is_unchanged(self) -> bool:
        return True  # each range was of this version, or refused


class _Window:
    """Reads ahead within [start, stop) of a file, for one thread."""

    def __init__(self, file: StoreFile, start: int, stop: int) -> None:
        self.file, self.start, self.stop = file, start, stop
        self.buffer = memoryview(bytearray(min(WINDOW, stop - start)))
        self.low = self.high = start
        """The buffer holds bytes [low, high) of the file."""

    def read_into(self, into: memoryview, offset: int) -> None:
        while into:
            if not self.low <= offset < self.high:
                if len(into) >= len(self.buffer) or not self.start <= offset < self.stop:
                    self.file.read_into(into, offset)
                    return
                count = min(len(self.buffer), self.stop - offset)
                self.high = self.low  # nothing is held should this fail
                self.file.read_into(self.buffer[:count], offset)
                self.low, self.high = offset, offset + count
            have = self.buffer[offset - self.low : self.high - self.low][: len(into)]
            into[: len(have)] = have
            into, offset = into[len(have) :], offset + len(have)


class StoreFolder:
    """The objects right under the prefix of a store. Those further below do not belong to the checkpoint."""

    path = None
    workers = WORKERS

    def __init__(self, store: Ranges, objects: Mapping[str, Stat]) -> None:
        """`objects`: key -> object; each key is a plain name (`is_plain`)."""
        self.store = store
        self.objects = {key: objects[key] for key in sorted(objects)}
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="shardprep-index")

    def where(self, name: str = "") -> str:
        return quote(f"{self.store.uri.rstrip('/')}/{name}".rstrip("/"))

    def names(self) -> list[str]:
        return list(self.objects)

    def has(self, name: str) -> bool:
        return name in self.objects

    is_file = has

    def open(self, name: str) -> File:
        if name not in self.objects:
            raise FormatError(f"{self.where(name)}: no such object")
        return StoreFile(self, self.objects[name])

    def close(self) -> None:
        self.pool.shutdown()
        self.store.close()


def is_plain(key: str) -> bool:
    """Whether a key can be the name of a visible file in one folder. Other keys are ignored."""
    return not key.startswith(".") and "/" not in key and "\\" not in key and key.isprintable() and key != ""
