"""Buckets and objects as files of a folder.

DIR/<bucket>/<quoted key>       an object; a file put there by hand is one too
DIR/.meta/<bucket>/<quoted key> its ETag, checksums and headers, believed only while inode, size and mtime agree
DIR/.uploads/<id>/              an unfinished multipart upload
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from .messages import Refusal, Request


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


def new_meta(request: Request) -> Meta:
    """What the headers of a write say of the object that it makes."""
    user = {
        name.removeprefix("x-amz-meta-"): value
        for name, value in request.headers.items()
        if name.startswith("x-amz-meta-")
    }
    return Meta("", 0, 0.0, request.headers.get("content-type", "binary/octet-stream"), user)


def shown_checksums(meta: Meta) -> dict[str, str]:
    found = {f"x-amz-checksum-{name}": value for name, value in meta.checksums.items()}
    return found | {"x-amz-checksum-type": meta.checksum_type} if found else {}


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
        """The ETag of the object that is there now; the caller holds the lock, or only wants to know early."""
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
