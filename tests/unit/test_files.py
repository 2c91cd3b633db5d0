"""Reading files by ranges, on this machine and in a store: exact bytes, few requests, none beyond what is asked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from shardprep.files import LocalFolder, ended, read_at
from shardprep.source import store_files
from shardprep.source.store_files import StoreFolder, is_plain
from shardprep_runtime.errors import FormatError, SourceError
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.stores.store import Sink

DATA = os.urandom(100_000)


class CountingStore(FolderStore):
    """A store in a folder that remembers which ranges it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        with self.lock:
            self.asked.append((start, start + sink.left))
        return super().get(key, start, sink, version=version)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    found = CountingStore(tmp_path)
    found.put("data", DATA)
    return found


@pytest.fixture
def folder(store: CountingStore) -> StoreFolder:
    return StoreFolder(store, {stat.key: stat for stat in store.list("")})


def test_a_file_gives_the_same_bytes_wherever_it_lies(tmp_path: Path, folder: StoreFolder) -> None:
    for place in (folder, LocalFolder(tmp_path)):
        assert place.names() == ["data"]
        with place.open("data") as file:
            assert (file.name, file.size) == ("data", len(DATA))
            for start, stop in ((0, 0), (0, 10), (99_990, 100_000), (50_000, 50_001), (0, 100_000)):
                assert read_at(file, stop - start, start) == DATA[start:stop]
            with pytest.raises(FormatError, match="truncated: 11 bytes expected at 99990, 10 found"):
                read_at(file, 11, 99_990)
            assert file.is_unchanged()


def test_only_a_file_of_this_machine_has_a_descriptor(tmp_path: Path, folder: StoreFolder) -> None:
    with LocalFolder(tmp_path).open("data") as file, folder.open("data") as far:
        assert file.fd is not None
        assert os.pread(file.fd, 4, 0) == DATA[:4]
        assert far.fd is None


def test_a_local_file_that_changed_is_known(tmp_path: Path, store: CountingStore) -> None:
    with LocalFolder(tmp_path).open("data") as file:
        with open(tmp_path / "data", "r+b") as stream:
            stream.truncate(99)
        assert not file.is_unchanged()
        with pytest.raises(SourceError, match="ends at byte 99; it changed while it was read"):
            file.read_into(memoryview(bytearray(10)), 95)
    assert "byte 5" in str(ended(file, 5))


def test_an_object_that_was_replaced_is_refused(folder: StoreFolder, store: CountingStore) -> None:
    file = folder.open("data")
    store.put("data", DATA[::-1])
    with pytest.raises(SourceError, match="replaced while it was read"):
        read_at(file, 1, 0)
    with pytest.raises(SourceError, match="replaced while it was read"):
        file.hint([(0, 10)])


def test_small_steps_become_few_requests_that_end_where_the_stretch_does(
    folder: StoreFolder, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_files, "WINDOW", 10_000)
    ahead = folder.open("data").stretch(5_000, 38_000)
    found = bytearray(33_000)
    for at in range(0, 33_000, 300):
        chunk = memoryview(found)[at : at + 300]
        ahead.read_into(chunk, 5_000 + at)
    assert found == DATA[5_000:38_000]
    assert store.asked == [(5_000, 15_000), (15_000, 25_000), (25_000, 35_000), (35_000, 38_000)]


def test_a_stretch_reads_nothing_twice_when_steps_do_not_fit_its_window(
    folder: StoreFolder, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_files, "WINDOW", 1_000)
    ahead = folder.open("data").stretch(0, 10_000)
    found = bytearray(10_000)
    for at in range(0, 10_000, 700):
        ahead.read_into(memoryview(found)[at : at + 700], at)
    assert found == DATA[:10_000]
    assert sum(stop - start for start, stop in store.asked) == 10_000


def test_steps_larger_than_the_window_land_in_place(
    folder: StoreFolder, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_files, "WINDOW", 1_000)
    ahead = folder.open("data").stretch(0, 10_000)
    found = bytearray(9_000)
    ahead.read_into(memoryview(found), 500)
    assert found == DATA[500:9_500]
    assert store.asked == [(500, 9_500)]


def test_a_stretch_that_failed_holds_nothing_wrong(folder: StoreFolder, store: CountingStore) -> None:
    ahead = folder.open("data").stretch(0, 100)
    (store.folder / "data").rename(store.folder / "away")
    with pytest.raises(Exception, match="no such object"):
        ahead.read_into(memoryview(bytearray(10)), 0)
    (store.folder / "away").rename(store.folder / "data")
    into = bytearray(10)
    ahead.read_into(memoryview(into), 0)
    assert into == DATA[:10]


def test_hinted_ranges_are_fetched_once_and_neighbours_together(
    folder: StoreFolder, store: CountingStore
) -> None:
    file = folder.open("data")
    near = store_files.NEAR
    file.hint([(60_000, 60_010), (0, 10), (10 + near, 20 + near), (30_000, 30_020)])
    assert sorted(store.asked) == [(0, 20 + near), (30_000, 30_020), (60_000, 60_010)]
    for start, stop in ((0, 10), (10 + near, 20 + near), (30_005, 30_020), (60_000, 60_010)):
        assert read_at(file, stop - start, start) == DATA[start:stop]
    assert len(store.asked) == 3
    assert read_at(file, 30, 29_999) == DATA[29_999:30_029]  # reaches beyond what is held
    assert len(store.asked) == 4


def test_hints_cannot_fill_the_memory(
    folder: StoreFolder, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_files, "HELD", 1_000)
    file = folder.open("data")
    file.hint([(at, at + 600) for at in range(0, 100_000, 10_000)])
    assert store.asked == [(0, 600)]
    assert read_at(file, 600, 10_000) == DATA[10_000:10_600]


@pytest.mark.parametrize(
    "key", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\nb", "a\0", "../a", "a//b"]
)
def test_keys_that_no_file_beside_the_others_has_are_passed_over(key: str) -> None:
    assert not is_plain(key)


def test_what_is_not_there_cannot_be_opened(tmp_path: Path, folder: StoreFolder) -> None:
    assert not folder.has("other")
    with pytest.raises(FormatError, match="other: no such object"):
        folder.open("other")
    with pytest.raises(FormatError, match="other: cannot be opened"):
        LocalFolder(tmp_path).open("other")
