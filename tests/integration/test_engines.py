"""Engines run in processes of their own: what they say where their library is missing, and write where it is there.

The slow tests need environments that cannot be this one: `tools/make_engines FOLDER` makes them, and prints the
variables that name their pythons.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lazily import load_file, save_file, torch
from quantized_models import quantized_tensors
from shardprep.layout.quantization import Scheme, read_scheme
from shardprep.quantize.engine import Engine
from shardprep.quantize.engines import old_transformers
from shardprep.quantize.engines.main import Job
from shardprep.quantize.packing import dequantized
from shardprep_runtime.errors import UnsupportedError

DATA = Path(__file__).parents[1] / "data/tiny-llama"

LAYERS = 2

APART = {"llmcompressor": "llmcompressor", "autoawq": "awq", "auto-gptq": "auto_gptq"}
"""Engines that cannot be installed beside shardprep -> the module of their library."""


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    """Token ids of a real text, 64 at a time: the first sixteen are to calibrate with, the others are held out."""
    found = Tokenizer.from_file(str(DATA / "tokenizer.json")).encode((DATA / "heldout.txt").read_text()).ids
    return [found[start : start + 64] for start in range(0, 32 * 64, 64)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of a trained checkpoint, as safetensors."""
    folder = tmp_path_factory.mktemp("source")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(DATA.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    few = {
        name: tensor.contiguous()
        for name, tensor in tensors.items()
        if ".layers." not in name or int(name.split(".")[2]) < LAYERS
    }
    save_file(few, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((DATA / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((DATA / "tokenizer.json").read_bytes())
    return folder


@pytest.fixture
def job(source: Path, ids: Sequence[Sequence[int]], tmp_path: Path) -> Job:
    calibration = tmp_path / "ids.jsonl"
    calibration.write_text("".join(json.dumps(each) + "\n" for each in ids[:16]))
    return Job(
        source=str(source),
        destination=str(tmp_path / "quantized"),
        work=str(tmp_path / "work"),
        method="gptq",
        bits=4,
        group_size=32,
        symmetric=True,
        act_order=False,
        skip=(),
        calibration=str(calibration),
        device="cpu",
        dtype="bfloat16",
        seed=0,
        batch_size=8,
    )


@pytest.mark.parametrize("name", APART)
def test_an_engine_that_is_not_installed_is_named_with_what_to_install(name: str, job: Job) -> None:
    if find_spec(APART[name]):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UnsupportedError) as refused:
        Engine(name).check(job)
    message = str(refused.value)
    package = {
        "llmcompressor": "llmcompressor==0.14",
        "autoawq": "autoawq==0.2.9",
        "auto-gptq": "auto-gptq==0.7.1",
    }
    assert f"pip install {package[name]}" in message
    assert "--engine-python" in message and sys.executable in message
    assert "Traceback" not in Path(job.work, "check.log").read_text()


def test_an_environment_without_any_library_is_told_from_one_that_has_them(job: Job, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    for name in APART:
        with pytest.raises(UnsupportedError, match=r"not installed for .*bare/bin/python"):
            Engine(name, tmp_path / "bare/bin/python").check(job)


def test_old_transformers_are_told_of_rope_and_dtype_in_their_own_words() -> None:
    new = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0},
        "text_config": {
            "dtype": "float16",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }
    old, notes = old_transformers.spell(new)
    assert old == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "text_config": {"torch_dtype": "float16", "rope_theta": 10000.0},
    }
    assert "rope_parameters.rope_theta -> rope_theta" in notes
    assert "text_config: dtype -> torch_dtype" in notes


def test_a_config_that_is_spelled_the_old_way_already_stays_as_it_is() -> None:
    old = {"torch_dtype": "float16", "rope_theta": 10000.0, "rope_scaling": None}
    assert old_transformers.spell(old) == (old, ())


def test_ropes_of_several_kinds_of_layers_cannot_be_told_to_old_transformers() -> None:
    ropes = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(ValueError, match="kinds of layers"):
        old_transformers.spell({"rope_parameters": ropes})


def test_the_source_is_linked_not_changed_for_old_transformers(source: Path, tmp_path: Path) -> None:
    before = (source / "config.json").read_bytes()
    old_transformers.link(str(source), tmp_path / "linked")
    assert (source / "config.json").read_bytes() == before
    assert (tmp_path / "linked/model.safetensors").samefile(source / "model.safetensors")
    spelled = json.loads((tmp_path / "linked/config.json").read_text())
    assert spelled["torch_dtype"] == "bfloat16" and "rope_parameters" not in spelled


def interpreter(name: str) -> Engine:
    """An engine in the environment that a variable names."""
    variable = f"SHARDPREP_TEST_{name.replace('-', '').upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no python: tools/make_engines FOLDER {name} makes one")
    return Engine(name, Path(os.environ[variable]))


def loss_of_quality(
    source: Path, quantized: Mapping[str, torch.Tensor], sequences: Sequence[Sequence[int]]
) -> float:
    """The mean divergence of a model with these weights from the one at `source`, nats per token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)

    def logs(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        with torch.no_grad():
            found: torch.Tensor = model.eval()(torch.tensor(sequences)).logits.log_softmax(-1)
        return found

    original, other = logs(load_file(source / "model.safetensors")), logs(quantized)
    return float((original.exp() * (original - other)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("llmcompressor", "gptq"), ("autoawq", "awq")])
def test_an_engine_of_another_environment_writes_a_checkpoint_that_is_better_than_rounding(
    name: str, method: str, job: Job, ids: Sequence[Sequence[int]]
) -> None:
    engine = interpreter(name)
    job = replace(job, method=method, symmetric=method == "gptq")
    found = engine.check(job)
    assert set(found["versions"]) >= {name, "torch", "transformers", "python"}
    events: list[Mapping[str, Any]] = []
    engine.run(job, events.append)

    layers = [event["done"] for event in events if event["event"] == "layer"]
    assert layers == list(range(LAYERS + 1)), "each layer is told once, in order"
    told = {(event["layer"], event["name"]): event["loss"] for event in events if event["event"] == "module"}
    assert {layer for layer, _ in told} == set(range(LAYERS)) and min(told.values()) >= 0

    folder = Path(job.destination)
    config = json.loads((folder / "config.json").read_text())
    scheme = read_scheme(config)
    assert scheme is not None
    assert (scheme.bits, scheme.group, scheme.symmetric, scheme.act_order) == (4, 32, job.symmetric, False)
    written = json.loads((Path(job.source) / "config.json").read_text())
    assert config["rope_parameters"] == written["rope_parameters"], "config.json keeps its spelling"
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(
        tensors["lm_head.weight"], load_file(Path(job.source, "model.safetensors"))["lm_head.weight"]
    )

    rounded = Scheme("gptq", group=32, symmetric=job.symmetric)
    nearest = dequantized(
        quantized_tensors(load_file(Path(job.source, "model.safetensors")), rounded), rounded
    )
    ours = loss_of_quality(Path(job.source), dequantized(tensors, scheme), ids[16:])
    assert ours < loss_of_quality(Path(job.source), nearest, ids[16:])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("llmcompressor", "gptq"), ("autoawq", "awq")])
def test_linears_that_a_job_leaves_alone_stay_and_are_listed(name: str, method: str, job: Job) -> None:
    engine = interpreter(name)
    kept = "model.layers.1.mlp.down_proj"
    job = replace(job, method=method, symmetric=method == "gptq", skip=(kept,))
    engine.run(job, lambda event: None)
    tensors = load_file(Path(job.destination, "model.safetensors"))
    assert torch.is_floating_point(tensors[f"{kept}.weight"])
    assert "model.layers.0.mlp.down_proj.weight" not in tensors
    scheme = read_scheme(json.loads(Path(job.destination, "config.json").read_text()))
    assert scheme is not None and set(scheme.kept) == {"lm_head", kept}


@pytest.mark.slow
def test_llm_compressor_refuses_awq_where_no_accelerator_is(job: Job) -> None:
    engine = interpreter("llmcompressor")
    with pytest.raises(UnsupportedError, match=r"needs an accelerator.*--engine gptqmodel"):
        engine.check(replace(job, method="awq"))


@pytest.mark.slow
def test_autoawq_refuses_what_its_packing_has_not(job: Job) -> None:
    engine = interpreter("autoawq")
    for change, reason in (
        ({}, "has only AWQ"),
        ({"method": "awq", "bits": 8}, "4 bits only"),
        ({"method": "awq", "group_size": -1}, "needs a group size"),
        ({"method": "awq"}, "zero points"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            engine.check(replace(job, **change))


@pytest.mark.slow
def test_auto_gptq_says_that_it_needs_cuda(job: Job) -> None:
    engine = interpreter("auto-gptq")
    with pytest.raises(UnsupportedError, match=r"CUDA device only.*--engine gptqmodel"):
        engine.check(job)
