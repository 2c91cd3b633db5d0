"""What a measurement is made of: batches without padding, hidden states on disk, rows of an embedding."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from lazily import torch
from shardprep.quantize import quality
from shardprep.quantize.quality import LayerQuality, Quality, measure
from shardprep.quantize.unquantized import Unquantized
from shardprep.source import open_source, read_checkpoint
from shardprep_runtime.errors import InputError, WriteError
from small_models import llama_config, llama_shapes, random_tensors, write_checkpoint, write_model


def test_sequences_of_one_length_run_together_and_none_is_padded() -> None:
    sequences = [list(range(length)) for length in (5, 3, 5, 2, 5, 3)]
    batches = list(quality._batches(sequences, heads=4))
    assert [tuple(batch.shape) for batch in batches] == [(3, 5), (2, 3), (1, 2)]
    assert sorted(row.tolist() for batch in batches for row in batch) == sorted(sequences)


def test_long_sequences_run_by_themselves() -> None:
    batches = list(quality._batches([[1] * 5000] * 2, heads=64))
    assert [tuple(batch.shape) for batch in batches] == [(1, 5000), (1, 5000)]
    scores = [len(batch) * 64 * 4 * 600**2 for batch in quality._batches([[1] * 600] * 9, heads=64)]
    assert max(scores) <= quality.SCORES and len(scores) > 1


@pytest.mark.parametrize("limit", [0, 2**30])
def test_hidden_states_are_the_same_from_memory_and_from_disk(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "IN_MEMORY", limit)
    states = quality._States(tmp_path, "original", tokens=2 * 7 + 5)
    for value in (torch.randn(2, 7, 8), torch.randn(2, 7, 8)):
        states.keep(0, value)
        states.keep(1, value[:1, :5])
        assert torch.equal(states.of(0), value) and torch.equal(states.of(1), value[:1, :5])
    assert len(list(tmp_path.iterdir())) == (2 if limit == 0 else 0)


def test_a_full_disk_is_told_before_anything_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, start: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quality, "IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    states = quality._States(tmp_path, "original", tokens=7)
    with pytest.raises(WriteError, match=r"no room for hidden states of 448 bytes: No space left.*TMPDIR"):
        states.keep(0, torch.zeros(1, 7, 8))


def test_a_quality_is_plain_json() -> None:
    found = Quality(100, 12.5, 12.0, 0.01, 0.99, (LayerQuality(0, 0.1, 0.1), LayerQuality(1, 0.05, 0.12)))
    told = found.as_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert set(told) == {"tokens", "perplexity", "perplexity_before", "kl", "agreement", "layers"}
    assert told["layers"][1] == {"layer": 1, "error": 0.05, "drift": 0.12}


@pytest.mark.parametrize("sequences", [[], [[1, 2], [3]]])
def test_text_that_predicts_nothing_is_refused(sequences: list[list[int]], tmp_path: Path) -> None:
    with open_source(write_model(tmp_path)) as source:
        index = read_checkpoint(source)
        with pytest.raises(InputError, match="nothing to measure: expected sequences of at least two tokens"):
            measure(index, index, sequences)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_rows_are_those_of_the_whole_tensor(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep.quantize.unquantized.CHUNK", 1000)  # a few rows of 64 bytes
    config = llama_config(vocab=203)
    tensors = random_tensors(llama_shapes(config))
    name = "model.embed_tokens.weight"
    with (
        open_source(write_checkpoint(tmp_path, tensors, config, kind=kind)) as source,
        closing(Unquantized(read_checkpoint(source))) as found,
    ):
        assert torch.equal(found.read(name), tensors[name])
        for rows in ([0, 1, 15, 16, 17, 100, 202], list(range(203)), [202], []):
            assert torch.equal(found.read_rows(name, rows), tensors[name][rows])
