"""Say what a store of named objects can do.

A store is a flat map of keys to immutable-while-read bytes: a folder, an S3 bucket under a prefix, or another object
store. Everything that moves bytes over a network goes through these verbs. `open` makes the store that a URI names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Protocol

from ..errors import FormatError, MissingError, SourceError, StoreError, quote

SCRATCH: Final = 256 * 2**10
"""Bytes that are received at a time where they do not land in memory of their own."""

Transfer = Literal["auto", "native", "boto3"]
"""What moves the data of `s3://`: our own connections or boto3; auto: our own, and boto3 behind a proxy."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a store is reached. What is left out comes from the user's environment and files, as for `aws` and boto3.

    Never filled from a manifest or anything else that was fetched.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False
    """Send requests unsigned: for public buckets."""
    transfer: Transfer = "auto"
    idle_timeout: float = 15.0
    """Seconds after which a connection that brings (almost) nothing is given up for a new one."""
    connect_timeout: float = 5.0
    deadline: float = 120.0
    """Seconds without any progress after which retrying ends."""


@dataclass(frozen=True, slots=True)
class Stat:
    """One object."""

    key: str
    size: int
    version: str
    """Changes whenever the object is replaced: an ETag, or what a file system knows."""
    modified: float
    """Seconds since the epoch."""


class Sink(Protocol):
    """Where the bytes of one range go, front to back. Not used by two threads at once."""

    def room(self) -> memoryview:
        """Writable bytes, at least one, where the next bytes are to be put. Never more than are still wanted."""

    def landed(self, count: int) -> None:
        """The first `count` bytes of the last `room()` are there now. May raise, which ends the read."""

    @property
    def left(self) -> int:
        """Bytes that are still wanted; 0 once all have landed."""


@dataclass(slots=True)
class FileRange:
    """Bytes [start, stop) of an open file, which are sent from the file itself where the store can."""

    fd: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, through one buffer.

        Raises:
            OSError: Where the file has become shorter.
        """
        buffer = memoryview(bytearray(min(SCRATCH, len(self))))
        at = self.start
        while at < self.stop:
            got = os.preadv(self.fd, [buffer[: self.stop - at]], at)
            if not got:
                raise OSError("the file became shorter while it was read")
            yield buffer[:got]
            at += got


Body = bytes | memoryview | FileRange


@dataclass(frozen=True, slots=True)
class Chunk:
    """One part of an upload."""

    body: Body
    crc32: int | None = None
    """Checksum of the body as zlib makes it; sent along where the store checks it."""


class Upload(Protocol):
    """An object that is being put in parts, which may be sent in any order and from several threads.

    Nothing stands under the key before `finish`.
    """

    @property
    def parts(self) -> Sequence[tuple[int, int]]:
        """Bytes [start, stop) of each part."""

    def has(self, number: int, chunk: Callable[[], Chunk]) -> bool:
        """Whether an earlier, unfinished upload has left this part in the store.

        Args:
            number: Index of the part in `parts`.
            chunk: Called for the part only where there is something to compare it with.
        """

    def send(self, number: int, chunk: Chunk) -> bool:
        """Send one part.

        Args:
            number: Index of the part in `parts`.
            chunk: Its bytes.

        Returns:
            Whether the store has checked its checksum.

        Raises:
            StoreError: Where the store refuses it.
        """

    def finish(self) -> Stat:
        """Make the object of its parts, all of which were sent.

        Raises:
            StoreError: Where the store refuses, or has made another object.
        """

    def leave(self) -> None:
        """Stop, and leave what was sent to a later upload of the same key."""


class Named(Protocol):
    """What messages can name: a store, or its client."""

    @property
    def uri(self) -> str:
        """Without credentials; fit for messages."""


class Store(Named, Protocol):
    """Named objects. Keys are relative, with `/` between words. Safe to use from several threads.

    Every verb retries what is transient, with full jitter, until `Access.deadline` has passed without progress, and
    raises StoreError (MissingError, ConflictError, DeniedError) at once for what is not.
    """

    def head(self, key: str) -> Stat | None:
        """What is known of an object; None where there is none."""

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        """Bring the bytes of an object into `sink`. A broken transfer is resumed at the byte.

        Args:
            key: Key of the object.
            start: First byte; the last is where the sink is full (exclusive).
            sink: Where the bytes go; it wants at least one.
            version: Version that the object must have; None: any.

        Returns:
            The version that the bytes are of.

        Raises:
            SourceError: Where the object changed meanwhile, or ends before the sink has all.
            MissingError: Where there is none.
        """

    def put(self, key: str, data: bytes) -> Stat:
        """Put a small object whole, whatever was there.

        Args:
            key: Key of the object.
            data: All of its bytes.
        """

    def put_if(self, key: str, data: bytes, *, version: str | None) -> Stat:
        """Put a small object only where the key has a certain version now.

        Args:
            key: Key of the object.
            data: All of its bytes.
            version: The version that it must have; None: there must be no object.

        Raises:
            ConflictError: Where it has another one; nothing is changed then.
        """

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> Upload:
        """Begin to put an object.

        Args:
            key: Key of the object.
            parts: Where it may be cut: bytes [start, stop) that follow each other.

        Returns:
            The upload, which says in its own `parts` how it wants them: the same, or several joined to one.
        """

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object whose key begins with `prefix`, in any order. Raises rather than giving a part of them."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects. One that is gone already is not an error."""

    def abort_uploads(self, prefix: str, *, before: float) -> int:
        """Drop unfinished uploads.

        Args:
            prefix: How the keys of their objects begin.
            before: Those begun before this time, in seconds since the epoch.

        Returns:
            How many there were.
        """

    def close(self) -> None:
        """Close connections. The store cannot be used any more."""

    def __enter__(self) -> Store: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BufferSink:
    """Puts a range into memory of the caller."""

    def __init__(self, into: memoryview) -> None:
        self._rest = into

    @property
    def left(self) -> int:
        return len(self._rest)

    def room(self) -> memoryview:
        return self._rest

    def landed(self, count: int) -> None:
        self._rest = self._rest[count:]


def read(store: Store, key: str, start: int, stop: int, *, version: str | None = None) -> bytes:
    """Read bytes of an object.

    Args:
        store: Where the object lies.
        key: Its key.
        start: First byte.
        stop: Where the bytes end (exclusive).
        version: Version that the object must have; None: any.
    """
    found = bytearray(stop - start)
    if found:
        with memoryview(found) as into:
            store.get(key, start, BufferSink(into), version=version)
    return bytes(found)


def read_small(store: Store, key: str, *, most: int) -> tuple[bytes, Stat] | None:
    """Read a whole object that must be small.

    Args:
        store: Where the object lies.
        key: Its key.
        most: Bytes that it may have.

    Returns:
        Its bytes and what is known of it; None where there is none.

    Raises:
        FormatError: For a larger one, before any of it is fetched.
    """
    stat = store.head(key)
    if stat is None:
        return None
    if stat.size > most:
        raise FormatError(f"{where(store, key)}: {stat.size} bytes, more than the {most} that it may have")
    return read(store, key, 0, stat.size, version=stat.version), stat


def holds(store: Store, key: str, found: Stat, data: bytes) -> bool:
    """Whether an object holds `data`: then an earlier put has succeeded, although its answer was lost.

    Args:
        store: Where the object lies.
        key: Its key.
        found: What is known of it.
        data: What was to be put.

    Returns:
        Whether all of its bytes are those of `data`.
    """
    return found.size == len(data) and read(store, key, 0, found.size) == data


def where(named: Named, key: str) -> str:
    """How a message names an object.

    Args:
        named: The store that it lies in.
        key: Its key.
    """
    return quote(f"{named.uri.rstrip('/')}/{key}")


def changed(named: Named, key: str) -> SourceError:
    """The error of an object that was replaced while it was read.

    Args:
        named: The store that it lies in.
        key: Its key.
    """
    return SourceError(f"{where(named, key)}: the object was replaced while it was read; run again")


def missing(named: Named, key: str) -> StoreError:
    """The error of an object that is not there.

    Args:
        named: The store that does not have it.
        key: Its key.
    """
    return MissingError(f"{where(named, key)}: no such object")
