"""Serve one connection: read a request, have it done, send the answer, with the fault that was asked for."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import os
import select
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from .board import Board
from .bodies import receive
from .faults import cut_pieces, refusal_of, tamper
from .messages import Gone, Payload, Piece, Refusal, Request, Response, refusal_response
from .service import Service
from .signatures import check_signature


class Connection:
    """Serves the requests of one connection, one after the other, in a thread of its own."""

    def __init__(self, sock: socket.socket, service: Service, board: Board) -> None:
        self.sock, self.service, self.board = sock, service, board
        self.file = sock.makefile("rb", 65536)
        self.continued = True
        """Whether the client is known to send the body of its request."""
        self.record: dict[str, Any] | None = None

    def run(self) -> None:
        try:
            while self.serve_one():
                pass
        except Gone as gone:
            if gone.args == ("reset",):
                with contextlib.suppress(OSError):
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (EOFError, ConnectionError):
            pass  # the process that has the board has ended
        finally:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(OSError):
                self.sock.close()

    def proceed(self) -> None:
        if not self.continued:
            self.continued = True
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send(self, data: bytes, flags: int = 0) -> None:
        try:
            self.sock.sendall(data, flags)
        except OSError as error:
            raise Gone from error

    def wait(self, seconds: float | None) -> None:
        """Do nothing for a while, or until the client goes away, which raises Gone."""
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        if poll.poll(None if seconds is None else max(0, seconds * 1000)):
            raise Gone

    def hold(self) -> None:
        """Keep the connection open, silent, until the client goes away."""
        self.finish()
        self.wait(None)

    def finish(self) -> None:
        """Count this request, once."""
        if self.record is not None:
            self.board.end(self.record)
            self.record = None

    def read_head(self) -> Request | None:
        try:
            line = self.file.readline(65536)
            headers: dict[str, str] = {}
            if not line:
                return None
            while entry := self.file.readline(65536).strip():
                name, _, value = entry.decode("latin1").partition(":")
                name = name.lower()
                headers[name] = f"{headers[name]},{value.strip()}" if name in headers else value.strip()
            method, target, _version = line.decode("latin1").split()
        except (OSError, ValueError) as error:
            raise Gone from error
        if target.startswith(("http://", "https://")):  # some clients say it all, as if to a proxy
            target = "/" + target.partition("://")[2].partition("/")[2]
        path, _, query = target.partition("?")
        self.continued = headers.get("expect", "").lower() != "100-continue"
        length, chunked = (
            headers.get("content-length", "0"),
            "chunked" in headers.get("transfer-encoding", ""),
        )
        if not length.isdecimal():
            raise Gone
        return Request(method, path, query, headers, Payload(self.file, int(length), chunked, self.proceed))

    def locate(self, request: Request) -> None:
        """Find bucket, key and parameters."""
        host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        try:
            path = unquote(request.raw_path, errors="strict")
            pairs = [pair.partition("=")[::2] for pair in request.raw_query.split("&") if pair]
            params = {
                unquote(name): unquote(value.replace("+", " "), errors="strict") for name, value in pairs
            }
        except UnicodeDecodeError:
            raise Refusal(400, "InvalidURI", "Couldn't parse the specified URI.") from None
        if host.endswith(".localhost"):
            request.bucket, request.key = host.removesuffix(".localhost"), path[1:]
        else:
            request.bucket, _, request.key = path[1:].partition("/")
        ignored = ("x-id", "X-Amz-")
        request.params = {name: value for name, value in params.items() if not name.startswith(ignored)}

    def serve_one(self) -> bool:
        """Answer one request; whether another may follow."""
        request = self.read_head()
        if request is None:
            return False
        self.board.begin()
        self.record = {
            "method": request.method,
            "operation": "Unknown",
            "key": "",
            "range": request.headers.get("range"),
            "status": None,
            "sent": 0,
            "received": 0,
            "fault": None,
            "at": time.time(),
        }
        response = None
        try:
            try:
                response, fault = self.answer(request, self.record)
            finally:
                self.record["received"] = request.body.taken
            if not request.body.ended and self.continued:
                request.body.drain()  # a client that still sends would lose our answer to a reset
            closing = not request.body.ended or request.headers.get("connection", "").lower() == "close"
            self.deliver(response, fault, self.record, closing=closing)
            return not closing
        finally:
            if response is not None and response.fd >= 0:
                os.close(response.fd)
            self.finish()

    def answer(self, request: Request, record: dict[str, Any]) -> tuple[Response, dict[str, Any] | None]:
        """The response, and the fault that its delivery is to have."""
        request_id, reads = uuid.uuid4().hex[:16].upper(), request.method in ("GET", "HEAD")
        response: Response | None = None

        def perform(function: Callable[[Request], Response]) -> Response:
            try:
                return function(request)
            except Refusal as refusal:
                return refusal_response(refusal, request_id, bare=request.method == "HEAD")

        def admit(request: Request) -> Response:
            self.locate(request)
            record["key"] = request.key or request.params.get("prefix", "")
            record["bucket"] = request.bucket
            record["operation"], self.function = self.service.route(request)
            check_signature(request, self.service.settings, self.board)
            self.service.check_headers(request)
            if "chunked" in request.headers.get(
                "transfer-encoding", ""
            ) and not request.payload_hash.startswith("STREAMING"):
                raise Refusal(501, "NotImplemented", "Transfer-Encoding without aws-chunked")
            if (
                request.method == "PUT"
                and not {"content-length", "transfer-encoding"} & request.headers.keys()
            ):
                raise Refusal(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
            return Response(0)

        admitted = perform(admit)
        if admitted.status:
            return admitted, None
        if request.method in ("GET", "HEAD", "DELETE"):
            refused = perform(self.read_nothing)
            if refused.status != 200:
                return refused, None
        if reads:
            response = perform(self.function)
        fault, status = None, response.status if response else 0
        traits = {"any"} | (set() if reads else {"write"}) | (set() if request.body.ended else {"upload"})
        size = int(
            request.headers.get("x-amz-decoded-content-length", request.headers.get("content-length", "0"))
            or 0
        )
        if response is not None:
            size = 0 if response.bare else response.length
            traits |= {"body"} if size else set()
            if status in (200, 206) and size:
                traits |= {"object"} if response.fd >= 0 else set()
                traits |= {"list"} if record["operation"] == "ListObjectsV2" else set()
        try:
            fault = self.board.take(request.method, record["key"], size, traits)
            if fault is not None:
                record["fault"] = fault["mode"]
                changed = self.begin_fault(fault, request, response, request_id)
                if changed is not response and response is not None and response.fd >= 0:
                    os.close(response.fd)
                response = changed
            response = response or perform(self.function)
        except BaseException:
            if response is not None and response.fd >= 0:
                os.close(response.fd)
            raise
        response.headers.setdefault("x-amz-request-id", request_id)
        if fault is not None and fault["mode"] == "lost_response":
            record["status"] = response.status
            raise Gone("reset")
        return response, fault

    def read_nothing(self, request: Request) -> Response:
        """Check the payload hash of a request that should have no body."""
        receive(request, lambda data: None, checksums=False)
        return Response(200)

    def begin_fault(
        self, fault: dict[str, Any], request: Request, response: Response | None, request_id: str
    ) -> Response | None:
        """What a fault does before anything is sent, and for a write before anything is done."""
        mode = fault["mode"]
        if mode in ("delay", "slow_first_byte") and (mode == "delay" or response is not None):
            self.wait(fault.get("delay", 1.0))
        elif mode == "hang":
            if self.continued:
                request.body.drain()  # or the end of a client that still sends would never reach us
            self.hold()
        elif mode == "reset" and (response is None or response.bare):
            raise Gone("reset")
        elif mode == "drop_upload":
            request.drop_after = fault.get("after", 0)
        elif mode == "replace":
            self.service.replace_object(request)
        elif mode == "status":
            return refusal_response(refusal_of(fault), request_id, bare=request.method == "HEAD")
        elif response is not None:
            tamper(fault, response)
        return response

    def deliver(
        self, response: Response, fault: dict[str, Any] | None, record: dict[str, Any], *, closing: bool
    ) -> None:
        mode = fault["mode"] if fault else None
        if fault and mode == "slow_first_byte" and record["method"] not in ("GET", "HEAD"):
            self.wait(fault.get("delay", 1.0))
        record["status"] = response.status
        reason = http.client.responses.get(response.status, "Unknown")
        lines = [f"HTTP/1.1 {response.status} {reason}", "Server: shardprep-s3server"]
        now = time.time() + self.service.settings.clock_offset
        lines += [f"Date: {email.utils.formatdate(now, usegmt=True)}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if response.status not in (204, 304):
            lines.append(f"Content-Length: {response.length}")
        lines += ["Connection: close"] if closing else []
        head = "\r\n".join([*lines, "", ""]).encode("latin1")
        pieces = [] if response.bare else response.pieces
        if fault and mode in ("reset", "truncate", "stall"):
            length = response.length
            pieces = cut_pieces(pieces, 0, min(fault.get("after", length // 2), max(length - 1, 0)))
        if len(pieces) == 1 and isinstance(pieces[0], bytes) and len(pieces[0]) < 65536 and not mode:
            self.send(head + pieces[0])
            record["sent"] += len(pieces[0])
            return
        tls = isinstance(self.sock, ssl.SSLSocket)
        self.send(head, socket.MSG_MORE if pieces and not mode and not tls else 0)
        rate = fault.get("rate", 65536) if fault and mode == "drip" else None
        for piece in pieces:
            self.send_piece(piece, response.fd, record, rate=rate, tls=tls)
        if mode == "stall":
            self.hold()
        if mode in ("reset", "truncate"):
            raise Gone("reset" if mode == "reset" else "truncate")

    def send_piece(
        self, piece: Piece, fd: int, record: dict[str, Any], *, rate: float | None, tls: bool
    ) -> None:
        """Send bytes, or a range of the file from the file itself, and count what has gone."""
        at, stop = (0, len(piece)) if isinstance(piece, bytes) else piece
        most = stop - at if rate is None else max(1, int(rate / 20))
        while at < stop:
            if isinstance(piece, bytes):
                data = piece[at : min(stop, at + most)]
                self.send(data)
                gone = len(data)
            elif tls:
                data = os.pread(fd, min(stop - at, most, 2**18), at)
                self.send(data)
                gone = len(data)
            else:
                try:
                    gone = os.sendfile(self.sock.fileno(), fd, at, min(stop - at, most, 2**30))
                except OSError as error:
                    raise Gone from error
            if gone == 0:  # the file was cut short by hand
                raise Gone
            at += gone
            record["sent"] += gone
            if rate is not None and at < stop:
                self.wait(gone / rate)
