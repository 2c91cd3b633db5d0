"""What is promised of a store holds on servers that others wrote: OpenStack Swift's S3 API and Ceph's radosgw.

`scripts/test_s3` installs them and runs this.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import small_models
from lazily import torch
from retries import retries
from shardprep.publish.pull import pull
from shardprep.publish.push import push
from shardprep.publish.send import PART_BYTES
from shardprep.split import SplitOptions, split
from shardprep_runtime import load
from shardprep_runtime.errors import ConflictError, DeniedError, MissingError, SourceError, StoreError
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.s3 import S3Store
from shardprep_runtime.stores.s3_upload import unfinished
from shardprep_runtime.stores.store import (
    Access,
    BufferSink,
    Chunk,
    FileRange,
    Store,
    Transfer,
    read,
    read_small,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real stores")]  # one of each at a time

SERVERS = Path(__file__).resolve().parents[2] / "tools" / "servers"
MIB = 2**20
LEAST_PART = 5 * MIB
"""That S3 allows, except for the last."""

BUCKET = "shards"
TRANSFERS: list[Transfer] = ["native", "boto3"]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs now."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    region: str

    @property
    def replaces_conditionally(self) -> bool:
        """Whether it knows If-Match on a PUT."""
        return self.name == "radosgw"


@pytest.fixture(scope="module", params=["swift", "radosgw"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, str(SERVERS / f"{request.param}.py")]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    if check.returncode:
        pytest.skip(check.stderr.strip())
    root = tmp_path_factory.mktemp(request.param)
    with subprocess.Popen(
        [*command, "--root", str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        about = program.stdout.readline()
        assert about, "the server did not start; its words are above"
        yield Server(request.param, **json.loads(about))
        program.communicate()  # closes its standard input
    assert program.returncode == 0


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what belongs to the server: nothing of the user's, and no request to a cloud's metadata."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": server.region,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=TRANSFERS)
def transfer(request: pytest.FixtureRequest) -> Transfer:
    found: Transfer = request.param
    return found


@pytest.fixture
def store(server: Server, transfer: Transfer, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    name = request.node.originalname.removeprefix("test_")
    with opened(server, transfer, prefix=f"{name}/{transfer}") as found:
        with suppress(found.client.boto.exceptions.BucketAlreadyOwnedByYou):
            found.client.boto.create_bucket(Bucket=BUCKET)
        yield found


def opened(
    server: Server, transfer: Transfer = "native", *, prefix: str = "", bucket: str = BUCKET, **access: Any
) -> S3Store:
    access = {"endpoint_url": server.endpoint, "transfer": transfer, "deadline": 20.0} | access
    found = open_store(f"s3://{bucket}/{prefix}".rstrip("/"), Access(**access))
    assert isinstance(found, S3Store)
    return found


def content(size: int, *, seed: int = 1) -> bytes:
    """Bytes that are nowhere the same for long."""
    whole = b"".join(zlib.crc32(b"%d %d" % (seed, at)).to_bytes(4, "big") for at in range(size // 4 + 1))
    return whole[:size]


def chunk(data: bytes) -> Chunk:
    return Chunk(data, zlib.crc32(data))


def cut(data: bytes, parts: Sequence[tuple[int, int]]) -> list[Chunk]:
    return [chunk(data[start:stop]) for start, stop in parts]


PARTS = [(0, LEAST_PART), (LEAST_PART, 2 * LEAST_PART), (2 * LEAST_PART, 2 * LEAST_PART + 1234)]


@pytest.fixture(scope="session")
def large() -> bytes:
    """What PARTS cut."""
    return content(PARTS[-1][1])


# ------------------------------------------------------------------------------------------------------ small objects


@pytest.mark.parametrize("key", ["plain", "a b+c&d=e/ü%20~.json", "x" * 200])
def test_what_is_put_is_found_and_read(store: Store, key: str) -> None:
    data = content(100_000)
    assert store.head(key) is None
    put = store.put(key, data)
    found = store.head(key)
    assert found is not None
    assert (found.key, found.size, found.version) == (key, len(data), put.version)
    assert abs(found.modified - time.time()) < 60
    assert read_small(store, key, most=len(data)) == (data, found)
    for start, stop in ((0, 1), (10, 20), (len(data) - 5, len(data)), (0, len(data)), (1, len(data))):
        assert read(store, key, start, stop) == data[start:stop]


def test_an_object_of_no_bytes_can_be_put(store: Store) -> None:
    store.put("empty", b"")
    found = store.head("empty")
    assert found is not None
    assert found.size == 0


def test_a_range_is_read_in_the_version_that_was_asked_for_or_not_at_all(store: Store) -> None:
    old = store.put("k", b"old bytes").version
    assert read(store, "k", 0, 3, version=old) == b"old"
    new = store.put("k", b"new bytes").version
    assert new != old
    with pytest.raises(SourceError, match="replaced while it was read"):
        read(store, "k", 0, 3, version=old)
    assert read(store, "k", 0, 3, version=new) == b"new"


@pytest.mark.parametrize("start", [0, 4, 9, 100])
def test_a_range_beyond_the_end_is_an_error_of_the_source(store: Store, start: int) -> None:
    store.put("k", b"nine byte")
    with pytest.raises(SourceError):
        read(store, "k", start, start + 10)


def test_a_missing_object_is_none_to_head_and_an_error_to_get(store: Store) -> None:
    assert store.head("absent") is None
    with pytest.raises(MissingError, match="absent: no such object"):
        read(store, "absent", 0, 1)


def test_an_object_is_put_only_where_there_is_none(store: Store) -> None:
    put = store.put_if("once", b"first", version=None)
    with pytest.raises(ConflictError, match="written by somebody else"):
        store.put_if("once", b"second", version=None)
    assert read_small(store, "once", most=10) == (b"first", store.head("once"))
    assert put.size == 5


def test_an_object_is_replaced_only_in_its_version(server: Server, store: Store) -> None:
    old = store.put("name", b"first").version
    if not server.replaces_conditionally:
        with pytest.raises(StoreError, match="cannot replace an object conditionally; use a new name"):
            store.put_if("name", b"second", version=old)
        assert read(store, "name", 0, 5) == b"first"
        return
    new = store.put_if("name", b"second", version=old).version
    with pytest.raises(ConflictError):
        store.put_if("name", b"third!", version=old)
    assert read(store, "name", 0, 6, version=new) == b"second"


def test_replacing_what_is_gone_is_a_conflict(server: Server, store: Store) -> None:
    if not server.replaces_conditionally:
        pytest.skip("knows no If-Match on a PUT")
    version = store.put("gone", b"first").version
    store.delete(["gone"])
    with pytest.raises(ConflictError):
        store.put_if("gone", b"second", version=version)
    assert store.head("gone") is None


def test_of_many_who_put_at_once_one_is_first(server: Server, store: Store) -> None:
    def put(number: int) -> int | None:
        try:
            store.put_if("race", b"%d" % number, version=None)
        except ConflictError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        won = [each for each in pool.map(put, range(8)) if each is not None]
    # Swift looks and then writes, so that two may pass between; names that nobody replaces do not mind
    assert len(won) == 1 or (server.name == "swift" and won)
    assert read(store, "race", 0, 1) in [b"%d" % each for each in won]


def test_a_list_goes_over_pages_and_keeps_to_its_prefix(store: Store) -> None:
    keys = {f"many/{number:03}/ü" for number in range(45)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), [*keys, "manyother", "other"]))
    found = list(store.list("many/"))
    assert {each.key for each in found} == keys
    assert len(found) == len(keys)
    for each in found[:3]:
        stat = store.head(each.key)
        assert stat is not None
        assert (each.size, each.version) == (stat.size, stat.version)
        assert abs(each.modified - stat.modified) < 2  # HTTP's dates have whole seconds
    assert list(store.list("nothing/")) == []


def test_deleting_removes_and_what_is_gone_is_no_error(store: Store) -> None:
    for key in "ab":
        store.put(key, b"x")
    store.delete(["a", "never"])
    assert [each.key for each in store.list("")] == ["b"]
    store.delete(["a", "b"])
    assert store.head("b") is None


# ------------------------------------------------------------------------------------------------------------ uploads


def test_parts_may_be_sent_in_any_order_by_several_threads(
    store: Store, large: bytes, tmp_path: Path
) -> None:
    upload = store.upload("big", PARTS)
    assert list(upload.parts) == PARTS
    file = tmp_path / "big"
    file.write_bytes(large)
    with file.open("rb") as source, ThreadPoolExecutor(3) as pool:

        def send(number: int) -> bool:
            start, stop = PARTS[number]
            return upload.send(number, Chunk(FileRange(source.fileno(), start, stop)))

        sent = [pool.submit(send, number) for number in (2, 0, 1)]
        assert [each.result() for each in sent] == [False] * 3  # no checksum was given
    assert store.head("big") is None, "nothing stands there before the end"
    stat = upload.finish()
    assert stat.size == len(large)
    assert stat == store.head("big")
    assert read(store, "big", 0, len(large), version=stat.version) == large


def test_one_part_is_put_whole(store: Store) -> None:
    data = content(70_000)
    upload = store.upload("one", [(0, len(data))])
    assert not upload.has(0, lambda: chunk(data))
    upload.send(0, chunk(data))
    stat = upload.finish()
    assert stat.size == len(data)
    assert read(store, "one", 0, len(data), version=stat.version) == data


def test_a_part_that_arrives_as_other_bytes_is_never_accepted_as_checked(
    server: Server, store: Store
) -> None:
    wrong = Chunk(b"these bytes", zlib.crc32(b"other bytes"))
    upload = store.upload("wrong", [(0, 11)])
    if server.name == "swift":  # it checks
        with pytest.raises(StoreError, match="BadDigest"):
            upload.send(0, wrong)
        assert store.head("wrong") is None
    else:
        assert upload.send(0, wrong) is False


def test_a_later_upload_takes_up_the_parts_that_an_earlier_one_left(store: Store, large: bytes) -> None:
    chunks = cut(large, PARTS)
    first = store.upload("resumed", PARTS)
    for number in (2, 0):
        first.send(number, chunks[number])
    first.leave()

    second = store.upload("resumed", PARTS)
    asked: list[int] = []

    def has(number: int, given: Chunk) -> bool:
        def compute() -> Chunk:
            asked.append(number)
            return given

        return second.has(number, compute)

    assert [has(number, chunks[number]) for number in range(3)] == [True, False, True]
    assert asked == [0, 2], "what is not there need not be computed"
    second.send(1, chunks[1])
    stat = second.finish()
    assert read(store, "resumed", 0, len(large), version=stat.version) == large
    assert store.abort_uploads("", before=time.time() + 3600) == 0


def test_a_part_that_is_there_with_other_bytes_is_sent_again(store: Store, large: bytes) -> None:
    other = cut(content(len(large), seed=2), PARTS)
    first = store.upload("other", PARTS)
    for number in range(3):
        first.send(number, other[number])
    first.leave()
    chunks = cut(large, PARTS)
    second = store.upload("other", PARTS)
    for number, given in enumerate(chunks):
        assert not second.has(number, lambda given=given: given)  # type: ignore[misc]
        second.send(number, given)
    second.finish()
    assert read(store, "other", 0, len(large)) == large


def test_parts_that_were_left_are_found_over_several_pages(server: Server, store: Store) -> None:
    size = 4 * LEAST_PART + 7
    edges = [*range(0, size, LEAST_PART), size]
    parts = list(pairwise(edges))
    chunks = cut(content(size, seed=3), parts)
    first = store.upload("pages", parts)
    for number, given in enumerate(chunks):
        first.send(number, given)
    first.leave()
    second = store.upload("pages", parts)
    assert all(second.has(number, lambda given=given: given) for number, given in enumerate(chunks))  # type: ignore[misc]
    assert second.finish().size == size


def test_an_upload_that_somebody_else_completed_is_complete(store: S3Store, large: bytes) -> None:
    """What is sent twice because an answer was lost, or by two at once, is the same by its name."""
    chunks = cut(large, PARTS)
    one = store.upload("twice", PARTS)
    for number, given in enumerate(chunks):
        one.send(number, given)
    two = store.upload("twice", PARTS)
    assert all(two.has(number, lambda given=given: given) for number, given in enumerate(chunks))  # type: ignore[misc]
    stat = one.finish()
    two.send(1, chunks[1])
    assert two.finish().size == stat.size
    assert read(store, "twice", 0, len(large)) == large


def test_an_upload_that_was_aborted_fails_clearly(store: S3Store, large: bytes) -> None:
    chunks = cut(large, PARTS)
    upload = store.upload("aborted", PARTS)
    upload.send(0, chunks[0])
    assert store.abort_uploads("abort", before=time.time() + 3600) == 1
    with pytest.raises(StoreError, match="NoSuchUpload"):
        upload.send(1, chunks[1])
    with pytest.raises(StoreError, match="NoSuchUpload"):
        upload.finish()
    assert store.head("aborted") is None


def test_only_stale_uploads_below_the_prefix_are_aborted(store: S3Store) -> None:
    data = content(LEAST_PART)
    for key in ("blobs/a", "blobs/b", "other/c"):
        store.upload(key, PARTS).send(0, chunk(data))
    assert store.abort_uploads("blobs/", before=time.time() - 3600) == 0
    assert store.abort_uploads("blobs/", before=time.time() + 3600) == 2
    left = [each["Key"].removeprefix(store.client.prefix) for each in unfinished(store.client, "")]
    assert left == ["other/c"]
    assert store.abort_uploads("", before=time.time() + 3600) == 1
    assert list(unfinished(store.client, "")) == []


def test_unfinished_uploads_are_found_over_several_pages(store: S3Store) -> None:
    for number in range(23):
        store.client.boto.create_multipart_upload(Bucket=BUCKET, Key=f"{store.client.prefix}u/{number:02}")
    assert store.abort_uploads("u/", before=time.time() + 3600) == 23
    assert list(unfinished(store.client, "u/")) == []


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("verb", ["head", "get", "put", "put_if", "list", "upload", "delete"])
def test_a_wrong_secret_is_refused_at_once(
    server: Server, transfer: Transfer, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "not-the-secret-of-this-server"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with opened(server, transfer) as store:
        with retries() as found, pytest.raises(DeniedError) as refused:
            do(store, verb)
        assert found == []
    assert secret not in str(refused.value)
    assert server.secret_key not in str(refused.value)


@pytest.mark.parametrize("verb", ["get", "put", "put_if", "list", "upload"])
def test_an_unknown_bucket_is_missing(server: Server, transfer: Transfer, verb: str) -> None:
    with (
        opened(server, transfer, bucket="never-made") as store,
        pytest.raises(MissingError, match="no such bucket"),
    ):
        do(store, verb)


def do(store: Store, verb: str) -> None:
    match verb:
        case "head":
            store.head("k")
        case "get":
            read(store, "k", 0, 1)
        case "put":
            store.put("k", b"x")
        case "put_if":
            store.put_if("k", b"x", version=None)
        case "list":
            list(store.list(""))
        case "upload":
            store.upload("k", [(0, 1)]).send(0, chunk(b"x"))
        case "delete":
            store.delete(["k"])


# -------------------------------------------------------------------------------------------------- a broken connection


class Cutter:
    """A port that passes everything on to the server, and breaks the first connections after some bytes of answers."""

    def __init__(self, endpoint: str, cuts: Sequence[int]) -> None:
        self._to = urlsplit(endpoint)
        self._cuts = list(cuts)
        self.passed = 0
        """Bytes of answers."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection((str(self._to.hostname), int(self._to.port or 80)))
            limit = self._cuts.pop(0) if self._cuts else None
            for arguments in ((near, far, None, False), (far, near, limit, True)):
                thread = threading.Thread(target=self._pass, args=arguments)
                thread.start()
                self._threads.append(thread)

    def _pass(self, source: socket.socket, target: socket.socket, limit: int | None, counts: bool) -> None:
        done = 0
        with suppress(OSError):
            while data := source.recv(65536 if limit is None else min(65536, limit - done)):
                target.sendall(data)
                done += len(data)
                if counts:
                    self.passed += len(data)
                if done == limit:
                    break
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        if counts:
            self._closing = [source, target]
            source.close()
            target.close()

    def __enter__(self) -> Cutter:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in self._threads:
            each.join(20)


def test_a_broken_transfer_goes_on_at_the_byte(server: Server, store: S3Store, transfer: Transfer) -> None:
    data = content(3 * MIB)
    stat = store.put("cut", data)
    with (
        Cutter(server.endpoint, [MIB, MIB // 2, 100]) as cutter,
        opened(
            server, transfer, prefix=store.client.prefix.strip("/"), endpoint_url=cutter.endpoint
        ) as broken,
    ):
        assert read(broken, "cut", 1, len(data), version=stat.version) == data[1:]
        passed = cutter.passed
    assert passed < len(data) + 300_000, "what had landed came again"


def test_a_transfer_does_not_go_on_in_another_object(
    server: Server, store: S3Store, transfer: Transfer
) -> None:
    old, new = content(2 * MIB, seed=4), content(2 * MIB, seed=5)
    store.put("swapped", old)

    class Swap(BufferSink):
        """Replaces the object once its first bytes have landed."""

        swapped = False

        def landed(self, count: int) -> None:
            super().landed(count)
            if not self.swapped:
                self.swapped = True
                store.put("swapped", new)

    with (
        Cutter(server.endpoint, [MIB]) as cutter,
        opened(
            server, transfer, prefix=store.client.prefix.strip("/"), endpoint_url=cutter.endpoint
        ) as broken,
        pytest.raises(SourceError, match="replaced while it was read"),
    ):
        broken.get("swapped", 0, Swap(memoryview(bytearray(len(old)))))


# --------------------------------------------------------------------------------------------------- the whole journey


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set whose larger parts go up in several requests."""
    folder = tmp_path_factory.mktemp("shards")
    config = small_models.llama_config(vocab=50_000, head_dim=64)
    tensors = small_models.random_tensors(small_models.llama_shapes(config))
    small_models.write_checkpoint(folder / "source", tensors, config)
    split(folder / "source", folder / "set", tensor_parallel_size=2, options=SplitOptions(block_bytes=MIB))
    assert max(path.stat().st_size for path in (folder / "set").iterdir()) > PART_BYTES
    return folder / "set"


def test_what_is_pushed_is_pulled_and_loaded_as_it_was(
    server: Server, store: S3Store, transfer: Transfer, shards: Path, tmp_path: Path
) -> None:
    access = Access(endpoint_url=server.endpoint, transfer=transfer, deadline=20.0)
    report = push(shards, store.uri, access=access)
    assert report.blobs_sent > 0
    assert push(shards, store.uri, access=access).blobs_sent == 0
    pull(open_set(store.uri, access=access), tmp_path / "pulled")
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()} == files
    for rank in (0, 1):
        view = {"rank": rank, "tensor_parallel_size": 2}
        with (
            load(shards, **view) as expected,
            load(store.uri, cache=None, access=access, **view) as found,
        ):
            assert set(found) == set(expected)
            for name in expected:
                assert torch.equal(found[name], expected[name])
