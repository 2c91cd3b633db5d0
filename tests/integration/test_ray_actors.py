"""Workers that are actors of Ray compute what one process does, and a killed one is replaced by another.

Ray and its processes run beside this one, in a program that takes orders: ray_driver.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardprep.split import split as do_split
from split_greedy import OTHER, PROMPT, TINY, reference, split_options

TESTS = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "shardprep[ray]"'
    ),
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
]


class OrderError(Exception):
    """What an order raised there."""


@dataclass
class Front:
    """The program, and what it has printed."""

    folder: Path
    process: subprocess.Popen[str]

    def order(self, name: str, *arguments: object, **named: object) -> Any:
        """What the driver's method of that name returns."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments, named]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 180)
        line = self.process.stdout.readline() if ready else ""
        assert line, f"no answer:\n{self.log()[-5000:]}"
        found = json.loads(line)
        if found["error"] is not None:
            raise OrderError(f"{found['error']['error']}: {found['error']['message']}")
        return found["result"]

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    # the path of Ray's sockets, in a folder of a long name below this, may have 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
        "RAY_AUTH_MODE": "token",  # Ray listens on all addresses, whatever it is told
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "ray_driver.py"), str(folder / "ray")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        with process:
            try:
                found = Front(folder, process)
                found.answer()
                yield found
                assert process.stdin is not None
                process.stdin.close()
                process.wait(60)
            finally:
                process.kill()
    shutil.rmtree(folder)


FAST: dict[str, Any] = {"replacement_timeout": 120}
"""A machine that has much else to do takes its time to start a process."""


def test_what_cannot_be_placed_or_started_says_why(front: Front, tmp_path: Path) -> None:
    split = split_options(tmp_path / "shards").shard_set
    with pytest.raises(OrderError, match="WorkerError: Ray has no place for 3 workers with 90 CPUs"):
        front.order("start", split.source, split.digest, how={"cpus": 90}, policy={"spares": 1}, timeout=1)
    with pytest.raises(OrderError, match=f"ManifestError: .*its digest is {split.digest}"):
        front.order("start", split.source, "sha256:" + "0" * 64, how={}, policy={})
    part = max(Path(split.source).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    with pytest.raises(OrderError, match=r"IntegrityError: stage-\d: .*safetensors"):
        front.order("start", split.source, None, how={}, policy={})


def test_two_stages_give_the_tokens_of_one_process_and_killed_ones_are_replaced(
    front: Front, tmp_path: Path
) -> None:
    split = split_options(tmp_path / "shards").shard_set
    names = front.order("start", split.source, split.digest, how={}, policy={**FAST, "spares": 1})
    assert names == ["spare", "stage-0", "stage-1"]
    workers = front.order("workers")
    assert {name: (each["pp_rank"], each["layers"]) for name, each in workers.items()} == {
        "stage-0": (0, [0, 3]),
        "stage-1": (1, [3, 6]),
        "spare": (None, None),
    }
    assert front.order("processes") == {name: [each["pid"]] for name, each in workers.items()}
    assert any(line.startswith("stage-1: stage 1, layers 3 to 5: ") for line in front.order("lines"))
    assert front.order("greedy", PROMPT) == reference(PROMPT)
    assert front.order("greedy", OTHER) == reference(OTHER)
    proofs = front.order("health")

    # between two tokens: the spare takes the stage, and another spare is started in the place of who was lost
    killed = workers["stage-1"]["pid"]
    assert front.order("greedy", PROMPT, 1, signal.SIGKILL) == reference(PROMPT)
    assert front.order("events") == ["lost", "promoted", "prefilled"]
    assert front.order("route") == ["stage-0", "spare"]
    assert front.order("health") == proofs
    assert front.order("wait_for_spare") == "spare-2"
    # one that is stopped is as good as lost
    stopped = workers["stage-0"]["pid"]
    try:
        assert front.order("greedy", PROMPT, 0, signal.SIGSTOP) == reference(PROMPT)
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert front.order("route") == ["spare-2", "spare"]
    running = front.order("processes")
    assert killed not in [pid for pids in running.values() for pid in pids]
    secret = front.order("secret")
    front.order("close")
    for path in (front.folder / "ray").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
    assert secret not in front.log()


def test_without_a_spare_another_actor_is_started(front: Front, tmp_path: Path) -> None:
    split = split_options(tmp_path / "shards").shard_set
    front.order("start", split.source, split.digest, how={}, policy=FAST)
    killed = front.order("workers")["stage-1"]["pid"]
    assert front.order("greedy", PROMPT, 1, signal.SIGKILL) == reference(PROMPT)
    assert front.order("events") == ["lost", "replaced", "prefilled"]
    assert front.order("route") == ["stage-0", "stage-1-2"]
    assert front.order("workers")["stage-1-2"]["pid"] != killed
    assert "stage 1: starting another worker" in front.order("lines")
    front.order("close")


def test_tensor_ranks_are_actors_and_end_together(front: Front, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    do_split(TINY, shards, tensor_parallel_size=2)
    options = {"how": {}, "policy": {"replace": False}, "stages": 1, "tensor_parallel_size": 2}
    assert front.order("start", str(shards), None, **options) == ["stage-0"]
    (ranks,) = front.order("processes").values()
    assert len(set(ranks)) == 2
    assert front.order("greedy", PROMPT) == reference(PROMPT)
    os.kill(ranks[1], signal.SIGKILL)
    with pytest.raises(OrderError, match=r"WorkerError: .*stage 0"):
        front.order("greedy", PROMPT)
    front.order("close")
