"""What a fault that was asked for does to a response: another status, or a body that is wrong in a certain way."""

from __future__ import annotations

import gzip
import os
import re
from typing import Any, Final

from .messages import Piece, Refusal, Response

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
"""Status -> the error of S3 that a fault of that status is, unless it names another."""


def refusal_of(fault: dict[str, Any]) -> Refusal:
    """The error that a fault of mode `status` is answered with."""
    code = fault.get("code", 503)
    name = fault.get("name", NAMES.get(code, "InternalError"))
    refusal = Refusal(code, name, "this is a fault that was asked for")
    if code == 301:
        refusal.headers["x-amz-bucket-region"] = fault.get("region", "eu-west-1")
        refusal.more["Endpoint"] = f"s3.{fault.get('region', 'eu-west-1')}.amazonaws.com"
    if "location" in fault:
        refusal.headers["Location"] = fault["location"]
    return refusal


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
