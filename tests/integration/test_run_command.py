"""`shardprep run` prints what the model says, whoever holds its stages, and whoever of them is lost meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shardprep.cli import main
from shardprep.split import split

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason='needs transformers: pip install "shardprep[transformers]"'
)

TINY = Path(__file__).parents[1] / "data/tiny-llama"
PROMPTS = ("def ", "class ")
TOKENS = 16
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}def "


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("run") / "tiny"
    split(TINY, found, tensor_parallel_size=2)
    return found


@pytest.fixture(scope="module")
def greedy() -> dict[str, tuple[list[int], list[int], str]]:
    """Prompt -> its tokens, those that transformers finds to follow in the original checkpoint, and their text."""
    import torch
    import transformers

    auto: Any = transformers
    model, tokenizer = (
        auto.AutoModelForCausalLM.from_pretrained(TINY),
        auto.AutoTokenizer.from_pretrained(TINY),
    )
    found = {}
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)[0, given.input_ids.shape[1] :]
        found[prompt] = (
            given.input_ids[0].tolist(),
            new.tolist(),
            tokenizer.decode(new, skip_special_tokens=True),
        )
    torch.set_num_threads(1)
    return found


def run(source: Path, *options: str, status: int = 0, given: str | None = None) -> Result:
    """With all stages in this process."""
    sizes = () if "--stages" in options else ("--stages", "2")
    arguments = ["run", str(source), "--transport", "local", *sizes, "--max-tokens", str(TOKENS), *options]
    found = CliRunner().invoke(main, arguments, input=given)
    assert found.exit_code == status, found.output
    assert "Traceback" not in found.output
    if status == 0:
        assert found.exception is None
    return found


# ------------------------------------------------------------------------------------------------------ what is printed
@pytest.mark.parametrize("stages", ["1", "2", "3", "0-0,1-5"])
def test_the_text_is_that_of_transformers(shards: Path, greedy: dict[str, Any], stages: str) -> None:
    found = run(shards, "--stages", stages, "--prompt", "def ")
    assert found.stdout == greedy["def "][2] + "\n"
    layers = re.findall(r"stage \d+ \(layers (\d) to (\d)\): worker", found.stderr)
    assert [layers[0][0], layers[-1][1]] == ["0", "5"]
    assert len(layers) == (2 if stages.startswith("0") else int(stages))
    assert "0 B of them fetched" in found.stderr
    assert f"{TOKENS} tokens in {TOKENS} trips through the stages" in found.stderr


def test_several_prompts_are_printed_in_their_order(
    shards: Path, greedy: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "prompt"
    file.write_text("class ")
    found = run(shards, "--prompt-file", str(file), "--prompt", "def ", "--prompt-file", "-", given="class ")
    texts = [f"==> {each} <==\n{greedy[each][2]}\n" for each in ("def ", "class ", "class ")]
    assert found.stdout == "\n".join(texts)


def test_tokens_go_in_and_come_out(shards: Path, greedy: dict[str, Any]) -> None:
    prompt, tokens, _ = greedy["def "]
    found = run(shards, "--tokens", ",".join(map(str, prompt)))
    assert found.stdout == ",".join(map(str, tokens)) + "\n"


def test_the_report_has_tokens_workers_and_events(shards: Path, greedy: dict[str, Any]) -> None:
    found = run(shards, "--json", "--prompt", "def ", "--prompt", "class ")
    report = json.loads(found.stdout)
    for prompt, said in zip(PROMPTS, report["completions"], strict=True):
        ids, tokens, text = greedy[prompt]
        assert said == {
            "prompt": prompt,
            "text": text,
            "tokens": tokens,
            "prompt_tokens": len(ids),
            "finish_reason": "length",
            "trips": TOKENS,
        }
    assert [each["pp_rank"] for each in report["workers"]] == [0, 1]
    assert (report["events"], report["transport"]) == ([], "local")
    assert report["counters"]["steps"] == 2 * TOKENS


def test_a_breakdown_says_where_the_time_went(shards: Path) -> None:
    found = run(shards, "--breakdown", "--json", "--prompt", "def ")
    (said,) = json.loads(found.stdout)["completions"]
    assert len(said["breakdowns"]) == TOKENS
    for trip in said["breakdowns"]:
        assert len(trip["compute"]) == 2
        assert 0 < sum(trip["compute"]) < trip["total"]
    for row in ("compute of stage 0", "compute of stage 1", "serialization", "network", "sampling", "total"):
        assert row in found.stderr


def test_draws_stops_and_drafts(shards: Path, greedy: dict[str, Any]) -> None:
    drawn = ("--prompt", "def ", "--temperature", "1.5", "--top-p", "0.9", "--seed")
    assert run(shards, *drawn, "3").stdout == run(shards, *drawn, "3").stdout
    assert run(shards, *drawn, "3").stdout != run(shards, *drawn, "4").stdout
    text = greedy["def "][2]
    stop = text[8:12]
    assert run(shards, "--prompt", "def ", "--stop", stop).stdout == text[: text.index(stop)] + "\n"
    drafted = json.loads(run(shards, "--prompt", "def ", "--draft", str(shards), "--json").stdout)
    assert drafted["completions"][0]["tokens"] == greedy["def "][1]
    assert drafted["completions"][0]["trips"] < TOKENS / 2


def edited(tmp_path: Path, **config: object) -> Path:
    """The checkpoint with another tokenizer_config.json, split; none of the tokenizer's files where that is all."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(TINY, copy)
    if config:
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (copy / name).unlink(missing_ok=True)
    split(copy, tmp_path / "set", tensor_parallel_size=1)
    return tmp_path / "set"


def test_a_chat_goes_through_the_models_template(shards: Path, tmp_path: Path) -> None:
    found = run(edited(tmp_path, chat_template=TEMPLATE), "--chat", "--prompt", "# a", "--json")
    (said,) = json.loads(found.stdout)["completions"]
    import transformers

    auto: Any = transformers
    prompt = auto.AutoTokenizer.from_pretrained(TINY)("# a\ndef ", add_special_tokens=False).input_ids
    assert said["prompt_tokens"] == len(prompt)
    plain = run(shards, "--tokens", ",".join(map(str, prompt))).stdout
    assert plain == ",".join(map(str, said["tokens"])) + "\n"
    refused = run(shards, "--chat", "--prompt", "a", status=2)
    assert "this model has no chat template" in refused.stderr


def test_a_set_without_a_tokenizer_takes_tokens_alone(tmp_path: Path, greedy: dict[str, Any]) -> None:
    bare = edited(tmp_path)
    assert "has no tokenizer; give --tokens 1,2,3" in run(bare, "--prompt", "a", status=2).stderr
    prompt, tokens, _ = greedy["def "]
    assert run(bare, "--tokens", ",".join(map(str, prompt))).stdout == ",".join(map(str, tokens)) + "\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "Missing option '--prompt'"),
        (("--prompt", "a", "--stages", "7"), "6 layers cannot fill 7 pipeline stages"),
        (("--prompt", "a", "--stages", "0-3,5-5"), "stage"),
        (("--prompt", "a", "--stages", "two"), "'two' is not a list of stages"),
        (("--prompt", "a", "--stages", "0"), "expected 1 to 4096"),
        (("--tokens", "1,x"), "not a list of token ids"),
        (("--tokens", "5000"), "not below 2048"),
        (("--tokens", "1", "--chat"), "--chat puts texts"),
        (("--prompt", "a", "--max-tokens", "1000"), "together they exceed the 256"),
        (("--prompt", "a", "--manifest-digest", "sha256:" + "0" * 64), "do not load it"),
        (("--prompt", "a", "-tp", "2"), "2 tensor ranks is several processes"),
    ],
)
def test_what_cannot_be_run_is_refused(shards: Path, options: tuple[str, ...], reason: str) -> None:
    found = run(shards, *options, status=2)
    assert reason in found.stderr
    assert found.stdout == ""


# ---------------------------------------------------------------------------------------------------- in many processes
@contextlib.contextmanager
def running(shards: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`shardprep run` with workers in processes of their own; its lines on stderr so far."""
    lines: list[str] = []
    with subprocess.Popen(
        [
            *(sys.executable, "-c", "from shardprep.cli import main; main()"),
            *("run", str(shards), "--stages", "2", "--prompt", "def ", "--ignore-eos", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def follow() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line.rstrip())

        reader = threading.Thread(target=follow)
        reader.start()
        try:
            yield process, lines
        finally:
            process.kill()
            reader.join()


def pids(lines: list[str]) -> dict[str, int]:
    found = (re.search(r"worker (\S+), process (\d+) on", line) for line in lines)
    return {each[1]: int(each[2]) for each in found if each}


def has_ended(pid: int, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_the_text_is_the_same_when_a_worker_is_killed(shards: Path) -> None:
    undisturbed = run(shards, "--prompt", "def ", "--ignore-eos", "--max-tokens", "240").stdout
    with running(shards, "--spares", "1", "--max-tokens", "240", "--json") as (process, lines):
        # the report is all that comes on stdout: what is killed, is killed once text is being made
        end = time.monotonic() + 120
        while "stage-1" not in pids(lines):
            assert time.monotonic() < end, lines
            time.sleep(0.02)
        workers = pids(lines)
        time.sleep(0.3)
        os.kill(workers["stage-1"], signal.SIGKILL)
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
        assert process.wait(60) == 0, lines
    (said,) = report["completions"]
    assert said["text"] + "\n" == undisturbed
    kinds = [each["kind"] for each in report["events"]]
    assert kinds[:2] == ["lost", "promoted"], kinds
    assert "prefilled" in kinds
    assert any("worker stage-1 (stage 1) was lost" in line for line in lines), lines
    assert any("spare spare took stage 1" in line for line in lines), lines
    assert any("positions again" in line for line in lines), lines
    assert all(has_ended(pid) for pid in workers.values())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_signal_ends_the_workers_too(shards: Path, number: signal.Signals, status: int) -> None:
    with running(shards, "--max-tokens", "250") as (process, lines):
        assert process.stdout is not None
        assert process.stdout.read(1)  # text comes
        workers = pids(lines)
        assert len(workers) == 2
        process.send_signal(number)
        assert process.wait(60) == status, lines
    assert not [line for line in lines if "Traceback" in line], lines
    assert all(has_ended(pid) for pid in workers.values())
