"""Move the data of S3 through botocore's own HTTP client: slower, and at home behind proxies and odd endpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from ..errors import SourceError
from .connection import LEAST_RATE, Broken, Reply
from .s3_answers import check_range
from .s3_client import S3Client
from .store import SCRATCH, Body, FileRange, Sink

CHECKSUM: Final = "x-amz-checksum-crc32"


class BotoMover:
    """Each range a `get_object`, each part an `upload_part`."""

    def __init__(self, client: S3Client) -> None:
        self._client = client

    def get(self, key: str, start: int, sink: Sink, *, version: str | None) -> str:
        stop = start + sink.left
        condition = {"IfMatch": version} if version else {}
        answer = self._client.call_once(
            key,
            "get_object",
            Key=self._client.prefix + key,
            Range=f"bytes={start}-{stop - 1}",
            **condition,
        )
        body = answer["Body"]
        try:
            found = check_range(self._client, key, _reply(answer), start, stop, version)
            idle = self._client.access.idle_timeout
            began, came = time.monotonic(), 0
            while sink.left:
                room = sink.room()[:SCRATCH]
                try:
                    got = _receive(body, room)
                except _failures() as error:
                    raise Broken(type(error).__name__, version=found) from None
                if not got:
                    raise Broken("the connection ended before all bytes had come", version=found)
                sink.landed(got)
                came += got
                seconds = time.monotonic() - began
                if seconds >= idle:
                    if came < LEAST_RATE * seconds and sink.left:
                        raise Broken(f"only {came} bytes came in {seconds:.1f} s", version=found)
                    began, came = time.monotonic(), 0
        finally:
            body.close()
        return found

    def put(self, key: str, query: Mapping[str, str], body: Body, headers: Mapping[str, str]) -> Reply:
        params: dict[str, Any] = {"Key": self._client.prefix + key}
        try:
            params["Body"] = (
                b"".join(map(bytes, body.chunks())) if isinstance(body, FileRange) else bytes(body)
            )
        except OSError as error:
            raise SourceError(f"the file that is sent cannot be read: {error.strerror or error}") from None
        if CHECKSUM in headers:
            params["ChecksumCRC32"] = headers[CHECKSUM]
        if query:
            params |= {"UploadId": query["uploadId"], "PartNumber": int(query["partNumber"])}
        return _reply(self._client.call_once(key, "upload_part" if query else "put_object", **params))

    def close(self) -> None:
        """The store closes its client."""


def _reply(answer: Mapping[str, Any]) -> Reply:
    meta = answer["ResponseMetadata"]
    return Reply(meta["HTTPStatusCode"], meta["HTTPHeaders"], None)


def _receive(body: Any, room: memoryview) -> int:
    """Put what has come into `room`, at least a byte unless the body is at its end.

    botocore's own `readinto` waits until the room is full, however slowly that goes.
    """
    data = body._raw_stream.read1(len(room))
    room[: len(data)] = data
    return len(data)


def _failures() -> tuple[type[Exception], ...]:
    """What botocore and the client under it raise while a body is read."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return HTTPClientError, IncompleteReadError, HTTPError, OSError
