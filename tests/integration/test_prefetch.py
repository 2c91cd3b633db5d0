"""A fetch that begins before the worker does: it delays nothing, owns nothing of the worker's, and load finds its bytes."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardprep_runtime import load, prefetch
from shardprep_runtime.errors import IntegrityError, MissingError, ShardprepError
from shardprep_runtime.folder_store import FolderStore
from shardprep_runtime.manifest import digest_of
from shardprep_runtime.remote import blob_key
from stores import CountingStore, make_store

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"
GRID: dict[str, Any] = {"tensor_parallel_size": 2, "rank": 1}
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from shardprep_runtime.prefetch_command import main; sys.exit(main())",
]
"""As the console script does."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(SHARDS, tmp_path / "store")


@pytest.fixture
def counted(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingStore]:
    found = CountingStore(FolderStore(store))
    monkeypatch.setattr(importlib.import_module("shardprep_runtime.load"), "open_store", lambda *_: found)
    yield found


def run(*args: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    found = subprocess.run(
        [*COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, **(env or {})},
        **options,
    )
    assert "Traceback" not in found.stderr
    return found


def until(ready: Any) -> None:
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def fetched(cache: Path) -> bool:
    """Whether everything that the grid needs is in the cache: the store is not asked."""
    digest = digest_of((SHARDS / "shardprep.json").read_bytes())
    try:
        with load("file:///nowhere", cache=cache, manifest_digest=digest, **GRID) as shard:
            shard.wait()
            return shard.bytes_fetched == 0
    except ShardprepError:
        return False


# -------------------------------------------------------------------------------------------------------- in a process


def test_prefetch_returns_before_any_request_and_load_finds_the_blocks(
    counted: CountingStore, tmp_path: Path
) -> None:
    go = threading.Event()

    def wait(_: object) -> None:
        assert go.wait(30)

    counted.before = wait
    began = time.monotonic()
    fetch = prefetch("file:///x", cache=tmp_path / "cache", **GRID)
    assert time.monotonic() - began < 1
    assert fetch.wait(timeout=0.05) is False
    assert fetch.bytes_fetched == 0
    go.set()
    assert fetch.wait() is True
    with load(SHARDS, **GRID) as expected:
        assert fetch.nbytes == expected.nbytes
        assert fetch.bytes_fetched > 0
        counted.requests.clear()
        with load("file:///x", cache=tmp_path / "cache", **GRID) as shard:
            assert {name: bytes(shard.memory(name)) for name in shard} == {
                name: bytes(expected.memory(name)) for name in expected
            }
            assert shard.bytes_fetched == 0
    assert {request.key for request in counted.requests} == {"manifests/main.json"}


def test_load_beside_a_prefetch_shares_its_work(counted: CountingStore, tmp_path: Path) -> None:
    counted.delay(0.002)
    counted.portion = 64
    fetch = prefetch("file:///x", cache=tmp_path / "cache", **GRID)
    with load("file:///x", cache=tmp_path / "cache", **GRID) as shard:
        shard.wait()
        fetch.wait()
        with load(SHARDS, **GRID) as expected:
            assert {name: bytes(shard.memory(name)) for name in shard} == {
                name: bytes(expected.memory(name)) for name in expected
            }
    with load("file:///x", cache=None, **GRID) as alone:
        alone.wait()
    assert fetch.bytes_fetched + shard.bytes_fetched == alone.bytes_fetched


def test_a_prefetch_that_fails_tells_who_waits_and_leaves_the_rest_to_load(
    counted: CountingStore, tmp_path: Path
) -> None:
    fetch = prefetch("file:///x", cache=tmp_path / "cache", revision="v2", **GRID)
    with pytest.raises(MissingError, match="no revision v2; there are main"):
        fetch.wait()
    with load(SHARDS, **GRID) as expected:
        part, piece, start, _ = next(expected.ranges())
    counted.corrupt(blob_key(part.part.digest), piece.span.start + start)
    fetch = prefetch("file:///x", cache=tmp_path / "cache", **GRID)
    with pytest.raises(IntegrityError):
        fetch.wait()
    counted._corrupt.clear()
    with load("file:///x", cache=tmp_path / "cache", **GRID) as shard:
        shard.wait()


# ------------------------------------------------------------------------------------------------------ without command


def test_without_a_command_it_fetches_and_ends(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = run(f"file://{store}", "-tp", 2, "--rank", 1, "--cache", cache)
    assert (found.returncode, found.stderr) == (0, "")
    with load(SHARDS, **GRID) as expected:
        assert found.stdout.startswith(f"rank 1: {expected.nbytes:,} bytes, ")
    assert fetched(cache)
    found = run(f"file://{store}", "-tp", 2, "--cache", cache, "--json", env={"RANK": "1"})
    assert json.loads(found.stdout) == {"rank": 1, "nbytes": expected.nbytes, "bytes_fetched": 0}


def test_the_cache_is_the_one_that_the_environment_names(store: Path, tmp_path: Path) -> None:
    env = {"SHARDPREP_CACHE_DIR": str(tmp_path / "own"), "SHARDPREP_CACHE_SIZE": "1GB", "RANK": "1"}
    assert run(f"file://{store}", "-tp", 2, env=env).returncode == 0
    assert fetched(tmp_path / "own")


def test_without_a_rank_it_fetches_for_rank_0(store: Path, tmp_path: Path) -> None:
    found = run(f"file://{store}", "-tp", 2, "--cache", tmp_path / "cache", "--json")
    assert json.loads(found.stdout)["rank"] == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["file:///no-store", "-tp", 2], 1, "/no-store: no revision main"),
        (["ftp://x/y", "-tp", 2], 2, "no store is reached by ftp://"),
        (["no-folder"], 2, "no manifest here"),
        (["STORE", "-tp", 3, "--rank", 0], 2, "3"),
        (["STORE", "-tp", 2, "--rank", 2], 2, "rank"),
        (["STORE", "--stages", "0-"], 2, "is no list of stages"),
        (["STORE", "--revision", "v9"], 1, "no revision v9; there are main"),
        (["STORE", "-tp", "x"], 2, "invalid int value"),
        ([], 2, "the following arguments are required: source"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    store: Path, tmp_path: Path, args: list[object], code: int, words: str
) -> None:
    args = [f"file://{store}" if arg == "STORE" else arg for arg in args]
    found = run(*args, *(["--cache", tmp_path / "cache"] if args else []))
    assert found.returncode == code
    assert words in found.stderr
    assert found.stdout == ""


# --------------------------------------------------------------------------------------------------------- with command


def test_the_command_is_run_at_once_and_its_end_is_the_end(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for status in (0, 7):
        found = run(
            f"file://{store}", "-tp", 2, "--rank", 1, "--cache", cache, "--", "sh", "-c", f"echo $0 $1; exit {status}",
            "--", "-tp",
        )  # fmt: skip
        assert (found.returncode, found.stdout) == (status, "-- -tp\n")
    until(lambda: fetched(cache))


CHILDREN = """
import os, time
print(os.getpid(), os.getppid())
time.sleep(0.3)
with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as stream:
    print(repr(stream.read()))
"""


def test_the_command_keeps_the_process_and_has_no_child_that_it_does_not_know(
    store: Path, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [
            *COMMAND,
            f"file://{store}",
            "--cache",
            str(tmp_path / "cache"),
            "--",
            sys.executable,
            "-c",
            CHILDREN,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said, _ = process.communicate(timeout=30)
        lines = said.splitlines()
        assert lines[0] == f"{process.pid} {os.getpid()}"
        assert lines[1] == "''"


def test_the_command_ignores_no_signal_that_it_did_not_ask_to(store: Path, tmp_path: Path) -> None:
    """Python ignores SIGPIPE; a command that inherited that would not end when its reader does."""
    show = "grep SigIgn /proc/$$/status"
    found = run(f"file://{store}", "--cache", tmp_path / "cache", "--", "sh", "-c", show)
    plain = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True)
    assert found.stdout == plain.stdout


def test_a_signal_ends_the_command_as_it_would_without_us(store: Path, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(
            [
                *COMMAND,
                f"file://{store}",
                "--cache",
                str(tmp_path / "c"),
                "--",
                "sh",
                "-c",
                "echo on; exec sleep 60",
            ],
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            process.send_signal(number)
            assert process.wait(10) == -number


def test_a_fetch_that_cannot_be_does_not_keep_the_command_from_running(tmp_path: Path) -> None:
    found = run("file:///no-store", "--cache", tmp_path / "cache", "--", "sh", "-c", "sleep 1; echo ran")
    assert (found.returncode, found.stdout) == (0, "ran\n")
    assert "shardprep-prefetch: /no-store: no revision main" in found.stderr


def test_a_command_that_is_not_there_is_said(store: Path, tmp_path: Path) -> None:
    found = run(f"file://{store}", "--cache", tmp_path / "cache", "--", tmp_path / "missing")
    assert found.returncode == 2
    assert "missing: cannot be run: No such file or directory" in found.stderr


SLOW = """
import importlib, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from shardprep_runtime.folder_store import FolderStore
from shardprep_runtime.prefetch_command import main
from stores import CountingStore
store = CountingStore(FolderStore(Path({store!r})))
store.delay(0.5)
importlib.import_module("shardprep_runtime.load").open_store = lambda *_: store
sys.exit(main())
"""


def test_who_reads_what_the_command_prints_does_not_wait_for_the_fetch(store: Path, tmp_path: Path) -> None:
    code = SLOW.format(tests=str(Path(__file__).parents[1]), store=str(store))
    command = [
        sys.executable,
        "-c",
        code,
        "file:///x",
        "-tp",
        "2",
        "--rank",
        "1",
        "--cache",
        str(tmp_path / "c"),
    ]
    read = subprocess.run([*command, "--", "echo", "done"], stdout=subprocess.PIPE, check=True)
    assert read.stdout == b"done\n"
    assert not fetched(tmp_path / "c")
    until(lambda: fetched(tmp_path / "c"))


WORKER = """
import hashlib, sys
from shardprep_runtime import load
with load(sys.argv[1], cache=sys.argv[2], tensor_parallel_size=2, rank=1) as shard:
    digest = hashlib.sha256()
    for name in shard.view.tensors:
        digest.update(shard.memory(name))
    print(digest.hexdigest())
"""


def test_a_worker_that_is_run_so_has_its_shard(store: Path, tmp_path: Path) -> None:
    worker = [sys.executable, "-c", WORKER, f"file://{store}", str(tmp_path / "cache")]
    found = run(f"file://{store}", "-tp", 2, "--cache", tmp_path / "cache", "--", *worker, env={"RANK": "1"})
    assert found.returncode == 0, found.stderr
    with load(SHARDS, **GRID) as expected:
        digest = hashlib.sha256(b"".join(expected.memory(name) for name in expected.view.tensors))
    assert found.stdout == f"{digest.hexdigest()}\n"
