"""Model types beside cuts written by hand: what a rank holds is what its engine's layers compute with, and all ranks make the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import shardprep_runtime
from lazily import torch
from shardprep.cli import main, render
from shardprep.convert import convert
from shardprep.export import export
from shardprep.split import SplitOptions, split
from shardprep_runtime.errors import LayoutError, UnsupportedError
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 8,
    "num_key_value_heads": 4, "vocab_size": 70, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, untied odd vocabulary, 2 kv heads": {"model_type": "llama", "vocab_size": 67, "num_key_value_heads": 2},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma, one kv head": {"model_type": "gemma", "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2"},
    "gemma3_text": {"model_type": "gemma3_text"},
    "phi3": {"model_type": "phi3"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 8},
}  # fmt: skip


REFUSED_AS_IT_IS = {
    "llama, tied",
    "gemma, one kv head",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "gpt2",
}
"""Sets that transformers 5.23 refuses to load as they are, loudly: its loader of distributed checkpoints wants a tied
head stored under both names, and experts under the names of its own modules, which merge them. These are exported."""


def build(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """A tiny random model of this kind, saved as transformers saves it; the tensors of the files."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(CASES[case])
    model_type = settings.pop("model_type")
    base = {"vocab_size": 70} if model_type == "gpt2" else SIZES
    if model_type in ("qwen2", "phi3"):  # they know no head_dim
        base = {key: value for key, value in base.items() if key != "head_dim"}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**base, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def expected(name: str, full: torch.Tensor, config: Any, tp: int, rank: int) -> torch.Tensor:
    """What the layers of a Megatron-style engine compute with, written down by hand and by name."""
    last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads

    def kv(tensor: torch.Tensor) -> torch.Tensor:
        per_head = tensor.chunk(kv_heads)
        own = per_head[rank * kv_heads // tp : max((rank + 1) * kv_heads // tp, rank * kv_heads // tp + 1)]
        return torch.cat(own)

    if last in ("embed_tokens", "lm_head", "wte"):
        rows = -(-len(full) // tp)
        return full[rank * rows : (rank + 1) * rows]
    if last in ("q_proj", "gate_proj", "up_proj", "w1", "w3"):
        return full.chunk(tp)[rank]
    if last in ("k_proj", "v_proj"):
        return kv(full)
    if last in ("o_proj", "down_proj", "w2"):
        return full.chunk(tp, 1)[rank] if full.ndim == 2 else full
    if last == "qkv_proj":
        size = full.shape[0] // (heads + 2 * kv_heads)
        q, k, v = full.split([heads * size, kv_heads * size, kv_heads * size])
        return torch.cat([q.chunk(tp)[rank], kv(k), kv(v)])
    if last == "gate_up_proj":
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    if last == "c_attn":
        return torch.cat([third.chunk(tp, -1)[rank] for third in full.chunk(3, -1)], -1)
    if last == "c_fc":
        return full.chunk(tp, -1)[rank]
    if last == "c_proj" and full.ndim == 2:
        return full.chunk(tp)[rank]
    return full


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_what_its_layers_compute_with(case: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    tensors = build(case, tmp_path / "in")
    config = AutoConfig.from_pretrained(tmp_path / "in")
    split(
        tmp_path / "in",
        tmp_path / "shards",
        tensor_parallel_size=4,
        options=SplitOptions(max_part_bytes=20_000),
    )
    for tp in (1, 2, 4):
        for rank in range(tp):
            with shardprep_runtime.load(tmp_path / "shards", rank=rank, tensor_parallel_size=tp) as shard:
                assert set(shard.view.tensors) == set(tensors)
                for name, full in tensors.items():
                    want = expected(name, full, config, tp, rank)
                    assert torch.equal(shard[name], want), (name, tp, rank)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_read_by_transformers_and_exported_bit_for_bit(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint import CheckpointException
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    build(case, tmp_path / "in")
    split(tmp_path / "in", tmp_path / "shards", tensor_parallel_size=4)
    export(tmp_path / "shards", tmp_path / "exported")
    convert(tmp_path / "in", tmp_path / "converted")
    weights = "model.safetensors"
    assert (tmp_path / "exported" / weights).read_bytes() == (tmp_path / "converted" / weights).read_bytes()
    ids = torch.arange(3, 19)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval() for folder in ("in", "exported")]
    if case in REFUSED_AS_IT_IS:
        with (
            pytest.warns(UserWarning, match="torch.distributed is disabled"),
            pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict"),
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    else:
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "shards").eval())
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    assert all(torch.equal(each, logits[0]) for each in logits)


@pytest.mark.parametrize(
    ("case", "grain", "words"),
    [
        ("llama", 3, r"4 units along dim 0 cannot be shared by 3 .*: 1, 2, 4, 8"),
        ("llama", 16, r"8 units along dim . cannot be shared by 16 .*: 1, 2, 4, 8"),
        ("gpt2", 16, r"cannot be shared by 16"),
        ("phi3", 6, r"8 units along dim . cannot be shared by 6 .*: 1, 2, 4, 8"),
    ],
)
def test_a_grain_that_cannot_be_cut_is_refused_with_the_sizes_that_work(
    case: str, grain: int, words: str, tmp_path: Path
) -> None:
    build(case, tmp_path / "in")
    with pytest.raises(LayoutError, match=words):
        split(tmp_path / "in", tmp_path / "out", tensor_parallel_size=grain)
    assert not (tmp_path / "out").exists()


def test_a_type_without_rules_is_cut_by_its_rows_when_asked(tmp_path: Path) -> None:
    build("llama", tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"of_mine"'))
    with pytest.raises(UnsupportedError, match="--allow-generic"):
        split(tmp_path / "in", tmp_path / "out", tensor_parallel_size=4)
    report = split(
        tmp_path / "in", tmp_path / "out", tensor_parallel_size=4, options=SplitOptions(allow_generic=True)
    )
    norms = 4 * 2 * 32 * 4
    assert dict(report.whole) == {
        "model.layers.{layer}.input_layernorm.weight": norms // 2,
        "model.layers.{layer}.post_attention_layernorm.weight": norms // 2,
        "model.norm.weight": 32 * 4,
    }
    assert report.shared_bytes == norms + 32 * 4
    with shardprep_runtime.load(tmp_path / "out", rank=1, tensor_parallel_size=2) as shard:
        assert shard.describe("model.layers.0.mlp.down_proj.weight").shape == (
            16,
            48,
        )  # rows, whatever it computes
    with pytest.raises(LayoutError, match="does not know how vllm cuts"):
        open_set(tmp_path / "out").load(Place(tensor_parallel_size=2, engine="vllm"))
    export(tmp_path / "out", tmp_path / "exported")
    weights = "model.safetensors"
    convert(tmp_path / "in", tmp_path / "converted")
    assert (tmp_path / "exported" / weights).read_bytes() == (tmp_path / "converted" / weights).read_bytes()


def test_what_is_not_cut_is_told_with_what_it_costs(tmp_path: Path) -> None:
    tensors = build("gpt2", tmp_path / "in")
    command = ["split", str(tmp_path / "in"), str(tmp_path / "new"), "-tp", "4", "--dry-run"]
    said = CliRunner().invoke(main, command).output
    cut = ("wte.weight", "c_attn.weight", "c_attn.bias", "c_fc.weight", "c_fc.bias", "c_proj.weight")
    whole = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(cut))
    model = sum(tensor.nbytes for tensor in tensors.values())
    assert (
        f"not cut: {render.size(whole)}, {whole / model:.1%} of the model, which each of the 4 ranks holds"
        in said
    )
    assert f"{render.size(3 * whole)} more in all" in said
    assert "most of it: transformer.wpe.weight" in said
    assert "not cut" not in CliRunner().invoke(main, [*command, "-tp", "1"]).output
