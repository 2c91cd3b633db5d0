"""What each command does when all is well, run as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import small_models
from lazily import load_file, torch
from shardprep_runtime import __version__, load, read_manifest
from shardprep_runtime.format.manifest import digest_of

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))


def run(*args: object, code: int = 0, **options: Any) -> str:
    """What the console script prints on stdout; stderr stays empty unless it refuses."""
    command = [SHARDPREP, *map(str, args)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
    assert found.returncode == code, found.stderr
    assert (found.stderr == "") == (code == 0)
    return found.stdout if code == 0 else found.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Llama in one .bin."""
    return small_models.write_model(tmp_path / "source")


MODELS = {
    "llama": small_models.llama_config(),
    "tied llama": small_models.llama_config(tied=True),
    "phi3": small_models.phi3_config(),
    "gpt2": small_models.gpt2_config(),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_split_and_export_give_back_what_convert_writes(tmp_path: Path, model: str) -> None:
    source = small_models.write_model(tmp_path / "source", MODELS[model], shards=2)
    run("convert", source, tmp_path / "converted")
    run("split", source, tmp_path / "set", "-tp", 2)
    assert "sound" in run("verify", tmp_path / "set")
    assert "bit for bit" in run("export", tmp_path / "set", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(tmp_path / "converted")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    for path in sorted(source.glob("*.bin")):
        for name, tensor in torch.load(path).items():
            assert torch.equal(tensors.pop(name), tensor)
    assert not tensors


def test_pickle_and_safetensors_of_the_same_tensors_convert_to_the_same_files(tmp_path: Path) -> None:
    for kind, shards in (("torch", 1), ("torch", 3), ("safetensors", 1), ("safetensors", 2)):
        source = small_models.write_model(tmp_path / f"{kind}-{shards}", kind=kind, shards=shards)
        run("convert", source, tmp_path / f"{kind}-{shards}-out")
    first, *others = [contents(path) for path in sorted(tmp_path.glob("*-out"))]
    assert all(other == first for other in others)


def test_convert_writes_the_index_of_several_files(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "new", "--max-part-size", "40KB")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_bytes())
    tensors = torch.load(source / "pytorch_model.bin")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "new" / file)[name], tensors.pop(name))
    assert not tensors


def test_dtype_casts_and_says_so_in_the_config(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "new", "--dtype", "fp16")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    expected = torch.load(source / "pytorch_model.bin")
    assert all(torch.equal(tensors[name], tensor.half()) for name, tensor in expected.items())
    config = json.loads((tmp_path / "new" / "config.json").read_bytes())
    assert config == {**small_models.llama_config(), "torch_dtype": "float16"}


def test_side_files_travel_byte_for_byte_and_code_only_when_asked_for(source: Path, tmp_path: Path) -> None:
    (source / "modeling_mine.py").write_text("raise SystemExit\n")
    (source / "optimizer.pt").write_bytes(b"whatever")
    (source / "picture.png").write_bytes(b"whatever")
    for command, options in (("convert", []), ("split", ["-tp", 2])):
        for more, code in (([], False), (["--include-code"], True)):
            new = tmp_path / f"{command}-{code}"
            run(command, source, new, *options, *more)
            assert (new / "modeling_mine.py").exists() == code
            assert not (new / "picture.png").exists()
            assert not (new / "optimizer.pt").exists()
            for name in ("config.json", "LICENSE", "tokenizer.json"):
                assert (new / name).read_bytes() == (source / name).read_bytes()


def test_inspect_shows_every_tensor_layer_and_dtype(source: Path) -> None:
    shown = run("inspect", source)
    for name, tensor in torch.load(source / "pytorch_model.bin").items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:4] == ["BF16", "x".join(map(str, tensor.shape)), f"{tensor.nbytes:,}"]
    assert "torch, llama: 39 tensors" in shown


def test_inspect_of_a_shard_set_shows_the_same_tensors(source: Path, tmp_path: Path) -> None:
    run("split", source, tmp_path / "set", "-tp", 2)
    before, after = (json.loads(run("inspect", path, "--json")) for path in (source, tmp_path / "set"))
    assert after["kind"] == "shard set"
    assert after["grain"] == 2
    for key in ("parameters", "nbytes", "by_dtype", "by_layer", "model_type"):
        assert after[key] == before[key]
    assert "grain 2" in run("inspect", tmp_path / "set")


def test_json_reports_name_what_was_written(source: Path, tmp_path: Path) -> None:
    split = json.loads(run("split", source, tmp_path / "set", "-tp", 2, "--json"))
    assert split["manifest_digest"] == digest_of((tmp_path / "set" / "shardprep.json").read_bytes())
    for path, size, _, _ in split["parts"]:
        assert (tmp_path / "set" / path).stat().st_size == size
    for command, origin in (("convert", source), ("export", tmp_path / "set")):
        report = json.loads(run(command, origin, tmp_path / command, "--json"))
        assert report["tensors"] == 39
        for path, size in report["files"]:
            assert (tmp_path / command / path).stat().st_size == size
    verified = json.loads(run("verify", tmp_path / "set", "--json"))
    assert verified["manifest_digest"] == split["manifest_digest"]
    assert verified["nbytes"] == split["source_bytes"]
    assert json.loads(run("verify", tmp_path / "set", "--json", "--fast"))["blocks"] == 0


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    planned = json.loads(run("split", source, tmp_path / "set", "-tp", 4, "--dry-run", "--json"))
    assert not (tmp_path / "set").exists()
    assert "dry run: nothing was written" in run("split", source, tmp_path / "set", "-tp", 4, "--dry-run")
    assert not (tmp_path / "set").exists()
    written = json.loads(run("split", source, tmp_path / "set", "-tp", 4, "--json"))
    assert planned.pop("manifest_digest") is None
    assert written.pop("manifest_digest")
    assert planned == written


def test_the_stages_of_a_split_are_those_that_a_worker_gets(source: Path, tmp_path: Path) -> None:
    run("split", source, tmp_path / "uneven", "-tp", 2, "--stages", "0-0,1-3")
    run("split", source, tmp_path / "even", "-tp", 2, "-pp", 2)
    assert read_manifest(tmp_path / "uneven").stages == ((0, 1), (1, 4))
    assert read_manifest(tmp_path / "even").stages == ((0, 2), (2, 4))
    with load(tmp_path / "uneven", rank=2, tensor_parallel_size=2, pipeline_parallel_size=2) as shard:
        assert shard.view.layers == (1, 4)
        assert "model.layers.0.input_layernorm.weight" not in shard


def test_the_long_and_the_short_names_of_options_are_the_same(source: Path, tmp_path: Path) -> None:
    run("split", source, tmp_path / "a", "-tp", 2, "-pp", 2)
    run("split", source, tmp_path / "b", "--tensor-parallel-size", 2, "--pipeline-parallel-size", 2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_number_of_workers_changes_no_byte(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 16):
        run("split", source, tmp_path / str(workers), "-tp", 2, "--max-workers", workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "16")


def test_one_weight_file_is_a_checkpoint_too(source: Path, tmp_path: Path) -> None:
    run("convert", source / "pytorch_model.bin", tmp_path / "new")
    assert len(load_file(tmp_path / "new" / "model.safetensors")) == 39
    assert "39 tensors" in run("inspect", source / "pytorch_model.bin")


def test_files_get_the_modes_that_the_umask_gives(source: Path, tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        new = tmp_path / f"{umask:o}"
        run("split", source, new, "-tp", 2, umask=umask)
        assert {path.stat().st_mode & 0o777 for path in new.iterdir()} == {mode}


def test_verify_names_the_first_bad_part_tensor_and_block(source: Path, tmp_path: Path) -> None:
    run("split", source, tmp_path / "set", "-tp", 2)
    for part in sorted((tmp_path / "set").glob("*.safetensors"))[1:]:
        raw = bytearray(part.read_bytes())
        raw[-1] ^= 1
        part.write_bytes(raw)
    message = run("verify", tmp_path / "set", code=1)
    assert (
        "shard-00002-model-00001-of-00001.safetensors: tensor model.layers." in message
        or "lm_head" in message
    )
    assert "block 0 (bytes " in message
    assert len(message.splitlines()) == 1
    assert "sound" in run("verify", tmp_path / "set", "--fast")


def test_verify_holds_the_manifest_to_a_digest(source: Path, tmp_path: Path) -> None:
    digest = json.loads(run("split", source, tmp_path / "set", "-tp", 2, "--json"))["manifest_digest"]
    assert digest in run("verify", tmp_path / "set", "--manifest-digest", digest)
    assert "do not load it" in run("verify", tmp_path / "set", "--manifest-digest", "sha256:0", code=2)
    assert "sound" in run("verify", tmp_path / "set" / "shardprep.json", "--manifest-digest", digest)


def test_a_shard_set_may_be_moved_and_renamed(source: Path, tmp_path: Path) -> None:
    run("split", source, tmp_path / "set", "-tp", 2)
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    shutil.rmtree(source)
    run("export", tmp_path / "elsewhere", tmp_path / "new")
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "shardprep.json").read_text()


def test_names_that_are_no_utf8_on_disk_are_carried(source: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"odd\xff")
    source.rename(odd)
    (odd / os.fsdecode(b"note\xff.txt")).write_text("x")
    run("split", odd, tmp_path / "set", "-tp", 2)
    run("verify", tmp_path / "set")
    run("export", tmp_path / "set", tmp_path / "new")
    assert (tmp_path / "new" / os.fsdecode(b"note\xff.txt")).read_text() == "x"


@pytest.mark.cold  # it is about what has been imported
@pytest.mark.parametrize("command", ["inspect", "convert", "split", "verify", "export"])
def test_help_names_the_arguments_and_imports_no_heavy_module(command: str) -> None:
    code = (
        "import sys\nfrom shardprep.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'blake3', 'tqdm', 'safetensors'} & set(sys.modules), sorted(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"{command} [OPTIONS]" in shown
    assert "--json" in shown


@pytest.mark.cold  # one command starts as users start it
def test_the_version_is_the_runtimes() -> None:
    assert run("--version").split() == ["shardprep,", "version", __version__] or __version__ in run("-V")


def test_no_arguments_show_every_command() -> None:
    shown = run("--help")
    for command in ("inspect", "convert", "split", "verify", "export"):
        assert f"  {command} " in shown


def test_a_reader_that_has_gone_is_no_traceback(source: Path) -> None:
    command = f"{SHARDPREP} inspect {source} | head -n 1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("tensor")
    assert "Traceback" not in found.stderr
