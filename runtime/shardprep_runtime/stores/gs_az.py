"""Reach Google Cloud Storage and Azure Blob Storage through obstore, with the promises of every store.

obstore checks little of what it receives and waits without end by default; ranges, versions and time limits are set
and looked at here. Its uploads are whole objects, cut and sent in parallel by itself.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar

from ..errors import (
    ConflictError,
    DeniedError,
    InputError,
    Missing,
    MissingError,
    SourceError,
    StoreError,
    WriteError,
    quote,
)
from .retry import Patience, Transient
from .store import SCRATCH, Access, Chunk, FileRange, Sink, Stat, changed, holds, where

REQUEST_SECONDS: Final = 300.0
"""Seconds of one request, body included: obstore knows no least rate. What has landed is not fetched again."""

UNREACHED: Final = 20.0
"""Seconds for which a store that has not answered yet is tried."""

SENT_BYTES: Final = 8 * 2**20
"""Bytes of one request of an upload."""

SENT_AT_ONCE: Final = 4
"""Requests of one upload that run at a time."""

MOST_SENDS: Final = 3
"""How often a whole object is sent that fails midway: each request has been tried again by itself before."""

REFUSED: Final = re.compile(r"status(?: code)?:? (4\d\d)(?<!408)(?<!425)(?<!429)")
"""In obstore's words, an answer that will not change."""

STATUS: Final = re.compile(r"status(?: code)?:? (\d{3})\b")
"""In obstore's words, the first answer that it tells of."""

RANGE: Final = re.compile(r"status(?: code)?:? 416|[Ii]nvalid range|range was invalid|Wanted range")
BUCKET: Final = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
SKEWED: Final = re.compile(r"RequestTimeTooSkewed|AuthenticationFailed.{0,200}Date", re.DOTALL)

T = TypeVar("T")


class ObstoreStore:
    """A bucket or container, under a prefix."""

    def __init__(self, scheme: str, bucket: str, prefix: str, access: Access) -> None:
        made = _connect(scheme, bucket, access)
        self._store = made(0)
        self.patient = made(10)
        """Tries requests again by itself: for uploads of many."""
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri, self.access = f"{scheme}://{bucket}/{prefix}".rstrip("/"), access
        self._reached = False
        self._only_reads = access.anonymous and scheme == "gs"

    def __enter__(self) -> ObstoreStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to do: obstore closes its connections when they have been idle."""

    def persist(self, key: str, work: Callable[[Patience], T]) -> T:
        """Do some work until it succeeds, fails for good, or the deadline passes without progress.

        Args:
            key: The object, for messages.
            work: One try. Raises Transient for what may pass.
        """
        # a store that never answered is more likely misspelt than overloaded
        patience = Patience(self.access.deadline if self._reached else min(self.access.deadline, UNREACHED))
        while True:
            try:
                found = work(patience)
            except Transient as error:
                patience.pause(error, where=where(self, key))
            else:
                self._reached = True
                return found

    def check_writable(self, key: str) -> None:
        """Raise DeniedError where obstore, told to send no credentials, would look for some in order to write.

        It leaves out the signature of Google's reads alone, and asks the machine's metadata for a token to write.
        """
        if self._only_reads:
            raise DeniedError(f"{where(self, key)}: without credentials gs:// can only be read")

    def ask(self, key: str, request: Callable[[], T]) -> T:
        """Make one request of obstore.

        Args:
            key: The object, for messages.
            request: Makes it.

        Raises:
            Transient: For what may pass.
            ShardprepError: For what does not.
        """
        from obstore.exceptions import BaseError

        try:
            return request()
        except (BaseError, OSError, ValueError, NotImplementedError) as error:
            raise self._meaning(key, error) from None

    def _meaning(self, key: str, error: Exception) -> Exception:
        """What an error of obstore means, without what a URL may hold.

        Much of it stands in its text alone, which is looked at here and nowhere else.
        """
        from obstore import exceptions

        at, said = where(self, key), str(error)
        answered = STATUS.search(said)
        status = int(answered[1]) if answered else None
        words = quote(_without_secrets(said), limit=300)
        if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
            missing: Missing = "bucket" if BUCKET.search(said) else "object"
            return MissingError(f"{at}: no such {missing}", missing=missing, status=status)
        if isinstance(error, exceptions.PreconditionError | exceptions.AlreadyExistsError):
            return ConflictError(f"{at}: the store's version is another one than expected", status=status)
        if SKEWED.search(said):
            return DeniedError(f"{at}: the clock of this machine is not the store's: {words}", status=status)
        if isinstance(
            error, PermissionError | exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
        ):
            return DeniedError(f"{at}: the store refuses: {words}", status=status)
        if isinstance(error, exceptions.NotSupportedError | NotImplementedError):
            return _Unable(f"{at}: this store cannot do that: {words}", status=status)
        if isinstance(error, exceptions.InvalidPathError | ValueError):
            return InputError(f"{at}: no name of an object there: {words}")
        if RANGE.search(said):
            return SourceError(f"{at}: ends before the bytes that were asked for")
        if isinstance(error, exceptions.GenericError):
            if BUCKET.search(said):
                return MissingError(f"{at}: no such bucket", missing="bucket", status=status)
            if refused := REFUSED.search(said):
                kind = DeniedError if refused[1] in ("401", "403") else StoreError
                return kind(f"{at}: the store answered {words}", status=int(refused[1]))
            return Transient(words, status=status)
        return error

    # -------------------------------------------------------------------------------------------------------- verbs
    def head(self, key: str) -> Stat | None:
        import obstore

        try:
            found = self.persist(
                key, lambda _: self.ask(key, lambda: obstore.head(self._store, self.prefix + key))
            )
        except MissingError as error:
            if error.missing == "bucket":
                raise
            return None
        return self._stat(found)

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        wanted = sink.left
        if not wanted:
            raise ValueError("a range of no bytes cannot be asked for")
        known = version

        def once(patience: Patience) -> str:
            nonlocal known
            before = sink.left
            try:
                known = self._receive(key, start + wanted - before, sink, known)
            except ConflictError:
                raise changed(self, key) from None
            except _Broken as broken:
                known = broken.version
                if sink.left < before:
                    patience.progress()
                raise Transient(str(broken)) from None
            return known

        return self.persist(key, once)

    def _receive(self, key: str, start: int, sink: Sink, version: str | None) -> str:
        """One try of `get`."""
        import obstore

        stop = start + sink.left
        options: dict[str, Any] = {"range": (start, stop)}
        if version:
            options["if_match"] = version
        answer = self.ask(
            key,
            lambda: obstore.get(self._store, self.prefix + key, options=options),  # type: ignore[arg-type]
        )
        found = str(answer.meta["e_tag"] or "")
        if version is not None and found != version:
            raise changed(self, key)
        if answer.range != (start, stop):
            raise SourceError(f"{where(self, key)}: has {answer.meta['size']} bytes, {stop} were expected")
        body = iter(answer.stream(min_chunk_size=SCRATCH))
        while sink.left:
            try:
                data = self.ask(key, lambda: next(body, None))
            except Transient as error:
                raise _Broken(str(error), found) from None
            if data is None:
                raise _Broken("the connection ended before all bytes had come", found)
            with memoryview(data) as rest:
                at = 0
                while at < len(rest) and sink.left:
                    room = sink.room()[: len(rest) - at]
                    room[:] = rest[at : at + len(room)]
                    at += len(room)
                    sink.landed(len(room))
        return found

    def put(self, key: str, data: bytes) -> Stat:
        self.check_writable(key)
        return self.persist(key, lambda _: self._put(key, data, "overwrite"))

    def _put(self, key: str, data: bytes, mode: Any) -> Stat:
        import obstore

        done = self.ask(
            key,
            lambda: obstore.put(self._store, self.prefix + key, data, mode=mode, use_multipart=False),
        )
        return Stat(key, len(data), str(done["e_tag"] or ""), time.time())

    def put_if(self, key: str, data: bytes, *, version: str | None) -> Stat:
        self.check_writable(key)

        def once(patience: Patience) -> Stat:
            try:
                return self._put(key, data, self._condition(key, version))
            except ConflictError:
                pass
            except MissingError as error:
                if error.missing == "bucket":
                    raise
            except _Unable:
                raise StoreError(
                    f"{where(self, key)}: this store cannot replace an object conditionally; use a new name"
                ) from None
            found = self.head(key)
            if found and patience.tries and holds(self, key, found, data):
                return found
            raise ConflictError(f"{where(self, key)}: was written by somebody else meanwhile")

        return self.persist(key, once)

    def _condition(self, key: str, version: str | None) -> Any:
        """How obstore is told of a version: Google's stores compare a generation, the others an ETag."""
        import obstore

        if version is None:
            return "create"
        found = self.ask(key, lambda: obstore.head(self._store, self.prefix + key))
        if found["e_tag"] != version:
            raise ConflictError(f"{where(self, key)}: is of another version")
        return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> ObstoreUpload:
        self.check_writable(key)
        return ObstoreUpload(self, key, parts)

    def list(self, prefix: str) -> Iterator[Stat]:
        import obstore

        whole = self.prefix + prefix
        folder = whole.rpartition("/")[0]  # obstore's prefixes are of whole words

        def once(_: Patience) -> list[Stat]:
            pages = iter(obstore.list(self._store, prefix=folder or None))
            found: list[Stat] = []
            while page := self.ask(prefix, lambda: next(pages, None)):
                found += (self._stat(each) for each in page if each["path"].startswith(whole))
            return found

        yield from self.persist(prefix, once)

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        for key in keys:
            self.check_writable(key)
            request = partial(obstore.delete, self._store, self.prefix + key)
            try:
                self.persist(key, lambda _, key=key, request=request: self.ask(key, request))  # type: ignore[misc]
            except MissingError as error:
                if error.missing == "bucket":
                    raise

    def abort_uploads(self, prefix: str, *, before: float) -> int:
        """Drop nothing: obstore cannot see them. Azure drops them after a week, Google by a rule of the bucket.

        Args:
            prefix: Not looked at, like `before`.
            before: See `prefix`.
        """
        return 0

    def _stat(self, meta: Mapping[str, Any]) -> Stat:
        key, version = str(meta["path"])[len(self.prefix) :], str(meta["e_tag"] or "")
        if self.uri.startswith("az://") and version and not version.startswith('"'):
            version = f'"{version}"'  # Azure's listings leave out the quotes that its headers have
        return Stat(key, int(meta["size"]), version, meta["last_modified"].timestamp())


class ObstoreUpload:
    """One part, the whole object: obstore cuts it and sends several pieces at a time.

    What an upload that fails has sent cannot be taken up by another.
    """

    def __init__(self, store: ObstoreStore, key: str, parts: Sequence[tuple[int, int]]) -> None:
        self._store, self._key = store, key
        self._whole = (parts[0][0], parts[-1][1])
        self._lock = threading.Lock()
        self._done: Stat | None = None

    @property
    def parts(self) -> Sequence[tuple[int, int]]:
        return (self._whole,)

    def has(self, number: int, chunk: Callable[[], Chunk]) -> bool:
        return False

    def send(self, number: int, chunk: Chunk) -> bool:
        start, stop = self._whole
        if number != 0 or len(chunk.body) != stop - start:
            raise ValueError("the upload has one part, which is the whole object")
        with self._lock:
            self._done = self._send(chunk)
        return False

    def _send(self, chunk: Chunk) -> Stat:
        import obstore

        store, key, sends = self._store, self._key, 0
        small = len(chunk.body) <= SENT_BYTES

        def once(patience: Patience) -> Stat:
            nonlocal sends
            sends += 1
            pieces = _pieces(chunk, patience)

            def request() -> Any:
                return obstore.put(
                    store.patient,
                    store.prefix + key,
                    b"".join(pieces) if small else pieces,
                    use_multipart=not small,
                    chunk_size=SENT_BYTES,
                    max_concurrency=SENT_AT_ONCE,
                )

            try:
                done = store.ask(key, request)
            except Transient as error:
                if sends < MOST_SENDS:
                    raise
                raise StoreError(
                    f"{where(store, key)}: {error}; given up after {sends} tries", status=error.status
                ) from None
            except _Unread as error:
                raise WriteError(f"{where(store, key)}: the file cannot be read: {error}") from None
            return Stat(key, len(chunk.body), str(done["e_tag"] or ""), time.time())

        return store.persist(key, once)

    def finish(self) -> Stat:
        assert self._done is not None
        found = self._store.head(self._key)
        if found is None or found.size != self._done.size:
            raise StoreError(
                f"{where(self._store, self._key)}: the store took all bytes, but the object has another size"
            )
        return found

    def leave(self) -> None:
        """Nothing to do."""


def _pieces(chunk: Chunk, patience: Patience) -> Iterator[bytes | memoryview]:
    """The bytes of a chunk, each piece in memory of its own: obstore keeps them until they are sent."""
    body = chunk.body
    at, stop = (body.start, body.stop) if isinstance(body, FileRange) else (0, len(body))
    while at < stop:
        end = min(at + SENT_BYTES, stop)
        if isinstance(body, FileRange):
            piece: bytes | memoryview = _read(body.fd, at, end)
        else:
            piece = memoryview(body)[at:end]
        yield piece
        at = end
        patience.progress()  # it wants more: some has been sent


def _read(fd: int, start: int, stop: int) -> bytes:
    found = b""
    try:
        while len(found) < stop - start:
            more = os.pread(fd, stop - start - len(found), start + len(found))
            if not more:
                raise _Unread("it became shorter while it was sent")
            found += more
    except OSError as error:
        raise _Unread(error.strerror) from None
    return found


class _Unable(StoreError):  # noqa: N818 - told apart here only
    """What this kind of store does not have."""


class _Unread(Exception):  # noqa: N818 - passes through obstore, and is told apart from its errors by that
    """The file that is sent cannot be read."""


class _Broken(Exception):  # noqa: N818 - always tried again
    """The connection failed while a body was read."""

    def __init__(self, message: str, version: str) -> None:
        super().__init__(message)
        self.version = version


def _connect(scheme: str, bucket: str, access: Access) -> Callable[[int], Any]:
    """What makes obstore's store, given how often it tries a request again by itself."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore
    except ImportError:
        raise InputError("gs:// and az:// need obstore: pip install 'shardprep[obstore]'") from None
    if access.profile is not None or access.region is not None:
        raise InputError(f"a profile and a region are of s3://, not of {scheme}://")
    client = {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=access.connect_timeout),
        "read_timeout": timedelta(seconds=access.idle_timeout),
        "allow_http": (access.endpoint_url or "").startswith("http://"),
    }

    def make(retries: int) -> Any:
        options: dict[str, Any] = {
            "client_options": client,
            "retry_config": {
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=access.deadline),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=10),
                    "base": 2,
                },
            },
        }
        if access.anonymous:
            options["skip_signature"] = True
        try:
            if scheme == "gs":
                endpoint = {"base_url": access.endpoint_url} if access.endpoint_url else {}
                return GCSStore(bucket, **endpoint, **options)  # type: ignore[arg-type]
            endpoint = {"endpoint": access.endpoint_url} if access.endpoint_url else {}
            return AzureStore(bucket, **endpoint, **options)  # type: ignore[arg-type]
        except (BaseError, ValueError) as error:
            raise InputError(
                f"{scheme}://{bucket}: {quote(_without_secrets(str(error)), limit=300)}"
            ) from None

    return make


def _without_secrets(text: str) -> str:
    """The first lines of an error, without what stands behind the question mark of a URL."""
    return re.sub(r"\?[^\s\"')]*", "?...", text.partition("\n\nDebug source:")[0])
