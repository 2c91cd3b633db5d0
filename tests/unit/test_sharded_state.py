"""The record of exported sharded_state files says who may load them; what must be said in config.json is said there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_models
from lazily import save_file, torch
from quantized_models import write_quantized
from shardprep.cli import main
from shardprep.layout.quantization import Scheme
from shardprep.split import split
from shardprep.vllm.record import (
    RECORD,
    Record,
    StateFile,
    check_record,
    dump_record,
    parse_record,
    read_record,
    verify_record,
)
from shardprep.vllm.sharded_state import explicit_config, export_sharded_state
from shardprep_runtime.errors import (
    FormatError,
    InputError,
    IntegrityError,
    LayoutError,
    ManifestError,
    UnsupportedError,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Manifest, Quantization, SideFile, digest_of
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.format.write_manifest import dump_manifest


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as an export for TP 2 leaves it, small."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text("{}\n")
    files = []
    for rank in (0, 1):
        path = folder / f"model-rank-{rank}-part-0.safetensors"
        save_file({"weight": torch.full((300, 1000), rank, dtype=torch.float32)}, path)
        files.append(StateFile(path.name, path.stat().st_size, digest_of(path.read_bytes()), 0, rank))
    record = Record(
        vllm="0.32.0+cpu",
        torch="2.13.0+cpu",
        shardprep="0.1.0",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        quantization=None,
        tensor_parallel_size=2,
        pipeline_parallel_size=1,
        expert_parallel=False,
        manifest_digest=digest_of(b"a manifest"),
        files=tuple(files),
        side_files=(SideFile("config.json", 3, digest_of(b"{}\n")),),
    )
    (folder / RECORD).write_bytes(dump_record(record))
    return folder


@pytest.fixture
def record(exported: Path) -> Record:
    return read_record(exported)[0]


# -------------------------------------------------------------------------------------------------------------- record


def test_a_record_is_read_as_it_was_written_and_unknown_keys_are_ignored(
    exported: Path, record: Record
) -> None:
    raw = (exported / RECORD).read_bytes()
    assert dump_record(record) == raw
    assert parse_record(json.dumps(json.loads(raw) | {"later": 1}).encode()) == record


def test_a_vllm_of_the_same_release_and_grid_may_load_the_files(record: Record) -> None:
    for version in ("0.32.0", "0.32.0+cu129", "0.32.0+cpu"):
        check_record(record, version, 2, 1)
        check_record(json.loads(dump_record(record)), version, 2, 1, expert_parallel=False)


@pytest.mark.parametrize(
    ("version", "tp", "pp", "ep", "message"),
    [
        ("0.33.0", 2, 1, None, r"vLLM 0\.32\.0\+cpu's, and this is vLLM 0\.33\.0.*vllm==0\.32\.0, or export"),
        ("0.32.1", 2, 1, None, r"install vllm==0\.32\.0"),
        (
            "0.32.0",
            4,
            1,
            None,
            r"start vLLM with --tensor-parallel-size 2 .*or export the shard set again with -tp 4",
        ),
        ("0.32.0", 1, 2, None, r"not 1 and 2"),
        ("0.32.0", 2, 1, True, r"without --enable-expert-parallel"),
    ],
)
def test_any_other_is_told_what_to_do(
    record: Record, version: str, tp: int, pp: int, ep: bool | None, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_record(record, version, tp, pp, expert_parallel=ep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "shardprep"}, "no record of sharded_state files"),
        ({"version": 2}, "newer than 1"),
        ({"version": "1"}, "newer than 1"),
        ({"vllm": 32}, "vllm is 32, expected str"),
        ({"tensor_parallel_size": True}, "expected int"),
        ({"tensor_parallel_size": -2}, "expected int"),
        ({"files": [{"path": "../../etc/passwd", "size": 1, "digest": "sha256:" + "0" * 64}]}, "etc/passwd"),
        ({"files": [{"path": "a", "size": 1, "digest": "md5:0"}]}, "expected sha256"),
        ({"side_files": None}, "expected list"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(
    record: Record, change: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        parse_record(json.dumps(json.loads(dump_record(record)) | change).encode())


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Record)] + ["format", "version"])
def test_a_record_lacks_nothing(record: Record, key: str) -> None:
    fields = json.loads(dump_record(record))
    del fields[key]
    with pytest.raises(ManifestError, match=key if key != "format" else "no record"):
        parse_record(json.dumps(fields).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"format": 1, "format": 2}'])
def test_what_is_no_record_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_record(raw)


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_reads_every_byte_of_every_file(exported: Path) -> None:
    found = verify_record(exported)
    assert (found.files, found.side_files) == (2, 1)
    assert found.nbytes == sum(path.stat().st_size for path in exported.glob("*.safetensors"))
    assert verify_record(exported, fast=True).nbytes == 0
    assert verify_record(exported, record_digest=found.record_digest) == found


def test_verify_names_the_file_that_was_changed(exported: Path) -> None:
    path = exported / "model-rank-1-part-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)
    verify_record(exported, fast=True)
    with pytest.raises(IntegrityError, match=r"model-rank-1-part-0\.safetensors: does not match its digest"):
        verify_record(exported)


def test_verify_names_the_file_that_is_short_or_missing_even_when_it_is_fast(exported: Path) -> None:
    path = exported / "model-rank-0-part-0.safetensors"
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(size - 1)
    with pytest.raises(IntegrityError, match=f"has {size - 1} bytes, expected {size}"):
        verify_record(exported, fast=True)
    path.unlink()
    with pytest.raises(FormatError, match="model-rank-0-part-0"):
        verify_record(exported, fast=True)


def test_verify_finds_a_changed_config(exported: Path) -> None:
    (exported / "config.json").write_text('{"dtype": "float16"}\n')
    with pytest.raises(IntegrityError, match=r"config\.json: does not match"):
        verify_record(exported, fast=True)


def test_verify_knows_the_folder_by_its_record(exported: Path) -> None:
    found = CliRunner().invoke(main, ["verify", str(exported)])
    assert found.exit_code == 0, found.output
    assert "sound: 2 sharded_state files of vLLM 0.32.0+cpu, -tp 2 -pp 1" in found.output
    report = json.loads(CliRunner().invoke(main, ["verify", str(exported), "--json"]).output)
    assert report["files"] == 2 and report["record_digest"] == digest_of((exported / RECORD).read_bytes())
    pinned = CliRunner().invoke(main, ["verify", str(exported), "--manifest-digest", "sha256:" + "0" * 64])
    assert pinned.exit_code == 2 and f"its digest is {report['record_digest']}" in pinned.output


def test_a_folder_with_neither_manifest_nor_record_is_told_as_before(exported: Path) -> None:
    (exported / RECORD).unlink()
    refused = CliRunner().invoke(main, ["verify", str(exported)])
    assert refused.exit_code == 2 and "no manifest here" in refused.output


# -------------------------------------------------------------------------------------------------------------- config


def make_shards(folder: Path, scheme: Scheme | None = None) -> Manifest:
    config = small_models.llama_config(heads=4, head_dim=32, intermediate=256)
    source = small_models.write_model(folder / "source", config, kind="safetensors")
    if scheme is not None:
        source = write_quantized(source, folder / "quantized", scheme)
    split(source, folder / "shards", tensor_parallel_size=2)
    return read_manifest(folder / "shards")


def configured(manifest: Manifest, how: Mapping[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    raw = explicit_config({"model_type": "llama", "quantization_config": how}, manifest, dtype)
    found: dict[str, Any] = json.loads(raw)["quantization_config"]
    return found


def test_the_config_names_the_dtype_of_the_files_in_its_own_way(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    assert json.loads(explicit_config({}, manifest, "float16")) == {"dtype": "float16"}
    old = json.loads(explicit_config({"torch_dtype": "float32"}, manifest, "bfloat16"))
    assert old == {"torch_dtype": "bfloat16"}


def test_gptq_is_told_which_linears_are_quantized_also_where_patterns_leave_some_out(tmp_path: Path) -> None:
    scheme = Scheme("gptq", bits=4, group=32, kept=(r"re:.*layers\.1\.mlp.*",))
    manifest = make_shards(tmp_path, scheme)
    (found,) = configured(manifest, {"quant_method": "gptq", "dynamic": {r"-:.*layers\.1\.mlp.*": {}}})[
        "modules_in_block_to_quantize"
    ]
    packed = {name.removesuffix(".qweight") for name in manifest.tensors if name.endswith(".qweight")}
    assert set(found) == packed and "model.layers.1.mlp.up_proj" not in packed and len(packed) == 4 * 7 - 3


def test_awq_is_told_which_modules_are_not_quantized(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, Scheme("awq", bits=4, group=32, symmetric=False))
    assert configured(manifest, {"quant_method": "awq"})["modules_to_not_convert"] == [
        "lm_head",
        "model.embed_tokens",
    ]


def test_lists_that_are_there_stay(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, Scheme("gptq", bits=4, group=32))
    how = {"quant_method": "gptq", "modules_in_block_to_quantize": [["q_proj"]]}
    assert configured(manifest, how)["modules_in_block_to_quantize"] == [["q_proj"]]


def test_a_language_model_within_another_has_its_lists_too(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, Scheme("awq", bits=4, group=32, symmetric=False))
    how = {"quant_method": "awq"}
    config = {"text_config": {"model_type": "llama", "quantization_config": how}}
    found = json.loads(explicit_config(config, manifest, "bfloat16"))
    assert found["text_config"]["quantization_config"]["modules_to_not_convert"]
    assert how == {"quant_method": "awq"}  # what was given is not changed


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_a_cpu_keeps_otherwise_than_a_gpu_is_refused_before_vllm_is_asked(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    quantized = dataclasses.replace(
        manifest, quantization=Quantization("fp8", 8, None, True, False, "float-quantized")
    )
    (tmp_path / "shards" / manifests.FILE_NAME).write_bytes(dump_manifest(quantized))
    with pytest.raises(UnsupportedError, match=r"quantized by fp8.*serve the shard set itself"):
        export_sharded_state(tmp_path / "shards", tmp_path / "new", tensor_parallel_size=2)
    assert not (tmp_path / "new").exists()


def test_a_size_that_the_shard_set_does_not_have_is_refused_before_vllm_is_asked(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with pytest.raises(LayoutError, match="grain"):
        export_sharded_state(tmp_path / "shards", tmp_path / "new", tensor_parallel_size=4)
    with pytest.raises(LayoutError, match="expert"):
        export_sharded_state(
            tmp_path / "shards", tmp_path / "new", tensor_parallel_size=2, expert_parallel=True
        )
    with pytest.raises(InputError, match="dtype int8; expected one of auto, bfloat16"):
        export_sharded_state(tmp_path / "shards", tmp_path / "new", tensor_parallel_size=2, dtype="int8")


def test_a_side_file_that_was_changed_is_refused_before_vllm_is_asked(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "shards/config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        export_sharded_state(tmp_path / "shards", tmp_path / "new", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "vllm-sharded-state"], "needs -tp"),
        (["--format", "vllm-sharded-state", "-tp", "4", "-ep", "2"], "among all 4 tensor parallel"),
        (["-tp", "2"], "-tp is for --format vllm-sharded-state"),
        (["-pp", "2"], "-pp is for --format"),
        (["-ep", "2"], "-ep is for --format"),
        (["--dtype", "float32"], "--dtype is for --format"),
        (["--format", "gguf"], "'checkpoint', 'vllm-sharded-state'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, options: list[str], message: str
) -> None:
    refused = CliRunner().invoke(main, ["export", str(tmp_path), str(tmp_path / "new"), *options])
    assert refused.exit_code == 2 and message in refused.output
