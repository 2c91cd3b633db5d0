"""The embedded S3 server does what S3 does, as boto3 sees it, and each of its faults is what a client would meet."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from s3server import S3Server

BODY = bytes(range(256)) * 400
"""Every byte differs from its neighbours."""


@functools.cache
def session() -> Any:
    """One for all, since it reads what botocore knows of S3 only once."""
    return boto3.session.Session()


def client(server: S3Server, **options: Any) -> Any:
    """boto3's client of a server, which tries each request once."""
    settings = Config(
        retries={"total_max_attempts": 1}, signature_version="s3v4", **options.pop("config", {})
    )
    given = {
        "endpoint_url": server.endpoint,
        "region_name": server.region,
        "aws_access_key_id": server.access_key,
        "aws_secret_access_key": server.secret_key,
        "aws_session_token": server.session_token,
        "verify": str(server.certificate) if server.certificate else None,
        "config": settings,
    }
    return session().client("s3", **{**given, **options})


def refused(call: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    """Status and code of the error that a call ends with."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    found = caught.value.response
    return found["ResponseMetadata"]["HTTPStatusCode"], found["Error"]["Code"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3"), min_part_size=1000) as server:
        yield server


@pytest.fixture
def server(running: S3Server) -> Iterator[S3Server]:
    """The same server for all, with an empty bucket and no faults."""
    running.make_bucket("bucket")
    for folder in (running.root / "bucket", running.root / ".uploads"):
        shutil.rmtree(folder)
        folder.mkdir()
    running.reset_stats()
    yield running
    running.clear()


@pytest.fixture(scope="module")
def usual(running: S3Server) -> Iterator[Any]:
    found = client(running)
    yield found
    found.close()


@pytest.fixture
def s3(server: S3Server, usual: Any) -> Any:
    return usual


class Raw:
    """One connection of http.client, with signed requests and nothing done for the caller."""

    def __init__(self, server: S3Server, timeout: float = 5.0) -> None:
        self.server = server
        self.connection = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=timeout)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def signed(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        *,
        at: float = 0.0,
        region: str = "",
    ) -> dict[str, str]:
        """Headers with a signature over the payload hash that they name, or that of the body."""
        given = {"x-amz-content-sha256": hashlib.sha256(body).hexdigest(), **headers}
        request = AWSRequest(method, self.server.endpoint + path, headers=given)
        signer = S3SigV4Auth(
            Credentials(self.server.access_key, self.server.secret_key), "s3", region or self.server.region
        )
        signer.payload = lambda request: given["x-amz-content-sha256"]
        request.context["payload_signing_enabled"] = True
        if at:
            shifted = datetime.now(UTC) + timedelta(seconds=at)
            import botocore.auth

            original = botocore.auth.get_current_datetime
            botocore.auth.get_current_datetime = lambda *_: shifted.replace(tzinfo=None)
            try:
                signer.add_auth(request)
            finally:
                botocore.auth.get_current_datetime = original
        else:
            signer.add_auth(request)
        return dict(request.headers.items())

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **how: Any
    ) -> http.client.HTTPResponse:
        self.connection.request(
            method, path, body or None, self.signed(method, path, body, headers or {}, **how)
        )
        return self.connection.getresponse()

    def get(self, start: int = 0, stop: int = len(BODY), key: str = "key") -> http.client.HTTPResponse:
        return self.ask("GET", f"/bucket/{key}", headers={"Range": f"bytes={start}-{stop - 1}"})


@pytest.fixture
def raw(server: S3Server, s3: Any) -> Iterator[Raw]:
    """A connection to a server that has BODY under bucket/key and no requests counted."""
    s3.put_object(Bucket="bucket", Key="key", Body=BODY)
    server.reset_stats()
    with Raw(server) as found:
        yield found


def code_of(response: http.client.HTTPResponse) -> tuple[int, str]:
    text = response.read().decode()
    return response.status, text.partition("<Code>")[2].partition("</Code>")[0]


# Objects and buckets


def test_an_object_comes_back_with_its_headers(s3: Any, server: S3Server) -> None:
    key = "a folder/ü+=&%20.bin"
    put = s3.put_object(Bucket="bucket", Key=key, Body=BODY, ContentType="text/x", Metadata={"who": "me"})
    assert put["ETag"] == f'"{hashlib.md5(BODY).hexdigest()}"'
    found = s3.get_object(Bucket="bucket", Key=key)
    assert found["Body"].read() == BODY
    assert (found["ContentType"], found["Metadata"], found["ETag"]) == ("text/x", {"who": "me"}, put["ETag"])
    head = s3.head_object(Bucket="bucket", Key=key)
    assert head["ContentLength"] == len(BODY)
    assert abs(head["LastModified"].timestamp() - time.time()) < 5
    assert server.objects("bucket")[key].read_bytes() == BODY


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("100-299", 100, 300),
        ("102000-", 102000, 102400),
        ("-5", 102395, 102400),
        ("0-999999", 0, 102400),
    ],
)
def test_a_range_is_exactly_that(s3: Any, raw: Raw, asked: str, start: int, stop: int) -> None:
    found = s3.get_object(Bucket="bucket", Key="key", Range=f"bytes={asked}")
    assert found["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert found["ContentRange"] == f"bytes {start}-{stop - 1}/{len(BODY)}"
    assert found["Body"].read() == BODY[start:stop]


def test_a_range_behind_the_end_is_416(raw: Raw) -> None:
    response = raw.get(len(BODY), len(BODY) + 1)
    assert response.getheader("Content-Range") == f"bytes */{len(BODY)}"
    assert code_of(response) == (416, "InvalidRange")


def test_reads_are_conditional(s3: Any, raw: Raw) -> None:
    etag = s3.head_object(Bucket="bucket", Key="key")["ETag"]
    assert s3.get_object(Bucket="bucket", Key="key", IfMatch=etag)["Body"].read() == BODY
    assert refused(s3.get_object, Bucket="bucket", Key="key", IfMatch='"0"') == (412, "PreconditionFailed")
    assert refused(s3.get_object, Bucket="bucket", Key="key", IfNoneMatch=etag)[0] == 304


def test_what_is_not_there_is_404(s3: Any, server: S3Server) -> None:
    assert refused(s3.get_object, Bucket="bucket", Key="none") == (404, "NoSuchKey")
    assert refused(s3.get_object, Bucket="no-bucket", Key="none") == (404, "NoSuchBucket")
    assert refused(s3.head_object, Bucket="bucket", Key="none") == (404, "404")
    assert refused(s3.put_object, Bucket="no-bucket", Key="none", Body=BODY) == (404, "NoSuchBucket")


def test_writes_are_conditional(s3: Any, server: S3Server) -> None:
    assert refused(s3.put_object, Bucket="bucket", Key="k", Body=b"", IfMatch='"0"') == (404, "NoSuchKey")
    etag = s3.put_object(Bucket="bucket", Key="k", Body=b"1", IfNoneMatch="*")["ETag"]
    assert refused(s3.put_object, Bucket="bucket", Key="k", Body=b"2", IfNoneMatch="*")[0] == 412
    assert refused(s3.put_object, Bucket="bucket", Key="k", Body=b"2", IfMatch='"0"')[0] == 412
    assert server.objects("bucket")["k"].read_bytes() == b"1"
    s3.put_object(Bucket="bucket", Key="k", Body=b"2", IfMatch=etag)
    assert server.objects("bucket")["k"].read_bytes() == b"2"


@pytest.mark.parametrize("workers", [1, 3])
def test_of_many_that_put_if_absent_one_wins(tmp_path: Path, workers: int) -> None:
    with S3Server(tmp_path, workers=workers) as server:
        server.make_bucket("bucket")
        won = []

        def put(number: int) -> None:
            with Raw(server) as raw:
                body = b"%d" % number * 20000
                if raw.ask("PUT", "/bucket/one", body, {"If-None-Match": "*"}).status == 200:
                    won.append(body)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(won) == 1
        assert server.objects("bucket")["one"].read_bytes() == won[0]
        assert server.stats()["operations"]["PutObject"]["requests"] == 8


def test_a_listing_has_pages_prefixes_and_groups(s3: Any, server: S3Server) -> None:
    for number in range(1205):
        (server.root / "bucket" / f"blobs%2F{number:05}").write_bytes(b"x")
    for key in ("a&<b>", "blobs.txt", "z/1/2", "z/1/3", "z/4"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"12")
    pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket="bucket"))
    assert [page["KeyCount"] for page in pages] == [1000, 210]
    keys = [each["Key"] for page in pages for each in page["Contents"]]
    assert keys == sorted([*server.objects("bucket")])
    assert pages[0]["Contents"][0]["ETag"] == f'"{hashlib.md5(b"12").hexdigest()}"'
    few = list(
        s3.get_paginator("list_objects_v2").paginate(
            Bucket="bucket", Delimiter="/", PaginationConfig={"PageSize": 1}
        )
    )
    assert [[each["Key"] for each in page.get("Contents", [])] for page in few] == [
        ["a&<b>"],
        ["blobs.txt"],
        [],
        [],
    ]
    groups = [each["Prefix"] for page in few for each in page.get("CommonPrefixes", [])]
    assert groups == ["blobs/", "z/"]
    found = s3.list_objects_v2(Bucket="bucket", Prefix="z/", Delimiter="/", StartAfter="z/1/9")
    assert [each["Key"] for each in found["Contents"]] == ["z/4"]
    assert refused(s3.list_objects_v2, Bucket="none-such") == (404, "NoSuchBucket")


def test_objects_are_deleted_one_by_one_and_many_at_once(s3: Any, server: S3Server) -> None:
    for key in "abcd":
        s3.put_object(Bucket="bucket", Key=key, Body=b"1")
    s3.delete_object(Bucket="bucket", Key="a")
    s3.delete_object(Bucket="bucket", Key="never was")
    found = s3.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "b"}, {"Key": "none"}]})
    assert [each["Key"] for each in found["Deleted"]] == ["b", "none"]
    assert "Deleted" not in s3.delete_objects(
        Bucket="bucket", Delete={"Objects": [{"Key": "c"}], "Quiet": True}
    )
    assert [*server.objects("bucket")] == ["d"]


def test_buckets_come_and_go(s3: Any, server: S3Server) -> None:
    s3.create_bucket(Bucket="another")
    assert refused(s3.create_bucket, Bucket="another") == (409, "BucketAlreadyOwnedByYou")
    assert {"another", "bucket"} <= {each["Name"] for each in s3.list_buckets()["Buckets"]}
    s3.head_bucket(Bucket="another")
    assert s3.get_bucket_location(Bucket="another")["LocationConstraint"] is None
    s3.put_object(Bucket="another", Key="k", Body=b"")
    assert refused(s3.delete_bucket, Bucket="another") == (409, "BucketNotEmpty")
    s3.delete_object(Bucket="another", Key="k")
    s3.delete_bucket(Bucket="another")
    assert refused(s3.head_bucket, Bucket="another") == (404, "404")


def test_what_is_not_known_is_501(s3: Any, raw: Raw) -> None:
    assert refused(s3.get_object_tagging, Bucket="bucket", Key="key") == (501, "NotImplemented")
    assert refused(s3.list_objects, Bucket="bucket") == (501, "NotImplemented")
    copy = {"Bucket": "bucket", "Key": "key"}
    assert refused(s3.copy_object, Bucket="bucket", Key="copy", CopySource=copy) == (501, "NotImplemented")


def test_a_bucket_may_be_in_the_name_of_the_host(raw: Raw) -> None:
    host = f"bucket.localhost:{raw.connection.port}"
    headers = {"host": host, "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    raw.server, server = S3Server(raw.server.root), raw.server
    raw.server.endpoint, raw.server.region = f"http://{host}", server.region
    assert raw.ask("GET", "/key", headers=headers).read() == BODY


def test_a_reader_keeps_the_object_that_it_began(s3: Any, raw: Raw) -> None:
    large = os.urandom(30_000_000)
    s3.put_object(Bucket="bucket", Key="large", Body=large)
    response = raw.get(0, len(large), "large")
    begun = response.read(1000)
    s3.put_object(Bucket="bucket", Key="large", Body=b"other")
    assert begun + response.read() == large
    assert s3.get_object(Bucket="bucket", Key="large")["Body"].read() == b"other"


def test_all_is_there_after_a_restart(tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        server.make_bucket("bucket")
        s3 = client(server)
        s3.put_object(Bucket="bucket", Key="k/1", Body=BODY, Metadata={"a": "b"}, ChecksumAlgorithm="SHA256")
        upload = s3.create_multipart_upload(Bucket="bucket", Key="k/2", ChecksumAlgorithm="CRC32")["UploadId"]
        part = {"Bucket": "bucket", "Key": "k/2", "UploadId": upload, "PartNumber": 3}
        etag = s3.upload_part(**part, Body=BODY, ChecksumAlgorithm="CRC32")["ETag"]
        before = s3.head_object(Bucket="bucket", Key="k/1", ChecksumMode="ENABLED")
        s3.close()
    with S3Server(tmp_path) as server:
        s3 = client(server)
        after = s3.head_object(Bucket="bucket", Key="k/1", ChecksumMode="ENABLED")
        assert {**before, "ResponseMetadata": 0} == {**after, "ResponseMetadata": 0}
        parts = s3.list_parts(Bucket="bucket", Key="k/2", UploadId=upload)["Parts"]
        assert [(part["PartNumber"], part["ETag"]) for part in parts] == [(3, etag)]
        s3.close()


# Signatures


def test_only_the_right_key_and_secret_are_let_in(server: S3Server, raw: Raw) -> None:
    def asked(**options: Any) -> tuple[int, str]:
        s3 = client(server, **options)
        try:
            return refused(s3.get_object, Bucket="bucket", Key="key")
        finally:
            s3.close()

    assert asked(aws_secret_access_key="wrong") == (403, "SignatureDoesNotMatch")
    assert asked(aws_access_key_id="unknown") == (403, "InvalidAccessKeyId")
    assert asked(aws_session_token="unasked") == (400, "InvalidToken")
    raw.connection.request("GET", "/bucket/key")
    assert code_of(raw.connection.getresponse()) == (403, "AccessDenied")


@pytest.mark.parametrize("by", [-1000.0, 1000.0])
def test_a_clock_that_is_off_is_told_so(raw: Raw, by: float) -> None:
    response = raw.ask("GET", "/bucket/key", at=by)
    text = response.read().decode()
    assert response.status == 403
    assert "<Code>RequestTimeTooSkewed</Code>" in text
    assert f"<ServerTime>{datetime.now(UTC):%Y-%m-%d}" in text


def test_the_right_region_is_named_so_that_boto3_finds_it(raw: Raw) -> None:
    text = raw.ask("GET", "/bucket/key", region="eu-west-3").read().decode()
    assert "<Code>AuthorizationHeaderMalformed</Code>" in text
    assert "<Region>us-east-1</Region>" in text
    s3 = client(raw.server, region_name="eu-west-3")
    assert s3.get_object(Bucket="bucket", Key="key")["Body"].read() == BODY
    assert 400 in [each["status"] for each in raw.server.stats()["log"][1:]]
    s3.close()


@pytest.mark.parametrize("what", ["path", "query", "header", "method"])
def test_a_request_that_differs_from_what_was_signed_is_refused(raw: Raw, what: str) -> None:
    path, headers = "/bucket/key", raw.signed("GET", "/bucket/key", b"", {"x-amz-meta-a": "1"})
    if what == "header":
        headers["x-amz-meta-a"] = "2"
    changed = {"path": "/bucket/kez", "query": f"{path}?x-id=GetObject"}.get(what, path)
    raw.connection.request("HEAD" if what == "method" else "GET", changed, headers=headers)
    status, code = code_of(raw.connection.getresponse())
    assert (status, code) == (403, "" if what == "method" else "SignatureDoesNotMatch")


def test_an_amz_header_that_was_not_signed_is_refused(raw: Raw) -> None:
    headers = raw.signed("GET", "/bucket/key", b"", {}) | {"x-amz-checksum-mode": "ENABLED"}
    raw.connection.request("GET", "/bucket/key", headers=headers)
    assert code_of(raw.connection.getresponse()) == (403, "AccessDenied")


def test_a_presigned_url_is_good_until_it_expires_and_for_one_object(s3: Any, raw: Raw) -> None:
    def fetched(url: str, method: str = "GET", body: bytes | None = None) -> http.client.HTTPResponse:
        path = url.removeprefix(raw.server.endpoint)
        raw.connection.request(method, path, body)
        return raw.connection.getresponse()

    url = s3.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"}, ExpiresIn=60)
    assert "X-Amz-Signature" in url
    assert fetched(url).read() == BODY
    assert code_of(fetched(url.replace("/key?", "/kez?"))) == (403, "SignatureDoesNotMatch")
    assert code_of(fetched(url.replace("Expires=60", "Expires=600"))) == (403, "SignatureDoesNotMatch")
    assert code_of(fetched(url[:-1] + ("0" if url[-1] != "0" else "1"))) == (403, "SignatureDoesNotMatch")
    assert code_of(fetched(url, "DELETE")) == (403, "SignatureDoesNotMatch")
    put = s3.generate_presigned_url("put_object", Params={"Bucket": "bucket", "Key": "put"}, ExpiresIn=60)
    assert fetched(put, "PUT", b"here").read() == b""
    assert raw.server.objects("bucket")["put"].read_bytes() == b"here"
    short = s3.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"}, ExpiresIn=1)
    time.sleep(2.1)
    assert code_of(fetched(short)) == (403, "AccessDenied")


def test_a_session_token_is_wanted_and_expires(tmp_path: Path) -> None:
    with S3Server(tmp_path, session_token="token-1") as server:
        server.make_bucket("bucket")
        first, without = client(server), client(server, aws_session_token=None)
        first.put_object(Bucket="bucket", Key="k", Body=b"1")
        assert refused(without.get_object, Bucket="bucket", Key="k") == (400, "InvalidToken")
        server.rotate("key-2", "secret-2", "token-2")
        second = client(server)
        assert refused(first.get_object, Bucket="bucket", Key="k") == (400, "ExpiredToken")
        assert second.get_object(Bucket="bucket", Key="k")["Body"].read() == b"1"
        for each in (first, second, without):
            each.close()


def test_reading_may_be_open_to_all_and_the_clock_ahead(tmp_path: Path) -> None:
    with S3Server(tmp_path, anonymous_read=True, clock_offset=1000) as server, Raw(server) as raw:
        server.make_bucket("bucket")
        (tmp_path / "bucket" / "k").write_bytes(b"by hand")
        raw.connection.request("GET", "/bucket/k")
        assert raw.connection.getresponse().read() == b"by hand"
        raw.connection.request("PUT", "/bucket/k", b"2")
        assert code_of(raw.connection.getresponse()) == (403, "AccessDenied")
        assert code_of(raw.ask("GET", "/bucket/k")) == (403, "RequestTimeTooSkewed")


# Payloads


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
def test_a_checksum_is_checked_stored_and_shown(server: S3Server, s3: Any, algorithm: str) -> None:
    put = s3.put_object(Bucket="bucket", Key="k", Body=BODY, ChecksumAlgorithm=algorithm)
    name = f"Checksum{algorithm}"
    shown = s3.head_object(Bucket="bucket", Key="k", ChecksumMode="ENABLED")
    assert put[name] == shown[name]
    assert shown["ChecksumType"] == "FULL_OBJECT"
    if algorithm == "CRC32":
        assert put[name] == base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()
    part = s3.get_object(Bucket="bucket", Key="k", Range="bytes=0-9", ChecksumMode="ENABLED")
    assert name not in part
    part["Body"].close()
    wrong = base64.b64encode(bytes(len(base64.b64decode(put[name])))).decode()
    assert refused(s3.put_object, Bucket="bucket", Key="bad", Body=BODY, **{name: wrong}) == (
        400,
        "BadDigest",
    )
    assert [*server.objects("bucket")] == ["k"]


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme"])
def test_a_checksum_that_cannot_be_checked_is_refused(server: S3Server, raw: Raw, algorithm: str) -> None:
    headers = {f"x-amz-checksum-{algorithm}": base64.b64encode(bytes(8)).decode()}
    assert code_of(raw.ask("PUT", "/bucket/k", b"body", headers)) == (501, "NotImplemented")
    assert "k" not in server.objects("bucket")


def test_a_payload_must_have_the_hash_that_was_signed(server: S3Server, raw: Raw) -> None:
    headers = {"x-amz-content-sha256": hashlib.sha256(b"other").hexdigest()}
    assert code_of(raw.ask("PUT", "/bucket/k", b"body", headers)) == (400, "XAmzContentSHA256Mismatch")
    wrong = {"Content-MD5": base64.b64encode(hashlib.md5(b"other").digest()).decode()}
    assert code_of(raw.ask("PUT", "/bucket/k", b"body", wrong)) == (400, "BadDigest")
    assert "k" not in server.objects("bucket")
    unsigned = {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    assert raw.ask("PUT", "/bucket/k", b"body", unsigned).read() == b""
    assert server.objects("bucket")["k"].read_bytes() == b"body"


def chunked(data: bytes, trailer: str) -> bytes:
    half = len(data) // 2
    pieces = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (data[:half], data[half:]))
    return b"".join(pieces) + f"0\r\n{trailer}\r\n\r\n".encode()


def test_an_aws_chunked_body_is_unframed_and_its_trailer_checked(server: S3Server, raw: Raw) -> None:
    right = base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()
    headers = {
        "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "Content-Encoding": "aws-chunked",
        "x-amz-decoded-content-length": str(len(BODY)),
        "x-amz-trailer": "x-amz-checksum-crc32",
    }

    def put(trailer: str, **changed: str) -> tuple[int, str]:
        return code_of(raw.ask("PUT", "/bucket/k", chunked(BODY, trailer), {**headers, **changed}))

    assert put("x-amz-checksum-crc32:AAAAAA==") == (400, "BadDigest")
    assert put("x-other:1") == (400, "MalformedTrailerError")
    assert put(f"x-amz-checksum-crc32:{right}", **{"x-amz-decoded-content-length": "1"}) == (
        400,
        "IncompleteBody",
    )
    assert "k" not in server.objects("bucket")
    assert put(f"x-amz-checksum-crc32:{right}") == (200, "")
    assert server.objects("bucket")["k"].read_bytes() == BODY


def test_over_tls_boto3_uploads_in_aws_chunks(tmp_path: Path) -> None:
    with S3Server(tmp_path, tls=True) as server:
        server.make_bucket("bucket")
        s3 = client(server)
        put = s3.put_object(Bucket="bucket", Key="k", Body=BODY * 30)
        assert put["ChecksumCRC32"] == base64.b64encode(zlib.crc32(BODY * 30).to_bytes(4, "big")).decode()
        s3.upload_file(str(server.objects("bucket")["k"]), "bucket", "again")
        assert s3.get_object(Bucket="bucket", Key="again")["Body"].read() == BODY * 30
        assert server.stats()["operations"]["PutObject"]["received"] > 2 * len(BODY) * 30  # with its framing
        server.fault("truncate", after=10)
        with pytest.raises(Exception, match=r"IncompleteRead|Connection was closed|EOF"):
            s3.get_object(Bucket="bucket", Key="k")["Body"].read()
        s3.close()


def test_without_checksums_it_is_as_an_older_store(tmp_path: Path) -> None:
    with S3Server(tmp_path, checksums=False, min_part_size=1) as server, Raw(server) as raw:
        server.make_bucket("bucket")
        response = raw.ask("PUT", "/bucket/k", b"body", {"x-amz-checksum-crc32": "AAAAAA=="})
        assert response.status == 200
        response.read()
        response = raw.ask("HEAD", "/bucket/k", headers={"x-amz-checksum-mode": "ENABLED"})
        response.read()
        assert not [name for name, _ in response.getheaders() if "checksum" in name.lower()]


def test_a_client_that_expects_it_is_told_to_continue_only_when_its_body_is_wanted(raw: Raw) -> None:
    def asked(headers: dict[str, str]) -> bytes:
        signed = raw.signed("PUT", "/bucket/key", BODY, {"Expect": "100-continue", **headers})
        lines = [f"{name}: {value}" for name, value in signed.items()]
        lines += [f"Host: {raw.connection.host}:{raw.connection.port}", f"Content-Length: {len(BODY)}"]
        with socket.create_connection((raw.connection.host, raw.connection.port), timeout=5) as sock:
            sock.sendall("\r\n".join(["PUT /bucket/key HTTP/1.1", *lines, "", ""]).encode())
            first = sock.recv(1000).partition(b"\r\n")[0]
            if b"100" in first:
                sock.sendall(BODY)
                return first + b", " + sock.recv(1000).partition(b"\r\n")[0]
            return first

    assert asked({}) == b"HTTP/1.1 100 Continue, HTTP/1.1 200 OK"
    assert asked({"If-None-Match": "*"}) == b"HTTP/1.1 412 Precondition Failed"


# Multipart uploads


def begin(
    s3: Any, sizes: list[int], key: str = "k", **how: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """An upload whose parts are sent: its name, its parts as they are named to complete it, and all bytes."""
    upload = {"Bucket": "bucket", "Key": key}
    upload["UploadId"] = s3.create_multipart_upload(**upload, **how)["UploadId"]
    parts, whole = [], b""
    checksum = {"ChecksumAlgorithm": how["ChecksumAlgorithm"]} if how else {}
    for number, size in enumerate(sizes, 1):
        body = os.urandom(size)
        sent = s3.upload_part(**upload, PartNumber=number, Body=body, **checksum)
        shown = {
            name: value for name, value in sent.items() if name == "ETag" or name.startswith("ChecksumC")
        }
        parts.append({"PartNumber": number, **shown})
        whole += body
    return upload, parts, whole


@pytest.fixture(scope="module")
def unchecked(running: S3Server) -> Iterator[Any]:
    found = client(running, config={"request_checksum_calculation": "when_required"})
    yield found
    found.close()


@pytest.fixture
def bare(server: S3Server, unchecked: Any) -> Any:
    """A client that sends no checksums by itself."""
    return unchecked


def test_parts_become_one_object(server: S3Server, bare: Any) -> None:
    upload, parts, whole = begin(bare, [5000, 2000, 7])
    assert server.objects("bucket") == {}
    listed = bare.list_parts(**upload, MaxParts=2)
    assert [part["Size"] for part in listed["Parts"]] == [5000, 2000]
    assert listed["IsTruncated"]
    rest = bare.list_parts(**upload, PartNumberMarker=listed["NextPartNumberMarker"])["Parts"]
    assert [part["PartNumber"] for part in rest] == [3]
    done = bare.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    assert done["ETag"] == f'"{hashlib.md5(digests).hexdigest()}-3"'
    found = bare.get_object(Bucket="bucket", Key="k")
    assert (found["Body"].read(), found["ETag"]) == (whole, done["ETag"])
    assert refused(bare.complete_multipart_upload, **upload, MultipartUpload={"Parts": parts}) == (
        404,
        "NoSuchUpload",
    )
    assert list((server.root / ".uploads").iterdir()) == []


def test_parts_that_were_not_sent_so_are_refused(server: S3Server, bare: Any) -> None:
    upload, parts, whole = begin(bare, [5000, 2000])

    def completed(chosen: list[dict[str, Any]], **more: Any) -> tuple[int, str]:
        return refused(bare.complete_multipart_upload, **upload, MultipartUpload={"Parts": chosen}, **more)

    assert completed([parts[0], {**parts[1], "ETag": '"0"'}]) == (400, "InvalidPart")
    assert completed([*parts, {**parts[1], "PartNumber": 3}]) == (400, "InvalidPart")
    assert completed(parts[::-1]) == (400, "InvalidPartOrder")
    small = bare.upload_part(**upload, PartNumber=1, Body=b"small")["ETag"]
    assert completed([{"PartNumber": 1, "ETag": small}, parts[1]]) == (400, "EntityTooSmall")
    bare.put_object(Bucket="bucket", Key="k", Body=b"there")
    assert completed([parts[1]], IfNoneMatch="*") == (412, "PreconditionFailed")
    assert server.objects("bucket")["k"].read_bytes() == b"there"
    bare.complete_multipart_upload(**upload, MultipartUpload={"Parts": [parts[1]]})
    assert server.objects("bucket")["k"].read_bytes() == whole[5000:]


@pytest.mark.parametrize("kind", ["COMPOSITE", "FULL_OBJECT"])
def test_a_multipart_object_has_the_checksum_that_was_asked_for(
    server: S3Server, bare: Any, kind: str
) -> None:
    upload, parts, whole = begin(bare, [5000, 2000], ChecksumAlgorithm="CRC32", ChecksumType=kind)
    listed = bare.list_parts(**upload)["Parts"]
    assert [part["ChecksumCRC32"] for part in listed] == [part["ChecksumCRC32"] for part in parts]
    wrong = [{**parts[0], "ChecksumCRC32": parts[1]["ChecksumCRC32"]}, parts[1]]
    assert refused(bare.complete_multipart_upload, **upload, MultipartUpload={"Parts": wrong}) == (
        400,
        "InvalidPart",
    )
    full = base64.b64encode(zlib.crc32(whole).to_bytes(4, "big")).decode()
    given: dict[str, Any] = {}
    if kind == "FULL_OBJECT":
        given = {"ChecksumType": kind, "ChecksumCRC32": "AAAAAA=="}
        shown = refused(bare.complete_multipart_upload, **upload, MultipartUpload={"Parts": parts}, **given)
        assert shown == (400, "BadDigest")
        given["ChecksumCRC32"] = full
    bare.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **given)
    head = bare.head_object(Bucket="bucket", Key="k", ChecksumMode="ENABLED")
    of_parts = zlib.crc32(b"".join(base64.b64decode(part["ChecksumCRC32"]) for part in parts)).to_bytes(
        4, "big"
    )
    composite = base64.b64encode(of_parts).decode() + "-2"
    assert (head["ChecksumCRC32"], head["ChecksumType"]) == (
        full if kind == "FULL_OBJECT" else composite,
        kind,
    )


def test_a_part_with_a_wrong_checksum_is_refused(server: S3Server, bare: Any) -> None:
    upload, _, _ = begin(bare, [], ChecksumAlgorithm="CRC32")
    part = {**upload, "PartNumber": 1, "Body": BODY}
    assert refused(bare.upload_part, **part, ChecksumCRC32="AAAAAA==") == (400, "BadDigest")
    assert refused(bare.upload_part, **part, ChecksumAlgorithm="SHA256") == (400, "InvalidRequest")
    assert "Parts" not in bare.list_parts(**upload)


def test_unfinished_uploads_are_listed_and_aborted(server: S3Server, bare: Any) -> None:
    uploads = [begin(bare, [10], key)[0] for key in ("p/1", "p/1", "p/2", "q")]
    found = bare.list_multipart_uploads(Bucket="bucket", Prefix="p/", MaxUploads=2)
    assert found["IsTruncated"]
    markers = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}
    rest = bare.list_multipart_uploads(Bucket="bucket", Prefix="p/", **markers)["Uploads"]
    both = [(each["Key"], each["UploadId"]) for each in found["Uploads"] + rest]
    assert sorted(both) == sorted((each["Key"], each["UploadId"]) for each in uploads[:3])
    assert abs(found["Uploads"][0]["Initiated"].timestamp() - time.time()) < 5
    for each in uploads:
        bare.abort_multipart_upload(**each)
    assert refused(bare.abort_multipart_upload, **uploads[0]) == (404, "NoSuchUpload")
    assert "Uploads" not in bare.list_multipart_uploads(Bucket="bucket")


def test_boto3_moves_a_large_file_both_ways(server: S3Server, s3: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(20 * 2**20))
    s3.upload_file(str(source), "bucket", "large")
    s3.download_file("bucket", "large", str(target))
    assert source.read_bytes() == target.read_bytes()
    operations = server.stats()["operations"]
    assert operations["UploadPart"]["requests"] == 3
    assert operations["UploadPart"]["received"] == source.stat().st_size
    assert operations["GetObject"]["sent"] == source.stat().st_size


# Faults


def faults(server: S3Server) -> dict[str, int]:
    found: dict[str, int] = server.stats()["modes"]
    return found


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (429, "TooManyRequests"),
        (403, "AccessDenied"),
        (400, "ExpiredToken"),
    ],
)
def test_status_answers_with_an_error_so_often_and_then_no_more(raw: Raw, code: int, name: str) -> None:
    raw.server.fault("status", code=code, times=2, skip=1)
    assert raw.get().read() == BODY
    assert [code_of(raw.get()) for _ in range(2)] == [(code, name)] * 2
    assert raw.get().read() == BODY
    assert faults(raw.server) == {"status": 2}


def test_a_fault_finds_its_requests_by_method_key_and_size(raw: Raw) -> None:
    raw.server.fault("status", times=0, method="GET", match="ke", min_bytes=1000)
    assert raw.get(0, 999).status == 206
    raw.connection.close()
    assert code_of(raw.get(0, 1000)) == (503, "SlowDown")
    assert raw.ask("HEAD", "/bucket/key").read() == b""
    assert code_of(raw.ask("GET", "/bucket/other")) == (404, "NoSuchKey")
    raw.server.clear()
    assert raw.get().read() == BODY


def test_redirects_say_where_to(raw: Raw) -> None:
    raw.server.fault("status", code=301, region="eu-north-1")
    raw.server.fault("status", code=307, location="http://127.0.0.1:1/bucket/key")
    first = raw.get()
    assert first.getheader("x-amz-bucket-region") == "eu-north-1"
    assert code_of(first) == (301, "PermanentRedirect")
    second = raw.get()
    assert second.getheader("Location") == "http://127.0.0.1:1/bucket/key"
    assert code_of(second) == (307, "TemporaryRedirect")


def test_reset_truncate_and_stall_stop_in_the_body(raw: Raw) -> None:
    raw.server.fault("truncate", after=1000)
    with pytest.raises(http.client.IncompleteRead) as caught:
        raw.get().read()
    assert caught.value.partial == BODY[:1000]
    raw.connection.close()
    raw.server.fault("reset", after=1000)
    with pytest.raises(ConnectionResetError):
        raw.get().read()
    raw.connection.close()
    raw.server.fault("stall", after=1000)
    raw.connection.timeout = 0.3
    response = raw.get()
    assert response.read(1000) == BODY[:1000]
    with pytest.raises(TimeoutError):
        response.read(1)
    raw.connection.close()
    stats = raw.server.stats()
    assert [(each["fault"], each["sent"], each["status"]) for each in stats["log"]] == [
        ("truncate", 1000, 206),
        ("reset", 1000, 206),
        ("stall", 1000, 206),
    ]


def test_hang_never_answers(raw: Raw) -> None:
    raw.server.fault("hang")
    raw.connection.timeout = 0.3
    with pytest.raises(TimeoutError):
        raw.get()
    raw.connection.close()
    assert raw.get().read() == BODY


@pytest.mark.parametrize("mode", ["delay", "slow_first_byte"])
def test_delays_come_before_the_answer(raw: Raw, mode: str) -> None:
    raw.server.fault(mode, delay=0.3, times=2)
    for ask in (raw.get, lambda: raw.ask("PUT", "/bucket/k", b"1")):
        begun = time.monotonic()
        assert ask().read() in (BODY, b"")
        assert time.monotonic() - begun >= 0.3  # a busy machine takes longer


def test_drip_keeps_to_its_rate(raw: Raw) -> None:
    raw.server.fault("drip", rate=20_000)
    begun = time.monotonic()
    assert raw.get(0, 10_000).read() == BODY[:10_000]
    assert time.monotonic() - begun >= 0.4


def test_flip_changes_one_bit(raw: Raw) -> None:
    raw.server.fault("flip", at=500)
    response = raw.get(100, 5000)
    found = response.read()
    assert response.getheader("ETag") == f'"{hashlib.md5(BODY).hexdigest()}"'
    assert [(i, a ^ b) for i, (a, b) in enumerate(zip(found, BODY[100:5000], strict=True)) if a != b] == [
        (500, 1)
    ]


@pytest.mark.parametrize(("start", "stop"), [(100, 5000), (0, len(BODY))])
def test_shift_lies_about_where_the_bytes_are_from(raw: Raw, start: int, stop: int) -> None:
    raw.server.fault("shift", by=3)
    response = raw.get(start, stop)
    found = response.read()
    assert response.getheader("Content-Range") == f"bytes {start}-{stop - 1}/{len(BODY)}"
    assert found == (BODY[start + 3 :] + BODY[:3])[: stop - start]


def test_wrong_range_is_honest_about_another_range(raw: Raw) -> None:
    raw.server.fault("wrong_range", by=10)
    response = raw.get(100, 200)
    assert (response.status, response.getheader("Content-Range")) == (206, f"bytes 110-209/{len(BODY)}")
    assert response.read() == BODY[110:210]


@pytest.mark.parametrize("short", [False, True])
def test_html_is_a_page_with_status_200(raw: Raw, short: bool) -> None:
    raw.server.fault("html", short=short)
    response = raw.get(0, 5000)
    page = response.read()
    assert (response.status, response.getheader("Content-Type"), page[:6]) == (200, "text/html", b"<html>")
    assert (len(page) == 5000) != short


def test_full200_ignores_the_range(raw: Raw) -> None:
    raw.server.fault("full200")
    response = raw.get(100, 200)
    assert (response.status, response.getheader("Content-Range"), response.read()) == (200, None, BODY)


def test_gzip_compresses_the_range(raw: Raw) -> None:
    raw.server.fault("gzip")
    response = raw.get(100, 5000)
    assert (response.status, response.getheader("Content-Encoding")) == (206, "gzip")
    assert gzip.decompress(response.read()) == BODY[100:5000]


def test_replace_puts_other_bytes_after_this_request(raw: Raw) -> None:
    raw.server.fault("replace")
    first = raw.get()
    assert first.read() == BODY
    second = raw.get()
    other = second.read()
    assert len(other) == len(BODY)
    assert other != BODY
    assert second.getheader("ETag") == f'"{hashlib.md5(other).hexdigest()}"' != first.getheader("ETag")
    old = {"If-Match": str(first.getheader("ETag"))}
    assert code_of(raw.ask("GET", "/bucket/key", headers=old)) == (412, "PreconditionFailed")


def test_drop_upload_cuts_the_upload_and_stores_nothing(raw: Raw) -> None:
    raw.server.fault("drop_upload", after=1000)
    with pytest.raises(ConnectionError):
        raw.ask("PUT", "/bucket/new", os.urandom(8_000_000))
    raw.connection.close()
    assert [*raw.server.objects("bucket")] == ["key"]
    assert raw.server.stats()["operations"]["PutObject"]["received"] >= 1000


def test_lost_response_has_done_it(raw: Raw) -> None:
    raw.server.fault("lost_response", method="PUT")
    with pytest.raises(ConnectionError):
        raw.ask("PUT", "/bucket/new", b"body")
    raw.connection.close()
    assert raw.server.objects("bucket")["new"].read_bytes() == b"body"
    assert [(each["fault"], each["status"]) for each in raw.server.stats()["log"]] == [("lost_response", 200)]


def test_short_and_empty_lists_look_whole(raw: Raw, s3: Any) -> None:
    for number in range(9):
        s3.put_object(Bucket="bucket", Key=f"more/{number}", Body=b"")
    raw.server.fault("short_list")
    raw.server.fault("empty_list")
    found = [s3.list_objects_v2(Bucket="bucket", MaxKeys=6) for _ in range(3)]
    assert [(len(each.get("Contents", [])), each["IsTruncated"]) for each in found] == [
        (3, False),
        (0, False),
        (6, True),
    ]
    assert [each["KeyCount"] for each in found] == [3, 0, 6]


def test_a_fault_that_is_not_known_is_refused(server: S3Server) -> None:
    with pytest.raises(ValueError, match="no fault mode 'stahl'; known are status"):
        server.fault("stahl")
    with pytest.raises(ValueError, match="a fault has no often"):
        server.fault("stall", often=3)


# The process


def test_stats_count_what_went_over_the_wire(raw: Raw) -> None:
    raw.get(0, 1000).read()
    raw.ask("PUT", "/bucket/k", b"12345").read()
    raw.ask("HEAD", "/bucket/k").read()
    stats = raw.server.stats()
    assert (stats["requests"], stats["sent"], stats["received"], stats["faults"]) == (3, 1000, 5, 0)
    assert stats["operations"]["GetObject"] == {"requests": 1, "sent": 1000, "received": 0, "faults": 0}
    shown = [
        (each["method"], each["key"], each["range"], each["status"], each["sent"]) for each in stats["log"]
    ]
    assert shown == [
        ("GET", "key", "bytes=0-999", 206, 1000),
        ("PUT", "k", None, 200, 0),
        ("HEAD", "k", None, 200, 0),
    ]
    raw.server.reset_stats()
    assert raw.server.stats()["requests"] == 0


@contextlib.contextmanager
def launched(root: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "s3server", "--root", str(root), *options]
    pipe, tests = subprocess.PIPE, Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=tests) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("workers", ["1", "3"])
def test_clients_that_go_away_leave_no_thread_and_no_word(tmp_path: Path, workers: str) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "large").write_bytes(bytes(50_000_000))
    with launched(tmp_path, "--anonymous-read", f"--workers={workers}") as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split(b'"')[3].rpartition(b":")[2])
        for request in (
            b"GET /bucket/large HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /buck",
            b"\x16\x03\x01\0\0\r\n\r\n",
            b"",
        ):
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", port)) as sock:
                    sock.sendall(request)
                    if request.endswith(b"\r\n\r\n"):
                        sock.recv(10)
        deadline = time.monotonic() + 3
        while (threads := len(list(Path(f"/proc/{process.pid}/task").iterdir()))) > (
            3 if workers == "1" else 6
        ):
            assert time.monotonic() < deadline, threads
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(30)  # no thread holds it up
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_it_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    with launched(tmp_path, "--until-stdin-closes", "--workers=2") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        port = int(process.stdout.readline().split(b'"')[3].rpartition(b":")[2])
        process.stdin.close()
        assert process.wait(5) == 0
        deadline = time.monotonic() + 2
        with pytest.raises(ConnectionRefusedError):
            while time.monotonic() < deadline:
                socket.create_connection(("127.0.0.1", port)).close()
                time.sleep(0.02)


def test_the_environment_is_all_that_a_client_needs(
    running: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    s3 = boto3.session.Session().client("s3")
    assert urllib.parse.urlparse(s3.meta.endpoint_url).hostname == "127.0.0.1"
    assert "bucket" in {each["Name"] for each in s3.list_buckets()["Buckets"]}
    s3.close()
