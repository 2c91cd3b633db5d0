"""Send files to a store as blobs over many connections: each byte is read once, and proved by its digest on the way.

A blob is a file whose first bytes have a sha256 that names it. Those first bytes hold the digests of all others. In a
part the first bytes are the header; in a side file they are the whole file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Final

from blake3 import blake3
from isal.isal_zlib import crc32

from shardprep_runtime.errors import IntegrityError, SourceError, StoreError, quote
from shardprep_runtime.format.header import loads_strict, parse_header
from shardprep_runtime.shard.parts import METADATA_KEY
from shardprep_runtime.shard.revisions import blob_key
from shardprep_runtime.stores.store import Chunk, FileRange, Store, Upload, where

from ..source.bytes import CHUNK
from ..write.conduct import silent
from ..write.staging import Written

CONNECTIONS: Final = 16
"""Threads that send by default. S3 gives each connection about 85 MB/s."""

PART_BYTES: Final = 16 * 2**20
"""Bytes of one request: at least so many, where the blob is that large, and at most a block more."""

MOST_PARTS: Final = 9_000
"""Requests for one blob at most: S3 takes 10,000."""

BUFFERED: Final = 256 * 2**20
"""Bytes of all requests together that lie in memory at a time."""


@dataclass(frozen=True, slots=True)
class Digested:
    """Bytes [start, stop) of a blob that share one digest."""

    start: int
    stop: int
    digest: str
    """The digest in hex: sha256 of the first run, blake3 of the others."""
    what: str
    """The run as error messages name it."""


@dataclass(frozen=True, slots=True)
class Blob:
    """An open file that will be sent, with the digests that prove its bytes."""

    key: str
    fd: int
    where: str
    """The file as error messages name it."""
    runs: tuple[Digested, ...]
    """Runs that follow each other from byte 0 to the end of the file."""

    @property
    def size(self) -> int:
        return self.runs[-1].stop

    def cut(self) -> list[tuple[int, int]]:
        """Cut the file into requests: bytes [start, stop) of each, which end where runs do."""
        least = max(PART_BYTES, -(-self.size // MOST_PARTS))
        found, start = [], 0
        for run in self.runs:
            if run.stop - start >= least or run.stop == self.size > start:
                found.append((start, run.stop))
                start = run.stop
        return found or [(0, 0)]

    def inside(self, start: int, stop: int) -> Sequence[Digested]:
        """List the runs between two bytes.

        Args:
            start: First byte of a run.
            stop: One past the last byte of a run.
        """
        if not self.size:
            return self.runs
        low = bisect_left(self.runs, start, key=lambda each: each.start)
        return self.runs[low : bisect_left(self.runs, stop, key=lambda each: each.start)]


def open_blob(fd: int, written: Written, *, where: str) -> Blob:
    """Describe an open file as the blob that it should be.

    Args:
        written: The size and digest that it should have.
        where: The file as error messages name it.

    Raises:
        IntegrityError: Where its size or its header shows that it is another.
    """
    found = os.fstat(fd).st_size
    if found != written.size:
        raise _changed(where, f"has {found} bytes, {written.size} were expected")
    first = Digested(0, written.header_size, written.digest.removeprefix("sha256:"), "the header")
    if written.header_size == written.size:
        return Blob(blob_key(written.digest), fd, where, (Digested(0, first.stop, first.digest, "the file"),))
    raw = os.pread(fd, written.header_size, 0)
    if hashlib.sha256(raw).hexdigest() != first.digest:
        raise _changed(where, "the header does not match its digest")
    header = parse_header(raw, written.size, where=where)
    own = loads_strict(header.metadata[METADATA_KEY], where=where)
    runs, size = [first], own["block_bytes"]
    for name, span in header.tensors.items():
        for i, digest in enumerate(own["pieces"][name]["blocks"]):
            start = span.start + i * size
            what = f"tensor {quote(name)}: block {i}"
            runs.append(Digested(start, min(start + size, span.stop), digest, what))
    return Blob(blob_key(written.digest), fd, where, tuple(runs))


def is_there(store: Store, blob: Blob) -> bool:
    """Whether the store has the blob.

    Args:
        blob: The file that would be sent.

    Raises:
        StoreError: Where an object of its name has another size.
    """
    found = store.head(blob.key)
    if found is not None and found.size != blob.size:
        raise StoreError(
            f"{where(store, blob.key)}: {found.size} bytes lie there, {blob.where} has {blob.size}: it is damaged, or "
            "not of shardprep; it is not replaced, since others may read it: remove it and run again"
        )
    return found is not None


def _changed(where: str, how: str) -> IntegrityError:
    return IntegrityError(
        f"{where}: {how}: the file changed since the split or is damaged; nothing is published; split it again"
    )


class Sender:
    """Sends blobs over one pool of connections. Use as a context manager.

    At most BUFFERED bytes lie in memory, or one request if it is larger. Once the store has shown that it compares what it
    receives with our crc32, requests are digested and then sent from the file itself, by the kernel where it can.

    Args:
        workers: Connections; 16 by default.
    """

    def __init__(self, store: Store, *, workers: int | None = None) -> None:
        self._store = store
        self._buffers = _Buffers(BUFFERED)
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._unsent = 0
        self._stop = False
        self._error: BaseException | None = None
        self._uploads: set[Upload] = set()
        self._proves: bool | None = None
        """Whether the store compares checksums: unknown, shown, or not to be relied on."""
        self.bytes_sent = 0
        """Bytes of blobs that crossed the network, without those that an earlier, killed run had left in the store."""
        self._threads = [
            threading.Thread(target=self._work, name=f"shardprep-send-{i}", daemon=True)
            for i in range(workers or CONNECTIONS)
        ]

    def __enter__(self) -> Sender:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the requests that are under way end. The next run can use what was sent of unfinished blobs."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._buffers.give_up()
        for thread in self._threads:
            thread.join()
        for upload in self._uploads:
            upload.leave()

    def add(
        self, blob: Blob, *, sent: Callable[[], None] = lambda: None, progress: Callable[[int], None] = silent
    ) -> None:
        """Send a blob soon. Raises whatever has failed before.

        Args:
            sent: Called from another thread once the store has the whole blob.
            progress: Called from other threads, each time with the number of bytes that were just sent.
        """
        with self._changed:
            self._raise()
            self._unsent += 1
            self._tasks.append(lambda: self._begin(blob, sent, progress))
            self._changed.notify()

    def check(self) -> None:
        """Raise whatever has failed so far."""
        with self._changed:
            self._raise()

    def drain(self) -> None:
        """Wait until everything is sent.

        Raises:
            StoreError, IntegrityError, SourceError: As soon as anything fails.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent or self._error is not None)
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stop)
                if self._stop:
                    return
                task = self._tasks.popleft()
            try:
                task()
            except _GivenUp:
                return
            except BaseException as error:  # noqa: BLE001 - raised again where the blobs come from
                with self._changed:
                    self._error = self._error or error
                    self._stop = True
                    self._changed.notify_all()
                self._buffers.give_up()
                return

    def _begin(self, blob: Blob, sent: Callable[[], None], progress: Callable[[int], None]) -> None:
        upload = self._store.upload(blob.key, blob.cut())
        sending = _Sending(blob, upload, len(upload.parts), sent, progress, threading.Lock())
        with self._changed:
            self._uploads.add(upload)
            # ahead of the blobs that wait, so that blobs that were begun end first
            self._tasks.extendleft(
                self._part_task(sending, number) for number in reversed(range(len(upload.parts)))
            )
            self._changed.notify_all()

    def _part_task(self, sending: _Sending, number: int) -> Callable[[], None]:
        return lambda: self._send(sending, number)

    def _send(self, sending: _Sending, number: int) -> None:
        start, stop = sending.upload.parts[number]
        large = stop - start > BUFFERED
        sent = self._from_file(sending, number, large=large) if large or self._proves else None
        if sent is None:
            sent = self._from_memory(sending, number)
        with self._changed:
            self.bytes_sent += sent
        sending.progress(stop - start)
        with sending.lock:
            sending.left -= 1
            last = sending.left == 0
        if last:
            self._finish(sending)

    def _from_memory(self, sending: _Sending, number: int) -> int:
        """Send a part from a buffer, and so the very bytes that were digested. Gives the bytes sent: 0 if it was there."""
        blob, upload = sending.blob, sending.upload
        start, stop = upload.parts[number]
        with self._buffers.take(stop - start) as buffer:
            chunk = cache(lambda: Chunk(buffer, self._prove(blob, start, stop, buffer)))
            if upload.has(number, chunk):
                return 0
            checked = upload.send(number, chunk())
        if checked and self._proves is None:
            self._proves = True
        return stop - start

    def _from_file(self, sending: _Sending, number: int, *, large: bool) -> int | None:
        """Send a part from the file itself. None where that did not prove the bytes, and it must be sent another way.

        The file could change between digest and sending. The store's checksum of what it received excludes that. For a
        part that is too large for memory, which only a strange side file is, the file's time of change excludes it.
        """
        blob, upload = sending.blob, sending.upload
        start, stop = upload.parts[number]
        before = os.fstat(blob.fd)
        chunk = cache(lambda: Chunk(FileRange(blob.fd, start, stop), self._prove(blob, start, stop, None)))
        if upload.has(number, chunk):
            return 0
        if not upload.send(number, chunk()):
            if not large:  # the store did not compare this one: its checks are not relied on again
                self._proves = False
                return None
            after = os.fstat(blob.fd)
            if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
                raise _changed(blob.where, "was written to while it was sent")
        return stop - start

    def _prove(self, blob: Blob, start: int, stop: int, buffer: memoryview | None) -> int:
        """Read bytes [start, stop), into `buffer` if there is one, compare their digests, and give their crc32."""
        scratch = memoryview(bytearray(min(CHUNK, stop - start))) if buffer is None else buffer
        crc = 0
        for run in blob.inside(start, stop):
            digest: Any = blake3() if run.start else hashlib.sha256()
            for at in range(run.start, run.stop, CHUNK):
                if self._stop:
                    raise _GivenUp
                count = min(CHUNK, run.stop - at)
                low = 0 if buffer is None else at - start
                chunk = scratch[low : low + count]
                _read(blob, at, chunk)
                digest.update(chunk)
                crc = crc32(chunk, crc)
            if digest.hexdigest() != run.digest:
                raise _changed(
                    blob.where,
                    f"{run.what} (bytes {run.start} to {run.stop}) does not match its digest",
                )
        return crc

    def _finish(self, sending: _Sending) -> None:
        stat = sending.upload.finish()
        if stat.size != sending.blob.size:
            raise StoreError(
                f"{where(self._store, sending.blob.key)}: {sending.blob.size} bytes were sent, the store has {stat.size}"
            )
        sending.sent()
        with self._changed:
            self._uploads.discard(sending.upload)
            self._unsent -= 1
            self._changed.notify_all()


@dataclass(slots=True)
class _Sending:
    """A blob that is being sent."""

    blob: Blob
    upload: Upload
    left: int
    """Number of requests that are not done yet."""
    sent: Callable[[], None]
    progress: Callable[[int], None]
    lock: threading.Lock


class _GivenUp(Exception):  # noqa: N818 - no error: another thread has one, or the user stopped
    """Ends a thread because another one has failed, or the user stopped."""


def _read(blob: Blob, at: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        try:
            got = os.preadv(blob.fd, [into[done:]], at + done)
        except OSError as error:
            raise SourceError(f"{blob.where}: cannot be read: {error.strerror}") from None
        if not got:
            raise _changed(blob.where, f"ends at byte {at + done}, {blob.size} were expected")
        done += got


class _Buffers:
    """Memory for requests, which is used again and again: fresh pages would cost more than the digests."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._allocated = 0
        self._free: list[mmap.mmap] = []
        self._returned = threading.Condition()
        self._given_up = False

    @contextmanager
    def take(self, size: int) -> Iterator[memoryview]:
        """Lend `size` bytes until the context ends; waits until so many are free."""
        buffer = self._have(max(size, 1))
        try:
            with memoryview(buffer) as whole, whole[:size] as view:
                yield view
        finally:
            with self._returned:
                self._free.append(buffer)
                self._returned.notify_all()

    def _have(self, size: int) -> mmap.mmap:
        with self._returned:
            while True:
                if self._given_up:
                    raise _GivenUp
                fit = min((each for each in self._free if len(each) >= size), key=len, default=None)
                if fit is not None:
                    self._free.remove(fit)
                    return fit
                while self._free and self._allocated + size > self._most:
                    self._allocated -= len(self._free.pop())
                if self._allocated + size <= self._most or not self._allocated:
                    self._allocated += size
                    return mmap.mmap(-1, size)
                self._returned.wait()

    def give_up(self) -> None:
        """End the waiting of all threads."""
        with self._returned:
            self._given_up = True
            self._returned.notify_all()
