"""`shardprep vllm` brings what vLLM starts from, fetches for its ranks, and becomes vLLM's command with its options.

vLLM itself is started by scripts/test_vllm; here a program of the same name stands where it would be, and writes down
how it was called. What the ranks then do is the loader's, and is tested there too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardprep_runtime
from shardprep.split import split
from shardprep.vllm.record import RECORD, Record, StateFile, dump_record
from shardprep.vllm.serve import Sizes, prepare_vllm, read_sizes
from shardprep_runtime.engines.options import find_shard_set, read_options
from shardprep_runtime.errors import InputError, LayoutError, ManifestError
from shardprep_runtime.format.manifest import FILE_NAME, digest_of
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set
from small_models import write_model
from stores import make_store

PROGRAM = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLED"], "w") as file:
    json.dump({{"arguments": sys.argv[1:], "pid": os.getpid()}}, file)
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host that has a `vllm` on its PATH, and a cache."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/vllm").write_text(PROGRAM)
    (tmp_path / "bin/vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SHARDPREP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of a small Llama of three layers, at grain 4."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "in", kind="safetensors")
    split(folder / "in", folder / "shards", tensor_parallel_size=4)
    return folder / "shards"


@pytest.fixture
def uri(shards: Path, tmp_path: Path) -> str:
    return f"file://{make_store(shards, tmp_path / 'llama')}"


def digest(shards: Path) -> str:
    return digest_of((shards / FILE_NAME).read_bytes())


def option(command: tuple[str, ...] | list[str], name: str) -> str:
    return command[command.index(name) + 1]


def serve(*args: str) -> subprocess.Popen[str]:
    code = "import sys; from shardprep.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "vllm", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_it_becomes_vllm_and_the_shards_of_this_host_are_on_their_way(
    shards: Path, host: Path, uri: str
) -> None:
    with serve(uri, "--verify", "headers", "--", "--tensor-parallel-size", "2", "--port", "8001") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    called = json.loads((host / "called").read_text())
    assert called["pid"] == process.pid  # not a child of it: signals and the exit status are vLLM's own
    command: list[str] = called["arguments"]
    assert command[0] == "serve" and command[-4:] == ["--tensor-parallel-size", "2", "--port", "8001"]
    folder = Path(command[1])
    assert folder.is_relative_to(host / "cache")
    sides = {side.path for side in shardprep_runtime.read_manifest(shards).side_files}
    assert {each.name for each in folder.iterdir()} == {FILE_NAME} | sides  # no weights
    assert option(command, "--load-format") == "shardprep"
    assert option(command, "--served-model-name") == "llama"
    options = read_options(json.loads(option(command, "--model-loader-extra-config")))
    assert (options.shard_set.source, options.shard_set.verify, options.shard_set.digest) == (
        uri,
        "headers",
        digest(shards),
    )
    assert find_shard_set(folder, options) is not None
    assert "fetching ranks 0, 1" in errors
    # the fetch has this process's stderr, which has ended: so has the fetch
    for rank in range(2):
        with open_set(uri, digest=digest(shards)).load(
            Place(rank=rank, tensor_parallel_size=2, engine="vllm")
        ) as shard:
            shard.wait()
            assert not shard.bytes_fetched


def test_a_dry_run_prints_the_command_and_fetches_no_weights(shards: Path, host: Path, uri: str) -> None:
    with serve(uri, "--dry-run", "--json", "--", "-tp", "4") as process:
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    launch = json.loads(printed)
    assert launch["ranks"] == [0, 1, 2, 3]
    assert launch["manifest_digest"] == digest(shards)
    assert not (host / "called").exists()
    assert not list((host / "cache").glob("blobs/*"))


def test_a_folder_is_served_from_where_it_is(shards: Path, host: Path) -> None:
    launch = prepare_vllm(shards, ["-tp", "2", "--served-model-name", "mine", "other"])
    assert launch.folder == shards.resolve() and not launch.places
    assert list(launch.command).count("--served-model-name") == 1
    assert json.loads(option(launch.command, "--model-loader-extra-config")) == {
        "manifest_digest": digest(shards)
    }
    with pytest.raises(InputError, match="a folder already"):
        prepare_vllm(shards, [], folder=host)
    with pytest.raises(ManifestError, match="digest"):
        prepare_vllm(open_set(shards, digest="sha256:" + "0" * 64), [])


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        (["--nnodes", "2", "--node-rank", "1", "-tp", "2", "-pp", "2"], (2, 3)),
        (["-tp", "2", "-pp", "2", "--distributed-executor-backend", "ray"], ()),  # which knows where ranks go
        (["--no-such-option", "-tp=4"], (0, 1, 2, 3)),
    ],
)
def test_what_is_fetched_is_of_the_ranks_of_this_host(
    host: Path, uri: str, arguments: list[str], ranks: tuple[int, ...]
) -> None:
    assert tuple(place.rank for place in prepare_vllm(uri, arguments).places) == ranks
    assert not prepare_vllm(uri, arguments, prefetch=False).places


def test_layers_are_dealt_out_as_vllm_does(
    shards: Path, host: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = shardprep_runtime.read_manifest(shards).layers
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", f"1,{layers - 1}")
    found = prepare_vllm(uri, ["-pp", "2"]).places
    assert [place.stages for place in found] == [((0, 1), (1, layers))] * 2
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,1,1")
    with pytest.raises(LayoutError, match="expected 2 numbers whose sum"):
        prepare_vllm(uri, ["-pp", "2"])


def test_options_are_read_as_vllm_reads_them() -> None:
    assert read_sizes(
        ["--tensor_parallel_size=4", "--pipeline-parallel-size", "2", "--enable_expert_parallel"]
    ) == Sizes(4, 2, True, 1, 0, None, None, None, None, ())
    assert read_sizes(["--trust-remote-code", "-tp", "2"]).tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tp", "3"], "cannot be viewed at tensor parallel size 3; it serves 1, 2, 4"),
        (["-tp", "two"], "invalid int value"),
        (["--load-format", "auto"], "--load-format auto: a shard set is loaded by shardprep alone"),
        (["--model-loader-extra-config", "{}"], "--model-loader-extra-config is made here"),
        (["some/model", "-tp", "2"], "some/model: the model is SOURCE"),
        (["-pp", "64"], "layers cannot fill 64 pipeline stages"),
        (["-tp", "2", "--nnodes", "3", "--node-rank", "0"], "3 nodes cannot share 2 ranks"),
    ],
)
def test_what_vllm_could_not_be_started_with_is_refused_before_it_is(
    host: Path, uri: str, arguments: list[str], message: str
) -> None:
    with serve(uri, "--", *arguments) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in " ".join(errors.split()) and "Traceback" not in errors
    assert not (host / "called").exists()


def test_without_vllm_it_says_where_it_belongs(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with serve(uri) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "install shardprep where vLLM is" in errors


# ---------------------------------------------------------------------------------------------- exported sharded_state


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the record of an export for vLLM 0.32.0 at TP 2, on a host that has that version."""
    folder = tmp_path / "exported"
    folder.mkdir()
    record = Record(
        vllm="0.32.0+cpu",
        torch="2.13.0",
        shardprep="0.1.0",
        architecture="LlamaForCausalLM",
        quantization=None,
        tensor_parallel_size=2,
        pipeline_parallel_size=1,
        expert_parallel=False,
        dtype="bfloat16",
        manifest_digest="sha256:" + "0" * 64,
        files=(StateFile("model-rank-0-part-0.safetensors", 8, "sha256:" + "0" * 64, 0, 0),),
        side_files=(),
    )
    (folder / RECORD).write_bytes(dump_record(record))
    install(tmp_path / "site", "0.32.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def install(site: Path, version: str) -> None:
    """As far as a package's metadata says it."""
    (site / "vllm.dist-info").mkdir(parents=True, exist_ok=True)
    (site / "vllm.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def test_exported_files_are_served_by_vllms_own_formats(host: Path, exported: Path) -> None:
    launch = prepare_vllm(exported, ["-tp", "2"])
    assert option(launch.command, "--load-format") == "sharded_state"
    assert launch.command[2] == str(exported) and not launch.places
    remote = prepare_vllm(f"file://{exported}", ["-tp", "2"])
    assert option(remote.command, "--load-format") == "runai_streamer_sharded"
    assert remote.command[2] == f"file://{exported}"
    assert remote.shard_set.digest == launch.shard_set.digest == digest_of((exported / RECORD).read_bytes())


def test_exported_files_are_refused_where_vllm_would_load_them_wrong(host: Path, exported: Path) -> None:
    for arguments, message in (
        (["-tp", "4"], "tensor parallel size 2 and pipeline parallel size 1, not 4 and 1"),
        (["-tp", "2", "--enable-expert-parallel"], "without --enable-expert-parallel"),
    ):
        with pytest.raises(LayoutError, match=message):
            prepare_vllm(exported, arguments)
    with pytest.raises(ManifestError, match="the digest of its record is"):
        prepare_vllm(open_set(exported, digest="sha256:" + "1" * 64), ["-tp", "2"])
    install(host / "site", "0.33.0")
    with pytest.raises(LayoutError, match=r"files are vLLM 0\.32\.0\+cpu's, and this is vLLM 0\.33\.0"):
        prepare_vllm(exported, ["-tp", "2"])
