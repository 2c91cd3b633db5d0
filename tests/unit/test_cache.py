"""The cache of a host keeps to its bound, forgets what was opened longest ago, and never what is in use."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shardprep_runtime import environment, load, read_manifest
from shardprep_runtime.errors import InputError, WriteError
from shardprep_runtime.format.manifest import Part, digest_of
from shardprep_runtime.shard.cache import Cache
from shardprep_runtime.shard.landing import Landing
from stores import make_store

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"
KIB = 1024
SIZE = 64 * KIB
"""Of the parts here."""


def part(number: int, size: int = SIZE) -> Part:
    """A part that exists by its name alone."""
    return Part(f"p{number}", size, 100, digest_of(b"%d" % number), (0, 1), (0, 1), ())


class Used:
    """Parts in a cache, opened and filled as a load does."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.landings: list[Landing] = []

    def fill(self, number: int, *, size: int = SIZE, stop: int | None = None) -> Landing:
        """Open part `number`, make room for its bytes up to `stop`, and write them."""
        landing = self.cache.open(part(number, size))
        self.landings.append(landing)
        stop = stop or size
        self.cache.make_room([(landing, [(0, stop)], 0)])
        landing.write(b"x" * stop, 0)
        return landing

    def close(self, landing: Landing) -> None:
        self.landings.remove(landing)
        landing.close()
        os.close(landing.data)

    def keep(self, number: int, *, at: float) -> None:
        """A part that was opened at that time, and is not in use any more."""
        self.close(self.fill(number))
        os.utime(self.cache._path(part(number).digest), (at, at))

    def there(self, number: int) -> bool:
        path = self.cache._path(part(number).digest)
        assert path.exists() == path.with_name(path.name + ".landed").exists()
        return path.exists()


@pytest.fixture
def used(tmp_path: Path) -> Iterator[Callable[[int], Used]]:
    """Makes a cache of as many bytes."""
    made: list[Used] = []

    def make(max_bytes: int) -> Used:
        made.append(Used(Cache(tmp_path / "cache", max_bytes=max_bytes)))
        return made[-1]

    yield make
    for each in made:
        for landing in tuple(each.landings):
            each.close(landing)


def stored(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "blobs").glob("*") if path.suffix == "")


# ---------------------------------------------------------------------------------------------------------- eviction


def test_what_was_opened_longest_ago_goes_first(used: Callable[[int], Used]) -> None:
    cache = used(4 * SIZE)
    for number, at in ((0, 300), (1, 100), (2, 400), (3, 200)):
        cache.keep(number, at=at)
    cache.close(cache.fill(4))
    assert [cache.there(number) for number in range(5)] == [True, False, True, True, True]
    cache.close(cache.fill(5))
    assert [cache.there(number) for number in range(6)] == [True, False, True, False, True, True]


def test_opening_makes_a_part_recent(used: Callable[[int], Used]) -> None:
    cache = used(3 * SIZE)
    for number, at in ((0, 100), (1, 200), (2, 300)):
        cache.keep(number, at=at)
    landing = cache.cache.open(part(0))
    landing.close()
    os.close(landing.data)
    cache.fill(3)
    assert [cache.there(number) for number in range(4)] == [True, False, True, True]


def test_no_more_goes_than_has_to(used: Callable[[int], Used]) -> None:
    cache = used(3 * SIZE)
    for number in range(3):
        cache.keep(number, at=100 + number)
    cache.fill(3, size=SIZE, stop=4 * KIB)
    assert [cache.there(number) for number in range(4)] == [False, True, True, True]
    cache.fill(4, stop=SIZE - 4 * KIB)
    assert [cache.there(number) for number in range(5)] == [False, True, True, True, True]


def test_what_is_open_is_never_evicted(used: Callable[[int], Used]) -> None:
    cache = used(2 * SIZE)
    first = cache.fill(0)
    second = cache.fill(1)
    with pytest.raises(WriteError) as caught:
        cache.fill(2)
    assert "65,536 bytes do not fit into the cache of 131,072 beside what is in use" in str(caught.value)
    assert "SHARDPREP_CACHE_SIZE" in str(caught.value)
    assert "cache=None" in str(caught.value)
    assert cache.there(0)
    assert cache.there(1)
    assert stored(cache.cache.folder) == 2 * SIZE
    cache.close(first)
    cache.fill(3)
    assert not cache.there(0)
    assert os.pread(second.data, 3, 0) == b"xxx"


def test_the_bound_is_kept_whatever_comes(used: Callable[[int], Used]) -> None:
    cache = used(5 * SIZE)
    for number in range(20):
        cache.close(cache.fill(number, stop=SIZE if number % 3 else SIZE // 2))
        assert stored(cache.cache.folder) <= 5 * SIZE
    assert cache.there(19)


def test_a_request_larger_than_the_cache_is_refused(used: Callable[[int], Used]) -> None:
    cache = used(SIZE)
    with pytest.raises(WriteError, match="do not fit"):
        cache.fill(1, size=2 * SIZE)
    assert stored(cache.cache.folder) == 0


def test_two_workers_of_one_part_need_its_room_once(used: Callable[[int], Used]) -> None:
    """The second comes before any byte has landed: what the first has set aside is there for both."""
    cache = used(SIZE + 16 * KIB)
    first, second = cache.cache.open(part(0)), cache.cache.open(part(0))
    cache.landings += [first, second]
    for landing in (first, second, first):
        cache.cache.make_room([(landing, [(0, SIZE)], 0)])
    assert stored(cache.cache.folder) == SIZE
    with pytest.raises(WriteError, match="65,536 bytes do not fit"):
        cache.fill(1)


def test_files_of_somebody_else_are_neither_counted_nor_evicted(used: Callable[[int], Used]) -> None:
    """A cache may be put where a store or anything else is by mistake."""
    cache = used(SIZE)
    others = [cache.cache.folder / "blobs" / name for name in ("README", "0" * 64)]
    for path in others:
        path.write_bytes(b"mine" * KIB)
        os.utime(path, (1, 1))
    (cache.cache.folder / "blobs/folder").mkdir()
    cache.keep(1, at=100)
    cache.fill(2)
    assert not cache.there(1)
    assert [path.read_bytes() for path in others] == [b"mine" * KIB] * 2


def test_a_mapping_keeps_a_part_after_its_shard_was_closed(tmp_path: Path) -> None:
    store = make_store(SHARDS, tmp_path / "store")
    cache = Cache(tmp_path / "cache", max_bytes=2**30)
    with load(f"file://{store}", cache=cache, tensor_parallel_size=4, rank=1) as shard:
        shard.wait()
        name = "model.layers.0.mlp.gate_proj.weight"
        path = cache._path(next(p.part.digest for p, _ in shard._located[name]))
        memory = shard.memory(name)
        expected = bytes(memory)
    del shard
    gc.collect()
    tight = Cache(tmp_path / "cache", max_bytes=0)
    empty = tight.open(part(99))

    def squeeze() -> None:
        with pytest.raises(WriteError):
            tight.make_room([(empty, [(0, SIZE)], 0)])

    squeeze()
    assert path.exists()
    assert [each.name for each in (tmp_path / "cache/blobs").iterdir() if each.stat().st_blocks > 8] == [
        path.name
    ]
    assert memory == expected
    del memory
    gc.collect()
    squeeze()
    assert not path.exists()
    empty.close()
    os.close(empty.data)


# ------------------------------------------------------------------------------------------------------------- races


def churn(folder: Path, seed: int, rounds: int, bound: int) -> None:
    """Open, fill, look at and close parts in a cache that holds three of ten."""
    cache = Used(Cache(folder, max_bytes=bound))
    for i in range(rounds):
        number = (seed * 7 + i * 3) % 10
        landing = cache.cache.open(part(number))
        path = cache.cache._path(part(number).digest)
        assert path.stat().st_ino == os.fstat(landing.data).st_ino
        chart = path.with_name(path.name + ".landed")
        assert chart.stat().st_ino == os.fstat(landing.chart).st_ino
        while True:
            try:
                cache.cache.make_room([(landing, [(0, SIZE)], 0)])
                break
            except WriteError:  # the others hold the three
                time.sleep(0.001)
        if landing.state(1)[1]:
            assert os.pread(landing.data, SIZE, 0) == b"%d" % number * SIZE
        landing.write(b"%d" % number * SIZE, 0)
        landing.mark(1, 2)
        assert path.stat().st_ino == os.fstat(landing.data).st_ino
        landing.close()
        os.close(landing.data)


def test_processes_that_evict_at_once_never_lose_what_another_has_open(tmp_path: Path) -> None:
    bound = 3 * SIZE + 4 * KIB
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=churn, args=(tmp_path / "cache", seed, 60, bound)) for seed in (1, 2)]
    for process in running:
        process.start()
    most = 0
    while any(process.is_alive() for process in running):
        most = max(most, stored_now(tmp_path / "cache"))
        time.sleep(0.01)
    assert [process.exitcode for process in running] == [0, 0]
    assert 0 < most <= bound + SIZE  # files come and go while they are counted


def stored_now(folder: Path) -> int:
    try:
        return stored(folder)
    except FileNotFoundError:
        return 0


def test_a_part_is_not_evicted_between_being_opened_and_being_locked(
    used: Callable[[int], Used], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens it holds what an evictor needs."""
    cache = used(SIZE)
    cache.keep(0, at=100)
    seen: list[bool] = []
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not seen:
            with (cache.cache.folder / "lock").open() as lock:
                try:
                    real(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    seen.append(False)
                except BlockingIOError:
                    seen.append(True)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    landing = cache.cache.open(part(0))
    cache.landings.append(landing)
    assert seen == [True]


# ---------------------------------------------------------------------------------------------------------- the folder


def test_a_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a/b/cache")
    for folder in (cache.folder, cache.folder / "blobs", cache.folder / "manifests"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.max_bytes == shutil.disk_usage(tmp_path).total // 2


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(InputError, match="others can write to the cache: what lies there cannot be trusted"):
        Cache(folder)
    folder.chmod(0o755)
    Cache(folder)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(InputError, match="others can write"):
            Cache(folder)


def test_a_cache_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        WriteError, match=r"the cache cannot be made: Not a directory; choose another folder, or"
    ):
        Cache(tmp_path / "file/cache")


def test_a_manifest_is_kept_once_and_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    raw = b"x" * 1000
    assert cache.manifest(digest_of(raw)) is None
    cache.keep_manifest(digest_of(raw), raw)
    cache.keep_manifest(digest_of(raw), raw)
    assert cache.manifest(digest_of(raw)) == raw
    assert len(list((cache.folder / "manifests").iterdir())) == 1


def test_the_environment_says_where_and_how_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDPREP_CACHE_DIR", str(tmp_path / "own"))
    assert environment.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SHARDPREP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environment.cache_folder() == tmp_path / "xdg/shardprep"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / ".cache/shardprep"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="this user has no home; set SHARDPREP_CACHE_DIR"):
        environment.cache_folder()
    for given, expected in (("", None), ("12", 12), ("1 TiB", 2**40), ("200GB", 200 * 10**9), ("3kib", 3072)):
        monkeypatch.setenv("SHARDPREP_CACHE_SIZE", given)
        assert environment.cache_bytes() == expected
    for given in ("x", "-1", "1.5GB", "1PB", "9" * 30):
        monkeypatch.setenv("SHARDPREP_CACHE_SIZE", given)
        with pytest.raises(InputError, match="SHARDPREP_CACHE_SIZE is"):
            environment.cache_bytes()


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {found.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_old_parts_make_way(disk: Path) -> None:
    cache = Used(Cache(disk / "cache", max_bytes=2**30))
    for number in range(10):
        cache.keep(number, at=100 + number)
    (disk / "of somebody else").write_bytes(b"x" * 256 * KIB)
    # 896 of 1024 KiB are taken, beside the maps: two more parts do not fit
    held = [cache.fill(20), cache.fill(21), cache.fill(22)]
    assert not cache.there(0)
    assert cache.there(9)
    with pytest.raises(
        WriteError, match=r"p23: 1,048,576 bytes cannot be set aside: No space left on device"
    ):
        cache.fill(23, size=16 * SIZE)
    assert all(os.pread(landing.data, 1, SIZE - 1) == b"x" for landing in held)
    for landing in tuple(cache.landings):
        cache.close(landing)


def test_a_cache_on_a_full_disk_does_not_keep_the_manifest_and_starts(disk: Path) -> None:
    cache = Cache(disk / "cache")
    (disk / "full").write_bytes(b"x" * (900 * KIB))
    raw = b"x" * 2**20
    cache.keep_manifest(digest_of(raw), raw)
    assert cache.manifest(digest_of(raw)) is None
    assert list((cache.folder / "manifests").iterdir()) == []


def test_parts_of_a_real_set_share_a_cache_by_their_digest(tmp_path: Path) -> None:
    """Two revisions that share a part share its bytes."""
    manifest = read_manifest(SHARDS)
    cache = Cache(tmp_path / "cache")
    first = cache.open(manifest.parts[0])
    second = cache.open(replace(manifest.parts[0], path="another name"))
    assert os.fstat(first.data).st_ino == os.fstat(second.data).st_ino
    for landing in (first, second):
        landing.close()
        os.close(landing.data)
