"""Multipart uploads: begun, sent in parts, listed, completed or aborted."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from .board import Settings
from .bodies import SCRATCH, b64, new_checksum, read_xml, receive
from .folder import Folder, Meta, file_name, new_meta
from .messages import Refusal, Request, Response, count, document, element, leaf, timestamp


class Uploads:
    """The operations on uploads, each from a request to a response."""

    def __init__(self, settings: Settings, folder: Folder) -> None:
        self.settings, self.folder = settings, folder

    def create_upload(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        file_name(request.key)
        receive(request, lambda data: None, checksums=False)
        algorithm = (
            request.headers.get("x-amz-checksum-algorithm", "").lower() if self.settings.checksums else ""
        )
        kind = request.headers.get("x-amz-checksum-type", "COMPOSITE").upper()
        if algorithm:
            new_checksum(algorithm)
            if kind != "COMPOSITE" and (kind != "FULL_OBJECT" or algorithm.startswith("sha")):
                message = f"The {kind} checksum type cannot be used with the {algorithm} checksum algorithm."
                raise Refusal(400, "InvalidRequest", message)
        meta, upload_id = new_meta(request), uuid.uuid4().hex
        begun = {
            "bucket": request.bucket,
            "key": request.key,
            "initiated": time.time(),
            "algorithm": algorithm,
            "kind": kind,
            "content_type": meta.content_type,
            "user": meta.user,
        }
        path = self.folder.scratch()
        path.mkdir()
        (path / "upload.json").write_text(json.dumps(begun))
        path.rename(self.folder.root / ".uploads" / upload_id)
        response = document(
            "InitiateMultipartUploadResult",
            leaf("Bucket", request.bucket),
            leaf("Key", request.key),
            leaf("UploadId", upload_id),
        )
        if algorithm:
            response.headers |= {"x-amz-checksum-algorithm": algorithm.upper(), "x-amz-checksum-type": kind}
        return response

    def upload_part(self, request: Request) -> Response:
        upload_id = request.params["uploadId"]
        folder, begun = self.folder.upload(request.bucket, request.key, upload_id)
        number = request.params["partNumber"]
        if not re.fullmatch(r"\d{1,5}", number) or not 1 <= int(number) <= 10000:
            raise Refusal(
                400, "InvalidArgument", "Part number must be an integer between 1 and 10000, inclusive"
            )
        path = self.folder.scratch()
        try:
            with open(path, "xb", buffering=0) as file:
                received = receive(
                    request, file.write, checksums=self.settings.checksums, also=begun["algorithm"]
                )
            if set(received.checksums) - {begun["algorithm"]}:
                wanted, given = begun["algorithm"] or "null", ", ".join(received.checksums)
                message = (
                    f"Checksum Type mismatch occurred, expected checksum Type: {wanted}, actual: {given}"
                )
                raise Refusal(400, "InvalidRequest", message)
            etag = received.md5.hex()
            part = {
                "etag": etag,
                "size": received.size,
                "modified": time.time(),
                "checksums": received.checksums,
            }
            with self.folder.locked():
                self.folder.upload(request.bucket, request.key, upload_id)
                path.replace(folder / f"{int(number):05}")
                path.write_text(json.dumps(part))
                path.replace(folder / f"{int(number):05}.json")
        finally:
            path.unlink(missing_ok=True)
        shown = {f"x-amz-checksum-{name}": value for name, value in received.checksums.items()}
        return Response(200, {"ETag": f'"{etag}"', **shown})

    def list_parts(self, request: Request) -> Response:
        with self.folder.locked(fcntl.LOCK_SH):
            folder, begun = self.folder.upload(request.bucket, request.key, request.params["uploadId"])
            parts = self.folder.parts(folder)
        marker, most = int(request.params.get("part-number-marker") or 0), count(request, "max-parts")
        left = [number for number in sorted(parts) if number > marker]
        algorithm = begun["algorithm"].upper()
        return document(
            "ListPartsResult",
            leaf("Bucket", request.bucket),
            leaf("Key", request.key),
            leaf("UploadId", request.params["uploadId"]),
            leaf("PartNumberMarker", marker),
            leaf("NextPartNumberMarker", [marker, *left[:most]][-1]),
            leaf("MaxParts", most),
            leaf("IsTruncated", str(len(left) > most).lower()),
            leaf("ChecksumAlgorithm", algorithm) + leaf("ChecksumType", begun["kind"]) if algorithm else "",
            *(
                element(
                    "Part",
                    leaf("PartNumber", number),
                    leaf("LastModified", timestamp(parts[number]["modified"])),
                    leaf("ETag", f'"{parts[number]["etag"]}"'),
                    leaf("Size", parts[number]["size"]),
                    *(
                        leaf(f"Checksum{name.upper()}", value)
                        for name, value in parts[number]["checksums"].items()
                    ),
                )
                for number in left[:most]
            ),
        )

    def list_uploads(self, request: Request) -> Response:
        self.folder.bucket(request.bucket)
        params, most, found = request.params, count(request, "max-uploads"), []
        shown: Callable[[str], str] = quote if params.get("encoding-type") == "url" else str
        for path in (self.folder.root / ".uploads").iterdir():
            with contextlib.suppress(FileNotFoundError):
                begun = json.loads((path / "upload.json").read_bytes())
                if begun["bucket"] == request.bucket and begun["key"].startswith(params.get("prefix", "")):
                    found.append((begun["key"], path.name, begun))
        marker = params.get("key-marker", ""), params.get("upload-id-marker", "")
        left = sorted(
            each
            for each in found
            if each[:2] > marker and (marker[1] or each[0] > marker[0] or not marker[0])
        )
        page = left[:most]
        following = ""
        if len(left) > most and page:
            following = leaf("NextKeyMarker", shown(page[-1][0])) + leaf("NextUploadIdMarker", page[-1][1])
        return document(
            "ListMultipartUploadsResult",
            leaf("Bucket", request.bucket),
            leaf("EncodingType", "url") if shown is quote else "",
            leaf("KeyMarker", shown(marker[0])),
            leaf("UploadIdMarker", marker[1]),
            following,
            leaf("Prefix", shown(params.get("prefix", ""))),
            leaf("MaxUploads", most),
            leaf("IsTruncated", str(len(left) > most).lower()),
            *(
                element(
                    "Upload",
                    leaf("Key", shown(key)),
                    leaf("UploadId", upload_id),
                    leaf("StorageClass", "STANDARD"),
                    leaf("Initiated", timestamp(begun["initiated"])),
                )
                for key, upload_id, begun in page
            ),
        )

    def abort_upload(self, request: Request) -> Response:
        with self.folder.locked():
            folder, _ = self.folder.upload(request.bucket, request.key, request.params["uploadId"])
            shutil.rmtree(folder)
        return Response(204)

    def chosen_parts(
        self, request: Request, begun: dict[str, Any], parts: dict[int, dict[str, Any]]
    ) -> list[int]:
        """The numbers that a completing request names, once each is the part that was sent."""
        # a checksum among the headers is the object's, not the body's
        tree, algorithm = read_xml(request, checksums=False), begun["algorithm"]
        numbers: list[int] = []
        for each in tree.findall("Part"):
            number, etag = each.findtext("PartNumber", ""), each.findtext("ETag", "").strip('"')
            part = parts.get(int(number) if number.isdecimal() else -1)
            given = each.findtext(f"Checksum{algorithm.upper()}") if algorithm else None
            if algorithm and begun["kind"] == "COMPOSITE" and given is None:
                message = f"The upload was created using a {algorithm} checksum. The complete request must include it for each part."
                raise Refusal(400, "InvalidRequest", message)
            if part is None or part["etag"] != etag or (given and given != part["checksums"][algorithm]):
                message = (
                    "One or more of the specified parts could not be found, or has another ETag or checksum."
                )
                raise Refusal(400, "InvalidPart", message, PartNumber=number, ETag=etag)
            if numbers and int(number) <= numbers[-1]:
                raise Refusal(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
            numbers.append(int(number))
        if not numbers:
            raise Refusal(400, "MalformedXML", "a completing request names at least one part")
        for early in numbers[:-1]:
            if parts[early]["size"] < self.settings.min_part_size:
                message = "Your proposed upload is smaller than the minimum allowed size"
                more = {"PartNumber": str(early), "MinSizeAllowed": str(self.settings.min_part_size)}
                raise Refusal(400, "EntityTooSmall", message, **more)
        return numbers

    def complete_upload(self, request: Request) -> Response:
        upload_id = request.params["uploadId"]
        with self.folder.locked(fcntl.LOCK_SH):
            folder, begun = self.folder.upload(request.bucket, request.key, upload_id)
            parts = self.folder.parts(folder)
        numbers = self.chosen_parts(request, begun, parts)
        algorithm, full = begun["algorithm"], begun["algorithm"] and begun["kind"] == "FULL_OBJECT"
        digest: Any = new_checksum(algorithm) if algorithm else None
        joined = hashlib.md5(b"".join(bytes.fromhex(parts[number]["etag"]) for number in numbers)).hexdigest()
        path = self.folder.scratch()
        try:
            with open(path, "x+b", buffering=0) as target:
                for number in numbers:
                    with open(folder / f"{number:05}", "rb", buffering=0) as source:
                        while os.sendfile(target.fileno(), source.fileno(), None, 2**30):
                            pass
                    if digest and not full:
                        digest.update(base64.b64decode(parts[number]["checksums"][algorithm]))
                target.seek(0)
                while full and (data := target.read(SCRATCH)):
                    digest.update(data)
                size = target.seek(0, os.SEEK_END)
            meta = Meta(f"{joined}-{len(numbers)}", 0, 0.0, begun["content_type"], begun["user"])
            if digest:
                meta.checksum_type = begun["kind"]
                meta.checksums = {algorithm: b64(digest.digest()) + ("" if full else f"-{len(numbers)}")}
                given = request.headers.get(f"x-amz-checksum-{algorithm}", meta.checksums[algorithm])
                if given.partition("-")[0] != meta.checksums[algorithm].partition("-")[0]:
                    raise Refusal(
                        400,
                        "BadDigest",
                        f"The {algorithm} you specified did not match the calculated checksum.",
                    )
            if request.headers.get("x-amz-mp-object-size", str(size)) != str(size):
                raise Refusal(400, "InvalidRequest", f"x-amz-mp-object-size, and the parts have {size} bytes")
            with self.folder.locked():
                self.folder.upload(request.bucket, request.key, upload_id)
                self.folder.install(request.bucket, request.key, path, meta, request.headers)
                shutil.rmtree(folder)
        except FileNotFoundError:  # completed or aborted by another request meanwhile
            raise Refusal(
                404, "NoSuchUpload", "The upload was completed or aborted", UploadId=upload_id
            ) from None
        finally:
            path.unlink(missing_ok=True)
        shown = [leaf(f"Checksum{name.upper()}", value) for name, value in meta.checksums.items()]
        return document(
            "CompleteMultipartUploadResult",
            leaf("Location", f"/{request.bucket}/{quote(request.key)}"),
            leaf("Bucket", request.bucket),
            leaf("Key", request.key),
            leaf("ETag", f'"{meta.etag}"'),
            *shown,
            leaf("ChecksumType", meta.checksum_type) if shown else "",
        )
