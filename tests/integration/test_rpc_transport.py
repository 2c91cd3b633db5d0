"""Workers that torch.distributed.rpc reaches compute what one process does, and their loss is seen and named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from echo_worker import DIGEST, SECRET, expected
from shardprep_runtime.errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    WorkerError,
    WorkerLostError,
)
from shardprep_runtime.workers.kinds import RPC
from shardprep_runtime.workers.launchers.launcher import Listener
from shardprep_runtime.workers.launchers.processes import Processes
from shardprep_runtime.workers.meeting import Meeting, Plan, open_meeting
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.rpc.transport import RpcTransport
from shardprep_runtime.workers.transport import Step, Transport
from split_greedy import OTHER, PROMPT, greedy, reference, split_options

pytestmark = pytest.mark.slow

ECHO = """
import sys, threading, time
import torch
from echo_worker import SECRET, EchoWorker
from shardprep_runtime.workers.meeting import join
from shardprep_runtime.workers.rpc.group import serve_rpc

torch.set_num_threads(1)
master, name, pp_rank, silence = sys.argv[1:]
worker = EchoWorker(name, None if pp_rank == "spare" else int(pp_rank), 2)
membership = join(master, worker.info(), secret=SECRET, timeout=60)
worker.name = membership.name
serve_rpc(worker, membership, silence=float(silence))
print("left", [each.name for each in threading.enumerate() if each.name.startswith("shardprep")])
"""

FRONT_END = """
import sys
from echo_worker import DIGEST, SECRET
from shardprep_runtime.workers.meeting import Plan, open_meeting
from shardprep_runtime.workers.kinds import RPC
from shardprep_runtime.workers.rpc.transport import RpcTransport

plan = Plan(transport="rpc", stages=((0, 1), (1, 2)), manifest_digest=DIGEST, details=RPC.details(2))
meeting = open_meeting("127.0.0.1", plan=plan, secret=SECRET)
print(meeting.address, flush=True)
for _ in range(2):
    meeting.welcome(meeting.joined(60))
transport = RpcTransport(meeting)
print("ready", flush=True)
sys.stdin.readline()
"""

ROUTE = ("s.0", "s.1")
IDS = torch.tensor([[1, 2, 3]])
TESTS = Path(__file__).parents[1]


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "FATAL",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def echo_worker(master: str, name: str, *, silence: float = 30) -> subprocess.Popen[str]:
    pp_rank = name[2:] if name.startswith("s.") else "spare"
    return python(ECHO, master, name, pp_rank, str(silence))


def until(true: Callable[[], object], seconds: float = 10) -> float:
    """Seconds until `true`."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.002)
    return time.monotonic() - began


def rpc_plan(
    world_size: int, *, stages: tuple[tuple[int, int], ...], digest: str, dtype: str | None = None
) -> Plan:
    return Plan(
        transport="rpc",
        stages=stages,
        dtype=dtype,
        manifest_digest=digest,
        details=RPC.details(world_size - 1),
    )


@dataclass
class Echoes:
    """Workers without a model, each a process, and what reaches them."""

    transport: Transport
    processes: dict[str, subprocess.Popen[str]]
    lost: list[tuple[str, str]] = field(default_factory=list)

    def signal(self, name: str, number: int) -> None:
        os.kill(self.processes[name].pid, number)

    def step(
        self, sequence: str, *, route: Sequence[str] = ROUTE, past: int = 0, timeout: float = 50
    ) -> torch.Tensor:
        step = self.transport.step(route, Step(sequence, past), IDS, timeout=timeout)
        return step.result(timeout + 5).logits


@contextmanager
def started(*spares: str) -> Iterator[Echoes]:
    plan = rpc_plan(3 + len(spares), stages=((0, 1), (1, 2)), digest=DIGEST)
    meeting = open_meeting("127.0.0.1", plan=plan, secret=SECRET)
    processes = {name: echo_worker(meeting.address, name) for name in (*ROUTE, *spares)}
    try:
        welcome_all(meeting, len(processes))
        with RpcTransport(meeting, start_timeout=60) as transport:
            found = Echoes(transport, processes)
            transport.watch(lambda worker, why: found.lost.append((worker, why)))
            yield found
        for name, each in processes.items():
            output = each.communicate(timeout=30)[0]
            if each.returncode != -signal.SIGKILL:
                assert (each.returncode, output) == (0, "left []\n"), name
    finally:
        for each in processes.values():
            each.kill()
            each.communicate()
        meeting.close()


@pytest.fixture(scope="class")  # a process is in one group at a time
def echoes() -> Iterator[Echoes]:
    with started("promoted", "idle", "computing", "late", "stopped") as found:
        yield found


def welcome_all(meeting: Meeting, count: int, check: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + 120
    while count:
        check()
        assert time.monotonic() < deadline
        member = meeting.joined(0.1)
        if member is not None:
            meeting.welcome(member)
            count -= 1


# ---------------------------------------------------------------------------------------------------------- two stages


def test_two_stages_give_the_tokens_of_one_process_and_a_spare_takes_the_place_of_one(
    tmp_path: Path,
) -> None:
    options = split_options(tmp_path / "shards")
    launcher = Processes(transport=RPC)
    with launcher.gather(options, Policy(spares=1), 120, Listener()) as gathered:
        transport = gathered.transport
        assert gathered.replace is None  # nobody joins later
        workers = transport.workers()
        assert {info.name: (info.pp_rank, info.layers) for info in workers.values()} == {
            "stage-0": (0, (0, 3)),
            "stage-1": (1, (3, 6)),
            "spare": (None, None),
        }
        route = ("stage-0", "stage-1")
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(greedy, transport, route, "one")
            other = pool.submit(greedy, transport, route, "other", OTHER)
            assert one.result() == reference(PROMPT)
            assert other.result() == reference(OTHER)

        health = transport.health("stage-1", probe=True, timeout=30)
        assert health.sequences == 2
        assert health.probe is not None
        assert health.probe.startswith("sha256:")
        assert transport.health("stage-1", probe=False, timeout=30).probe is None
        transport.reset("stage-1", "one")
        until(lambda: transport.health("stage-1", probe=False, timeout=30).sequences == 1)
        with pytest.raises(CacheLostError, match=r"stage-1: .*one"):
            transport.step(route, Step("one", 14), torch.tensor([[1]]), timeout=30).result(40)
        with pytest.raises(InputError, match="2048"):
            transport.step(route, Step("far", 0), torch.tensor([[2048]]), timeout=30).result(40)
        with pytest.raises(WorkerError, match=r"spare: .*promote"):
            transport.step(("stage-0", "spare"), Step("x", 0), IDS, timeout=30).result(40)

        os.kill(workers["stage-1"].pid, signal.SIGKILL)
        until(lambda: "stage-1" not in transport.workers())
        info = transport.promote("spare", 1, timeout=60)
        assert (info.pp_rank, info.layers) == (1, (3, 6))
        assert transport.workers()["spare"] == info
        assert greedy(transport, ("stage-0", "spare"), "again") == reference(PROMPT)
        with pytest.raises(WorkerError, match=r"spare: .*stage 1"):
            transport.promote("spare", 0, timeout=60)


# --------------------------------------------------------------------------------------------------- what goes wrong


class TestEchoes:
    """Each test that harms a worker has one of its own."""

    pytestmark = pytest.mark.xdist_group("rpc")

    def test_steps_of_several_sequences_overlap(self, echoes: Echoes) -> None:
        assert torch.equal(echoes.step("a"), expected(IDS, 2))
        tag = uuid.uuid4().hex
        # the first ends only after the second has begun
        names = [f"first-{tag}", f"second-{tag}", f"third-{tag}"]
        steps = [echoes.transport.step(ROUTE, Step(name, 0), IDS, timeout=90) for name in names]
        for each in steps:
            assert torch.equal(each.result(90).logits, expected(IDS, 2))

    def test_what_a_worker_says_is_raised_with_its_name_and_without_a_traceback(self, echoes: Echoes) -> None:
        for sequence, kind, message in (
            ("cache-1-a", CacheLostError, "s.1: stage 1-a was told to fail"),
            ("integrity-0-a", IntegrityError, "s.0: stage 0-a was told to fail"),
            ("error-1-a", WorkerError, "s.1: ZeroDivisionError: stage 1-a was told to fail"),
            ("input-1-a", InputError, "stage 1-a was told to fail"),
        ):
            with pytest.raises(kind) as error:
                echoes.step(sequence)
            assert type(error.value) is kind
            assert str(error.value) == message
        with pytest.raises(CacheLostError, match=r"s\.0: no 5 positions of b"):
            echoes.step("b", past=5)
        with pytest.raises(IntegrityError, match="promoted: no stage 9"):
            echoes.transport.promote("promoted", 9, timeout=50)
        with pytest.raises(WorkerLostError, match="nobody: no such worker") as lost:
            echoes.transport.health("nobody", probe=False, timeout=50)
        assert (lost.value.worker, lost.value.is_certain) == ("nobody", True)
        echoes.transport.reset("nobody", "a")
        assert {*ROUTE, "promoted"} <= set(echoes.transport.workers())

    def test_a_process_is_in_one_group_at_a_time(self, echoes: Echoes) -> None:
        meeting = open_meeting("127.0.0.1", plan=rpc_plan(2, stages=((0, 1),), digest=DIGEST), secret=SECRET)
        try:
            with pytest.raises(InputError, match="one group at a time"):
                RpcTransport(meeting)
        finally:
            meeting.close()
        assert torch.equal(echoes.step("a"), expected(IDS, 2))

    def test_an_idle_worker_that_is_killed_is_named_at_once(self, echoes: Echoes) -> None:
        echoes.transport.promote("idle", 1, timeout=50)
        echoes.signal("idle", signal.SIGKILL)
        until(lambda: "idle" in dict(echoes.lost))
        assert "idle" not in echoes.transport.workers()
        with pytest.raises(WorkerLostError, match="idle has ended") as error:
            echoes.step("a", route=("s.0", "idle"))
        assert (error.value.worker, error.value.is_certain) == ("idle", True)
        # the others stay reachable
        assert echoes.transport.promote("promoted", 1, timeout=50).pp_rank == 1
        assert torch.equal(echoes.step("b", route=("s.0", "promoted")), expected(IDS, 2))

    def test_a_worker_that_is_killed_in_a_step_is_named(self, echoes: Echoes) -> None:
        echoes.transport.promote("computing", 1, timeout=50)
        step = echoes.transport.step(("s.0", "computing"), Step("hang-1-a", 0), IDS, timeout=50)
        time.sleep(0.3)
        echoes.signal("computing", signal.SIGKILL)
        with pytest.raises(WorkerLostError) as error:
            step.result(50)  # long before it has slept
        assert (error.value.worker, error.value.is_certain) == ("computing", True)

    def test_a_step_that_takes_too_long_names_the_worker_that_has_it(self, echoes: Echoes) -> None:
        echoes.transport.promote("late", 0, timeout=50)
        with pytest.raises(WorkerLostError, match="late hangs") as error:
            echoes.step("hang-0-a", route=("late", "s.1"), timeout=1)
        assert (error.value.worker, error.value.is_certain) == ("late", False)
        assert "late" not in echoes.transport.workers()
        assert "late" not in dict(echoes.lost)  # it may come back
        echoes.signal("late", signal.SIGKILL)  # it sleeps for a minute
        until(lambda: "late" in dict(echoes.lost))

    def test_a_stopped_worker_is_lost_until_it_goes_on(self, echoes: Echoes) -> None:
        echoes.transport.promote("stopped", 1, timeout=50)
        echoes.signal("stopped", signal.SIGSTOP)
        try:
            with pytest.raises(WorkerLostError, match="stopped hangs: it has not answered") as error:
                echoes.step("b", route=("s.0", "stopped"))
            assert (error.value.worker, error.value.is_certain) == ("stopped", False)
            assert "stopped" not in echoes.transport.workers()
            with pytest.raises(WorkerLostError, match="hangs"):
                echoes.transport.health("stopped", probe=False, timeout=50)
            assert "stopped" not in dict(echoes.lost)
        finally:
            echoes.signal("stopped", signal.SIGCONT)
        until(lambda: "stopped" in echoes.transport.workers())
        assert torch.equal(echoes.step("c", route=("s.0", "stopped")), expected(IDS, 2))


# ------------------------------------------------------------------------------------------------- the start, the end


def test_who_does_not_come_is_not_waited_for_for_ever() -> None:
    plan = rpc_plan(3, stages=((0, 1), (1, 2)), digest=DIGEST)
    meeting = open_meeting("127.0.0.1", plan=plan, secret=SECRET)
    try:
        with pytest.raises(WorkerError, match=r"2 of 3 processes did not come in 0\.3 seconds"):
            RpcTransport(meeting, start_timeout=0.3)
    finally:
        meeting.close()


@pytest.mark.parametrize("how", ["killed", "ends without closing"])
def test_workers_end_with_their_front_end(how: str) -> None:
    front_end = python(FRONT_END)
    assert front_end.stdout is not None
    address = front_end.stdout.readline().strip()
    workers = [echo_worker(address, name) for name in ROUTE]
    try:
        assert front_end.stdout.readline() == "ready\n"
        if how == "killed":
            front_end.kill()
            front_end.communicate()
        else:
            assert front_end.communicate("\n", timeout=15)[0] == ""  # torch's threads say nothing of it
            assert front_end.returncode == 0
        for each in workers:
            assert each.communicate(timeout=15)[0] == "left []\n"
            assert each.returncode == 0
    finally:
        for each in (front_end, *workers):
            each.kill()
            each.communicate()


def test_a_front_end_that_says_nothing_for_long_is_taken_for_gone() -> None:
    front_end = python(FRONT_END)
    assert front_end.stdout is not None
    address = front_end.stdout.readline().strip()
    workers = [echo_worker(address, name, silence=1.5) for name in ROUTE]
    try:
        assert front_end.stdout.readline() == "ready\n"
        time.sleep(2)
        assert all(each.poll() is None for each in workers)
        front_end.send_signal(signal.SIGSTOP)
        for each in workers:
            assert each.communicate(timeout=15)[0] == "left []\n"
            assert each.returncode == 0
    finally:
        front_end.send_signal(signal.SIGCONT)
        for each in (front_end, *workers):
            each.kill()
            each.communicate()


def test_closing_ends_steps_and_does_not_wait_for_a_stopped_worker() -> None:
    with started() as found:
        found.signal("s.0", signal.SIGSTOP)
        try:
            step = found.transport.step(ROUTE, Step("a", 0), IDS, timeout=50)
            found.transport.close()
            with pytest.raises(WorkerError):
                step.result(1)
            with pytest.raises(WorkerError, match="closed"):
                found.step("b")
            assert found.lost == []  # nobody is told of what was meant
        finally:
            found.signal("s.0", signal.SIGCONT)
    assert [each.name for each in threading.enumerate() if each.name.startswith("shardprep")] == []
