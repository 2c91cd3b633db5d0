"""Models of many architectures, cut into stages, say what transformers' generate says of the whole. No code knows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lazily import torch
from quantized_models import one_thread
from stages_models import cuts, generated, greedy, layers_of, make_set, prompt, stages_of, whole
from sweeps import swept

# one process that has imported transformers
pytestmark = pytest.mark.xdist_group("transformers, too")

TOKENS = 8

CHOSEN = ("bamba", "bloom", "gemma3_text", "gpt2", "mamba2", "mixtral", "opt", "qwen2_moe", "qwen3_next")
"""Tied heads, experts that are fused, windows, positions of its own, states of linear attention. No code of stages
knows an architecture, so that these stand for all others, which differ in what is within a layer."""

FIRST = ("gemma3_text", "qwen2_moe", "qwen3_next")
"""Those that the quick run has, too: windows, experts, and states."""

TYPES = (
    *CHOSEN, "afmoe", "apertus", "arcee", "aria_text", "bailing_hybrid", "biogpt", "bitnet", "codegen", "cohere",
    "cohere2", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama", "doge", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2",
    "gemma3", "glm", "glm4", "glm4_moe", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite",
    "granitemoe", "granitemoehybrid", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe",
    "kimi_linear", "lfm2", "lfm2_moe", "llama", "llama4_text", "mamba", "minimax_m2", "ministral", "mistral", "mpt",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen3",
    "qwen3_5_text", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with one_thread():
        yield


@pytest.mark.parametrize(
    "model_type",
    [
        *FIRST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in CHOSEN if name not in FIRST),
        *swept((name for name in TYPES if name not in CHOSEN), marks=pytest.mark.slow),
    ],
)
def test_stages_say_what_the_whole_model_says(model_type: str, tmp_path: Path) -> None:
    shards = make_set(model_type, tmp_path)
    model = whole(shards)
    expected = generated(model, prompt(), TOKENS)
    with torch.no_grad():
        logits = model(prompt(), use_cache=False).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    for cut in cuts(layers_of(shards)):
        stages = stages_of(shards, cut, dtype="float32")
        assert torch.equal(greedy(stages, prompt(), TOKENS), expected), cut
        given = prompt()
        for stage in stages:
            given = stage.forward(given)
        # not bit for bit: a mask that is not needed may be left out
        torch.testing.assert_close(given, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
