"""Pushing to a store: only what is missing, proved as it is sent, published last; and pruning, which never hurts that."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import small_models
from lazily import torch
from processes import ended
from s3server import S3Server
from shardprep.publish import prune as pruning
from shardprep.publish import push as publish
from shardprep.publish import send
from shardprep.publish.prune import prune, revisions
from shardprep.publish.push import push
from shardprep.publish.send import Blob, Digested
from shardprep.split import SplitOptions, split
from shardprep.write.conduct import Conduct
from shardprep_runtime import read_manifest
from shardprep_runtime.errors import (
    ConflictError,
    InputError,
    IntegrityError,
    ManifestError,
    StoreError,
)
from shardprep_runtime.format.manifest import digest_of
from shardprep_runtime.shard.revisions import blob_key
from shardprep_runtime.stores.folder import FolderStore, FolderUpload
from shardprep_runtime.stores.store import Chunk, FileRange

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))
WEEK = 7 * 86400.0


def contents(folder: Path) -> dict[str, bytes]:
    """Every object in the folder of a store and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".uploads" not in path.parts
    }


def expected(shards: Path, revision: str = "main") -> dict[str, bytes]:
    """What a store holds once this shard set alone is pushed."""
    manifest = read_manifest(shards)
    files = {
        blob_key(each.digest): (shards / each.path).read_bytes()
        for each in (*manifest.parts, *manifest.side_files)
    }
    return {**files, f"manifests/{revision}.json": (shards / "shardprep.json").read_bytes()}


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file, and nothing else that is easily seen."""
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def age(store: Path, days: float) -> None:
    """Let every blob be older."""
    for path in (store / "blobs").iterdir():
        then = path.stat().st_mtime - days * 86400
        os.utime(path, (then, then))


def once(action: Callable[[], Any]) -> Conduct:
    """A conduct by which something happens after the first bytes are sent."""
    calls: list[int] = []

    def progress(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 1:
            action()

    return Conduct(workers=1, progress=progress)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard sets `one` and `two` of a small model; they differ in the tensors of one layer."""
    folder = tmp_path_factory.mktemp("sets")
    config = small_models.llama_config()
    tensors = small_models.random_tensors(small_models.llama_shapes(config))
    small_models.write_checkpoint(folder / "source-one", tensors, config)
    for name in tensors:
        if name.startswith("model.layers.2.") and "layernorm" not in name:
            tensors[name] = tensors[name] + 1
    small_models.write_checkpoint(folder / "source-two", tensors, config)
    for name in ("one", "two"):
        split(
            folder / f"source-{name}",
            folder / name,
            tensor_parallel_size=2,
            options=SplitOptions(max_part_bytes=8000),
        )
    return folder


@pytest.fixture
def one(sets: Path, tmp_path: Path) -> Path:
    """A shard set of our own, which a test may damage."""
    return shutil.copytree(sets / "one", tmp_path / "one")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# ----------------------------------------------------------------------------------------------------------- pushing


def test_a_push_puts_blobs_under_their_digests_and_the_manifest_as_it_is(one: Path, store: Path) -> None:
    report = push(one, store)
    assert contents(store) == expected(one)
    assert report.manifest_digest == digest_of((one / "shardprep.json").read_bytes())
    assert report.replaced is None
    assert report.blobs == report.blobs_sent == len(contents(store)) - 1
    assert report.bytes_sent == sum(len(data) for key, data in contents(store).items() if "blobs" in key)


def test_a_path_and_a_uri_of_a_folder_are_the_same_store(one: Path, store: Path) -> None:
    push(one, f"file://{store}")
    assert contents(store) == expected(one)
    assert push(one, store).blobs_sent == 0


def test_a_push_of_what_is_there_sends_nothing(one: Path, store: Path) -> None:
    push(one, store)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    report = push(one, store)
    assert (report.blobs_sent, report.bytes_sent, report.replaced) == (0, 0, None)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_new_revision_costs_its_changed_parts(sets: Path, store: Path) -> None:
    first = push(sets / "one", store)
    report = push(sets / "two", store)
    changed = set(expected(sets / "two")) - set(expected(sets / "one"))
    assert report.replaced == first.manifest_digest
    assert report.blobs_sent == len(changed) == 2  # the parts of layer 2, one of each rank
    assert report.blobs_sent < report.blobs / 3
    assert report.bytes_sent + report.bytes_present == first.bytes_sent


def test_revisions_stand_side_by_side_and_share_blobs(sets: Path, store: Path) -> None:
    push(sets / "one", store, revision="v1")
    push(sets / "one", store, revision="v1-again")
    push(sets / "two", store, revision="v2")
    found = revisions(store)
    assert [each.revision for each in found] == ["v1", "v1-again", "v2"]
    assert found[0].manifest_digest == found[1].manifest_digest != found[2].manifest_digest
    assert {each.grain for each in found} == {2}
    assert found[0].nbytes == read_manifest(sets / "one").nbytes


def test_revisions_show_a_manifest_that_cannot_be_followed(one: Path, store: Path) -> None:
    push(one, store)
    raw = (one / "shardprep.json").read_bytes().replace(b'"version": 1', b'"version": 9')
    (store / "manifests" / "newer.json").write_bytes(raw)
    found = {each.revision: each for each in revisions(store)}
    assert found["main"].problem is None
    assert "manifest version 9 is newer than 1" in str(found["newer"].problem)


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(one: Path, store: Path) -> None:
    planned = push(one, store, dry_run=True)
    assert not store.exists()
    done = push(one, store)
    assert (planned.blobs_sent, planned.bytes_sent) == (done.blobs_sent, done.bytes_sent)


def test_a_manifest_with_another_digest_is_not_pushed(one: Path, store: Path) -> None:
    with pytest.raises(ManifestError, match="do not load it"):
        push(one, store, manifest_digest=digest_of(b"another"))
    assert not store.exists()
    push(one, store, manifest_digest=digest_of((one / "shardprep.json").read_bytes()))


def test_an_empty_side_file_is_pushed_too(sets: Path, tmp_path: Path, store: Path) -> None:
    source = shutil.copytree(sets / "source-one", tmp_path / "source")
    (source / "tokenizer.json").write_bytes(b"")
    split(source, tmp_path / "set", tensor_parallel_size=2)
    push(tmp_path / "set", store)
    assert contents(store) == expected(tmp_path / "set")


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_flipped_bit_is_found_and_nothing_is_published(one: Path, store: Path, number: int) -> None:
    part = sorted(one.glob("*.safetensors"))[number]
    flip(part)
    with pytest.raises(
        IntegrityError, match=rf"{part.name}: tensor \S+: block 0 \(bytes \d+ to \d+\)"
    ) as caught:
        push(one, store)
    assert "nothing is published" in str(caught.value)
    assert not (store / "manifests").exists()
    digest = {each.path: each.digest for each in read_manifest(one).parts}[part.name]
    assert blob_key(digest) not in contents(store)
    assert not [path for path in (store / ".uploads").iterdir() if path.name != "lock"]


def test_a_changed_side_file_is_found(one: Path, store: Path) -> None:
    flip(one / "tokenizer.json")
    with pytest.raises(IntegrityError, match=r"tokenizer.json: the file .* does not match its digest"):
        push(one, store)
    (one / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer.json: has 2 bytes"):
        push(one, store)
    assert not (store / "manifests").exists()


@pytest.mark.parametrize("how", ["flipped", "cut short"])
def test_a_part_that_changes_while_others_are_sent_is_found(one: Path, store: Path, how: str) -> None:
    last = sorted(one.glob("*.safetensors"))[-1]

    def change() -> None:
        if how == "flipped":
            with last.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                byte = stream.read(1)[0]
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([byte ^ 1]))
        else:
            os.truncate(last, last.stat().st_size - 1)

    with pytest.raises(IntegrityError, match=last.name):
        push(one, store, conduct=once(change))
    assert not (store / "manifests").exists()


def test_a_blob_of_another_size_is_an_error_and_is_not_replaced(one: Path, store: Path) -> None:
    push(one, store)
    blob = next((store / "blobs").iterdir())
    blob.write_bytes(b"something else")
    with pytest.raises(StoreError, match="14 bytes lie there"):
        push(one, store, revision="other")
    assert blob.read_bytes() == b"something else"
    assert not (store / "manifests" / "other.json").exists()


def test_who_comes_second_to_one_revision_is_told_and_changes_nothing(sets: Path, store: Path) -> None:
    with pytest.raises(ConflictError, match="somebody else has published another manifest"):
        push(sets / "one", store, conduct=once(lambda: push(sets / "two", store)))
    assert contents(store)["manifests/main.json"] == (sets / "two" / "shardprep.json").read_bytes()
    assert push(sets / "one", store).blobs_sent == 0
    assert contents(store)["manifests/main.json"] == (sets / "one" / "shardprep.json").read_bytes()


def test_two_that_push_the_same_are_both_right(sets: Path, store: Path) -> None:
    push(sets / "one", store, conduct=once(lambda: push(sets / "one", store)))
    assert contents(store) == expected(sets / "one")


# ----------------------------------------------------------------------------------------------------- parts, memory


def blob_of(*sizes: int) -> Blob:
    """A blob of runs of these sizes; nothing of it is read."""
    runs, start = [], 0
    for size in sizes:
        runs.append(Digested(start, start + size, "", ""))
        start += size
    return Blob("blobs/x", -1, "x", tuple(runs))


MIB = 2**20


@pytest.mark.parametrize(
    "sizes",
    [
        (4096,),
        (0,),
        (4096, *[16 * MIB] * 64),
        (4096, *[5 * MIB] * 100, 1),
        (100 * MIB, *[16 * MIB] * 3),
        (4096, *[7] * 1000, 16 * MIB),
        (4096, *[16 * MIB] * 20_000),
    ],
)
def test_parts_end_where_digests_do_and_are_neither_too_small_nor_too_many(sizes: tuple[int, ...]) -> None:
    blob = blob_of(*sizes)
    parts = blob.cut()
    ends = {run.stop for run in blob.runs}
    assert parts[0][0] == 0
    assert parts[-1][1] == blob.size == sum(sizes)
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(stop in ends for _, stop in parts)
    assert all(stop - start >= 16 * MIB for start, stop in parts[:-1])
    assert len(parts) <= 10_000
    assert [run for start, stop in parts for run in blob.inside(start, stop)] == list(blob.runs)


def test_buffers_stay_within_their_bound_and_one_that_is_larger_is_still_given() -> None:
    buffers = send._Buffers(1000)
    held, most, lock = 0, 0, threading.Lock()

    def work(sizes: list[int]) -> None:
        nonlocal held, most
        for size in sizes:
            with buffers.take(size) as view:
                assert len(view) == size
                with lock:
                    held += size
                    most = max(most, held)
                time.sleep(0.001)
                with lock:
                    held -= size

    sizes = [[100, 700, 300, 900, 50], [500] * 5, [999, 1, 400], [250] * 8]
    threads = [threading.Thread(target=work, args=(each,)) for each in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert 500 < most <= 1000
    with buffers.take(5000) as view:
        assert len(view) == 5000


class FromFile(FolderStore):
    """A store that says of the first sends that it has checked what it got, and counts how it got the parts."""

    def __init__(self, folder: Path, *, checks: int, at_send: Callable[[], object] = lambda: None) -> None:
        super().__init__(folder)
        self.checks, self.at_send = checks, at_send
        self.bodies: list[type] = []

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> FolderUpload:
        store = self

        class Counted(FolderUpload):
            def send(self, number: int, chunk: Chunk) -> bool:
                if key.startswith("manifests/"):
                    return super().send(number, chunk)
                store.at_send()
                super().send(number, chunk)
                store.bodies.append(type(chunk.body))
                return len(store.bodies) <= store.checks

        return Counted(self, key, parts)


def test_a_store_that_ceases_to_check_gets_the_part_again_from_memory(
    one: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FromFile(store, checks=3)
    monkeypatch.setattr(publish, "open_store", lambda *_: found)
    report = push(one, store, conduct=Conduct(1))
    assert contents(store) == expected(one)
    assert found.bodies[:5] == [memoryview, FileRange, FileRange, FileRange, memoryview]
    assert set(found.bodies[5:]) == {memoryview}
    assert len(found.bodies) == report.blobs + 1


@pytest.mark.parametrize("changed", [False, True])
def test_a_part_too_large_for_memory_is_sent_from_a_file_that_stays_as_it_is(
    one: Path, store: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    paths = [path for path in one.iterdir() if path.stat().st_size > 4000 and path.name != "shardprep.json"]
    found = FromFile(store, checks=0, at_send=lambda: changed and [os.utime(path) for path in paths])
    monkeypatch.setattr(publish, "open_store", lambda *_: found)
    monkeypatch.setattr(send, "BUFFERED", 4000)
    if changed:
        with pytest.raises(IntegrityError, match="was written to while it was sent"):
            push(one, store, conduct=Conduct(1))
        assert not (store / "manifests").exists()
    else:
        push(one, store, conduct=Conduct(1))
        assert contents(store) == expected(one)
    assert FileRange in found.bodies


# ----------------------------------------------------------------------------------------------------------- pruning


def test_prune_removes_what_no_revision_names_once_it_is_old(sets: Path, store: Path) -> None:
    push(sets / "one", store)
    push(sets / "two", store)
    young = prune(store)
    assert (young.blobs_removed, young.blobs_spared) == (0, 2)
    age(store, 8)
    planned = prune(store, dry_run=True)
    assert len(contents(store)) == len(expected(sets / "two")) + 2
    done = prune(store)
    assert contents(store) == expected(sets / "two")
    assert (planned.blobs_removed, planned.bytes_removed) == (done.blobs_removed, done.bytes_removed)
    assert done.blobs_removed == 2
    assert done.revisions == ("main",)


def test_prune_keeps_what_any_revision_names(sets: Path, store: Path) -> None:
    push(sets / "one", store, revision="old")
    push(sets / "two", store, revision="new")
    age(store, 100)
    assert prune(store, grace=0).blobs_removed == 0
    assert contents(store) == {**expected(sets / "one", "old"), **expected(sets / "two", "new")}


def test_prune_gives_up_a_revision_when_told_to(sets: Path, store: Path) -> None:
    push(sets / "one", store, revision="old")
    push(sets / "two", store, revision="new")
    age(store, 8)
    planned = prune(store, delete_revisions=["old"], dry_run=True)
    assert planned.revisions == ("new",)
    assert (store / "manifests" / "old.json").exists()
    done = prune(store, delete_revisions=["old"])
    assert (planned.blobs_removed, planned.revisions) == (done.blobs_removed, done.revisions)
    assert contents(store) == expected(sets / "two", "new")


def test_prune_gives_up_neither_the_last_revision_nor_one_that_is_not_there(sets: Path, store: Path) -> None:
    push(sets / "one", store, revision="a")
    push(sets / "two", store, revision="b")
    age(store, 8)
    before = contents(store)
    with pytest.raises(InputError, match="no revision would be left"):
        prune(store, grace=0, delete_revisions=["a", "b"])
    with pytest.raises(InputError, match="no revision c; nothing was removed"):
        prune(store, grace=0, delete_revisions=["a", "c"])
    assert contents(store) == before


def test_a_revision_that_is_damaged_can_be_given_up_and_stops_any_other_prune(
    sets: Path, store: Path
) -> None:
    push(sets / "one", store, revision="good")
    push(sets / "two", store, revision="bad")
    age(store, 8)
    (store / "manifests" / "bad.json").write_bytes(b"{}")
    before = contents(store)
    with pytest.raises(InputError, match=r"bad.json.*nothing is removed while"):
        prune(store, grace=0)
    assert contents(store) == before
    prune(store, grace=0, delete_revisions=["bad"])
    assert contents(store) == expected(sets / "one", "good")


@pytest.mark.parametrize("damage", ["newer", "none", "foreign", "folder", "not json"])
def test_prune_refuses_where_manifests_are_missing_or_not_understood(
    one: Path, store: Path, damage: str
) -> None:
    push(one, store)
    push(one, store, revision="other")
    (store / "blobs" / ("a" * 64)).write_bytes(b"unnamed")
    age(store, 100)
    folder = store / "manifests"
    raw = (folder / "main.json").read_bytes()
    if damage == "newer":
        (folder / "other.json").write_bytes(raw.replace(b'"version": 1', b'"version": 9'))
    elif damage == "none":
        (folder / "main.json").unlink()
        (folder / "other.json").unlink()
    elif damage == "foreign":
        (folder / ".a.json").write_bytes(raw)
    elif damage == "folder":
        (folder / "sub").mkdir()
        (folder / "other.json").rename(folder / "sub" / "other.json")
    else:
        (folder / "other.json").write_bytes(raw[:100])
    before = contents(store)
    with pytest.raises(InputError, match="nothing is removed"):
        prune(store, grace=0)
    assert contents(store) == before


def test_prune_never_touches_what_is_no_blob(one: Path, store: Path) -> None:
    push(one, store)
    foreign = ["blobs/README", "blobs/" + "A" * 64, "blobs/sub/" + "a" * 64, "other/" + "a" * 64, "a" * 64]
    for key in foreign:
        (store / key).parent.mkdir(exist_ok=True)
        (store / key).write_bytes(b"mine")
        os.utime(store / key, (0, 0))
    (store / "blobs" / ("a" * 64)).write_bytes(b"unnamed")
    os.utime(store / "blobs" / ("a" * 64), (0, 0))
    report = prune(store)
    assert (report.blobs_removed, report.foreign) == (1, 3)
    assert set(contents(store)) == {*expected(one), *foreign}


def test_prune_of_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        prune(tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Interrupted(FolderStore):
    """A store in which something happens once a verb was called so often."""

    def __init__(self, folder: Path, verb: str, number: int, happens: Callable[[], object]) -> None:
        super().__init__(folder)
        self.verb, self.number, self.happens = verb, number, happens

    def _count(self, verb: str) -> None:
        if verb == self.verb:
            self.number -= 1
            if self.number == 0:
                self.happens()

    def list(self, prefix: str) -> Iterator[Any]:
        yield from super().list(prefix)
        self._count("list")

    def delete(self, keys: Iterable[str]) -> None:
        super().delete(keys)
        self._count("delete")


@pytest.mark.parametrize(("verb", "number", "removed"), [("list", 2, 0), ("list", 3, 0), ("delete", 1, 1)])
def test_prune_sees_a_manifest_that_is_published_while_it_works(
    sets: Path, store: Path, monkeypatch: pytest.MonkeyPatch, verb: str, number: int, removed: int
) -> None:
    """After blobs were listed, after manifests were listed again, and after the first of two blobs was removed."""
    push(sets / "one", store)
    push(sets / "two", store)
    age(store, 8)  # two blobs of `one` are old and unnamed
    raw = (sets / "one" / "shardprep.json").read_bytes()
    interrupted = Interrupted(store, verb, number, lambda: FolderStore(store).put("manifests/back.json", raw))
    monkeypatch.setattr(pruning, "open_store", lambda *_: interrupted)
    monkeypatch.setattr(pruning, "BATCH", 0.0)
    assert prune(store).blobs_removed == removed
    full = {**expected(sets / "one", "back"), **expected(sets / "two")}
    assert len(full) - len(contents(store)) == removed
    assert full.items() >= contents(store).items()


def test_prune_stops_where_it_stood_still_for_so_long_that_a_push_did_not_wait(
    sets: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(sets / "one", store)
    push(sets / "two", store)
    age(store, 8)
    before = contents(store)
    monkeypatch.setattr(pruning, "FRESH", 0.0)
    with pytest.raises(StoreError, match="stood still for too long"):
        prune(store)
    assert contents(store) == before


def test_a_push_whose_blobs_are_pruned_under_its_eyes_sends_them_again(sets: Path, store: Path) -> None:
    push(sets / "one", store)
    push(sets / "two", store)
    age(store, 8)
    (blob,) = (
        set(expected(sets / "one"))
        - set(expected(sets / "two"))
        - {"manifests/main.json"}
        - {sorted(set(expected(sets / "one")) - set(expected(sets / "two")))[0]}
    )
    warned: list[str] = []
    lost = store / blob
    (store / sorted(set(expected(sets / "one")) - set(expected(sets / "two")))[0]).unlink()
    conduct = once(lost.unlink)
    report = push(sets / "one", store, conduct=Conduct(1, progress=conduct.progress, warn=warned.append))
    assert report.blobs_sent == 2
    assert contents(store).items() >= expected(sets / "one").items()
    assert any("sent again" in line for line in warned)


def test_a_push_waits_for_a_prune_that_may_not_have_seen_its_manifest(one: Path, store: Path) -> None:
    target = FolderStore(store)
    target.put("prunes/mine", b"1")
    told = threading.Event()
    thread = threading.Thread(
        target=push, args=(one, store), kwargs={"conduct": Conduct(warn=lambda _: told.set())}
    )
    thread.start()
    assert told.wait(20)
    assert (store / "manifests" / "main.json").exists()
    thread.join(1.5)
    assert thread.is_alive()
    target.put("prunes/mine", b"2")
    time.sleep(1.5)
    assert thread.is_alive()  # renewed once: the look before it may have begun before the manifest was there
    target.put("prunes/mine", b"3")
    thread.join(20)
    assert not thread.is_alive()


def test_a_push_does_not_wait_for_a_prune_that_is_dead(one: Path, store: Path) -> None:
    FolderStore(store).put("prunes/dead", b"1")
    os.utime(store / "prunes" / "dead", (time.time() - 2 * pruning.FRESH,) * 2)
    warned: list[str] = []
    push(one, store, conduct=Conduct(warn=warned.append))
    assert not warned


def test_pushing_while_pruning_without_any_grace_leaves_every_published_blob(sets: Path, store: Path) -> None:
    push(sets / "one", store, revision="base")
    end = threading.Event()
    errors: list[BaseException] = []

    def keep_pruning() -> None:
        try:
            while not end.is_set():
                try:
                    prune(store, grace=0)
                except StoreError as error:
                    # a blob was put back between the listing and the question for it: refused, and nothing removed
                    if "did not list it" not in str(error):
                        raise
        except BaseException as error:
            errors.append(error)
            raise

    thread = threading.Thread(target=keep_pruning)
    thread.start()
    done = 0
    try:
        for turn in range(6):
            name = ("two", "one")[turn % 2]
            with contextlib.suppress(
                StoreError
            ):  # blobs vanish before any manifest names them: no grace at all
                push(sets / name, store, revision="base" if name == "one" else "main", conduct=Conduct(1))
                done += 1
            for each in revisions(store):
                manifest = sets / ("two" if each.revision == "main" else "one")
                assert contents(store).items() >= expected(manifest, each.revision).items()
    finally:
        end.set()
        thread.join(30)
    assert not errors
    assert done >= 3


# ------------------------------------------------------------------------------------------------------------ over S3


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 100 MB, nearly all of it in one part of several requests."""
    folder = tmp_path_factory.mktemp("larger")
    config = small_models.llama_config(
        heads=8, kv_heads=4, head_dim=64, layers=6, intermediate=1536, vocab=8000
    )
    small_models.write_model(folder / "source", config, dtype=torch.float32)
    split(folder / "source", folder / "set", tensor_parallel_size=1, options=SplitOptions(block_bytes=2**20))
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path / "server") as found:
        found.make_bucket("bucket")
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        yield found


def objects(server: S3Server, prefix: str = "m/") -> dict[str, bytes]:
    return {
        key.removeprefix(prefix): path.read_bytes()
        for key, path in server.objects("bucket").items()
        if key.startswith(prefix)
    }


def requests(server: S3Server, operation: str) -> list[dict[str, Any]]:
    """Those that have succeeded."""
    return [
        each for each in server.stats()["log"] if each["operation"] == operation and each["status"] == 200
    ]


def run(*args: object, code: int = 0) -> str:
    found = subprocess.run(
        [SHARDPREP, *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    return found.stdout if code == 0 else found.stderr


@pytest.mark.slow
def test_a_push_to_s3_puts_what_a_push_to_a_folder_puts(larger: Path, server: S3Server) -> None:
    report = json.loads(run("push", larger / "set", "s3://bucket/m", "--json"))
    assert objects(server) == expected(larger / "set")
    sent = sum(each["received"] for name in ("UploadPart", "PutObject") for each in requests(server, name))
    assert sent == report["bytes_sent"] + len((larger / "set" / "shardprep.json").read_bytes())
    server.reset_stats()
    assert "0 of" in run("push", larger / "set", "s3://bucket/m")
    assert server.stats()["operations"].keys() <= {"HeadObject", "GetObject"}


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False])
def test_parts_are_sent_from_the_file_only_where_the_store_checks_them(
    larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksums: bool
) -> None:
    kinds: list[type] = []

    def watched(body: Any, crc32: int | None = None) -> Chunk:
        kinds.append(type(body))
        return Chunk(body, crc32)

    monkeypatch.setattr(send, "Chunk", watched)
    with S3Server(tmp_path / "server", checksums=checksums) as server:
        server.make_bucket("bucket")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        push(larger / "set", "s3://bucket/m", conduct=Conduct(1))
        assert objects(server) == expected(larger / "set")
    assert kinds[0] is memoryview
    assert (FileRange in kinds) == checksums
    assert kinds.count(memoryview) == (1 if checksums else len(kinds))


@pytest.mark.slow
def test_a_killed_push_is_resumed_and_sends_nothing_twice(larger: Path, server: S3Server) -> None:
    manifest = read_manifest(larger / "set")
    (part,) = manifest.parts
    with (larger / "set" / part.path).open("rb") as stream:
        written = send.Written(part.size, part.header_size, part.digest)
        parts = len(send.open_blob(stream.fileno(), written, where="it").cut())
    assert parts >= 5
    server.fault("delay", times=0, method="PUT", match="m/blobs/", delay=0.2)
    args = [SHARDPREP, "push", str(larger / "set"), "s3://bucket/m", "--max-workers", "1"]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended(process):
        end = time.monotonic() + 60
        while len(requests(server, "UploadPart")) < 2:
            assert process.poll() is None
            assert time.monotonic() < end
        process.kill()
        assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)
    assert not any(key.startswith("manifests/") for key in objects(server))
    done = len(requests(server, "UploadPart"))
    server.clear()
    server.reset_stats()
    report = json.loads(run("push", larger / "set", "s3://bucket/m", "--json"))
    assert objects(server) == expected(larger / "set")
    # what both runs have sent is all there is: a part that was on its way was lost, or arrived and is counted
    assert done + len(requests(server, "UploadPart")) == parts
    again = sum(each["received"] for name in ("UploadPart", "PutObject") for each in requests(server, name))
    assert again == report["bytes_sent"] + len((larger / "set" / "shardprep.json").read_bytes())
    assert report["bytes_sent"] < report_size(larger / "set") - 2 * send.PART_BYTES + 1


def report_size(shards: Path) -> int:
    """Bytes of all blobs of a shard set."""
    manifest = read_manifest(shards)
    return sum(each.size for each in (*manifest.parts, *manifest.side_files))


@pytest.mark.slow
def test_a_flipped_bit_is_found_before_a_push_to_s3_is_published(
    larger: Path, tmp_path: Path, server: S3Server
) -> None:
    shards = shutil.copytree(larger / "set", tmp_path / "set")
    part = max(shards.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    flip(part, at=-(2**20))
    message = run("push", shards, "s3://bucket/m", code=1)
    assert f"{part.name}: tensor " in message
    assert "block" in message
    digest = {each.path: each.digest for each in read_manifest(shards).parts}[part.name]
    assert not {"manifests/main.json", blob_key(digest)} & set(objects(server))
    shutil.copy(larger / "set" / part.name, part)
    run("push", shards, "s3://bucket/m")
    assert objects(server) == expected(shards)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["status", "reset", "lost_response"])
def test_faults_that_pass_delay_a_push_and_no_more(larger: Path, server: S3Server, fault: str) -> None:
    how = {"code": 503} if fault == "status" else {}
    server.fault(fault, times=4, method="PUT", match="m/blobs/", **how)
    server.fault(fault, times=2, method="POST", match="m/blobs/", **how)
    run("push", larger / "set", "s3://bucket/m")
    assert objects(server) == expected(larger / "set")
    assert server.stats()["modes"][fault] >= 5


def test_a_manifest_whose_answer_was_lost_is_no_conflict_with_oneself(sets: Path, server: S3Server) -> None:
    for name in ("one", "two"):  # one is new, two replaces it
        server.fault("lost_response", method="PUT", match="m/manifests/")
        run("push", sets / name, "s3://bucket/m")
        assert objects(server)["manifests/main.json"] == (sets / name / "shardprep.json").read_bytes()
    assert server.stats()["modes"]["lost_response"] == 2


@pytest.mark.slow
def test_of_two_pushers_to_s3_one_wins_and_the_other_is_told(sets: Path, server: S3Server) -> None:
    server.fault("delay", method="PUT", match="m/blobs/", times=1, delay=6.0)
    slow = subprocess.Popen(
        [SHARDPREP, "push", str(sets / "one"), "s3://bucket/m"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while server.stats()["modes"].get("delay", 0) < 1:
            assert slow.poll() is None
        run("push", sets / "two", "s3://bucket/m")
        _, said = slow.communicate(timeout=60)
    finally:
        slow.kill()
        slow.communicate()
    assert slow.returncode == 1
    assert "somebody else has published another manifest" in said
    assert objects(server)["manifests/main.json"] == (sets / "two" / "shardprep.json").read_bytes()
    run("push", sets / "one", "s3://bucket/m")
    assert objects(server)["manifests/main.json"] == (sets / "one" / "shardprep.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "how", "code", "words"),
    [
        ("empty_list", {"times": 1}, 2, "no manifests are there"),
        ("empty_list", {"times": 0}, 2, "no manifests are there"),
        ("status", {"times": 0, "code": 403, "method": "GET"}, 1, "the store refuses"),
        ("short_list", {"times": 0, "skip": 1}, 1, "the store did not list it"),
        ("empty_list", {"times": 1, "skip": 1}, 1, "the store did not list it"),
        ("empty_list", {"times": 1, "skip": 2}, 2, "no manifests are there"),
    ],
)
def test_prune_removes_nothing_on_the_word_of_a_bad_listing(
    sets: Path, server: S3Server, fault: str, how: dict[str, Any], code: int, words: str
) -> None:
    push(sets / "one", "s3://bucket/m")
    push(sets / "two", "s3://bucket/m")
    before = objects(server)
    server.fault(fault, **how)
    assert words in run("prune", "s3://bucket/m", "--grace", "0s", code=code)
    server.clear()
    assert {key: data for key, data in objects(server).items() if "prunes" not in key} == before


def test_prune_lists_manifests_twice_so_that_one_short_listing_costs_nothing(
    sets: Path, server: S3Server
) -> None:
    push(sets / "one", "s3://bucket/m", revision="a")
    push(sets / "two", "s3://bucket/m", revision="b")
    before = objects(server)
    server.fault("short_list", times=1)
    assert "0 blobs" in run("prune", "s3://bucket/m", "--grace", "0s")
    assert objects(server) == before


@pytest.mark.slow
def test_prune_over_s3_removes_old_blobs_and_unfinished_uploads(
    sets: Path, larger: Path, server: S3Server
) -> None:
    push(sets / "one", "s3://bucket/m")
    push(sets / "two", "s3://bucket/m")
    (server.root / "bucket" / "theirs").write_bytes(b"theirs")
    args = [SHARDPREP, "push", str(larger / "set"), "s3://bucket/m"]
    (part,) = read_manifest(larger / "set").parts
    server.fault("delay", times=0, method="PUT", match=blob_key(part.digest), delay=5.0)
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended(process):
        while not requests(server, "CreateMultipartUpload"):
            assert process.poll() is None
        time.sleep(0.3)
        process.kill()
        process.wait()
    server.clear()
    time.sleep(1.1)  # S3's clock of uploads has seconds
    assert "0 unfinished uploads dropped" in run("prune", "s3://bucket/m")
    shown = run("prune", "s3://bucket/m", "--grace", "0s")
    assert "1 unfinished uploads dropped" in shown
    assert objects(server) == expected(sets / "two")
    assert (server.root / "bucket" / "theirs").exists()
