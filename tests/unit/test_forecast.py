"""What quantizing will take is told from headers: bytes exactly, memory and time by what there is to hold and to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

import header_checkpoints as published
from shardprep.layout.packed import pack
from shardprep.layout.pad import pad_to
from shardprep.model.describe import Model, model_of, read_model
from shardprep.quantize.effort import Rates, measure
from shardprep.quantize.forecast import Forecast, forecast
from shardprep.quantize.recipe import Recipe
from shardprep.source import open_source, read_checkpoint
from shardprep_runtime.errors import InputError
from shardprep_runtime.format import dtypes

RATES = Rates(matmul=1e12, matmul32=1e11, products=1e9, columns=1e4)
GIB = 2**30

CONFIG: dict[str, Any] = {
    **published.QWEN_25_72B,
    "hidden_size": 1024,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}


def model(folder: Path, config: Mapping[str, Any] = CONFIG) -> Model:
    return read_model(published.write(folder / "in", config, published.llama_tensors(config)))


def told(
    given: Model, method: str = "gptq", *, length: int = 512, staged: bool = True, **options: Any
) -> Forecast:
    recipe = Recipe(method, **{"samples": 32, **options})
    return forecast(given, recipe, length=length, staged=staged, rates=RATES)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_the_result_has_the_bytes_that_its_layout_says(
    method: str, group: int | None, tmp_path: Path
) -> None:
    given = model(tmp_path)
    found = told(given, method, group_size=group or -1, skip=("o_proj",))
    packed = pack(given.layout, given.packed.tensors, method=method, group=group, skip=["o_proj"])
    assert found.result == sum(dtypes.nbytes(dtype, shape) for dtype, shape in packed.tensors.values())
    assert found.nbytes == given.nbytes
    assert found.quantized == 2 * 6
    assert found.disk.result == found.result


def test_a_source_that_is_read_in_place_is_not_staged(tmp_path: Path) -> None:
    given = model(tmp_path)
    copied, linked = (told(given, staged=staged).disk for staged in (True, False))
    assert (copied.staged, linked.staged) == (given.nbytes, 0)
    assert copied.total - linked.total == given.nbytes
    assert copied.journal > 2 * 32 * 512 * 1024 * 2  # two generations of hidden states


def test_work_is_counted(tmp_path: Path) -> None:
    given = model(tmp_path)
    linears = {
        name: shape
        for name, (_, shape) in given.packed.tensors.items()
        if name.endswith("_proj.weight") and len(shape) == 2
    }
    tokens = 32 * 512
    gptq, awq = told(given).work, told(given, "awq").work
    forward = sum(2 * prod(shape) * tokens for shape in linears.values())
    scores = 2 * 4 * tokens * 512 * 1024
    assert gptq.matmul == 5 * (forward + scores)
    assert awq.matmul == 26 * (forward + scores)
    inputs = (1024, 1024, 1024, 1408)  # of q, k and v; of o; of gate and up; of down
    assert gptq.matmul32 == sum(2 * (2 * tokens * width**2 + 2 * width**3) for width in inputs) + sum(
        prod(shape) * shape[1] for shape in linears.values()
    )
    assert gptq.columns == sum(shape[1] for shape in linears.values())
    clipped = sum(prod(s) for n, s in linears.items() if not any(p in n for p in ("q_proj", "k_proj")))
    assert awq.products == clipped * 11 * 512 + sum(map(prod, linears.values())) * 240


def test_more_tokens_take_more_time_and_memory(tmp_path: Path) -> None:
    given = model(tmp_path)
    for method in ("gptq", "awq"):
        few, many = (told(given, method, samples=samples) for samples in (32, 256))
        assert many.seconds[0] > few.seconds[0]
        assert many.host > few.host
        assert few.seconds[0] < few.seconds[1]


def test_an_expert_sees_its_share_of_the_tokens(tmp_path: Path) -> None:
    config = {
        **published.DEEPSEEK_V3,
        "num_hidden_layers": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
    }
    tensors = {
        name: ("BF16" if dtype == "F8_E4M3" else dtype, shape)
        for name, (dtype, shape) in published.deepseek_tensors(config).items()
        if not name.endswith("_scale_inv")
    }
    given = read_model(published.write(tmp_path / "in", config, tensors))
    quarter, all_of_it = (
        told(Model({**config, "num_experts_per_tok": chosen}, given.packed, None)).work for chosen in (4, 16)
    )
    experts = sum(prod(shape) for name, (_, shape) in tensors.items() if ".experts." in name)
    assert all_of_it.matmul - quarter.matmul == 5 * 2 * 32 * 512 * experts * 3 // 4


def test_a_70b_is_quantized_on_one_device_layer_by_layer(tmp_path: Path) -> None:
    given = model(tmp_path, published.LLAMA_3_70B)
    found = told(given, samples=128, length=2048, device="cuda:0")
    layer = 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    hidden = 128 * 2048 * 8192 * 2
    assert layer < found.on_device < 40 * GIB  # a device of 80 does, one of 16 does not
    assert 2 * hidden < found.host < 40 * GIB < found.nbytes
    on_cpu = told(given, samples=128, length=2048)
    assert on_cpu.on_device == 0
    assert on_cpu.host > found.host


def test_qwen_72b_cannot_be_shared_by_8_and_is_told_what_would(tmp_path: Path) -> None:
    given = model(tmp_path, published.QWEN_25_72B)
    found = told(given, tensor_parallel_size=8)
    assert found.pad_to == 29696
    assert found.problems == (
        "model.layers.0.mlp.down_proj.weight: 29568 / 8 = 3696 is not a multiple of 128, in which its quantization "
        "comes; sizes that work: 1, 3, 7, 11, 21, 33; padded to 29696 it works (--pad-to-tp 8)",
    )
    assert told(given, tensor_parallel_size=1).problems == ()
    with open_source(tmp_path / "in", data=False) as opened:
        padded, _ = pad_to(read_checkpoint(opened), tensor_parallel_size=8, group=128)
    after = told(model_of(padded), tensor_parallel_size=8)
    assert after.problems == after.warnings == ()
    assert after.result > found.result


def test_heads_that_cannot_be_shared_are_not_padded(tmp_path: Path) -> None:
    given = model(tmp_path)
    found = told(given, tensor_parallel_size=16)
    assert any("8 units cannot be shared by 16 ranks" in each or "o_proj" in each for each in found.problems)
    few = model(tmp_path / "few", CONFIG | {"intermediate_size": 2048, "num_attention_heads": 16})
    found = told(few, tensor_parallel_size=16, group_size=128)
    (problem,) = [each for each in found.problems if "o_proj" in each]
    assert "1024 / 16 = 64 is not a multiple of 128" in problem
    assert "--pad-to-tp" not in problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"symmetric": False}, "symmetric GPTQ alone"),
        ({"act_order": True}, "refuses GPTQ with desc_act and groups"),
        ({"group_size": 16}, "groups of 32, 64 or 128, or one a row, not of 16"),
        ({"bits": 2}, "4 and 8 bits, not of 2"),
    ],
)
def test_what_vllm_refuses_is_a_warning(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = model(tmp_path)
    (warning,) = told(given, **options).warnings
    assert warning.startswith("vLLM ")
    assert words in warning
    assert told(given, group_size=-1, act_order=True).warnings == ()


def test_vllm_needs_whole_groups_of_awq_on_each_rank(tmp_path: Path) -> None:
    given = model(tmp_path)
    found = told(given, "awq", tensor_parallel_size=4)
    assert found.warnings == (
        "vLLM refuses model.layers.0.mlp.down_proj.qweight at 4 tensor ranks: 1408 / 4 inputs are not a multiple of 128",
    )
    assert told(given, "awq", tensor_parallel_size=4, group_size=32).warnings == ()


def test_it_is_told_in_lines_and_as_json(tmp_path: Path) -> None:
    found = told(model(tmp_path), tensor_parallel_size=4, symmetric=False)
    lines = found.lines()
    assert lines[0] == "gptq, 4 bits, groups of 128: 14 linears in 2 layers"
    assert any(line.startswith("time ") and "estimate" in line for line in lines)
    assert lines[-1].startswith("warning: vLLM")
    assert any("--pad-to-tp 4" in line for line in lines)
    read = json.loads(json.dumps(found.as_json()))
    assert read["result"] == found.result
    assert read["disk"]["total"] == found.disk.total
    assert read["seconds"] == list(found.seconds)


def test_what_is_quantized_or_not_known_is_refused(tmp_path: Path) -> None:
    given = model(tmp_path)
    with pytest.raises(InputError, match="quantized already, by gptq"):
        told(Model(given.config, given.packed, "gptq"))
    with pytest.raises(InputError, match="int3: known are awq, gptq"):
        told(given, "int3")


def test_this_machine_is_measured_in_a_moment() -> None:
    found = measure("cpu", 2)
    assert found.matmul > 1e8
    assert found.matmul32 > 1e8
    assert found.products > 1e6
    assert found.columns > 100
