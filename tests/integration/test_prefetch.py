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
from shardprep_runtime.format.grid import Grid
from shardprep_runtime.format.manifest import digest_of
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.prefetch_command import fetch, ranks_of_node
from shardprep_runtime.shard.revisions import blob_key
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stores.folder import FolderStore
from stores import CountingStore, make_store

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"
GRID: dict[str, Any] = {"tensor_parallel_size": 2, "rank": 1}
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from shardprep_runtime.shard.prefetch_command import main; sys.exit(main())",
]
"""As the console script does."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(SHARDS, tmp_path / "store")


@pytest.fixture
def counted(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingStore]:
    found = CountingStore(FolderStore(store))
    module = importlib.import_module("shardprep_runtime.shard.shard_set")
    monkeypatch.setattr(module, "open_store", lambda *_: found)
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


def fetched(cache: Path, *, rank: int = 1) -> bool:
    """Whether everything that a rank needs is in the cache: the store is not asked."""
    digest = digest_of((SHARDS / "shardprep.json").read_bytes())
    grid = {**GRID, "rank": rank}
    try:
        with load("file:///nowhere", cache=cache, manifest_digest=digest, **grid) as shard:
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
    fetch = prefetch("file:///x", cache=tmp_path / "cache", **GRID)  # its requests wait for `go`
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
    fetch = open_set(
        "file:///x",
        cache=tmp_path / "cache",
        revision="v2",
    ).prefetch(Place(**GRID))
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
        (["STORE", "--stages", "0-"], 2, "is not a list of stages"),
        (["STORE", "--revision", "v9"], 1, "no revision v9; there are main"),
        (["STORE", "-tp", "x"], 2, "invalid int value"),
        (["STORE", "-tp", 2, "--stay", "--", "true"], 2, "--stay is for a fetch without a command"),
        (["STORE", "-tp", 2, "--ranks", "0-2"], 2, "rank 2 is not in a grid of 1 x 2"),
        (["STORE", "-tp", 2, "--ranks", "1-0"], 2, "1-0 is not a list of ranks; write each once: 0-3"),
        (["STORE", "-tp", 2, "--ranks", "0,0-1"], 2, "0,0-1 is not a list of ranks"),
        (["STORE", "-tp", 2, "--ranks", ""], 2, "is not a list of ranks"),
        (["STORE", "-tp", 2, "--ranks", "0", "--rank", 0], 2, "say the same thing; give one of them"),
        (["STORE", "-tp", 2, "--nnodes", 2], 2, "--nnodes and --node-rank go together"),
        (["STORE", "-tp", 2, "--node-rank", 0], 2, "--nnodes and --node-rank go together"),
        (
            ["STORE", "-tp", 2, "--nnodes", 3, "--node-rank", 0],
            2,
            "3 nodes cannot share 2 ranks evenly (1 x 2",
        ),
        (
            ["STORE", "-tp", 2, "--nnodes", 2, "--node-rank", 2],
            2,
            "node rank 2: expected 0 to 1, for 2 nodes",
        ),
        ([], 2, "the following arguments are required: source"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    store: Path, tmp_path: Path, args: list[object], code: int, words: str
) -> None:
    args = [f"file://{store}" if arg == "STORE" else arg for arg in args]
    found = run(*args[:1], *(["--cache", tmp_path / "cache"] if args else []), *args[1:])
    assert found.returncode == code
    assert words in found.stderr
    assert found.stdout == ""


@pytest.mark.cold  # it is about what the process is to the system
def test_it_ends_when_it_is_asked_to_as_the_first_process_of_a_container_must(
    store: Path, tmp_path: Path
) -> None:
    """The kernel drops a signal to a container's first process for which that has set no handler."""
    code = SLOW.format(tests=str(Path(__file__).parents[1]), store=str(store), delay=30)
    options = ["file:///x", "-tp", "2", "--rank", "1", "--cache", str(tmp_path / "c")]
    with subprocess.Popen([sys.executable, "-c", code, *options], stderr=subprocess.PIPE) as process:
        until((tmp_path / "c").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sidecar_stays_when_all_is_here_and_ends_well_when_it_is_asked_to(
    store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = [f"file://{store}", "-tp", "2", "--rank", "1", "--cache", str(tmp_path / "c"), "--stay"]
    with subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"rank 1: ")
        assert fetched(tmp_path / "c")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stderr.read() == b""


def test_a_sidecar_whose_fetch_fails_ends_so_that_it_is_started_again(tmp_path: Path) -> None:
    assert run("file:///no-store", "--cache", tmp_path / "c", "--stay").returncode == 1


# ------------------------------------------------------------------------------------------------- all ranks of a host


@pytest.mark.parametrize(
    "said", [["--ranks", "0-3"], ["--ranks", "0,1,2-3"], ["--nnodes", 1, "--node-rank", 0]]
)
def test_one_process_fetches_for_all_ranks_of_its_host(
    store: Path, tmp_path: Path, said: list[object]
) -> None:
    cache = tmp_path / "cache"
    found = run(f"file://{store}", "-tp", 4, *said, "--cache", cache, "--json")
    assert (found.returncode, found.stderr) == (0, "")
    reports = json.loads(found.stdout)
    assert [each["rank"] for each in reports] == [0, 1, 2, 3]
    digest = digest_of((SHARDS / "shardprep.json").read_bytes())
    for report in reports:
        with load(
            "file:///nowhere",
            cache=cache,
            manifest_digest=digest,
            tensor_parallel_size=4,
            rank=report["rank"],
        ) as shard:
            shard.wait()
            assert (shard.nbytes, shard.bytes_fetched) == (report["nbytes"], 0)
    found = run(f"file://{store}", "-tp", 4, *said, "--cache", cache)
    assert [line.partition(":")[0] for line in found.stdout.splitlines()] == [f"rank {n}" for n in range(4)]
    assert all(line.endswith(" 0 of them fetched") for line in found.stdout.splitlines())


def test_bytes_that_several_ranks_need_are_fetched_once(counted: CountingStore, tmp_path: Path) -> None:
    fetch(open_set("file:///x", cache=tmp_path / "c"), [Place(rank, 4) for rank in range(4)])
    asked = [(each.key, each.start) for each in counted.requests if each.key.startswith("blobs/")]
    assert len(asked) == len(set(asked))
    stored = {blob_key(part.digest): part.size for part in read_manifest(SHARDS).parts}
    assert {key: counted.received[key] for key in stored} == stored


def test_a_host_fetches_for_its_own_ranks_and_no_others(store: Path, tmp_path: Path) -> None:
    for node in range(2):
        cache = tmp_path / str(node)
        found = run(f"file://{store}", "-tp", 2, "--nnodes", 2, "--node-rank", node, "--cache", cache)
        assert found.stdout.startswith(f"rank {node}: ")
        assert fetched(cache, rank=node)
        assert not fetched(cache, rank=1 - node)


def test_hosts_share_the_ranks_as_vllm_deals_them_out() -> None:
    assert [ranks_of_node(Grid(4, 2), 2, node) for node in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [ranks_of_node(Grid(4, 1), 2, node) for node in range(2)] == [(0, 1), (2, 3)]
    assert ranks_of_node(Grid(2, 3), 1, 0) == (0, 1, 2, 3, 4, 5)


def test_all_ranks_are_of_one_revision_though_a_push_moves_it_meanwhile(
    counted: CountingStore, tmp_path: Path
) -> None:
    """The manifest is read once: a rank that asked again could be given another."""
    fetch(open_set("file:///x", cache=tmp_path / "c"), [Place(0, 2), Place(1, 2)])
    assert [each.key for each in counted.requests].count("manifests/main.json") == 1


def test_a_host_whose_cache_cannot_hold_all_its_ranks_is_refused(store: Path, tmp_path: Path) -> None:
    run(f"file://{store}", "-tp", 4, "--rank", 0, "--cache", tmp_path / "one")
    room = sum(file.stat().st_blocks * 512 for file in (tmp_path / "one/blobs").iterdir())
    found = run(
        f"file://{store}", "-tp", 4, "--ranks", "0-3", "--cache", tmp_path / "all",
        env={"SHARDPREP_CACHE_SIZE": str(room)},
    )  # fmt: skip
    assert found.returncode == 1
    assert "do not fit into the cache" in found.stderr


def test_a_rank_that_fails_fails_the_host(counted: CountingStore, tmp_path: Path) -> None:
    with load(SHARDS, **GRID) as expected:
        part, piece, start, _ = next(each for each in expected.ranges() if each[0].part.ranks == (1, 2))
    counted.corrupt(blob_key(part.part.digest), piece.span.start + start)
    with pytest.raises(IntegrityError):
        fetch(open_set("file:///x", cache=tmp_path / "c"), [Place(0, 2), Place(1, 2)])


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


@pytest.mark.cold  # it is about what the process is to the system
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


@pytest.mark.cold  # it is about what the process is to the system
def test_the_command_ignores_no_signal_that_it_did_not_ask_to(store: Path, tmp_path: Path) -> None:
    """Python ignores SIGPIPE; a command that inherited that would not end when its reader does."""
    show = "grep SigIgn /proc/$$/status"
    found = run(f"file://{store}", "--cache", tmp_path / "cache", "--", "sh", "-c", show)
    plain = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True)
    assert found.stdout == plain.stdout


@pytest.mark.cold  # it is about what the process is to the system
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
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.shard.prefetch_command import main
from stores import CountingStore
store = CountingStore(FolderStore(Path({store!r})))
store.delay({delay})
importlib.import_module("shardprep_runtime.shard.shard_set").open_store = lambda *_: store
sys.exit(main())
"""


def test_who_reads_what_the_command_prints_does_not_wait_for_the_fetch(store: Path, tmp_path: Path) -> None:
    code = SLOW.format(tests=str(Path(__file__).parents[1]), store=str(store), delay=0.5)
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


BESIDE = """
import os, sys
from shardprep_runtime import Place, open_set
from shardprep_runtime.shard.prefetch_command import fetch_beside
fetch_beside(open_set(sys.argv[1], cache=sys.argv[2]), [Place(0, 2), Place(1, 2)])
os.execvp("sh", ["sh", "-c", "echo became; exec cat"])
"""


@pytest.mark.cold  # it is about what the process is to the system
def test_a_program_becomes_another_while_the_fetch_for_its_ranks_goes_on(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BESIDE, f"file://{store}", str(tmp_path / "c")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"became\n"
        until(lambda: all(fetched(tmp_path / "c", rank=rank) for rank in range(2)))
