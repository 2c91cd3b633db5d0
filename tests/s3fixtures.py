"""What tests of S3 share: an environment that is the server's alone, bytes to move, and what may stand in between."""

from __future__ import annotations

import http.client
import socket
import socketserver
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from s3server import S3Server
from shardprep_runtime import read_manifest
from shardprep_runtime.shard.revisions import blob_key
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.s3 import S3Store
from shardprep_runtime.stores.store import Access, Chunk, Store

BUCKET = "shards"

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path, server: S3Server | None) -> None:
    """Leave of the environment what belongs to the server: nothing of the user's, no request to a cloud's metadata."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "SHARDPREP_")) or name.upper() in PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("botocore.session.create_loader", _loader)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "no-credentials"))
    for name, value in server.environment().items() if server is not None else ():
        monkeypatch.setenv(name, value)


@cache
def _loader(path: str | None) -> Any:
    """botocore's descriptions of services, read once for all stores of a run rather than once for each."""
    from botocore.loaders import create_loader

    return create_loader(path)


def opened(prefix: str = "", *, bucket: str = BUCKET, **access: Any) -> S3Store:
    """The bucket of the environment's server, with little patience."""
    found = open_store(
        f"s3://{bucket}/{prefix}".rstrip("/"), Access(**{"idle_timeout": 1.0, "deadline": 5.0} | access)
    )
    assert isinstance(found, S3Store)
    return found


@cache
def content(size: int, *, seed: int = 1) -> bytes:
    """Bytes that are nowhere the same for long."""
    whole = b"".join(zlib.crc32(b"%d %d" % (seed, at)).to_bytes(4, "big") for at in range(size // 4 + 1))
    return whole[:size]


def chunk(data: bytes) -> Chunk:
    return Chunk(data, zlib.crc32(data))


def put_shard_set(store: Store, shards: Path, revision: str = "main") -> None:
    """Put a shard set into a store, as a push leaves it."""
    manifest = read_manifest(shards)
    for each in (*manifest.parts, *manifest.side_files):
        store.put(blob_key(each.digest), (shards / each.path).read_bytes())
    store.put(f"manifests/{revision}.json", (shards / "shardprep.json").read_bytes())


class _Relay(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    upstream: tuple[str, int]
    connections = 0


class _Piping(socketserver.BaseRequestHandler):
    server: _Relay

    def handle(self) -> None:
        self.server.connections += 1
        with socket.create_connection(self.server.upstream) as far:
            back = threading.Thread(target=_pipe, args=(far, self.request), daemon=True)
            back.start()
            _pipe(self.request, far)
            back.join()


def _pipe(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def relay(server: S3Server) -> Iterator[_Relay]:
    """What passes bytes on to the server, and counts `connections`. Its endpoint is `http://127.0.0.1:` and its port."""
    found = _Relay(("127.0.0.1", 0), _Piping)
    url = urlsplit(server.endpoint)
    found.upstream = (url.hostname or "", url.port or 0)
    with _serving(found):
        yield found


class Page(BaseHTTPRequestHandler):
    """Answers everything with a page and status 200, as a misconfigured endpoint or a captive portal does."""

    protocol_version = "HTTP/1.1"
    body = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body><p>Log in<br></body></html>"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 - as the base class wants them

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


class Proxy(BaseHTTPRequestHandler):
    """Forwards requests to where their target says or else to `upstream`, and keeps their lines in `seen`."""

    protocol_version = "HTTP/1.1"
    seen: list[str]
    upstream = ""
    altered: Mapping[str, str] = {}
    """Headers of answers that are changed, where there are any of that name."""

    def forward(self) -> None:
        url = urlsplit(self.path if "://" in self.path else self.upstream + self.path)
        self.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        far = http.client.HTTPConnection(url.hostname or "", url.port)
        try:
            target = url.path + (f"?{url.query}" if url.query else "")
            far.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                far.putheader(name, value)
            far.endheaders(body or None)
            answer = far.getresponse()
            data = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, self.altered.get(name.lower(), value))
            self.end_headers()
            self.wfile.write(data)
        finally:
            far.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 - as the base class wants them

    def handle_expect_100(self) -> bool:
        return True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The endpoint of a small server."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.daemon_threads = True
    found.block_on_close = False
    with _serving(found):
        yield f"http://127.0.0.1:{found.server_address[1]}"


@contextmanager
def _serving(server: socketserver.TCPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
