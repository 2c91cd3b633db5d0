"""Stages in processes of their own learn what one process learns; what they save is pushed as far as it has changed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_models
from lazily import load_file, torch
from processes import ended
from s3fixtures import BUCKET, isolate, opened
from s3server import S3Server
from shardprep.cli import main
from shardprep.convert import convert
from shardprep.model.skeleton import build, quiet
from shardprep.publish.push import push
from shardprep.split import SplitOptions, split
from shardprep_runtime import load, read_manifest
from shardprep_runtime.errors import InputError, ProblemError, UnsupportedError, WorkerError, WorkerLostError
from shardprep_runtime.shard import revisions as remote
from sweeps import swept
from trainer import INDEX, SplitTrainer, split_options

# processes of a second or two of imports each: not beside one another
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]

TINY = Path(__file__).parents[1] / "data/tiny-llama"

STEPS = 10
RATES = {"sgd": 0.1, "adamw": 1e-3}

TIED: dict[str, Any] = small_models.llama_config(
    heads=4,
    kv_heads=2,
    layers=4,
    vocab=64,
    tied=True,
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    torch_dtype="float32",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
)
"""An embedding that is the head too, so that the first and the last stage hold it; experts that transformers fuses."""


@dataclass(frozen=True)
class Case:
    checkpoint: Path
    shards: Path
    ids: list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A checkpoint in float32, its shard set and a batch, made once."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "trained":
                convert(TINY, folder / "checkpoint", dtype="F32")
                ids = text_ids(4, 64)
            else:
                with quiet():
                    build(TIED, seed=1).save_pretrained(folder / "checkpoint")
                ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(2)).tolist()
            split(
                folder / "checkpoint",
                folder / "set",
                tensor_parallel_size=2,
                options=SplitOptions(max_part_bytes=700_000),
            )
            made[name] = Case(folder / "checkpoint", folder / "set", ids)
        return made[name]

    return make


def text_ids(rows: int, length: int) -> list[list[int]]:
    """The beginning of the text that the model has not seen, in rows."""
    from tokenizers import Tokenizer

    text = (TINY / "heldout.txt").read_text("utf-8")
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    return [ids[i * length : (i + 1) * length] for i in range(rows)]


def in_one_process(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def loss_of(model: Any, ids: list[list[int]]) -> torch.Tensor:
    given = torch.tensor(ids)
    return torch.nn.functional.cross_entropy(
        model(given).logits[:, :-1].flatten(0, 1), given[:, 1:].flatten()
    )


def as_stored(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return found


def gradients_of(model: Any, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, ids).backward()
    return as_stored(
        model,
        {
            name: torch.zeros_like(each) if each.grad is None else each.grad
            for name, each in model.named_parameters()
        },
    )


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, most: float = 1e-6
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name].float() - tensor.float()).abs().max()) <= most, name


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    found = {file: load_file(folder / file) for file in set(files.values())}
    assert sorted(files) == sorted(name for each in found.values() for name in each)
    return {name: found[file][name] for name, file in files.items()}


# ----------------------------------------------------------------------------------------- the same as in one process


@pytest.mark.parametrize(
    ("name", "stages", "optimizer"),
    [
        ("trained", 2, "adamw"),
        pytest.param("trained", 3, "sgd", marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param("tied", 2, "sgd", marks=[pytest.mark.slow, pytest.mark.sweep]),
        # three uneven stages, the other optimizer and a tied head: what the swept ones have, at once
        pytest.param("tied", [(0, 1), (1, 2), (2, 4)], "adamw", marks=pytest.mark.slow),
    ],
)
def test_stages_learn_what_one_process_learns(
    name: str, stages: Any, optimizer: Any, case: Callable[[str], Case], tmp_path: Path
) -> None:
    given = case(name)
    model = in_one_process(given.checkpoint)
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    own = kind(model.parameters(), lr=RATES[optimizer], weight_decay=0.01)
    with SplitTrainer(
        given.shards,
        stages=stages,
        learning_rate=RATES[optimizer],
        optimizer=optimizer,
        weight_decay=0.01,
        threads=1,
    ) as trainer:
        expected = gradients_of(model, given.ids)
        assert all(float(each.abs().max()) > 1e-3 for key, each in expected.items() if "experts" not in key)
        assert_close(trainer.gradients(given.ids), expected)
        losses = []
        for _ in range(STEPS):
            losses.append(trainer.step(given.ids))
            own.zero_grad()
            loss = loss_of(model, given.ids)
            loss.backward()
            own.step()
            assert losses[-1] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert_close(trainer.gradients(given.ids), gradients_of(model, given.ids))
        after = trainer.evaluate(torch.tensor(given.ids))
        saved = trainer.save(tmp_path / "out")
    assert after < losses[0] - 0.05
    tensors = saved_tensors(tmp_path / "out")
    assert_close(
        tensors, as_stored(model, {key: each.detach() for key, each in model.named_parameters()}), most=2e-6
    )
    assert saved.nbytes == sum(each.nbytes for each in tensors.values())
    again = in_one_process(tmp_path / "out")
    assert float(loss_of(again, given.ids).detach()) == pytest.approx(after, abs=1e-5)
    for side in read_manifest(given.shards).side_files:
        assert (tmp_path / "out" / side.path).read_bytes() == (given.shards / side.path).read_bytes()


# ------------------------------------------------------------------------------------------------ only what has changed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path / "server") as found:
        isolate(monkeypatch, tmp_path, found)
        found.make_bucket(BUCKET)
        yield found


def shardprep(*args: object) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*map(str, args), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_only_parts_that_changed_are_pushed(tmp_path: Path, server: S3Server) -> None:
    """From a store, of a model that is stored in bfloat16, with the lower half frozen, to a new revision beside it."""
    uri = f"s3://{BUCKET}/tiny"
    split(TINY, tmp_path / "set", tensor_parallel_size=2, options=SplitOptions(max_part_bytes=400_000))
    push(tmp_path / "set", uri, revision="base")
    manifest = read_manifest(tmp_path / "set")
    ids = text_ids(2, 48)
    with SplitTrainer(
        uri,
        stages=2,
        revision="base",
        learning_rate=1e-3,
        freeze=("first", 0, 1, 2, 3),
        threads=1,
        cache=tmp_path / "cache",
    ) as trainer:
        gradients = trainer.gradients(ids)
        losses = [trainer.step(ids) for _ in range(3)]
        after = trainer.evaluate(ids)
        saved = trainer.save(tmp_path / "out")
    assert after < losses[-1] < losses[0]
    # rounded once, to eight bits
    rounded = float(loss_of(in_one_process(tmp_path / "out"), ids).detach())
    assert rounded == pytest.approx(after, abs=0.02)
    above = {name for name, entry in manifest.tensors.items() if entry.layer in (4, 5, "last")}
    assert set(gradients) == above
    assert {name for name in saved.changed if not name.endswith("norm.weight")} == {
        name
        for name in above
        if not name.endswith("norm.weight")  # of which a step may round to nothing
    }
    with load(tmp_path / "set", tensor_parallel_size=1) as shard:
        for name, tensor in saved_tensors(tmp_path / "out").items():
            assert tensor.dtype == shard[name].dtype == torch.bfloat16
            assert torch.equal(tensor, shard[name]) == (name not in saved.changed), name

    shardprep("split", tmp_path / "out", tmp_path / "tuned", *saved.split_options)
    tuned = read_manifest(tmp_path / "tuned")
    before = {part.digest for part in manifest.parts}
    new = {part.path: part for part in tuned.parts if part.digest not in before}
    # each part that holds nothing that was trained is the same, byte for byte
    assert {part.path for part in tuned.parts if part.layers[1] <= 4 and "last" not in part.placements} == {
        part.path for part in tuned.parts if part.path not in new
    }
    assert len(new) < len(tuned.parts) > 3

    server.reset_stats()
    report = shardprep("push", tmp_path / "tuned", uri, "--revision", "tuned")
    assert report["blobs_sent"] == len(new)
    assert report["bytes_sent"] == sum(part.size for part in new.values())
    size = (tmp_path / "tuned/shardprep.json").stat().st_size
    received = server.stats()["received"]
    # beside them only the manifest, and what frames their chunks
    assert report["bytes_sent"] + size <= received <= (report["bytes_sent"] + size) * 1.01 + 4096
    assert received < 0.6 * sum(part.size for part in tuned.parts)

    with opened("tiny") as store:
        assert remote.read_revision(store, "base")[1] == manifest
        assert remote.read_revision(store, "tuned", report["manifest_digest"])[1] == tuned


@pytest.mark.parametrize("limit", [1, 700, 2500, 5000, 9000, 20_000, 10**9])
@pytest.mark.parametrize(("grain", "stages"), [(1, None), (2, [(0, 1), (1, 4)])])
def test_a_shard_set_says_by_itself_how_it_was_split(
    limit: int, grain: int, stages: Any, tmp_path: Path
) -> None:
    small_models.write_model(tmp_path / "in", small_models.phi3_config(vocab=90), kind="safetensors")
    split(
        tmp_path / "in",
        tmp_path / "one",
        tensor_parallel_size=grain,
        stages=stages,
        options=SplitOptions(max_part_bytes=limit),
    )
    pieces: dict[str, int] = {}
    with load(tmp_path / "one", tensor_parallel_size=1) as shard:
        for part, _, _, _ in shard.ranges():
            pieces[part.part.path] = pieces.get(part.part.path, 0) + 1
    options = split_options(shard.manifest, pieces)
    shardprep("split", tmp_path / "in", tmp_path / "two", *options)
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert [(part.path, part.digest) for part in one.parts] == [
        (part.path, part.digest) for part in two.parts
    ]
    assert one.stages == two.stages


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 1}, "one stage"),
        ({"stages": 7}, "7 pipeline stages"),
        ({"stages": [(0, 2), (3, 6)]}, "begin at layer 2"),
        ({"optimizer": "adam"}, "expected sgd or adamw"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"freeze": (6,)}, "there are 0 to 5, and first"),
        ({"freeze": ("head",)}, "head is no layer"),
        ({"freeze": ("first", "last", *range(6))}, "nothing is left"),
    ],
)
def test_what_cannot_be_is_refused_before_any_process_is_started(
    options: dict[str, Any], words: str, case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    given: dict[str, Any] = {"stages": 2, "learning_rate": 1e-3, **options}
    with pytest.raises(InputError, match=words):
        SplitTrainer(case("trained").shards, **given)


def test_a_quantized_model_is_refused() -> None:
    quantized = Path(__file__).parents[2] / "manifests/v1/llama-gptq-tp2.json"
    with pytest.raises(UnsupportedError, match="quantized"):
        SplitTrainer(quantized, stages=2, learning_rate=1e-3)


def test_a_damaged_part_is_refused_by_its_name(case: Callable[[str], Case], tmp_path: Path) -> None:
    import shutil

    shards = shutil.copytree(case("tied").shards, tmp_path / "set")
    part = shards / read_manifest(shards).parts[0].path
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(ProblemError, match=part.name):
        SplitTrainer(shards, stages=2, learning_rate=1e-3, threads=1)


@pytest.fixture(scope="module")
def trainer(case: Callable[[str], Case]) -> Iterator[SplitTrainer]:
    given = case("tied")
    with SplitTrainer(
        given.shards, stages=2, learning_rate=1e38, weight_decay=1, optimizer="sgd", threads=1, freeze=(0,)
    ) as found:
        yield found


def listening(pid: int) -> set[str]:
    """The addresses, as the kernel prints them, at which a process takes TCP connections."""
    links = [os.fspath(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def test_stages_can_be_reached_over_the_loopback_interface_alone(trainer: SplitTrainer) -> None:
    for pid in trainer.pids:
        assert listening(pid) == {"0100007F"}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "ids: expected"),
        ([[1, 2], [3]], "same length"),
        ([[1]], "at least two"),
        ([[1, -2]], "ids: expected"),
        ([[1, 2.0]], "ids: expected"),
        ([1, 2], "ids: expected"),
        ([[1, 64]], "64 is not below 64"),
    ],
)
def test_ids_that_are_none_are_refused_and_training_goes_on(
    ids: Any, words: str, trainer: SplitTrainer, case: Callable[[str], Case]
) -> None:
    for method in (trainer.step, trainer.evaluate, trainer.gradients):
        with pytest.raises(InputError, match=words):
            method(ids)
    assert trainer.evaluate(case("tied").ids) > 1


def test_nothing_is_saved_over_something(trainer: SplitTrainer, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(InputError, match="is not empty"):
        trainer.save(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        trainer.save(tmp_path / "mine")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_a_loss_that_is_no_number_changes_nothing(
    trainer: SplitTrainer, case: Callable[[str], Case], tmp_path: Path
) -> None:
    """The only test that lets this trainer learn, at a rate that ruins the model."""
    ids = case("tied").ids
    refused = pytest.raises(ProblemError, match=r"the loss is (nan|inf); the weights are as they were")
    with refused:
        for _ in range(5):
            trainer.step(ids)
    one = trainer.save(tmp_path / "one")
    assert not any(".layers.0." in name for name in one.changed)
    assert any(".layers.1." in name for name in one.changed)
    with refused:
        trainer.step(ids)
    trainer.save(tmp_path / "two")
    for name in one.files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---------------------------------------------------------------------------------------------------- when one ends


def are_gone(pids: tuple[int, ...], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("busy", "stage"),
    # the first while it computes and the last while it waits: neighbours on one side each, and both moments
    swept(itertools.product([False, True], range(3)), but=[(True, 0), (False, 2)], spread=True),
)
def test_the_end_of_a_stage_ends_the_training_with_its_name(
    stage: int, busy: bool, case: Callable[[str], Case]
) -> None:
    given = case("trained")
    with SplitTrainer(
        given.shards, stages=3, learning_rate=1e-3, threads=1, timeout=1e6
    ) as trainer:  # no test waits for that
        trainer.step(given.ids)
        pids = trainer.pids
        if busy:
            threading.Timer(0.15, os.kill, (pids[stage], signal.SIGKILL)).start()
        else:
            os.kill(pids[stage], signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=rf"stage-{stage} \(layers .*ended by SIGKILL") as caught:
            for _ in range(200):
                trainer.step(given.ids)
        assert (caught.value.worker, caught.value.is_certain) == (f"stage-{stage}", True)
        assert are_gone(pids)
        with pytest.raises(WorkerError, match="cannot go on: stage-"):
            trainer.step(given.ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", swept([0, 1], but=[1])
)  # the last one hangs with a neighbour that waits for it
def test_a_stage_that_hangs_counts_as_lost_after_the_timeout(stage: int, case: Callable[[str], Case]) -> None:
    given = case("tied")
    with SplitTrainer(given.shards, stages=2, learning_rate=1e-3, threads=1, timeout=60) as trainer:
        pids = trainer.pids
        trainer.step(given.ids)
        trainer._timeout = 2
        os.kill(pids[stage], signal.SIGSTOP)
        # more than the pipe holds that the first stage no longer empties
        ids = given.ids if stage else [[1] * 9000] * 8
        with pytest.raises(WorkerLostError, match="no answer in 2 seconds") as caught:
            trainer.step(ids)
        assert not caught.value.is_certain
        assert are_gone(pids)


FRONT = """
import sys, time
from trainer import SplitTrainer
with SplitTrainer(sys.argv[1], stages=2, learning_rate=1e-3, threads=1) as trainer:
    print(*trainer.pids, flush=True)
    while True:
        trainer.step([list(range(20))] * 4)
"""


@pytest.mark.slow
def test_stages_end_with_the_process_that_started_them(case: Callable[[str], Case]) -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", FRONT, case("tied").shards],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as front,
        ended(front),
    ):
        assert front.stdout is not None
        pids = tuple(map(int, front.stdout.readline().split()))
        assert len(pids) == 2
        time.sleep(0.3)
        front.kill()
    assert are_gone(pids)
