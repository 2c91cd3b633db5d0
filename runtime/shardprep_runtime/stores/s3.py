"""A store in S3, or in what speaks like it: the verbs, over a client and a mover of data.

Small requests go through botocore's client. The bytes of ranges and parts go over our own connections, received in
place; behind a proxy, or when asked for, through botocore too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import get_args

from ..errors import ConflictError, InputError, MissingError, StoreError
from .connection import Broken
from .retry import Patience, Transient
from .s3_by_botocore import BotoMover
from .s3_client import Mover, S3Client
from .s3_native import NativeMover
from .s3_upload import S3Upload, abort_uploads
from .store import Access, Sink, Stat, Transfer, changed, holds, where


class S3Store:
    """A bucket, under a prefix."""

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        if access.transfer not in get_args(Transfer):
            raise InputError(f"transfer must be auto, native or boto3, not {access.transfer!r}")
        self.client = S3Client(bucket, prefix, access)
        self.uri, self.access = self.client.uri, access
        self._choosing = threading.Lock()
        self._mover: Mover | None = None

    @property
    def mover(self) -> Mover:
        """What moves the data; chosen when first needed, since the user's settings are read for it."""
        with self._choosing:
            if self._mover is None:
                self._mover = _choose_mover(self.client)
            return self._mover

    def __enter__(self) -> S3Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._choosing:
            if self._mover is not None:
                self._mover.close()
        self.client.close()

    def head(self, key: str) -> Stat | None:
        return self.client.head(key)

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        wanted = sink.left
        if not wanted:
            raise ValueError("a range of no bytes cannot be asked for")
        known = version

        def once(patience: Patience) -> str:
            nonlocal known
            patience.look = lambda: sink.landed(0)  # a fetch that was ended does not wait for our patience
            before = sink.left
            try:
                known = self.mover.get(key, start + wanted - before, sink, version=known)
            except Broken as broken:
                known = broken.version or known
                if sink.left < before:
                    patience.progress()
                raise Transient(str(broken)) from None
            except ConflictError:
                raise changed(self, key) from None
            return known

        return self.client.persist(key, once)

    def put(self, key: str, data: bytes) -> Stat:
        done = self.client.call(key, "put_object", Key=self.client.prefix + key, Body=data)
        return Stat(key, len(data), done["ETag"], time.time())

    def put_if(self, key: str, data: bytes, *, version: str | None) -> Stat:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def once(patience: Patience) -> Stat:
            nonlocal condition
            try:
                done = self.client.call_once(
                    key, "put_object", Key=self.client.prefix + key, Body=data, **condition
                )
            except (ConflictError, MissingError) as error:
                if isinstance(error, MissingError) and error.missing == "bucket":
                    raise
                found = self.head(key)
                if found and patience.tries and holds(self, key, found, data):
                    return found
                if version is not None and found and condition["IfMatch"] == version == found.version:
                    # older radosgw compares with the ETag as it keeps it, without the quotes of HTTP
                    condition = {"IfMatch": version.strip('"')}
                    return once(patience)
                raise ConflictError(f"{where(self, key)}: was written by somebody else meanwhile") from None
            except StoreError as error:
                if error.status == 501:
                    raise StoreError(
                        f"{where(self, key)}: this store cannot replace an object conditionally; use a new name",
                        status=error.status,
                        code=error.code,
                    ) from None
                raise
            return Stat(key, len(data), done["ETag"], time.time())

        return self.client.persist(key, once)

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> S3Upload:
        return S3Upload(self.client, self.mover, key, parts)

    def list(self, prefix: str) -> Iterator[Stat]:
        more: dict[str, str] = {}
        while True:
            page = self.client.call(prefix, "list_objects_v2", Prefix=self.client.prefix + prefix, **more)
            for each in page.get("Contents", ()):
                if each["Key"].startswith(self.client.prefix + prefix):
                    key = each["Key"][len(self.client.prefix) :]
                    yield Stat(key, each["Size"], each["ETag"], each["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            following = page.get("NextContinuationToken")
            if not following or following == more.get("ContinuationToken"):
                raise StoreError(f"{where(self, prefix)}: the store ended a listing midway")
            more = {"ContinuationToken": following}

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with suppress(MissingError):
                self.client.call(key, "delete_object", Key=self.client.prefix + key)

    def abort_uploads(self, prefix: str, *, before: float) -> int:
        return abort_uploads(self.client, prefix, before=before)


def _choose_mover(client: S3Client) -> Mover:
    chosen = client.access.transfer
    if chosen == "boto3" or (chosen == "auto" and _is_odd(client)):
        return BotoMover(client)
    return NativeMover(client)


def _is_odd(client: S3Client) -> bool:
    """Whether the endpoint is reached in a way that our own connections do not know: a proxy, S3 Express."""
    from botocore.utils import get_environ_proxies

    return bool(get_environ_proxies(client.boto.meta.endpoint_url)) or client.bucket.endswith("--x-s3")
