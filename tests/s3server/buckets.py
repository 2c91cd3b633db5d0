"""Buckets, and the listing of what is in them."""

from __future__ import annotations

import base64
import binascii
import os
import re
import shutil
from collections.abc import Callable
from urllib.parse import quote
from xml.sax.saxutils import escape

from .board import Settings
from .bodies import read_xml, receive
from .folder import Folder
from .messages import Refusal, Request, Response, count, document, element, leaf, timestamp


class Buckets:
    """The operations on buckets, each from a request to a response."""

    def __init__(self, settings: Settings, folder: Folder) -> None:
        self.settings, self.folder = settings, folder

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

    def list_objects(self, request: Request) -> Response:
        params = request.params
        prefix, delimiter, most = (
            params.get("prefix", ""),
            params.get("delimiter", ""),
            count(request, "max-keys"),
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
        tree = read_xml(request, checksums=self.settings.checksums)
        named = [each.findtext("Key") for each in tree.findall("Object")]
        if not 0 < len(named) <= 1000 or not all(named):
            raise Refusal(400, "MalformedXML", "1 to 1000 objects, each with its key")
        if tree.find("Object/VersionId") is not None or tree.find("Object/ETag") is not None:
            raise Refusal(501, "NotImplemented", "versions and conditions in a multi-object delete")
        for key in named:
            self.folder.remove(request.bucket, str(key))
        deleted = [element("Deleted", leaf("Key", key)) for key in named]
        return document("DeleteResult", *([] if tree.findtext("Quiet") == "true" else deleted))
