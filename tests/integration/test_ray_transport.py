"""Actors of Ray compute what one process does; their loss is seen and named, and Ray starts them again.

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

from split_greedy import OTHER, PROMPT, reference, split_options

TESTS = Path(__file__).parents[1]
ROUTE = ("s.0", "s.1")

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


def test_two_stages_give_the_tokens_of_one_process_and_killed_ones_are_replaced(
    front: Front, tmp_path: Path
) -> None:
    options = split_options(tmp_path / "shards")
    source, digest = options.source, options.manifest_digest
    with pytest.raises(OrderError, match="WorkerError: Ray has no place for 3 workers with 90 CPUs"):
        front.order("start", source, digest, 1, cpus=90, start_timeout=1)
    with pytest.raises(OrderError, match=f"ManifestError: .*its digest is {digest}"):
        front.order("start", source, "sha256:" + "0" * 64, 0)

    assert front.order("start", source, digest, 1) == ["stage-0", "stage-1", "spare-0"]
    route = ("stage-0", "stage-1")
    workers = front.order("workers")
    assert {name: (each["pp_rank"], each["layers"]) for name, each in workers.items()} == {
        "stage-0": (0, [0, 3]),
        "stage-1": (1, [3, 6]),
        "spare-0": (None, None),
    }
    tokens, others = front.order("two_greedy", route)
    assert tokens == reference(PROMPT)
    assert others == reference(OTHER)
    health = front.order("health", "stage-1", True)
    assert health["sequences"] == 2
    assert health["probe"].startswith("sha256:")
    front.order("reset", "stage-1", "one")
    lost = front.order("step_of", route, [1], 14)
    assert lost["error"] == "CacheLostError"
    assert lost["message"].startswith("stage-1: one: ")
    refused = front.order("step_of", route, [2048], 0)
    assert refused["error"] == "InputError"

    found = front.order("kill_idle", "stage-1")
    assert found["worker"] == "stage-1"
    assert found["seconds"] < 1.4  # Ray says so later
    assert "stage-1" not in found["there"]
    assert front.order("promote", "spare-0", 1) == [3, 6]
    assert front.order("greedy", ("stage-0", "spare-0"), "with the spare".replace(" ", "-")) == tokens
    # Ray has started it again, as another process that holds the same stage
    assert front.order("wait_for", "stage-1", found["pid"]) != found["pid"]
    assert front.order("workers")["stage-1"]["layers"] == [3, 6]
    assert front.order("health", "stage-1", True)["probe"] == health["probe"]
    assert front.order("greedy", route, "again") == tokens
    assert front.order("close") < 5


@pytest.fixture(scope="class")
def echoes(front: Front) -> Iterator[Front]:
    names = {"s.0": 0, "s.1": 1, "computing": 1, "stopped": 1, "late": 0}
    assert front.order("start_echoes", names, 1) == list(names)
    yield front
    front.order("close")


class TestEchoes:
    """Workers without a model. Each test that harms one has one of its own."""

    def test_steps_of_several_sequences_overlap(self, echoes: Front) -> None:
        found = echoes.order("step", ROUTE, "a", 0, 50)
        assert found["right"]
        assert found["timings"] == list(ROUTE)
        assert 0 < found["packing"] < found["seconds"]
        # each sleeps 0.1 s in stage 0 or in stage 1: one after the other they cannot take less than 0.8 s, ever
        for attempt in range(10):
            found = echoes.order("steps", ROUTE, [f"slow-{i % 2}-{attempt}-{i}" for i in range(8)])
            assert found["right"] == [True] * 8
            if found["seconds"] < 0.8:
                return
        pytest.fail("never less than one after the other")

    def test_what_a_worker_says_is_raised_with_its_name_and_without_a_traceback(self, echoes: Front) -> None:
        for sequence, kind, message in (
            ("cache-1-a", "CacheLostError", "s.1: stage 1-a was told to fail"),
            ("integrity-0-a", "IntegrityError", "s.0: stage 0-a was told to fail"),
            ("error-0-a", "WorkerError", "s.0: ZeroDivisionError: stage 0-a was told to fail"),
            ("input-1-a", "InputError", "stage 1-a was told to fail"),
        ):
            found = echoes.order("step", ROUTE, sequence, 0, 50)
            assert (found["error"], found["message"]) == (kind, message)
        found = echoes.order("step", ("s.0", "nobody"), "a", 0, 50)
        assert (found["error"], found["worker"], found["is_certain"]) == ("WorkerLostError", "nobody", True)

    def test_a_worker_that_is_killed_in_a_step_is_named_and_comes_back_once(self, echoes: Front) -> None:
        route = ("s.0", "computing")
        found = echoes.order("harm_in_step", route, "hang-1-a", "computing", signal.SIGKILL)
        assert (found["error"], found["worker"]) == ("WorkerLostError", "computing")
        assert found["is_certain"]
        echoes.order("wait_for", "computing", found["pid"])
        assert echoes.order("step", route, "b", 0, 50)["right"]
        again = echoes.order("kill_idle", "computing")
        assert again["worker"] == "computing"
        found = echoes.order("step", route, "c", 0, 50)
        assert (found["error"], found["worker"], found["is_certain"]) == (
            "WorkerLostError",
            "computing",
            True,
        )

    def test_a_stopped_worker_is_lost_until_it_goes_on(self, echoes: Front) -> None:
        route = ("s.0", "stopped")
        pid = echoes.order("workers")["stopped"]["pid"]
        found = echoes.order("harm_in_step", route, "slow-1-a", "s.0", 0)
        assert found == {}
        echoes.order("signal", pid, signal.SIGSTOP)
        try:
            found = echoes.order("step", route, "b", 0, 50)
            assert (found["error"], found["worker"], found["is_certain"]) == (
                "WorkerLostError",
                "stopped",
                False,
            )
            assert 1 < found["seconds"] < 10
            assert "stopped" not in echoes.order("workers")
        finally:
            echoes.order("signal", pid, signal.SIGCONT)
        assert echoes.order("wait_for", "stopped", 0) == pid
        assert echoes.order("step", route, "c", 0, 50)["right"]

    def test_a_step_that_takes_too_long_names_the_worker_that_has_it(self, echoes: Front) -> None:
        found = echoes.order("step", ("late", "s.1"), "hang-0-a", 0, 1)
        assert (found["error"], found["worker"], found["is_certain"]) == ("WorkerLostError", "late", False)
        assert 0.9 < found["seconds"] < 5
        assert "late" not in echoes.order("workers")
