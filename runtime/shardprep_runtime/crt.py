"""Move the data of S3 over connections of awscrt: TLS and sockets run in its threads, outside of Python's lock.

Only its HTTP client is used, with our own signatures, checks and retries: its S3 client cuts requests anew, retries by
itself and adds checksums as trailers, which some stores refuse and some store as data.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, cast

from .connection import LEAST_RATE, Broken, Connection, Reply
from .errors import InputError, SourceError, StoreError, quote
from .s3 import NativeMover
from .store import Body, FileRange, Sink

if TYPE_CHECKING:
    from .s3 import S3Store

_NOTHING: Final = "nothing"
"""No event of awscrt: none has come in time."""

WINDOW: Final = 4 * 2**20
"""Bytes that a connection may be ahead of the sink."""

TLS_SECONDS: Final = 10.0
"""For the handshake, beside the time to connect: awscrt's own limit."""


class CrtMover(NativeMover):
    """What NativeMover does, over other connections. Does not survive a fork."""

    def __init__(self, store: S3Store) -> None:
        try:
            from awscrt import http, io  # noqa: F401
        except ImportError:
            raise InputError("transfer=crt needs awscrt: pip install 'shardprep[crt]'") from None
        super().__init__(store)
        self._crt_tls = _tls_options(store, self._address[0]) if self._tls is not None else None
        self._trusted = self._tls is None

    def _connection(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        access = self._store.access
        if not self._trusted:
            # awscrt tells of a certificate that is not trusted only after up to 30 s, and not in words
            Connection(
                self._address, self._tls, connect=access.connect_timeout, idle=access.idle_timeout
            ).close()
            self._trusted = True
        made = CrtConnection(
            self._address, self._crt_tls, connect=access.connect_timeout, idle=access.idle_timeout
        )
        return cast(Connection, made)  # it has all that is used of one


class CrtConnection:
    """As `connection.Connection`, used by one thread at a time; that thread alone touches the sink."""

    def __init__(self, address: tuple[str, int], tls: Any, *, connect: float, idle: float) -> None:
        from awscrt import http
        from awscrt.exceptions import AwsCrtError
        from awscrt.io import ClientBootstrap, SocketOptions

        self._idle = idle
        self.requests = 0
        """Made on it so far."""
        self._exchange: _Exchange | None = None
        options = SocketOptions()
        options.connect_timeout_ms = int(connect * 1000)
        made = http.HttpClientConnection.new(
            *address,
            ClientBootstrap.get_or_create_static_default(),
            options,
            tls,
            manual_window_management=True,
            initial_window_size=WINDOW,
        )
        at = f"{quote(address[0])}:{address[1]}"
        try:
            self._http = made.result(connect + (TLS_SECONDS if tls else 0))
        except TimeoutError:
            made.add_done_callback(_close)
            raise Broken(f"{at}: cannot be reached: timed out") from None
        except AwsCrtError as error:
            if error.name == "AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE":
                raise StoreError(
                    f"{at}: no secure connection: {quote(error.name)}; is its certificate trusted? "
                    "AWS_CA_BUNDLE names the file of those that are"
                ) from None
            raise Broken(f"{at}: cannot be reached: {quote(error.name)}") from None

    def request(self, method: str, path: str, headers: Mapping[str, str], body: Body | None) -> Reply:
        """Send a request and read the head of its answer. Raises Broken."""
        from awscrt import http
        from awscrt.exceptions import AwsCrtError

        self.requests += 1
        pairs = [*headers.items(), ("Accept-Encoding", "identity")]
        source = None if body is None else _Source(body)
        self._exchange = exchange = _Exchange(self._idle, source)
        try:
            request = http.HttpRequest(method, path, http.HttpHeaders(pairs), source)
            exchange.begin(self._http.request(request, exchange.on_response, exchange.on_body))
        except AwsCrtError as error:  # closed while it was idle
            raise Broken(f"no answer: {quote(error.name)}", unanswered=True) from None
        status, found = exchange.head()
        return _Reply(status, found, exchange)

    def receive(self, sink: Sink, *, version: str | None) -> None:
        """Put the body of the last answer, `sink.left` bytes that were checked to be its length, into `sink`.

        Raises Broken where the connection fails or is too slow; what has landed has landed.
        """
        exchange = self._exchange
        assert exchange is not None
        while sink.left:
            try:
                data = exchange.body()
            except Broken as broken:
                raise Broken(str(broken), version=version) from None
            if data is None:
                why = exchange.failure or "the connection ended before all bytes had come"
                raise Broken(why, version=version)
            with memoryview(data) as rest:
                at = 0
                while at < len(rest) and sink.left:
                    room = sink.room()[: len(rest) - at]
                    room[:] = rest[at : at + len(room)]
                    at += len(room)
                    sink.landed(len(room))
            exchange.consumed(len(data))
        with suppress(Broken):
            exchange.body()  # its end, so that the connection may be used again

    def reusable(self) -> bool:
        """Whether the last answer was read to its end and another request may follow."""
        exchange = self._exchange
        return exchange is not None and exchange.whole and bool(self._http.is_open())

    def close(self) -> None:
        """Close it."""
        self._http.close()


class _Exchange:
    """What awscrt's thread tells of one request, handed to the thread that asked."""

    def __init__(self, idle: float, source: _Source | None) -> None:
        self._idle, self._source = idle, source
        self._events: SimpleQueue[tuple[int, dict[str, str]] | bytes | str | None] = SimpleQueue()
        self._stream: Any = None
        self._waited, self._came, self._sent = 0.0, 0, 0
        self._slow: str | None = None
        self._ended = False
        self.failure: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the answer has come to its end."""
        return self._ended and self.failure is None

    def begin(self, stream: Any) -> None:
        self._stream = stream
        stream.completion_future.add_done_callback(self._on_end)
        stream.activate()

    def on_response(self, *, status_code: int, headers: list[tuple[str, str]], **_: Any) -> None:
        self._events.put((status_code, {name.lower(): value for name, value in headers}))

    def on_body(self, *, chunk: bytes, **_: Any) -> None:
        self._events.put(chunk)

    def _on_end(self, done: Future[int]) -> None:
        error = done.exception()
        self._events.put(None if error is None else str(getattr(error, "name", type(error).__name__)))

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, once they have come. Raises Broken."""
        event = self._next()
        if isinstance(event, tuple):
            return event
        if self._source is not None and self._source.error is not None:
            raise SourceError(f"the file that is sent cannot be read: {self._source.error}")
        name = event if isinstance(event, str) else "closed"
        raise Broken(f"no answer: {quote(name)}", unanswered="CLOSED" in name.upper())

    def body(self) -> bytes | None:
        """The next bytes of the body; None at its end. Raises Broken where it is too slow."""
        if self._ended:
            return None
        if self._slow is not None:
            raise Broken(self._slow)
        event = self._next()
        if isinstance(event, bytes):
            return event
        self._ended = True
        self.failure = quote(event) if isinstance(event, str) else None
        return None

    def consumed(self, count: int) -> None:
        """Let as many more bytes come."""
        self._stream.update_window(count)

    def _next(self) -> tuple[int, dict[str, str]] | bytes | str | None:
        """The next event. Raises Broken where too little has moved for as long as the idle timeout."""
        while True:
            began = time.monotonic()
            try:
                event = self._events.get(timeout=max(0.01, self._idle - self._waited))
            except Empty:
                event = _NOTHING
            self._waited += time.monotonic() - began
            if isinstance(event, bytes):
                self._came += len(event)
            if self._waited >= self._idle:
                sent = 0 if self._source is None else self._source.sent
                moved, waited = self._came + sent - self._sent, self._waited
                self._came, self._sent, self._waited = 0, sent, 0.0
                # an event that has come is handed on in any case: what is slow is so the next time too
                if event is _NOTHING and moved < LEAST_RATE * waited:
                    raise Broken(f"only {moved} bytes moved in {waited:.1f} s")
                if isinstance(event, bytes) and moved < LEAST_RATE * waited:
                    self._slow = f"only {moved} bytes moved in {waited:.1f} s"
            if event is not _NOTHING:
                return event


class _Reply(Reply):
    """An answer whose body comes through an exchange."""

    def __init__(self, status: int, headers: Mapping[str, str], exchange: _Exchange) -> None:
        super().__init__(status, headers, None)
        self._exchange = exchange

    def read(self, most: int) -> bytes:
        """At most about `most` bytes of the body."""
        found = b""
        while len(found) < most:
            data = self._exchange.body()
            if data is None:
                break
            found += data
            self._exchange.consumed(len(data))
        if self._exchange.failure is not None and not found and self.status == 200:
            raise Broken(f"the answer broke off: {self._exchange.failure}")
        return found


class _Source(io.RawIOBase):
    """The body of a request, as awscrt's thread reads it."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._body = body if isinstance(body, FileRange) else memoryview(body)
        self.sent = 0
        """Bytes so far."""
        self.error: str | None = None
        """Why the file could not be read; not raised, which awscrt would print. The request fails for its length."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.sent, os.SEEK_END: len(self._body)}[whence]
        self.sent = base + offset
        return self.sent

    def readinto(self, into: Any) -> int:
        room = memoryview(into)[: len(self._body) - self.sent]
        if isinstance(self._body, FileRange):
            try:
                got = os.preadv(self._body.fd, [room], self._body.start + self.sent) if room else 0
            except OSError as error:
                self.error, got = error.strerror or type(error).__name__, 0
            else:
                if room and not got:
                    self.error = "it became shorter"
        else:
            got = len(room)
            room[:] = self._body[self.sent : self.sent + got]
        self.sent += got
        return got


def _close(made: Future[Any]) -> None:
    """Close a connection that came too late."""
    if made.exception() is None:
        made.result().close()


def _tls_options(store: S3Store, host: str) -> Any:
    from awscrt.io import ClientTlsContext, TlsContextOptions

    options = TlsContextOptions()
    bundle = store.session.get_config_variable("ca_bundle")
    if bundle:
        options.override_default_trust_store_from_path(None, bundle)
    connection = ClientTlsContext(options).new_connection_options()
    connection.set_server_name(host)
    return connection
