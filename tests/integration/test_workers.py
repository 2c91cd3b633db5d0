"""Workers are processes: they meet a front end, hold its stages, end with it, and say in a line why they could not.

A worker's start is mostly the import of torch and transformers, so that each test here asks its processes several things.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from processes import ended
from shardprep.split import split
from shardprep_runtime.errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    ShardprepError,
    UnsupportedError,
    WorkerError,
)
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.launch import Launch, launch
from shardprep_runtime.workers.launchers.elsewhere import Elsewhere
from shardprep_runtime.workers.launchers.in_process import InThisProcess
from shardprep_runtime.workers.launchers.launcher import Listener
from shardprep_runtime.workers.launchers.processes import Processes
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.transport import Step
from shardprep_runtime.workers.worker import Compute, Worker, WorkerOptions, check_options

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[1] / "data/tiny-llama"
STAGES = ((0, 2), (2, 6))
PROMPT = [5, 6, 7, 8, 9]
TOKENS = 8
SECRET = "a secret that the test has made up"
START = 240
"""Seconds in which a process must have imported what it needs, on a machine that has much else to do."""

FRONT_END = """
import json, sys, time
from shardprep_runtime.workers.launch import launch
from shardprep_runtime.workers.launchers.processes import Processes
from shardprep_runtime.workers.policy import Policy

launcher = Processes(secret={secret!r})
with launch(sys.argv[1], stages=2, launcher=launcher, policy=Policy(spares=1), timeout={start}) as running:
    print(json.dumps([running.meeting.address, [each.pid for ranks in running.workers.values() for each in ranks]]),
          flush=True)
    while "extra" not in running.transport.workers():
        time.sleep(0.02)
    print(flush=True)
    time.sleep({start})
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "tiny"
    split(TINY, folder, tensor_parallel_size=2)
    return folder


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers says to the prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def tokens_of(running: Launch, between: Callable[[int], None] | None = None) -> list[int]:
    """What the pipeline says to the prompt; `between(n)` is called before the nth token."""
    import torch

    found: list[int] = []
    given = torch.tensor([PROMPT])
    with running.pipeline.sequence() as sequence:
        for number in range(TOKENS):
            if between is not None:
                between(number)
            given = sequence.feed(given)[:, -1:].argmax(-1)
            found.append(int(given))
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, which has not ended and only waits to be looked at."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pids_of(running: Launch) -> dict[str, list[int]]:
    return {name: [each.pid for each in ranks] for name, ranks in running.workers.items()}


@pytest.mark.cold  # workers start once as users start them
# ---------------------------------------------------------------------------------------------------- started here
def test_workers_of_this_host(shards: Path, expected: list[int]) -> None:
    """They give the model's tokens, keep the secret, are replaced by a spare, and end, even one that is stopped."""
    said: list[str] = []
    with launch(
        shards,
        stages=STAGES,
        compute=Compute(dtype="float32"),
        policy=Policy(spares=1),
        timeout=START,
        listener=Listener(said.append),
    ) as running:
        pids = pids_of(running)
        assert set(pids) == {"stage-0", "stage-1", "spare"}
        for pid in (pid for ranks in pids.values() for pid in ranks):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert running.meeting is not None
            assert running.meeting._secret.encode() not in command
        assert running.meeting is not None
        assert running.meeting.host == "127.0.0.1"
        assert tokens_of(running) == expected
        assert wait_until(lambda: "spare" in running.transport.workers(), START)
        infos = running.transport.workers()
        assert infos["stage-1"].layers == STAGES[1]
        assert set(infos["stage-1"].seconds or {}) == {
            "imports", "front end", "config", "fetch and verify", "build", "first forward",
        }  # fmt: skip
        assert infos["spare"].layers is None
        assert infos["spare"].nbytes == sum(tensor.nbytes for tensor in tensors_of(shards).values())
        assert any(
            re.search(r"stage-1: stage 1, layers 2 to 5: [\d,]+ bytes, 0 of them fetched", line)
            for line in said
        )

        def kill(number: int) -> None:
            if number == 3:
                os.kill(pids["stage-1"][0], signal.SIGKILL)

        assert tokens_of(running, kill) == expected
        kinds = [event.kind for event in running.pipeline.events]
        assert "promoted" in kinds
        assert "replaced" not in kinds
        assert pids["stage-1"][0] not in [pid for ranks in pids_of(running).values() for pid in ranks]
        assert wait_until(lambda: "stage-1: its process has ended by signal 9" in said, 10)
        os.kill(pids["stage-0"][0], signal.SIGSTOP)
    assert not any(is_running(pid) for ranks in pids.values() for pid in ranks)


def test_two_tensor_ranks_in_each_of_two_stages(shards: Path, expected: list[int]) -> None:
    """They give the model's tokens, and a worker one of whose ranks has ended ends."""
    said: list[str] = []
    with launch(
        shards,
        stages=STAGES,
        tensor_parallel_size=2,
        compute=Compute(dtype="float32"),
        policy=Policy(replace=False, fallback=False),
        timeout=START,
        listener=Listener(said.append),
    ) as running:
        pids = pids_of(running)
        assert {name: len(ranks) for name, ranks in pids.items()} == {"stage-0": 2, "stage-1": 2}
        assert tokens_of(running) == expected
        assert all(health.probe for health in running.pipeline.health())
        half = running.transport.workers()["stage-0"].nbytes
        assert half < 0.6 * 4 * sum(
            tensor.numel()
            for name, tensor in tensors_of(shards).items()
            if "embed" in name or ".0." in name or ".1." in name
        )
        os.kill(pids["stage-1"][1], signal.SIGKILL)
        with pytest.raises(WorkerError):
            tokens_of(running)
        assert wait_until(lambda: not is_running(pids["stage-1"][0]), 20)
        assert "stage-1" not in running.transport.workers()
        assert any("lost each other" in line for line in said)
    assert not any(is_running(pid) for ranks in pids.values() for pid in ranks)


def tensors_of(shards: Path) -> Any:
    from shardprep_runtime import load

    with load(shards) as shard:
        return {name: shard[name] for name in shard}


def test_what_a_worker_fails_with_is_raised_by_who_started_it(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    part = max(damaged.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with part.open("r+b") as stream:
        stream.seek(part.stat().st_size - 100)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    begun: list[int] = []

    def note(_: str) -> None:
        begun.append(1)

    with (
        pytest.raises(IntegrityError, match=r"stage-\d: .*safetensors"),
        launch(damaged, stages=STAGES, timeout=START, listener=Listener(note)),
    ):
        pytest.fail("it began in spite of a damaged part")


def test_what_cannot_be_started_is_refused_before_anything_is(shards: Path) -> None:
    for wrong, message in (
        ({"stages": ((0, 2), (2, 5))}, "the model has 6 layers"),
        ({"stages": 9}, "use at most 6"),
        ({"policy": Policy(spares=-1)}, "spares"),
        ({"launcher": InThisProcess(), "tensor_parallel_size": 2}, "only links and rpc"),
        ({"launcher": Processes(host="8.8.8.8")}, "--allow-public"),
        ({"launcher": Processes(secret="short")}, "at least 16"),
    ):
        with pytest.raises(ShardprepError, match=message), launch(shards, **{"stages": 2, **wrong}):  # type: ignore[arg-type]
            pytest.fail("it began")
    pinned = open_set(shards, digest="sha256:" + "0" * 64)
    with pytest.raises(ShardprepError, match="its digest is"), launch(pinned, stages=2):
        pytest.fail("it began")


# ------------------------------------------------------------------------------------------------------ from elsewhere
class Joining:
    """A `shardprep worker`, as an operator starts it."""

    def __init__(self, *options: str, secret: str | None = SECRET) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "SHARDPREP_SECRET"}
        if secret is not None:
            environment["SHARDPREP_SECRET"] = secret
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from shardprep.cli import main; main()",
                "worker",
                "--threads",
                "1",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
        stream.close()

    def end(self, timeout: float = START) -> int:
        """Its status, once it has ended by itself."""
        status = self.process.wait(timeout)
        for reader in self._readers:
            reader.join()
        return status

    def __enter__(self) -> Joining:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.end()


class InAThread:
    """A launch that waits for workers while the test starts them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.said: list[str] = []
        self.running: Launch | None = None
        self.error: BaseException | None = None
        self._over = threading.Event()
        listener = Listener(self.said.append)
        self._thread = threading.Thread(target=self._run, args=(args, {**options, "listener": listener}))
        self._thread.start()

    def _run(self, args: Any, options: Any) -> None:
        try:
            with launch(*args, **options) as self.running:
                self._over.wait()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def address(self) -> str:
        assert wait_until(lambda: bool(self.said) or self.error is not None, 60)
        assert self.error is None
        return self.said[0].rpartition(" ")[2]

    def ready(self) -> Launch:
        assert wait_until(lambda: self.running is not None or self.error is not None, START)
        assert self.error is None
        assert self.running is not None
        return self.running

    def __enter__(self) -> InAThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_workers_from_elsewhere(shards: Path, expected: list[int], tmp_path: Path) -> None:
    """Those who may join do, the others are told why not; and they wait for the next front end, unless they are not to."""
    other = tmp_path / "other"
    split(TINY, other, tensor_parallel_size=1)
    elsewhere = Elsewhere(secret=SECRET, host="127.0.0.1")
    options: dict[str, Any] = {
        "stages": STAGES,
        "compute": Compute(dtype="float32"),
        "policy": Policy(fallback=False),
        "timeout": START,
    }
    with ExitStack() as stack:
        first = InAThread(shards, **options, launcher=elsewhere)
        with first:
            master = first.address()
            assert f"--pp-rank 0 --master {master}" in first.said[0]

            def start(*more: str, manifest: Path = shards, secret: str | None = SECRET) -> Joining:
                begun = Joining("--manifest", str(manifest), "--master", master, *more, secret=secret)
                return stack.enter_context(begun)

            stays = start("--pp-rank", "0")
            ends = start("--pp-rank", "1", "--stages", "0-1,2-5", "--no-reconnect")
            assert tokens_of(first.ready()) == expected
            refused = (
                (start("--pp-rank", "0", secret="another secret of that length"), 1, "SHARDPREP_SECRET"),
                (start("--pp-rank", "0", manifest=other), 2, "its digest is"),
                (start("--pp-rank", "1", "--stages", "0-2,3-5"), 1, "runs stages ((0, 2), (2, 6))"),
            )
            for worker, status, word in refused:
                assert worker.end() == status
                assert len(worker.errors) == 1, worker.errors
                assert word in worker.errors[0]
            assert tokens_of(first.ready()) == expected
        assert ends.end(30) == 0, ends.errors
        assert wait_until(lambda: any("waits for the next" in line for line in stays.lines), 10)
        assert stays.process.poll() is None
        port = int(master.rpartition(":")[2])
        with InAThread(shards, **options, launcher=replace(elsewhere, port=port)) as second:
            assert second.address() == master
            start("--pp-rank", "1")
            assert tokens_of(second.ready()) == expected
            assert second.ready().transport.workers()["stage-0"].pid == stays.process.pid
        stays.process.terminate()
        assert stays.end(30) == 128 + signal.SIGTERM


def test_workers_end_with_a_front_end_that_is_killed(shards: Path) -> None:
    program = FRONT_END.format(secret=SECRET, start=START)
    with (
        subprocess.Popen(
            [sys.executable, "-c", program, str(shards)], stdout=subprocess.PIPE, text=True
        ) as front_end,
        ended(front_end),
    ):
        assert front_end.stdout is not None
        master, pids = json.loads(front_end.stdout.readline())
        joined = (
            "--manifest",
            str(shards),
            "--spare",
            "--spare-for",
            "1",
            "--name",
            "extra",
            "--no-reconnect",
            "--master",
            master,
        )
        with Joining(*joined) as spare:
            assert front_end.stdout.readline() == "\n"
            assert all(map(is_running, pids))
            front_end.kill()
            front_end.wait()
            assert wait_until(lambda: not any(map(is_running, pids)), 5)
            assert spare.end(30) == 1
            assert spare.errors == [f"Error: the front end at {master} has gone"]


def test_a_worker_without_a_secret_says_what_to_set(shards: Path) -> None:
    with Joining(
        "--manifest", str(shards), "--pp-rank", "0", "--master", "127.0.0.1:1", secret=None
    ) as worker:
        assert worker.end() == 2
        assert "SHARDPREP_SECRET is not set" in worker.errors[0]


# ------------------------------------------------------------------------------------------------- in this process
@pytest.fixture(scope="module")
def options(shards: Path) -> WorkerOptions:
    return WorkerOptions(shard_set=open_set(str(shards)), stages=STAGES, compute=Compute(dtype="float32"))


@pytest.fixture(scope="module")
def pair(options: WorkerOptions) -> Iterator[tuple[Worker, Worker]]:
    """The first stage, and a spare."""
    first, spare = Worker("first", replace(options, pp_rank=0)), Worker("spare", options)
    first.prepare()
    spare.prepare()
    yield first, spare
    first.close()
    spare.close()


def test_a_spare_takes_a_stage_and_gives_it_back(pair: tuple[Worker, Worker]) -> None:
    import torch

    first, spare = pair
    with pytest.raises(WorkerError, match="a spare: promote it first"):
        spare.step(Step("a", 0), torch.tensor([PROMPT]))
    assert spare.health(probe=True).probe is None
    info = spare.promote(1)
    assert info.layers == STAGES[1]
    assert list(info.seconds or {}) == ["build", "first forward"]
    hidden, timing = first.step(Step("a", 0), torch.tensor([PROMPT]))
    assert timing.worker == "first"
    assert timing.compute > 0
    logits, _ = spare.step(Step("a", 0, "all"), hidden)
    assert logits.shape == (1, len(PROMPT), 2048)
    with pytest.raises(CacheLostError):
        spare.step(Step("b", 3), hidden)
    with pytest.raises(WorkerError, match="holds stage 1 already"):
        spare.promote(0)
    assert spare.promote(1).pp_rank == 1
    assert spare.health(probe=False).sequences == 1
    spare.reset("a")
    assert spare.health(probe=False).sequences == 0
    spare.forget()
    assert spare.info().pp_rank is None
    assert spare.promote(0).layers == STAGES[0]
    again, _ = spare.step(Step("a", 0), torch.tensor([PROMPT]))
    assert torch.equal(again, hidden)
    spare.forget()
    first.reset("a")


def test_a_worker_whose_weights_have_changed_is_found_out(pair: tuple[Worker, Worker]) -> None:
    import torch

    _, spare = pair
    spare.promote(1)
    before = spare.health(probe=True)
    assert before.probe == spare.health(probe=True).probe
    stage, _ = spare._held()
    weight = next(iter(stage.layer_modules[0].parameters()))
    with torch.no_grad():
        weight.data = weight * 1.001
    with pytest.raises(IntegrityError, match="gives something else"):
        spare.health(probe=True)
    spare.forget()
    spare.promote(1)
    assert spare.health(probe=True).probe == before.probe


def test_an_error_of_a_library_is_one_line_and_ours(pair: tuple[Worker, Worker]) -> None:
    import torch

    first, _ = pair
    stage, _ = first._held()

    def fail(*_: object) -> None:
        raise RuntimeError("no memory\n#0: c10::Error::Error")

    hook = stage.layer_modules[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(WorkerError) as raised:
            first.step(Step("x", 0), torch.tensor([PROMPT]))
    finally:
        hook.remove()
    assert str(raised.value) == "RuntimeError: no memory"
    assert first.health(probe=False).sequences == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pp_rank": 2}, "there are 2 stages, from 0 to 1"),
        ({"spare_for": ()}, "a spare needs a stage"),
        ({"spare_for": (0, 5)}, "pp_rank 5"),
        ({"tp_rank": 1}, "of 1 tensor ranks"),
        ({"shard_set": open_set("s3://bucket/x", cache=None)}, "say which one stage it is for"),
    ],
)
def test_options_that_make_no_worker_are_refused(
    options: WorkerOptions, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_options(replace(options, **wrong))


def test_a_spare_without_a_cache_may_be_for_one_stage(options: WorkerOptions) -> None:
    one = replace(options, shard_set=open_set("s3://bucket/x", cache=None), spare_for=(1,))
    assert check_options(one).may_hold == (1,)


def test_a_stage_that_a_spare_did_not_prepare_for_is_refused(options: WorkerOptions) -> None:
    spare = Worker("spare", replace(options, spare_for=(1,)))
    try:
        spare.prepare()
        with pytest.raises(InputError, match="has the shards of stages 1 only"):
            spare.promote(0)
    finally:
        spare.close()


def test_what_stops_a_start_is_raised_by_it(options: WorkerOptions, tmp_path: Path) -> None:
    worker = Worker("lost", replace(options, shard_set=open_set(tmp_path / "nothing"), pp_rank=0))
    with pytest.raises(ShardprepError, match="nothing"):
        worker.prepare()
    worker.close()
    worker = Worker("odd", replace(options, pp_rank=0, compute=Compute(dtype="int7")))
    with pytest.raises((InputError, UnsupportedError), match="int7"):
        worker.prepare()
    worker.close()
