"""A padded checkpoint computes what the checkpoint does, whatever its files are, and is written as any other is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import small_models
from lazily import load_file, torch
from padding import difference, padded, small_config
from shardprep.layout.pad import HARMLESS
from shardprep.source import locate
from shardprep.source.bytes import CHUNK
from shardprep.write.conduct import Conduct
from shardprep_runtime.errors import IntegrityError
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.stores.store import Sink
from sweeps import swept

ONE_PROCESS = pytest.mark.xdist_group("transformers, too")  # one process that has imported transformers

# ------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.slow
@ONE_PROCESS
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gpt2",  # biased, and in x out
        "phi3",  # gate and up in one tensor
    ],
)
def test_a_padded_model_computes_what_it_did(model_type: str, tmp_path: Path) -> None:
    # zeros change no sum, but how a library blocks a sum depends on its length
    assert difference(small_config(model_type), tmp_path) < 1e-12


@ONE_PROCESS
@pytest.mark.slow
# one in seven: a rule of padding is one for all types, and which types have it was found with all
@pytest.mark.parametrize("model_type", swept(sorted(HARMLESS), but=sorted(HARMLESS)[::7]))
def test_types_that_are_padded_compute_what_they_did(model_type: str, tmp_path: Path) -> None:
    assert difference(small_config(model_type), tmp_path) < 1e-12


@ONE_PROCESS
@pytest.mark.slow
def test_in_the_dtypes_of_checkpoints_it_differs_by_rounding_alone(tmp_path: Path) -> None:
    for dtype, most in (("float32", 1e-5), ("bfloat16", 2e-2)):
        assert difference(small_config("llama"), tmp_path / dtype, dtype) < most


# ------------------------------------------------------------------------------------------------------------ sources

CONFIG = small_models.llama_config(intermediate=72, layers=2)


def zeros_behind(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the padded checkpoint must hold: 72 units made 96, the next multiple of 2 x 16."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if ".mlp." in name:
            more = (0, 24) if "down" in name else (0, 0, 0, 24)
            found[name] = torch.nn.functional.pad(tensor, more)
    return found


def expect(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in zeros_behind(tensors).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 96


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_the_files_hold_the_tensors_and_zeros(kind: str, tmp_path: Path) -> None:
    tensors = small_models.random_tensors(small_models.llama_shapes(CONFIG))
    small_models.write_checkpoint(tmp_path / "in", tensors, CONFIG, kind=kind, shards=2)
    index, padding = padded(tmp_path / "in", tmp_path / "out", part_bytes=20_000)
    expect(tmp_path / "out", tensors)
    assert padding.nbytes == 6 * 24 * 32 * 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG | {"intermediate_size": 96}
    assert (tmp_path / "out" / "LICENSE").read_text() == (tmp_path / "in" / "LICENSE").read_text()
    sizes = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert sizes["total_size"] == index.nbytes == sum(t.nbytes for t in tensors.values()) + padding.nbytes


def test_strided_tensors_and_parts_of_a_storage_are_padded(tmp_path: Path) -> None:
    tensors = small_models.random_tensors(small_models.llama_shapes(CONFIG))
    prefix = "model.layers.0.mlp"
    own = dict(tensors)
    own[f"{prefix}.down_proj.weight"] = tensors[f"{prefix}.down_proj.weight"].T.contiguous().T
    own[f"{prefix}.up_proj.weight"] = torch.cat(
        [torch.ones(3, 32).bfloat16(), tensors[f"{prefix}.up_proj.weight"]]
    )[3:]
    small_models.write_checkpoint(tmp_path / "in", own, CONFIG)
    padded(tmp_path / "in", tmp_path / "out")
    expect(tmp_path / "out", tensors)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_tensors_are_cast_as_they_are_padded(kind: str, tmp_path: Path) -> None:
    tensors = small_models.random_tensors(small_models.llama_shapes(CONFIG))
    small_models.write_checkpoint(tmp_path / "in", tensors, CONFIG, kind=kind)
    padded(tmp_path / "in", tmp_path / "out", dtype="F16")
    expect(tmp_path / "out", {name: tensor.half() for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def test_rows_longer_than_what_is_read_at_a_time_are_padded(tmp_path: Path) -> None:
    units = CHUNK // 2 + 7
    config = small_models.llama_config(heads=2, head_dim=8, kv_heads=2, layers=1, intermediate=units)
    tensors = small_models.random_tensors(small_models.llama_shapes(config))
    small_models.write_checkpoint(tmp_path / "in", tensors, config)
    index, _ = padded(tmp_path / "in", tmp_path / "out", group=8)
    down = "model.layers.0.mlp.down_proj.weight"
    found = load_file(tmp_path / "out" / "model.safetensors")[down]
    assert found.shape == index.tensors[down].shape > tensors[down].shape
    assert torch.equal(found[:, :units], tensors[down])
    assert not found[:, units:].any()


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_checkpoint_in_a_store_is_read_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = small_models.random_tensors(small_models.llama_shapes(CONFIG))
    small_models.write_checkpoint(tmp_path / "in", tensors, CONFIG, kind=kind)
    asked = []

    class Counting(FolderStore):
        def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
            asked.append(sink.left)
            return super().get(key, start, sink, version=version)

    monkeypatch.setattr(locate, "open_store", lambda uri, access=None: Counting(tmp_path / "in"))
    padded(f"file://{tmp_path / 'in'}", tmp_path / "out")
    expect(tmp_path / "out", tensors)
    held = sum(file.stat().st_size for file in (tmp_path / "in").iterdir())
    assert sum(asked) < 1.5 * held


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.down_proj"])
def test_a_flipped_bit_of_a_padded_tensor_is_found(name: str, tmp_path: Path) -> None:
    tensors = small_models.random_tensors(small_models.llama_shapes(CONFIG))
    small_models.write_checkpoint(tmp_path / "in", tensors, CONFIG)
    file = tmp_path / "in" / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    whole = tensors[f"model.layers.1.{name}.weight"].view(torch.uint8).numpy().tobytes()
    raw[raw.index(whole) + 100] ^= 4
    file.write_bytes(raw)
    with pytest.raises(IntegrityError, match="the file is damaged"):
        padded(tmp_path / "in", tmp_path / "out")


def test_a_run_that_was_stopped_is_resumed_by_one_that_pads_alike(tmp_path: Path) -> None:
    tensors = small_models.random_tensors(small_models.llama_shapes(CONFIG))
    small_models.write_checkpoint(tmp_path / "in", tensors, CONFIG)
    done = [0]

    def fail(count: int) -> None:
        done[0] += count
        if done[0] > 40_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        padded(
            tmp_path / "in",
            tmp_path / "out",
            part_bytes=20_000,
            conduct=Conduct(workers=1, progress=fail),
        )

    def left(**options: Any) -> int:
        """Bytes that the run still writes."""
        told: list[int] = []
        index, _ = padded(
            tmp_path / "in",
            tmp_path / "out",
            part_bytes=20_000,
            conduct=Conduct(workers=1, progress=told.append),
            **options,
        )
        assert sum(told) == index.nbytes
        return sum(told[1:])

    assert 0 < left() < sum(tensor.nbytes for tensor in tensors.values()) - 10_000
    expect(tmp_path / "out", tensors)
