"""Refuse a request that is not signed by Signature Version 4, in its headers or in its URL."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, unquote

from .board import Board, Settings
from .messages import Refusal, Request, timestamp

SKEW: Final = 15 * 60
"""Seconds by which a client's clock may be wrong."""


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
