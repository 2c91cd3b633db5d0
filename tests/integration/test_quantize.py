"""A checkpoint is refused before the work or quantized as it was asked, by the real engine, whenever it was killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantized_models
import small_models
from processes import ended
from shardprep.convert import convert
from shardprep.inspect import inspect
from shardprep.layout import Scheme, read_scheme
from shardprep.model import skeleton
from shardprep.model.describe import scheme_of
from shardprep.quantize import checks, run
from shardprep.quantize.checks import Evaluation
from shardprep.quantize.engine import Engine, EngineError
from shardprep.quantize.packing import dequantized
from shardprep.quantize.quality import Quality, measure
from shardprep.quantize.recipe import Recipe
from shardprep.quantize.report import QuantizeReport
from shardprep.quantize.run import Way, quantize
from shardprep.quantize.trial import SIZES
from shardprep.source import open_source, read_checkpoint
from shardprep.split import split
from shardprep_runtime import load
from shardprep_runtime.errors import InputError, LayoutError, ProblemError, UnsupportedError
from sweeps import swept

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quantize")]

CHECKPOINT = Path(__file__).parent.parent / "data" / "tiny-llama"
HELDOUT = CHECKPOINT / "heldout.txt"
SHARDPREP = str(Path(sys.executable).with_name("shardprep"))
SMALL = {"samples": 16, "length": 128}
"""Enough calibration to be better than rounding, few enough to be quick."""

Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """Why a call is refused; it left nothing behind."""

    def refused(source: Path, kind: type[Exception] = InputError, **recipe: Any) -> str:
        before = set(tmp_path.iterdir())
        with pytest.raises(kind) as caught:
            quantize(source, tmp_path / "out", Recipe(**{"method": "gptq", "group_size": 32, **recipe}))
        assert set(tmp_path.iterdir()) == before
        return str(caught.value)

    return refused


# ------------------------------------------------------------------------------------------------------- refused before


def test_what_is_quantized_already_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    source = quantized_models.write_quantized(CHECKPOINT, tmp_path / "awq", Scheme("awq", group=32))
    assert "quantized already (awq, 4 bits)" in refusal(source)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"method": "awq", "bits": 8}, "awq of 8 bits; expected 4"),
        ({"bits": 3}, "gptq of 3 bits; expected 2 or 4 or 8"),
        ({"method": "rtn"}, "methods are gptq and awq"),
        ({"method": "awq", "act_order": True}, "act-order"),
        ({"group_size": 0}, "groups of 0 numbers"),
        ({"skip": ("k_projection",)}, "--skip k_projection: no linear of the model is called so"),
        ({"length": 512}, "the model takes at most 256 tokens"),
        ({"samples": 2, "length": 64}, "too few to calibrate with"),
        ({"calibration": "/nowhere/text.txt"}, "/nowhere/text.txt"),
    ],
)
def test_what_makes_no_sense_is_refused(refusal: Refusal, recipe: dict[str, Any], said: str) -> None:
    assert said in refusal(CHECKPOINT, **recipe)


def test_groups_that_do_not_divide_are_refused_with_those_that_do(refusal: Refusal) -> None:
    said = refusal(CHECKPOINT, LayoutError, group_size=256)
    assert "does not divide into groups of 256" in said and "--group-size 128" in said


def test_a_size_that_ranks_cannot_share_is_refused_with_the_padding_that_helps(
    refusal: Refusal, tmp_path: Path
) -> None:
    config = small_models.llama_config(intermediate=160, heads=8, kv_heads=8, head_dim=16, vocab=2048)
    source = with_tokenizer(tmp_path / "odd", config)
    said = refusal(source, LayoutError, tensor_parallel_size=4)
    assert "160" in said and "--pad-to-tp 4" in said


def test_a_checkpoint_without_a_tokenizer_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    source = tmp_path / "mute"
    shutil.copytree(CHECKPOINT, source, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "no tokenizer" in refusal(source)


def test_a_folder_that_holds_something_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds mine.txt; nothing is overwritten"):
        quantize(CHECKPOINT, tmp_path / "out", Recipe("gptq", group_size=32))
    assert not (tmp_path / "out.quantizing").exists()


def test_no_room_on_the_disk_is_refused_before_the_work(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    assert "1,000 are free" in refusal(CHECKPOINT, **SMALL)


def test_an_engine_that_is_not_installed_is_named_with_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    with pytest.raises(UnsupportedError, match=r"pip install 'shardprep\[quantize\]'"):
        quantize(
            CHECKPOINT,
            tmp_path / "out",
            Recipe("gptq", group_size=32, **SMALL),
            Way(engine=Engine("gptqmodel", python)),
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.quantizing").exists()


def test_no_such_interpreter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--engine-python names a python"):
        Engine("gptqmodel", tmp_path / "python")


# ------------------------------------------------------------------------------------------------------------ quantized


@pytest.fixture(scope="session")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint as safetensors."""
    folder = tmp_path_factory.mktemp("safe") / "tiny"
    convert(CHECKPOINT, folder)
    return folder


Made = tuple[Path, QuantizeReport]


@pytest.fixture(scope="session", params=["gptq", "awq"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Quantized by the engine, measured on text that it has not seen."""
    folder = tmp_path_factory.mktemp("made") / request.param
    recipe = Recipe(request.param, group_size=32, tensor_parallel_size=4, **SMALL)
    return folder, quantize(CHECKPOINT, folder, recipe, Way(evaluation=Evaluation(HELDOUT, tokens=4096)))


def quality(folder: Path, report: QuantizeReport) -> Quality:
    """As `quantize` measured it, of any other checkpoint."""
    from shardprep.quantize.calibration import read_heldout

    heldout = read_heldout(HELDOUT, CHECKPOINT, length=128, limit=4096)
    assert heldout.digest == report.measured["digest"]
    with open_source(CHECKPOINT) as before, open_source(folder) as after:
        return measure(read_checkpoint(before), read_checkpoint(after), heldout.sequences)


@pytest.mark.slow
def test_it_is_better_than_rounding(made: Made, tmp_path: Path) -> None:
    folder, report = made
    assert report.quality is not None
    assert quality(folder, report) == report.quality
    rounded = quantized_models.write_quantized(CHECKPOINT, tmp_path / "rounded", report.scheme)
    least = quality(rounded, report)
    assert report.quality.kl < least.kl
    assert report.quality.perplexity < report.quality.perplexity_before * 1.02


@pytest.mark.slow
def test_the_report_says_what_was_measured(made: Made) -> None:
    folder, report = made
    told = json.loads((folder / "quantization_report.json").read_text())
    assert report.quality is not None
    assert told["summary"]["kl"] == report.quality.kl
    assert told["summary"]["calibration"]["tokens"] == 16 * 128
    assert told["summary"]["measured_on"] == {**report.measured}
    assert [each["layer"] for each in told["layers"]] == list(range(6))
    assert all(0 < each["error"] < 0.1 for each in told["layers"])
    assert told["linears_quantized"] == report.quantized == 6 * 7
    assert told["kept"] == ["lm_head", "model.embed_tokens"]


@pytest.mark.slow
def test_the_config_lists_what_is_quantized_and_what_is_not(made: Made) -> None:
    folder, report = made
    config = json.loads((folder / "config.json").read_text())
    how = config["quantization_config"]
    assert read_scheme(config) == Scheme(
        **{**vars_of(report.scheme), "kept": ("lm_head", "model.embed_tokens")}
    )
    assert how["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
    assert json.loads((folder / "quantize_config.json").read_text()) == how
    assert config["dtype"] == ("bfloat16" if report.scheme.method == "gptq" else "float16")
    assert str(folder.parent) not in (folder / "config.json").read_text()


@pytest.mark.slow
def test_it_holds_what_was_forecast(made: Made) -> None:
    _, report = made
    assert report.nbytes == report.forecast.result


@pytest.mark.slow
def test_it_is_inspected_and_split_like_any_other(made: Made, tmp_path: Path) -> None:
    folder, report = made
    assert inspect(folder).quantization == scheme_of(read_checkpoint(open_source(folder)))
    split(folder, tmp_path / "shards", tensor_parallel_size=4)
    manifest = json.loads((tmp_path / "shards" / "shardprep.json").read_text())
    assert report.quality is not None
    assert manifest["quantization"]["report"]["summary"]["kl"] == report.quality.kl
    whole = load_file(folder / "model.safetensors")
    loaded = load(tmp_path / "shards", rank=0, tensor_parallel_size=1)
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_transformers_loads_it_as_it_is(made: Made) -> None:
    """With the engine's own kernels, in the dtype of the checkpoint: equal but for the rounding of that."""
    folder, report = made
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map='cpu')\n"
        "assert 'Linear' in type(model.model.layers[0].mlp.up_proj).__name__\n"
        "assert hasattr(model.model.layers[0].mlp.up_proj, 'qweight')\n"
        "with torch.no_grad(): torch.save(model(torch.tensor([[1, 2, 3, 40, 500]])).logits.float(), sys.argv[2])\n"
    )
    out = folder.parent / f"{folder.name}.pt"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", script, folder, out], capture_output=True, text=True, env=env, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    logits = torch.load(out, weights_only=True)
    from shardprep.quantize.walk import walk

    with open_source(folder) as opened:
        ours = walk(read_checkpoint(opened), torch.tensor([[1, 2, 3, 40, 500]]))
    spread = ours.std()
    assert (logits - ours).abs().max() < 0.05 * spread
    assert report.quality is not None


@pytest.mark.slow
def test_padding_lets_more_ranks_share_it_and_changes_nothing(tmp_path: Path) -> None:
    config = small_models.llama_config(intermediate=160, heads=8, kv_heads=8, head_dim=16, vocab=2048)
    source = with_tokenizer(tmp_path / "odd", config)
    recipe = Recipe("gptq", group_size=32, tensor_parallel_size=4, pad_to_tp=4, **SMALL)
    report = quantize(source, tmp_path / "padded", recipe, Way(evaluation=Evaluation(skip=True)))
    assert report.padding.sizes == {"intermediate_size": (160, 256)}
    made = dequantized(load_file(tmp_path / "padded" / "model.safetensors"), report.scheme)
    down = made["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == (128, 256) and not down[:, 160:].any()
    assert not made["model.layers.0.mlp.up_proj.weight"][160:].any()
    split(tmp_path / "padded", tmp_path / "shards", tensor_parallel_size=4)


@pytest.mark.slow
def test_what_is_skipped_stays_as_it_was(safe: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        "gptq", group_size=32, skip=("mlp.down_proj", "re:.*layers\\.0\\.self_attn\\.q_proj"), **SMALL
    )
    # a store, from which it is staged first
    report = quantize(f"file://{safe}", tmp_path / "out", recipe, Way(evaluation=Evaluation(skip=True)))
    assert not report.resumes and report.quality is None
    before, after = load_file(safe / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in after if name.endswith("down_proj.weight")]
    assert len(kept) == 6
    assert torch.equal(
        after["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert "model.layers.1.self_attn.q_proj.qweight" in after
    assert all(torch.equal(after[name], before[name]) for name in kept)


def random_model(folder: Path, model_type: str, **changes: Any) -> Path:
    """A small random checkpoint as transformers writes it, whose linears divide into groups of 32."""
    config = skeleton.shrink(skeleton.default_config(model_type), SIZES)
    model = skeleton.build({**config, **changes}, dtype="bfloat16")
    with skeleton.quiet():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "linear"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.7.w2.qweight"),
        # one linear of several: no other name, where experts have other names than the model's
        pytest.param("phi3", "model.layers.1.mlp.gate_up_proj.qweight", marks=pytest.mark.sweep),
    ],
)
def test_linears_have_the_names_that_the_source_gave_them(
    tmp_path: Path, model_type: str, linear: str
) -> None:
    """And hold what belongs there: with the parts of experts or fused linears exchanged the model would be another."""
    source = random_model(tmp_path / "source", model_type, vocab_size=2048)
    recipe = Recipe("gptq", group_size=32, tensor_parallel_size=2, **SMALL)
    report = quantize(source, tmp_path / "out", recipe, Way(evaluation=Evaluation(skip=True)))
    with open_source(source) as before, open_source(tmp_path / "out") as after:
        stems = {name.rpartition(".")[0] for name in read_checkpoint(before).tensors}
        assert {name.rpartition(".")[0] for name in read_checkpoint(after).tensors} == stems
        assert linear in read_checkpoint(after).tensors
    was, became = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in dequantized(became, report.scheme).items():
        assert (weight.float() - was[name].float()).norm() < 0.3 * was[name].float().norm(), name
    split(tmp_path / "out", tmp_path / "shards", tensor_parallel_size=2)


@pytest.mark.slow
def test_a_dry_run_tries_the_engine_and_writes_nothing(tmp_path: Path) -> None:
    recipe = Recipe("gptq", group_size=32, tensor_parallel_size=4, **SMALL)
    report = quantize(CHECKPOINT, tmp_path / "out", recipe, Way(dry_run=True))
    assert report.forecast.quantized == 42 and report.resumes and not report.files
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_the_engine_cannot_do_shows_before_the_work(tmp_path: Path) -> None:
    """GPTQModel 7.6's AWQ of Phi-3, whose parts it takes apart and does not find again."""
    source = random_model(tmp_path / "source", "phi3", vocab_size=2048)
    recipe = Recipe("awq", group_size=32, **SMALL)
    with pytest.raises(
        UnsupportedError, match="a small random phi3 could not be quantized so: engine gptqmodel"
    ):
        quantize(source, tmp_path / "out", recipe, Way(trial=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --------------------------------------------------------------------------------------------------- killed and resumed


def killed(command: list[str], layers: int) -> str:
    """Run a command, kill it and all that it started once so many layers are in its journal; what it said."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    with ended(process):
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(f"quantizing: layer {layers} of"):
                os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL, "".join(said)
    return "".join(said)


# a journal of layers knows no method: gptq stands for both
@pytest.mark.slow
@pytest.mark.parametrize("made", swept(["gptq", "awq"], but=["gptq"]), indirect=True)
def test_a_run_that_is_killed_at_any_layer_goes_on_there_to_the_same_bytes(
    made: Made, tmp_path: Path
) -> None:
    folder, report = made
    work = tmp_path / "out.quantizing"
    command = [
        SHARDPREP, "quantize", str(CHECKPOINT), str(tmp_path / "out"), "--method", report.scheme.method, "--group-size", "32",
        "-tp", "4", "--samples", "16", "--sequence-length", "128",
        "--evaluate", str(HELDOUT), "--evaluate-tokens", "4096",
    ]  # fmt: skip
    first = random.randrange(1, 4)
    killed(command, first)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.safetensors"))
    second = random.randrange(first + 1, 6)
    said = killed(command, second)
    begun = int(said.partition("quantizing: layer ")[2].split()[0])
    assert first - 1 <= begun <= first, said  # a layer is told of before it is on disk
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.partition("quantizing: layer ")[2].split()[0]) >= second - 1
    assert not work.exists()
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.sweep  # three runs more, of what the one above does with the type that users have most
def test_a_model_type_that_the_engine_would_not_resume_is_resumed_all_the_same(tmp_path: Path) -> None:
    source = random_model(
        tmp_path / "source", "qwen2", vocab_size=2048, num_hidden_layers=4, layer_types=None
    )
    options = [
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--samples",
        "16",
        "--sequence-length",
        "64",
        "--no-evaluate",
    ]
    for name in ("whole", "resumed"):
        command = [SHARDPREP, "quantize", str(source), str(tmp_path / name), *options]
        if name == "resumed":
            killed(command, 3)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        begun = int(done.stderr.partition("quantizing: layer ")[2].split()[0])
        assert (begun == 0) == (name == "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_result_that_is_too_bad_is_not_published(
    safe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # GPTQModel writes logs where it is run
    recipe = Recipe("gptq", group_size=32, **SMALL)
    seen: list[str] = []
    with pytest.raises(ProblemError, match=r"above --max-kl 1e-09; nothing was written"):
        quantize(safe, tmp_path / "out", recipe, Way(evaluation=Evaluation(max_kl=1e-9)))
    assert not (tmp_path / "out").exists()
    told = json.loads((tmp_path / "out.quantizing" / "quantization_report.json").read_text())
    assert told["summary"]["kl"] > 1e-9
    report = quantize(
        safe,
        tmp_path / "out",
        recipe,
        Way(evaluation=Evaluation(max_kl=1.0)),
        watch=run.Watch(stage=seen.append),
    )
    assert seen == ["measuring", "writing"]
    assert list(Path().iterdir()) == []
    assert report.quality is not None and report.quality.kl == told["summary"]["kl"]


@pytest.mark.slow
def test_an_engine_that_fails_says_why_and_where_its_log_is(safe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(safe, broken)
    tensors = load_file(safe / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][:] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ProblemError) as caught:
        quantize(broken, tmp_path / "out", Recipe("gptq", group_size=32, **SMALL))
    assert not (tmp_path / "out").exists()
    if isinstance(caught.value, EngineError):
        assert "engine.log" in str(caught.value)


def with_tokenizer(folder: Path, config: dict[str, Any]) -> Path:
    """A small random checkpoint with the trained one's tokenizer."""
    small_models.write_model(folder, config, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    return folder


def vars_of(scheme: Scheme) -> dict[str, Any]:
    return {name: getattr(scheme, name) for name in scheme.__dataclass_fields__}
