"""Take the body of a request, and refuse it where it is not what its headers say: hash, checksum, length, framing."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

from .messages import Gone, Payload, Refusal, Request

SCRATCH: Final = 2**20
"""Bytes of a body that are held at a time."""
SMALL: Final = 4 * 2**20
"""Largest XML body that is read."""


class Crc:
    """A CRC with hashlib's verbs."""

    def __init__(self, step: Callable[[Any, int], int], width: int) -> None:
        self._step, self._width, self._value = step, width, 0

    def update(self, data: Any) -> None:
        self._value = self._step(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width, "big")


ALGORITHMS: Final = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")


def new_checksum(algorithm: str) -> Any:
    if algorithm == "crc32":
        return Crc(zlib.crc32, 4)
    if algorithm in ("sha1", "sha256"):
        return hashlib.new(algorithm)
    if algorithm not in ALGORITHMS:
        raise Refusal(400, "InvalidRequest", f"no checksum algorithm {algorithm}")
    raise Refusal(501, "NotImplemented", f"{algorithm} is not implemented by this server")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass(slots=True)
class Received:
    size: int
    md5: bytes
    checksums: dict[str, str]


def unframed(body: Payload, trailer: dict[str, str]) -> Iterator[memoryview]:
    """The data of an aws-chunked body; its trailing headers are put into `trailer`."""
    lines = io.BufferedReader(body, 65536)
    buffer = memoryview(bytearray(SCRATCH))
    try:
        while left := int(lines.readline(200).split(b";")[0], 16):
            while left:
                got = lines.readinto1(buffer[:left])
                if not got:
                    raise ValueError
                left -= got
                yield buffer[:got]
            if lines.readline(2) != b"\r\n":
                raise ValueError
        while line := lines.readline(4096).strip().decode("latin1"):
            name, _, value = line.partition(":")
            trailer[name.strip().lower()] = value.strip()
    except ValueError:
        raise Refusal(400, "IncompleteBody", "the aws-chunked framing is broken") from None
    finally:
        lines.detach()


def whole(body: Payload) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(SCRATCH))
    while got := body.readinto(buffer):
        yield buffer[:got]


def receive(
    request: Request, sink: Callable[[memoryview], Any], *, checksums: bool, also: str = ""
) -> Received:
    """Take the body, and refuse it where it is not what its headers say. `also`: a checksum to compute anyway."""
    headers, hashes = request.headers, request.payload_hash
    framed = hashes.startswith("STREAMING-")
    trailers = [name for name in headers.get("x-amz-trailer", "").lower().replace(" ", "").split(",") if name]
    declared = {
        name.removeprefix("x-amz-checksum-"): None if name in trailers else headers[name]
        for name in [*headers, *trailers]
        if re.fullmatch("x-amz-checksum-(?!type$|algorithm$|mode$).+", name)
    }
    declared = declared if checksums else {}
    if len(declared) > 1:
        raise Refusal(400, "InvalidRequest", "Expecting a single x-amz-checksum- header")
    found = {name: new_checksum(name) for name in {*declared, also} if name}
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    trailer: dict[str, str] = {}
    for data in unframed(request.body, trailer) if framed else whole(request.body):
        if not framed and hashes != "UNSIGNED-PAYLOAD":
            sha256.update(data)
        md5.update(data)
        for each in found.values():
            each.update(data)
        size += len(data)
        sink(data)
        if request.drop_after is not None and size >= request.drop_after:
            raise Gone("reset")
    if request.drop_after is not None:
        raise Gone("reset")
    if framed:
        request.body.drain()
        if headers.get("x-amz-decoded-content-length") != str(size):
            raise Refusal(400, "IncompleteBody", f"x-amz-decoded-content-length, and {size} bytes came")
        for name in trailers:
            if name not in trailer:
                raise Refusal(
                    400, "MalformedTrailerError", f"the trailer {name} was announced and did not come"
                )
    elif hashes not in ("UNSIGNED-PAYLOAD", sha256.hexdigest()):
        message = "The provided 'x-amz-content-sha256' header does not match what was computed."
        raise Refusal(400, "XAmzContentSHA256Mismatch", message, S3ComputedContentSHA256=sha256.hexdigest())
    if (wanted := headers.get("content-md5")) is not None and wanted != b64(md5.digest()):
        raise Refusal(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")
    computed = {name: b64(each.digest()) for name, each in found.items()}
    for name, value in declared.items():
        if (value or trailer.get(f"x-amz-checksum-{name}")) != computed[name]:
            message = f"The {name.upper()} you specified did not match the calculated checksum."
            raise Refusal(400, "BadDigest", message)
    return Received(size, md5.digest(), computed)


def read_xml(request: Request, *, checksums: bool) -> ElementTree.Element:
    """The XML that a body is, its tags without their namespace."""
    found = bytearray()

    def take(data: memoryview) -> None:
        found.extend(data)
        if len(found) > SMALL:
            raise Refusal(400, "MaxMessageLengthExceeded", "Your request was too big.")

    receive(request, take, checksums=checksums)
    try:
        tree = ElementTree.fromstring(bytes(found))
    except ElementTree.ParseError:
        raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed.") from None
    for each in tree.iter():
        each.tag = each.tag.rpartition("}")[2]
    return tree
