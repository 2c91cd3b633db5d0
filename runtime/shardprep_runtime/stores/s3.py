"""Reach S3 and what speaks like it: botocore finds the endpoint and the credentials and signs, our own connections
move the data.

Small requests (head, list, delete, the steps of a multipart upload) go through botocore's client. The bytes of ranges
and parts go over `connection.Connection`, received in place; behind a proxy, or when asked for, through botocore too.
The API is that of the Amazon S3 API Reference; what other stores lack of it is said where it is used.
"""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType
from typing import Any, Final, Protocol, TypedDict, TypeVar, get_args
from urllib.parse import quote as percent
from urllib.parse import urlsplit

from ..errors import (
    ConflictError,
    DeniedError,
    InputError,
    Missing,
    MissingError,
    SourceError,
    StoreError,
    quote,
)
from .connection import Broken, Connection, Reply
from .retry import Patience, Transient
from .store import Access, Body, Chunk, FileRange, Sink, Stat, Transfer, changed, read, where

TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
TRANSIENT_CODES: Final = frozenset(
    {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"}
    | {
        "RequestLimitExceeded",
        "TooManyRequests",
        "BadDigest",
        "OperationAborted",
        "ConditionalRequestConflict",
    }
)
"""BadDigest: the store received other bytes than were sent; the 409s: another request was under way."""

EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
WRONG_REGION: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
    | {"TemporaryRedirect", "Redirect"}
)
MISSING: Final = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "404", "NotFound"})

UNREACHED: Final = 20.0
"""Seconds for which a store that has not answered yet is tried."""

FOUND_ANOTHER: Final = ("BadDigest", "InvalidDigest", "XAmzContent")
"""How the codes begin of a store that knows checksums, and found another one."""

ANSWERED: Final = {
    "head_object": {"ETag"},
    "put_object": {"ETag"},
    "upload_part": {"ETag"},
    "create_multipart_upload": {"UploadId"},
    "list_objects_v2": {"Name", "IsTruncated"},
    "list_multipart_uploads": {"Bucket", "IsTruncated"},
    "list_parts": {"UploadId", "IsTruncated"},
}
"""What S3 answers to each operation, one of it at least; a page with status 200 has none of it."""

MOST_ERROR_BYTES: Final = 64 * 2**10
"""Of an error's body that are read."""

IDLE_CONNECTIONS: Final = 128

T = TypeVar("T")


class Mover(Protocol):
    """What moves the data of one store."""

    def get(self, key: str, start: int, sink: Sink, *, version: str | None) -> str:
        """One try of `Store.get`. Raises Transient for what may pass."""

    def put(self, key: str, query: Mapping[str, str], body: Body, headers: Mapping[str, str]) -> Reply:
        """One try of a PUT. Raises Transient for what may pass."""

    def close(self) -> None:
        """Close connections."""


class S3Store:
    """A bucket, under a prefix."""

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        if access.transfer not in get_args(Transfer):
            raise InputError(f"transfer must be auto, native or boto3, not {access.transfer!r}")
        self.bucket, self.access = bucket, access
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._lock = threading.Lock()
        self._renewal = threading.Lock()
        self._connecting = threading.RLock()
        self._connected: tuple[Any, Any] | None = None
        self._mover: Mover | None = None
        self._credentials: Any = None
        self._reached = False

    def _connect(self) -> tuple[Any, Any]:
        """botocore's session and client, made when first needed: a worker whose cache has everything needs neither."""
        with self._connecting:
            if self._connected is None:
                self._connected = _connect(self.access)
            return self._connected

    @property
    def session(self) -> Any:
        """botocore's session of the user."""
        return self._connect()[0]

    @property
    def client(self) -> Any:
        """botocore's client of S3."""
        return self._connect()[1]

    @property
    def mover(self) -> Mover:
        """What moves the data."""
        with self._connecting:
            if self._mover is None:
                self._mover = self._choose_mover()
            return self._mover

    def _choose_mover(self) -> Mover:
        chosen = self.access.transfer
        if chosen == "boto3" or (chosen == "auto" and self._is_odd()):
            from .s3_by_botocore import BotoMover

            return BotoMover(self)
        return NativeMover(self)

    def _is_odd(self) -> bool:
        """Whether the endpoint is reached in a way that our own connections do not know: a proxy, S3 Express."""
        from botocore.utils import get_environ_proxies

        return bool(get_environ_proxies(self.client.meta.endpoint_url)) or self.bucket.endswith("--x-s3")

    def __enter__(self) -> S3Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._connecting:
            if self._mover is not None:
                self._mover.close()
            if self._connected is not None:
                self._connected[1].close()

    # ----------------------------------------------------------------------------------------------------- requests
    def credentials(self) -> Any:
        """The user's credentials as they are now; None where requests are anonymous. Raises DeniedError without any."""
        if self.access.anonymous:
            return None
        with self._lock:
            if self._credentials is None:
                self._credentials = _resolve(self.session.get_credentials)
                if self._credentials is None:
                    raise DeniedError(
                        f"{quote(self.uri)}: no credentials were found; set AWS_ACCESS_KEY_ID and "
                        "AWS_SECRET_ACCESS_KEY, choose a profile, or ask without any (--no-sign-request)"
                    )
        return _resolve(self._credentials.get_frozen_credentials)

    def renew(self, used: Any) -> bool:
        """Have other credentials than those `used`, which have expired; whether there are any.

        They are resolved anew unless another thread, to which the same has happened, has done so.
        """
        if used is None:
            return False
        with self._renewal:
            found = self.credentials()
            if (found.access_key, found.token) == (used.access_key, used.token):
                connected = _connect(self.access)
                with self._lock:
                    self._connected, self._credentials = connected, None
                found = self.credentials()
        return (found.access_key, found.token) != (used.access_key, used.token)

    def path_of(self, key: str) -> str:
        """The key as it stands in a URL."""
        return percent(self.prefix + key, safe="/-_.~")

    @property
    def _deadline(self) -> float:
        """A store that never answered is more likely misspelt than overloaded."""
        return self.access.deadline if self._reached else min(self.access.deadline, UNREACHED)

    def persist(self, key: str, work: Callable[[Patience], T]) -> T:
        """Do `work` until it succeeds, fails for good, or the deadline passes without progress."""
        patience = Patience(self._deadline)
        used, renewed = None, False
        while True:
            try:
                used = self.credentials()
                found = work(patience)
                self._reached = True
                return found
            except Transient as error:
                patience.deadline = self._deadline
                patience.pause(error, where=where(self, key))
            except _Expired as error:
                # another process may have renewed what we read at the start: look once
                try:
                    found_others = not renewed and self.renew(used)
                except Transient as failed:
                    patience.pause(failed, where=where(self, key))
                    continue
                if not found_others:
                    raise DeniedError(
                        f"{where(self, key)}: the credentials have expired; renew them and run again",
                        status=error.status,
                        code=error.code,
                    ) from error
                renewed = True

    def call(self, key: str, name: str, **params: Any) -> Any:
        """One of botocore's operations on this bucket, retried."""
        return self.persist(key, lambda _: self.call_once(key, name, **params))

    def call_once(self, key: str, name: str, **params: Any) -> Any:
        """One of botocore's operations on this bucket. Raises Transient for what may pass."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        self.credentials()  # says in our words where there are none
        try:
            found = _guard(lambda: getattr(self.client, name)(Bucket=self.bucket, **params))
        except exceptions.ClientError as error:
            meta = error.response.get("ResponseMetadata", {})
            about = error.response.get("Error", {})
            raise self.refusal(
                key,
                int(meta.get("HTTPStatusCode", 0)),
                str(about.get("Code", "")),
                str(about.get("Message", "")),
                meta.get("HTTPHeaders", {}),
            ) from None
        except exceptions.SSLError as error:
            if not _is_untrusted(error):  # it may have broken off
                raise Transient(f"{quote(self.host)}: no secure connection") from None
            raise StoreError(
                f"{quote(self.host)}: its certificate is not trusted; AWS_CA_BUNDLE names the file of those that are"
            ) from None
        except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
            raise Transient(f"{quote(self.host)}: {type(error).__name__}") from None
        except ResponseParserError:
            raise self._page() from None
        if not ANSWERED.get(name, {"ResponseMetadata"}) & found.keys():
            raise self._page()
        return found

    def _page(self) -> Transient:
        """What an answer is that a store of S3 does not give: a proxy's page, most often."""
        return Transient(
            f"the answer is not S3's; is {quote(self.host)} an endpoint of S3, or a page?", most=3
        )

    @property
    def host(self) -> str:
        """Where requests go, without credentials."""
        return str(urlsplit(self.client.meta.endpoint_url).netloc).rpartition("@")[2]

    def refusal(
        self, key: str, status: int, code: str, message: str, headers: Mapping[str, str]
    ) -> Exception:
        """What an answer that is no success means. A Transient, an _Expired or a StoreError; never a secret in it."""
        at = where(self, key)
        facts: _Facts = {"status": status or None, "code": code or None}
        if "x-amz-request-id" in headers:
            self._reached = True
        said = f"{status} {quote(code)}" + (f": {quote(message)}" if message else "")
        if "html" in headers.get("content-type", ""):
            said += f", with a page; is {quote(self.host)} an endpoint of S3?"
        if status == 416:
            return SourceError(f"{at}: ends before the bytes that were asked for")
        if status == 412:
            return ConflictError(f"{at}: the store's version is another one than expected", **facts)
        if code in EXPIRED:
            return _Expired(said, **facts)
        if status in TRANSIENT_STATUS or code in TRANSIENT_CODES:
            return Transient(f"the store answered {said}", most=4 if code == "BadDigest" else None, **facts)
        if code == "RequestTimeTooSkewed":
            return DeniedError(
                f"{at}: the clock of this machine is {_skew(headers)} the store's, which refuses that; set it",
                **facts,
            )
        if code in WRONG_REGION or status in (301, 302, 307, 308):
            expected = re.search(r"expecting '([a-z0-9-]{1,40})'", message)
            region = headers.get("x-amz-bucket-region") or (expected and expected[1])
            hint = (
                f"the bucket is in {quote(region)}" if region else "another region or endpoint is asked for"
            )
            return DeniedError(
                f"{at}: {hint}, the request went to {quote(self.host)} for {quote(self.client.meta.region_name)}; "
                "set AWS_REGION or --region (and --endpoint-url)",
                **facts,
            )
        if status == 404 or code in MISSING:
            if code == "NoSuchUpload":
                return _GoneUpload(f"{at}: {said}", missing="upload", **facts)
            missing: Missing = "bucket" if code == "NoSuchBucket" else "object"
            return MissingError(f"{at}: no such {missing}", missing=missing, **facts)
        if status in (401, 403):
            hint = (
                " (also the answer for a missing object to those who may not list)"
                if code == "AccessDenied"
                else ""
            )
            return DeniedError(f"{at}: the store refuses: {said}{hint}", **facts)
        return StoreError(f"{at}: the store answered {said}", **facts)

    # -------------------------------------------------------------------------------------------------------- verbs
    def head(self, key: str) -> Stat | None:
        def once(_: Patience) -> Any:
            try:
                return self.call_once(key, "head_object", Key=self.prefix + key)
            except MissingError:
                raise
            except StoreError:
                # the answer to a HEAD has no body that says why: have it said
                self.call_once(key, "get_object", Key=self.prefix + key, Range="bytes=0-0")["Body"].close()
                raise

        try:
            found = self.persist(key, once)
        except MissingError:
            return None
        return Stat(key, found["ContentLength"], found["ETag"], found["LastModified"].timestamp())

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

        return self.persist(key, once)

    def put(self, key: str, data: bytes) -> Stat:
        done = self.call(key, "put_object", Key=self.prefix + key, Body=data)
        return Stat(key, len(data), done["ETag"], time.time())

    def put_if(self, key: str, data: bytes, *, version: str | None) -> Stat:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def once(patience: Patience) -> Stat:
            nonlocal condition
            try:
                done = self.call_once(key, "put_object", Key=self.prefix + key, Body=data, **condition)
            except (ConflictError, MissingError) as error:
                if isinstance(error, MissingError) and error.missing == "bucket":
                    raise
                found = self.head(key)
                # an earlier try may have succeeded although its answer was lost
                if (
                    patience.tries
                    and found
                    and found.size == len(data)
                    and read(self, key, 0, found.size) == data
                ):
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

        return self.persist(key, once)

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> S3Upload:
        return S3Upload(self, key, parts)

    def list(self, prefix: str) -> Iterator[Stat]:
        more: dict[str, str] = {}
        while True:
            page = self.call(prefix, "list_objects_v2", Prefix=self.prefix + prefix, **more)
            for each in page.get("Contents", ()):
                if each["Key"].startswith(self.prefix + prefix):
                    key = each["Key"][len(self.prefix) :]
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
                self.call(key, "delete_object", Key=self.prefix + key)

    def unfinished(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        """Multipart uploads that were begun and not ended, as botocore describes them."""
        more: dict[str, str] = {}
        while True:
            page = self.call(prefix, "list_multipart_uploads", Prefix=self.prefix + prefix, **more)
            yield from page.get("Uploads", ())
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_uploads(self, prefix: str, *, before: float) -> int:
        count = 0
        for each in list(self.unfinished(prefix)):
            if each["Initiated"].timestamp() < before:
                with suppress(_GoneUpload):
                    self.call(prefix, "abort_multipart_upload", Key=each["Key"], UploadId=each["UploadId"])
                    count += 1
        return count


class _Expired(Exception):  # noqa: N818 - turned into a DeniedError unless new credentials are found
    """Credentials that have expired."""

    def __init__(self, message: str, *, status: int | None, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Facts(TypedDict):
    """What a store answered, for the error that it becomes."""

    status: int | None
    code: str | None


class _GoneUpload(MissingError):  # noqa: N818 - a MissingError that is handled here
    """A multipart upload that has been completed or aborted."""


def _connect(access: Access) -> tuple[Any, Any]:
    """A botocore session and its client of S3, from what the user gave and has set up."""
    try:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        raise InputError("s3:// needs botocore: pip install 'shardprep[s3]'") from None
    config = Config(
        retries={"total_max_attempts": 1},  # `persist` retries, under one deadline for all
        connect_timeout=access.connect_timeout,
        read_timeout=access.idle_timeout,
        max_pool_connections=IDLE_CONNECTIONS,
        # many stores know no checksum headers or answer a range with those of the whole object
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=UNSIGNED if access.anonymous else None,
    )
    session = _guard(lambda: botocore.session.Session(profile=access.profile))
    client = _guard(
        lambda: session.create_client(
            "s3", region_name=access.region or None, endpoint_url=access.endpoint_url, config=config
        )
    )
    if client.meta.region_name in (None, "aws-global") and not access.anonymous:
        client = _guard(
            lambda: session.create_client(
                "s3", region_name="us-east-1", endpoint_url=access.endpoint_url, config=config
            )
        )
    client.meta.events.register("before-call.s3", _stay)
    return session, client


def _stay(params: dict[str, Any], **_: Any) -> None:
    """Have botocore report a wrong region instead of asking around for the right one, which our data would not follow.

    (Where everything is answered by 307, it asks until Python's stack is full.)
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _guard(call: Callable[[], Any]) -> Any:
    """Call into botocore, with what it finds wrong in the user's settings in our words."""
    from botocore import exceptions

    try:
        return call()
    except (exceptions.ClientError, exceptions.HTTPClientError, exceptions.ConnectionError):
        raise
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise DeniedError(f"credentials: {quote(error)}") from None
    except (
        exceptions.SSOError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
    ) as error:
        raise DeniedError(f"credentials could not be had: {quote(error)}; log in again?") from None
    except exceptions.BotoCoreError as error:
        raise InputError(f"S3 settings: {_bare(error)}") from None
    except ValueError as error:  # an endpoint that is no URL
        raise InputError(f"S3 settings: {_bare(error)}") from None


def _is_untrusted(error: BaseException | None) -> bool:
    """Whether a certificate that is not trusted is why a connection failed.

    Args:
        error: What botocore raised; what it was raised from is looked at too.

    Returns:
        Whether one of them is the standard library's error for it.
    """
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _resolve(call: Callable[[], Any]) -> Any:
    """Have botocore find credentials, for which it may ask others. Raises DeniedError, or Transient for what may pass."""
    from botocore import exceptions

    try:
        return _guard(call)
    except exceptions.ClientError as error:
        raise DeniedError(f"credentials could not be had: {quote(error)}") from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Transient(f"credentials could not be had: {type(error).__name__}") from None


def _bare(error: BaseException) -> str:
    """What an error says, without the user and password that an endpoint may have."""
    return quote(re.sub(r"\S*@", "", str(error)))


def _skew(headers: Mapping[str, str]) -> str:
    try:
        seconds = time.time() - parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        return "not"
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"


# ---------------------------------------------------------------------------------------------------- the data itself


class NativeMover:
    """Moves data over connections of our own, signed by botocore."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        # a URL that botocore made tells how this endpoint and bucket are addressed, whatever their rules
        url = urlsplit(_example(store))
        usual = {"http": ":80", "https": ":443"}[url.scheme]
        self._host = url.netloc.rpartition("@")[2].removesuffix(usual)  # as botocore signs it
        self._origin = f"{url.scheme}://{self._host}"
        self._base = url.path.removesuffix("k")
        self._address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        self._tls = _tls(store) if url.scheme == "https" else None

    def _connection(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return Connection(
            self._address,
            self._tls,
            connect=self._store.access.connect_timeout,
            idle=self._store.access.idle_timeout,
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

        credentials = self._store.credentials()
        if credentials is None:
            return {"Host": self._host, **headers}
        request = AWSRequest(method, self._origin + path, headers=dict(headers))
        _signer()(credentials, "s3", self._store.client.meta.region_name).add_auth(request)
        return {"Host": self._host, **dict(request.headers.items())}

    def get(self, key: str, start: int, sink: Sink, *, version: str | None) -> str:
        stop = start + sink.left
        path = self._base + self._store.path_of(key)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if version:
            headers["If-Match"] = version
        with self._exchange("GET", path, headers, None) as (connection, reply):
            if reply.status not in (200, 206):
                raise self._refused(key, reply)
            found = check_range(self._store, key, reply, start, stop, version)
            connection.receive(sink, version=found)
        return found

    def put(self, key: str, query: Mapping[str, str], body: Body, headers: Mapping[str, str]) -> Reply:
        text = "&".join(f"{percent(k, safe='')}={percent(v, safe='')}" for k, v in sorted(query.items()))
        path = self._base + self._store.path_of(key) + (f"?{text}" if text else "")
        try:
            with self._exchange("PUT", path, {**headers, "Content-Length": str(len(body))}, body) as (
                _,
                reply,
            ):
                if reply.status != 200:
                    raise self._refused(key, reply)
                reply.read(MOST_ERROR_BYTES)
                if "etag" not in reply.headers:
                    raise self._store._page()
                return reply
        except Broken as broken:
            raise Transient(str(broken)) from None

    def _refused(self, key: str, reply: Reply) -> Exception:
        code, message = error_of(reply.read(MOST_ERROR_BYTES))
        return self._store.refusal(key, reply.status, code, message, reply.headers)

    def _exchange(self, method: str, path: str, headers: Mapping[str, str], body: Body | None) -> _Exchange:
        return _Exchange(self, method, path, headers, body)


def _example(store: S3Store) -> str:
    """The URL of the object `k`, made without asking for credentials."""
    from botocore.handlers import disable_signing

    chosen = "choose-signer.s3.GetObject"
    store.client.meta.events.register(chosen, disable_signing)
    try:
        return str(store.client.generate_presigned_url("get_object", {"Bucket": store.bucket, "Key": "k"}))
    finally:
        store.client.meta.events.unregister(chosen, disable_signing)


@cache
def _signer() -> Any:
    from botocore.auth import S3SigV4Auth

    class Unsigned(S3SigV4Auth):  # type: ignore[misc]
        """botocore digests the body on plain HTTP, at three times the cost of sending it."""

        def payload(self, request: Any) -> str:
            return "UNSIGNED-PAYLOAD"

    return Unsigned


class _Exchange:
    """One request and its answer. The connection is kept for the next one only if the answer was read to its end."""

    def __init__(
        self, mover: NativeMover, method: str, path: str, headers: Mapping[str, str], body: Body | None
    ) -> None:
        self._mover, self._method, self._path, self._headers, self._body = mover, method, path, headers, body

    def __enter__(self) -> tuple[Connection, Reply]:
        mover = self._mover
        signed = mover._sign(self._method, self._path, self._headers)
        while True:
            self._connection = connection = mover._connection()
            try:
                return connection, connection.request(self._method, self._path, signed, self._body)
            except Broken as broken:
                connection.close()
                if broken.unanswered and connection.requests > 1:
                    continue  # it had been idle, and the store has closed it: no failure
                raise
            except BaseException:
                connection.close()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection.reusable():
            self._mover._keep(self._connection)
        else:
            self._connection.close()


def check_range(store: S3Store, key: str, reply: Reply, start: int, stop: int, version: str | None) -> str:
    """The version of an answer that is exactly bytes [start, stop) as they are. Raises StoreError for any other.

    A store that ignores the range, compresses, or lets a proxy answer with a page must not be believed.
    """
    at = where(store, key)
    found = reply.headers.get("content-range", "")
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", found)
    length = reply.headers.get("content-length")
    if reply.headers.get("content-encoding", "identity") not in ("identity", "", "aws-chunked"):
        raise StoreError(
            f"{at}: the bytes were sent compressed ({quote(reply.headers['content-encoding'])}); "
            "they are stored so, or something in between does it"
        )
    if given is None and reply.status == 206:  # of a head that broke off
        raise Transient(
            f"bytes {start} to {stop} were asked for, the answer does not say which it has", most=4
        )
    if given is None:
        # an answer with all of the object is right where all of it was asked for
        whole = reply.status == 200 and start == 0 and length == str(stop)
        if not whole:
            kind = quote(reply.headers.get("content-type", "no type"))
            raise Transient(
                f"bytes {start} to {stop} were asked for, the answer is {reply.status} without a range ({kind}): "
                "the store or something in between knows no ranges, or is no store",
                most=3,
            )
    elif (int(given[1]), int(given[2]) + 1) != (start, stop):
        if given[3] != "*" and int(given[3]) < stop:
            raise SourceError(f"{at}: has {given[3]} bytes, bytes up to {stop} were expected")
        raise Transient(f"bytes {start} to {stop} were asked for, the store answered {quote(found)}", most=4)
    if length != str(stop - start):
        raise Transient(f"{stop - start} bytes were asked for, the store announces {quote(length)}", most=4)
    etag = reply.headers.get("etag")
    if version and etag and etag != version:
        raise changed(store, key)
    return etag or version or ""


def error_of(body: bytes) -> tuple[str, str]:
    """Code and message of an error as S3 writes it; empty where it is none. Nothing else of it is looked at."""
    text = body.decode("utf-8", "replace")
    found = [re.search(rf"<{tag}>([^<]{{0,500}})</{tag}>", text) for tag in ("Code", "Message")]
    return (found[0][1] if found[0] else ""), (found[1][1] if found[1] else "")


def _tls(store: S3Store) -> ssl.SSLContext:
    bundle = store.session.get_config_variable("ca_bundle")
    try:
        return ssl.create_default_context(cafile=bundle or None)
    except OSError as error:
        raise InputError(f"the CA bundle {quote(bundle)} cannot be read: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------------ uploads


class S3Upload:
    """A PUT where there is one part, a multipart upload where there are several."""

    def __init__(self, store: S3Store, key: str, parts: Sequence[tuple[int, int]]) -> None:
        self._store, self._key, self._parts = store, key, tuple(parts)
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
        return self._store.prefix + self._key

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
        uploads = [each for each in self._store.unfinished(self._key) if each["Key"] == self._full_key]
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
        return self._store.call(self._key, name, Key=self._full_key, **params)

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
        except _GoneUpload:
            if self._complete_already() is None:
                raise
            return False
        etag = reply.headers.get("etag", "")
        echoed = reply.headers.get("x-amz-checksum-crc32")
        checked = echoed is not None and chunk.crc32 is not None
        if checked and chunk.crc32 is not None and echoed != _base64(chunk.crc32):
            raise StoreError(
                f"{where(self._store, self._key)}: the store received other bytes than were sent"
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
            return self._store.mover.put(self._key, query, chunk.body, headers)

        try:
            reply = self._store.persist(self._key, once)
        except (DeniedError, MissingError, ConflictError):
            raise
        except StoreError as error:
            if not headers or not _may_lack_checksums(error):
                raise
            self._checksums = False
            headers = {}
            reply = self._store.persist(self._key, once)
        return reply

    def _complete_already(self) -> Stat | None:
        """The object, where somebody else (or a try whose answer was lost) has completed it."""
        found = self._store.head(self._key)
        return found if found is not None and found.size == self._parts[-1][1] else None

    def finish(self) -> Stat:
        if self._single is not None:
            return self._single
        assert self._id is not None
        try:
            self._store.persist(self._key, self._complete)
        except _GoneUpload:
            found = self._complete_already()
            if found is None:
                raise
            return found
        found = self._complete_already()
        if found is None:
            raise StoreError(
                f"{where(self._store, self._key)}: the store took all parts, but the object has another size"
            )
        return found

    def _complete(self, _: Patience) -> None:
        store, name = self._store, {"Key": self._full_key, "UploadId": self._id}
        parts = [self._done[number] for number in sorted(self._done)]
        try:
            store.call_once(self._key, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **name)
        except Transient:
            # radosgw says 500 for ever of an upload that is gone: completed (the answer was lost) or aborted
            try:
                store.call_once(self._key, "list_parts", **name)
            except MissingError:
                raise _GoneUpload(
                    f"{where(store, self._key)}: NoSuchUpload: the upload was aborted",
                    missing="upload",
                ) from None
            raise

    def leave(self) -> None:
        """Nothing to do: what was sent stays until it is taken up again, or dropped by `abort_uploads`."""


def _may_lack_checksums(error: StoreError) -> bool:
    """Whether a store may only not know checksums; never one that found another.

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
    """As ETags of parts are: no security hangs on it, a part that differs fails its blocks' digests."""
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(body, FileRange):
        for data in body.chunks():
            digest.update(data)
    else:
        digest.update(body)
    return digest.hexdigest()
