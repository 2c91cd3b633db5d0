"""An S3-speaking server over a folder, for tests and the demo: strict about what clients send, faulty when told to be.

As a program: `python tests/s3server.py --root DIR` prints one line of JSON, {"endpoint": ..., "control": ...}, and
serves until SIGTERM. For tests: `with S3Server(folder) as server`. Only the standard library is needed. What S3 has
and this has not (CRC32C and CRC64NVME, for two) is refused with 501, never ignored.

    DIR/<bucket>/<quoted key>       an object; a file put there by hand is one too
    DIR/.meta/<bucket>/<quoted key> its ETag, checksums and headers, believed only while inode, size and mtime agree
    DIR/.uploads/<id>/              an unfinished multipart upload
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import email.utils
import fcntl
import gzip
import hashlib
import hmac
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

SCRATCH: Final = 2**20
"""Bytes of a body that are held at a time."""
SMALL: Final = 4 * 2**20
"""Largest XML body that is read."""
SKEW: Final = 15 * 60
LOGGED: Final = 5000
"""Requests that the log keeps."""
EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()
XMLNS: Final = "http://s3.amazonaws.com/doc/2006-03-01/"

MODES: Final = {
    "status": "any",
    "hang": "any",
    "reset": "any",
    "delay": "any",
    "slow_first_byte": "any",
    "truncate": "body",
    "stall": "body",
    "drip": "body",
    "flip": "body",
    "html": "body",
    "shift": "object",
    "wrong_range": "object",
    "full200": "object",
    "gzip": "object",
    "replace": "object",
    "drop_upload": "upload",
    "lost_response": "write",
    "short_list": "list",
    "empty_list": "list",
}
"""Fault mode -> what a request must have for it: a response with a body, an object's bytes, a body that is sent, ..."""
HOW: Final = {
    "times",
    "skip",
    "method",
    "match",
    "min_bytes",
    "code",
    "name",
    "after",
    "at",
    "by",
    "rate",
    "delay",
} | {"location", "region", "short"}
NAMES: Final = {
    301: "PermanentRedirect",
    307: "TemporaryRedirect",
    400: "ExpiredToken",
    403: "AccessDenied",
    404: "NoSuchKey",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


class Refusal(Exception):  # noqa: N818 - it is an answer, not a failure of ours
    """A request that is answered with an error of S3."""

    def __init__(self, status: int, code: str, message: str = "", **more: str) -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message, self.more = status, code, message or code, more
        self.headers: dict[str, str] = {}


class Gone(Exception):  # noqa: N818 - it is an end, not a failure of ours
    """The connection is at its end: the client went away, or a fault has cut it."""


# What is shared by all connections, and by all processes where there are several


class Board:
    """Faults to be given, credentials that are good, and what has been counted."""

    def __init__(self, credentials: dict[str, dict[str, Any]]) -> None:
        self._lock = threading.Condition()
        self._faults: list[dict[str, Any]] = []
        self._credentials = credentials
        self._running = 0
        self._forget()

    def _forget(self) -> None:
        self._operations: dict[str, Counter[str]] = {}
        self._modes: Counter[str] = Counter()
        self._log: deque[dict[str, Any]] = deque(maxlen=LOGGED)

    def credential(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._credentials.get(key)

    def rotate(self, key: str, secret: str, token: str | None) -> None:
        """From now on these are good, and whatever was good before has expired."""
        with self._lock:
            for old in self._credentials.values():
                old["expired"] = True
            self._credentials[key] = {"secret": secret, "token": token, "expired": False}

    def fault(self, mode: str, how: dict[str, Any]) -> None:
        if mode not in MODES:
            raise ValueError(f"no fault mode {mode!r}; known are {', '.join(MODES)}")
        if unknown := set(how) - HOW:
            raise ValueError(
                f"a fault has no {', '.join(sorted(unknown))}; known are {', '.join(sorted(HOW))}"
            )
        with self._lock:
            self._faults.append({"mode": mode, "times": 1, "skip": 0, **how, "given": 0})

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, method: str, key: str, size: int, traits: set[str]) -> dict[str, Any] | None:
        """The first fault that is meant for this request, counted as given."""
        with self._lock:
            for fault in self._faults:
                if (
                    MODES[fault["mode"]] not in traits
                    or (fault["times"] and fault["given"] >= fault["times"])
                    or fault.get("method") not in (None, method)
                    or fault.get("match", "") not in key
                    or size < fault.get("min_bytes", 0)
                ):
                    continue
                if fault["skip"]:
                    fault["skip"] -= 1
                    continue
                fault["given"] += 1
                self._modes[fault["mode"]] += 1
                return dict(fault)
        return None

    def begin(self) -> None:
        with self._lock:
            self._running += 1

    def end(self, record: dict[str, Any]) -> None:
        """A request is through, or is held by a fault."""
        with self._lock:
            self._running -= 1
            counts = self._operations.setdefault(record["operation"], Counter())
            counts.update(
                requests=1, sent=record["sent"], received=record["received"], faults=bool(record["fault"])
            )
            self._log.append(record)
            self._lock.notify_all()

    def stats(self) -> dict[str, Any]:
        """Waits a little for requests under way: a client has its last byte before we have counted it."""
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0, timeout=0.5)
            total: Counter[str] = Counter()
            for counts in self._operations.values():
                total.update(counts)
            names = ("requests", "sent", "received", "faults")
            return {
                **{name: total[name] for name in names},
                "operations": {
                    operation: {name: counts[name] for name in names}
                    for operation, counts in self._operations.items()
                },
                "modes": dict(self._modes),
                "pending": [dict(fault) for fault in self._faults],
                "log": list(self._log),
            }

    def reset_stats(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0, timeout=0.5)
            self._forget()


class BoardManager(BaseManager):
    """Gives several serving processes the one board."""


# Checksums


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


# The folder


@dataclass(slots=True)
class Meta:
    """What is known of an object beside its bytes."""

    etag: str
    size: int
    modified: float
    content_type: str = "binary/octet-stream"
    user: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    checksum_type: str = "FULL_OBJECT"
    stamp: list[int] = field(default_factory=list)
    """Inode, size and mtime of the file that this is true of."""


def stamp_of(found: os.stat_result) -> list[int]:
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def file_name(key: str) -> str:
    name = quote(key, safe="")
    name = "%2E" + name[1:] if name.startswith(".") else name
    if len(name) > 250:
        raise Refusal(400, "KeyTooLongError", "quoted, a key may have 250 bytes here")
    return name


def precondition(headers: dict[str, str], etag: str | None) -> None:
    """Refuse a write whose If-Match or If-None-Match does not hold for what is there now."""
    absent, wanted = headers.get("if-none-match"), headers.get("if-match")
    if absent not in (None, "*"):
        raise Refusal(501, "NotImplemented", "If-None-Match of a write is only known as *")
    if absent and etag is not None:
        raise Refusal(412, "PreconditionFailed", "the key exists", Condition="If-None-Match")
    if wanted and etag is None:
        raise Refusal(404, "NoSuchKey", "If-Match, and there is no such key")
    if wanted and wanted.strip('"') != etag:
        raise Refusal(412, "PreconditionFailed", f"the ETag is {etag}", Condition="If-Match")


class Folder:
    """Buckets and objects as files. A lock file orders writers, so several processes may serve one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[tuple[int, ...], str] = {}
        for name in (".meta", ".uploads", ".tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / ".lock").touch()

    @contextlib.contextmanager
    def locked(self, how: int = fcntl.LOCK_EX) -> Iterator[None]:
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def scratch(self) -> Path:
        return self.root / ".tmp" / uuid.uuid4().hex

    def bucket(self, name: str) -> Path:
        path = self.root / name
        if name.startswith(".") or not path.is_dir():
            raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist", BucketName=name)
        return path

    def buckets(self) -> list[Path]:
        return sorted(path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _meta(self, bucket: str, name: str, fd: int) -> Meta:
        found = os.fstat(fd)
        with contextlib.suppress(FileNotFoundError):
            meta = Meta(**json.loads((self.root / ".meta" / bucket / name).read_bytes()))
            if meta.stamp == stamp_of(found):
                return meta
        stamp = tuple(stamp_of(found))
        if stamp not in self._known:  # put there by hand
            with open(fd, "rb", closefd=False) as file:
                self._known[stamp] = hashlib.file_digest(file, "md5").hexdigest()
            os.lseek(fd, 0, os.SEEK_SET)
        return Meta(self._known[stamp], found.st_size, found.st_mtime, stamp=list(stamp))

    def open(self, bucket: str, key: str) -> tuple[int, Meta]:
        """An open file, which a later replacement leaves alone, and what is known of it."""
        path = self.bucket(bucket) / file_name(key)
        with self.locked(fcntl.LOCK_SH):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Refusal(404, "NoSuchKey", "The specified key does not exist.", Key=key) from None
            try:
                return fd, self._meta(bucket, path.name, fd)
            except BaseException:
                os.close(fd)
                raise

    def etag(self, bucket: str, key: str) -> str | None:
        """Of the object that is there now; the caller holds the lock, or only wants to know early."""
        try:
            fd = os.open(self.bucket(bucket) / file_name(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return self._meta(bucket, file_name(key), fd).etag
        finally:
            os.close(fd)

    def install(self, bucket: str, key: str, data: Path, meta: Meta, headers: dict[str, str]) -> None:
        """Make `data` the object, if the conditions among the headers hold. The caller holds the lock."""
        target = self.bucket(bucket) / file_name(key)
        precondition(
            headers, self.etag(bucket, key) if {"if-match", "if-none-match"} & headers.keys() else None
        )
        found = data.stat()
        meta.stamp, meta.size, meta.modified = stamp_of(found), found.st_size, found.st_mtime
        written = self.scratch()
        written.write_text(json.dumps(asdict(meta)))
        data.replace(target)  # the data first: without its own meta, a file is an object of unknown upload
        (self.root / ".meta" / bucket).mkdir(exist_ok=True)
        written.replace(self.root / ".meta" / bucket / target.name)

    def remove(self, bucket: str, key: str) -> None:
        path = self.bucket(bucket) / file_name(key)
        with self.locked():
            path.unlink(missing_ok=True)
            (self.root / ".meta" / bucket / path.name).unlink(missing_ok=True)

    def keys(self, bucket: str) -> list[str]:
        return sorted(unquote(entry.name) for entry in os.scandir(self.bucket(bucket)))

    def upload(self, bucket: str, key: str, upload_id: str) -> tuple[Path, dict[str, Any]]:
        path = self.root / ".uploads" / upload_id
        if re.fullmatch(r"[0-9a-f]{32}", upload_id):
            with contextlib.suppress(FileNotFoundError):
                begun = json.loads((path / "upload.json").read_bytes())
                if (begun["bucket"], begun["key"]) == (bucket, key):
                    return path, begun
        raise Refusal(
            404, "NoSuchUpload", "The upload was never begun, or is completed or aborted", UploadId=upload_id
        )

    def parts(self, path: Path) -> dict[int, dict[str, Any]]:
        return {int(each.stem): json.loads(each.read_bytes()) for each in sorted(path.glob("[0-9]*.json"))}


# One request and its answer


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
    """Of the body, where a fault cuts the connection."""


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


# Signatures


def canonical_query(raw: str, *, without: str = "") -> str:
    pairs = []
    for pair in filter(None, raw.split("&")):
        name, _, value = pair.partition("=")
        if unquote(name) != without:
            pairs.append((quote(unquote(name), safe="-_.~"), quote(unquote(value), safe="-_.~")))
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


def check_signature(request: Request, settings: Settings, board: Board) -> None:
    """Refuse a request that is not signed, by Signature Version 4, with credentials that are good now."""
    headers = request.headers
    query = dict(pair.partition("=")[::2] for pair in request.raw_query.split("&"))
    query = {unquote(name): unquote(value) for name, value in query.items()}
    authorization = headers.get("authorization")
    presigned = "X-Amz-Signature" in query or "X-Amz-Algorithm" in query
    hashes = headers.get("x-amz-content-sha256", query.get("X-Amz-Content-Sha256"))
    request.payload_hash = hashes or "UNSIGNED-PAYLOAD"
    if hashes and not re.fullmatch(
        "[0-9a-f]{64}|UNSIGNED-PAYLOAD|STREAMING-UNSIGNED-PAYLOAD-TRAILER", hashes
    ):
        if hashes.startswith("STREAMING-"):
            raise Refusal(501, "NotImplemented", f"payloads of the kind {hashes}")
        raise Refusal(
            400, "InvalidArgument", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, or a valid sha256 value."
        )
    if authorization is None and not presigned:
        if settings.anonymous_read and request.method in ("GET", "HEAD"):
            return
        raise Refusal(403, "AccessDenied", "Access Denied: the request is not signed")
    if authorization is not None and presigned:
        raise Refusal(400, "InvalidArgument", "Only one auth mechanism allowed")
    malformed = "AuthorizationQueryParametersError" if presigned else "AuthorizationHeaderMalformed"
    if presigned:
        algorithm, credential = query.get("X-Amz-Algorithm", ""), query.get("X-Amz-Credential", "")
        signed, given = query.get("X-Amz-SignedHeaders", ""), query.get("X-Amz-Signature", "")
        date, token = query.get("X-Amz-Date", ""), query.get("X-Amz-Security-Token")
    else:
        if hashes is None:
            raise Refusal(
                400, "InvalidRequest", "Missing required header for this request: x-amz-content-sha256"
            )
        algorithm, _, rest = str(authorization).partition(" ")
        fields = dict(part.strip().partition("=")[::2] for part in rest.split(","))
        credential, signed = fields.get("Credential", ""), fields.get("SignedHeaders", "")
        given, token = fields.get("Signature", ""), headers.get("x-amz-security-token")
        date = headers.get("x-amz-date", "")
    if algorithm != "AWS4-HMAC-SHA256" or len(credential.split("/")) != 5:
        raise Refusal(
            400, malformed, "the authorization is not of AWS4-HMAC-SHA256 with a credential of five words"
        )
    access_key, day, region, service, end = credential.split("/")
    try:
        when = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise Refusal(
            403, "AccessDenied", "AWS authentication requires a valid Date or x-amz-date header"
        ) from None
    if region != settings.region:
        message = f"The region '{region}' is wrong; expecting '{settings.region}'"
        raise Refusal(400, malformed, message, Region=settings.region)
    if (day, service, end) != (date[:8], "s3", "aws4_request"):
        raise Refusal(
            400, malformed, f"the scope {day}/{service}/{end} is not of this day, s3 and aws4_request"
        )
    known = board.credential(access_key)
    if known is None:
        message = "The AWS Access Key Id you provided does not exist in our records."
        raise Refusal(403, "InvalidAccessKeyId", message, AWSAccessKeyId=access_key)
    now = time.time() + settings.clock_offset
    if presigned:
        lifetime = query.get("X-Amz-Expires", "")
        if not re.fullmatch(r"\d{1,6}", lifetime) or not 0 < int(lifetime) <= 604800:
            raise Refusal(400, malformed, "X-Amz-Expires must be 1 to 604800 seconds")
        if now > when + int(lifetime):
            message = "Request has expired"
            raise Refusal(
                403,
                "AccessDenied",
                message,
                Expires=timestamp(when + int(lifetime)),
                ServerTime=timestamp(now),
            )
    if (now < when - SKEW) if presigned else abs(now - when) > SKEW:
        message = "The difference between the request time and the current time is too large."
        more = {
            "RequestTime": date,
            "ServerTime": timestamp(now),
            "MaxAllowedSkewMilliseconds": str(SKEW * 1000),
        }
        raise Refusal(403, "RequestTimeTooSkewed", message, **more)
    names = signed.split(";")
    must = {"host"} | {name for name in headers if name.startswith("x-amz-")}
    must -= {"x-amz-content-sha256"} if presigned else set()
    if missing := must - set(names):
        message = "There were headers present in the request which were not signed"
        raise Refusal(403, "AccessDenied", message, HeadersNotSigned=", ".join(sorted(missing)))
    if names != sorted(names) or any(name not in headers for name in names):
        raise Refusal(
            403, "SignatureDoesNotMatch", f"the signed headers {signed} did not come, or are not in order"
        )
    lines = [f"{name}:{' '.join(headers[name].split())}\n" for name in names]
    without = "X-Amz-Signature" if presigned else ""
    canonical = "\n".join(
        [
            request.method,
            request.raw_path,
            canonical_query(request.raw_query, without=without),
            "".join(lines),
            signed,
            request.payload_hash,
        ]
    )
    scope = f"{day}/{region}/{service}/{end}"
    to_sign = "\n".join([algorithm, date, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{known['secret']}".encode()
    for word in (day, region, service, end, to_sign):
        key = hmac.digest(key, word.encode(), "sha256")
    if not hmac.compare_digest(key.hex().encode(), given.encode()):
        message = "The request signature we calculated does not match the signature you provided."
        raise Refusal(403, "SignatureDoesNotMatch", message, StringToSign=to_sign, CanonicalRequest=canonical)
    if known["expired"]:
        raise Refusal(400, "ExpiredToken", "The provided token has expired.")
    if (token or None) != known["token"]:
        raise Refusal(400, "InvalidToken", "The provided token is malformed or otherwise invalid.")


# Operations


@dataclass(slots=True)
class Settings:
    root: Path
    region: str = "us-east-1"
    checksums: bool = True
    anonymous_read: bool = False
    min_part_size: int = 5 * 2**20
    clock_offset: float = 0.0


UNSUPPORTED: Final = re.compile(
    r"x-amz-(copy-source|server-side-encryption|object-lock|tagging|acl|grant|website|write-offset|expected-bucket-owner)"
    r"|if-modified-since|if-unmodified-since|if-range"
)


class Service:
    """The operations, each from a request to a response."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = Folder(settings.root)
        s = self
        # (method, on what, parameters it must have, parameters it may have, name, function)
        listing = {
            "prefix",
            "delimiter",
            "max-keys",
            "continuation-token",
            "start-after",
            "encoding-type",
            "fetch-owner",
        }
        uploads = {"prefix", "max-uploads", "key-marker", "upload-id-marker", "encoding-type"}
        self.routes: list[tuple[str, str, set[str], set[str], str, Callable[[Request], Response]]] = [
            ("GET", "service", set(), {"max-buckets", "prefix"}, "ListBuckets", s.list_buckets),
            ("HEAD", "bucket", set(), set(), "HeadBucket", s.head_bucket),
            ("PUT", "bucket", set(), set(), "CreateBucket", s.create_bucket),
            ("DELETE", "bucket", set(), set(), "DeleteBucket", s.delete_bucket),
            ("GET", "bucket", {"location"}, set(), "GetBucketLocation", s.location),
            ("GET", "bucket", {"list-type"}, listing, "ListObjectsV2", s.list_objects),
            ("GET", "bucket", {"uploads"}, uploads, "ListMultipartUploads", s.list_uploads),
            ("POST", "bucket", {"delete"}, set(), "DeleteObjects", s.delete_objects),
            ("GET", "object", {"uploadId"}, {"max-parts", "part-number-marker"}, "ListParts", s.list_parts),
            ("GET", "object", set(), set(), "GetObject", s.get_object),
            ("HEAD", "object", set(), set(), "HeadObject", s.get_object),
            ("PUT", "object", {"partNumber", "uploadId"}, set(), "UploadPart", s.upload_part),
            ("PUT", "object", set(), set(), "PutObject", s.put_object),
            ("POST", "object", {"uploads"}, set(), "CreateMultipartUpload", s.create_upload),
            ("POST", "object", {"uploadId"}, set(), "CompleteMultipartUpload", s.complete_upload),
            ("DELETE", "object", {"uploadId"}, set(), "AbortMultipartUpload", s.abort_upload),
            ("DELETE", "object", set(), set(), "DeleteObject", s.delete_object),
        ]

    def route(self, request: Request) -> tuple[str, Callable[[Request], Response]]:
        target = "object" if request.key else "bucket" if request.bucket else "service"
        names = set(request.params)
        for method, level, must, may, name, function in self.routes:
            if (method, level) == (request.method, target) and must <= names <= must | may:
                if name == "ListObjectsV2" and request.params["list-type"] != "2":
                    break
                return name, function
        shown = f"{request.method} of a {target} with parameters {sorted(names)}"
        raise Refusal(501, "NotImplemented", f"{shown} is not implemented by this server")

    def check_headers(self, request: Request) -> None:
        for name in request.headers:
            if UNSUPPORTED.match(name):
                raise Refusal(501, "NotImplemented", f"the header {name} is not implemented by this server")

    def read_xml(self, request: Request) -> ElementTree.Element:
        found = bytearray()

        def take(data: memoryview) -> None:
            found.extend(data)
            if len(found) > SMALL:
                raise Refusal(400, "MaxMessageLengthExceeded", "Your request was too big.")

        # on completing, a checksum header is the object's, not the body's
        receive(request, take, checksums=self.settings.checksums and "delete" in request.params)
        try:
            tree = ElementTree.fromstring(bytes(found))
        except ElementTree.ParseError:
            raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed.") from None
        for each in tree.iter():
            each.tag = each.tag.rpartition("}")[2]
        return tree

    # buckets

    def list_buckets(self, request: Request) -> Response:
        found = [
            element("Bucket", leaf("Name", path.name), leaf("CreationDate", timestamp(path.stat().st_mtime)))
            for path in self.folder.buckets()
            if path.name.startswith(request.params.get("prefix", ""))
        ]
        owner = element("Owner", leaf("ID", "owner"), leaf("DisplayName", "owner"))
        return document("ListAllMyBucketsResult", owner, element("Buckets", *found))

    def head_bucket(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        return Response(200, {"x-amz-bucket-region": self.settings.region})

    def create_bucket(self, request: Request) -> Response:
        receive(request, lambda data: None, checksums=self.settings.checksums)
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", request.bucket):
            raise Refusal(400, "InvalidBucketName", "The specified bucket is not valid.")
        try:
            (self.folder.root / request.bucket).mkdir()
        except FileExistsError:
            raise Refusal(409, "BucketAlreadyOwnedByYou", "The bucket exists, and is yours.") from None
        return Response(200, {"Location": f"/{request.bucket}"})

    def delete_bucket(self, request: Request) -> Response:
        with self.folder.locked():
            try:
                self.folder.bucket(request.bucket).rmdir()
            except OSError:
                raise Refusal(409, "BucketNotEmpty", "The bucket you tried to delete is not empty") from None
            shutil.rmtree(self.folder.root / ".meta" / request.bucket, ignore_errors=True)
        return Response(204)

    def location(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        region = "" if self.settings.region == "us-east-1" else self.settings.region
        return document("LocationConstraint", escape(region))

    def count(self, request: Request, name: str) -> int:
        given = request.params.get(name, "1000")
        if not re.fullmatch(r"\d{1,9}", given):
            raise Refusal(400, "InvalidArgument", f"{name} must be a number")
        return min(int(given), 1000)

    def list_objects(self, request: Request) -> Response:
        params = request.params
        prefix, delimiter, most = (
            params.get("prefix", ""),
            params.get("delimiter", ""),
            self.count(request, "max-keys"),
        )
        shown: Callable[[str], str] = quote if params.get("encoding-type") == "url" else str
        after, token = params.get("start-after", ""), params.get("continuation-token")
        if token is not None:
            try:
                after = base64.urlsafe_b64decode(token).decode()
            except (binascii.Error, UnicodeDecodeError):
                raise Refusal(
                    400, "InvalidArgument", "The continuation token provided is incorrect"
                ) from None
        contents: list[str] = []
        groups: list[str] = []
        last, more = after, False
        for key in self.folder.keys(request.bucket):
            if key <= after or not key.startswith(prefix):
                continue
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            group = prefix + head + cut if cut else ""
            if group and group in groups[-1:]:
                continue
            if len(contents) + len(groups) >= most:
                more = most > 0
                break
            if group:
                groups.append(group)
                last = group + chr(0x10FFFF)  # behind everything that it stands for
                continue
            last = key
            try:
                fd, meta = self.folder.open(request.bucket, key)
            except Refusal:  # removed since the folder was read
                continue
            os.close(fd)
            algorithms = "".join(leaf("ChecksumAlgorithm", name.upper()) for name in meta.checksums)
            contents.append(
                element(
                    "Contents",
                    leaf("Key", shown(key)),
                    leaf("LastModified", timestamp(meta.modified)),
                    leaf("ETag", f'"{meta.etag}"'),
                    algorithms,
                    leaf("Size", meta.size),
                    leaf("StorageClass", "STANDARD"),
                )
            )
        following = (
            leaf("NextContinuationToken", base64.urlsafe_b64encode(last.encode()).decode()) if more else ""
        )
        return document(
            "ListBucketResult",
            leaf("Name", request.bucket),
            leaf("Prefix", shown(prefix)),
            leaf("Delimiter", shown(delimiter)) if delimiter else "",
            leaf("StartAfter", shown(params["start-after"])) if "start-after" in params else "",
            leaf("EncodingType", "url") if shown is quote else "",
            leaf("KeyCount", len(contents) + len(groups)),
            leaf("MaxKeys", most),
            leaf("ContinuationToken", token) if token else "",
            following,
            leaf("IsTruncated", str(more).lower()),
            *contents,
            *(element("CommonPrefixes", leaf("Prefix", shown(group))) for group in groups),
        )

    def delete_objects(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        checked = any(name.startswith("x-amz-checksum-") or name == "content-md5" for name in request.headers)
        if self.settings.checksums and not checked and "x-amz-trailer" not in request.headers:
            raise Refusal(400, "InvalidRequest", "Missing required header for this request: Content-MD5")
        tree = self.read_xml(request)
        named = [each.findtext("Key") for each in tree.findall("Object")]
        if not 0 < len(named) <= 1000 or not all(named):
            raise Refusal(400, "MalformedXML", "1 to 1000 objects, each with its key")
        if tree.find("Object/VersionId") is not None or tree.find("Object/ETag") is not None:
            raise Refusal(501, "NotImplemented", "versions and conditions in a multi-object delete")
        for key in named:
            self.folder.remove(request.bucket, str(key))
        deleted = [element("Deleted", leaf("Key", key)) for key in named]
        return document("DeleteResult", *([] if tree.findtext("Quiet") == "true" else deleted))

    # objects

    def get_object(self, request: Request) -> Response:
        fd, meta = self.folder.open(request.bucket, request.key)
        try:
            return self.object_response(request, fd, meta)
        except BaseException:
            os.close(fd)
            raise

    def object_response(self, request: Request, fd: int, meta: Meta) -> Response:
        headers, size = request.headers, meta.size
        described = {
            "ETag": f'"{meta.etag}"',
            "Last-Modified": email.utils.formatdate(meta.modified, usegmt=True),
        }

        def among(name: str) -> bool:
            return bool(
                {"*", meta.etag}
                & {each.strip().removeprefix("W/").strip('"') for each in headers[name].split(",")}
            )

        if "if-match" in headers and not among("if-match"):
            raise Refusal(
                412,
                "PreconditionFailed",
                "At least one of the pre-conditions did not hold",
                Condition="If-Match",
            )
        if "if-none-match" in headers and among("if-none-match"):
            refusal = Refusal(304, "NotModified")
            refusal.headers = described
            raise refusal
        start, stop, asked = 0, size, False
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "").replace(" ", "")):
            first, final = match.groups()
            if first and final and int(final) < int(first):
                pass  # not a range: ignored, as RFC 9110 has it
            elif first or final:
                asked = True
                if first:
                    start, stop = int(first), min(int(final) + 1, size) if final else size
                else:
                    start = max(size - int(final), 0)
                if start >= size or (not first and int(final) == 0):
                    message = "The requested range is not satisfiable"
                    refusal = Refusal(416, "InvalidRange", message, ActualObjectSize=str(size))
                    refusal.headers = {"Content-Range": f"bytes */{size}"}
                    raise refusal
        described |= {"Content-Type": meta.content_type, "Accept-Ranges": "bytes"}
        described |= {f"x-amz-meta-{name}": value for name, value in meta.user.items()}
        if asked:
            described["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        elif headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and self.settings.checksums:
            described |= self.shown_checksums(meta)
        return Response(
            206 if asked else 200, described, [(start, stop)], fd, size, bare=request.method == "HEAD"
        )

    def shown_checksums(self, meta: Meta) -> dict[str, str]:
        found = {f"x-amz-checksum-{name}": value for name, value in meta.checksums.items()}
        return found | {"x-amz-checksum-type": meta.checksum_type} if found else {}

    def new_meta(self, request: Request) -> Meta:
        user = {
            name.removeprefix("x-amz-meta-"): value
            for name, value in request.headers.items()
            if name.startswith("x-amz-meta-")
        }
        return Meta("", 0, 0.0, request.headers.get("content-type", "binary/octet-stream"), user)

    def put_object(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        file_name(request.key)
        precondition(request.headers, self.folder.etag(request.bucket, request.key))  # before the body comes
        path = self.folder.scratch()
        try:
            with open(path, "xb", buffering=0) as file:
                received = receive(request, file.write, checksums=self.settings.checksums)
            meta = self.new_meta(request)
            meta.etag, meta.checksums = received.md5.hex(), received.checksums
            with self.folder.locked():
                self.folder.install(request.bucket, request.key, path, meta, request.headers)
        finally:
            path.unlink(missing_ok=True)
        return Response(200, {"ETag": f'"{meta.etag}"', **self.shown_checksums(meta)})

    def delete_object(self, request: Request) -> Response:
        if {"if-match", "if-none-match"} & request.headers.keys():
            raise Refusal(501, "NotImplemented", "a conditional delete")
        self.folder.remove(request.bucket, request.key)
        return Response(204)

    def replace_object(self, request: Request) -> None:
        """Put other bytes of the same size under the key."""
        fd, meta = self.folder.open(request.bucket, request.key)
        other, path, digest = bytes(255 - i for i in range(256)), self.folder.scratch(), hashlib.md5()
        with open(fd, "rb") as source, open(path, "xb") as target:
            while data := source.read(SCRATCH).translate(other):
                digest.update(data)
                target.write(data)
        meta = Meta(digest.hexdigest(), 0, 0.0, meta.content_type, meta.user)
        with self.folder.locked():
            self.folder.install(request.bucket, request.key, path, meta, {})

    # multipart uploads

    def create_upload(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        file_name(request.key)
        receive(request, lambda data: None, checksums=False)
        algorithm = (
            request.headers.get("x-amz-checksum-algorithm", "").lower() if self.settings.checksums else ""
        )
        default = "FULL_OBJECT" if algorithm == "crc64nvme" else "COMPOSITE"
        kind = request.headers.get("x-amz-checksum-type", default).upper()
        if algorithm:
            new_checksum(algorithm)
            if kind not in ("COMPOSITE", "FULL_OBJECT") or kind == (
                "COMPOSITE"
                if algorithm == "crc64nvme"
                else "FULL_OBJECT"
                if algorithm.startswith("sha")
                else ""
            ):
                message = f"The {kind} checksum type cannot be used with the {algorithm} checksum algorithm."
                raise Refusal(400, "InvalidRequest", message)
        meta, upload_id = self.new_meta(request), uuid.uuid4().hex
        begun = {
            "bucket": request.bucket,
            "key": request.key,
            "initiated": time.time(),
            "algorithm": algorithm,
            "kind": kind,
            "content_type": meta.content_type,
            "user": meta.user,
        }
        path = self.folder.scratch()
        path.mkdir()
        (path / "upload.json").write_text(json.dumps(begun))
        path.rename(self.folder.root / ".uploads" / upload_id)
        response = document(
            "InitiateMultipartUploadResult",
            leaf("Bucket", request.bucket),
            leaf("Key", request.key),
            leaf("UploadId", upload_id),
        )
        if algorithm:
            response.headers |= {"x-amz-checksum-algorithm": algorithm.upper(), "x-amz-checksum-type": kind}
        return response

    def upload_part(self, request: Request) -> Response:
        upload_id = request.params["uploadId"]
        folder, begun = self.folder.upload(request.bucket, request.key, upload_id)
        number = request.params["partNumber"]
        if not re.fullmatch(r"\d{1,5}", number) or not 1 <= int(number) <= 10000:
            raise Refusal(
                400, "InvalidArgument", "Part number must be an integer between 1 and 10000, inclusive"
            )
        path = self.folder.scratch()
        try:
            with open(path, "xb", buffering=0) as file:
                received = receive(
                    request, file.write, checksums=self.settings.checksums, also=begun["algorithm"]
                )
            if set(received.checksums) - {begun["algorithm"]}:
                wanted, given = begun["algorithm"] or "null", ", ".join(received.checksums)
                message = (
                    f"Checksum Type mismatch occurred, expected checksum Type: {wanted}, actual: {given}"
                )
                raise Refusal(400, "InvalidRequest", message)
            etag = received.md5.hex()
            part = {
                "etag": etag,
                "size": received.size,
                "modified": time.time(),
                "checksums": received.checksums,
            }
            with self.folder.locked():
                self.folder.upload(request.bucket, request.key, upload_id)
                path.replace(folder / f"{int(number):05}")
                path.write_text(json.dumps(part))
                path.replace(folder / f"{int(number):05}.json")
        finally:
            path.unlink(missing_ok=True)
        shown = {f"x-amz-checksum-{name}": value for name, value in received.checksums.items()}
        return Response(200, {"ETag": f'"{etag}"', **shown})

    def list_parts(self, request: Request) -> Response:
        with self.folder.locked(fcntl.LOCK_SH):
            folder, begun = self.folder.upload(request.bucket, request.key, request.params["uploadId"])
            parts = self.folder.parts(folder)
        marker, most = int(request.params.get("part-number-marker") or 0), self.count(request, "max-parts")
        left = [number for number in sorted(parts) if number > marker]
        algorithm = begun["algorithm"].upper()
        return document(
            "ListPartsResult",
            leaf("Bucket", request.bucket),
            leaf("Key", request.key),
            leaf("UploadId", request.params["uploadId"]),
            leaf("PartNumberMarker", marker),
            leaf("NextPartNumberMarker", [marker, *left[:most]][-1]),
            leaf("MaxParts", most),
            leaf("IsTruncated", str(len(left) > most).lower()),
            leaf("ChecksumAlgorithm", algorithm) + leaf("ChecksumType", begun["kind"]) if algorithm else "",
            *(
                element(
                    "Part",
                    leaf("PartNumber", number),
                    leaf("LastModified", timestamp(parts[number]["modified"])),
                    leaf("ETag", f'"{parts[number]["etag"]}"'),
                    leaf("Size", parts[number]["size"]),
                    *(
                        leaf(f"Checksum{name.upper()}", value)
                        for name, value in parts[number]["checksums"].items()
                    ),
                )
                for number in left[:most]
            ),
        )

    def list_uploads(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        params, most, found = request.params, self.count(request, "max-uploads"), []
        shown: Callable[[str], str] = quote if params.get("encoding-type") == "url" else str
        for path in (self.folder.root / ".uploads").iterdir():
            with contextlib.suppress(FileNotFoundError):
                begun = json.loads((path / "upload.json").read_bytes())
                if begun["bucket"] == request.bucket and begun["key"].startswith(params.get("prefix", "")):
                    found.append((begun["key"], path.name, begun))
        marker = params.get("key-marker", ""), params.get("upload-id-marker", "")
        left = sorted(
            each
            for each in found
            if each[:2] > marker and (marker[1] or each[0] > marker[0] or not marker[0])
        )
        page = left[:most]
        following = ""
        if len(left) > most and page:
            following = leaf("NextKeyMarker", shown(page[-1][0])) + leaf("NextUploadIdMarker", page[-1][1])
        return document(
            "ListMultipartUploadsResult",
            leaf("Bucket", request.bucket),
            leaf("EncodingType", "url") if shown is quote else "",
            leaf("KeyMarker", shown(marker[0])),
            leaf("UploadIdMarker", marker[1]),
            following,
            leaf("Prefix", shown(params.get("prefix", ""))),
            leaf("MaxUploads", most),
            leaf("IsTruncated", str(len(left) > most).lower()),
            *(
                element(
                    "Upload",
                    leaf("Key", shown(key)),
                    leaf("UploadId", upload_id),
                    leaf("StorageClass", "STANDARD"),
                    leaf("Initiated", timestamp(begun["initiated"])),
                )
                for key, upload_id, begun in page
            ),
        )

    def abort_upload(self, request: Request) -> Response:
        with self.folder.locked():
            folder, _ = self.folder.upload(request.bucket, request.key, request.params["uploadId"])
            shutil.rmtree(folder)
        return Response(204)

    def chosen_parts(
        self, request: Request, begun: dict[str, Any], parts: dict[int, dict[str, Any]]
    ) -> list[int]:
        """The numbers that a completing request names, once each is the part that was sent."""
        tree, algorithm = self.read_xml(request), begun["algorithm"]
        numbers: list[int] = []
        for each in tree.findall("Part"):
            number, etag = each.findtext("PartNumber", ""), each.findtext("ETag", "").strip('"')
            part = parts.get(int(number) if number.isdecimal() else -1)
            given = each.findtext(f"Checksum{algorithm.upper()}") if algorithm else None
            if algorithm and begun["kind"] == "COMPOSITE" and given is None:
                message = f"The upload was created using a {algorithm} checksum. The complete request must include it for each part."
                raise Refusal(400, "InvalidRequest", message)
            if part is None or part["etag"] != etag or (given and given != part["checksums"][algorithm]):
                message = (
                    "One or more of the specified parts could not be found, or has another ETag or checksum."
                )
                raise Refusal(400, "InvalidPart", message, PartNumber=number, ETag=etag)
            if numbers and int(number) <= numbers[-1]:
                raise Refusal(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
            numbers.append(int(number))
        if not numbers:
            raise Refusal(400, "MalformedXML", "a completing request names at least one part")
        for early in numbers[:-1]:
            if parts[early]["size"] < self.settings.min_part_size:
                message = "Your proposed upload is smaller than the minimum allowed size"
                more = {"PartNumber": str(early), "MinSizeAllowed": str(self.settings.min_part_size)}
                raise Refusal(400, "EntityTooSmall", message, **more)
        return numbers

    def complete_upload(self, request: Request) -> Response:
        upload_id = request.params["uploadId"]
        with self.folder.locked(fcntl.LOCK_SH):
            folder, begun = self.folder.upload(request.bucket, request.key, upload_id)
            parts = self.folder.parts(folder)
        numbers = self.chosen_parts(request, begun, parts)
        algorithm, full = begun["algorithm"], begun["algorithm"] and begun["kind"] == "FULL_OBJECT"
        digest: Any = new_checksum(algorithm) if algorithm else None
        joined = hashlib.md5(b"".join(bytes.fromhex(parts[number]["etag"]) for number in numbers)).hexdigest()
        path = self.folder.scratch()
        try:
            with open(path, "x+b", buffering=0) as target:
                for number in numbers:
                    with open(folder / f"{number:05}", "rb", buffering=0) as source:
                        while os.sendfile(target.fileno(), source.fileno(), None, 2**30):
                            pass
                    if digest and not full:
                        digest.update(base64.b64decode(parts[number]["checksums"][algorithm]))
                target.seek(0)
                while full and (data := target.read(SCRATCH)):
                    digest.update(data)
                size = target.seek(0, os.SEEK_END)
            meta = Meta(f"{joined}-{len(numbers)}", 0, 0.0, begun["content_type"], begun["user"])
            if digest:
                meta.checksum_type = begun["kind"]
                meta.checksums = {algorithm: b64(digest.digest()) + ("" if full else f"-{len(numbers)}")}
                given = request.headers.get(f"x-amz-checksum-{algorithm}", meta.checksums[algorithm])
                if given.partition("-")[0] != meta.checksums[algorithm].partition("-")[0]:
                    raise Refusal(
                        400,
                        "BadDigest",
                        f"The {algorithm} you specified did not match the calculated checksum.",
                    )
            if request.headers.get("x-amz-mp-object-size", str(size)) != str(size):
                raise Refusal(400, "InvalidRequest", f"x-amz-mp-object-size, and the parts have {size} bytes")
            with self.folder.locked():
                self.folder.upload(request.bucket, request.key, upload_id)
                self.folder.install(request.bucket, request.key, path, meta, request.headers)
                shutil.rmtree(folder)
        except FileNotFoundError:  # completed or aborted by another request meanwhile
            raise Refusal(
                404, "NoSuchUpload", "The upload was completed or aborted", UploadId=upload_id
            ) from None
        finally:
            path.unlink(missing_ok=True)
        shown = [leaf(f"Checksum{name.upper()}", value) for name, value in meta.checksums.items()]
        return document(
            "CompleteMultipartUploadResult",
            leaf("Location", f"/{request.bucket}/{quote(request.key)}"),
            leaf("Bucket", request.bucket),
            leaf("Key", request.key),
            leaf("ETag", f'"{meta.etag}"'),
            *shown,
            leaf("ChecksumType", meta.checksum_type) if shown else "",
        )


# Connections


def cut_pieces(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """Bytes [start, stop) of what the pieces are together."""
    found: list[Piece] = []
    at = 0
    for piece in pieces:
        length = len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
        first, last = max(start - at, 0), min(stop - at, length)
        if first < last:
            found.append(
                piece[first:last] if isinstance(piece, bytes) else (piece[0] + first, piece[0] + last)
            )
        at += length
    return found


def tamper(fault: dict[str, Any], response: Response) -> None:
    """Make the body of a response wrong, in the way that the fault names."""
    mode, pieces, length = fault["mode"], response.pieces, response.length
    by = fault.get("by", 1)
    if mode in ("shift", "wrong_range", "full200", "gzip"):
        [(start, stop)] = [piece for piece in pieces if not isinstance(piece, bytes)]
        size = response.whole
    if mode == "flip":
        at = min(fault.get("at", 0), length - 1)
        [piece] = cut_pieces(pieces, at, at + 1)
        one = piece if isinstance(piece, bytes) else os.pread(response.fd, 1, piece[0])
        response.pieces = [
            *cut_pieces(pieces, 0, at),
            bytes([one[0] ^ 1]),
            *cut_pieces(pieces, at + 1, length),
        ]
    elif mode == "html":
        page = b"<html><body><h1>Welcome to this network</h1>please log in</body></html>\n"
        response.status = 200
        response.headers = {"Content-Type": "text/html"}
        response.pieces = [page if fault.get("short") else (page * (length // len(page) + 1))[:length]]
    elif mode == "shift":
        inside = start + by >= 0 and stop + by <= size
        by %= length
        response.pieces = (
            [(start + fault.get("by", 1), stop + fault.get("by", 1))]
            if inside
            else [(start + by, stop), (start, start + by)]
        )
    elif mode == "wrong_range":
        start = min(max(start + by, 0), size - 1)
        stop = min(max(stop + by, start + 1), size)
        response.status, response.pieces = 206, [(start, stop)]
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    elif mode == "full200":
        response.status, response.pieces = 200, [(0, size)]
        response.headers.pop("Content-Range", None)
    elif mode == "gzip":
        response.pieces = [gzip.compress(os.pread(response.fd, stop - start, start), 1)]
        response.headers["Content-Encoding"] = "gzip"
    elif mode in ("empty_list", "short_list"):
        [text] = [piece for piece in pieces if isinstance(piece, bytes)]
        entries = re.findall(rb"<Contents>.*?</Contents>|<CommonPrefixes>.*?</CommonPrefixes>", text, re.S)
        for entry in entries[len(entries) // 2 if mode == "short_list" else 0 :]:
            text = text.replace(entry, b"", 1)
        text = re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", text)
        text = re.sub(rb"<KeyCount>\d+<", b"<KeyCount>%d<" % text.count(b"<Contents>"), text)
        response.pieces = [re.sub(rb"<IsTruncated>true<", b"<IsTruncated>false<", text)]


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
            code = fault.get("code", 503)
            name = fault.get("name", NAMES.get(code, "InternalError"))
            refusal = Refusal(code, name, "this is a fault that was asked for")
            if code == 301:
                refusal.headers["x-amz-bucket-region"] = fault.get("region", "eu-west-1")
                refusal.more["Endpoint"] = f"s3.{fault.get('region', 'eu-west-1')}.amazonaws.com"
            if "location" in fault:
                refusal.headers["Location"] = fault["location"]
            return refusal_response(refusal, request_id, bare=request.method == "HEAD")
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


# The program


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


# For tests


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and localhost, and its key, made by the openssl command."""
    certificate, key = folder / "server.crt", folder / "server.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += [
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1,DNS:localhost",
    ]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key


class S3Server:
    """The server as a process of its own, which ends with this one at the latest."""

    def __init__(
        self,
        root: Path,
        *,
        tls: bool = False,
        access_key: str = "test-access-key",
        secret_key: str = "test-secret-key",
        session_token: str | None = None,
        region: str = "us-east-1",
        workers: int = 1,
        checksums: bool = True,
        anonymous_read: bool = False,
        min_part_size: int = 5 * 2**20,
        clock_offset: float = 0.0,
        port: int = 0,
    ) -> None:
        self.root, self.tls, self.region = Path(root), tls, region
        self.access_key, self.secret_key, self.session_token = access_key, secret_key, session_token
        self.endpoint, self.control = "", ""
        self.certificate: Path | None = None
        self._options = [
            f"--workers={workers}",
            f"--min-part-size={min_part_size}",
            f"--clock-offset={clock_offset}",
        ]
        self._options += [f"--port={port}"]
        self._options += [] if checksums else ["--no-checksums"]
        self._options += ["--anonymous-read"] if anonymous_read else []
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--root",
            str(self.root),
            "--until-stdin-closes",
        ]
        command += [
            f"--access-key={self.access_key}",
            f"--secret-key={self.secret_key}",
            f"--region={self.region}",
        ]
        command += [f"--session-token={self.session_token}"] if self.session_token else []
        command += self._options
        with contextlib.ExitStack() as stack:
            if self.tls:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3server-"))
                self.certificate, key = make_certificate(Path(folder))
                command += [f"--tls-cert={self.certificate}", f"--tls-key={key}"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(self._end)
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("the S3 server did not start; what it said is on stderr")
            self.endpoint, self.control = json.loads(line)["endpoint"], json.loads(line)["control"]
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def environment(self) -> dict[str, str]:
        """What a client's environment must have to use this server and nothing else."""
        found = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        found |= {"AWS_SESSION_TOKEN": self.session_token} if self.session_token else {}
        return found | ({"AWS_CA_BUNDLE": str(self.certificate)} if self.certificate else {})

    def _ask(self, method: str, path: str, value: object = None) -> Any:
        connection = http.client.HTTPConnection(self.control.removeprefix("http://"), timeout=10)
        try:
            connection.request(method, path, None if value is None else json.dumps(value))
            response = connection.getresponse()
            found = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(found["error"])
        return found

    def fault(
        self,
        mode: str,
        *,
        times: int = 1,
        skip: int = 0,
        method: str | None = None,
        match: str = "",
        min_bytes: int = 0,
        **how: Any,
    ) -> None:
        """Give the next `times` matching requests this fault (0: all), leaving out the first `skip` of them.

        `how`: code, name, location, region (status), after (reset, truncate, stall, drop_upload: bytes of the body),
        at (flip), by (shift, wrong_range), rate (drip: bytes a second), delay (delay, slow_first_byte: seconds),
        short (html). A flip keeps the ETag, and `replace` is done before the old bytes are sent.
        """
        chosen = {"times": times, "skip": skip, "match": match, "min_bytes": min_bytes, **how}
        self._ask("POST", "/fault", {"mode": mode, **chosen, **({"method": method} if method else {})})

    def clear(self) -> None:
        """Forget all faults."""
        self._ask("POST", "/clear")

    def rotate(self, access_key: str, secret_key: str, session_token: str | None = None) -> None:
        """Accept these credentials from now on; those before get ExpiredToken."""
        given = {"access_key": access_key, "secret_key": secret_key, "session_token": session_token}
        self._ask("POST", "/credentials", given)
        self.access_key, self.secret_key, self.session_token = access_key, secret_key, session_token

    def stats(self) -> dict[str, Any]:
        """requests, sent and received (bytes of bodies), faults; the same for each of `operations`; modes; log."""
        found: dict[str, Any] = self._ask("GET", "/stats")
        return found

    def reset_stats(self) -> None:
        self._ask("POST", "/reset")

    def make_bucket(self, name: str) -> None:
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def objects(self, bucket: str) -> dict[str, Path]:
        """Key -> the file that holds its bytes."""
        return {unquote(path.name): path for path in sorted((self.root / bucket).iterdir())}


if __name__ == "__main__":
    main()
