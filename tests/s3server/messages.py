"""A request as it comes and a response as it goes, the XML that S3 writes, and its errors."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from xml.sax.saxutils import escape

XMLNS: Final = "http://s3.amazonaws.com/doc/2006-03-01/"


class Refusal(Exception):  # noqa: N818 - it is an answer, not a failure of ours
    """A request that is answered with an error of S3."""

    def __init__(self, status: int, code: str, message: str = "", **more: str) -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message, self.more = status, code, message or code, more
        self.headers: dict[str, str] = {}


class Gone(Exception):  # noqa: N818 - it is an end, not a failure of ours
    """The connection is at its end: the client went away, or a fault has cut it."""


@dataclass(slots=True)
class Request:
    method: str
    raw_path: str
    raw_query: str
    headers: dict[str, str]
    body: Payload
    bucket: str = ""
    key: str = ""
    params: dict[str, str] = field(default_factory=dict)
    payload_hash: str = "UNSIGNED-PAYLOAD"
    drop_after: int | None = None
    """Bytes of the body after which a fault cuts the connection."""


Piece = bytes | tuple[int, int]
"""Bytes, or [start, stop) of the response's open file."""


@dataclass(slots=True)
class Response:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    fd: int = -1
    whole: int = 0
    """Size of the object that `fd` is."""
    bare: bool = False
    """To be sent without its body: it answers a HEAD."""

    @property
    def length(self) -> int:
        return sum(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in self.pieces)


def element(tag: str, *inside: str) -> str:
    return f"<{tag}>{''.join(inside)}</{tag}>"


def leaf(tag: str, value: object) -> str:
    return element(tag, escape(str(value)))


def document(tag: str, *inside: str, status: int = 200) -> Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{tag} xmlns="{XMLNS}">{"".join(inside)}</{tag}>'
    return Response(status, {"Content-Type": "application/xml"}, [text.encode()])


def refusal_response(refusal: Refusal, request_id: str, *, bare: bool) -> Response:
    more = "".join(leaf(name, value) for name, value in refusal.more.items())
    text = (
        leaf("Code", refusal.code) + leaf("Message", refusal.message) + more + leaf("RequestId", request_id)
    )
    text = '<?xml version="1.0" encoding="UTF-8"?>\n' + element("Error", text)
    without = bare or refusal.status == 304
    headers = {"Content-Type": "application/xml", **refusal.headers}
    return Response(refusal.status, headers, [] if without else [text.encode()])


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Payload(io.RawIOBase):
    """The body of a request as it is on the wire, chunked transfer coding taken off. Raises Gone where it ends early."""

    def __init__(self, file: Any, length: int, chunked: bool, proceed: Callable[[], None]) -> None:
        self._file, self._left, self._chunked, self._proceed = file, length, chunked, proceed
        self.taken = 0
        self.ended = not chunked and length == 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        self._proceed()
        try:
            if self._chunked and not self.ended and self._left == 0:
                self._left = int(self._file.readline(100).split(b";")[0], 16)
                if self._left == 0:
                    while self._file.readline(4096).strip():
                        pass
                    self.ended = True
            if self.ended:
                return 0
            got: int = self._file.readinto(memoryview(into)[: self._left])
            if not got:
                raise Gone
            self._left -= got
            if self._left == 0 and self._chunked:
                self._file.readline(2)
        except (OSError, ValueError) as error:
            raise Gone from error
        self.taken += got
        self.ended = self._left == 0 and not self._chunked
        return got

    def drain(self) -> None:
        scratch = bytearray(65536)
        while self.readinto(scratch):
            pass


def count(request: Request, name: str) -> int:
    """How many entries a listing may have: the parameter of that name, at most 1000."""
    given = request.params.get(name, "1000")
    if not re.fullmatch(r"\d{1,9}", given):
        raise Refusal(400, "InvalidArgument", f"{name} must be a number")
    return min(int(given), 1000)
