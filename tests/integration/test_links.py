"""Steps travel from worker to worker over gloo, side by side; who is lost is named at once, and can be replaced."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_worker import DIGEST, SECRET, expected
from processes import ended
from shardprep_runtime.errors import (
    CacheLostError,
    FormatError,
    InputError,
    IntegrityError,
    ShardprepError,
    WorkerError,
    WorkerLostError,
)
from shardprep_runtime.workers.links import link
from shardprep_runtime.workers.links.link import BrokenLink, Header, Limits, Link, Op, Parcel
from shardprep_runtime.workers.links.transport import LinkTransport
from shardprep_runtime.workers.meeting import Meeting, Plan, open_meeting
from shardprep_runtime.workers.transport import Output, Step
from sweeps import swept

pytestmark = pytest.mark.slow  # many processes; tests/unit/test_link_frames.py has the frames

ECHO = Path(__file__).parents[1] / "echo_worker.py"

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


class Processes:
    """Workers, forked from a process that has imported what they need."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ECHO.parent), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, str(ECHO)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )

    def start(self, meeting: Meeting, name: str, pp_rank: int | None, stages: int) -> int:
        return int(self._order(start=[meeting.address, name, pp_rank, stages]))

    def wait(self, child: int, timeout: float = 20.0) -> int | None:
        """How it ended; None where it has not."""
        found: int | None = self._order(wait=child, timeout=timeout)
        return found

    def _order(self, **order: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    torch.set_num_threads(1)
    started = Processes()
    yield started
    started.close()


class Cluster:
    """A front end and its workers: w0, w1, ... and what else is started."""

    def __init__(self, processes: Processes, stages: int, **options: Any) -> None:
        self.processes = processes
        self.stages = stages
        self.pids: dict[str, int] = {}
        self._is_closed = False
        plan = Plan(
            transport="links", stages=tuple((n, n + 1) for n in range(stages)), manifest_digest=DIGEST
        )
        self.meeting = open_meeting("127.0.0.1", plan=plan, secret=SECRET)
        self.transport = LinkTransport(self.meeting, **options)
        self.lost: list[tuple[str, str, float]] = []
        self.transport.watch(lambda name, why: self.lost.append((name, why, time.monotonic())))
        self.route = [f"w{stage}" for stage in range(stages)]
        try:
            for stage, name in enumerate(self.route):
                self.pids[name] = self._start(name, stage)
            wait_until(lambda: len(self.transport.workers()) == stages)
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, pp_rank: int | None) -> int:
        return self.processes.start(self.meeting, name, pp_rank, self.stages)

    def add(self, name: str, pp_rank: int | None) -> None:
        self.pids[name] = self._start(name, pp_rank)
        wait_until(lambda: name in self.transport.workers())

    def step(
        self, sequence: str, ids: torch.Tensor = IDS, *, timeout: float = 20.0, **step: Any
    ) -> Future[Output]:
        return self.transport.step(self.route, Step(sequence, **{"past": 0, **step}), ids, timeout=timeout)

    def check(self, sequence: str = "check") -> None:
        """A step gives what it must."""
        assert torch.equal(self.step(sequence).result(20).logits, expected(IDS, self.stages))

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> float:
        when = time.monotonic()
        os.kill(self.pids[name], how)
        return when

    def close(self) -> None:
        """Again is no error."""
        self.transport.close()
        if not self._is_closed:
            self._is_closed = True
            self.meeting.close()


@contextmanager
def cluster(processes: Processes, stages: int, **options: Any) -> Iterator[Cluster]:
    started = Cluster(processes, stages, **options)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def three(processes: Processes) -> Iterator[Cluster]:
    """Three stages that nobody kills."""
    with cluster(processes, 3) as started:
        yield started


def wait_until(is_so: Callable[[], object], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def error_of(step: Future[Output]) -> BaseException:
    error = step.exception(20)
    assert error is not None
    return error


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("keep", ["last", "all"])
def test_a_step_goes_through_all_stages(three: Cluster, keep: str) -> None:
    output = three.step(f"sequence-{keep}", keep=keep).result(20)
    assert torch.equal(output.logits, expected(IDS, 3, keep))
    assert [each.worker for each in output.timings] == three.route
    assert all(each.compute > 0 and each.packing > 0 for each in output.timings)
    assert output.packing > 0


def test_a_step_that_takes_two_messages_arrives_whole(three: Cluster) -> None:
    ids = (
        torch.arange(2 * 70_000).reshape(2, -1) % 50
    )  # 1.1 MB of ids, 4.5 MB of hidden states, 13 MB of logits
    for keep in ("all", "last"):
        output = three.step(f"long-{keep}", ids, keep=keep).result(60)
        assert torch.equal(output.logits, expected(ids, 3, keep))
    three.check()


def test_steps_of_four_sequences_overlap(three: Cluster) -> None:
    three.check()
    tag = uuid.uuid4().hex
    # the first ends only after the second has begun
    names = [f"first-{tag}", f"second-{tag}", f"third-{tag}", f"fourth-{tag}"]
    steps = [three.step(name, IDS + number, timeout=90) for number, name in enumerate(names)]
    for number, step in enumerate(steps):
        assert torch.equal(step.result(90).logits, expected(IDS + number, 3))


def test_threads_may_step_at_the_same_time(three: Cluster) -> None:
    def go(number: int) -> None:
        for past in range(20):
            ids = torch.full((1, 1), number)
            output = three.step(f"thread-{number}", ids, past=past).result(20)
            right.append(torch.equal(output.logits, expected(ids, 3)))

    right: list[bool] = []
    threads = [threading.Thread(target=go, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 120


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("input", InputError, "told to fail"),
        ("cache", CacheLostError, "told to fail"),
        ("integrity", IntegrityError, "told to fail"),
        ("error", WorkerError, "ZeroDivisionError: .*told to fail"),
    ],
)
def test_an_error_is_that_of_one_step_alone(
    three: Cluster, what: str, kind: type[ShardprepError], words: str, stage: int
) -> None:
    steps = [three.step(name) for name in ("slow-all-a", f"{what}-{stage}-b", "slow-all-c")]
    error = error_of(steps[1])
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error
    if not isinstance(error, InputError):
        assert str(error).startswith(f"w{stage}: ")
    for step in (steps[0], steps[2]):
        assert torch.equal(step.result(20).logits, expected(IDS, 3))


def test_a_cache_that_is_shorter_than_the_step_says_is_lost(three: Cluster) -> None:
    three.step("growing").result(20)
    three.step("growing", IDS[:, :1], past=3).result(20)
    with pytest.raises(CacheLostError, match="w0: no 9 positions"):
        three.step("growing", past=9).result(20)
    for name in three.route:
        three.transport.reset(name, "growing")
    three.check()  # resets are done before what is sent after them
    with pytest.raises(CacheLostError):
        three.step("growing", IDS[:, :1], past=4).result(20)


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)]
)
def test_ids_that_are_none_are_refused(three: Cluster, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="token ids are"):
        three.step("wrong", ids).result(20)


def test_a_route_that_is_none_is_refused(three: Cluster) -> None:
    for route, kind in (([], InputError), (["w0", "w0"], InputError), (["w0", "w9"], WorkerLostError)):
        with pytest.raises(kind):
            three.transport.step(route, Step("a", 0), IDS, timeout=5).result(20)
    three.check()


def test_health_says_what_a_worker_holds(three: Cluster) -> None:
    three.check("held")
    health = three.transport.health("w1", probe=True, timeout=10)
    assert health.info == three.transport.workers()["w1"]
    assert (health.info.pp_rank, health.info.layers) == (1, (1, 2))
    assert (health.probe, health.proven) == (DIGEST, True)
    assert health.sequences >= 1
    assert three.transport.health("w1", probe=False, timeout=10).probe is None
    with pytest.raises(WorkerLostError, match="w9") as caught:
        three.transport.health("w9", probe=False, timeout=10)
    assert caught.value.worker == "w9"


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("is_stepping", [True, False], ids=["stepping", "idle"])
@pytest.mark.parametrize("name", ["w0", "w1", "w2"])
def test_a_kill_is_noticed_at_once_and_a_spare_takes_the_place(
    processes: Processes, name: str, *, is_stepping: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster(processes, 3) as these:
        these.add("spare", None)
        these.check()
        step = these.step(f"hang-{name[1:]}-a", timeout=60) if is_stepping else None
        time.sleep(0.3)
        killed = these.kill(name)
        wait_until(lambda: these.lost)
        if step is not None:
            error = error_of(step)
            assert isinstance(error, WorkerLostError)
            assert (error.worker, error.is_certain) == (name, True)
        with capsys.disabled():
            print(f"[{1e3 * (these.lost[0][2] - killed):.0f} ms]", end=" ")
        assert [each[0] for each in these.lost] == [name]
        assert name not in these.transport.workers()
        with pytest.raises(WorkerLostError) as caught:
            these.step("again").result(20)
        assert (caught.value.worker, caught.value.is_certain) == (name, True)

        info = these.transport.promote("spare", int(name[1:]), timeout=20)
        assert (info.name, info.pp_rank) == ("spare", int(name[1:]))
        assert these.transport.workers()["spare"] == info
        these.route[int(name[1:])] = "spare"
        these.check()


@pytest.mark.parametrize("is_stepping", [True, False], ids=["stepping", "idle"])
def test_a_worker_that_hangs_is_lost_until_it_goes_on(processes: Processes, *, is_stepping: bool) -> None:
    with cluster(processes, 2, ping_period=0.1, hang_timeout=0.8) as these:
        these.check()
        step = these.step("slow-1-a", timeout=60) if is_stepping else None
        stopped = these.kill("w1", signal.SIGSTOP)
        wait_until(lambda: these.lost)
        assert 0.5 < these.lost[0][2] - stopped < 3.0
        assert "w1 hangs: it has said nothing for" in these.lost[0][1]
        if step is not None:
            error = error_of(step)
            assert isinstance(error, WorkerLostError)
            assert (error.worker, error.is_certain) == ("w1", False)
        assert list(these.transport.workers()) == ["w0"]
        for ask in (
            lambda: these.step("again").result(20),
            lambda: these.transport.health("w1", probe=False, timeout=5),
        ):
            with pytest.raises(WorkerLostError, match="w1 hangs"):
                ask()
        these.kill("w1", signal.SIGCONT)
        wait_until(lambda: "w1" in these.transport.workers())
        these.check()
        assert len(these.lost) == 1


def test_a_worker_that_computes_for_long_does_not_hang(processes: Processes) -> None:
    with cluster(processes, 2, ping_period=0.05, hang_timeout=0.4) as these:
        step = these.step("hang-0-a", timeout=2)
        with pytest.raises(
            WorkerLostError, match="w0: a step is not done after 2 s, which computes"
        ) as caught:
            step.result(20)
        assert (caught.value.worker, caught.value.is_certain) == ("w0", False)
        assert not these.lost
        assert len(these.transport.workers()) == 2


def test_a_step_that_takes_too_long_names_who_has_it(processes: Processes) -> None:
    with cluster(processes, 3) as these:
        these.check()
        with pytest.raises(WorkerLostError, match=r"w1: a step is not done after 0\.5 s") as caught:
            these.step("hang-1-a", timeout=0.5).result(20)
        assert caught.value.worker == "w1"
        these.kill("w2", signal.SIGSTOP)
        with pytest.raises(WorkerLostError, match=r"w2: .* does not answer") as caught:
            these.step("b", timeout=0.5).result(20)
        assert caught.value.worker == "w2"


def test_a_question_that_is_not_answered_in_time_is_a_loss(processes: Processes) -> None:
    with cluster(processes, 2) as these:
        these.step("hang-1-a", timeout=60)
        time.sleep(0.3)
        with pytest.raises(WorkerLostError, match=r"w1 has not answered in 0\.5 s") as caught:
            these.transport.health("w1", probe=True, timeout=0.5)
        assert (caught.value.worker, caught.value.is_certain) == ("w1", False)
        assert these.transport.health("w0", probe=True, timeout=10).proven


def test_a_stage_that_is_not_the_right_one_is_not_taken(processes: Processes) -> None:
    with cluster(processes, 2) as these:
        these.add("spare", None)
        with pytest.raises(IntegrityError, match="spare: no stage 7"):
            these.transport.promote("spare", 7, timeout=10)
        assert these.transport.workers()["spare"].pp_rank is None


def test_steps_of_a_route_that_is_no_more_are_not_computed(processes: Processes) -> None:
    with cluster(processes, 2) as these:
        these.add("spare", None)
        these.check()
        steps = [these.step(f"slow-0-{number}") for number in range(30)]  # three seconds of work for w0
        these.kill("w1")
        assert all(isinstance(error_of(step), WorkerLostError) for step in steps)
        these.transport.promote("spare", 1, timeout=10)
        these.route[1] = "spare"
        these.check()
        # a step that is computed leaves its sequence behind, and this one came after them all
        assert these.transport.health("w0", probe=False, timeout=10).sequences < 30


def test_a_link_that_breaks_between_two_that_live_is_made_anew(processes: Processes) -> None:
    with cluster(processes, 2) as these:
        these.check()
        (route,) = these.transport._routes.values()
        step = these.step("slow-all-a")
        assert route.last is not None
        route.last.close()
        error = error_of(step)
        assert isinstance(error, WorkerLostError)
        assert not error.is_certain
        assert len(these.transport.workers()) == 2
        these.check()
        assert not these.lost


@pytest.mark.slow
@pytest.mark.parametrize("count", swept([20, 50], but=[20]))  # what grows with each shows after ten, too
def test_replacements_leave_no_thread_and_no_file_behind(processes: Processes, count: int) -> None:
    def held(process: int) -> tuple[int, int]:
        gc.collect()
        threads, files = (list(Path(f"/proc/{process}/{each}").iterdir()) for each in ("task", "fd"))
        return len(threads), len(files)

    def all_held() -> list[int]:
        return [*held(os.getpid()), *held(these.pids["w0"])]

    with cluster(processes, 2) as these:
        before: list[int] = []
        for number in range(count):
            these.check()
            name = f"r{number}"
            these.add(name, 1)
            these.kill(these.route[1])
            wait_until(lambda gone=these.route[1]: gone not in these.transport.workers())
            these.route[1] = name
            if number == 9:
                these.check()
                before = all_held()
        these.check()
        # links end a moment after the route that they belong to
        wait_until(lambda: all(now <= then for then, now in zip(before, all_held(), strict=True)), 10)
        assert len(these.lost) == count


# ---------------------------------------------------------------------------------------------------------------- end


def test_closing_ends_the_workers_and_fails_what_is_under_way(processes: Processes) -> None:
    threads = threading.active_count()
    with cluster(processes, 3) as these:
        steps = [these.step(f"slow-all-{number}") for number in range(10)]
    assert {type(error_of(step)) for step in steps[5:]} == {WorkerError}
    assert [these.processes.wait(pid) for pid in these.pids.values()] == [0, 0, 0]
    assert threading.active_count() == threads
    these.transport.close()  # again is no error
    with pytest.raises(WorkerError):
        these.step("late").result(20)


def test_closing_does_not_wait_for_a_worker_that_hangs(processes: Processes) -> None:
    with cluster(processes, 2, ping_period=0.1, hang_timeout=0.5) as these:
        # a front end counts a worker before that has its own end of the link; one that is stopped until the front end
        # is gone would end with an error, for it was never served
        these.check()
        try:
            these.kill("w0", signal.SIGSTOP)
            wait_until(lambda: these.lost)
            these.kill("w1", signal.SIGSTOP)
            these.close()  # and they are stopped still
        finally:
            for name in these.route:
                these.kill(name, signal.SIGCONT)
    assert [these.processes.wait(pid) for pid in these.pids.values()] == [0, 0]


FRONT_END = """
import os, signal, sys, time
import torch
from echo_worker import DIGEST, SECRET
from shardprep_runtime.workers.links.transport import LinkTransport
from shardprep_runtime.workers.meeting import Plan, open_meeting
from shardprep_runtime.workers.transport import Step
plan = Plan(transport="links", stages=((0, 1), (1, 2)), manifest_digest=DIGEST)
meeting = open_meeting("127.0.0.1", plan=plan, secret=SECRET)
transport = LinkTransport(meeting)
print(meeting.address, flush=True)
while len(transport.workers()) < 2:
    time.sleep(0.01)
transport.step(["w0", "w1"], Step("a", 0), torch.zeros(1, 1, dtype=torch.int64), timeout=20).result()
step = transport.step(["w0", "w1"], Step("slow-all-b", 0), torch.zeros(1, 1, dtype=torch.int64), timeout=20)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("os.kill(os.getpid(), signal.SIGKILL)", -9), ("sys.exit(3)", 3), ("raise KeyError", 1)],
    ids=["killed", "exits", "raises"],
)
def test_workers_end_when_their_front_end_is_gone(processes: Processes, end: str, status: int) -> None:
    """And a front end that forgets to close is not aborted by gloo."""
    paths = os.pathsep.join([str(ECHO.parent), *sys.path])
    front_end = subprocess.Popen(
        [sys.executable, "-c", FRONT_END.format(end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    with ended(front_end):
        assert front_end.stdout is not None
        address = front_end.stdout.readline().strip()
        workers = [processes._order(start=[address, f"w{stage}", stage, 2]) for stage in range(2)]
        _, said = front_end.communicate(timeout=60)
    assert front_end.returncode == status, said
    assert "terminate called" not in said
    assert [processes.wait(each) for each in workers] == [0, 0]


# -------------------------------------------------------------------------------------------------------------- links


@pytest.fixture(scope="module")
def store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=timedelta(seconds=20))


@contextmanager
def pair(store: Any, name: str, limits: Limits = link.DEFAULT_LIMITS) -> Iterator[tuple[Link, Link]]:
    """Both ends of a link."""
    device = link.open_device("127.0.0.1")
    ends: dict[int, Link] = {}

    def connect(rank: int) -> None:
        ends[rank] = link.connect(store, name, rank, device, timeout=20, limits=limits)

    other = threading.Thread(target=connect, args=(1,))
    other.start()
    connect(0)
    other.join()
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends.values():
            end.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_tensor_arrives_as_it_was(store: Any, dtype: torch.dtype) -> None:
    edge = (
        link.EAGER - link.HEADER.size - link.MAX_TAIL
    ) // dtype.itemsize  # the last that goes in one message
    with pair(store, f"tensors-{dtype}") as (one, two):
        for width in (1, 7, edge, edge + 1, 3 * edge):
            sent = torch.randn(1, 1, width, dtype=torch.float64).to(dtype)
            one.send(Header(Op.STEP, 5, 6, past=7, keep_all=True), {"a": "b"}, Parcel(sent))
            one.send(Header(Op.PING, 8), {"c": [1]})
            frame, after = two.receive(10), two.receive(10)
            assert frame.tensor is not None
            assert torch.equal(frame.tensor, sent)
            assert frame.tensor.dtype == dtype
            assert (frame.header.number, frame.header.generation, frame.header.past) == (5, 6, 7)
            assert frame.header.keep_all
            assert (frame.tail, after.tail, after.header.number) == ({"a": "b"}, {"c": [1]}, 8)


def test_a_tensor_that_does_not_lie_in_one_piece_arrives(store: Any) -> None:
    with pair(store, "strides") as (one, two):
        for size in (8, 800):
            sent = torch.arange(size * size, dtype=torch.float32).reshape(1, size, size).mT
            one.send(Header(Op.STEP), {}, Parcel(sent))
            frame = two.receive(10)
            assert frame.tensor is not None
            assert torch.equal(frame.tensor, sent)


def test_what_is_not_a_frame_breaks_the_link_and_nothing_else(store: Any) -> None:
    source = random.Random(5)
    good = link.write_header(Header(Op.STEP, dtype="F32", batch=1, positions=1, width=4))
    bad = [
        source.randbytes(200),
        good[:64],
        good[:8] + source.randbytes(120),
        good.replace(b"shplink\x01", b"shplink\x02"),
        link.write_header(Header(Op.PING, tail_bytes=5)) + b"[1,2]",
        link.write_header(Header(Op.PING, tail_bytes=5)) + b'{"a":',
        link.write_header(Header(Op.STEP, dtype="F32", batch=4096, positions=2**20, width=2**20)),
    ]
    for number, raw in enumerate(bad):
        with pair(store, f"garbage-{number}") as (one, two):
            message = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            work = one._group.send([message], 1, link.DATA)
            with pytest.raises(BrokenLink, match="not what it should be"):
                two.receive(10)
            work.wait(timedelta(seconds=5))
            with pytest.raises(BrokenLink):
                one.receive(10)


def test_no_memory_is_set_aside_for_what_exceeds_the_limits(store: Any) -> None:
    with pair(store, "limits", Limits(batch=1, positions=16, width=8, nbytes=512)) as (one, two):
        one.send(Header(Op.STEP), {}, Parcel(torch.zeros(1, 16, 8)))
        assert two.receive(10).tensor is not None
        one.send(Header(Op.STEP), {}, Parcel(torch.zeros(1, 16, 9)))
        with pytest.raises(BrokenLink, match="width 9; from 0 to 8"):
            two.receive(10)
    with pair(store, "refused") as (one, two):

        def check(header: Header) -> None:
            raise FormatError(f"did not ask for {header.shape}")

        one.send(Header(Op.STEP), {}, Parcel(torch.zeros(1, 16, 8)))
        with pytest.raises(BrokenLink, match=r"did not ask for \(1, 16, 8\)"):
            two.receive(10, check=check)


def test_closing_wakes_who_waits_here_and_there(store: Any) -> None:
    with pair(store, "closing") as ends:
        errors: list[BrokenLink] = []

        def wait(end: Link) -> None:
            try:
                end.receive()
            except BrokenLink as error:
                errors.append(error)

        threads = [threading.Thread(target=wait, args=(end,)) for end in ends]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        ends[0].close()
        for thread in threads:
            thread.join(5)
        assert [thread.is_alive() for thread in threads] == [False, False]
        assert sorted(error.is_closed for error in errors) == [False, True]
        with pytest.raises(BrokenLink):
            ends[1].send(Header(Op.PING), {})
            ends[1].flush(5)


def test_who_sends_does_not_wait_for_who_receives(store: Any) -> None:
    with pair(store, "ahead") as (one, two):
        tensors = [torch.full((1, 1, 1000), float(number)) for number in range(link.MAX_PENDING)]
        for tensor in tensors:
            one.send(Header(Op.STEP), {}, Parcel(tensor))
        for tensor in tensors:
            frame = two.receive(10)
            assert frame.tensor is not None
            assert torch.equal(frame.tensor, tensor)


def test_a_side_that_never_comes_is_waited_for_as_long_as_is_wanted(store: Any) -> None:
    device = link.open_device("127.0.0.1")
    with pytest.raises(BrokenLink, match=r"did not come in 0\.2 seconds"):
        link.connect(store, "alone", 0, device, timeout=0.2)
    with pytest.raises(BrokenLink, match="given up"):
        link.connect(store, "alone", 0, device, timeout=60, is_over=lambda: True)


def test_a_wait_that_is_limited_ends(store: Any) -> None:
    with pair(store, "silence") as (one, _), pytest.raises(BrokenLink, match="nothing came in time"):
        one.receive(0.2)
