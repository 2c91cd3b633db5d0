"""Workers end, stop and serve the wrong thing while text is generated: the text comes out the same, or an error says why."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardprep.split import split
from shardprep_runtime.errors import WorkerError
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.launch import Launch, launch
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.text.generate import Generator, Sampling
from shardprep_runtime.workers.worker import Compute

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("failover")]

CHECKPOINT = Path(__file__).parents[1] / "data/tiny-llama"
STAGES = 3
TOKENS = 40
PROMPT = "def read(self, path):"
LONG = "\n".join(CHECKPOINT.joinpath("heldout.txt").read_text().splitlines()[:12])
TOGETHER = [PROMPT, "class Store:\n", "import os\n\n\ndef main("]
PATIENCE = 120.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failover") / "shards"
    split(CHECKPOINT, folder, tensor_parallel_size=1)
    return folder


@pytest.fixture(scope="module")
def right() -> dict[str, list[int]]:
    """What transformers generates from the checkpoint, in this process, undisturbed."""
    import torch
    import transformers

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    found = {}
    for prompt in (*TOGETHER, LONG):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None, **options
        )
        found[prompt] = out[0, ids.shape[1] :].tolist()
    return found


@pytest.fixture(scope="module")
def running(shards: Path) -> Iterator[Launch]:
    """Three stages and a spare; another spare is started whenever one was used."""
    with launch(
        shards,
        stages=STAGES,
        policy=Policy(spares=1, probe_period=0),
        compute=Compute(threads=1, dtype="float32"),
    ) as found:
        yield found


def generator_of(running: Launch, shards: Path) -> Generator:
    return Generator.from_folder(running.pipeline, shards)


def wait_for_spare(running: Launch) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(each.pp_rank is None for each in running.transport.workers().values()):
        assert time.monotonic() < deadline, "no spare came"
        time.sleep(0.02)


def pid_of(running: Launch, stage: int) -> int:
    route = running.pipeline.route
    assert route is not None
    return running.transport.workers()[route[stage]].pid


def events_since(running: Launch, began: float) -> list[str]:
    return [each.kind for each in running.pipeline.events if each.time >= began]


def sampling(count: int = TOKENS) -> Sampling:
    return Sampling(max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("stage", range(STAGES))
def test_a_worker_that_is_killed_between_tokens_changes_no_token(
    running: Launch, shards: Path, right: dict[str, list[int]], stage: int
) -> None:
    wait_for_spare(running)
    began = time.time()
    found = []
    for token in generator_of(running, shards).stream(PROMPT, sampling()):
        found.append(token.id)
        if len(found) == TOKENS // 2:
            os.kill(pid_of(running, stage), signal.SIGKILL)
    assert found == right[PROMPT]
    assert events_since(running, began) == ["lost", "promoted", "prefilled"]


@pytest.mark.parametrize("stage", range(STAGES))
def test_a_worker_that_is_killed_while_the_prompt_is_in_it_changes_no_token(
    running: Launch, shards: Path, right: dict[str, list[int]], stage: int
) -> None:
    """It is stopped first, so that the prompt is on its way or within when it ends, however fast this machine is."""
    wait_for_spare(running)
    began = time.time()
    pid = pid_of(running, stage)
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    found = generator_of(running, shards).generate([LONG], sampling())[0]
    killer.join()
    assert list(found.tokens) == right[LONG]
    kinds = events_since(running, began)
    assert kinds[:2] == ["lost", "promoted"]
    assert kinds.count("lost") == 1


def test_a_worker_that_hangs_is_noticed_and_changes_no_token(
    running: Launch, shards: Path, right: dict[str, list[int]]
) -> None:
    wait_for_spare(running)
    began = time.time()
    pid = pid_of(running, 1)
    found = []
    try:
        for token in generator_of(running, shards).stream(PROMPT, sampling()):
            found.append(token.id)
            if len(found) == TOKENS // 2:
                os.kill(pid, signal.SIGSTOP)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert found == right[PROMPT]
    kinds = events_since(running, began)
    assert "lost" in kinds
    assert "promoted" in kinds


def test_texts_that_are_in_flight_together_all_come_out_the_same(
    running: Launch, shards: Path, right: dict[str, list[int]]
) -> None:
    wait_for_spare(running)
    killer = threading.Timer(0.1, lambda: os.kill(pid_of(running, 1), signal.SIGKILL))
    killer.start()
    generator = generator_of(running, shards)
    for _ in range(3):
        found = generator.generate(TOGETHER, sampling())
        assert [list(each.tokens) for each in found] == [right[prompt] for prompt in TOGETHER]
    killer.join()


def test_one_that_is_killed_again_while_its_place_is_taken_changes_no_token(
    running: Launch, shards: Path, right: dict[str, list[int]]
) -> None:
    """The spare ends as well: a third worker is started, and waited for."""
    wait_for_spare(running)
    began = time.time()
    spare = next(each for each in running.transport.workers().values() if each.pp_rank is None)
    found = []
    for token in generator_of(running, shards).stream(PROMPT, sampling()):
        found.append(token.id)
        if len(found) == TOKENS // 2:
            os.kill(pid_of(running, 0), signal.SIGKILL)
            os.kill(spare.pid, signal.SIGKILL)
    assert found == right[PROMPT]
    assert {"lost", "replaced"} <= set(events_since(running, began)) or "promoted" in events_since(
        running, began
    )


def test_without_a_replacement_this_process_takes_over(shards: Path, right: dict[str, list[int]]) -> None:
    with launch(
        shards,
        stages=2,
        policy=Policy(replace=False),
        compute=Compute(threads=1, dtype="float32"),
    ) as running:
        found = []
        for token in generator_of(running, shards).stream(PROMPT, sampling()):
            found.append(token.id)
            if len(found) == 5:
                os.kill(pid_of(running, 1), signal.SIGKILL)
        assert found == right[PROMPT]
        assert running.pipeline.is_fallback
        assert [each.kind for each in running.pipeline.events] == ["lost", "fallback", "prefilled"]


def test_with_nothing_left_an_error_says_what_was_tried(shards: Path) -> None:
    with launch(
        shards,
        stages=2,
        policy=Policy(replace=False, fallback=False),
        compute=Compute(threads=1),
    ) as running:
        tokens = generator_of(running, shards).stream(PROMPT, sampling())
        next(tokens)
        os.kill(pid_of(running, 1), signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            list(tokens)
        assert "stage 1" in str(caught.value)
        assert running.pipeline.route is None


def test_a_worker_with_another_shard_does_not_join(shards: Path, tmp_path: Path) -> None:
    """The same model but for one weight: names, shapes and layers are those of the plan."""
    from shardprep_runtime.workers.launchers.processes import start_worker
    from shardprep_runtime.workers.worker import WorkerOptions
    from shardprep_runtime.workers.worker_process import WorkerJob

    other = tmp_path / "other"
    other.mkdir()
    for path in CHECKPOINT.iterdir():
        if path.name != "config.json":
            (other / path.name).symlink_to(path)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-5}))
    split(other, tmp_path / "shards", tensor_parallel_size=1)
    with launch(shards, stages=2, compute=Compute(threads=1)) as running:
        assert running.meeting is not None
        stages = running.meeting.plan.stages
        options = WorkerOptions(
            shard_set=open_set(str(tmp_path / "shards")), stages=stages, pp_rank=1, compute=Compute(threads=1)
        )
        job = WorkerJob(options=options, master=running.meeting.address, name="wrong")
        process = start_worker(job, running.meeting._secret).process
        assert process.stdout is not None and process.stdin is not None
        with process.stdout, process.stdin:  # it ends where its stdin is closed
            said = process.stdout.read()
        assert process.wait(PATIENCE) != 0
        assert b'"kind": "ManifestError"' in said
        assert "wrong" not in running.transport.workers()
