"""A store in a folder keeps the promises of a store: whole objects, conditional puts, honest listings."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardprep_runtime.errors import (
    ConflictError,
    FormatError,
    InputError,
    ManifestError,
    MissingError,
    SourceError,
    StoreError,
)
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import BufferSink, Chunk, FileRange, read, read_small

HOSTILE = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a/", "a\\b", "a\0b", "\udcff\ud800"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FolderStore]:
    with FolderStore(tmp_path / "store") as found:
        yield found


def uploads(store: FolderStore) -> list[str]:
    """Unfinished files."""
    return [path.name for path in (store.folder / ".uploads").iterdir() if path.name != "lock"]


# ------------------------------------------------------------------------------------------------------------- verbs


def test_what_was_put_is_found(store: FolderStore) -> None:
    made = store.put("blobs/a", b"one")
    assert (made.key, made.size) == ("blobs/a", 3)
    assert abs(made.modified - time.time()) < 60
    assert store.head("blobs/a") == made
    assert read(store, "blobs/a", 0, 3) == b"one"
    assert read(store, "blobs/a", 1, 2) == b"n"
    assert read(store, "blobs/a", 2, 2) == b""
    assert uploads(store) == []


def test_what_is_not_there(store: FolderStore) -> None:
    assert store.head("blobs/a") is None
    assert read_small(store, "blobs/a", most=10) is None
    with pytest.raises(MissingError, match=r"store/blobs/a: no such object"):
        read(store, "blobs/a", 0, 1)
    store.put("blobs", b"a file where others have a folder")
    assert store.head("blobs/a") is None
    with pytest.raises(MissingError, match="no such object"):
        read(store, "blobs/a", 0, 1)
    store.delete(["blobs/b/c", "c"])


def test_a_folder_and_a_fifo_are_no_objects(store: FolderStore) -> None:
    store.put("a/b", b"x")
    os.mkfifo(store.folder / "fifo")
    assert store.head("a") is None
    assert store.head("fifo") is None
    for key in ("a", "fifo"):
        with pytest.raises(SourceError, match="cannot be read"):
            read(store, key, 0, 1)
    assert [each.key for each in store.list("")] == ["a/b"]


def test_what_cannot_be_written_is_an_error_of_the_store(store: FolderStore) -> None:
    store.put("a", b"x")
    store.put("b/c", b"x")
    for key in ("a/b", "b"):
        for put in (
            lambda key=key: store.put(key, b"y"),
            lambda key=key: store.put_if(key, b"y", version=None),
            lambda key=key: finish(store, key, b"y"),
        ):
            with pytest.raises(StoreError, match=r"cannot be written: (File exists|Is a directory)"):
                put()
    assert uploads(store) == []
    assert (store.folder / "a").read_bytes() == b"x"
    blocked = FolderStore(store.folder / "a")
    with pytest.raises(StoreError, match="cannot be written"):
        blocked.put("x", b"")


def finish(store: FolderStore, key: str, data: bytes) -> None:
    upload = store.upload(key, [(0, len(data))])
    upload.send(0, Chunk(data))
    try:
        upload.finish()
    finally:
        upload.leave()


def test_a_range_beyond_the_end_is_no_success(store: FolderStore) -> None:
    store.put("a", b"12345")
    with pytest.raises(SourceError, match="ends at byte 5, 2 more were expected"):
        read(store, "a", 3, 7)
    with pytest.raises(SourceError, match="ends at byte 9"):
        read(store, "a", 9, 10)


def test_a_small_object_is_read_whole_and_a_large_one_not_at_all(store: FolderStore) -> None:
    made = store.put("a", b"12345")
    assert read_small(store, "a", most=5) == (b"12345", made)
    with pytest.raises(FormatError, match="5 bytes, more than the 4"):
        read_small(store, "a", most=4)


def test_a_put_replaces_and_changes_the_version(store: FolderStore) -> None:
    versions = [store.put("a", b"%d" % i).version for i in range(10)]
    assert len(set(versions)) == 10
    assert read(store, "a", 0, 1, version=versions[-1]) == b"9"
    with pytest.raises(SourceError, match="was replaced while it was read; run again"):
        read(store, "a", 0, 1, version=versions[0])


class Meddler(BufferSink):
    """Does something between the first bytes and the rest."""

    def __init__(self, into: memoryview, meddle: Callable[[], object]) -> None:
        super().__init__(into)
        self.meddle: Callable[[], object] | None = meddle

    def room(self) -> memoryview:
        return super().room()[:2]

    def landed(self, count: int) -> None:
        super().landed(count)
        if self.meddle is not None:
            self.meddle()
            self.meddle = None


def test_an_object_that_is_replaced_while_it_is_read_is_read_as_it_was(store: FolderStore) -> None:
    before = store.put("a", b"before")
    into = bytearray(6)
    sink = Meddler(memoryview(into), lambda: store.put("a", b"after!"))
    assert store.get("a", 0, sink) == before.version
    assert into == b"before"


def test_a_file_that_is_written_over_while_it_is_read_is_noticed(store: FolderStore) -> None:
    store.put("a", b"before")

    def meddle() -> None:
        with (store.folder / "a").open("r+b") as stream:
            stream.write(b"after!")
            stream.truncate()

    with pytest.raises(SourceError, match="was replaced while it was read"):
        store.get("a", 0, Meddler(memoryview(bytearray(6)), meddle))


def test_an_upload_takes_its_parts_in_any_order_and_stands_nowhere_before(store: FolderStore) -> None:
    upload = store.upload("blobs/a", [(0, 3), (3, 6), (6, 7)])
    assert list(upload.parts) == [(0, 3), (3, 6), (6, 7)]
    assert not upload.has(0, lambda: Chunk(b"012"))
    for number, data in ((2, b"6"), (0, b"012"), (1, b"345")):
        assert upload.send(number, Chunk(memoryview(data))) is False
        assert store.head("blobs/a") is None
        assert list(store.list("")) == []
        assert list(store.list(".uploads/")) == []
    assert upload.finish().size == 7
    assert read(store, "blobs/a", 0, 7) == b"0123456"
    upload.leave()
    assert uploads(store) == []


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same file system", "another file system"])
def test_a_range_of_a_file_is_sent_from_the_file(store: FolderStore, tmp_path: Path, elsewhere: bool) -> None:
    source = Path(f"/dev/shm/shardprep-test-{os.getpid()}") if elsewhere else tmp_path / "source"
    if elsewhere and not source.parent.is_dir():
        pytest.skip("there is no other file system here")
    data = os.urandom(3_000_000)
    try:
        source.write_bytes(data)
        with source.open("rb") as stream:
            upload = store.upload("a", [(0, 2_500_000), (2_500_000, 2_600_000)])
            upload.send(1, Chunk(FileRange(stream.fileno(), 0, 100_000)))
            upload.send(0, Chunk(FileRange(stream.fileno(), 500_000, 3_000_000)))
            upload.finish()
            short = store.upload("b", [(0, 10)])
            with pytest.raises(StoreError, match="cannot be written"):
                short.send(0, Chunk(FileRange(stream.fileno(), 2_999_995, 3_000_005)))
            short.leave()
    finally:
        source.unlink(missing_ok=True)
    assert (store.folder / "a").read_bytes() == data[500_000:] + data[:100_000]
    assert uploads(store) == []


def test_an_upload_that_is_left_leaves_nothing(store: FolderStore) -> None:
    upload = store.upload("a", [(0, 1)])
    upload.leave()
    upload.leave()
    assert uploads(store) == []
    assert store.head("a") is None


def test_old_unfinished_uploads_are_aborted(store: FolderStore) -> None:
    assert store.abort_uploads("", before=time.time()) == 0
    upload = store.upload("a", [(0, 1)])
    store.put_if("b", b"x", version=None)
    assert store.abort_uploads("", before=time.time() - 60) == 0
    assert len(uploads(store)) == 1
    assert store.abort_uploads("", before=time.time() + 60) == 1
    assert uploads(store) == []
    upload.leave()
    assert [each.key for each in store.list("")] == ["b"]


def test_a_listing_has_every_object_that_begins_so(store: FolderStore) -> None:
    keys = {"blobs/aa", "blobs/ab", "blobs/b", "blobsx", "manifests/main.json", "a/.uploads/b"}
    for key in keys:
        store.put(key, key.encode())
    for prefix in ("", "blobs/", "blobs/a", "blobs", "manifests/main.json", "nothing/", "a/.uploads/"):
        found = {each.key: each for each in store.list(prefix)}
        assert set(found) == {key for key in keys if key.startswith(prefix)}
        assert all(each == store.head(key) for key, each in found.items())
    store.delete(["blobs/aa", "nothing", "blobs/aa"])
    assert {each.key for each in store.list("blobs/a")} == {"blobs/ab"}


def test_a_folder_that_is_missing_has_no_listing(tmp_path: Path) -> None:
    """An empty listing would tell prune that nothing is needed."""
    with pytest.raises(StoreError, match="no such folder"):
        list(FolderStore(tmp_path / "missing").list(""))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_no_empty_one(store: FolderStore) -> None:
    store.put("blobs/a", b"x")
    (store.folder / "blobs").chmod(0)
    try:
        with pytest.raises(StoreError, match="cannot be listed"):
            list(store.list(""))
    finally:
        (store.folder / "blobs").chmod(0o700)


# ------------------------------------------------------------------------------------------------------ hostile keys


@pytest.mark.parametrize("key", HOSTILE)
def test_a_key_cannot_leave_the_folder(store: FolderStore, tmp_path: Path, key: str) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    store.folder.mkdir()
    for verb in (
        lambda: store.head(key),
        lambda: read(store, key, 0, 1),
        lambda: store.put(key, b"theirs"),
        lambda: store.put_if(key, b"theirs", version=None),
        lambda: store.upload(key, [(0, 1)]),
        lambda: store.delete([key]),
    ):
        with pytest.raises(ManifestError, match="refused"):
            verb()
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("x", "store")] == []
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../../", "../store/"])
def test_a_prefix_cannot_leave_the_folder(store: FolderStore, prefix: str) -> None:
    store.put("a", b"x")
    with pytest.raises(ManifestError, match="refused"):
        list(store.list(prefix))


# ------------------------------------------------------------------------------------------------------------- races


def test_a_conditional_put_comes_in_time_or_changes_nothing(store: FolderStore) -> None:
    first = store.put_if("a", b"1", version=None)
    with pytest.raises(ConflictError, match="was written by somebody else meanwhile"):
        store.put_if("a", b"2", version=None)
    second = store.put_if("a", b"2", version=first.version)
    with pytest.raises(ConflictError):
        store.put_if("a", b"3", version=first.version)
    with pytest.raises(ConflictError):
        store.put_if("b", b"3", version=second.version)
    assert read(store, "a", 0, 1) == b"2"
    assert store.head("b") is None
    assert uploads(store) == []


def count_up(store: FolderStore, rounds: int) -> None:
    """Add `rounds` to the number in `count`, one by one, whoever else does."""
    done = 0
    while done < rounds:
        try:
            found = read_small(store, "count", most=100)
            value, version = (int(found[0]), found[1].version) if found else (0, None)
            store.put_if("count", b"%d" % (value + 1), version=version)
            done += 1
        except (ConflictError, SourceError):  # somebody was first, or replaced it between looking and reading
            pass


def test_threads_that_count_lose_nothing(store: FolderStore) -> None:
    with ThreadPoolExecutor(6) as pool:
        for counted in [pool.submit(count_up, store, 25) for _ in range(6)]:
            counted.result(60)
    assert read(store, "count", 0, 3) == b"150"


def test_processes_that_count_lose_nothing(store: FolderStore) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=count_up, args=(store, 30)) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    assert read(store, "count", 0, 3) == b"120"
    assert uploads(store) == []


# -------------------------------------------------------------------------------------------------------------- URIs


def test_a_store_in_a_folder_is_opened_by_path_or_uri(store: FolderStore) -> None:
    store.put("a", b"x")
    for uri in (store.folder, str(store.folder), f"file://{store.folder}"):
        with open_store(uri) as opened:
            assert read(opened, "a", 0, 1) == b"x"
            assert opened.uri == str(store.folder)


def test_a_uri_of_nothing_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"no store is reached by ftp://; known are file://, s3://"):
        open_store("ftp://host/x")
