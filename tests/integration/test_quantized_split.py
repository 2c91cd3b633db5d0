"""Quantized checkpoints are split, viewed, planned and exported like any other, and mean the same afterwards."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import shardprep_runtime
import small_models
from lazily import save_file, torch
from quantized_models import (
    LEGACY,
    legacy_config,
    one_thread,
    quantization_config,
    read_tensors,
    write_quantized,
)
from shardprep.cli import main
from shardprep.export import export
from shardprep.fit.weights import Census
from shardprep.inspect import inspect
from shardprep.layout import ModelLayout, Scheme, derive_layout
from shardprep.model.describe import read_model
from shardprep.quantize.packing import dequantized
from shardprep.split import SplitOptions, split
from shardprep.verify import verify
from shardprep_runtime.errors import InputError, LayoutError, UnsupportedError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.cut import takes
from shardprep_runtime.format.manifest import Quantization
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set

CHECKPOINT = Path(__file__).parent.parent / "data" / "tiny-llama"
ONE_PROCESS = pytest.mark.xdist_group("transformers, too")  # one process that has imported transformers

GROUP = 32
FORMATS: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "gptq": (Scheme("gptq", group=GROUP), {}),
    "gptq act-order": (Scheme("gptq", group=GROUP, act_order=True), {}),
    "gptq v2 rows": (Scheme("gptq", group=None, symmetric=False, format="gptq_v2"), {}),
    "autogptq's own file, head, pickled": (
        Scheme("gptq", group=GROUP),
        {"legacy": True, "head": True, "files": "bin"},
    ),
    "awq": (Scheme("awq", group=GROUP, symmetric=False), {}),
    "autoawq's own file": (Scheme("awq", group=GROUP, symmetric=False), {"legacy": True}),
    "compressed-tensors": (Scheme("compressed-tensors", group=GROUP), {}),
    "compressed-tensors act-order": (
        Scheme("compressed-tensors", group=GROUP, symmetric=False, act_order=True),
        {},
    ),
}
QUICK = ("gptq", "autogptq's own file, head, pickled", "awq")


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantized checkpoint and what was split from it."""

    scheme: Scheme
    source: Path
    shards: Path
    tensors: Mapping[str, torch.Tensor]
    grain: int


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with one_thread():
        yield


KNOWN: dict[str, Case] = {}


@pytest.fixture(
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The trained checkpoint in one format, cut at grain 8: more ranks than KV heads."""
    if request.param not in KNOWN:
        scheme, how = FORMATS[request.param]
        folder = tmp_path_factory.mktemp("quantized")
        source = write_quantized(CHECKPOINT, folder / "source", scheme, **how)
        split(
            source,
            folder / "shards",
            tensor_parallel_size=8,
            options=SplitOptions(max_part_bytes=2**18, block_bytes=2**14),
        )
        KNOWN[request.param] = Case(scheme, source, folder / "shards", read_tensors(source), 8)
    return KNOWN[request.param]


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def plain_layout(case: Case, whole: Mapping[str, torch.Tensor]) -> ModelLayout:
    """How the model was cut before it was quantized."""
    config = {key: value for key, value in config_of(case.source).items() if key != "quantization_config"}
    return derive_layout(config, {name: tuple(tensor.shape) for name, tensor in whole.items()})


def joined(case: Case, whole: Mapping[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """The weights of all ranks, each unpacked from its own view alone, put together as the ranks of an engine are."""
    layout = plain_layout(case, whole)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    for rank in range(size):
        with shardprep_runtime.load(case.shards, rank=rank, tensor_parallel_size=size) as shard:
            own = dequantized(dict(shard.items()), case.scheme)
        assert own.keys() == whole.keys()
        for name, tensor in own.items():
            cut = layout.tensors[name].layout
            if cut.dim is None:
                found[name].copy_(tensor)
                continue
            at = 0
            for take in takes(cut, tuple(whole[name].shape), size, size=size, rank=rank):
                length = take.stop - take.start
                target = found[name].narrow(cut.dim, take.piece.start + take.start, length)
                target.copy_(tensor.narrow(cut.dim, at, length))
                at += length
            assert at == tensor.shape[cut.dim]
    return found


# ------------------------------------------------------------------------------------------------- bytes and meaning


def test_it_is_sound_and_what_is_exported_are_the_bits_of_the_checkpoint(case: Case, tmp_path: Path) -> None:
    verify(case.shards)
    export(case.shards, tmp_path / "exported")
    found = read_tensors(tmp_path / "exported")
    assert found.keys() == case.tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in case.tensors.items())


def test_a_view_of_all_ranks_is_the_checkpoint_byte_for_byte(case: Case) -> None:
    with shardprep_runtime.load(case.shards) as shard:
        assert set(shard) == set(case.tensors)
        assert all(same_bits(shard[name], tensor) for name, tensor in case.tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_ranks_unpack_of_their_views_is_what_is_unpacked_of_the_checkpoint(
    case: Case, size: int
) -> None:
    whole = dequantized(case.tensors, case.scheme)
    found = joined(case, whole, size)
    assert all(same_bits(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_view_reads_what_it_keeps_and_no_more(case: Case, size: int) -> None:
    for rank in range(size):
        with shardprep_runtime.load(case.shards, rank=rank, tensor_parallel_size=size) as shard:
            headers = sum(part.header_size for part in shard.view.parts)
            assert shard.bytes_read == shard.nbytes + headers
            assert (shard.bytes_mapped == shard.nbytes) == (size == 8)


def test_a_plan_weighs_each_rank_to_the_byte(case: Case) -> None:
    model = read_model(case.source)
    census = Census(model.layout, model.packed.tensors)
    for size in (1, 2, 4, 8):
        planned = census.weigh(size).stage(0, 6, first=True, last=True)
        for rank in range(size):
            with shardprep_runtime.load(case.shards, rank=rank, tensor_parallel_size=size) as shard:
                assert planned[rank] == shard.nbytes


def test_what_splits_says_how_it_is_quantized(case: Case) -> None:
    scheme = case.scheme
    assert read_manifest(case.shards).quantization == Quantization(
        scheme.method, scheme.bits, scheme.group, scheme.symmetric, scheme.act_order, scheme.format
    )
    config = config_of(case.shards)
    assert config["quantization_config"]["quant_method"] == scheme.method
    if "quantization_config" in config_of(case.source):
        how = config_of(case.source)["quantization_config"]
        given = {key: value for key, value in how.items() if value is not None}
        assert config["quantization_config"].items() >= given.items()
    else:
        assert config["quantization_config"]["group_size"] == GROUP
    if scheme.method in (
        "gptq",
        "awq",
    ):  # an engine that cannot look into the parts is told what is quantized
        kept = config["quantization_config"]["modules_to_not_convert"]
        assert "model.embed_tokens" in kept and not [name for name in kept if name.endswith("_proj")]
    if scheme.method == "gptq" and "lm_head" not in config["quantization_config"]:
        linears = config["quantization_config"]["modules_in_block_to_quantize"]
        assert {"self_attn.q_proj", "mlp.down_proj"} <= set(linears[0])
    del config["quantization_config"]
    original = config_of(case.source)
    original.pop("quantization_config", None)
    assert config == original
    for name in LEGACY.values():  # they travel
        assert (case.shards / name).exists() == (case.source / name).exists()


def test_inspect_shows_the_scheme_and_the_numbers_of_the_model(case: Case) -> None:
    numbers = sum(tensor.numel() for tensor in read_tensors(CHECKPOINT).values())
    for folder in (case.source, case.shards):
        found = inspect(folder)
        assert found.parameters == numbers
        assert found.quantization is not None
        assert dataclasses.replace(found.quantization, kept=()) == case.scheme
        done = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
        shown = json.loads(done.stdout)
        assert (shown["parameters"], shown["quantization"]["group"]) == (numbers, case.scheme.group)


def test_inspect_says_it_in_words(tmp_path: Path) -> None:
    source = write_quantized(CHECKPOINT, tmp_path / "q", Scheme("gptq", group=GROUP, act_order=True))
    shown = CliRunner().invoke(main, ["inspect", str(source)]).stdout
    assert "quantized: gptq, 4 bits, groups of 32, symmetric, act-order (packed as gptq)" in shown
    assert "2,295,424 parameters" in shown
    config = config_of(source)
    config["quantization_config"] = {"quant_method": "magic"}
    (source / "config.json").write_text(json.dumps(config))
    shown = CliRunner().invoke(main, ["inspect", str(source)]).stdout
    assert "quantized in a way that is not known: config.json: quantized by magic" in shown


# ------------------------------------------------------------------------------------------------------- other models


def moe_config() -> dict[str, Any]:
    """The config.json of a small Qwen3-MoE."""
    config = small_models.llama_config(heads=8, kv_heads=2, intermediate=128, layers=2, vocab=64)
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def moe_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {name: shape for name, shape in small_models.llama_shapes(config).items() if ".mlp." not in name}
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes[f"{stem}.mlp.gate.weight"] = (config["num_experts"], hidden)
        shapes |= {f"{stem}.self_attn.{word}_norm.weight": (config["head_dim"],) for word in "qk"}
        for expert in range(config["num_experts"]):
            own = f"{stem}.mlp.experts.{expert}"
            shapes |= {f"{own}.{word}_proj.weight": (inner, hidden) for word in ("gate", "up")}
            shapes[f"{own}.down_proj.weight"] = (hidden, inner)
    return shapes


def qwen_config() -> dict[str, Any]:
    config = small_models.llama_config(heads=8, kv_heads=2, intermediate=128, layers=2, vocab=64)
    return config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def qwen_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """A Llama with biases beside q, k and v."""
    shapes = small_models.llama_shapes(config)
    biases = {
        name.replace(".weight", ".bias"): (shape[0],)
        for name, shape in shapes.items()
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    }
    return shapes | biases


def phi_config() -> dict[str, Any]:
    sizes = {"heads": 8, "kv_heads": 2, "intermediate": 128, "layers": 2, "vocab": 64}
    return small_models.phi3_config(**sizes, pad_token_id=0, original_max_position_embeddings=64)


MODELS = {
    "qwen2": (qwen_config, qwen_shapes),
    "phi3": (phi_config, small_models.phi3_shapes),
    "qwen3_moe": (moe_config, moe_shapes),
}
SCHEMES = {
    "gptq": Scheme("gptq", group=16),
    "gptq act-order": Scheme("gptq", group=16, symmetric=False, act_order=True),
    "awq": Scheme("awq", group=16, symmetric=False),
    "compressed-tensors": Scheme("compressed-tensors", group=16, symmetric=False),
}


QUICK_PAIRS = (("qwen2", "compressed-tensors"), ("phi3", "awq"), ("qwen3_moe", "gptq act-order"))


def small_case(model: str, scheme: Scheme, folder: Path) -> Case:
    """A small model of random weights, quantized and cut at grain 4."""
    make, shapes = MODELS[model]
    config = make()
    tensors = small_models.random_tensors(shapes(config))
    tensors = {name: tensor * 0.1 for name, tensor in tensors.items()}
    small_models.write_checkpoint(folder / "before", tensors, config, kind="safetensors")
    source = write_quantized(folder / "before", folder / "source", scheme)
    split(source, folder / "shards", tensor_parallel_size=4)
    return Case(scheme, source, folder / "shards", read_tensors(source), 4)


@pytest.mark.parametrize(
    ("model", "how"),
    [
        pair if pair in QUICK_PAIRS else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(MODELS, SCHEMES)
    ],
)
def test_biases_fused_tensors_and_experts_are_cut_with_what_they_belong_to(
    model: str, how: str, tmp_path: Path
) -> None:
    case = small_case(model, SCHEMES[how], tmp_path)
    whole = dequantized(case.tensors, case.scheme)
    before = read_tensors(tmp_path / "before")
    assert whole.keys() == before.keys()
    for size in (1, 2, 4):
        found = joined(case, whole, size)
        assert all(same_bits(found[name], tensor) for name, tensor in whole.items())
    export(case.shards, tmp_path / "exported")
    exported = read_tensors(tmp_path / "exported")
    assert all(same_bits(exported[name], tensor) for name, tensor in case.tensors.items())


def test_expert_parallel_ranks_hold_whole_quantized_experts(tmp_path: Path) -> None:
    case = small_case("qwen3_moe", SCHEMES["gptq act-order"], tmp_path)
    held: list[str] = []
    for rank in range(2):
        with open_set(case.shards).load(
            Place(rank=rank, tensor_parallel_size=2, expert_parallel_size=2)
        ) as shard:
            own = [name for name in shard if ".experts." in name]
            assert all(same_bits(shard[name], case.tensors[name]) for name in own)
            held += own
    assert sorted(held) == sorted(name for name in case.tensors if ".experts." in name)


def logits(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
    """What transformers computes in float32 with these weights."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, plain["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@ONE_PROCESS
@pytest.mark.slow
@pytest.mark.parametrize("how", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_assembled_views_compute_the_very_logits_of_the_checkpoint(
    model: str, how: str, tmp_path: Path
) -> None:
    case = small_case(model, SCHEMES[how], tmp_path)
    whole = dequantized(case.tensors, case.scheme)
    expected = logits(tmp_path / "whole", whole, config_of(case.source))
    plain = logits(tmp_path / "plain", read_tensors(tmp_path / "before"), config_of(case.source))
    assert torch.isfinite(expected).all() and not torch.equal(plain, expected)
    for size in (2, 4):
        found = logits(tmp_path / f"of {size}", joined(case, whole, size), config_of(case.source))
        assert torch.equal(found, expected)


@ONE_PROCESS
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_trained_checkpoint_computes_the_very_same_logits_from_its_views(
    name: str, tmp_path: Path
) -> None:
    scheme, how = FORMATS[name]
    source = write_quantized(CHECKPOINT, tmp_path / "source", scheme, **how)
    split(source, tmp_path / "shards", tensor_parallel_size=8)
    case = Case(scheme, source, tmp_path / "shards", read_tensors(source), 8)
    whole = dequantized(case.tensors, scheme)
    expected = logits(tmp_path / "whole", whole, config_of(source))
    plain = logits(tmp_path / "plain", read_tensors(CHECKPOINT), config_of(source))
    spread = (plain - plain.mean(-1, keepdim=True)).norm()
    assert 0 < (expected - plain).norm() < 0.5 * spread  # it is the trained model still
    for size in (2, 4, 8):
        assert torch.equal(
            logits(tmp_path / str(size), joined(case, whole, size), config_of(source)), expected
        )


@pytest.mark.slow
@pytest.mark.parametrize("how", SCHEMES)
def test_workers_of_a_larger_model_read_hardly_more_than_they_keep(how: str, tmp_path: Path) -> None:
    scheme = dataclasses.replace(SCHEMES[how], group=64)
    sizes = {"heads": 16, "kv_heads": 8, "head_dim": 64, "intermediate": 3072, "layers": 2, "vocab": 2048}
    small_models.write_model(tmp_path / "before", small_models.llama_config(**sizes))
    source = write_quantized(tmp_path / "before", tmp_path / "source", scheme)
    report = split(source, tmp_path / "shards", tensor_parallel_size=8)
    assert report.stored_bytes <= 1.02 * report.source_bytes
    for size in (1, 2, 4, 8):
        for rank in range(size):
            with shardprep_runtime.load(tmp_path / "shards", rank=rank, tensor_parallel_size=size) as shard:
                assert shard.bytes_read <= 1.02 * shard.nbytes


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_size_that_splits_a_group_is_refused_with_the_sizes_that_work_and_what_to_do(
    tmp_path: Path,
) -> None:
    config = small_models.llama_config(heads=8, kv_heads=8, head_dim=16, intermediate=672, layers=1)
    small_models.write_model(tmp_path / "before", config)
    source = write_quantized(tmp_path / "before", tmp_path / "q", Scheme("gptq", group=32))
    with pytest.raises(LayoutError) as error:
        split(source, tmp_path / "out", tensor_parallel_size=2)
    assert str(error.value) == (
        "model.layers.0.mlp.down_proj.weight: 672 inputs, quantized in groups of 32, cannot be shared by 2 tensor "
        "ranks: 672 / 2 = 336 is not a multiple of 32; tensor parallel sizes that work for this checkpoint: 1; "
        "`shardprep quantize --pad-to-tp 2` of the original makes one that 2 can share"
    )
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source)
    config["intermediate_size"] = 640  # 10 groups of 64
    small_models.write_model(tmp_path / "wider", config)
    source = write_quantized(tmp_path / "wider", tmp_path / "q", Scheme("gptq", group=64))
    with pytest.raises(
        LayoutError, match=r"sizes that work .*: 1, 2; .*--pad-to-tp 4.* or .*--group-size 32"
    ):
        split(source, tmp_path / "out", tensor_parallel_size=4)
    split(source, tmp_path / "out", tensor_parallel_size=2)


def test_a_head_that_is_no_whole_group_is_not_split_between_ranks(tmp_path: Path) -> None:
    config = small_models.llama_config(heads=4, kv_heads=4, head_dim=16, intermediate=128, layers=1)
    small_models.write_model(tmp_path / "before", config)
    source = write_quantized(tmp_path / "before", tmp_path / "q", Scheme("awq", group=32, symmetric=False))
    with pytest.raises(LayoutError, match=r"o_proj.weight: 64 inputs, quantized in groups of 32") as error:
        split(source, tmp_path / "out", tensor_parallel_size=4)
    assert "--pad-to-tp" not in str(error.value)  # heads cannot be padded


def test_act_order_has_no_group_in_the_way_and_every_rank_all_scales(tmp_path: Path) -> None:
    config = small_models.llama_config(heads=4, kv_heads=4, head_dim=16, intermediate=128, layers=1)
    small_models.write_model(tmp_path / "before", config)
    scheme = Scheme("gptq", group=32, act_order=True)
    source = write_quantized(tmp_path / "before", tmp_path / "q", scheme)
    split(source, tmp_path / "out", tensor_parallel_size=4)
    whole = read_tensors(source)
    for rank in range(4):
        with shardprep_runtime.load(tmp_path / "out", rank=rank, tensor_parallel_size=4) as shard:
            stem = "model.layers.0.self_attn.o_proj"
            for name in ("scales", "qzeros"):
                assert same_bits(shard[f"{stem}.{name}"], whole[f"{stem}.{name}"])
            assert same_bits(shard[f"{stem}.g_idx"], whole[f"{stem}.g_idx"][16 * rank : 16 * (rank + 1)])


def changed(source: Path, change: Any) -> None:
    """config.json with its quantization_config changed."""
    config = config_of(source)
    change(config["quantization_config"])
    (source / "config.json").write_text(json.dumps(config))


def test_tensors_of_other_sizes_than_the_config_says_are_refused(tmp_path: Path) -> None:
    source = write_quantized(CHECKPOINT, tmp_path / "q", Scheme("gptq", group=GROUP))
    changed(source, lambda how: how.update(group_size=64))
    with pytest.raises(
        InputError, match=r"down_proj\.(qzeros|scales): 16 along dim 0 for 512 inputs; .* each 64"
    ):
        split(source, tmp_path / "out", tensor_parallel_size=2)
    changed(source, lambda how: how.update(group_size=GROUP, bits=8))
    with pytest.raises(InputError):
        split(source, tmp_path / "out", tensor_parallel_size=2)
    changed(source, lambda how: how.update(bits=3))
    with pytest.raises(UnsupportedError, match="3 bits"):
        split(source, tmp_path / "out", tensor_parallel_size=2)


def test_packed_numbers_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    scheme = Scheme("gptq", group=GROUP)
    source = write_quantized(CHECKPOINT, tmp_path / "q", scheme, legacy=True)
    (source / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=r"packed numbers, but neither config\.json .* says how"):
        split(source, tmp_path / "out", tensor_parallel_size=2)


def test_a_report_beside_the_weights_goes_into_the_manifest(tmp_path: Path) -> None:
    source = write_quantized(CHECKPOINT, tmp_path / "q", Scheme("gptq", group=GROUP))
    report = {"summary": {"kl": 0.0123, "perplexity": 57.5}, "layers": [1, 2]}
    (source / "quantization_report.json").write_text(json.dumps(report))
    split(source, tmp_path / "out", tensor_parallel_size=2)
    found = read_manifest(tmp_path / "out").quantization
    assert found is not None and found.report is not None
    assert found.report.summary == report["summary"]
    raw = (tmp_path / "out" / "quantization_report.json").read_bytes()
    assert found.report.digest == manifests.digest_of(raw)
    assert json.loads(raw) == report
    (source / "quantization_report.json").write_text('{"summary": {"kl": Infinity}}')
    with pytest.raises(InputError, match="a number in its summary is not finite"):
        split(source, tmp_path / "again", tensor_parallel_size=2)


def test_config_and_legacy_file_of_each_tool_are_what_it_writes() -> None:
    """What the tests above rest on, as it stands in checkpoints on the hub."""
    assert legacy_config(Scheme("awq", symmetric=False)) == {
        "zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM",
    }  # fmt: skip
    assert quantization_config(Scheme("awq", symmetric=False)) == {
        "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
