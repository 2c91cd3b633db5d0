"""Splitting straight into a store: the blobs and the manifest that a push would put, without a full copy on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_models
from lazily import torch
from processes import ended
from s3server import S3Server
from shardprep.publish.push import push
from shardprep.publish.store_staging import StoreStaging
from shardprep.split import SplitOptions, split
from shardprep.write.conduct import Conduct
from shardprep_runtime.errors import ConflictError, InputError, IntegrityError, StoreError
from shardprep_runtime.shard.revisions import read_revision
from shardprep_runtime.stores.folder import FolderStore

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every object in the folder of a store and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".uploads" not in path.parts
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30 MB (`source`) and, in the folder `store`, what a push of its shard set puts."""
    folder = tmp_path_factory.mktemp("model")
    config = small_models.llama_config(
        heads=8, kv_heads=4, head_dim=32, layers=8, intermediate=768, vocab=1000
    )
    small_models.write_model(folder / "source", config, dtype=torch.float32, shards=3)
    split(
        folder / "source",
        folder / "set",
        tensor_parallel_size=2,
        options=SplitOptions(max_part_bytes=2 * 10**6),
    )
    push(folder / "set", folder / "store")
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path / "server") as found:
        found.make_bucket("bucket")
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        yield found


def objects(server: S3Server) -> dict[str, bytes]:
    return {key.removeprefix("m/"): path.read_bytes() for key, path in server.objects("bucket").items()}


def requests(server: S3Server, operation: str) -> list[dict[str, Any]]:
    """Those that have succeeded."""
    return [
        each for each in server.stats()["log"] if each["operation"] == operation and each["status"] == 200
    ]


def arguments(model: Path, uri: str, scratch: Path, *more: object) -> list[str]:
    command = [SHARDPREP, "split", model / "source", uri, "-tp", 2, "--max-part-size", "2MB"]
    return [str(each) for each in (*command, "--scratch", scratch, *more)]


def run(args: list[str], code: int = 0) -> str:
    found = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    return found.stdout if code == 0 else found.stderr


def begin(model: Path, store: str, scratch: Path, *, conduct: Conduct | None = None, **options: Any) -> None:
    how = SplitOptions(max_part_bytes=2 * 10**6, scratch=scratch, **options)
    split(model / "source", store, tensor_parallel_size=2, options=how, conduct=conduct)


def test_a_split_into_a_store_puts_what_a_push_of_the_split_puts(
    model: Path, tmp_path: Path, scratch: Path
) -> None:
    shown = run(arguments(model, f"file://{tmp_path}/store", scratch))
    assert contents(tmp_path / "store") == contents(model / "store")
    assert f"in file://{tmp_path}/store" in shown
    assert not list(scratch.iterdir())


def test_a_split_into_s3_does_too_and_needs_no_full_copy(
    model: Path, server: S3Server, scratch: Path
) -> None:
    run(arguments(model, "s3://bucket/m", scratch))
    assert objects(server) == contents(model / "store")
    assert not list(scratch.iterdir())


@pytest.mark.slow
def test_a_second_revision_sends_only_what_changed(model: Path, server: S3Server, scratch: Path) -> None:
    push(model / "set", "s3://bucket/m")
    server.reset_stats()
    run(arguments(model, "s3://bucket/m", scratch, "--revision", "again"))
    puts = [each["key"] for each in server.stats()["log"] if each["method"] in ("PUT", "POST")]
    assert puts == ["m/manifests/again.json"]


def test_a_dry_run_touches_neither_store_nor_scratch(model: Path, tmp_path: Path, scratch: Path) -> None:
    begin(model, f"file://{tmp_path}/store", scratch, dry_run=True)
    assert not (tmp_path / "store").exists()
    assert not scratch.exists()
    with pytest.raises(InputError, match="is not a revision's name"):
        begin(model, f"file://{tmp_path}/store", scratch, dry_run=True, revision="a/b")


def test_a_folder_has_no_revisions(model: Path, tmp_path: Path) -> None:
    args = [SHARDPREP, "split", str(model / "source"), str(tmp_path / "new"), "-tp", "2", "--revision", "a"]
    assert "a folder has neither revisions nor scratch space" in run(args, 2)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_split_is_resumed_and_nothing_is_sent_twice(
    model: Path, server: S3Server, scratch: Path
) -> None:
    """Each part is one request here, so a blob that is there was sent once and whole."""
    server.fault("delay", times=0, method="PUT", match="m/blobs/", delay=0.1)
    args = arguments(model, "s3://bucket/m", scratch, "--max-workers", 1)
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended(process):
        end = time.monotonic() + 60
        while len(list(scratch.glob("*/*.receipt"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < end
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert "manifests/main.json" not in objects(server)
    time.sleep(0.5)
    there = {each["key"] for each in requests(server, "PutObject")}
    assert len(there) >= 3
    server.clear()
    server.reset_stats()
    run(args)
    assert objects(server) == contents(model / "store")
    again = [each["key"] for each in requests(server, "PutObject")]
    assert len(set(again)) == len(again)
    assert not {key for key in again if "blobs/" in key} & there
    assert not list(scratch.iterdir())


def test_parts_that_are_in_the_store_are_not_written_again(
    model: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run has progress for them from the start, and reads only what is left."""
    store = tmp_path / "store"
    sent: list[int] = []

    def fail_after_a_while(nbytes: int) -> None:
        sent.append(nbytes)
        if len(sent) == 4:
            raise StoreError("the store is gone")

    with pytest.raises(StoreError, match="the store is gone"):
        begin(model, f"file://{store}", scratch, conduct=Conduct(1, progress=fail_after_a_while))
    kept = {path.name for path in scratch.glob("*/*")}
    assert any(name.endswith(".receipt") for name in kept)
    assert not any(name.endswith(".unfinished") for name in kept)
    before = {path: path.stat().st_ino for path in (store / "blobs").iterdir()}
    steps: list[int] = []
    created: list[str] = []
    create = StoreStaging.create

    def spied(self: StoreStaging, name: str) -> int:
        created.append(name)
        return create(self, name)

    monkeypatch.setattr(StoreStaging, "create", spied)
    begin(model, f"file://{store}", scratch, conduct=Conduct(1, progress=steps.append))
    assert len(created) == len(set(created))
    assert not {f"{name}.receipt" for name in created} & kept
    assert steps[0] == sum(
        each.size
        for each in read_revision(FolderStore(store), "main")[1].parts
        if f"{each.path}.receipt" in kept
    )
    assert contents(store) == contents(model / "store")
    assert {path: path.stat().st_ino for path in before} == before


def test_a_receipt_is_believed_only_while_the_store_has_the_blob(
    model: Path, tmp_path: Path, scratch: Path
) -> None:
    store = tmp_path / "store"

    def fail(nbytes: int) -> None:
        if len(list(scratch.glob("*/*.receipt"))) >= 3:
            raise StoreError("the store is gone")

    with pytest.raises(StoreError, match="the store is gone"):
        begin(model, f"file://{store}", scratch, conduct=Conduct(1, progress=fail))
    first, second, *_ = sorted((store / "blobs").iterdir(), key=lambda path: path.stat().st_size)[::-1]
    first.unlink()
    second.write_bytes(b"short")
    with pytest.raises(StoreError, match="5 bytes lie there"):
        begin(model, f"file://{store}", scratch)
    second.unlink()
    begin(model, f"file://{store}", scratch)
    assert contents(store) == contents(model / "store")


def test_the_scratch_folder_stays_within_its_bound(
    model: Path, server: S3Server, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault("delay", times=0, method="PUT", match="m/blobs/", delay=0.25)
    bounds: list[int] = []
    enter = StoreStaging.__enter__

    def spied(self: StoreStaging) -> StoreStaging:
        bounds.append(self.bound)
        return enter(self)

    monkeypatch.setattr(StoreStaging, "__enter__", spied)
    most = 0
    end = threading.Event()

    def watch() -> None:
        nonlocal most
        while not end.is_set():
            held = 0
            for path in scratch.glob("*/*"):
                try:
                    held += path.stat().st_size
                except FileNotFoundError:
                    continue
            most = max(most, held)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        begin(model, "s3://bucket/m", scratch, conduct=Conduct(1))
    finally:
        end.set()
        thread.join()
    assert objects(server) == contents(model / "store")
    total = sum(map(len, contents(model / "store").values()))
    assert 0 < bounds[0] < total / 2
    assert bounds[0] / 4 < most <= bounds[0] + 100_000  # side files and receipts


def test_a_scratch_folder_that_others_may_enter_is_refused(
    model: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(nbytes: int) -> None:
        raise StoreError("the store is gone")

    with pytest.raises(StoreError, match="the store is gone"):
        begin(model, f"file://{tmp_path}/store", scratch, conduct=Conduct(1, progress=fail))
    (own,) = scratch.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o755)
    with pytest.raises(InputError, match="only this user may enter"):
        begin(model, f"file://{tmp_path}/store", scratch)
    shutil.rmtree(own)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="only this user may enter"):
        begin(model, f"file://{tmp_path}/store", scratch)
    own.unlink()
    own.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="only this user may enter"):
        begin(model, f"file://{tmp_path}/store", scratch)


@pytest.mark.slow
def test_the_same_split_twice_at_a_time_is_refused(model: Path, server: S3Server, scratch: Path) -> None:
    # the first cannot end before the faults are cleared: no blob but one is taken
    server.fault("status", times=0, skip=1, code=503, method="PUT", match="m/blobs/")
    args = arguments(model, "s3://bucket/m", scratch, "--max-workers", 1)
    first = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended(first):
        while not server.stats()["modes"].get("status"):
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # or its pauses between tries would grow meanwhile
        assert "another shardprep is at the same split" in run(args, 2)
        assert first.poll() is None
        server.clear()
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    assert objects(server) == contents(model / "store")


@pytest.mark.slow
def test_a_store_that_is_lost_midway_fails_the_split_and_the_rerun_completes_it(
    model: Path, server: S3Server, scratch: Path
) -> None:
    server.fault("status", times=0, skip=4, code=403, method="PUT", match="m/blobs/")
    args = arguments(model, "s3://bucket/m", scratch)
    assert "the store refuses" in run(args, 1)
    assert "manifests/main.json" not in objects(server)
    assert not list(scratch.glob("*/*.unfinished"))
    server.clear()
    run(args)
    assert objects(server) == contents(model / "store")


def test_a_damaged_source_publishes_nothing_and_leaves_no_scratch(
    model: Path, tmp_path: Path, scratch: Path
) -> None:
    source = shutil.copytree(model / "source", tmp_path / "source")
    last = sorted(source.glob("*.bin"))[-1]
    tensors = torch.load(last)
    raw = bytearray(last.read_bytes())
    raw[raw.index(next(reversed(tensors.values())).numpy().tobytes()[:64])] ^= 1
    last.write_bytes(raw)
    with pytest.raises(IntegrityError, match="crc32"):
        split(
            source, f"file://{tmp_path}/store", tensor_parallel_size=2, options=SplitOptions(scratch=scratch)
        )
    assert not (tmp_path / "store" / "manifests").exists()
    assert not list(scratch.iterdir())


def test_another_manifest_meanwhile_is_a_conflict_and_the_rerun_replaces_it(
    model: Path, tmp_path: Path, scratch: Path
) -> None:
    store = tmp_path / "store"
    other = small_models.write_model(tmp_path / "other")
    split(other, tmp_path / "other-set", tensor_parallel_size=2)
    calls: list[int] = []

    def progress(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 3:
            push(tmp_path / "other-set", store)

    with pytest.raises(ConflictError, match="somebody else has published"):
        begin(model, f"file://{store}", scratch, conduct=Conduct(1, progress=progress))
    raw = (store / "manifests" / "main.json").read_bytes()
    assert raw == (tmp_path / "other-set" / "shardprep.json").read_bytes()
    before = {path: path.stat().st_ino for path in (store / "blobs").iterdir()}
    begin(model, f"file://{store}", scratch)
    assert contents(store).items() >= contents(model / "store").items()
    assert {path: path.stat().st_ino for path in (store / "blobs").iterdir()} == before


def test_a_blob_that_is_pruned_meanwhile_is_noticed_before_anything_is_published(
    model: Path, tmp_path: Path, scratch: Path
) -> None:
    store = tmp_path / "store"
    removed: list[Path] = []

    def progress(nbytes: int) -> None:
        found = list((store / "blobs").glob("*")) if (store / "blobs").exists() else []
        if found and not removed:
            removed.append(found[0])
            found[0].unlink()

    # noticed at the end, or at once by the thread that has just sent it
    with pytest.raises(StoreError, match=r"1 blobs were removed while|no such object"):
        begin(model, f"file://{store}", scratch, conduct=Conduct(1, progress=progress))
    assert not (store / "manifests").exists()
    begin(model, f"file://{store}", scratch)
    assert contents(store) == contents(model / "store")
