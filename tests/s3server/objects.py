"""Objects: put whole, got in ranges and under conditions, deleted."""

from __future__ import annotations

import email.utils
import hashlib
import os
import re

from .board import Settings
from .bodies import SCRATCH, receive
from .folder import Folder, Meta, file_name, new_meta, precondition, shown_checksums
from .messages import Refusal, Request, Response


class Objects:
    """The operations on objects, each from a request to a response."""

    def __init__(self, settings: Settings, folder: Folder) -> None:
        self.settings, self.folder = settings, folder

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
            described |= shown_checksums(meta)
        return Response(
            206 if asked else 200, described, [(start, stop)], fd, size, bare=request.method == "HEAD"
        )

    def put_object(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        file_name(request.key)
        precondition(request.headers, self.folder.etag(request.bucket, request.key))  # before the body comes
        path = self.folder.scratch()
        try:
            with open(path, "xb", buffering=0) as file:
                received = receive(request, file.write, checksums=self.settings.checksums)
            meta = new_meta(request)
            meta.etag, meta.checksums = received.md5.hex(), received.checksums
            with self.folder.locked():
                self.folder.install(request.bucket, request.key, path, meta, request.headers)
        finally:
            path.unlink(missing_ok=True)
        return Response(200, {"ETag": f'"{meta.etag}"', **shown_checksums(meta)})

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
