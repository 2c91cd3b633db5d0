#!/usr/bin/env python3
"""Small servers that s3.py puts beside nginx: a sink for uploads, a wait before a first byte, a relay that stalls.

    python3 benchmarks/s3_servers.py sink PORT STATE [--keep] [--certificate FILE --key FILE] [--processes N]

Standard library only, for measuring only: none of them checks who asks. The sink speaks as much S3 as an upload needs
and throws bodies away, so that what is measured is the client; with --keep it stores what came, and refuses a body
that differs from its x-amz-checksum-crc32. What it knows of an object lies in the folder STATE, one small file each.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

HOST = "127.0.0.1"
BUFFER = 2**20
SMALL = 2**20
"""Bodies up to this size are kept always: a pusher may want to read its manifest back."""

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
DATE = "Sat, 21 Nov 2026 12:00:00 GMT"


# --------------------------------------------------------------------------------------------------------- one server
def listen(port: int, serve: Callable[[socket.socket], None]) -> None:
    """Accept for ever, a thread for each connection. Several processes may listen on one port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((HOST, port))
        listener.listen(1024)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_until_closed, args=(serve, connection), daemon=True).start()


def _until_closed(serve: Callable[[socket.socket], None], connection: socket.socket) -> None:
    try:
        serve(connection)
    except OSError:  # whoever asked has gone
        pass
    finally:
        connection.close()


@dataclass(slots=True)
class Request:
    """The head of one request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class Wire:
    """Requests and bodies of one connection, received into one buffer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._pending = b""
        self._buffer = memoryview(bytearray(BUFFER))
        # one call for a full buffer, where the socket can: TLS gives a record at a time
        self._flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL

    def request(self) -> Request | None:
        """The next one; None where there is none."""
        while b"\r\n\r\n" not in self._pending:
            more = self.connection.recv(65536)
            if not more:
                return None
            self._pending += more
        head, _, self._pending = self._pending.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        url = urlsplit(target)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        if headers.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, unquote(url.path), query, headers)

    def body(self, request: Request) -> Iterator[memoryview]:
        """The body as it comes; a view is good until the next."""
        if "chunked" in request.headers.get("transfer-encoding", "").lower():
            while size := int(self._line().partition(b";")[0], 16):
                yield from self._exactly(size)
                self._line()
            while self._line():
                pass
        else:
            yield from self._exactly(int(request.headers.get("content-length", "0")))

    def _line(self) -> bytes:
        while b"\r\n" not in self._pending:
            more = self.connection.recv(65536)
            if not more:
                raise ConnectionResetError
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\r\n")
        return line

    def _exactly(self, count: int) -> Iterator[memoryview]:
        if self._pending and count:
            first, self._pending = self._pending[:count], self._pending[count:]
            count -= len(first)
            yield memoryview(first)
        while count:
            got = self.connection.recv_into(self._buffer, min(count, BUFFER), self._flags)
            if not got:
                raise ConnectionResetError
            count -= got
            yield self._buffer[:got]

    def answer(
        self,
        status: str,
        body: bytes = b"",
        *,
        length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a response; `length` where it is not the body's, as for HEAD."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
        lines += ["Content-Type: application/xml", "x-amz-request-id: 1", f"Last-Modified: {DATE}"]
        lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def refuse(self, status: str, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())


# ----------------------------------------------------------------------------------------------------------- the sink
class Sink:
    """Takes uploads. Everything known of them is in files, for several processes share a port."""

    def __init__(self, state: Path, *, keep: bool) -> None:
        self.state, self.keep = state, keep

    def serve(self, connection: socket.socket) -> None:
        wire = Wire(connection)
        while (request := wire.request()) is not None:
            if request.method == "PUT":
                self._put(wire, request)
                continue
            body = b"".join(map(bytes, wire.body(request)))
            if request.method == "POST" and "uploads" in request.query:
                self._begin(wire, request)
            elif request.method == "POST" and "uploadId" in request.query:
                self._complete(wire, request, body)
            elif request.method == "POST":
                wire.answer("200 OK", f"<DeleteResult {NAMESPACE}/>".encode())
            elif request.method == "DELETE":
                self._delete(request)
                wire.answer("204 No Content")
            elif "list-type" in request.query or "uploads" in request.query:
                self._list(wire, request)
            else:
                self._get(wire, request)

    def file(self, path: str) -> Path:
        return self.state / quote(path, safe="")

    def upload(self, request: Request) -> Path:
        return self.state / f"upload-{request.query['uploadId']}"

    def _put(self, wire: Wire, request: Request) -> None:
        size, crc, kept = 0, 0, bytearray()
        framed = "aws-chunked" in request.headers.get("content-encoding", "")
        declared = int(request.headers.get("x-amz-decoded-content-length", -1))
        keep = self.keep or (not framed and 0 <= int(request.headers.get("content-length", -1)) <= SMALL)
        for view in wire.body(request):
            size += len(view)
            if keep:
                kept += view
        if framed:
            size = declared
            kept = unframed(kept) if keep else kept
        sent = request.headers.get("x-amz-checksum-crc32")
        if self.keep:
            crc = zlib.crc32(kept)
            if sent and base64.b64decode(sent) != crc.to_bytes(4, "big"):
                return wire.refuse("400 Bad Request", "BadDigest")
            if len(kept) != size:
                return wire.refuse("400 Bad Request", "IncompleteBody")
        if "uploadId" in request.query:
            file = self.upload(request) / f"{int(request.query['partNumber']):05d}"
            if not file.parent.is_dir():
                return wire.refuse("404 Not Found", "NoSuchUpload")
        else:
            file = self.file(request.path)
            if request.headers.get("if-none-match") == "*" and file.exists():
                return wire.refuse("412 Precondition Failed", "PreconditionFailed")
        etag = note(file, size, bytes(kept) if keep else None)
        # said as S3 says it to who sent a checksum; without --keep nobody has looked
        said = {"x-amz-checksum-crc32": sent} if sent else {}
        return wire.answer("200 OK", headers={"ETag": etag, **said})

    def _begin(self, wire: Wire, request: Request) -> None:
        name = secrets.token_hex(16)
        (self.state / f"upload-{name}").mkdir()
        bucket, _, key = request.path.lstrip("/").partition("/")
        wire.answer(
            "200 OK",
            f"<InitiateMultipartUploadResult {NAMESPACE}><Bucket>{escape(bucket)}</Bucket>"
            f"<Key>{escape(key)}</Key><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode(),
        )

    def _complete(self, wire: Wire, request: Request, body: bytes) -> None:
        folder = self.upload(request)
        named = [folder / f"{int(each):05d}" for each in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        if not named or not all(each.is_file() for each in named):
            return wire.refuse("400 Bad Request", "InvalidPart")
        size = sum(json.loads(each.read_text())["size"] for each in named)
        file = self.file(request.path)
        if self.keep:
            with file.with_name(file.name + ".body").open("wb") as out:
                for each in named:
                    out.write(each.with_name(each.name + ".body").read_bytes())
        etag = note(file, size, None)
        shutil.rmtree(folder)
        bucket, _, key = request.path.lstrip("/").partition("/")
        return wire.answer(
            "200 OK",
            f"<CompleteMultipartUploadResult {NAMESPACE}><Location>http://{HOST}{escape(request.path)}</Location>"
            f"<Bucket>{escape(bucket)}</Bucket><Key>{escape(key)}</Key><ETag>{escape(etag)}</ETag>"
            "</CompleteMultipartUploadResult>".encode(),
        )

    def _delete(self, request: Request) -> None:
        if "uploadId" in request.query:
            shutil.rmtree(self.upload(request), ignore_errors=True)
            return
        file = self.file(request.path)
        file.unlink(missing_ok=True)
        file.with_name(file.name + ".body").unlink(missing_ok=True)

    def _list(self, wire: Wire, request: Request) -> None:
        bucket = request.path.strip("/")
        if "uploads" in request.query:
            answer = f"<ListMultipartUploadsResult {NAMESPACE}><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
            return wire.answer("200 OK", answer.encode())
        items = []
        for file in sorted(self.state.iterdir()):
            key = unquote(file.name).removeprefix(f"/{bucket}/")
            if file.is_file() and not file.suffix and key.startswith(request.query.get("prefix", "")):
                known = json.loads(file.read_text())
                items.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-21T12:00:00.000Z</LastModified>"
                    f"<ETag>{escape(known['etag'])}</ETag><Size>{known['size']}</Size></Contents>"
                )
        return wire.answer(
            "200 OK",
            f"<ListBucketResult {NAMESPACE}><Name>{escape(bucket)}</Name><KeyCount>{len(items)}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>".encode(),
        )

    def _get(self, wire: Wire, request: Request) -> None:
        head = request.method == "HEAD"
        file = self.file(request.path)
        if not file.is_file():
            return (
                wire.answer("404 Not Found", length=0) if head else wire.refuse("404 Not Found", "NoSuchKey")
            )
        known = json.loads(file.read_text())
        tag = {"ETag": known["etag"]}
        if head:
            return wire.answer("200 OK", length=known["size"], headers=tag)
        body = file.with_name(file.name + ".body")
        if not body.is_file():
            return wire.refuse("501 Not Implemented", "TheBodyWasThrownAway")
        data = body.read_bytes()
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            start, stop = int(found[1]), min(int(found[2] or len(data) - 1) + 1, len(data))
            where = f"bytes {start}-{stop - 1}/{len(data)}"
            return wire.answer(
                "206 Partial Content", data[start:stop], headers={**tag, "Content-Range": where}
            )
        return wire.answer("200 OK", data, headers=tag)


def note(file: Path, size: int, body: bytes | None) -> str:
    """Write down that an object or a part has come; its ETag."""
    etag = f'"{secrets.token_hex(16)}"'
    if body is not None:
        file.with_name(file.name + ".body").write_bytes(body)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    temporary.write_text(json.dumps({"size": size, "etag": etag}))
    temporary.rename(file)
    return etag


def unframed(body: bytearray) -> bytearray:
    """What aws-chunked framing holds: `SIZE[;chunk-signature=...]`, bytes, and so on to a size of 0."""
    found, at = bytearray(), 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].partition(b";")[0], 16)
        if not size:
            return found
        found += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


def sink(chosen: argparse.Namespace) -> None:
    chosen.state.mkdir(parents=True, exist_ok=True)
    serve = Sink(chosen.state, keep=chosen.keep).serve
    if chosen.certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(chosen.certificate, chosen.key)
        plain = serve

        def serve(connection: socket.socket) -> None:
            with context.wrap_socket(connection, server_side=True) as secured:
                plain(secured)

    for _ in range(chosen.processes - 1):
        if os.fork() == 0:
            break
    listen(chosen.port, serve)


# ----------------------------------------------------------------------------------------------- the wait, the stall
def wait(chosen: argparse.Namespace) -> None:
    """Answer 204 after a while: nginx asks this (auth_request) before it sends a first byte."""

    def serve(connection: socket.socket) -> None:
        wire = Wire(connection)
        while wire.request() is not None:
            time.sleep(chosen.seconds)
            connection.sendall(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")

    listen(chosen.port, serve)


def relay(chosen: argparse.Namespace) -> None:
    """Pass everything on to another port; once after the file TRIGGER appears, stop in the middle of a body.

    It stops after TRIGGER's number of bytes, with half of what it has at hand, and holds the connection open.
    """
    count, lock = 0, threading.Lock()

    def stalls(size: int) -> bool:
        nonlocal count
        with lock:
            if not chosen.trigger.exists():
                count = 0
                return False
            count += size
            if size < 4096 or count < int(chosen.trigger.read_text()):
                return False
            chosen.trigger.unlink()
            count = 0
            return True

    def back(client: socket.socket, server: socket.socket) -> None:
        buffer = memoryview(bytearray(2**18))
        try:
            while got := server.recv_into(buffer):
                if stalls(got):
                    client.sendall(buffer[: got // 2])
                    return  # and leave both open: `forth` closes them when the client goes
                client.sendall(buffer[:got])
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def forth(client: socket.socket) -> None:
        with socket.create_connection((HOST, chosen.target)) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=back, args=(client, server), daemon=True).start()
            while sent := client.recv(65536):
                server.sendall(sent)

    listen(chosen.port, forth)


def until(chosen: argparse.Namespace) -> None:
    """End once all ports accept connections; exit 1 where one does not within ten seconds."""
    limit = time.monotonic() + 10
    for port in chosen.ports:
        while True:
            try:
                socket.create_connection((HOST, port), timeout=1).close()
                break
            except OSError as error:
                if time.monotonic() > limit:
                    sys.exit(f"port {port}: nothing listens there ({error})")
                time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="SERVER")
    one = commands.add_parser("sink")
    one.add_argument("port", type=int)
    one.add_argument("state", type=Path)
    one.add_argument("--keep", action="store_true", help="store bodies, and check x-amz-checksum-crc32")
    one.add_argument("--certificate")
    one.add_argument("--key")
    one.add_argument("--processes", type=int, default=1)
    one.set_defaults(run=sink)
    one = commands.add_parser("wait")
    one.add_argument("port", type=int)
    one.add_argument("seconds", type=float)
    one.set_defaults(run=wait)
    one = commands.add_parser("relay")
    one.add_argument("port", type=int)
    one.add_argument("target", type=int)
    one.add_argument("trigger", type=Path)
    one.set_defaults(run=relay)
    one = commands.add_parser("until")
    one.add_argument("ports", type=int, nargs="+")
    one.set_defaults(run=until)
    chosen = parser.parse_args()
    chosen.run(chosen)


if __name__ == "__main__":
    main()
