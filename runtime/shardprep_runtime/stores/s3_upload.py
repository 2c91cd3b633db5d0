"""Put an object in S3 in parts, in any order, and take up what an earlier upload has left there."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from ..errors import ConflictError, DeniedError, MissingError, StoreError
from .connection import Reply
from .retry import Patience, Transient
from .s3_answers import GoneUpload
from .s3_client import Mover, S3Client
from .store import Body, Chunk, FileRange, Stat, where

FOUND_ANOTHER: Final = ("BadDigest", "InvalidDigest", "XAmzContent")
"""How a code begins where the store knows checksums, and found another one."""


class S3Upload:
    """A PUT where there is one part, a multipart upload where there are several."""

    def __init__(self, client: S3Client, mover: Mover, key: str, parts: Sequence[tuple[int, int]]) -> None:
        self._client, self._mover, self._key, self._parts = client, mover, key, tuple(parts)
        self._lock = threading.Lock()
        self._id: str | None = None
        self._there: dict[int, Mapping[str, Any]] | None = None
        self._done: dict[int, dict[str, Any]] = {}
        self._single: Stat | None = None
        self._checksums = True

    @property
    def parts(self) -> Sequence[tuple[int, int]]:
        return self._parts

    @property
    def _full_key(self) -> str:
        return self._client.prefix + self._key

    def has(self, number: int, chunk: Callable[[], Chunk]) -> bool:
        if len(self._parts) == 1:
            return False
        with self._lock:
            if self._there is None:
                self._there = self._adopt()
        found = self._there.get(number + 1)
        start, stop = self._parts[number]
        if found is None or found["Size"] != stop - start:
            return False
        own = chunk()
        crc = found.get("ChecksumCRC32")
        if crc is not None and own.crc32 is not None:
            same = bool(crc == _base64(own.crc32))
        else:
            same = bool(found["ETag"].strip('"') == _md5(own.body))
        if same:
            self._done[number] = {"PartNumber": number + 1, "ETag": found["ETag"]}
            if crc is not None:
                self._done[number]["ChecksumCRC32"] = crc
        return same

    def _adopt(self) -> dict[int, Mapping[str, Any]]:
        """Take over the newest unfinished upload of this key; its parts. The key names its content, so any will do."""
        uploads = [each for each in unfinished(self._client, self._key) if each["Key"] == self._full_key]
        if not uploads:
            return {}
        self._id = max(uploads, key=lambda each: each["Initiated"])["UploadId"]
        found: dict[int, Mapping[str, Any]] = {}
        marker = 0
        while True:
            try:
                page = self._call("list_parts", UploadId=self._id, PartNumberMarker=marker)
            except MissingError:
                self._id = None
                return {}
            found.update({each["PartNumber"]: each for each in page.get("Parts", ())})
            if not page.get("IsTruncated"):
                return found
            marker = page["NextPartNumberMarker"]

    def _call(self, name: str, **params: Any) -> Any:
        return self._client.call(self._key, name, Key=self._full_key, **params)

    def _begin(self) -> str:
        with self._lock:
            if self._id is None:
                try:
                    begun = self._call("create_multipart_upload", ChecksumAlgorithm="CRC32")
                except (DeniedError, MissingError, ConflictError):
                    raise
                except StoreError as error:
                    if error.status not in (400, 501):
                        raise
                    self._checksums = False  # a store that knows no such header
                    begun = self._call("create_multipart_upload")
                self._id = str(begun["UploadId"])
            return self._id

    def send(self, number: int, chunk: Chunk) -> bool:
        query: dict[str, str] = {}
        if len(self._parts) > 1:
            query = {"partNumber": str(number + 1), "uploadId": self._begin()}
        try:
            reply = self._put(query, chunk)
        except GoneUpload:
            if self._complete_already() is None:
                raise
            return False
        etag = reply.headers.get("etag", "")
        echoed = reply.headers.get("x-amz-checksum-crc32")
        checked = echoed is not None and chunk.crc32 is not None
        if checked and chunk.crc32 is not None and echoed != _base64(chunk.crc32):
            raise StoreError(
                f"{where(self._client, self._key)}: the store received other bytes than were sent"
            )
        if query:
            self._done[number] = {"PartNumber": number + 1, "ETag": etag}
            if echoed is not None:
                self._done[number]["ChecksumCRC32"] = echoed
        else:
            self._single = Stat(self._key, len(chunk.body), etag, time.time())
        return checked

    def _put(self, query: Mapping[str, str], chunk: Chunk) -> Reply:
        headers = {}
        if chunk.crc32 is not None and self._checksums:
            headers["x-amz-checksum-crc32"] = _base64(chunk.crc32)
            if not query:
                headers["x-amz-sdk-checksum-algorithm"] = "CRC32"

        def once(_: Patience) -> Reply:
            return self._mover.put(self._key, query, chunk.body, headers)

        try:
            reply = self._client.persist(self._key, once)
        except (DeniedError, MissingError, ConflictError):
            raise
        except StoreError as error:
            if not headers or not _may_lack_checksums(error):
                raise
            self._checksums = False
            headers = {}
            reply = self._client.persist(self._key, once)
        return reply

    def _complete_already(self) -> Stat | None:
        """The object, where somebody else (or a try whose answer was lost) has completed it."""
        found = self._client.head(self._key)
        return found if found is not None and found.size == self._parts[-1][1] else None

    def finish(self) -> Stat:
        if self._single is not None:
            return self._single
        assert self._id is not None
        try:
            self._client.persist(self._key, self._complete)
        except GoneUpload:
            found = self._complete_already()
            if found is None:
                raise
            return found
        found = self._complete_already()
        if found is None:
            raise StoreError(
                f"{where(self._client, self._key)}: the store took all parts, but the object has another size"
            )
        return found

    def _complete(self, _: Patience) -> None:
        client, name = self._client, {"Key": self._full_key, "UploadId": self._id}
        parts = [self._done[number] for number in sorted(self._done)]
        try:
            client.call_once(self._key, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **name)
        except Transient:
            # radosgw says 500 for ever of an upload that is gone: completed (the answer was lost) or aborted
            try:
                client.call_once(self._key, "list_parts", **name)
            except MissingError:
                raise GoneUpload(
                    f"{where(client, self._key)}: NoSuchUpload: the upload was aborted",
                    missing="upload",
                ) from None
            raise

    def leave(self) -> None:
        """Nothing to do: what was sent stays until it is taken up again, or dropped by `abort_uploads`."""


def _may_lack_checksums(error: StoreError) -> bool:
    """Whether a store may just not know checksums; never true where it found another one.

    Args:
        error: What it answered to a request with a checksum.

    Returns:
        Whether the request is worth another try without.
    """
    if error.status == 400:
        return not (error.code or "").startswith(FOUND_ANOTHER)
    return error.status == 501


def _base64(crc32: int) -> str:
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()


def _md5(body: Body) -> str:
    """The digest that is the ETag of a part. Security does not hang on it: another part fails its blocks' digests."""
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(body, FileRange):
        for data in body.chunks():
            digest.update(data)
    else:
        digest.update(body)
    return digest.hexdigest()


def unfinished(client: S3Client, prefix: str) -> Iterator[Mapping[str, Any]]:
    """Multipart uploads that were begun and not ended.

    Args:
        client: Client of the store.
        prefix: How the keys of their objects begin.

    Yields:
        Each as botocore describes it.
    """
    more: dict[str, str] = {}
    while True:
        page = client.call(prefix, "list_multipart_uploads", Prefix=client.prefix + prefix, **more)
        yield from page.get("Uploads", ())
        if not page.get("IsTruncated"):
            return
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort_uploads(client: S3Client, prefix: str, *, before: float) -> int:
    """Drop unfinished uploads, as `Store.abort_uploads`.

    Args:
        client: Client of the store.
        prefix: How the keys of their objects begin.
        before: Those begun before this time, in seconds since the epoch.

    Returns:
        How many there were.
    """
    count = 0
    for each in list(unfinished(client, prefix)):
        if each["Initiated"].timestamp() < before:
            with suppress(GoneUpload):
                client.call(prefix, "abort_multipart_upload", Key=each["Key"], UploadId=each["UploadId"])
                count += 1
    return count
