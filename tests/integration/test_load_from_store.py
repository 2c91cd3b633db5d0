"""A shard that is loaded from a store is the shard that lies in the folder, and costs its own bytes once."""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import small_models
from lazily import torch
from processes import ended
from s3fixtures import isolate
from s3server import S3Server
from shardprep.split import SplitOptions, split
from shardprep_runtime import Shard, load, read_manifest
from shardprep_runtime.errors import (
    InputError,
    IntegrityError,
    ManifestError,
    MissingError,
    ShardprepError,
    SourceError,
    StoreError,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard import fetch as fetching
from shardprep_runtime.shard.cache import Cache
from shardprep_runtime.shard.landing import VERIFIED
from shardprep_runtime.shard.parts import Numbered, open_part
from shardprep_runtime.shard.shard_set import ShardSet, open_set
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.stores.open import open_store
from stores import CountingStore, make_store, part_keys

FROZEN = Path(__file__).parents[1] / "data/v1"
TESTS = Path(__file__).parents[1]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "small": [
        {"tensor_parallel_size": 4, "rank": 3, "pipeline_parallel_size": 1},
        {"tensor_parallel_size": 4, "rank": 6, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "rank": 1, "pipeline_parallel_size": 1},
        {"tensor_parallel_size": 2, "rank": 2, "stages": [(0, 1), (1, 4)]},
        {"tensor_parallel_size": 1, "rank": 0, "pipeline_parallel_size": 1},
        {"tensor_parallel_size": 1, "rank": 3, "pipeline_parallel_size": 4},
    ],
    "phi3-fused-tp2": [
        {"tensor_parallel_size": 2, "rank": 1, "pipeline_parallel_size": 1},
        {"tensor_parallel_size": 1, "rank": 1, "pipeline_parallel_size": 2},
    ],
    "llama-tied-kv2-tp4": [
        {"tensor_parallel_size": 4, "rank": 3},
        {"tensor_parallel_size": 2, "rank": 0},
        {"tensor_parallel_size": 1, "rank": 0},
    ],
    "experts-each-tp4": [
        {"tensor_parallel_size": 2, "rank": 1},
        {"tensor_parallel_size": 4, "rank": 3, "expert_parallel_size": 2, "engine": "vllm"},
    ],
    "experts-fused-tp4": [
        {"tensor_parallel_size": 2, "rank": 3, "pipeline_parallel_size": 2, "engine": "transformers"},
        {"tensor_parallel_size": 4, "rank": 2, "expert_parallel_size": 2},
        {"tensor_parallel_size": 4, "rank": 1, "expert_parallel_size": 4, "engine": "vllm"},
    ],
}
WHOLE: dict[str, Any] = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
"""Everything, most of it joined from four pieces."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shard sets whose small tensors have several blocks."""
    folder = tmp_path_factory.mktemp("sets")
    source = small_models.write_model(folder / "source")
    split(
        source,
        folder / "small",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        options=SplitOptions(block_bytes=256),
    )
    frozen = {name: FROZEN / name for name in GRIDS if name != "small"}
    return {"small": folder / "small", **frozen}


@pytest.fixture
def store(sets: dict[str, Path], tmp_path: Path) -> Path:
    """A store of the small set."""
    return make_store(sets["small"], tmp_path / "store")


@pytest.fixture
def counted(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingStore]:
    """The store that `load` opens; every request of it is short, so that there are many."""
    monkeypatch.setattr(fetching, "RUN_BYTES", 2048)
    found = CountingStore(FolderStore(store))
    module = importlib.import_module("shardprep_runtime.shard.shard_set")
    monkeypatch.setattr(module, "open_store", lambda *_: found)
    yield found


def uri(store: Path) -> str:
    return f"file://{store}"


def contents(shard: Shard) -> dict[str, bytes]:
    return {name: bytes(shard.memory(name)) for name in shard.view.tensors}


def blocks_of_view(folder: Path, **grid: Any) -> dict[str, set[tuple[int, int]]]:
    """Key of each part -> bytes [start, stop) of each block that a view needs, found by mapping the folder."""
    manifest = read_manifest(folder)
    keys = part_keys(manifest)
    found: dict[str, set[tuple[int, int]]] = {}
    with open_set(folder, verify="off").load(Place(**grid)) as shard:
        numbered = {part: Numbered(part) for part in {each[0] for each in shard.ranges()}}
        for part, piece, start, stop in shard.ranges():
            for number in numbered[part].numbers(piece.span.start + start, piece.span.start + stop):
                block = numbered[part].block(number)
                found.setdefault(keys[part.part.path], set()).add((block.start, block.stop))
    return found


def nbytes(blocks: dict[str, set[tuple[int, int]]]) -> int:
    return sum(stop - start for each in blocks.values() for start, stop in each)


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


def fetchers() -> int:
    """Threads of ours."""
    return sum(thread.name.startswith("shardprep-") for thread in threading.enumerate())


def until_fetchers_are(count: int) -> None:
    until(lambda: fetchers() == count)


# ------------------------------------------------------------------------------------------------------------ equality


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["blocks", "headers", "off"])
@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_view_equals_the_one_from_the_folder(
    sets: dict[str, Path], tmp_path: Path, name: str, cached: bool, verify: Any
) -> None:
    store = make_store(sets[name], tmp_path / "store")
    for grid in GRIDS[name]:
        with (
            open_set(sets[name]).load(Place(**grid)) as expected,
            open_set(uri(store), verify=verify, cache=tmp_path / "cache" if cached else None).load(
                Place(**grid)
            ) as shard,
        ):
            assert list(shard) == list(expected)
            assert contents(shard) == contents(expected)
            assert shard.nbytes == expected.nbytes
            assert all(torch.equal(shard[each], expected[each]) for each in expected)
            streamed = list(shard.iter_tensors())
            assert [each for each, _ in streamed] == [each for each, _ in expected.iter_tensors()]
            assert all(torch.equal(tensor, expected[each]) for each, tensor in streamed)


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_view_asks_for_its_own_blocks_once_and_for_nothing_else(
    sets: dict[str, Path], counted: CountingStore, tmp_path: Path, cached: bool
) -> None:
    grid: dict[str, Any] = {"tensor_parallel_size": 2, "rank": 2, "stages": [(0, 1), (1, 4)]}
    headers = {key: part.header_size for part, key in keyed(sets["small"])}
    shard_set = open_set("file:///x", cache=tmp_path / "cache" if cached else None)
    with shard_set.load(Place(**grid)) as shard:
        shard.wait()
        assert shard.bytes_fetched == nbytes(blocks_of_view(sets["small"], **grid))
    wanted = blocks_of_view(sets["small"], **grid)
    for key, blocks in wanted.items():
        for start, stop in blocks:
            assert {counted.asked(key, at) for at in (start, stop - 1)} == {1}
        assert counted.received[key] == headers[key] + sum(stop - start for start, stop in blocks)
    assert set(counted.received) == {*wanted, "manifests/main.json"}
    assert counted.closed == 1


def keyed(folder: Path) -> list[tuple[manifests.Part, str]]:
    manifest = read_manifest(folder)
    return [(part, part_keys(manifest)[part.path]) for part in manifest.parts]


# --------------------------------------------------------------------------------------------------------- wrong bytes


def some_block(sets: dict[str, Path], number: int = 3) -> tuple[str, int, str, int]:
    """(key, first byte, tensor, index in it) of a block of the first part."""
    manifest = read_manifest(sets["small"])
    part = open_part(sets["small"], manifest.parts[0], manifest)
    block = Numbered(part).block(number)
    part.close()
    return part_keys(manifest)[manifest.parts[0].path], block.start, block.piece.name, block.index


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_block_that_comes_wrong_twice_is_asked_for_again_and_nothing_else_is(
    sets: dict[str, Path], counted: CountingStore, tmp_path: Path, cached: bool
) -> None:
    key, start, _, _ = some_block(sets)
    counted.corrupt(key, start + 7, times=2)
    with (
        load("file:///x", cache=tmp_path / "cache" if cached else None, **WHOLE) as shard,
        load(sets["small"], **WHOLE) as expected,
    ):
        assert contents(shard) == contents(expected)
    for each, blocks in blocks_of_view(sets["small"], **WHOLE).items():
        for low, _ in blocks:
            assert counted.asked(each, low) == (3 if (each, low) == (key, start) else 1)
    again = [each for each in counted.requests if each.key == key and each.start == start]
    assert [each.stop - each.start for each in again[-2:]] == [256, 256]


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_block_that_is_wrong_in_the_store_is_named_after_three_tries(
    sets: dict[str, Path], store: Path, counted: CountingStore, tmp_path: Path, cached: bool
) -> None:
    key, start, tensor, index = some_block(sets)
    raw = bytearray((store / key).read_bytes())
    raw[start] ^= 1
    (store / key).write_bytes(raw)
    expected = rf"{key[-20:]}: tensor {tensor}: block {index} \(bytes {start} to .*does not match its digest, 3 times"
    with load("file:///x", cache=tmp_path / "cache" if cached else None, **WHOLE) as shard:
        with pytest.raises(IntegrityError, match=expected):
            shard[tensor]
        with pytest.raises(IntegrityError, match=expected):
            shard.wait()
    assert counted.asked(key, start) == 3
    assert all(
        counted.asked(each, low) <= 1
        for each, blocks in blocks_of_view(sets["small"], **WHOLE).items()
        for low, _ in blocks
        if (each, low) != (key, start)
    )


def test_a_header_that_comes_wrong_is_asked_for_again(sets: dict[str, Path], counted: CountingStore) -> None:
    key, *_ = some_block(sets)
    counted.corrupt(key, 20, times=2)
    with load("file:///x", cache=None, **WHOLE) as shard, load(sets["small"], **WHOLE) as expected:
        assert contents(shard) == contents(expected)
    assert counted.asked(key, 20) == 3
    counted.corrupt(key, 20)
    before = open_files()
    with pytest.raises(IntegrityError, match="the header's digest is"):
        load("file:///x", cache=None, **WHOLE)
    assert open_files() == before


def test_a_block_that_is_wrong_in_the_cache_is_found_and_fetched_alone(
    sets: dict[str, Path], counted: CountingStore, tmp_path: Path
) -> None:
    key, start, _, _ = some_block(sets)
    with load("file:///x", cache=tmp_path / "cache", **WHOLE) as shard:
        shard.wait()
    kept = tmp_path / "cache" / key
    raw = bytearray(kept.read_bytes())
    raw[start + 100] ^= 1
    kept.write_bytes(raw)
    counted.requests.clear()
    with (
        load("file:///x", cache=tmp_path / "cache", **WHOLE) as shard,
        load(sets["small"], **WHOLE) as expected,
    ):
        assert contents(shard) == contents(expected)
        assert shard.bytes_fetched == 256
    assert [(each.key, each.start) for each in counted.requests if each.key.startswith("blobs/")] == [
        (key, start)
    ]
    assert kept.read_bytes() == (Path(counted.uri) / key).read_bytes()


def test_what_was_not_verified_when_it_came_is_before_it_counts(
    sets: dict[str, Path], counted: CountingStore, tmp_path: Path
) -> None:
    """A worker that trusts its network must not lend that trust to the others of its host."""
    key, start, _, _ = some_block(sets)
    counted.corrupt(key, start, times=1)
    with load("file:///x", cache=tmp_path / "cache", verify="off", **WHOLE) as shard:
        shard.wait()
    with (
        load("file:///x", cache=tmp_path / "cache", **WHOLE) as shard,
        load(sets["small"], **WHOLE) as expected,
    ):
        assert contents(shard) == contents(expected)
        assert shard.bytes_fetched == 256


# ------------------------------------------------------------------------------------------------------------ the cache


def test_what_the_cache_has_is_not_asked_for(
    sets: dict[str, Path], counted: CountingStore, tmp_path: Path
) -> None:
    for tensor_parallel_size in (4, 2, 1):
        for rank in range(tensor_parallel_size):
            grid: dict[str, Any] = {
                "tensor_parallel_size": tensor_parallel_size,
                "pipeline_parallel_size": 1,
                "rank": rank,
            }
            with load("file:///x", cache=tmp_path / "cache", **grid) as shard:
                shard.wait()
                assert (shard.bytes_fetched == 0) == (tensor_parallel_size < 4)
    total = sum(part.size for part, _ in keyed(sets["small"]))
    assert sum(count for key, count in counted.received.items() if key.startswith("blobs/")) == total


def test_a_pinned_manifest_starts_from_the_cache_without_the_store(
    sets: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    digest = manifests.digest_of((sets["small"] / "shardprep.json").read_bytes())
    options: dict[str, Any] = {"cache": tmp_path / "cache", "manifest_digest": digest, **WHOLE}
    with load(uri(store), **options) as shard:
        shard.wait()
    store.rename(tmp_path / "gone")
    with load(uri(store), **options) as shard, load(sets["small"], **WHOLE) as expected:
        assert contents(shard) == contents(expected)
        assert shard.bytes_fetched == 0
    with pytest.raises(StoreError):
        load(uri(store), cache=tmp_path / "cache", **WHOLE)


WORKER = """
import hashlib, importlib, json, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from shardprep_runtime import Place, open_set
from shardprep_runtime.shard import fetch
from shardprep_runtime.stores.folder import FolderStore
from stores import CountingStore
fetch.RUN_BYTES = 1024
store = CountingStore(FolderStore(Path({store!r})))
store.delay(0.003)
importlib.import_module("shardprep_runtime.shard.shard_set").open_store = lambda *_: store
print("ready", flush=True)
sys.stdin.readline()
with open_set("file:///x", cache={cache!r}, connections=4).load(Place(**{grid!r})) as shard:
    digest = hashlib.sha256()
    for name in shard.view.tensors:
        digest.update(shard.memory(name))
    asked = sorted((each.key, each.start, each.stop) for each in store.requests if each.start)
    print(json.dumps([shard.bytes_fetched, digest.hexdigest(), asked]))
"""

FLEETS: dict[str, list[dict[str, Any]]] = {
    "four ranks": [{"tensor_parallel_size": 4, "pipeline_parallel_size": 1, "rank": i} for i in range(4)],
    "two replicas": [{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "rank": 0}] * 2,
    "two grids": [{"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "rank": i % 2} for i in range(3)]
    + [{"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "rank": 1}],
}


@pytest.mark.parametrize("fleet", FLEETS)
def test_workers_that_start_at_once_on_one_cache_fetch_each_block_once(
    sets: dict[str, Path], store: Path, tmp_path: Path, fleet: str
) -> None:
    cache = str(tmp_path / "cache")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER.format(tests=str(TESTS), store=str(store), cache=cache, grid=grid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for grid in FLEETS[fleet]
    ]
    with ended(running):
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        found = []
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in running:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            found.append(json.loads(said))
    union: dict[str, set[tuple[int, int]]] = {}
    for grid, (_, digest, _) in zip(FLEETS[fleet], found, strict=True):
        for key, blocks in blocks_of_view(sets["small"], **grid).items():
            union.setdefault(key, set()).update(blocks)
        with load(sets["small"], **grid) as expected:
            assert digest == hashlib.sha256(b"".join(contents(expected).values())).hexdigest()
    assert sum(fetched for fetched, _, _ in found) == nbytes(union)
    asked = [tuple(request) for _, _, requests in found for request in requests]
    assert len(set(asked)) == len(asked)
    assert sum(stop - start for _, start, stop in asked) == nbytes(union)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_processes_that_help_share_the_blocks_out(
    sets: dict[str, Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Over S3, the only store that is worth it: the server says what was asked for, by whomever."""
    pytest.importorskip("botocore")
    monkeypatch.setattr(fetching, "RUN_BYTES", 2048)
    with S3Server(tmp_path / "server") as server:
        isolate(monkeypatch, tmp_path, server)
        server.make_bucket("shards")
        with open_store("s3://shards/x") as remote:
            for path in store.rglob("*"):
                if path.is_file():
                    remote.put(path.relative_to(store).as_posix(), path.read_bytes())
        server.reset_stats()
        server.fault("delay", times=0, method="GET", match="blobs/", delay=0.1)
        before = open_files()
        with (
            open_set(
                "s3://shards/x",
                cache=tmp_path / "cache" if cached else None,
                processes=3,
                connections=1,
            ).load(Place(**WHOLE)) as shard,
            load(sets["small"], **WHOLE) as expected,
        ):
            assert contents(shard) == contents(expected)
            total = sum(part.size - part.header_size for part in read_manifest(sets["small"]).parts)
            assert 0 < shard.bytes_fetched < total
        asked = [(each["key"], each["range"]) for each in server.stats()["log"] if "blobs/" in each["key"]]
        assert len(set(asked)) == len(asked)
        del shard, expected
        until(lambda: open_files() <= before)


# ------------------------------------------------------------------------------------------------------------- in time


class Gate:
    """Lets requests pass as far as it is open."""

    def __init__(self, store: CountingStore, passes: int) -> None:
        self._open = threading.Semaphore(passes)
        store.before = self.before

    def before(self, request: Any) -> None:
        if request.key.startswith("blobs/") and request.start:
            assert self._open.acquire(timeout=30)

    def open(self) -> None:
        self._open.release(10**6)


def test_tensors_are_handed_out_before_the_rest_has_come(
    sets: dict[str, Path], counted: CountingStore
) -> None:
    grid: dict[str, Any] = {"tensor_parallel_size": 4, "pipeline_parallel_size": 1, "rank": 1}
    gate = Gate(counted, 3)
    with (
        open_set(
            "file:///x",
            cache=None,
            connections=2,
        ).load(Place(**grid)) as shard,
        load(sets["small"], **grid) as expected,
    ):
        tensors = shard.iter_tensors()
        name, first = next(tensors)
        assert torch.equal(first, expected[name])
        assert shard.bytes_fetched < shard.nbytes / 2
        last = list(shard.view.tensors)[-1]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: shard[last])
            assert not waiting.done()
            gate.open()
            assert torch.equal(waiting.result(30), expected[last])
        rest = dict(tensors)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in rest.items())


def test_what_is_wanted_first_is_asked_for_first(sets: dict[str, Path], counted: CountingStore) -> None:
    keys = part_keys(read_manifest(sets["small"]))
    with open_set(
        "file:///x",
        cache=None,
        connections=1,
    ).load(Place(**WHOLE)) as shard:
        shard.wait()
        order: dict[str, int] = {}
        for i, request in enumerate(counted.requests):
            for name, located in shard._located.items():
                for part, piece in located if request.start else ():
                    beside = request.stop <= piece.span.start or piece.span.stop <= request.start
                    if request.key == keys[part.part.path] and not beside:
                        order.setdefault(name, i)
    layers = [min(at for name, at in order.items() if f".layers.{layer}." in name) for layer in range(4)]
    assert layers == sorted(layers)
    assert layers[0] < layers[1] < layers[3]
    assert order["model.embed_tokens.weight"] <= layers[0]
    assert order["lm_head.weight"] > layers[3]


def test_what_another_process_brings_is_handed_out_as_soon_as_it_is_there(
    sets: dict[str, Path], counted: CountingStore, tmp_path: Path
) -> None:
    grid: dict[str, Any] = {"tensor_parallel_size": 4, "pipeline_parallel_size": 1, "rank": 1}
    with load(sets["small"], **grid) as expected:
        part, piece, _, _ = next(expected.ranges())
        first = next(iter(expected.view.tensors))
        other = Cache(tmp_path / "cache").open(part.part)
        numbers = Numbered(part).numbers(piece.span.start, piece.span.stop)
        assert other.claim(numbers.start, numbers.stop)
        counted.delay(0.1)
        with open_set(
            "file:///x",
            cache=tmp_path / "cache",
            connections=1,
        ).load(Place(**grid)) as shard:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(lambda: bytes(shard.memory(first)))
                until(lambda: shard.bytes_fetched > 0)
                assert not waiting.done()
                raw = (sets["small"] / part.part.path).read_bytes()
                other.write(raw[piece.span.start : piece.span.stop], piece.span.start)
                for number in numbers:
                    other.mark(number, VERIFIED)
                other.release(numbers.start, numbers.stop)
                assert waiting.result(20) == bytes(expected.memory(first))
                assert shard.bytes_fetched < 0.8 * shard.nbytes
            assert contents(shard) == contents(expected)
        other.close()
        os.close(other.data)


def test_joined_tensors_are_right_whoever_asks_at_once(sets: dict[str, Path], counted: CountingStore) -> None:
    counted.delay(0.001)
    with load(sets["small"], **WHOLE) as expected, load("file:///x", cache=None, **WHOLE) as shard:
        wanted = contents(expected)

        def ask(seed: int) -> dict[str, memoryview]:
            names = list(wanted)
            random.Random(seed).shuffle(names)
            return {name: shard.memory(name) for name in names}

        with ThreadPoolExecutor(8) as pool:
            answers = [each.result(30) for each in [pool.submit(ask, seed) for seed in range(8)]]
        for answer in answers:
            assert {name: bytes(memory) for name, memory in answer.items()} == wanted
        joined = [name for name in wanted if shard.describe(name).takes[1:]]
        assert joined
        for name in joined:
            assert len({id(answer[name].obj) for answer in answers}) == 1


def test_the_pieces_of_a_joined_tensor_give_their_memory_back(tmp_path: Path) -> None:
    config = small_models.llama_config(heads=8, kv_heads=8, head_dim=32, layers=2, intermediate=1024)
    source = small_models.write_model(tmp_path / "source", config)
    split(source, tmp_path / "set", tensor_parallel_size=4)
    store = make_store(tmp_path / "set", tmp_path / "store")
    with load(uri(store), cache=None) as shard:
        shard.wait()
        whole = sum(os.fstat(part.fd).st_blocks * 512 for part in shard._parts)
        assert whole >= shard.nbytes
        for _ in shard.iter_tensors():
            pass
        left = sum(os.fstat(part.fd).st_blocks * 512 for part in shard._parts)
        mapped = shard.bytes_mapped
        edges = sum(2 * 4096 for located in shard._located.values() for _ in located)
        assert mapped <= left < mapped + edges + sum(part.part.header_size + 4096 for part in shard._parts)
        assert left < whole / 2


# --------------------------------------------------------------------------------------------------------------- close


@pytest.mark.slow
def test_closing_in_the_middle_stops_and_leaks_nothing(counted: CountingStore, tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        before, threads = open_files(), fetchers()
        gate = Gate(counted, 3)
        counted.requests.clear()
        shard = open_set(
            "file:///x",
            cache=cache,
            connections=4,
        ).load(Place(**WHOLE))
        until(lambda: len([each for each in counted.requests if each.start]) >= 7)
        assert open_files() > before
        shard.close()
        with pytest.raises(SourceError, match="was closed before"):
            shard.wait()
        with pytest.raises(SourceError, match="was closed before"):
            shard["lm_head.weight"]
        gate.open()
        until_fetchers_are(threads)
        del shard
        assert open_files() == before
        begun = len([each for each in counted.requests if each.start])
        assert begun <= 8
    assert counted.closed == 2


def test_closing_twice_closes_nobody_elses_files(store: Path, sets: dict[str, Path]) -> None:
    for source in (uri(store), str(sets["small"])):
        with load(source, cache=None, **WHOLE) as shard:
            shard.wait()
            shard.close()
            others = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
            shard.close()
        for fd in others:
            os.close(fd)


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_tensors_outlive_their_shard(
    sets: dict[str, Path], store: Path, tmp_path: Path, cached: bool
) -> None:
    grid: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "rank": 0}
    before = open_files()
    with load(uri(store), cache=tmp_path / "cache" if cached else None, **grid) as shard:
        tensors = dict(shard.iter_tensors())
    with load(sets["small"], **grid) as expected:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    del tensors, shard, expected
    until(lambda: open_files() == before)


def test_a_joined_tensor_that_was_not_asked_for_before_the_end_is_not_read_from_another_file(
    sets: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    for shard in (
        load(sets["small"], **WHOLE),
        load(uri(store), cache=None, **WHOLE),
        load(uri(store), cache=tmp_path / "cache", **WHOLE),
    ):
        shard.wait()
        shard.close()
        with pytest.raises(SourceError, match="was closed before it was asked for"):
            shard["model.layers.0.mlp.down_proj.weight"]


# ---------------------------------------------------------------------------------------------------------------- fork


def in_child(job: Callable[[], None]) -> str:
    """What a forked process ends with: nothing, or the error that `job` raised."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads
        child = os.fork()
    if child == 0:
        said = ""
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_forked_process_has_what_had_come(
    sets: dict[str, Path], store: Path, tmp_path: Path, cached: bool
) -> None:
    with (
        load(uri(store), cache=tmp_path / "cache" if cached else None, **WHOLE) as shard,
        load(sets["small"], **WHOLE) as expected,
    ):
        wanted = contents(expected)
        shard.wait()

        def compare() -> None:
            shard.wait()
            assert contents(shard) == wanted
            shard.close()

        assert in_child(compare) == ""
        assert in_child(compare) == ""
        assert contents(shard) == wanted


def test_a_forked_process_does_not_wait_for_what_will_never_come(
    sets: dict[str, Path], counted: CountingStore
) -> None:
    gate = Gate(counted, 3)
    with load("file:///x", cache=None, **WHOLE) as shard:
        assert in_child(shard.wait).startswith("SourceError: ")
        assert "this process was forked before all of it had arrived" in in_child(shard.wait)
        assert in_child(shard.close) == ""
        gate.open()
        with load(sets["small"], **WHOLE) as expected:
            assert contents(shard) == contents(expected)


def test_a_forked_process_is_never_given_pieces_that_its_parent_has_freed(
    sets: dict[str, Path], store: Path
) -> None:
    joined = "model.layers.0.mlp.down_proj.weight"
    with load(uri(store), cache=None, **WHOLE) as shard:
        shard.wait()
        ready, go = os.pipe()

        def late() -> None:
            os.read(ready, 1)
            shard.memory("model.norm.weight")
            shard.memory(joined)

        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(in_child, late)
            time.sleep(0.1)
            shard.memory(joined)
            os.write(go, b"x")
            said = waiting.result(30)
        os.close(ready)
        os.close(go)
    assert said.startswith("SourceError: ")
    assert "has joined it and given its pieces back" in said


# -------------------------------------------------------------------------------------------------------------- refusals


def test_a_revision_that_is_not_there_names_those_that_are(store: Path, tmp_path: Path) -> None:
    shutil.copy(store / "manifests/main.json", store / "manifests/v2.json")
    with pytest.raises(MissingError, match=r"store: no revision v3; there are main, v2"):
        open_set(uri(store), cache=None, revision="v3").load()
    with pytest.raises(InputError, match="is not a revision's name"):
        open_set(uri(store), cache=None, revision="../main").load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="nothing has been pushed there, or the prefix is another one"):
        load(uri(tmp_path / "empty"), cache=None)


def test_a_manifest_of_another_digest_is_not_followed(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="do not load it"):
        load(uri(store), cache=tmp_path / "cache", manifest_digest="sha256:" + "0" * 64)
    assert list((tmp_path / "cache/blobs").iterdir()) == []


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_blob_that_is_missing_is_named(
    sets: dict[str, Path], store: Path, tmp_path: Path, cached: bool
) -> None:
    key = keyed(sets["small"])[-1][1]
    (store / key).unlink()
    before = open_files()
    for _ in range(2):
        with pytest.raises(MissingError, match=f"{key[-20:]}: no such object"):
            load(uri(store), cache=tmp_path / "cache" if cached else None, **WHOLE)
    assert open_files() == before


def test_a_blob_that_ends_early_is_named(sets: dict[str, Path], counted: CountingStore) -> None:
    part, key = keyed(sets["small"])[0]
    counted.shorten(key, part.size - 1)
    with (
        load("file:///x", cache=None, **WHOLE) as shard,
        pytest.raises(SourceError, match=rf"{key[-20:]}: ends at byte \d+, \d+ more were expected"),
    ):
        shard.wait()


def test_a_blob_that_is_replaced_meanwhile_is_not_mixed(
    sets: dict[str, Path], store: Path, counted: CountingStore
) -> None:
    _, key = keyed(sets["small"])[0]
    other = keyed(sets["small"])[1][1]

    def replace(request: Any) -> None:
        if request.key == key and request.start:
            FolderStore(store).put(key, (store / other).read_bytes())

    counted.before = replace
    with (
        load("file:///x", cache=None, **WHOLE) as shard,
        pytest.raises(SourceError, match="was replaced while it was read"),
    ):
        shard.wait()


def test_an_error_of_the_store_reaches_who_asks_and_spoils_nothing_that_came(
    sets: dict[str, Path], counted: CountingStore
) -> None:
    last = blocks_of_view(sets["small"], **WHOLE)
    key = next(key for part, key in keyed(sets["small"]) if "last" in part.placements)
    assert key in last
    with open_set(
        "file:///x",
        cache=None,
        connections=1,
    ).load(Place(**WHOLE)) as shard:
        shard.wait()
    headers = part_header(sets, key)

    def refuse(request: Any) -> None:
        if request.key == key and request.start >= headers:
            raise StoreError("the store is on fire")

    counted.before = refuse
    with (
        open_set(
            "file:///x",
            cache=None,
            connections=1,
        ).load(Place(**WHOLE)) as shard,
        load(sets["small"], **WHOLE) as expected,
    ):
        with pytest.raises(StoreError, match="on fire"):
            shard.wait()
        first = next(iter(shard.view.tensors))
        assert bytes(shard.memory(first)) == bytes(expected.memory(first))


def part_header(sets: dict[str, Path], key: str) -> int:
    return next(part.header_size for part, each in keyed(sets["small"]) if each == key)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a part above": lambda raw: raw["parts"][0].update(path="../../x"),
    "an absolute part": lambda raw: raw["parts"][0].update(path="/tmp/x"),
    "a digest that is a path": lambda raw: raw["parts"][0].update(digest="sha256:../../../x"),
    "a digest of another kind": lambda raw: raw["parts"][0].update(digest="md5:" + "0" * 64),
    "a side file above": lambda raw: raw["side_files"][0].update(path="a/../../x"),
    "a side file that is the manifest": lambda raw: raw["side_files"][0].update(path="shardprep.json"),
    "a side file that is a part": lambda raw: raw["side_files"][0].update(path=raw["parts"][0]["path"]),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_manifest_makes_no_path(store: Path, tmp_path: Path, how: str) -> None:
    file = store / "manifests/main.json"
    raw = json.loads(file.read_text())
    HOSTILE[how](raw)
    file.write_text(json.dumps(raw))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ManifestError):
        load(uri(store), cache=None)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ManifestError):
        load(uri(store), cache=tmp_path / "cache")
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name == "blobs"
    ]


def test_a_part_as_large_as_no_memory_is_a_clear_error(store: Path, tmp_path: Path) -> None:
    file = store / "manifests/main.json"
    raw = json.loads(file.read_text())
    raw["parts"][0]["size"] = 2**62
    file.write_text(json.dumps(raw))
    before = open_files()
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(ShardprepError):
            load(uri(store), cache=cache, **WHOLE)
    assert open_files() == before


def test_wrong_ways_are_refused_before_the_store_is_asked(counted: CountingStore) -> None:
    with pytest.raises(InputError, match="io must be auto, mmap or read"):
        ShardSet("file:///x", io="fast").load()  # type: ignore[arg-type]
    with pytest.raises(InputError, match="verify must be"):
        load("file:///x", verify="some")  # type: ignore[arg-type]
    assert counted.requests == []
    assert counted.verbs == []
