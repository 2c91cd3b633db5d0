"""Move the data of S3 over connections of our own, signed by botocore: ranges are received where they are wanted."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import urlsplit

from ..errors import InputError, quote
from .connection import Broken, Connection, Reply
from .retry import Transient
from .s3_answers import MOST_ERROR_BYTES, check_range, error_of, not_s3
from .s3_client import IDLE_CONNECTIONS, S3Client
from .store import Body, Sink


class NativeMover:
    """Moves data over connections of our own, signed by botocore."""

    def __init__(self, client: S3Client) -> None:
        self._client = client
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        # a URL that botocore made tells how this endpoint and bucket are addressed, whatever their rules
        url = urlsplit(client.example())
        usual = {"http": ":80", "https": ":443"}[url.scheme]
        self._host = url.netloc.rpartition("@")[2].removesuffix(usual)  # as botocore signs it
        self._origin = f"{url.scheme}://{self._host}"
        self._base = url.path.removesuffix("k")
        self._address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        self._tls = _tls(client) if url.scheme == "https" else None

    def _connection(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return Connection(
            self._address,
            self._tls,
            connect=self._client.access.connect_timeout,
            idle=self._client.access.idle_timeout,
        )

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()

    def _sign(self, method: str, path: str, headers: Mapping[str, str]) -> dict[str, str]:
        from botocore.awsrequest import AWSRequest

        credentials = self._client.credentials()
        if credentials is None:
            return {"Host": self._host, **headers}
        request = AWSRequest(method, self._origin + path, headers=dict(headers))
        _signer()(credentials, "s3", self._client.boto.meta.region_name).add_auth(request)
        return {"Host": self._host, **dict(request.headers.items())}

    def get(self, key: str, start: int, sink: Sink, *, version: str | None) -> str:
        stop = start + sink.left
        path = self._base + self._client.path_of(key)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if version:
            headers["If-Match"] = version
        with self._exchange("GET", path, headers, None) as (connection, reply):
            if reply.status not in (200, 206):
                raise self._refused(key, reply)
            found = check_range(self._client, key, reply, start, stop, version)
            connection.receive(sink, version=found)
        return found

    def put(self, key: str, query: Mapping[str, str], body: Body, headers: Mapping[str, str]) -> Reply:
        text = "&".join(f"{percent(k, safe='')}={percent(v, safe='')}" for k, v in sorted(query.items()))
        path = self._base + self._client.path_of(key) + (f"?{text}" if text else "")
        headers = {**headers, "Content-Length": str(len(body))}
        try:
            with self._exchange("PUT", path, headers, body) as (_, reply):
                if reply.status != 200:
                    raise self._refused(key, reply)
                reply.read(MOST_ERROR_BYTES)
                if "etag" not in reply.headers:
                    raise not_s3(self._client.host)
                return reply
        except Broken as broken:
            raise Transient(str(broken)) from None

    def _refused(self, key: str, reply: Reply) -> Exception:
        code, message = error_of(reply.read(MOST_ERROR_BYTES))
        return self._client.refusal(key, reply.status, code, message, reply.headers)

    @contextmanager
    def _exchange(
        self, method: str, path: str, headers: Mapping[str, str], body: Body | None
    ) -> Iterator[tuple[Connection, Reply]]:
        """One request and its answer. The connection is kept for the next only if the answer was read to its end."""
        connection, reply = self._request(method, path, self._sign(method, path, headers), body)
        try:
            yield connection, reply
        finally:
            if connection.reusable():
                self._keep(connection)
            else:
                connection.close()

    def _request(
        self, method: str, path: str, signed: Mapping[str, str], body: Body | None
    ) -> tuple[Connection, Reply]:
        while True:
            connection = self._connection()
            try:
                return connection, connection.request(method, path, signed, body)
            except BaseException as error:
                connection.close()
                # one that had been idle, and that the store has closed, did not fail: another is taken
                if not (isinstance(error, Broken) and error.unanswered and connection.requests > 1):
                    raise


@cache
def _signer() -> Any:
    from botocore.auth import S3SigV4Auth

    class Unsigned(S3SigV4Auth):  # type: ignore[misc]
        """botocore digests the body on plain HTTP, at three times the cost of sending it."""

        def payload(self, request: Any) -> str:
            return "UNSIGNED-PAYLOAD"

    return Unsigned


def _tls(client: S3Client) -> ssl.SSLContext:
    bundle = client.session.get_config_variable("ca_bundle")
    try:
        return ssl.create_default_context(cafile=bundle or None)
    except OSError as error:
        raise InputError(f"the CA bundle {quote(bundle)} cannot be read: {error.strerror}") from None
