"""What is promised of a store holds on S3: every verb, every kind of credentials, and no secret in anything it says."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import urlsplit

import pytest

import s3fixtures
from retries import retries
from s3fixtures import BUCKET, chunk, content, opened
from s3server import S3Server
from shardprep_runtime.errors import (
    ConflictError,
    DeniedError,
    InputError,
    MissingError,
    ShardprepError,
    SourceError,
    StoreError,
)
from shardprep_runtime.stores import s3_client
from shardprep_runtime.stores.s3 import S3Store
from shardprep_runtime.stores.s3_by_botocore import BotoMover
from shardprep_runtime.stores.s3_native import NativeMover
from shardprep_runtime.stores.store import BufferSink, Chunk, FileRange, Transfer, read, read_small

MIB = 2**20
NUMBERS = itertools.count()
PARTS = [(0, 5 * MIB), (5 * MIB, 10 * MIB), (10 * MIB, 10 * MIB + 1234)]


def serve(folder: Path, **how: Any) -> S3Server:
    server = S3Server(folder, **how)
    server.make_bucket(BUCKET)
    return server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("secure"), tls=True) as server:
        yield server


@pytest.fixture
def server(plain: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The plain server, without faults; the environment is its own."""
    s3fixtures.isolate(monkeypatch, tmp_path, plain)
    plain.clear()
    plain.reset_stats()
    return plain


@pytest.fixture(params=["native", "boto3"])
def transfer(request: pytest.FixtureRequest) -> Transfer:
    found: Transfer = request.param
    return found


@pytest.fixture
def prefix() -> str:
    """Another one for each test."""
    return f"p{next(NUMBERS)}"


@pytest.fixture
def store(server: S3Server, transfer: Transfer, prefix: str) -> Iterator[S3Store]:
    with opened(prefix, transfer=transfer) as found:
        yield found


@pytest.fixture(scope="session")
def large() -> bytes:
    """What PARTS cut."""
    return content(PARTS[-1][1])


def asked(server: S3Server, operation: str) -> list[dict[str, Any]]:
    """The requests of one kind, in their order."""
    return [each for each in server.stats()["log"] if each["operation"] == operation]


# ------------------------------------------------------------------------------------------------------ small objects


@pytest.mark.parametrize("key", ["plain", "a b+c&d=e/ü%20~.json", "sub/weights (1).bin", "日本/é?#;,:@!*'"])
def test_what_is_put_is_found_and_read_under_its_very_key(store: S3Store, server: S3Server, key: str) -> None:
    data = content(70_000)
    assert store.head(key) is None
    put = store.put(key, data)
    found = store.head(key)
    assert found is not None
    assert (found.key, found.size, found.version) == (key, len(data), put.version)
    assert abs(found.modified - time.time()) < 60
    assert read_small(store, key, most=len(data)) == (data, found)
    assert [each.key for each in store.list("")] == [key]
    assert f"{store.client.prefix}{key}" in server.objects(BUCKET)
    store.delete([key])
    assert store.head(key) is None


def test_an_unknown_transfer_is_refused() -> None:
    with pytest.raises(InputError, match="transfer must be auto, native or boto3, not 'crt'"):
        opened(transfer="crt")


def test_without_a_prefix_keys_are_those_of_the_bucket(server: S3Server, transfer: Transfer) -> None:
    with opened(transfer=transfer) as store:
        store.put("at-the-root", b"here")
        assert read(store, "at-the-root", 0, 4) == b"here"
        assert "at-the-root" in {each.key for each in store.list("")}
        assert store.uri == f"s3://{BUCKET}"
        store.delete(["at-the-root", "at-the-root"])
        assert "at-the-root" not in server.objects(BUCKET)


@pytest.mark.slow
def test_everything_works_over_tls(
    secure: S3Server, transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, large: bytes
) -> None:
    s3fixtures.isolate(monkeypatch, tmp_path, secure)
    (tmp_path / "file").write_bytes(large)
    with opened(f"tls-{transfer}", transfer=transfer) as store, (tmp_path / "file").open("rb") as file:
        upload = store.upload("k", PARTS)
        for number, (start, stop) in enumerate(PARTS):
            assert upload.send(
                number, Chunk(FileRange(file.fileno(), start, stop), chunk(large[start:stop]).crc32)
            )
        assert upload.finish().size == len(large)
        assert read(store, "k", 0, len(large)) == large
        assert read(store, "k", 5 * MIB - 3, 5 * MIB + 3) == large[5 * MIB - 3 : 5 * MIB + 3]
        assert [each.key for each in store.list("")] == ["k"]


@pytest.mark.parametrize("verb", ["get", "head"])
def test_a_certificate_that_is_not_trusted_is_refused_at_once(
    secure: S3Server, transfer: Transfer, verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3fixtures.isolate(monkeypatch, tmp_path, secure)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with (
        retries() as found,
        opened(transfer=transfer) as store,
        pytest.raises(StoreError, match=r"certificate is not trusted.*AWS_CA_BUNDLE"),
    ):
        read(store, "k", 0, 1) if verb == "get" else store.head("k")
    assert found == []


def test_a_ca_bundle_that_is_not_there_is_refused(
    secure: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3fixtures.isolate(monkeypatch, tmp_path, secure)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "absent.pem"))
    with opened() as store, pytest.raises(InputError, match=r"CA bundle .*absent.pem cannot be read"):
        read(store, "k", 0, 1)


# ------------------------------------------------------------------------------------------------------------- ranges


def test_any_range_is_read_and_no_byte_beside_it_is_sent(store: S3Store, server: S3Server) -> None:
    data = content(3 * MIB + 17)
    version = store.put("k", data).version
    server.reset_stats()
    ranges = [
        (0, 1),
        (0, MIB),
        (MIB - 1, 2 * MIB + 1),
        (len(data) - 5, len(data)),
        (17, len(data)),
        (0, len(data)),
    ]
    for start, stop in ranges:
        assert read(store, "k", start, stop, version=version) == data[start:stop]
    assert server.stats()["operations"]["GetObject"]["sent"] == sum(stop - start for start, stop in ranges)
    assert server.stats()["operations"]["GetObject"]["requests"] == len(ranges)


@pytest.mark.parametrize("start", [0, 4, 9, 100])
def test_a_range_beyond_the_end_is_an_error_of_the_source_at_once(
    store: S3Store, server: S3Server, start: int
) -> None:
    store.put("k", b"nine byte")
    server.reset_stats()
    with pytest.raises(SourceError, match="bytes"):
        read(store, "k", start, start + 10)
    assert server.stats()["requests"] == 1


def test_a_missing_object_is_none_to_head_and_an_error_to_get(store: S3Store, server: S3Server) -> None:
    assert store.head("absent") is None
    with pytest.raises(MissingError, match="absent: no such object"):
        read(store, "absent", 0, 1)
    assert server.stats()["requests"] == 2


def test_a_bucket_that_is_not_there_is_named(server: S3Server, transfer: Transfer) -> None:
    with opened("p", bucket="no-such-bucket", transfer=transfer) as store:
        for verb in (
            lambda: read(store, "k", 0, 1),
            lambda: store.put("k", b""),
            lambda: list(store.list("")),
        ):
            with pytest.raises(MissingError, match=r"s3://no-such-bucket/p.*no such bucket"):
                verb()


def test_a_range_is_read_in_the_version_that_was_asked_for_or_not_at_all(store: S3Store) -> None:
    old = store.put("k", b"old bytes").version
    assert read(store, "k", 0, 3, version=old) == b"old"
    new = store.put("k", b"new bytes").version
    assert new != old
    with pytest.raises(SourceError, match="replaced while it was read"):
        read(store, "k", 0, 3, version=old)
    assert read(store, "k", 0, 3, version=new) == b"new"


def test_requests_share_a_connection(server: S3Server, transfer: Transfer, prefix: str) -> None:
    with s3fixtures.relay(server) as relay:
        endpoint = f"http://127.0.0.1:{relay.server_address[1]}"
        with opened(prefix, transfer=transfer, endpoint_url=endpoint) as store:
            store.put("k", content(MIB))
            before = relay.connections
            for at in range(20):
                read(store, "k", at * 1000, at * 50_000 + 2000)
                with pytest.raises(MissingError):
                    read(store, "absent", 0, 1)
            upload = store.upload("up", [(0, MIB)])
            upload.send(0, chunk(content(MIB)))
            assert relay.connections <= before + 1


@pytest.mark.parametrize("after", [0, 1, 100_000, 2 * MIB])
def test_a_transfer_that_breaks_off_goes_on_at_the_byte(store: S3Store, server: S3Server, after: int) -> None:
    data = content(3 * MIB)
    store.put("k", data)
    server.reset_stats()
    server.fault("truncate", after=after, method="GET")
    assert read(store, "k", 7, len(data)) == data[7:]
    assert [each["range"] for each in asked(server, "GetObject")] == [
        f"bytes=7-{len(data) - 1}",
        f"bytes={7 + after}-{len(data) - 1}",
    ]
    assert server.stats()["sent"] == len(data) - 7


def test_an_idle_connection_that_the_store_has_closed_is_no_failure(
    server: S3Server, transfer: Transfer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(prefix, transfer=transfer, deadline=0.0) as store:  # a failure would have no second try
        store.put("k", b"some bytes")
        assert read(store, "k", 0, 4) == b"some"
        sever(store)
        assert read(store, "k", 5, 10) == b"bytes"
        sever(store)
        assert store.upload("k", [(0, 9)]).send(0, chunk(b"nine byte"))


def sever(store: S3Store) -> None:
    """Let the idle connections of our own be closed, as a store does after a while."""
    for each in store.mover._idle if isinstance(store.mover, NativeMover) else ():
        each._socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["truncate", "reset", "stall", "hang"])
def test_a_transfer_over_tls_goes_on_where_it_broke_off(
    mode: str, secure: S3Server, transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3fixtures.isolate(monkeypatch, tmp_path, secure)
    data = content(2 * MIB)
    with opened(f"tls-{mode}-{transfer}", transfer=transfer, idle_timeout=0.5) as store:
        store.put("k", data)
        secure.reset_stats()
        secure.fault(mode, method="GET", **({} if mode == "hang" else {"after": MIB + 7}))
        assert read(store, "k", 0, len(data)) == data
        assert secure.stats()["modes"] == {mode: 1}
        assert secure.stats()["operations"]["GetObject"]["requests"] == 2
        if mode in ("truncate", "stall"):
            assert secure.stats()["sent"] == len(data)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "memory"])
def test_an_upload_that_nobody_takes_is_given_up(
    server: S3Server, transfer: Transfer, source: str, large: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(large)
    with socket.create_server(("127.0.0.1", 0)) as deaf, (tmp_path / "file").open("rb") as file:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        body = FileRange(file.fileno(), 0, len(large)) if source == "file" else memoryview(large)
        little = {"idle_timeout": 0.3, "connect_timeout": 0.3, "deadline": 0.5}
        with (
            retries() as found,
            opened(transfer=transfer, endpoint_url=endpoint, **little) as store,
            pytest.raises(StoreError, match=r"given up after \d+ tries"),
        ):
            store.upload("k", [(0, len(large))]).send(0, Chunk(body))
        assert len(found) <= 3  # two last longer than the deadline


@pytest.mark.parametrize(
    ("how", "error", "most"),
    [
        ({"code": 403}, DeniedError, 2),
        ({"code": 400, "name": "ExpiredToken"}, DeniedError, 2),
        ({"code": 301}, DeniedError, 2),
        ({"code": 307, "name": "TemporaryRedirect"}, DeniedError, 2),
        ({"code": 501, "name": "NotImplemented"}, StoreError, 2),
    ],
    ids=["403", "expired", "301", "307", "501"],
)
def test_what_will_not_pass_is_asked_once(
    store: S3Store, server: S3Server, how: dict[str, Any], error: type[Exception], most: int
) -> None:
    server.fault("status", times=0, **how)
    for verb in verbs(store).values():
        server.reset_stats()
        with retries() as found, pytest.raises(error):
            verb()
        assert found == []
        assert server.stats()["requests"] <= most


def test_a_sink_that_cannot_take_the_bytes_ends_the_read_at_once(store: S3Store, server: S3Server) -> None:
    """A full disk is no failure of the network."""

    class Full(BufferSink):
        def landed(self, count: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.put("k", content(100_000))
    server.reset_stats()
    with memoryview(bytearray(100_000)) as into, pytest.raises(OSError, match="No space left"):
        store.get("k", 0, Full(into))
    assert server.stats()["requests"] == 1


# ----------------------------------------------------------------------------------------------------- put, put_if


def test_an_object_is_put_only_where_there_is_none(store: S3Store) -> None:
    put = store.put_if("once", b"first", version=None)
    with pytest.raises(ConflictError, match="once: was written by somebody else"):
        store.put_if("once", b"second", version=None)
    assert read_small(store, "once", most=10) == (b"first", store.head("once"))
    assert put.size == 5


def test_an_object_is_replaced_only_in_its_version(store: S3Store) -> None:
    old = store.put("name", b"first").version
    new = store.put_if("name", b"second", version=old).version
    with pytest.raises(ConflictError):
        store.put_if("name", b"third!", version=old)
    assert read(store, "name", 0, 6, version=new) == b"second"
    store.delete(["name"])
    with pytest.raises(ConflictError):
        store.put_if("name", b"fourth", version=new)
    assert store.head("name") is None


@pytest.mark.parametrize("times", [1, 2])
def test_a_conditional_put_whose_answer_is_lost_is_no_conflict_with_itself(
    store: S3Store, server: S3Server, times: int
) -> None:
    server.fault("lost_response", method="PUT", times=times)
    first = store.put_if("k", b"first", version=None)
    assert first == store.head("k") or first.version == "" or first.size == 5
    server.fault("lost_response", method="PUT")
    second = store.put_if("k", b"second", version=first.version)
    assert read(store, "k", 0, 6, version=second.version) == b"second"


def test_a_conditional_put_that_lost_its_answer_still_sees_the_other_writer(
    store: S3Store, server: S3Server
) -> None:
    """The first try never arrived; meanwhile somebody else was first."""
    store.put("k", b"others")
    server.fault("reset", method="PUT")
    with pytest.raises(ConflictError):
        store.put_if("k", b"ours..", version=None)
    assert read(store, "k", 0, 6) == b"others"


def test_of_many_who_put_at_once_one_is_first(store: S3Store) -> None:
    def put(number: int) -> int | None:
        try:
            store.put_if("race", b"%d" % number, version=None)
        except ConflictError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        won = [each for each in pool.map(put, range(8)) if each is not None]
    assert len(won) == 1
    assert read(store, "race", 0, 1) == b"%d" % won[0]


# ------------------------------------------------------------------------------------------------------------ uploads


@pytest.mark.parametrize("source", ["file", "memory"])
def test_parts_are_sent_in_any_order_by_several_threads_and_checked(
    store: S3Store, large: bytes, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "large"
    path.write_bytes(large)
    upload = store.upload("k", PARTS)
    assert list(upload.parts) == PARTS
    with path.open("rb") as file, ThreadPoolExecutor(3) as pool:

        def send(number: int) -> bool:
            start, stop = PARTS[number]
            body = (
                FileRange(file.fileno(), start, stop) if source == "file" else memoryview(large)[start:stop]
            )
            return upload.send(number, Chunk(body, chunk(large[start:stop]).crc32))

        assert list(pool.map(send, [2, 0, 1])) == [True, True, True]
    assert store.head("k") is None  # nothing stands there before it is finished
    done = upload.finish()
    assert done == store.head("k")
    assert read(store, "k", 0, len(large), version=done.version) == large


def test_one_part_is_put_whole(store: S3Store, server: S3Server) -> None:
    data = content(100_000)
    upload = store.upload("k", [(0, len(data))])
    assert not upload.has(0, lambda: chunk(data))
    assert upload.send(0, chunk(data))
    assert upload.finish().size == len(data)
    assert [each["operation"] for each in server.stats()["log"]] == ["PutObject"]
    assert read(store, "k", 0, len(data)) == data


def test_a_store_that_knows_no_checksums_says_so_and_takes_the_parts(
    transfer: Transfer, large: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(tmp_path / "root", checksums=False) as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        with opened(transfer=transfer) as store:
            upload = store.upload("k", PARTS)
            assert [upload.send(i, chunk(large[a:b])) for i, (a, b) in enumerate(PARTS)] == [False] * 3
            assert upload.finish().size == len(large)
            assert not store.upload("small", [(0, 9)]).send(0, chunk(b"nine byte"))
            assert read(store, "k", 0, len(large)) == large


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False])
def test_a_later_upload_takes_up_the_parts_that_a_killed_one_left(
    transfer: Transfer, large: bytes, checksums: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(tmp_path / "root", checksums=checksums) as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        with opened(transfer=transfer) as store:
            killed = store.upload("k", PARTS)
            for number in (0, 1):
                killed.send(number, chunk(large[slice(*PARTS[number])]))
            killed.leave()
        server.reset_stats()
        other = content(5 * MIB, seed=2)
        wanted = [large[: 5 * MIB], other, large[10 * MIB :]]  # the second part is another one now
        with opened(transfer=transfer) as store:
            upload = store.upload("k", PARTS)
            there = [upload.has(number, lambda data=data: chunk(data)) for number, data in enumerate(wanted)]  # type: ignore[misc]
            assert there == [True, False, False]
            for number in (1, 2):
                upload.send(number, chunk(wanted[number]))
            upload.finish()
            assert read(store, "k", 0, len(large)) == b"".join(wanted)
            assert server.stats()["operations"]["UploadPart"]["received"] == len(other) + 1234


def test_an_upload_that_another_pusher_has_completed_is_complete(store: S3Store, large: bytes) -> None:
    chunks = [chunk(large[start:stop]) for start, stop in PARTS]
    first = store.upload("k", PARTS)
    for number in (0, 1):
        first.send(number, chunks[number])
    second = store.upload("k", PARTS)
    assert [second.has(number, lambda n=number: chunks[n]) for number in range(3)] == [True, True, False]  # type: ignore[misc]
    second.send(2, chunks[2])
    second.finish()
    assert not first.send(2, chunks[2])
    assert first.finish().size == len(large)
    assert read(store, "k", 0, len(large)) == large


def test_an_upload_that_was_aborted_fails_clearly(store: S3Store, large: bytes) -> None:
    upload = store.upload("k", PARTS)
    upload.send(0, chunk(large[: 5 * MIB]))
    assert store.abort_uploads("", before=time.time() + 60) == 1
    with pytest.raises(MissingError, match="k: 404 NoSuchUpload"):
        upload.send(1, chunk(large[5 * MIB : 10 * MIB]))
    assert store.head("k") is None


def test_parts_that_are_too_small_are_the_stores_to_refuse(store: S3Store) -> None:
    parts = [(0, 10), (10, 20)]
    upload = store.upload("k", parts)
    for number in range(2):
        upload.send(number, chunk(b"0123456789"))
    with pytest.raises(StoreError, match="k: the store answered 400 EntityTooSmall"):
        upload.finish()
    assert store.head("k") is None


def test_a_file_that_became_shorter_while_it_is_sent_ends_the_upload_at_once(
    store: S3Store, server: S3Server, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(1000))
    with path.open("rb") as file, pytest.raises(SourceError, match="became shorter"):
        store.upload("k", [(0, 2000)]).send(0, Chunk(FileRange(file.fileno(), 0, 2000)))
    assert server.stats()["requests"] <= 1
    assert store.head("k") is None


# ------------------------------------------------------------------------------------------------- list, delete, abort


def test_a_list_goes_over_pages_and_keeps_to_its_prefix(store: S3Store, server: S3Server) -> None:
    for number in range(1003):
        (server.root / BUCKET / percent(f"{store.client.prefix}many/{number:04}", safe="")).write_bytes(
            b"x" * 3
        )
    odd = [f"odd/{name}" for name in ("a b", "a+b", "a&b<c>", "ü/日本", "%41", "a\"'b", "trailing/")]
    for key in [*odd, "manyother"]:
        store.put(key, b"odd")
    server.reset_stats()
    assert {each.key for each in store.list("many/")} == {f"many/{number:04}" for number in range(1003)}
    assert server.stats()["operations"]["ListObjectsV2"]["requests"] == 2
    found = {each.key: each for each in store.list("odd/")}
    assert sorted(found) == sorted(odd)
    for key, stat in found.items():
        assert stat.size == 3
        head = store.head(key)
        assert head is not None
        assert stat.version == head.version
    assert list(store.list("nothing/")) == []


def test_a_list_that_fails_on_its_second_page_raises(store: S3Store, server: S3Server) -> None:
    for number in range(1003):
        (server.root / BUCKET / percent(f"{store.client.prefix}{number:04}", safe="")).write_bytes(b"")
    server.fault("status", code=403, skip=1, method="GET")
    with pytest.raises(DeniedError):
        list(store.list(""))


def test_deleting_removes_and_what_is_gone_is_no_error(store: S3Store) -> None:
    for key in ("one", "two", "three"):
        store.put(key, b"")
    store.delete(["one", "absent", "two"])
    assert [each.key for each in store.list("")] == ["three"]


def test_only_stale_uploads_below_the_prefix_are_aborted(store: S3Store, large: bytes) -> None:
    for key in ("blobs/a", "blobs/b", "other/c"):
        store.upload(key, PARTS).send(0, chunk(large[: 5 * MIB]))
    assert store.abort_uploads("blobs/", before=time.time() - 60) == 0
    assert store.abort_uploads("blobs/", before=time.time() + 60) == 2
    assert store.abort_uploads("", before=time.time() + 60) == 1


# -------------------------------------------------------------------------------------------------------- credentials


def test_a_wrong_secret_or_an_unknown_key_is_refused_at_once(
    server: S3Server, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value, code in (
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "unknown", "InvalidAccessKeyId"),
    ):
        monkeypatch.setenv(name, value)
        with opened(transfer=transfer) as store:
            server.reset_stats()
            for verb in (
                lambda: read(store, "k", 0, 1),
                lambda: store.put("k", b""),
                lambda: store.upload("k", [(0, 1)]).send(0, chunk(b"x")),
            ):
                with pytest.raises(DeniedError, match=f"k: the store refuses: 403 {code}"):
                    verb()
            assert server.stats()["requests"] == 3
            with pytest.raises(DeniedError, match=code):  # the answer to a HEAD does not say why
                store.head("k")
            with pytest.raises(DeniedError, match=code):
                list(store.list(""))
            assert server.stats()["requests"] == 6


def test_without_credentials_nothing_is_asked(
    server: S3Server, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with opened(transfer=transfer) as store:
        for verb in (lambda: read(store, "k", 0, 1), lambda: store.head("k")):
            with pytest.raises(DeniedError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
                verb()
    assert server.stats()["requests"] == 0


def test_half_of_the_credentials_is_an_error_that_says_so(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DeniedError, match="Partial credentials"), opened() as store:
        store.head("k")


def test_a_session_token_is_sent_and_an_expired_one_is_denied_at_once(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(tmp_path / "root", session_token="old/token+1==") as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        with opened(transfer=transfer) as store:
            store.put("k", b"some bytes")
            assert read(store, "k", 0, 4) == b"some"
            server.rotate("new-key", "new-secret", "new-token")
            server.reset_stats()
            for verb in (
                lambda: read(store, "k", 0, 1),
                lambda: store.put("k", b""),
                lambda: list(store.list("")),
            ):
                with pytest.raises(DeniedError, match="credentials have expired; renew them"):
                    verb()
            assert server.stats()["requests"] == 3
            with pytest.raises(DeniedError, match="credentials have expired"):
                store.head("k")


def write_credentials(path: Path, server: S3Server, profile: str = "default") -> None:
    lines = [f"[{profile}]", f"aws_access_key_id={server.access_key}"]
    lines += [f"aws_secret_access_key={server.secret_key}"]
    lines += [f"aws_session_token={server.session_token}"] if server.session_token else []
    path.write_text("\n".join(lines) + "\n")


def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_credentials_that_were_renewed_in_their_file_meanwhile_are_read_again(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By every thread and every verb, once."""
    with serve(tmp_path / "root", session_token="first") as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        without_keys(monkeypatch)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        write_credentials(tmp_path / "credentials", server)
        data = content(100_000)
        with opened(transfer=transfer) as store:
            store.put("k", data)

            def rotate(number: int) -> None:
                server.rotate(f"key-{number}", f"secret-{number}", f"token-{number}")
                write_credentials(tmp_path / "credentials", server)
                server.reset_stats()

            rotate(1)
            assert read(store, "k", 5, 1000) == data[5:1000]
            assert server.stats()["requests"] == 2
            for number, verb in enumerate(
                (lambda: store.head("k"), lambda: store.put("k", data), lambda: list(store.list(""))), 2
            ):
                rotate(number)
                assert verb()
            rotate(5)
            together = threading.Barrier(8)

            def read_at_once(at: int) -> bytes:
                together.wait()
                return read(store, "k", at, at + 1000)

            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(read_at_once, range(8))) == [data[at : at + 1000] for at in range(8)]
            assert server.stats()["requests"] <= 16


def test_a_profile_brings_its_credentials_and_its_endpoint(
    server: S3Server, transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_keys(monkeypatch)
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    write_credentials(tmp_path / "credentials", server, "mine")
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = {server.region}\nendpoint_url = {server.endpoint}\n"
    )
    with opened("profile", transfer=transfer, profile="mine") as store:
        store.put("k", b"bytes")
        assert read(store, "k", 0, 5) == b"bytes"
    with (
        opened(profile="absent") as other,
        pytest.raises(InputError, match=r"profile .*absent.* could not be found"),
    ):
        other.head("k")


def test_a_public_bucket_is_read_unsigned(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(tmp_path / "root", anonymous_read=True) as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        (server.root / BUCKET / "k").write_bytes(b"public")
        without_keys(monkeypatch)
        with opened(transfer=transfer, anonymous=True) as store:
            assert read_small(store, "k", most=10) is not None
            assert [each.key for each in store.list("")] == ["k"]
            with pytest.raises(DeniedError, match="403 AccessDenied"):
                store.put("k", b"")


def test_another_region_is_named_at_once(
    server: S3Server, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with opened(transfer=transfer, region="ap-south-1") as store:
        for verb in verbs(store).values():
            with pytest.raises(
                DeniedError,
                match=r"the bucket is in us-east-1, the request went to .* for ap-south-1; set AWS_REGION",
            ):
                verb()
    assert server.stats()["requests"] == len(verbs(store)) + 1  # a HEAD does not say why


@pytest.mark.parametrize("offset", [3600, -3600])
def test_a_wrong_clock_is_named_with_its_error(
    transfer: Transfer, offset: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(tmp_path / "root", clock_offset=offset) as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        words = "behind" if offset > 0 else "ahead of"
        with opened(transfer=transfer) as store:
            for verb in (
                lambda: read(store, "k", 0, 1),
                lambda: store.head("k"),
                lambda: store.put("k", b""),
            ):
                with pytest.raises(
                    DeniedError, match=rf"clock of this machine is (3599|3600|3601) s {words} the"
                ):
                    verb()
        assert server.stats()["requests"] <= 4


# ---------------------------------------------------------------------------------------------------------- endpoints


def verbs(store: S3Store) -> dict[str, Callable[[], object]]:
    return {
        "head": lambda: store.head("k"),
        "get": lambda: read(store, "k", 0, 1),
        "put": lambda: store.put("k", b"x"),
        "put_if": lambda: store.put_if("k", b"x", version=None),
        "send": lambda: store.upload("k", [(0, 1)]).send(0, chunk(b"x")),
        "begin": lambda: store.upload("k", [(0, 1), (1, 2)]).send(0, chunk(b"x")),
        "has": lambda: store.upload("k", [(0, 1), (1, 2)]).has(0, lambda: chunk(b"x")),
        "list": lambda: list(store.list("")),
        "abort": lambda: store.abort_uploads("", before=0),
    }


@pytest.mark.parametrize("verb", ["head", "get", "send"])
def test_a_store_that_never_answers_is_given_up_before_the_deadline(
    server: S3Server, transfer: Transfer, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "UNREACHED", 0.5)
    with (
        retries() as found,
        opened(transfer=transfer, endpoint_url="http://127.0.0.1:9", deadline=60.0) as store,
        pytest.raises(StoreError, match=r"given up after \d+ tries"),
    ):
        verbs(store)[verb]()
    assert {each.deadline for each in found} == {0.5}


def test_a_store_that_answers_slow_down_is_there(
    store: S3Store, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet that starts at once is not told that the endpoint may be misspelt."""
    store.put("k", b"bytes")
    monkeypatch.setattr(s3_client, "UNREACHED", 0.0)
    for verb in ("head", "get", "list"):
        with opened(store.client.prefix.strip("/"), transfer=store.access.transfer) as fresh:
            server.fault("status", code=503, times=2)
            assert verbs(fresh)[verb]()


def test_an_endpoint_whose_name_is_unknown_is_said_to_be(server: S3Server, transfer: Transfer) -> None:
    with (
        opened(transfer=transfer, endpoint_url="http://store.invalid:9000", deadline=0.3) as store,
        pytest.raises(StoreError, match=r"store\.invalid"),
    ):
        read(store, "k", 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["<p>Log in<br>", "<html><body><p>Log in</p></body></html>"])
def test_an_endpoint_that_gives_pages_is_no_store(
    server: S3Server, transfer: Transfer, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "UNREACHED", 0.1)
    handler = type("Here", (s3fixtures.Page,), {"body": page.encode()})
    with (
        s3fixtures.http_server(handler) as endpoint,
        opened(transfer=transfer, endpoint_url=endpoint) as store,
    ):
        for verb in verbs(store).values():
            with (
                retries() as found,
                pytest.raises(StoreError, match=r"(an endpoint of S3|knows no ranges, or is not a store)"),
            ):
                verb()
            assert len(found) <= 4


@pytest.mark.parametrize(
    "endpoint", ["http://user:hunter2@ho st:9", "http://user:hunter2@", "user:hunter2@host"]
)
def test_what_an_endpoint_says_beside_its_host_is_never_shown(server: S3Server, endpoint: str) -> None:
    with pytest.raises(ShardprepError) as caught, opened(endpoint_url=endpoint, deadline=0.1) as store:
        store.head("k")
    assert "hunter2" not in str(caught.value)


def test_userinfo_in_an_endpoint_is_neither_used_nor_shown(
    server: S3Server, transfer: Transfer, prefix: str
) -> None:
    url = urlsplit(server.endpoint)
    with opened(prefix, transfer=transfer, endpoint_url=f"http://user:hunter2@{url.netloc}") as store:
        store.put("k", b"bytes")
        assert read(store, "k", 0, 5) == b"bytes"
        assert "hunter2" not in store.uri + store.client.host
        server.fault("status", code=403, times=0)
        for verb in verbs(store).values():
            with pytest.raises(StoreError) as caught:
                verb()
            assert "hunter2" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ proxies


def test_behind_a_proxy_everything_goes_through_it(
    server: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    handler = type("Here", (s3fixtures.Proxy,), {"seen": seen})
    with s3fixtures.http_server(handler) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with opened(prefix) as store:
            assert isinstance(store.mover, BotoMover)
            data = content(200_000)
            store.put("k", data)
            assert read(store, "k", 10, 100_000) == data[10:100_000]
            store.upload("up", [(0, len(data))]).send(0, chunk(data))
            assert len(list(store.list(""))) == 2
        assert len(seen) == server.stats()["requests"] == 4
        assert all(server.endpoint in line for line in seen)


def test_a_host_that_needs_no_proxy_is_reached_without(
    server: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with opened(prefix) as store:
        assert isinstance(store.mover, NativeMover)
        store.put("k", b"bytes")
        assert read(store, "k", 0, 5) == b"bytes"


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.slow
def test_no_secret_is_in_any_message_or_log(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret, token = "s3cr3t/k3y+0123456789abcdefABCDEF", "t0k3n//session+abcdef0123456789=="
    with serve(tmp_path / "root", secret_key=secret, session_token=token) as server:
        s3fixtures.isolate(monkeypatch, tmp_path, server)
        for name in ("shardprep", "shardprep_runtime"):
            caplog.set_level(logging.DEBUG, logger=name)
        said: list[str] = []

        def fail(store: S3Store) -> None:
            for name, verb in verbs(store).items():
                with pytest.raises(ShardprepError) as caught:
                    verb()
                said.append(f"{name}: " + "".join(traceback.format_exception(caught.value)))

        with opened(transfer=transfer, deadline=0.1) as store:
            for how in (
                {"code": 403},
                {"code": 400, "name": "ExpiredToken"},
                {"code": 400, "name": "InvalidToken"},
                {"code": 503},
                {"code": 301},
            ):
                server.fault("status", times=0, **how)
                fail(store)
                server.clear()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
        with opened(transfer=transfer, deadline=0.1) as store:
            fail(store)
        command = [str(Path(sys.executable).with_name("shardprep")), "pull", f"s3://{BUCKET}", "out", "--all"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "InvalidAccessKeyId" in done.stderr
        said += [done.stdout, done.stderr, caplog.text]
        for words in (
            "AWS4-HMAC",
            "Signature=",
            secret,
            token,
            percent(secret, safe=""),
            percent(token, safe=""),
        ):
            assert not [text for text in said if words in text]
