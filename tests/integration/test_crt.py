"""What is promised of the transfer holds over awscrt's connections too: faults, TLS, credentials that are renewed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import s3fixtures
from s3fixtures import BUCKET, chunk, content, opened
from s3server import S3Server
from shardprep_runtime.errors import DeniedError, SourceError, StoreError
from shardprep_runtime.store import BufferSink, Chunk, FileRange, read

pytest.importorskip("awscrt", reason="needs awscrt: pip install 'shardprep[crt]'")

from shardprep_runtime.crt import WINDOW, CrtMover

pytestmark = pytest.mark.slow

MIB = 2**20


@pytest.fixture(scope="module", params=["plain", "tls"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3"), tls=request.param == "tls") as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    s3fixtures.isolate(monkeypatch, tmp_path, running)
    running.clear()
    running.reset_stats()
    return running


class Counting(BufferSink):
    """Keeps what came."""

    def __init__(self, size: int) -> None:
        self.into = bytearray(size)
        super().__init__(memoryview(self.into))


def test_a_range_larger_than_the_window_comes_whole_and_the_connection_is_used_again(
    server: S3Server,
) -> None:
    data = content(3 * WINDOW + 5)
    with opened("window", transfer="crt") as store:
        assert isinstance(store.mover, CrtMover)
        version = store.put("k", data).version
        for start in (0, 1, 2):
            assert read(store, "k", start, len(data), version=version) == data[start:]
        assert len(store.mover._idle) == 1


def test_a_slow_receiver_is_no_stalled_connection(server: S3Server) -> None:
    """What waits is the sink: the window closes, and the idle timeout is not counted."""
    data = content(2 * WINDOW)

    class Slow(Counting):
        def landed(self, count: int) -> None:
            super().landed(count)
            if self.left and self.left < len(data) // 2 and not slept:
                slept.append(time.sleep(1.5))

    slept: list[None] = []
    with opened("slow", transfer="crt", idle_timeout=0.5) as store:
        store.put("k", data)
        server.reset_stats()
        sink = Slow(len(data))
        store.get("k", 0, sink)
        assert bytes(sink.into) == data
        assert server.stats()["requests"] == 1


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("status", {"code": 503, "times": 3}),
        ("reset", {"times": 2, "after": 700_000}),
        ("truncate", {"times": 3, "after": 300_000}),
        ("stall", {"times": 1, "after": 900_000}),
        ("drip", {"times": 1, "rate": 2000}),
        ("hang", {"times": 1}),
    ],
)
def test_what_passes_is_waited_for_and_what_landed_is_not_fetched_again(
    server: S3Server, fault: str, how: dict[str, Any]
) -> None:
    data = content(2 * MIB)
    with opened("faults", transfer="crt", idle_timeout=0.7) as store:
        version = store.put("k", data).version
        server.reset_stats()
        server.fault(fault, method="GET", **how)
        sink = Counting(len(data) - 1)
        began = time.monotonic()
        assert store.get("k", 1, sink, version=version) == version
        assert time.monotonic() - began < 4
    assert bytes(sink.into) == data[1:]
    stats = server.stats()
    assert stats["modes"] == {fault: how["times"]}
    # bytes that were on the way when a connection was reset are lost with it
    assert stats["sent"] < len(data) + how["times"] * (how.get("after", 0) + 300_000)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("shift", None),
        ("wrong_range", None),
        ("html", StoreError),
        ("gzip", StoreError),
    ],
)
def test_an_answer_of_other_bytes_is_not_believed(
    server: S3Server, fault: str, error: type[Exception] | None
) -> None:
    data = content(MIB)
    with opened("wrong", transfer="crt") as store:
        version = store.put("k", data).version
        server.fault(fault, method="GET", times=1 if error is None else 0)
        if error is not None:
            with pytest.raises(error):
                read(store, "k", 5, MIB, version=version)
        else:
            found = read(store, "k", 5, MIB, version=version)
            # a shift keeps every header: only a digest of the bytes can tell
            assert found == data[5:] or fault == "shift"


def test_uploads_go_from_files_and_memory_and_are_checked(server: S3Server, tmp_path: Path) -> None:
    parts = [(0, 5 * MIB), (5 * MIB, 10 * MIB), (10 * MIB, 10 * MIB + 77)]
    data = content(parts[-1][1])
    file = tmp_path / "file"
    file.write_bytes(data)
    with opened("up", transfer="crt") as store, file.open("rb") as source:
        upload = store.upload("k", parts)
        first, second, third = (chunk(data[start:stop]) for start, stop in parts)
        sent = [
            (1, Chunk(FileRange(source.fileno(), *parts[1]), second.crc32)),
            (2, third),
            (0, Chunk(memoryview(data)[: parts[0][1]], first.crc32)),
        ]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda each: upload.send(*each), sent)) == [True] * 3
        stat = upload.finish()
        assert read(store, "k", 0, len(data), version=stat.version) == data
        with pytest.raises(StoreError, match="BadDigest"):
            store.upload("bad", [(0, 5)]).send(0, Chunk(b"these", 12345))
        assert store.head("bad") is None


@pytest.mark.parametrize("fault", ["status", "reset", "lost_response", "drop_upload"])
def test_a_part_that_fails_is_sent_again(server: S3Server, fault: str) -> None:
    data = content(3 * MIB)
    with opened("again", transfer="crt", idle_timeout=0.7) as store:
        store.put("warm", b"x")
        how = {"code": 503} if fault == "status" else {"after": 100_000} if fault == "drop_upload" else {}
        server.fault(fault, method="PUT", times=2, **how)
        upload = store.upload("k", [(0, len(data))])
        assert upload.send(0, chunk(data)) is True
        assert read(store, "k", 0, len(data), version=upload.finish().version) == data


def test_a_refusal_before_the_body_was_sent_is_read(server: S3Server) -> None:
    with opened("denied", transfer="crt") as store:
        server.fault("status", code=403, times=0, method="PUT")
        began = time.monotonic()
        with pytest.raises(DeniedError, match="AccessDenied"):
            store.upload("k", [(0, 20 * MIB)]).send(0, chunk(bytes(20 * MIB)))
        assert time.monotonic() - began < 4


def test_a_file_that_becomes_shorter_is_told_at_once(server: S3Server, tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(bytes(1000))
    with opened("short", transfer="crt") as store, file.open("rb") as source:
        with pytest.raises(SourceError, match="cannot be read: it became shorter"):
            store.upload("k", [(0, 9000)]).send(0, Chunk(FileRange(source.fileno(), 0, 9000)))
        assert store.head("k") is None


def test_an_error_of_the_sink_ends_the_read_and_the_store_can_be_used_on(server: S3Server) -> None:
    class Full(Counting):
        def landed(self, count: int) -> None:
            raise OSError(28, "the sink's own")

    with opened("sink", transfer="crt") as store:
        store.put("k", content(2 * WINDOW))
        with pytest.raises(OSError, match="the sink's own"):
            store.get("k", 0, Full(2 * WINDOW))
        assert read(store, "k", 0, 5) == content(5)


def test_nobody_listening_is_said_in_time(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("x", transfer="crt", endpoint_url="http://127.0.0.1:1", deadline=1.0) as store:
        began = time.monotonic()
        with pytest.raises(StoreError, match="cannot be reached"):
            read(store, "k", 0, 1)
        assert time.monotonic() - began < 4


def test_a_certificate_that_is_not_trusted_is_refused(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not server.tls:
        pytest.skip("has no certificate")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with opened("x", transfer="crt") as store, pytest.raises(StoreError, match="AWS_CA_BUNDLE"):
        read(store, "k", 0, 1)


def test_a_process_ends_with_connections_open(server: S3Server) -> None:
    """awscrt's threads do not keep it."""
    code = f"""
from shardprep_runtime.store import Access, open_store, read
store = open_store("s3://{BUCKET}/end", Access(transfer="crt"))
store.put("k", b"abc")
print(read(store, "k", 0, 3))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "b'abc'\n", "")


def test_what_stalled_does_not_go_on_in_another_object(server: S3Server) -> None:
    """Nobody asked for a version: the one of the bytes that have landed counts."""
    old, new = content(2 * MIB, seed=2), content(2 * MIB, seed=3)

    class Swap(Counting):
        swapped = False

        def landed(self, count: int) -> None:
            super().landed(count)
            if not self.swapped:
                self.swapped = True
                store.put("k", new)

    with opened("swap", transfer="crt", idle_timeout=0.7) as store:
        store.put("k", old)
        server.fault("stall", method="GET", after=MIB)
        with pytest.raises(SourceError, match="replaced while it was read"):
            store.get("k", 0, Swap(len(old)))
