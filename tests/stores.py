"""Make stores of shard sets for tests, and a store that counts what is asked of it and errs when it is told to."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shardprep_runtime.errors import SourceError
from shardprep_runtime.format.manifest import FILE_NAME, Manifest
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.shard.revisions import blob_key, manifest_key
from shardprep_runtime.stores.store import Sink, Stat, Store, Upload, where


def make_store(shard_set: Path, folder: Path, revision: str = "main") -> Path:
    """`folder` as a store that holds this shard set, as a push leaves it; more may be put into the same one."""
    manifest = read_manifest(shard_set)
    files = {part.path: blob_key(part.digest) for part in manifest.parts}
    files |= {side.path: blob_key(side.digest) for side in manifest.side_files}
    for path, key in {**files, FILE_NAME: manifest_key(revision)}.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shard_set / path, folder / key)
    return folder


def part_keys(manifest: Manifest) -> dict[str, str]:
    """Path of each part -> its key in a store."""
    return {part.path: blob_key(part.digest) for part in manifest.parts}


@dataclass(frozen=True)
class Request:
    """Bytes [start, stop) of an object that were asked for."""

    key: str
    start: int
    stop: int


@dataclass
class _Fault:
    key: str
    at: int
    times: float


class CountingStore:
    """A store that passes everything on, counts it, and changes what it was told to."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.uri = store.uri
        self.requests: list[Request] = []
        """Every `get`, in the order in which they began."""
        self.verbs: list[tuple[str, str]] = []
        """(verb, key or prefix) of everything else."""
        self.received: dict[str, int] = {}
        """Bytes that came, by key."""
        self.closed = 0
        self.before: Callable[[Request], None] = lambda _: None
        """Called before each get: may wait, or raise."""
        self.portion = 2**20
        """Bytes that come at once, at most."""
        self.landing: Callable[[str, int, int], None] = lambda *_: None
        """Called with the key and the bytes [start, stop) that have just come, before they are passed on."""
        self._corrupt: list[_Fault] = []
        self._short: dict[str, int] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------- what it is told
    def corrupt(self, key: str, at: int, *, times: float = float("inf")) -> None:
        """Flip a bit of the byte at `at` in the next `times` answers that hold it."""
        self._corrupt.append(_Fault(key, at, times))

    def shorten(self, key: str, size: int) -> None:
        """Let the object end there."""
        self._short[key] = size

    def delay(self, seconds: float) -> None:
        """Wait before every answer."""
        self.before = lambda _: time.sleep(seconds)

    def fail(self, error: Exception, *, key: str, times: float = float("inf")) -> None:
        """Raise from the next `times` gets of an object."""
        left = [times]

        def refuse(request: Request) -> None:
            with self._lock:
                mine = request.key == key and left[0] > 0
                left[0] -= mine
            if mine:
                raise error

        self.before = refuse

    # ------------------------------------------------------------------------------------------------- what it counted
    def asked(self, key: str, at: int) -> int:
        """How often a byte of an object was asked for."""
        return sum(each.key == key and each.start <= at < each.stop for each in self.requests)

    @property
    def bytes_received(self) -> int:
        return sum(self.received.values())

    # ----------------------------------------------------------------------------------------------------- the verbs
    def head(self, key: str) -> Stat | None:
        self.verbs.append(("head", key))
        return self.store.head(key)

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        request = Request(key, start, start + sink.left)
        with self._lock:
            self.requests.append(request)
        self.before(request)
        return self.store.get(key, start, _Watched(self, request, sink), version=version)

    def put(self, key: str, data: bytes) -> Stat:
        self.verbs.append(("put", key))
        return self.store.put(key, data)

    def put_if(self, key: str, data: bytes, *, version: str | None) -> Stat:
        self.verbs.append(("put_if", key))
        return self.store.put_if(key, data, version=version)

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> Upload:
        self.verbs.append(("upload", key))
        return self.store.upload(key, parts)

    def list(self, prefix: str) -> Iterator[Stat]:
        self.verbs.append(("list", prefix))
        return self.store.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        self.verbs += [("delete", key) for key in keys]
        self.store.delete(keys)

    def abort_uploads(self, prefix: str, *, before: float) -> int:
        self.verbs.append(("abort_uploads", prefix))
        return self.store.abort_uploads(prefix, before=before)

    def close(self) -> None:
        self.closed += 1
        self.store.close()

    def __enter__(self) -> CountingStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _land(self, key: str, at: int, data: memoryview) -> None:
        """Count bytes from `at` on, which have just come, and spoil them."""
        with self._lock:
            self.received[key] = self.received.get(key, 0) + len(data)
            for fault in self._corrupt:
                if fault.key == key and fault.times > 0 and at <= fault.at < at + len(data):
                    data[fault.at - at] ^= 1
                    fault.times -= 1
        self.landing(key, at, at + len(data))


class _Watched:
    """A sink whose bytes pass by a CountingStore."""

    def __init__(self, store: CountingStore, request: Request, sink: Sink) -> None:
        self._store, self._request, self._sink = store, request, sink
        self._room = memoryview(b"")

    @property
    def left(self) -> int:
        return self._sink.left

    def room(self) -> memoryview:
        at, end = self._request.stop - self._sink.left, self._store._short.get(self._request.key)
        self._room = self._sink.room()[: self._store.portion]
        if end is not None:
            if at >= end:
                key = where(self._store, self._request.key)
                raise SourceError(f"{key}: ends at byte {at}, {self.left} more were expected")
            self._room = self._room[: end - at]
        return self._room

    def landed(self, count: int) -> None:
        at = self._request.stop - self._sink.left
        self._store._land(self._request.key, at, self._room[:count])
        self._sink.landed(count)
