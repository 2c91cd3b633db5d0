"""Will it fit? Published models on devices that people have, and the split that is made for them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import header_checkpoints as published
import small_models
from shardprep.fit.report import FitOptions, FitReport, plan_fit
from shardprep.fit.search import Devices
from shardprep_runtime import plan_view, read_manifest
from shardprep_runtime.errors import InputError
from shardprep_runtime.format.view import Place

ONE_PROCESS = pytest.mark.xdist_group("transformers")
"""Of tests that import transformers, which takes seconds."""

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))
GIB = 2**30


def run(*args: object, code: int = 0) -> str:
    """What the console script prints on stdout, or on stderr where it refuses."""
    command = [SHARDPREP, *map(str, args)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == code, found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    return found.stderr if code == 2 else found.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of full size, of which the headers alone take room."""
    folder = tmp_path_factory.mktemp("published")
    llamas = {
        "llama-3-70b": published.LLAMA_3_70B,
        "llama-3.1-405b": published.LLAMA_31_405B,
        "llama-2-13b": published.LLAMA_2_13B,
        "qwen2.5-72b": published.QWEN_25_72B,
    }
    return {
        name: published.write(folder / name, config, published.llama_tensors(config))
        for name, config in llamas.items()
    }


# ---------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("model", "quantize", "parameters", "gigabytes"),
    [
        ("llama-3-70b", None, 70.55e9, 141.1),
        ("llama-3-70b", "awq", 70.55e9, 39.8),
        ("llama-3-70b", "gptq", 70.55e9, 39.8),
        ("llama-3.1-405b", None, 405.85e9, 811.7),
        ("llama-2-13b", None, 13.02e9, 26.03),
        ("qwen2.5-72b", None, 72.71e9, 145.4),
        ("qwen2.5-72b", "awq", 72.71e9, 41.6),
    ],
)
def test_sizes_are_what_is_published(
    models: dict[str, Path], model: str, quantize: str | None, parameters: float, gigabytes: float
) -> None:
    report = plan_fit(models[model], Devices((80 * GIB,)), FitOptions(quantize=quantize))
    assert report.parameters == pytest.approx(parameters, rel=0.005)
    assert report.nbytes / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert report.quantization == quantize


def best(report: FitReport) -> tuple[int, int]:
    assert report.recommended is not None
    return report.recommended.tensor_parallel_size, report.recommended.pipeline_parallel_size


def test_llama_3_70b_fits_two_devices_of_80_gib_and_not_one(models: dict[str, Path]) -> None:
    report = plan_fit(models["llama-3-70b"], Devices((80 * GIB,)))
    assert best(report) == (2, 1)
    alone = next(grid for grid in report.grids if grid.devices == 1)
    assert not alone.fits
    assert report.kv_token == 320 * 2**10
    assert any("TP 1 x PP 1 is short of" in reason for reason in report.reasons)


def test_llama_3_70b_in_4_bits_fits_one(models: dict[str, Path]) -> None:
    assert best(plan_fit(models["llama-3-70b"], Devices((48 * GIB,)), FitOptions(quantize="awq"))) == (1, 1)


def test_llama_2_13b_fits_two_devices_of_16_gib(models: dict[str, Path]) -> None:
    report = plan_fit(models["llama-2-13b"], Devices(tuple([16 * GIB] * 2)))
    assert best(report) == (2, 1)
    assert report.recommended is not None
    assert report.recommended.shard_bytes == pytest.approx(13.02e9, rel=0.005)
    assert plan_fit(models["llama-2-13b"], Devices((16 * GIB,))).recommended is not None
    short = plan_fit(
        models["llama-2-13b"], Devices(tuple([16 * 10**9] * 2)), FitOptions(context=2048)
    )  # GB, not GiB
    assert best(short) == (2, 1)


def test_405b_needs_two_hosts_of_eight(models: dict[str, Path]) -> None:
    report = plan_fit(models["llama-3.1-405b"], Devices(tuple([80 * GIB] * 16)))
    assert best(report) == (8, 2)
    assert plan_fit(models["llama-3.1-405b"], Devices(tuple([80 * GIB] * 8))).recommended is None


def test_the_groups_of_qwen_72b_do_not_align_with_two_ranks(models: dict[str, Path]) -> None:
    for quantize in ("awq", "gptq"):
        report = plan_fit(models["qwen2.5-72b"], Devices((24 * GIB,)), FitOptions(quantize=quantize))
        refused = {each.tensor_parallel_size: each for each in report.refused}
        assert {2, 4, 8} <= refused.keys()
        assert refused[2].pad_to == 29696
        assert refused[4].pad_to == 29696
        assert refused[8].pad_to == 29696
        assert "29568 / 2 = 14784 is not a multiple of 128" in refused[2].why
        assert "padded to 29696" in refused[2].why
        assert best(report) == (1, 2)
    # as it was published for them: padded
    padded = {**published.QWEN_25_72B, "intermediate_size": 29696}
    folder = published.write(models["qwen2.5-72b"].parent / "padded", padded, published.llama_tensors(padded))
    report = plan_fit(folder, Devices((24 * GIB,), 8), FitOptions(quantize="awq"))
    assert not {2, 4, 8} & {each.tensor_parallel_size for each in report.refused}
    assert best(report) == (2, 1)


def test_heads_that_cannot_be_shared_are_not_said_to_need_padding(models: dict[str, Path]) -> None:
    report = plan_fit(models["qwen2.5-72b"], Devices(tuple([24 * GIB] * 3)), FitOptions(quantize="awq"))
    three = next(each for each in report.refused if each.tensor_parallel_size == 3)
    assert three.pad_to is None
    assert "8 units cannot be shared by 3 ranks" in three.why


def test_unquantized_qwen_72b_is_cut_by_two(models: dict[str, Path]) -> None:
    assert best(plan_fit(models["qwen2.5-72b"], Devices((80 * GIB,)))) == (2, 1)


@pytest.mark.slow
def test_deepseek_v3_from_its_headers(tmp_path: Path) -> None:
    config = {**published.DEEPSEEK_V3, "quantization_config": published.FP8_BLOCKS}
    folder = published.write(tmp_path / "v3", config, published.deepseek_tensors(config))
    start = time.process_time()
    report = plan_fit(folder, Devices((141 * 10**9,)))
    assert time.process_time() - start < 15  # 6 s, half of them to read 90,000 headers
    assert report.parameters == pytest.approx(671.03e9, rel=0.0005)
    assert report.nbytes == pytest.approx(671.03e9 * 1.004, rel=0.005)  # fp8, embedding and head in bf16
    assert report.kv_token == 70272
    assert best(report) == (1, 5)
    eight = next(
        grid for grid in report.grids if grid.tensor_parallel_size == 8 and grid.pipeline_parallel_size == 1
    )
    assert eight.fits
    assert {stage.kv_token for stage in eight.stages} == {70272}  # on every rank
    by_expert = [grid for grid in report.grids if grid.expert_parallel_size == 8]
    assert {grid.shard_bytes for grid in by_expert if grid.devices == 8} == {eight.shard_bytes}


# ----------------------------------------------------------------------------------------------- devices that differ


def test_stages_follow_the_memory_of_their_devices(models: dict[str, Path]) -> None:
    memory = [24 * GIB, 16 * GIB, 12 * GIB]
    report = plan_fit(models["llama-3-70b"], Devices(tuple(memory)), FitOptions(quantize="awq"))
    assert best(report) == (1, 3)
    assert report.recommended is not None
    stages = report.recommended.stages
    assert [stage.memory for stage in stages] == memory
    shares = [1 - stage.spare / stage.memory for stage in stages]
    assert max(shares) - min(shares) < 0.06  # one of 80 layers


def test_tensor_ranks_need_devices_that_are_alike(models: dict[str, Path]) -> None:
    report = plan_fit(
        models["llama-3-70b"],
        Devices(
            (
                80 * GIB,
                96 * GIB,
            )
        ),
    )
    assert best(report) == (1, 2)
    two = next(each for each in report.refused if each.tensor_parallel_size == 2)
    assert "80.00 GiB and 96.00 GiB are not the same; put equal devices next to each other" in two.why


def test_equal_neighbours_of_a_list_may_share_a_stage(models: dict[str, Path]) -> None:
    report = plan_fit(
        models["llama-3-70b"],
        Devices((24 * GIB, 24 * GIB, 12 * GIB, 12 * GIB)),
        FitOptions(quantize="awq"),
    )
    grids = {(grid.tensor_parallel_size, grid.pipeline_parallel_size) for grid in report.grids}
    assert grids == {(1, 4), (2, 2)}
    assert best(report) == (2, 2)


def test_on_hosts_of_one_device_stages_come_before_tensor_ranks(models: dict[str, Path]) -> None:
    assert best(plan_fit(models["llama-3-70b"], Devices(tuple([80 * GIB] * 4), 1))) == (1, 4)
    assert best(plan_fit(models["llama-3-70b"], Devices(tuple([80 * GIB] * 4), 4))) == (4, 1)


def test_what_would_make_it_fit_does(models: dict[str, Path]) -> None:
    model = models["llama-2-13b"]
    two = Devices((16 * GIB, 16 * GIB))
    report = plan_fit(model, two, FitOptions(batch=4))
    assert report.recommended is None
    advice = "\n".join(report.advice)
    assert "1 more of 16.00 GiB" in advice
    assert plan_fit(model, Devices(tuple([16 * GIB] * 3)), FitOptions(batch=4)).recommended is not None
    assert "--batch 1" in advice
    assert plan_fit(model, two, FitOptions(batch=1)).recommended is not None
    context = int(advice.partition("--context ")[2].split()[0])
    assert plan_fit(model, two, FitOptions(batch=4, context=context)).recommended is not None
    assert plan_fit(model, two, FitOptions(batch=4, context=context + 200)).recommended is None
    assert "--quantize awq" in advice
    assert plan_fit(model, two, FitOptions(batch=4, quantize="awq")).recommended is not None
    assert ("--kv-dtype fp8" in advice) == (
        plan_fit(model, two, FitOptions(batch=4, kv_dtype="fp8")).recommended is not None
    )


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_shows_a_table_that_fits_a_terminal(models: dict[str, Path]) -> None:
    shown = run("plan", models["llama-3-70b"], "--device-memory", "24GiB", "--network", "1Gbps", "--batch", 4)
    assert "70.55 billion parameters, 141.1 GB (131.42 GiB)" in shown
    assert "320.00 KiB a token" in shown
    table = [line for line in shown.splitlines() if line.endswith((" short", " to spare"))]
    assert table
    assert max(map(len, table)) <= 110
    marked = [line for line in table if line.startswith("*")]
    assert len(marked) == 1
    assert "cold start: the whole checkpoint 18 min 49 s, a worker's own shard" in shown
    stages = next(line for line in shown.splitlines() if "--stages" in line).split("--stages ")[1]
    assert stages.startswith("0-")
    assert stages.endswith("-79")


def test_the_command_says_all_of_it_as_json(models: dict[str, Path]) -> None:
    options = ("--device-memory", "8x80GiB", "--network", "10Gbps", "--bandwidth", "1GB/s", "--json")
    report = json.loads(run("plan", models["llama-3-70b"], *options))
    assert report["recommended"]["tensor_parallel_size"] == 8
    assert report["recommended"]["devices"] == 8
    seconds = report["recommended"]["seconds"]
    assert seconds["cold_checkpoint"] == pytest.approx(141.1, rel=0.005)
    assert seconds["cold_shard"] == pytest.approx(141.1 / 8, rel=0.005)
    # 160 all-reduces of 16 KiB, 7/4 of which each of 8 ranks sends, at 1.25 GB/s
    assert seconds["tensor_token"] == pytest.approx(160 * 16384 * 1.75 / 1.25e9, rel=1e-6)
    assert seconds["tensor_prefill"] == pytest.approx(8192 * seconds["tensor_token"])
    assert {grid["tensor_parallel_size"] for grid in report["grids"]} == {1, 2, 4, 8}


def test_the_command_fails_where_nothing_fits_and_says_what_would(models: dict[str, Path]) -> None:
    shown = run("plan", models["llama-3-70b"], "--device-memory", "24GiB,24GiB", "--context", 4096, code=1)
    assert "nothing fits" in shown
    assert "any of these would make it fit:" in shown
    assert "--quantize awq" in shown
    report = json.loads(
        run("plan", models["llama-3-70b"], "--device-memory", "24GiB,24GiB", "--json", code=1)
    )
    assert report["recommended"] is None
    assert report["advice"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device-memory", "much"], "'much' is not a size"),
        (["--device-memory", "0x24GiB"], "write 24GiB, or 8x24GiB for eight of them"),
        (["--device-memory", "24GiB,"], "is not a size"),
        (["--device-memory", "24GiB", "--network", "fast"], "'fast' is not a rate; write 1Gbps"),
        (["--device-memory", "24GiB", "--network", "0bps"], "at least one byte a second"),
        (["--device-memory", "24GiB", "--context", "0"], "not in the range"),
        ([], "Missing option '--device-memory'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: list[str], words: str) -> None:
    source = small_models.write_model(tmp_path / "source")
    assert words in run("plan", source, *options, code=2)


def test_a_context_beyond_the_model_is_noted(models: dict[str, Path]) -> None:
    report = plan_fit(models["llama-2-13b"], Devices((80 * GIB,)), FitOptions(context=8000))
    assert report.notes == (
        "8000 tokens are more than the 4096 that config.json says the model was made for",
    )


def test_a_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    (source / "config.json").unlink()
    assert "no config.json" in run("plan", source, "--device-memory", "24GiB", code=2)


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    config = {**published.DEEPSEEK_V3, "num_hidden_layers": 4, "n_routed_experts": 8}
    config["quantization_config"] = published.FP8_BLOCKS
    folder = published.write(tmp_path / "v3", config, published.deepseek_tensors(config))
    with pytest.raises(InputError, match="quantized already, by fp8"):
        plan_fit(folder, Devices((80 * GIB,)), FitOptions(quantize="awq"))


# -------------------------------------------------------------------------------------------------- a config alone


@pytest.mark.slow
@ONE_PROCESS
@pytest.mark.parametrize(
    ("config", "gigabytes", "kv_token"),
    [
        (published.LLAMA_3_70B, 141.1, 320 * 2**10),
        (published.QWEN_25_72B, 145.4, 320 * 2**10),
        pytest.param(
            {**published.DEEPSEEK_V3, "quantization_config": published.FP8_BLOCKS},
            673.0,
            70272,
            marks=pytest.mark.slow,
        ),
        (published.GPT_OSS_120B, 65.25, 72 * 2**10),
    ],
)
def test_a_config_alone_is_enough(
    tmp_path: Path, config: dict[str, Any], gigabytes: float, kv_token: int
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    report = plan_fit(path, Devices((80 * GIB,)))
    assert report.nbytes / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert report.kv_token == kv_token
    assert report.recommended is not None


def test_a_config_and_its_checkpoint_give_the_same_plan(models: dict[str, Path]) -> None:
    folder = models["llama-2-13b"]
    from_headers = plan_fit(folder, Devices((16 * GIB,)))
    from_config = plan_fit(folder / "config.json", Devices((16 * GIB,)))
    assert from_config.grids == from_headers.grids


@pytest.mark.cold  # it is about what can be imported
def test_a_config_alone_needs_transformers_and_a_checkpoint_does_not(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    blocked = "import sys; sys.modules['transformers'] = sys.modules['torch'] = None\n"
    for path, code in ((source, 0), (source / "config.json", 2)):
        script = f"{blocked}from shardprep.cli import main; main({['plan', str(path), '--device-memory', '2GiB']!r})"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        if code:
            assert "transformers, which is not installed" in done.stderr
            assert "hf://" in done.stderr


def test_a_config_without_dtype_is_counted_as_float32_and_says_so(tmp_path: Path) -> None:
    config = {key: value for key, value in published.LLAMA_2_13B.items() if key != "torch_dtype"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 2}))
    report = plan_fit(path, Devices((80 * GIB,)))
    assert set(report.dtypes) == {"F32"}
    assert report.notes == ("config.json names no dtype; weights are counted as float32",)


@pytest.mark.slow
@ONE_PROCESS
@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_a_config_that_says_nonsense_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert "Error: " in run("plan", path, "--device-memory", "24GiB", code=2)


def test_a_shard_set_is_planned_as_its_checkpoint(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", small_models.llama_config(tied=True))
    run("split", source, tmp_path / "set", "-tp", 2)
    assert (
        plan_fit(tmp_path / "set", Devices((2 * GIB,))).grids == plan_fit(source, Devices((2 * GIB,))).grids
    )


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such file" in run("plan", tmp_path / "config.json", "--device-memory", "24GiB", code=2)


# ------------------------------------------------------------------------------------------------------------- split


def test_split_writes_the_stages_that_plan_recommends(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", small_models.llama_config(layers=12))
    devices = ("--device-memory", "8MiB,4MiB", "--reserve", "1MiB", "--context", "4096")
    planned = json.loads(run("plan", source, *devices, "--json"))
    shown = run("split", source, tmp_path / "set", *devices)
    best = planned["recommended"]
    assert f"-tp 1 --stages {best['stage_list']}" in shown
    manifest = read_manifest(tmp_path / "set")
    assert manifest.grain == 1
    assert manifest.stages is not None
    assert [list(stage) for stage in manifest.stages] == [stage["layers"] for stage in best["stages"]]
    first, second = manifest.stages
    assert first[1] - first[0] > second[1] - second[0]  # the larger device has more layers
    for rank, stage in enumerate(best["stages"]):
        assert plan_view(manifest, Place(rank=rank, pipeline_parallel_size=2)).nbytes == stage["weights"]


def test_split_for_equal_devices_shares_tensors(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    run("split", source, tmp_path / "set", "--device-memory", "2x4MiB", "--reserve", "1MiB", "--context", 64)
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.grain, manifest.stages) == (2, None)


def test_split_keeps_the_grain_that_is_asked_for(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    devices = ("--device-memory", "4MiB,2MiB", "--reserve", "1MiB", "--context", 64)
    run("split", source, tmp_path / "set", "-tp", 2, *devices)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.grain == 2
    assert manifest.stages is not None
    assert len(manifest.stages) == 2


def test_split_refuses_what_does_not_fit_and_writes_nothing(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    shown = run("split", source, tmp_path / "set", "--device-memory", "64KiB,32KiB", code=2)
    assert "does not fit these devices" in shown
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Missing option '-tp'"),
        (["-tp", "2", "--context", "64"], "--context says for what devices are planned"),
        (["--device-memory", "4MiB,2MiB", "-pp", "2"], "--device-memory decides the stages"),
        (["--device-memory", "4MiB,2MiB", "--stages", "0-1,2-3"], "--device-memory decides the stages"),
    ],
)
def test_split_refuses_options_that_contradict_each_other(
    tmp_path: Path, options: list[str], words: str
) -> None:
    source = small_models.write_model(tmp_path / "source")
    assert words in run("split", source, tmp_path / "set", *options, code=2)
