"""What an engine made is taken only where it is all of what was asked for, and gets the source's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantized_models
import small_models
from shardprep.index import Index
from shardprep.layout import Scheme
from shardprep.quantize.names import Names, rename_as_source
from shardprep.quantize.result import check_made, configured
from shardprep.source import open_source, read_checkpoint
from shardprep_runtime.errors import ProblemError

SCHEME = Scheme("gptq", group=16)
CONFIG = small_models.llama_config(heads=4, kv_heads=4, head_dim=8, layers=2, intermediate=64, vocab=64)

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Index:
    return read_checkpoint(
        open_source(small_models.write_model(tmp_path / "source", CONFIG, kind="safetensors"))
    )


@pytest.fixture
def made(source: Index, tmp_path: Path) -> Callable[..., Index]:
    """What an engine made, after `change` was done to its tensors."""
    folder = source.folder.path
    assert folder is not None
    quantized_models.write_quantized(folder, tmp_path / "made", SCHEME)

    def changed(change: Callable[[Tensors], object] = lambda _: None) -> Index:
        path = tmp_path / "made" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        return read_checkpoint(open_source(tmp_path / "made"))

    return changed


def test_what_is_whole_is_taken(made: Callable[..., Index], source: Index) -> None:
    found = check_made(made(), source, SCHEME)
    assert found.modules.count == 2 * 7
    assert found.modules.linears == (
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    assert found.modules.kept == ("lm_head", "model.embed_tokens")


def test_the_config_says_what_is_quantized_and_what_is_not(made: Callable[..., Index], source: Index) -> None:
    index = made()
    how = configured(source.config, index, check_made(index, source, SCHEME), "bfloat16")[
        "quantization_config"
    ]
    assert how["modules_in_block_to_quantize"][0][0] == "mlp.down_proj"
    assert how["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
    assert {key for key in how if "path" in key or key == "meta"} <= {"meta"}


def test_where_layers_differ_every_linear_is_named(made: Callable[..., Index], source: Index) -> None:
    def leave_one_alone(tensors: Tensors) -> None:
        stem = "model.layers.1.mlp.down_proj"
        for name in [name for name in tensors if name.startswith(stem)]:
            del tensors[name]
        tensors[f"{stem}.weight"] = torch.zeros(32, 64)

    found = check_made(made(leave_one_alone), source, SCHEME)
    assert "model.layers.0.mlp.down_proj" in found.modules.linears
    assert "model.layers.1.mlp.down_proj" in found.modules.kept


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "the engine left out lm_head.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "the engine made extra, which the source"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(64, 31)}),
            r"lm_head.weight is \[64, 31\], in the source \[64, 32\]",
        ),
        (lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"][0].fill_(torch.inf), "is not finite"),
        (
            lambda tensors: tensors.update(
                {"model.layers.1.mlp.up_proj.scales": torch.zeros(3, 64, dtype=torch.float16)}
            ),
            "the engine made what cannot be used",
        ),
    ],
)
def test_what_is_not_is_refused(
    made: Callable[..., Index], source: Index, change: Callable[[Tensors], object], said: str
) -> None:
    with pytest.raises(ProblemError, match=said):
        check_made(made(change), source, SCHEME)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (replace(SCHEME, bits=8), "bits 4, asked for was 8"),
        (replace(SCHEME, group=32), "group 16, asked for was 32"),
        (replace(SCHEME, symmetric=False), "symmetric True, asked for was False"),
    ],
)
def test_another_scheme_than_was_asked_for_is_refused(
    made: Callable[..., Index], source: Index, asked: Scheme, said: str
) -> None:
    with pytest.raises(ProblemError, match=said):
        check_made(made(), source, asked)


def test_what_no_engine_keeps_is_not_missed(made: Callable[..., Index], source: Index) -> None:
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {**source.tensors, rotary: replace(source.tensors["model.norm.weight"], name=rotary)}
    older = replace(source, tensors=tensors)
    with pytest.raises(ProblemError, match="left out"):
        check_made(made(), older, SCHEME)
    check_made(made(), older, SCHEME, without=(rotary,))


def test_linears_that_were_taken_apart_are_one_again(made: Callable[..., Index], source: Index) -> None:
    """Output behind output, in the order of the fused tensor, in every field; bytes stay where they are."""
    index = made()
    gate = "model.layers.0.mlp"
    fused = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(gate)}
    for layer in (0, 1):
        stem = f"model.layers.{layer}.mlp"
        for part in ("gate_proj", "up_proj"):
            fused.pop(f"{stem}.{part}.weight", None)
        one = source.tensors[f"{stem}.gate_proj.weight"]
        fused[f"{stem}.gate_up_proj.weight"] = replace(
            one, name=f"{stem}.gate_up_proj.weight", shape=(128, 32)
        )
    found = rename_as_source(index, replace(source, tensors=fused), Names({}, ()))
    qweight = found.tensors[f"{gate}.gate_up_proj.qweight"]
    parts = [index.tensors[f"{gate}.{part}.qweight"] for part in ("gate_proj", "up_proj")]
    assert qweight.shape == (4, 128) and qweight.dim == 1
    assert [(extent.offset, extent.start, extent.stop) for extent in qweight.extents] == [
        (parts[0].extents[0].offset, 0, 64),
        (parts[1].extents[0].offset, 64, 128),
    ]
    assert found.tensors[f"{gate}.gate_up_proj.g_idx"].shape == (32,)
    assert not any(name.startswith(f"{gate}.up_proj") for name in found.tensors)


def test_modules_get_the_names_of_the_source(made: Callable[..., Index], source: Index) -> None:
    known = {"model.layers.0.mlp.up_proj": "model.layers.0.feed_forward.w3"}
    found = rename_as_source(made(), source, Names(known, ()))
    assert (
        found.tensors["model.layers.0.feed_forward.w3.qzeros"].name == "model.layers.0.feed_forward.w3.qzeros"
    )
    assert "model.layers.1.mlp.up_proj.qzeros" in found.tensors
    assert json.dumps(sorted(found.tensors)) == json.dumps(list(found.tensors))
