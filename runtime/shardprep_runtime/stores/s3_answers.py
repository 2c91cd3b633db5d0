"""Decide what an answer of S3 means: the bytes that were asked for, a failure that may pass, or a refusal.

No request is made here. The API is that of the Amazon S3 API Reference; what other stores lack of it is said where it
is used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final, TypedDict

from ..errors import ConflictError, DeniedError, Missing, MissingError, SourceError, StoreError, quote
from .connection import Reply
from .retry import Transient
from .store import Named, changed, where

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

ANSWERED: Final = {
    "head_object": {"ETag"},
    "put_object": {"ETag"},
    "upload_part": {"ETag"},
    "create_multipart_upload": {"UploadId"},
    "list_objects_v2": {"Name", "IsTruncated"},
    "list_multipart_uploads": {"Bucket", "IsTruncated"},
    "list_parts": {"UploadId", "IsTruncated"},
}
"""What S3 answers to each operation: at least one of these. A page with status 200 has none of them."""

MOST_ERROR_BYTES: Final = 64 * 2**10
"""Bytes that are read of the body of an error."""


class Expired(Exception):  # noqa: N818 - turned into a DeniedError unless new credentials are found
    """Credentials that have expired."""

    def __init__(self, message: str, *, status: int | None, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class GoneUpload(MissingError):  # noqa: N818 - a MissingError that is handled in here
    """A multipart upload that has been completed or aborted."""


class Facts(TypedDict):
    """What a store answered, for the error that it becomes."""

    status: int | None
    code: str | None


def refusal(
    at: str, status: int, code: str, message: str, headers: Mapping[str, str], *, host: str, region: str
) -> Exception:
    """What an answer that does not say success means; no secret stands in it.

    Args:
        at: The object, as messages name it.
        status: HTTP status of the answer; 0 where it has none.
        code: The store's name of the error; empty where it gives none.
        message: What the store says of it.
        headers: Headers of the answer, by lower-case name.
        host: Where the request went.
        region: The region that the request was signed for.

    Returns:
        A Transient, an Expired or a StoreError, to be raised.
    """
    facts: Facts = {"status": status or None, "code": code or None}
    said = f"{status} {quote(code)}" + (f": {quote(message)}" if message else "")
    if "html" in headers.get("content-type", ""):
        said += f", with a page; is {quote(host)} an endpoint of S3?"
    if status == 416:
        return SourceError(f"{at}: ends before the bytes that were asked for")
    if status == 412:
        return ConflictError(f"{at}: the store's version is another one than expected", **facts)
    if code in EXPIRED:
        return Expired(said, **facts)
    if status in TRANSIENT_STATUS or code in TRANSIENT_CODES:
        return Transient(f"the store answered {said}", most=4 if code == "BadDigest" else None, **facts)
    if code == "RequestTimeTooSkewed":
        return DeniedError(
            f"{at}: the clock of this machine is {_skew(headers)} the store's, which refuses that; set it",
            **facts,
        )
    if code in WRONG_REGION or status in (301, 302, 307, 308):
        expected = re.search(r"expecting '([a-z0-9-]{1,40})'", message)
        right = headers.get("x-amz-bucket-region") or (expected and expected[1])
        hint = f"the bucket is in {quote(right)}" if right else "another region or endpoint is asked for"
        return DeniedError(
            f"{at}: {hint}, the request went to {quote(host)} for {quote(region)}; "
            "set AWS_REGION or --region (and --endpoint-url)",
            **facts,
        )
    if status == 404 or code in MISSING:
        if code == "NoSuchUpload":
            return GoneUpload(f"{at}: {said}", missing="upload", **facts)
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


def not_s3(host: str) -> Transient:
    """What an answer means that a store of S3 does not give: it is a proxy's page, most often."""
    return Transient(f"the answer is not S3's; is {quote(host)} an endpoint of S3, or a page?", most=3)


def _skew(headers: Mapping[str, str]) -> str:
    try:
        seconds = time.time() - parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        return "not"
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"


def check_range(named: Named, key: str, reply: Reply, start: int, stop: int, version: str | None) -> str:
    """Have an answer be exactly bytes [start, stop) of the object, as they are.

    A store that ignores the range, compresses, or lets a proxy answer with a page must not be believed.

    Args:
        named: The store or its client, for messages.
        key: Key of the object, without the store's prefix.
        reply: Head of the answer.
        start: First byte that was asked for.
        stop: Where the bytes end (exclusive).
        version: Version that the object must have; None: any.

    Returns:
        The version that the bytes are of.

    Raises:
        StoreError: For another answer, and SourceError where the object is another one.
        Transient: For an answer that may be right the next time.
    """
    at = where(named, key)
    found = reply.headers.get("content-range", "")
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", found)
    length = reply.headers.get("content-length")
    if reply.headers.get("content-encoding", "identity") not in ("identity", "", "aws-chunked"):
        raise StoreError(
            f"{at}: the bytes were sent compressed ({quote(reply.headers['content-encoding'])}); "
            "they are stored so, or something in between does it"
        )
    if given is None and reply.status == 206:  # a head that broke off
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
                "the store or something in between knows no ranges, or is not a store",
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
        raise changed(named, key)
    return etag or version or ""


def error_of(body: bytes) -> tuple[str, str]:
    """Code and message of an error as S3 writes it; both are empty for other text, at which nothing else is looked."""
    text = body.decode("utf-8", "replace")
    found = [re.search(rf"<{tag}>([^<]{{0,500}})</{tag}>", text) for tag in ("Code", "Message")]
    return (found[0][1] if found[0] else ""), (found[1][1] if found[1] else "")
