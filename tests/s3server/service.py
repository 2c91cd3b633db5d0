"""Which operation a request asks for. What S3 has and this server has not is refused with 501, never ignored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from .board import Settings
from .buckets import Buckets
from .folder import Folder
from .messages import Refusal, Request, Response
from .objects import Objects
from .uploads import Uploads

UNSUPPORTED: Final = re.compile(
    r"x-amz-(copy-source|server-side-encryption|object-lock|tagging|acl|grant|website|write-offset|expected-bucket-owner)"
    r"|if-modified-since|if-unmodified-since|if-range"
)


class Service:
    """Finds the operation that a request asks for, and refuses what this server does not have."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        folder = Folder(settings.root)
        buckets, objects = Buckets(settings, folder), Objects(settings, folder)
        uploads = Uploads(settings, folder)
        self.replace_object = objects.replace_object
        # (method, on what, parameters it must have, parameters it may have, name, function)
        listing = {"prefix", "delimiter", "max-keys", "start-after", "encoding-type", "fetch-owner"}
        listing |= {"continuation-token"}
        paging = {"prefix", "max-uploads", "key-marker", "upload-id-marker", "encoding-type"}
        parts = {"max-parts", "part-number-marker"}
        self.routes: list[tuple[str, str, set[str], set[str], str, Callable[[Request], Response]]] = [
            ("GET", "service", set(), {"max-buckets", "prefix"}, "ListBuckets", buckets.list_buckets),
            ("HEAD", "bucket", set(), set(), "HeadBucket", buckets.head_bucket),
            ("PUT", "bucket", set(), set(), "CreateBucket", buckets.create_bucket),
            ("DELETE", "bucket", set(), set(), "DeleteBucket", buckets.delete_bucket),
            ("GET", "bucket", {"location"}, set(), "GetBucketLocation", buckets.location),
            ("GET", "bucket", {"list-type"}, listing, "ListObjectsV2", buckets.list_objects),
            ("GET", "bucket", {"uploads"}, paging, "ListMultipartUploads", uploads.list_uploads),
            ("POST", "bucket", {"delete"}, set(), "DeleteObjects", buckets.delete_objects),
            ("GET", "object", {"uploadId"}, parts, "ListParts", uploads.list_parts),
            ("GET", "object", set(), set(), "GetObject", objects.get_object),
            ("HEAD", "object", set(), set(), "HeadObject", objects.get_object),
            ("PUT", "object", {"partNumber", "uploadId"}, set(), "UploadPart", uploads.upload_part),
            ("PUT", "object", set(), set(), "PutObject", objects.put_object),
            ("POST", "object", {"uploads"}, set(), "CreateMultipartUpload", uploads.create_upload),
            ("POST", "object", {"uploadId"}, set(), "CompleteMultipartUpload", uploads.complete_upload),
            ("DELETE", "object", {"uploadId"}, set(), "AbortMultipartUpload", uploads.abort_upload),
            ("DELETE", "object", set(), set(), "DeleteObject", objects.delete_object),
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
