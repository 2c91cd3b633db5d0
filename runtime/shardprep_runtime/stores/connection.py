"""Move bytes over one HTTP/1.1 connection: into the receiver's own memory, and from a file without a copy.

The standard library's http.client writes requests and reads the heads of answers; bodies bypass it. The kernel is
asked for many bytes at once (MSG_WAITALL under SO_RCVTIMEO), so that a core is spent on copying, not on calls.
"""

from __future__ import annotations

import http.client
import io
import os
import random
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ..errors import SourceError, StoreError, quote
from .store import SCRATCH, Body, FileRange, Sink

LEAST_RATE: Final = 8 * 2**10
"""Bytes a second; a connection that is slower for as long as its idle timeout is given up."""

LOOK_EVERY: Final = 0.25
"""Seconds after which the kernel gives what has come of the bytes it was asked for."""


class Broken(Exception):  # noqa: N818 - always tried again by the store
    """The connection failed: refused, reset, ended early, too slow."""

    def __init__(self, message: str, *, version: str | None = None, unanswered: bool = False) -> None:
        super().__init__(message)
        self.version = version
        """Version of the object that the bytes that did come are of; None where none came."""
        self.unanswered = unanswered
        """Whether it was closed from the other side before the answer began."""


class Reply:
    """The head of an answer, and its body where that is small."""

    def __init__(
        self, status: int, headers: Mapping[str, str], response: http.client.HTTPResponse | None
    ) -> None:
        self.status = status
        self.headers = headers
        """By lower-case name."""
        self._response = response

    def read(self, most: int) -> bytes:
        """At most `most` bytes of the body."""
        if self._response is None:
            return b""
        try:
            return self._response.read(most)
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"the answer broke off: {_said(error)}") from None


class Connection:
    """One connection, used by one thread at a time."""

    def __init__(
        self, address: tuple[str, int], tls: ssl.SSLContext | None, *, connect: float, idle: float
    ) -> None:
        self._address, self._tls, self._idle_timeout = address, tls, idle
        self.requests = 0
        """Made on it so far."""
        self._response: http.client.HTTPResponse | None = None
        self._received = True
        try:
            self._socket = _open(address, connect)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=address[0])
        except ssl.SSLCertVerificationError as error:
            raise StoreError(
                f"{quote(address[0])}: its certificate is not trusted: {quote(error.verify_message)}; "
                "AWS_CA_BUNDLE names the file of those that are"
            ) from None
        except OSError as error:
            raise Broken(f"{quote(address[0])}:{address[1]}: cannot be reached: {_said(error)}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is None:  # for receive and send, which use the socket in blocking mode
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(min(LOOK_EVERY, idle / 2))
            )
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(idle))
        self._socket.settimeout(idle)
        self._http = http.client.HTTPConnection(*address)
        self._http.response_class = _Response
        self._http.sock = self._socket

    def request(self, method: str, path: str, headers: Mapping[str, str], body: Body | None) -> Reply:
        """Send a request and read the head of its answer.

        Args:
            method: GET or PUT.
            path: Path and query, encoded.
            headers: Headers to send; a signed request's have its signature.
            body: What is sent after them; None: nothing.

        Raises:
            Broken: Where the connection fails.
            SourceError: Where the file that is sent cannot be read.
        """
        self.requests += 1
        self._received = False
        try:
            self._http.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                self._http.putheader(name, value)
            self._http.putheader("Accept-Encoding", "identity")
            self._http.endheaders()
            if body is not None:
                self._send(body)
            self._response = response = self._http.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Broken(
                f"no answer: {_said(error)}", unanswered=isinstance(error, ConnectionError)
            ) from None
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found, response)

    def _send(self, body: Body) -> None:
        """Send a body. An early answer (the store refuses it) is left to be read."""
        try:
            if isinstance(body, FileRange):
                self._send_file(body)
            else:
                self._send_all(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # getresponse will find the answer, or the same error

    def _send_all(self, data: bytes | memoryview) -> None:
        """As sendall, whose timeout is for all of it, however much that is."""
        view = memoryview(data)
        while view:
            view = view[self._socket.send(view[:SCRATCH]) :]

    def _send_file(self, body: FileRange) -> None:
        if self._tls is not None:
            for data in _read(body):
                self._send_all(data)
            return
        at = body.start
        self._socket.settimeout(None)
        try:
            while at < body.stop:
                sent = os.sendfile(self._socket.fileno(), body.fd, at, body.stop - at)
                if not sent:
                    raise SourceError("the file became shorter while it was sent")
                at += sent
        finally:
            self._socket.settimeout(self._idle_timeout)

    def receive(self, sink: Sink, *, version: str | None) -> None:
        """Bring the body of the last answer into `sink`.

        Args:
            sink: Wants as many bytes as the body was checked to have.
            version: Version of the object that they are of.

        Raises:
            Broken: Where the connection fails or is too slow; what has landed has landed.
        """
        response = self._response
        assert response is not None
        try:
            early = response.fp.peek()[: sink.left]  # what came along with the head
            response.fp.read(len(early))
        except (OSError, http.client.HTTPException) as error:
            raise Broken(_said(error), version=version) from None
        # from here on an OSError is the sink's: a full disk is not a failure of the connection
        while early:
            room = sink.room()[: len(early)]
            room[:] = early[: len(room)]
            early = early[len(room) :]
            sink.landed(len(room))
        if self._tls is None:
            self._socket.settimeout(None)
        while sink.left:
            room = sink.room()[:SCRATCH]
            done, complaint = self._fill(room)
            if done:
                sink.landed(done)
            if complaint:
                raise Broken(complaint, version=version)
        self._socket.settimeout(self._idle_timeout)
        self._received = True

    def _fill(self, room: memoryview) -> tuple[int, str]:
        """Receive until `room` is full: how many bytes have come, and, where they are not all, why."""
        flags = socket.MSG_WAITALL if self._tls is None else 0
        began = last = time.monotonic()
        done = 0
        while done < len(room):
            try:
                got = self._socket.recv_into(room[done:], 0, flags)
            except (BlockingIOError, TimeoutError):
                got = -1
            except OSError as error:
                return done, _said(error)
            if got == 0:
                return done, "the connection ended before all bytes had come"
            now = time.monotonic()
            if got > 0:
                done, last = done + got, now
            if now - last >= self._idle_timeout * 0.99:
                return done, f"nothing came for {now - last:.1f} s"
            if now - began >= self._idle_timeout and done < LEAST_RATE * (now - began):
                return done, f"only {done} bytes came in {now - began:.1f} s"
        return done, ""

    def reusable(self) -> bool:
        """Whether the last answer was read to its end and another request may follow."""
        response = self._response
        if response is None or response.will_close:
            return False
        if self._received:
            response.close()
            return True
        return response.isclosed()

    def close(self) -> None:
        """Close it."""
        if self._response is not None:
            self._response.close()
        self._http.close()
        self._socket.close()


class _Response(http.client.HTTPResponse):
    """http.client takes a head that breaks off for a whole one."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.fp = _Lines(self.fp.detach())


class _Lines(io.BufferedReader):
    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise ConnectionError("the connection ended before the head of the answer did")
        return line


def _open(address: tuple[str, int], timeout: float) -> socket.socket:
    """A connection to any of the addresses of a name: a large store has many, and each has its own limit."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    random.shuffle(found)
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, place in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout)
            sock.connect(place)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure


def _read(body: FileRange) -> Iterator[memoryview]:
    """The bytes of a file. An OSError of the file is not the connection's, which would be tried again."""
    try:
        yield from body.chunks()
    except OSError as error:
        raise SourceError(f"the file that is sent cannot be read: {_said(error)}") from None


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not error.args:
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return quote(text or type(error).__name__)
