"""A pull brings exactly what was asked for, proved, whatever interrupts it; and writes over nothing that is not its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_models
from processes import ended
from shardprep.cli import main
from shardprep.split import SplitOptions, split
from shardprep_runtime import read_manifest
from shardprep_runtime.errors import FormatError
from shardprep_runtime.format.manifest import Part
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.landing import ABSENT, HEAD, VERIFIED, read_map
from shardprep_runtime.shard.parts import Numbered, open_part
from shardprep_runtime.shard.revisions import blob_key
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stores.folder import FolderStore
from stores import make_store

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))
TESTS = Path(__file__).parents[1]
BLOCK = 256
RANK: dict[str, Any] = {"tensor_parallel_size": 4, "pipeline_parallel_size": 4}
"""Four stages of a set that was split for two: a rank needs one half of a part of layers."""
RANK_OPTIONS = ["-tp", 4, "-pp", 4]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of many small blocks."""
    folder = tmp_path_factory.mktemp("set")
    source = small_models.write_model(folder / "source")
    split(
        source,
        folder / "set",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        options=SplitOptions(block_bytes=BLOCK),
    )
    return folder / "set"


@pytest.fixture
def store(shards: Path, tmp_path: Path) -> Path:
    return make_store(shards, tmp_path / "store")


def pull(*args: object, code: int = 0, env: Mapping[str, str | None] | None = None) -> str:
    """What the command says: on stdout where it succeeds, else its one clear error."""
    clean = {"RANK": None, "WORLD_SIZE": None, **(env or {})}
    found = CliRunner().invoke(main, ["pull", *map(str, args)], env=clean)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == code, found.output
    if not code:
        return found.stdout
    assert found.stdout == ""
    said = [
        line for line in found.stderr.splitlines() if line.strip() and not line.startswith(("Usage", "Try"))
    ]
    assert len(said) == 1, said
    assert said[0].startswith("Error: ")
    return said[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def needed(shards: Path, **grid: Any) -> dict[str, set[int]]:
    """Path of each part -> the numbers of the blocks that a view needs."""
    found: dict[str, set[int]] = {}
    with open_set(shards, verify="off").load(Place(**grid)) as shard:
        for part, piece, start, stop in shard.ranges():
            numbers = Numbered(part).numbers(piece.span.start + start, piece.span.start + stop)
            found.setdefault(part.part.path, set()).update(numbers)
    return found


def count_blocks(shards: Path, part: Part) -> int:
    opened = open_part(shards, part, read_manifest(shards))
    try:
        return len(Numbered(opened).blocks)
    finally:
        opened.close()


def there(shards: Path, folder: Path) -> dict[str, set[int]]:
    """Path of each part that a pull has begun or finished -> the numbers of the blocks that are there."""
    found = {}
    for part in read_manifest(shards).parts:
        count = count_blocks(shards, part)
        if (folder / part.path).exists():
            assert (folder / part.path).read_bytes() == (shards / part.path).read_bytes()
            found[part.path] = set(range(1, count + 1))
        elif (folder / f"{part.path}.sparse").exists():
            landed = read_map(folder / f"{part.path}.sparse", part, count)
            if (
                landed is None
            ):  # killed between making the file and beginning its map: nothing of it counts as there
                found[part.path] = set()
                continue
            assert set(landed) <= {ABSENT, VERIFIED}
            found[part.path] = {number for number in range(1, count + 1) if landed[number]}
    return found


def tensors(shard: Any) -> dict[str, bytes]:
    return {name: bytes(shard.memory(name)) for name in shard.view.tensors}


# -------------------------------------------------------------------------------------------------------------- whole


def test_all_is_the_shard_set_byte_for_byte(shards: Path, store: Path, tmp_path: Path) -> None:
    said = pull(f"file://{store}", tmp_path / "there", "--all")
    assert contents(tmp_path / "there") == contents(shards)
    count = len(read_manifest(shards).parts)
    assert f"in {count} parts ({count} of them whole)" in said
    assert "all of it: " in said
    for path in (tmp_path / "there").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "there")]).exit_code == 0


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_store_may_be_named_by_its_folder_and_a_revision_by_name(shards: Path, tmp_path: Path) -> None:
    store = make_store(shards, tmp_path / "store", "v2")
    pull(store, tmp_path / "there", "--all", "--revision", "v2")
    assert contents(tmp_path / "there") == contents(shards)
    assert "no revision main; there are v2" in pull(store, tmp_path / "other", "--all", code=1)
    assert not (tmp_path / "other").exists()


def test_a_second_pull_of_all_brings_nothing(store: Path, tmp_path: Path) -> None:
    pull(store, tmp_path / "there", "--all")
    before = {path: path.stat().st_ino for path in (tmp_path / "there").glob("*.safetensors")}
    report = json.loads(pull(store, tmp_path / "there", "--all", "--json"))
    assert report["bytes_fetched"] == 0
    assert report["nbytes"] > 0
    assert {path: path.stat().st_ino for path in before} == before


def test_what_is_in_the_way_of_a_finished_pull_is_found(shards: Path, store: Path, tmp_path: Path) -> None:
    pull(store, tmp_path / "there", "--all")
    path = tmp_path / "there" / read_manifest(shards).parts[0].path
    os.truncate(path, path.stat().st_size - 1)
    assert "truncated" in pull(store, tmp_path / "there", "--all", code=2)
    path.write_bytes(b"\0" * (path.stat().st_size + 1))
    assert "the header's digest is" in pull(store, tmp_path / "there", "--all", code=1)


def test_the_report_as_json(shards: Path, store: Path, tmp_path: Path) -> None:
    report = json.loads(pull(store, tmp_path / "there", *RANK_OPTIONS, "--rank", 5, "--json"))
    assert set(report) == {
        "source", "revision", "manifest_digest", "destination", "rank", "nbytes", "bytes_fetched", "parts", "seconds",
    }  # fmt: skip
    with open_set(shards).load(Place(rank=5, **RANK)) as shard:
        assert report["nbytes"] == shard.bytes_read - sum(part.header_size for part in shard.view.parts)
        assert [path for path, _ in report["parts"]] == [part.path for part in shard.view.parts]
    assert report["rank"] == 5
    assert report["revision"] == "main"
    assert report["destination"] == str(tmp_path / "there")


# ------------------------------------------------------------------------------------------------------------ one rank


@pytest.mark.parametrize("rank", [0, 6, 15])
def test_a_rank_gets_its_own_blocks_and_nothing_else(
    shards: Path, store: Path, tmp_path: Path, rank: int
) -> None:
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", rank)
    assert there(shards, folder) == needed(shards, rank=rank, **RANK)
    assert not (folder / ".shardprep-pull").exists()
    names = {path.name for path in folder.iterdir()}
    manifest = read_manifest(shards)
    assert {side.path for side in manifest.side_files} | {"shardprep.json"} <= names
    with open_set(shards).load(Place(rank=rank, **RANK)) as expected:
        for verify in ("blocks", "headers", "off"):
            with open_set(folder, verify=verify).load(Place(rank=rank, **RANK)) as shard:
                assert tensors(shard) == tensors(expected)


def test_a_rank_that_was_not_pulled_is_refused_with_advice(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    for verify in ("blocks", "headers", "off"):
        with pytest.raises(
            FormatError, match=r"those of .* that rank 4 needs; pull for this rank too, or --all"
        ):
            open_set(folder, verify=verify).load(Place(rank=4, **RANK))
        with pytest.raises(FormatError, match="cannot open the part"):
            open_set(folder, verify=verify).load(Place(rank=1, **RANK))
    assert CliRunner().invoke(main, ["verify", str(folder)]).exit_code == 2


def test_a_part_without_its_map_is_not_believed(shards: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    maps = list(folder.glob("*.landed"))
    assert maps
    maps[0].write_bytes(b"something else")
    with pytest.raises(FormatError, match="nothing says which of its bytes are there; pull it again"):
        open_set(folder, verify="off").load(Place(rank=0, **RANK))
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    assert there(shards, folder) == needed(shards, rank=0, **RANK)


def test_ranks_that_come_later_make_the_folder_whole(shards: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    fetched = 0
    for rank in range(16):
        fetched += json.loads(pull(store, folder, *RANK_OPTIONS, "--rank", rank, "--json"))["bytes_fetched"]
        with (
            open_set(folder).load(Place(rank=rank, **RANK)) as shard,
            open_set(shards).load(Place(rank=rank, **RANK)) as expected,
        ):
            assert tensors(shard) == tensors(expected)
    assert contents(folder) == contents(shards)
    assert fetched == sum(part.size - part.header_size for part in read_manifest(shards).parts)


def test_ranks_that_come_at_once_make_the_folder_whole(shards: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    command = [SHARDPREP, "pull", f"file://{store}", str(folder), *map(str, RANK_OPTIONS), "--json", "--rank"]
    pairs = [(0, 4), (1, 5), (8, 12), (0, 1), (9, 13)]
    fetched = 0
    for pair in pairs:
        running = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in pair
        ]
        with ended(running):
            for process in running:
                said, complaint = process.communicate(timeout=60)
                assert process.returncode == 0, complaint
                fetched += json.loads(said)["bytes_fetched"]
        for rank in pair:
            with (
                open_set(folder).load(Place(rank=rank, **RANK)) as shard,
                open_set(shards).load(Place(rank=rank, **RANK)) as expected,
            ):
                assert tensors(shard) == tensors(expected)
    union: dict[str, set[int]] = {}
    for rank in {rank for pair in pairs for rank in pair}:
        for path, numbers in needed(shards, rank=rank, **RANK).items():
            union.setdefault(path, set()).update(numbers)
    assert there(shards, folder) == union
    report = json.loads(pull(store, folder, "--all", "--json"))
    assert contents(folder) == contents(shards)
    assert fetched + report["bytes_fetched"] == sum(
        part.size - part.header_size for part in read_manifest(shards).parts
    )


def test_what_a_crash_of_the_machine_may_have_lost_is_looked_at_before_a_part_gets_its_name(
    shards: Path, store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    chart = max(folder.glob("*.landed"), key=lambda path: path.stat().st_size)
    raw = chart.read_bytes()
    chart.write_bytes(raw[: HEAD - 64] + b"an earlier boot".ljust(64, b"\0") + raw[HEAD:])
    sparse = chart.with_suffix("")
    part = next(part for part in read_manifest(shards).parts if sparse.name == f"{part.path}.sparse")
    lost = min(needed(shards, rank=0, **RANK)[part.path])
    opened = open_part(shards, part, read_manifest(shards))
    block = Numbered(opened).block(lost)
    opened.close()
    with sparse.open("r+b") as stream:
        stream.seek(block.start)
        stream.write(bytes(block.stop - block.start))
    for rank in (4, 8, 12):
        pull(store, folder, *RANK_OPTIONS, "--rank", rank)
    assert not (folder / part.path).exists()
    report = json.loads(pull(store, folder, *RANK_OPTIONS, "--rank", 0, "--json"))
    assert report["bytes_fetched"] == block.stop - block.start
    assert (folder / part.path).read_bytes() == (shards / part.path).read_bytes()


# -------------------------------------------------------------------------------------------------------------- kills

SLOW = """
import importlib, os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from shardprep.write.conduct import Conduct
from shardprep_runtime.format.view import Place
from shardprep_runtime.stores.folder import FolderStore
from stores import CountingStore
module = importlib.import_module("shardprep.publish.pull")
store = CountingStore(FolderStore(Path({store!r})))
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def landing(key, start, stop):
    os.write(log, f"{{key}} {{start}} {{stop}}\\n".encode())
    time.sleep(0.0004)
store.portion = 100
store.landing = landing
module.open_store = lambda *_: store
place = Place(**{grid!r}) if {grid!r} else None
module.pull("file:///x", Path({folder!r}), place=place, conduct=Conduct(workers={workers}))
"""


class Slow:
    """Pulls from a store that is slow, in processes of their own; every byte that came is written down."""

    def __init__(self, store: Path, folder: Path, log: Path, *, workers: int = 3, **grid: Any) -> None:
        self.folder, self.log, self.workers = folder, log, workers
        self.code = SLOW.format(
            tests=str(TESTS), store=str(store), log=str(log), folder=str(folder), workers=workers, grid=grid
        )

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", self.code])

    def came(self) -> Counter[tuple[str, int]]:
        """(key, byte) -> how often it came."""
        found: Counter[tuple[str, int]] = Counter()
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            key, start, stop = line.split()
            found.update((key, at) for at in range(int(start), int(stop)))
        return found


def kill_and_rerun(shards: Path, slow: Slow, pauses: Sequence[float]) -> None:
    """Kill a pull with -9 some time after its first byte has come, again and again, then let it end."""
    headers = {blob_key(part.digest): part.header_size for part in read_manifest(shards).parts}
    kills = 0
    for pause in pauses:
        before = slow.log.stat().st_size if slow.log.exists() else 0
        process = slow.start()
        with ended(process):
            while process.poll() is None and (not slow.log.exists() or slow.log.stat().st_size == before):
                time.sleep(0.002)
            time.sleep(pause)
            process.kill()
            process.wait()
        if process.returncode == 0:
            break
        kills += 1
        final = list(slow.folder.glob("*.safetensors"))
        if final:
            assert len({byte for byte in slow.came() if byte[1] >= headers.get(byte[0], 2**60)}) == sum(
                part.size - part.header_size for part in read_manifest(shards).parts
            )
        there(shards, slow.folder)
    process = slow.start()
    with ended(process):
        assert process.wait(60) == 0
    again = sum(count - 1 for (key, at), count in slow.came().items() if at >= headers.get(key, 2**60))
    assert kills
    assert again <= kills * slow.workers * BLOCK


def test_a_pull_that_was_killed_goes_on_where_it_was(shards: Path, store: Path, tmp_path: Path) -> None:
    slow = Slow(store, tmp_path / "there", tmp_path / "log")
    kill_and_rerun(shards, slow, [0.02, 0.1, 0.1])
    assert contents(tmp_path / "there") == contents(shards)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_pull_that_was_killed_again_and_again_goes_on(
    shards: Path, store: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    slow = Slow(store, tmp_path / "there", tmp_path / "log", workers=rng.randint(1, 6))
    kill_and_rerun(shards, slow, [rng.uniform(0, 0.15) for _ in range(8)])
    assert contents(tmp_path / "there") == contents(shards)


@pytest.mark.slow
def test_a_rank_that_was_killed_goes_on_beside_another(shards: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    first = Slow(store, folder, tmp_path / "log0", rank=0, **RANK)
    second = Slow(store, folder, tmp_path / "log4", rank=4, **RANK)
    for pause in (0.02, 0.05):
        running = [first.start(), second.start()]
        with ended(running):
            while not first.log.exists():
                time.sleep(0.002)
            time.sleep(pause)
            running[0].kill()
            for process in running:
                process.wait(60)
            assert running[1].returncode == 0
    last = first.start()
    with ended(last):
        assert last.wait(60) == 0
    for rank in (0, 4):
        with (
            open_set(folder).load(Place(rank=rank, **RANK)) as shard,
            open_set(shards).load(Place(rank=rank, **RANK)) as expected,
        ):
            assert tensors(shard) == tensors(expected)


def test_a_kill_as_names_are_given_leaves_nothing_behind(shards: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    pull(store, folder, "--all")
    part = read_manifest(shards).parts[0]
    (folder / "shardprep.json").rename(folder / ".shardprep-pull-new")
    (folder / ".shardprep-pull").write_text(f"{manifest_digest(shards)}\n")
    (folder / f"{part.path}.sparse.landed").write_bytes(b"left over")
    pull(store, folder, "--all")
    assert contents(folder) == contents(shards)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".shardprep-pull-new").write_bytes(b"sha2")
    pull(store, folder, "--all")
    assert contents(folder) == contents(shards)


def manifest_digest(shards: Path) -> str:
    from shardprep_runtime.format.manifest import digest_of

    return digest_of((shards / "shardprep.json").read_bytes())


def test_a_block_that_was_spoilt_before_the_rerun_is_fetched_alone(
    shards: Path, store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    sparse = next(folder.glob("*.sparse"))
    part = next(part for part in read_manifest(shards).parts if sparse.name == f"{part.path}.sparse")
    number = min(needed(shards, rank=0, **RANK)[part.path])
    opened = open_part(shards, part, read_manifest(shards))
    block = Numbered(opened).block(number)
    opened.close()
    raw = bytearray(sparse.read_bytes())
    raw[block.start] ^= 1
    sparse.write_bytes(raw)
    report = json.loads(pull(store, folder, *RANK_OPTIONS, "--rank", 0, "--json"))
    assert report["bytes_fetched"] == block.stop - block.start
    with (
        open_set(folder).load(Place(rank=0, **RANK)) as shard,
        open_set(shards).load(Place(rank=0, **RANK)) as expected,
    ):
        assert tensors(shard) == tensors(expected)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "model.safetensors", "config.json", ".shardprep-pull2"]
)
def test_a_folder_with_files_of_others_is_left_alone(store: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / name).write_bytes(b"mine")
    said = pull(store, folder, "--all", code=2)
    assert f"holds {name}; nothing is overwritten: choose an empty or new folder" in said
    assert contents(folder) == {name: b"mine"}


def test_a_file_of_others_among_ours_stops_the_rerun(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    (folder / "notes.txt").write_bytes(b"mine")
    before = contents(folder)
    assert "holds notes.txt" in pull(store, folder, *RANK_OPTIONS, "--rank", 1, code=2)
    assert contents(folder) == before


def test_another_manifest_is_not_mixed_in(shards: Path, store: Path, tmp_path: Path) -> None:
    other = small_models.write_model(tmp_path / "source", seed=1)
    split(
        other,
        tmp_path / "other",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        options=SplitOptions(block_bytes=BLOCK),
    )
    make_store(tmp_path / "other", store, "v2")
    folder = tmp_path / "there"
    pull(store, folder, *RANK_OPTIONS, "--rank", 0)
    before = contents(folder)
    said = pull(store, folder, *RANK_OPTIONS, "--rank", 1, "--revision", "v2", code=2)
    assert "holds another manifest" in said
    assert contents(folder) == before
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / ".shardprep-pull").write_text(manifest_digest(shards))
    assert "holds another manifest" in pull(store, unfinished, "--all", "--revision", "v2", code=2)
    pull(store, unfinished, "--all")
    assert contents(unfinished) == contents(shards)


def test_a_destination_that_is_no_folder_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert "exists and is not a folder" in pull(store, tmp_path / "file", "--all", code=2)
    assert "exists and is not a folder" in pull(store, tmp_path / "file/x", "--all", code=2)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_link_is_not_followed_out_of_the_folder(shards: Path, store: Path, tmp_path: Path) -> None:
    folder, victim = tmp_path / "there", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes(b"mine")
    (folder / ".shardprep-pull").write_text(manifest_digest(shards))
    part = read_manifest(shards).parts[0]
    (folder / f"{part.path}.sparse").symlink_to(victim)
    assert "cannot be written" in pull(store, folder, "--all", code=1)
    assert victim.read_bytes() == b"mine"


def test_a_side_file_that_is_damaged_in_the_store_stops_before_the_manifest(
    shards: Path, store: Path, tmp_path: Path
) -> None:
    side = next(side for side in read_manifest(shards).side_files if side.path == "config.json")
    key = blob_key(side.digest)
    good = (store / key).read_bytes()
    (store / key).write_bytes(b"x" + good[1:])
    said = pull(store, tmp_path / "there", "--all", code=1)
    assert "(config.json), 3 times: the copy that lies there is damaged; put it there again" in said
    assert not (tmp_path / "there/shardprep.json").exists()
    assert not (tmp_path / "there/config.json").exists()
    (store / key).write_bytes(good[:-1])
    assert "ends at byte" in pull(store, tmp_path / "there", "--all", code=1)
    (store / key).unlink()
    assert "no such object" in pull(store, tmp_path / "there", "--all", code=1)
    (store / key).write_bytes(good)
    report = json.loads(pull(store, tmp_path / "there", "--all", "--json"))
    assert report["bytes_fetched"] == 0
    assert contents(tmp_path / "there") == contents(shards)


def test_a_side_file_that_is_damaged_here_is_fetched_again(shards: Path, store: Path, tmp_path: Path) -> None:
    pull(store, tmp_path / "there", "--all")
    (tmp_path / "there/config.json").write_bytes(b"{}")
    pull(store, tmp_path / "there", "--all")
    assert contents(tmp_path / "there") == contents(shards)


@pytest.mark.parametrize("where", [0.0, 0.5])
def test_a_part_that_is_damaged_in_the_store_gets_no_name(
    shards: Path, store: Path, tmp_path: Path, where: float
) -> None:
    part = read_manifest(shards).parts[1]
    path = store / blob_key(part.digest)
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * where) + 9] ^= 1
    path.write_bytes(raw)
    said = pull(store, tmp_path / "there", "--all", code=1)
    assert "digest" in said
    assert not list((tmp_path / "there").glob("*.safetensors"))
    assert not (tmp_path / "there/shardprep.json").exists()
    path.write_bytes((shards / part.path).read_bytes())
    pull(store, tmp_path / "there", "--all")
    assert contents(tmp_path / "there") == contents(shards)


def test_a_part_that_is_missing_in_the_store_is_named(shards: Path, store: Path, tmp_path: Path) -> None:
    key = blob_key(read_manifest(shards).parts[1].digest)
    (store / key).unlink()
    assert f"{key[-20:]}: no such object" in pull(store, tmp_path / "there", "--all", code=1)
    assert not list((tmp_path / "there").glob("*.safetensors"))


def edit(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = store / "manifests/main.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("path", ["../x", "/tmp/x", "a/../../x", "shardprep.json"])
@pytest.mark.parametrize("what", ["parts", "side_files"])
def test_a_hostile_manifest_makes_no_path(store: Path, tmp_path: Path, what: str, path: str) -> None:
    edit(store, lambda raw: raw[what][0].update(path=path))
    before = sorted(tmp_path.rglob("*"))
    pull(store, tmp_path / "there", "--all", code=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_side_file_as_large_as_no_side_file_is_not_fetched(store: Path, tmp_path: Path) -> None:
    edit(store, lambda raw: raw["side_files"][0].update(size=2**40))
    assert "a side file of 1099511627776 bytes" in pull(store, tmp_path / "there", "--all", code=2)
    assert not (tmp_path / "there/shardprep.json").exists()


# -------------------------------------------------------------------------------------------------------- which share


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        ([], {}, "which share? say -tp, -pp and --rank of a worker, or --all for everything"),
        ([], {"RANK": "1"}, "which share?"),
        (["-tp", "4"], {}, "which rank? say --rank, or run it where RANK is set"),
        (["-tp", "4", "--all"], {}, "pulls for every grid and engine; leave --rank, -tp, -pp, -ep, --"),
        (["--rank", "0", "--all"], {}, "--all pulls for every grid"),
        (["--stages", "0-1,2-3", "--all"], {}, "--all pulls for every grid"),
        (["-ep", "2", "--all"], {}, "--all pulls for every grid"),
        (["--engine", "torch", "--all"], {}, "--all pulls for every grid"),
        (["-tp", "4", "--rank", "0", "--engine", "sglang"], {}, "'sglang' is not one of"),
        (["-tp", "4", "--rank", "0", "-ep", "3"], {}, "does not divide tensor_parallel_size 4"),
        (["-tp", "4", "--rank", "0", "-ep", "2"], {}, "knows of no experts"),
        (["--rank", "0", "-ep", "2"], {}, "does not divide tensor_parallel_size 1"),
        (["-tp", "4"], {"RANK": "x"}, "the environment's RANK is x, expected a number"),
        (["-tp", "4"], {"RANK": "0", "WORLD_SIZE": "8"}, "WORLD_SIZE 8, the grid 4 workers"),
        (["-tp", "4", "-pp", "4"], {"RANK": "0", "WORLD_SIZE": "4"}, "WORLD_SIZE 4, the grid 16 workers"),
        (["-tp", "4", "--rank", "4", "-pp", "1"], {}, "rank"),
        (["-tp", "3", "--rank", "0"], {}, "3"),
        (["-tp", "0", "--rank", "0"], {}, "0 is not in the range"),
        (["-tp", "2", "--rank", "-1"], {}, "-1 is not in the range"),
        (["-pp", "2", "--stages", "0,1-3,", "--rank", "0"], {}, "is not a list of stages"),
        (["-pp", "3", "--stages", "0,1-3", "--rank", "0"], {}, "stages"),
        (["--all", "--max-workers", "0"], {}, "0 is not in the range"),
        (["--all", "--revision", "../x"], {}, "is not a revision's name"),
        (["--all", "--manifest-digest", "sha256:" + "0" * 64], {}, "do not load it"),
    ],
)
def test_a_share_that_cannot_be_is_refused_in_one_line(
    store: Path, tmp_path: Path, options: list[str], env: dict[str, str], words: str
) -> None:
    assert words in pull(store, tmp_path / "there", *options, code=2, env=env)
    assert not (tmp_path / "there").exists()


def test_places_that_are_none_are_refused(store: Path, tmp_path: Path) -> None:
    assert "is reached by hf://" in pull("hf://org/name", tmp_path / "there", "--all", code=2)
    assert "expected a path" in pull(store, "s3://bucket/there", "--all", code=2)
    assert "store: no revision" in pull(tmp_path / "no-store", tmp_path / "there", "--all", code=1)
    assert not (tmp_path / "there").exists()


def test_the_environment_says_the_rank(shards: Path, store: Path, tmp_path: Path) -> None:
    env = {"RANK": "6", "WORLD_SIZE": "16"}
    report = json.loads(pull(store, tmp_path / "there", *RANK_OPTIONS, "--json", env=env))
    assert report["rank"] == 6
    assert there(shards, tmp_path / "there") == needed(shards, rank=6, **RANK)
    stages = ["-tp", 4, "--stages", "0,1-3"]
    env = {"RANK": "6", "WORLD_SIZE": "8"}
    report = json.loads(pull(store, tmp_path / "staged", *stages, "--json", env=env))
    assert report["rank"] == 6
    grid: dict[str, Any] = {"tensor_parallel_size": 4, "stages": [(0, 1), (1, 4)]}
    assert there(shards, tmp_path / "staged") == needed(shards, rank=6, **grid)
    env = {"RANK": "1", "WORLD_SIZE": "99"}
    report = json.loads(pull(store, tmp_path / "given", *RANK_OPTIONS, "--rank", 2, "--json", env=env))
    assert report["rank"] == 2


# ----------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of as many KiB, or makes the one there as large."""
    folder = tmp_path / "disk"

    def resize(kib: int) -> Path:
        options = f"size={kib}k" if not folder.exists() else f"remount,size={kib}k"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {found.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield resize
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_a_problem_and_the_rerun_goes_on(
    shards: Path, store: Path, tiny_disk: Callable[[int], Path]
) -> None:
    total = sum(part.size for part in read_manifest(shards).parts)
    disk = tiny_disk(total // 1024)
    said = pull(store, disk / "there", "--all", code=1)
    assert "bytes are needed" in said or "cannot be" in said
    assert "free; make room or pull elsewhere" in said or "No space left on device" in said
    assert not list((disk / "there").glob("*.safetensors"))
    assert not (disk / "there/shardprep.json").exists()
    tiny_disk(3 * total // 1024)
    pull(store, disk / "there", "--all")
    assert contents(disk / "there") == contents(shards)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk with a file system that can set room aside (of a tmpfs none is)."""
    image, folder = tmp_path / "image", tmp_path / "ext4"
    folder.mkdir()
    with image.open("wb") as stream:
        stream.truncate(8 * 2**20)
    for command in (["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, folder]):
        if shutil.which(command[0]) is None:
            pytest.skip(f"there is no {command[0]} here")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_what_a_killed_run_has_set_aside_is_room_for_the_next(
    shards: Path, store: Path, tmp_path: Path, disk: Path
) -> None:
    parts = read_manifest(shards).parts
    total = sum(part.size for part in parts)
    with (disk / "filler").open("wb") as stream:  # room for the parts, and a little for what lies beside them
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - total - 64 * 2**10)
    slow = Slow(store, disk / "there", tmp_path / "log", workers=1)
    process = slow.start()
    with ended(process):
        headers = {blob_key(part.digest): part.header_size for part in parts}
        while not any(at >= headers.get(key, 2**60) for key, at in slow.came()):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert shutil.disk_usage(disk).free < total / 2 + 64 * 2**10 < total
    pull(store, disk / "there", "--all")
    assert contents(disk / "there") == contents(shards)


def test_the_store_is_closed_whatever_happens(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(FolderStore, "close", lambda _: closed.append(1))
    pull(store, tmp_path / "there", "--all")
    pull(store, tmp_path / "there", "--all", "--revision", "x", code=1)
    assert closed == [1, 1]
