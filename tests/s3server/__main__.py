"""The server as a program: `python -m s3server --root DIR`, started where this package lies.

It prints one line of JSON, {"endpoint": ..., "control": ...}, and serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import ssl
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .board import Board, BoardManager, Settings
from .connection import Connection
from .service import Service


class Control(BaseHTTPRequestHandler):
    """The second port: faults and counts, as JSON."""

    board: Board
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.reply(200, self.board.stats()) if self.path == "/stats" else self.reply(
            404, {"error": "no such path"}
        )

    def do_POST(self) -> None:
        try:
            given = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
            if self.path == "/fault":
                self.board.fault(given.pop("mode"), given)
            elif self.path == "/clear":
                self.board.clear()
            elif self.path == "/reset":
                self.board.reset_stats()
            elif self.path == "/credentials":
                self.board.rotate(given["access_key"], given["secret_key"], given.get("session_token"))
            else:
                raise ValueError(f"no path {self.path}")
        except (ValueError, KeyError, TypeError) as error:
            self.reply(400, {"error": str(error)})
        else:
            self.reply(200, {})

    def reply(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


def accept_forever(
    listener: socket.socket, context: ssl.SSLContext | None, service: Service, board: Board
) -> None:
    def serve(sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=True)
        except OSError:
            sock.close()
            return
        Connection(sock, service, board).run()

    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def listen(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.suppress(OSError):  # BBR, where it is the default, paces even the loopback
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    listener.bind((host, port))
    listener.listen(1024)
    return listener


def fork_workers(
    count: int, listener: socket.socket, context: ssl.SSLContext | None, settings: Settings, board: Board
) -> None:
    """Serve in `count` processes more, which share the board of this one and end with it."""
    BoardManager.register("board", callable=lambda: board)
    manager = BoardManager(address=f"\0s3server-{uuid.uuid4().hex}", authkey=os.urandom(16))
    server: Any = manager.get_server()
    ours, theirs = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            os.close(theirs)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
            server.listener.close()  # or a connection to it would wait for ever once its owner has ended
            try:
                manager.connect()
                shared: Any = manager.board()  # type: ignore[attr-defined]
            except (OSError, EOFError):  # it has ended already
                os._exit(0)
            threading.Thread(
                target=accept_forever, args=(listener, context, Service(settings), shared), daemon=True
            ).start()
            os.read(ours, 1)
            os._exit(0)
    os.close(ours)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder as S3, for tests.")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--access-key", default="test-access-key")
    parser.add_argument("--secret-key", default="test-secret-key")
    parser.add_argument("--session-token", help="requests must carry this token")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes that serve")
    parser.add_argument("--anonymous-read", action="store_true", help="GET and HEAD need no signature")
    parser.add_argument("--no-checksums", action="store_true", help="know no x-amz-checksum-*, as radosgw 16")
    parser.add_argument("--min-part-size", type=int, default=5 * 2**20)
    parser.add_argument(
        "--clock-offset", type=float, default=0.0, help="seconds that the server's clock is ahead"
    )
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end with the process that has started this"
    )
    given = parser.parse_args()

    settings = Settings(
        given.root.resolve(),
        given.region,
        not given.no_checksums,
        given.anonymous_read,
        given.min_part_size,
        given.clock_offset,
    )
    context = None
    if given.tls_cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(given.tls_cert, given.tls_key)
    board = Board(
        {given.access_key: {"secret": given.secret_key, "token": given.session_token, "expired": False}}
    )
    service = Service(settings)
    listener = listen(given.host, given.port)
    ends = {signal.SIGTERM, signal.SIGINT}
    for each in ends:
        signal.signal(each, signal.SIG_DFL)  # Python's own would ask the main thread, which waits
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # or one that a thread takes would not end the waiting
    if given.workers > 1:
        fork_workers(given.workers - 1, listener, context, settings, board)
    Control.board = board
    control = ThreadingHTTPServer((given.host, 0), Control)
    control.daemon_threads = True
    threading.Thread(target=control.serve_forever, daemon=True).start()
    threading.Thread(target=accept_forever, args=(listener, context, service, board), daemon=True).start()

    scheme = "https" if context else "http"
    endpoints = {
        "endpoint": f"{scheme}://{given.host}:{listener.getsockname()[1]}",
        "control": f"http://{given.host}:{control.server_address[1]}",
    }
    print(json.dumps(endpoints), flush=True)
    if given.until_stdin_closes:

        def watch() -> None:
            while sys.stdin.buffer.read(65536):
                pass
            os._exit(0)

        threading.Thread(target=watch, daemon=True).start()
    signal.sigwait(ends)
    os._exit(0)  # connections are cut, as when a server goes away; nothing here needs a farewell


if __name__ == "__main__":
    main()
