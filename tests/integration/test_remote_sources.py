"""inspect, convert and split from a store: the bytes of a local run, by ranged reads, and nothing kept beside."""

from __future__ import annotations

import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import small_models
import torch_corpus as corpus
from lazily import torch
from shardprep.cli import main
from shardprep.convert import convert
from shardprep.inspect import inspect
from shardprep.source import locate, store_files
from shardprep.split import SplitOptions, split
from shardprep.write.conduct import Conduct
from shardprep_runtime.errors import FormatError, IntegrityError, MissingError, SourceError, UnsupportedError
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.stores.store import Access, Sink

LEGACY = {"_use_new_zipfile_serialization": False}


class CountingStore(FolderStore):
    """A store in a folder that counts requests and bytes, answers late, and can be told to act before it answers."""

    def __init__(self, folder: Path, *, delay: float = 0.0) -> None:
        super().__init__(folder)
        self.delay = delay
        self.requests = self.nbytes = self.at_once = self.most_at_once = 0
        self.before: Callable[[str, int], None] = lambda key, start: None
        self.lock = threading.Lock()

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        with self.lock:
            self.requests += 1
            self.nbytes += sink.left
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.delay)
            self.before(key, start)
            return super().get(key, start, sink, version=version)
        finally:
            with self.lock:
                self.at_once -= 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CountingStore]]:
    """The stores that are opened for `file://`, each counting."""
    opened: list[CountingStore] = []

    def open_counting(uri: str | Path, access: Access | None = None) -> CountingStore:
        opened.append(CountingStore(Path(str(uri).removeprefix("file://"))))
        return opened[-1]

    monkeypatch.setattr(locate, "open_store", open_counting)
    yield opened


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, folder: Path, *, delay: float = 0.0) -> Iterator[CountingStore]:
    """One store for all that is opened meanwhile."""
    store = CountingStore(folder, delay=delay)
    with monkeypatch.context() as patch:
        patch.setattr(locate, "open_store", lambda uri, access=None: store)
        yield store


def uri(folder: Path) -> str:
    return f"file://{folder}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_convert_writes_what_it_writes_of_a_local_folder(tmp_path: Path, kind: str, shards: int) -> None:
    source = small_models.write_model(tmp_path / "source", kind=kind, shards=shards)
    near = convert(source, tmp_path / "near")
    far = convert(uri(source), tmp_path / "far")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")
    assert (near.tensors, near.nbytes) == (far.tensors, far.nbytes)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_split_writes_what_it_writes_of_a_local_folder(tmp_path: Path, kind: str) -> None:
    source = small_models.write_model(tmp_path / "source", kind=kind, shards=2)
    split(source, tmp_path / "near", tensor_parallel_size=2)
    split(uri(source), tmp_path / "far", tensor_parallel_size=2)
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


def test_inspect_says_what_it_says_of_a_local_folder(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", shards=2)
    near, far = inspect(source), inspect(uri(source))
    for field in ("kind", "model_type", "tensors", "side_files", "by_dtype", "by_layer", "parameters"):
        assert getattr(near, field) == getattr(far, field)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_one_weight_file_is_a_source(tmp_path: Path, name: str) -> None:
    kind = "torch" if name.endswith(".bin") else "safetensors"
    source = small_models.write_model(tmp_path / "source", kind=kind)
    near, far = inspect(source / name), inspect(f"{uri(source)}/{name}")
    assert (near.tensors, near.model_type, near.side_files) == (far.tensors, far.model_type, far.side_files)
    convert(f"{uri(source)}/{name}", tmp_path / "new")
    assert sorted(contents(tmp_path / "new")) == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_no_byte_is_fetched_that_nobody_needs(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_files, "WINDOW", 64 * 2**10)  # so that tensors are many windows long
    monkeypatch.setattr(store_files, "NEAR", 0)
    config = small_models.llama_config(head_dim=64, intermediate=500, vocab=1000, layers=2)
    source = small_models.write_model(tmp_path / "source", config, kind=kind)
    with watched(monkeypatch, source) as store:
        index = inspect(uri(source))
        described = store.nbytes
    with watched(monkeypatch, source) as store:
        split(uri(source), tmp_path / "new", tensor_parallel_size=2)
    beside = sum((source / name).stat().st_size for name in index.side_files)
    assert store.nbytes == index.nbytes + described + beside
    assert described < index.nbytes / 50


def test_the_index_of_a_safetensors_file_takes_two_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_models.write_model(tmp_path / "source", kind="safetensors", shards=4)
    with watched(monkeypatch, source) as store:
        inspect(uri(source))
    assert store.requests == 2 * 4 + 2  # index.json and config.json


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_pickle_of_many_tensors_is_indexed_by_many_requests_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.setattr(store_files, "NEAR", 0)
    (tmp_path / "source").mkdir()
    torch.save({f"t{i}": torch.full((100,), i) for i in range(400)}, tmp_path / "source/model.pt", **options)
    with watched(monkeypatch, tmp_path / "source", delay=0.02) as store:
        assert len(inspect(uri(tmp_path / "source")).tensors) == 400
    assert store.requests > 200
    assert store.most_at_once > 8


def test_small_neighbours_are_indexed_by_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    torch.save({f"t{i}": torch.full((4,), i) for i in range(400)}, tmp_path / "source/model.pt")
    with watched(monkeypatch, tmp_path / "source") as store:
        inspect(uri(tmp_path / "source"))
    assert store.requests < 10


def odd_tensors() -> dict[str, torch.Tensor]:
    """What must be gathered: strided, two views of one storage, and a view of a part."""
    base = torch.arange(60_000, dtype=torch.float32).reshape(200, 300)
    return {"turned": base.t(), "columns": base[:, 10:20], "rows": base[50:60], "own": torch.ones(7)}


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tensors_that_are_gathered_or_cast_come_out_the_same(
    tmp_path: Path, options: dict[str, bool], dtype: str | None
) -> None:
    (tmp_path / "source").mkdir()
    torch.save(odd_tensors(), tmp_path / "source/model.pt", **options)
    convert(tmp_path / "source", tmp_path / "near", dtype=dtype)
    convert(uri(tmp_path / "source"), tmp_path / "far", dtype=dtype)
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


def test_big_endian_tensors_come_out_the_same(tmp_path: Path) -> None:
    path = tmp_path / "source/model.pt"
    path.parent.mkdir()
    whole = torch.arange(1000, dtype=torch.int32).reshape(20, 50)
    torch.save({"w": whole, "turned": whole.t()}, path)
    with zipfile.ZipFile(path) as archive:
        pickle = archive.read("model/data.pkl")
    entries = corpus.members(pickle, {"0": whole.numpy().astype(">i4").tobytes()})
    entries[1].data = b"big"
    path.write_bytes(corpus.zipped(entries))
    convert(path.parent, tmp_path / "near")
    convert(uri(path.parent), tmp_path / "far")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


@pytest.mark.parametrize("strided", [False, True])
def test_a_damaged_record_is_refused_as_on_disk(tmp_path: Path, strided: bool) -> None:
    (tmp_path / "source").mkdir()
    whole = torch.arange(5000, dtype=torch.int64).reshape(50, 100)
    path = tmp_path / "source/model.pt"
    torch.save({"w": whole.t() if strided else whole}, path)
    raw = bytearray(path.read_bytes())
    at = raw.index((4321).to_bytes(8, "little"))
    raw[at] ^= 1
    path.write_bytes(raw)
    for source in (tmp_path / "source", uri(tmp_path / "source")):
        with pytest.raises(IntegrityError, match="the file is damaged"):
            convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_source_that_is_replaced_midway_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_models.write_model(tmp_path / "source", kind="safetensors")
    other = small_models.write_model(tmp_path / "other", kind="safetensors", seed=1)

    def replace(key: str, start: int) -> None:
        if key == "model.safetensors" and start > 20_000:
            shutil.copyfile(other / key, other / "copy")
            (other / "copy").rename(source / key)

    with watched(monkeypatch, source) as store:
        store.before = replace
        with pytest.raises(SourceError, match="replaced while it was read"):
            convert(uri(source), tmp_path / "new", conduct=Conduct(workers=1))
    assert not (tmp_path / "new").exists()


def test_a_run_that_a_store_ended_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_models.write_model(tmp_path / "source", kind="safetensors")

    def vanish(key: str, start: int) -> None:
        if store.requests > 30:
            raise MissingError("gone for a while")

    with watched(monkeypatch, source) as store:
        store.before = vanish
        with pytest.raises(MissingError):
            split(
                uri(source),
                tmp_path / "new",
                tensor_parallel_size=4,
                conduct=Conduct(workers=1),
                options=SplitOptions(max_part_bytes=5000),
            )
    kept = list((tmp_path / "new/.shardprep-partial").glob("*.safetensors"))
    split(uri(source), tmp_path / "new", tensor_parallel_size=4, options=SplitOptions(max_part_bytes=5000))
    split(source, tmp_path / "near", tensor_parallel_size=4, options=SplitOptions(max_part_bytes=5000))
    assert kept
    assert contents(tmp_path / "near") == contents(tmp_path / "new")


def test_what_lies_deeper_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", kind="safetensors")
    small_models.write_model(source / "other", kind="safetensors")
    (source / "odd\nname.json").write_text("{}")
    (source / ".hidden.json").write_text("{}")
    assert inspect(uri(source)).side_files == ("LICENSE", "config.json", "tokenizer.json")


def test_a_shard_set_in_a_store_is_to_be_pulled_first(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    split(source, tmp_path / "shards", tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="a shard set; fetch it first"):
        inspect(uri(tmp_path / "shards"))


def test_a_store_of_shard_sets_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/main.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="a store of shard sets; `shardprep revisions` lists them"):
        inspect(uri(tmp_path))


def test_a_checkpoint_further_below_is_pointed_at(tmp_path: Path) -> None:
    small_models.write_model(tmp_path / "deep")
    with pytest.raises(FormatError, match="no objects under this prefix, only further below, such as deep/"):
        inspect(uri(tmp_path))


def test_a_manifest_tells_no_path_of_this_machine(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "my-model")
    split(uri(source), tmp_path / "new", tensor_parallel_size=2)
    told = json.loads((tmp_path / "new/shardprep.json").read_text())["model"]["source"]
    assert (told["uri"], told["revision"]) == ("my-model", None)


def test_more_threads_read_a_store_than_a_disk_unless_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_models.write_model(tmp_path / "source", kind="safetensors")
    most = {}
    for number, options in enumerate(([], ["--max-workers", "2"])):
        with watched(monkeypatch, source, delay=0.02) as store:
            done = CliRunner().invoke(
                main, ["convert", uri(source), str(tmp_path / f"new{number}"), *options]
            )
            assert done.exit_code == 0, done.output
        most[number] = store.most_at_once
    assert most[0] > 8
    assert most[1] <= 2


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["inspect", "file://{tmp}/empty"], 2, "no objects under this prefix"),
        (["inspect", "file://{tmp}/nothing"], 1, "no such folder"),
        (["inspect", "ftp://host/model"], 2, "is reached by ftp://"),
        (["inspect", "hf://just-a-name"], 2, "expected hf://org/name"),
        (["convert", "file://{tmp}/empty", "s3://bucket/new"], 2, "expected a path"),
    ],
)
def test_what_is_no_source_is_refused_in_words(
    tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(main, [arg.format(tmp=tmp_path) for arg in args])
    assert done.exit_code == code, done.output
    assert words in " ".join(done.output.split())


def test_no_objects_is_a_format_error_of_the_library(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no objects under this prefix"):
        inspect(uri(tmp_path))
