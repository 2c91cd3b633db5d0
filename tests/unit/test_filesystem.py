"""How a folder is read is chosen by the kind of file system that it lies on, and said in the log."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shardprep_runtime import load
from shardprep_runtime.errors import InputError, IntegrityError, SourceError
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard import filesystem
from shardprep_runtime.shard.filesystem import choose_io, file_system, is_network
from shardprep_runtime.shard.shard_set import ShardSet

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"

MOUNTS = r"""22 28 0:21 / /sys rw,nosuid - sysfs sysfs rw
28 1 {local} / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard
30 28 0:26 / /mnt/with\040space rw - nfs4 server:/export\040one rw,vers=4.2
31 28 {here} / /models rw,relatime shared:2 master:1 propagate_from:3 - {kind} {source} rw
32 28 0:99 / /other rw - tmpfs tmpfs rw
"""


def mounts(tmp_path: Path, kind: str, source: str = "none") -> Path:
    """A mountinfo in which the folder of this test lies on a file system of that kind."""
    device = tmp_path.stat().st_dev
    here = f"{os.major(device)}:{os.minor(device)}"
    file = tmp_path / "mountinfo"
    file.write_text(
        MOUNTS.format(local="259:1" if here != "259:1" else "259:2", here=here, kind=kind, source=source)
    )
    return file


@pytest.mark.parametrize(
    ("kind", "source", "network"),
    [
        ("nfs4", r"10.0.0.1:/weights\040and\040more", True),
        ("nfs", "server:/export", True),
        ("fuse.s3fs", "s3fs", True),
        ("fuse.gcsfuse", "bucket - with - dashes", True),
        ("fuse", "mount-s3", True),
        ("lustre", "10.0.0.1@tcp:/fsx", True),
        ("ceph", "10.0.0.1:6789:/", True),
        ("cifs", "//server/share", True),
        ("virtiofs", "models", True),
        ("9p", "models", True),
        ("overlay", "overlay", False),
        ("ext4", "/dev/nvme0n1", False),
        ("xfs", "/dev/md0", False),
        ("tmpfs", "tmpfs", False),
        ("fuse.fuse-overlayfs", "fuse-overlayfs", False),
        ("fuseblk", "/dev/sda1", False),
        ("nfsd", "nfsd", False),
    ],
)
def test_the_kind_is_the_one_that_the_kernel_names(
    tmp_path: Path, kind: str, source: str, network: bool
) -> None:
    found = file_system(tmp_path, mounts=mounts(tmp_path, kind, source))
    assert found == kind
    assert is_network(found) is network


def test_what_was_mounted_last_covers_what_was_there(tmp_path: Path) -> None:
    file = mounts(tmp_path, "ext4")
    device = tmp_path.stat().st_dev
    with file.open("a") as stream:
        stream.write(f"40 28 {os.major(device)}:{os.minor(device)} /sub /models rw - nfs4 server:/x rw\n")
    assert file_system(tmp_path, mounts=file) == "nfs4"


def test_what_cannot_be_known_is_taken_for_local(tmp_path: Path) -> None:
    assert file_system(tmp_path / "missing") is None
    assert file_system(tmp_path, mounts=tmp_path / "missing") is None
    (tmp_path / "empty").write_text("")
    assert file_system(tmp_path, mounts=tmp_path / "empty") is None
    assert not is_network(None)


def test_the_kernel_of_this_machine_is_understood() -> None:
    assert file_system(Path("/proc")) == "proc"
    assert file_system(Path("/")) is not None


@pytest.mark.parametrize(
    ("kind", "io", "chosen", "words"),
    [
        ("nfs4", "auto", "read", "nfs4 (a network file system): reading in parallel"),
        ("ext4", "auto", "mmap", "ext4 (a local file system): mapping"),
        (None, "auto", "mmap", "unknown file system (a local file system): mapping"),
        ("nfs4", "mmap", "mmap", "nfs4 (as asked for): mapping"),
        ("ext4", "read", "read", "ext4 (as asked for): reading in parallel"),
    ],
)
def test_which_way_and_why_is_said_in_the_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str | None,
    io: Any,
    chosen: str,
    words: str,
) -> None:
    monkeypatch.setattr(filesystem, "file_system", lambda _: kind)
    with caplog.at_level(logging.INFO, logger="shardprep_runtime"):
        assert choose_io(tmp_path, io) == chosen
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path}: {words}"
    assert record.levelno == logging.INFO


def test_no_other_way_is_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="io must be auto, mmap or read, not 'fast'"):
        choose_io(tmp_path, "fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="io must be auto, mmap or read"):
        ShardSet(str(SHARDS), io="fast").load()  # type: ignore[arg-type]


GRIDS: list[dict[str, Any]] = [
    {"tensor_parallel_size": 4, "rank": 2},
    {"tensor_parallel_size": 1, "rank": 0},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "rank": 3},
]


@pytest.mark.parametrize("verify", ["blocks", "headers", "off"])
@pytest.mark.parametrize("grid", GRIDS)
def test_both_ways_give_the_same_bytes(grid: dict[str, Any], verify: Any) -> None:
    with (
        ShardSet(
            str(SHARDS),
            io="mmap",
        ).load(Place(**grid)) as expected,
        ShardSet(
            str(SHARDS),
            io="read",
            verify=verify,
        ).load(Place(**grid)) as shard,
    ):
        assert list(shard) == list(expected)
        for name in expected:
            assert shard.memory(name) == expected.memory(name)


def test_auto_reads_what_lies_on_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, fetched in (("nfs4", True), ("ext4", False)):
        monkeypatch.setattr(filesystem, "file_system", lambda _, kind=kind: kind)
        with load(SHARDS, **GRIDS[0]) as shard:
            shard.wait()
            assert (shard.bytes_fetched > 0) == fetched


def test_damage_is_found_when_reading_too(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHARDS, tmp_path / "set"))
    with load(folder, **GRIDS[0]) as shard:
        part, piece, start, _ = next(shard.ranges())
        path, at = folder / part.part.path, piece.span.start + start
        name = piece.name
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with (
        ShardSet(
            str(folder),
            io="read",
        ).load(Place(**GRIDS[0])) as shard,
        pytest.raises(IntegrityError, match="does not match its digest"),
    ):
        shard.memory(name)
    os.truncate(path, at)
    with (
        ShardSet(
            str(folder),
            io="read",
        ).load(Place(**GRIDS[0])) as shard,
        pytest.raises(SourceError, match="ends at byte"),
    ):
        shard.wait()
