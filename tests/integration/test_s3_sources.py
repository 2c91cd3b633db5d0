"""s3:// as a source, over a server that checks signatures and counts what it sends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import small_models
from lazily import torch
from s3server import S3Server, file_name
from shardprep.cli import main
from shardprep.convert import convert
from shardprep.inspect import inspect
from shardprep.split import split
from shardprep.write.conduct import Conduct
from shardprep_runtime.errors import DeniedError, IntegrityError, SourceError
from shardprep_runtime.stores.s3 import S3Store
from shardprep_runtime.stores.store import Access

pytest.importorskip("botocore")

BUCKET = "models"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3"), anonymous_read=True) as server:
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty bucket, and an environment that leads to it."""
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running.clear()
    running.make_bucket(BUCKET)
    for path in running.objects(BUCKET).values():
        path.unlink()
    running.reset_stats()
    return running


def upload(server: S3Server, folder: Path, prefix: str) -> str:
    """The files of a folder under a prefix; its URI."""
    for path in folder.iterdir():
        place(server, {f"{prefix}/{path.name}": path.read_bytes()})
    server.reset_stats()
    return f"s3://{BUCKET}/{prefix}"


def place(server: S3Server, objects: Mapping[str, bytes]) -> None:
    for key, data in objects.items():
        (server.root / BUCKET / file_name(key)).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def large_config() -> dict[str, object]:
    """Of a model whose tensors are much larger than what describes them."""
    return small_models.llama_config(head_dim=64, intermediate=700, vocab=2000, layers=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_convert_and_split_write_what_they_write_of_a_local_folder(
    server: S3Server, tmp_path: Path, kind: str, shards: int
) -> None:
    source = small_models.write_model(tmp_path / "my-model", large_config(), kind=kind, shards=shards)
    uri = upload(server, source, "org/my-model")
    convert(source, tmp_path / "near")
    convert(uri + "/", tmp_path / "far")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")
    split(source, tmp_path / "near-split", tensor_parallel_size=2)
    split(uri, tmp_path / "far-split", tensor_parallel_size=2)
    near, far = contents(tmp_path / "near-split"), contents(tmp_path / "far-split")
    told = json.loads(far.pop("shardprep.json"))["model"]["source"]
    near.pop("shardprep.json")
    assert near == far
    assert (told["uri"], told["revision"]) == (uri, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_the_server_sends_the_tensors_once_and_little_else(
    server: S3Server, tmp_path: Path, kind: str
) -> None:
    source = small_models.write_model(tmp_path / "source", large_config(), kind=kind)
    uri = upload(server, source, "m")
    found = inspect(uri)
    described = server.stats()["sent"]
    assert described < 60_000
    server.reset_stats()
    convert(uri, tmp_path / "new")
    beside = sum((source / name).stat().st_size for name in found.side_files)
    assert found.nbytes < server.stats()["sent"] <= found.nbytes + described + beside


@pytest.mark.slow
def test_a_pickle_of_700_tensors_far_away_is_indexed_by_many_requests_at_once(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    torch.save({f"t{i}": torch.full((2000,), i) for i in range(700)}, tmp_path / "source/model.pt")
    uri = upload(server, tmp_path / "source", "m")
    server.fault("slow_first_byte", times=0, delay=0.03)
    at_once: list[int] = [0]
    get = S3Store.get

    def counted(*args: Any, **options: Any) -> str:
        at_once.append(at_once[-1] + 1)
        try:
            return get(*args, **options)
        finally:
            at_once.append(at_once[-1] - 1)

    monkeypatch.setattr(S3Store, "get", counted)
    assert len(inspect(uri).tensors) == 700
    server.clear()
    assert server.stats()["requests"] > 600
    assert max(at_once) > 8


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint"])
def test_one_object_is_a_source_whatever_its_name(server: S3Server, tmp_path: Path, name: str) -> None:
    source = small_models.write_model(tmp_path / "source")
    (source / "pytorch_model.bin").rename(source / name)
    uri = upload(server, source, "m")
    near, far = inspect(source / name), inspect(f"{uri}/{name}")
    assert (near.tensors, near.model_type, near.side_files) == (far.tensors, far.model_type, far.side_files)


def test_only_plain_keys_right_under_the_prefix_belong_to_the_checkpoint(
    server: S3Server, tmp_path: Path
) -> None:
    source = small_models.write_model(tmp_path / "source", kind="safetensors")
    uri = upload(server, source, "m")
    odd = (
        "m//x.json",
        "m/../x.json",
        "m/..",
        "m/a\\b.json",
        "m/a\tb.json",
        "m/.x.json",
        "m/deep/x.json",
        "m2/x.json",
    )
    place(server, dict.fromkeys(odd, b"{}"))
    place(server, {"m/deep/model.safetensors": b"", "m/": b""})
    assert inspect(uri).side_files == ("LICENSE", "config.json", "tokenizer.json")
    convert(uri, tmp_path / "new")
    assert sorted(contents(tmp_path / "new")) == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_an_object_that_is_replaced_midway_is_refused(server: S3Server, tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", large_config(), kind="safetensors")
    uri = upload(server, source, "m")
    server.fault("replace", match="model.safetensors", min_bytes=30_000, skip=3)
    with pytest.raises(SourceError, match="replaced while it was read"):
        convert(uri, tmp_path / "new", conduct=Conduct(workers=1))
    assert not (tmp_path / "new").exists()


def test_a_flipped_bit_of_a_pickled_tensor_is_found_by_its_checksum(server: S3Server, tmp_path: Path) -> None:
    uri = upload(server, small_models.write_model(tmp_path / "source", large_config()), "m")
    server.fault("flip", match="pytorch_model.bin", min_bytes=30_000, at=12_345)
    with pytest.raises(IntegrityError, match="the file is damaged"):
        convert(uri, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_store_that_stumbles_is_asked_again(server: S3Server, tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", large_config())
    uri = upload(server, source, "m")
    server.fault("status", code=503, times=3)
    server.fault("truncate", times=3, min_bytes=5000, after=1000)
    server.fault("reset", times=3, min_bytes=5000, after=2000)
    convert(source, tmp_path / "near")
    convert(uri, tmp_path / "far")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")
    assert server.stats()["faults"] >= 7


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_the_options_of_a_command_reach_the_store(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(server, small_models.write_model(tmp_path / "source"), "m")
    for name in server.environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    (tmp_path / "config").write_text(
        f"[profile mine]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
    )
    where = ("--endpoint-url", server.endpoint, "--region", server.region)
    for how in (("--profile", "mine"), ("--no-sign-request",)):
        done = run("inspect", uri, *where, *how)
        assert done.exit_code == 0, done.output
    done = run("split", uri, str(tmp_path / "new"), "-tp", "2", *where, "--profile", "mine")
    assert done.exit_code == 0, done.output


def test_missing_credentials_are_said(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in server.environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    done = run("inspect", f"s3://{BUCKET}/m", "--endpoint-url", server.endpoint)
    assert done.exit_code == 1
    assert "no credentials were found" in done.output


def test_a_wrong_secret_is_said_and_not_shown(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(server, small_models.write_model(tmp_path / "source"), "m")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(DeniedError):
        inspect(uri, access=Access(endpoint_url=server.endpoint))
    done = run("inspect", uri)
    assert done.exit_code == 1
    assert "not-the-secret" not in done.output
    assert server.access_key not in done.output


@pytest.mark.parametrize(
    ("uri", "code", "words"),
    [
        (f"s3://{BUCKET}/nothing", 2, "no objects under this prefix"),
        (f"s3://{BUCKET}/nothing/model.bin", 2, "no objects under this prefix"),
        (f"s3://{BUCKET}", 2, "no objects under this prefix"),
        ("s3://no-such-bucket/m", 1, "bucket"),
        ("s3://", 2, "not the name of a bucket"),
        (f"s3://{BUCKET}/a/../b", 2, "empty or dotted word"),
    ],
)
def test_what_is_no_source_is_refused_in_words(server: S3Server, uri: str, code: int, words: str) -> None:
    done = run("inspect", uri)
    assert done.exit_code == code, done.output
    assert words in " ".join(done.output.split())
