"""Whatever is wrong with the input, a command says so in words and leaves the destination as it found it."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_models
from lazily import torch
from shardprep.cli import main

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))
UGLY = "\n\x1b[31m\u202e\u2066\x7f\x9bred"
"""Ends a line, colours a terminal, turns the direction of writing, deletes."""


def check_message(code: int, stderr: str) -> str:
    """The message of a command that refused, once it is known to be fit for people: short, printable, no traceback."""
    assert code in (1, 2), (code, stderr)
    assert "Traceback" not in stderr
    said = [
        line
        for line in stderr.splitlines()
        if line.strip() and not line.startswith(("Usage: ", "Try '", "Note: "))
    ]
    assert 1 <= len(said) <= 3, stderr
    assert all(line.isprintable() for line in said), stderr
    assert said[0].startswith("Error: ")
    assert all(len(line) < 1000 for line in said)
    return "\n".join(said)


def refused(*args: object, code: int = 2) -> str:
    """What the command line says on stderr when it refuses with `code`, run in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.stdout == ""
    assert result.exit_code == code, result.stderr
    return check_message(result.exit_code, result.stderr)


def refused_by_script(*args: object, code: int = 2, **options: Any) -> str:
    """The same of the console script, in a process of its own that must not hang."""
    found = subprocess.run(
        [SHARDPREP, *map(str, args)], capture_output=True, timeout=30, check=False, **options
    )
    assert found.returncode == code, found.stderr
    assert found.stdout == b""
    return check_message(found.returncode, found.stderr.decode())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder and its bytes; None for what is no file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused_by_all(source: Path, words: str, *, run: Callable[..., str] = refused, code: int = 2) -> None:
    """inspect, convert and split refuse a source, naming `words`, and leave nothing at the destination."""
    folder = source if source.is_dir() else source.parent
    before = contents(folder) if run is refused else None
    new, empty = folder.parent / "new", folder.parent / "empty"
    empty.mkdir(exist_ok=True)
    messages = [
        run("inspect", source, code=code),
        run("convert", source, new, code=code),
        run("split", source, new, "-tp", 2, code=code),
        run("convert", source, empty, code=code),
        run("split", source, empty, "-tp", 2, code=code),
    ]
    for message in messages:
        assert words in message
    assert not new.exists()
    assert list(empty.iterdir()) == []
    assert before is None or contents(folder) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small sound checkpoint of one .bin."""
    return small_models.write_model(tmp_path / "source")


@pytest.fixture
def safe_source(tmp_path: Path) -> Path:
    """A small sound checkpoint of one safetensors file."""
    return small_models.write_model(tmp_path / "source", kind="safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small sound checkpoint of three safetensors files."""
    return small_models.write_model(tmp_path / "source", kind="safetensors", shards=3)


def test_the_sound_sources_are_accepted(source: Path, tmp_path: Path) -> None:
    for args in (
        ["inspect", source],
        ["convert", source, tmp_path / "a"],
        ["split", source, tmp_path / "b", "-tp", 2],
    ):
        assert CliRunner().invoke(main, [str(arg) for arg in args]).exit_code == 0


# ----------------------------------------------------------------------------------------------------------- pickles


class Payload:
    """An object whose pickle runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "beside the weights"])
def test_a_hostile_pickle_is_refused_by_every_command_and_never_runs(tmp_path: Path, form: str) -> None:
    folder, canary = tmp_path / "source", tmp_path / "canary"
    small_models.write_model(folder)
    path = folder / "pytorch_model.bin"
    value: Any = {"model.norm.weight": torch.ones(4), "x": Payload(canary)}
    if form == "bare":
        path.write_bytes(pickle.dumps(value["x"]))
    elif form == "beside the weights":
        torch.save({"state_dict": {"a": torch.ones(2)}, "extra": Payload(canary)}, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    refused_by_all(folder, "pytorch_model.bin", run=refused_by_script if form == "zip" else refused)
    assert not canary.exists()
    if form in ("zip", "legacy"):
        torch.load(path, weights_only=False)
        assert canary.exists()  # the payload is a real one


# -------------------------------------------------------------------------------------------------- lies and truncation


def hide_a_member(path: Path) -> None:
    """Append a second zip, which some readers would read instead."""
    path.write_bytes(path.read_bytes() + path.read_bytes())


def repeat_a_member(path: Path) -> None:
    """List a member twice, as zipfile lets one do."""
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0]
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, b"x")


def compress(path: Path) -> None:
    """Store the same members compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def lie_about_a_size(path: Path) -> None:
    """Claim a larger storage in the directory of the zip."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 23] = 0x7F  # the top byte of both sizes of the first entry
    raw[at + 27] = 0x7F
    path.write_bytes(raw)


@pytest.mark.parametrize("lie", [hide_a_member, repeat_a_member, compress, lie_about_a_size])
def test_a_zip_that_two_readers_could_read_differently_is_refused(
    source: Path, lie: Callable[[Path], None]
) -> None:
    lie(source / "pytorch_model.bin")
    refused_by_all(source, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"t": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"abc", "hole"),
        ({"t": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"abc", "trailing"),
        ({"t": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}, b"abc", "truncated"),
        ({"t": {"dtype": "X", "shape": [3], "data_offsets": [0, 3]}}, b"abc", "unknown dtype"),
        ({"t": {"dtype": "U8", "shape": [-3], "data_offsets": [0, 3]}}, b"abc", "shape"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({}, b"", "no tensors"),
    ],
)
def test_a_header_that_lies_is_refused(safe_source: Path, header: Any, data: bytes, words: str) -> None:
    raw = json.dumps(header).encode()
    (safe_source / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    refused_by_all(safe_source, words)


def little_memory() -> None:
    """In the child, before it runs: at most 1 GiB of address space, most of which stacks and libraries take."""
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))


def test_a_kilobyte_that_claims_gigabytes_is_refused_in_little_memory(safe_source: Path) -> None:
    path = safe_source / "model.safetensors"
    for claim in (2**63, 2**40, 99_000_000):
        path.write_bytes(claim.to_bytes(8, "little") + b"{" + b" " * 1000)
        assert str(claim) in refused_by_script("inspect", path, preexec_fn=little_memory)


def boundaries_of_zip(path: Path) -> set[int]:
    """Offsets at which something begins or ends in a torch zip."""
    found = {path.stat().st_size}
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            names = int.from_bytes(raw[info.header_offset + 26 : info.header_offset + 28], "little")
            extra = int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little")
            start = info.header_offset + 30 + names + extra
            found |= {info.header_offset, info.header_offset + 30, start, start + info.file_size}
    for mark in (b"PK\x01\x02", b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"):
        at = raw.find(mark)
        while at >= 0:
            found.add(at)
            at = raw.find(mark, at + 1)
    return found


def boundaries_of_safetensors(path: Path) -> set[int]:
    """Offsets at which something begins or ends in a safetensors file."""
    raw = path.read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8:base])
    fields.pop("__metadata__", None)
    return {0, 8, 9, base, *(base + stop for each in fields.values() for stop in each["data_offsets"])}


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_a_file_cut_off_at_any_boundary_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    tensors = small_models.random_tensors({"a": (3,), "b": (5, 2), "c": (0,), "d": ()})
    config = small_models.llama_config()
    small_models.write_checkpoint(source, tensors, config, kind="torch" if kind == "legacy" else kind)
    if kind == "legacy":
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    path = source / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    whole = path.read_bytes()
    if kind == "legacy":
        cuts = set(range(len(whole)))
    else:
        found = boundaries_of_zip(path) if kind == "torch" else boundaries_of_safetensors(path)
        cuts = {cut + step for cut in found for step in (-1, 0, 1)} & set(range(len(whole)))
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        assert path.name in refused("inspect", source)
        assert path.name in refused("convert", source, tmp_path / "new")
        assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------------- index.json


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file, changed in place or by what `change` returns."""
    value = json.loads(path.read_bytes())
    returned = change(value)
    path.write_text(json.dumps(value if returned is None else returned))


INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused_by_all(sharded, f"lists {SECOND}, which is not there")


def test_a_shard_too_many_is_named(sharded: Path) -> None:
    shutil.copy(sharded / SECOND, sharded / "model-00004-of-00003.safetensors")
    refused_by_all(sharded, "model-00004-of-00003.safetensors is not listed")


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused_by_all(sharded, "is one of several shards, and no index.json")
    for path in sorted(sharded.glob("*.safetensors"))[1:]:
        path.unlink()
    refused_by_all(sharded, "model-00001-of-00003.safetensors is one of several shards, and no index.json")


def test_one_shard_of_one_needs_no_index(safe_source: Path) -> None:
    (safe_source / "model.safetensors").rename(safe_source / "model-00001-of-00001.safetensors")
    assert CliRunner().invoke(main, ["inspect", str(safe_source)]).exit_code == 0


def test_two_indexes_are_refused(sharded: Path) -> None:
    shutil.copy(sharded / INDEX, sharded / "other.safetensors.index.json")
    refused_by_all(sharded, "2 index files")


def test_a_tensor_in_two_files_is_refused_naming_it_and_them(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source", shards=2)
    torch.save(
        {"model.norm.weight": torch.ones(4), "model.embed_tokens.weight": torch.ones(4)},
        source / "pytorch_model-00002-of-00002.bin",
    )
    refused_by_all(source, "tensor model.embed_tokens.weight is in pytorch_model-00001-of-00002.bin and in")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["weight_map"].update({"model.norm.weight": SECOND}), "model.norm.weight should be in"),
        (lambda v: v["weight_map"].update({"ghost": SECOND}), "ghost should be in"),
        (lambda v: v["weight_map"].pop("model.norm.weight"), "does not list model.norm.weight"),
        (lambda v: v.pop("weight_map"), "weight_map must map"),
        (lambda v: v.update(weight_map=[]), "weight_map must map"),
        (lambda v: v.update(weight_map={"a": 1}), "weight_map must map"),
        (lambda v: v.update(weight_map={"a": None}), "weight_map must map"),
        (lambda v: v["weight_map"].update({"model.norm.weight": "../x.safetensors"}), "leaves the folder"),
        (lambda v: v["weight_map"].update({"model.norm.weight": "/etc/passwd"}), "leaves the folder"),
        (lambda v: v["weight_map"].update({"model.norm.weight": "a\\b"}), "leaves the folder"),
        (lambda v: v["weight_map"].update({"model.norm.weight": ".."}), "leaves the folder"),
        (lambda v: v["weight_map"].update({"model.norm.weight": ""}), "leaves the folder"),
        (lambda v: v["weight_map"].update({"model.norm.weight": "a\0b"}), "leaves the folder"),
        (lambda v: v["weight_map"].update({"model.norm.weight": UGLY}), "which is not there"),
        (lambda v: v["weight_map"].update({"model.norm.weight": "x" * 5000}), "which is not there"),
        (lambda v: v["weight_map"].update({UGLY: SECOND}), "should be in"),
        (lambda _: [], "expected an object"),
        (lambda _: "x", "expected an object"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(
    sharded: Path, change: Callable[[Any], Any], words: str
) -> None:
    change_json(sharded / INDEX, lambda value: _none_if_changed(value, change(value)))
    refused_by_all(sharded, words)


def _none_if_changed(value: dict[str, Any], returned: Any) -> Any:
    return returned if returned in ([], "x") else value


BAD_JSON = {
    "empty": b"",
    "cut off": b'{"model_type": "lla',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1]",
    "a number": b"1",
    "null": b"null",
    "deeply nested": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deeply nested objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "an integer of 100,000 digits": b'{"a":' + b"9" * 100_000 + b"}",
    "NaN": b'{"a": NaN}',
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
}


@pytest.mark.parametrize("what", BAD_JSON)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_what_is_no_json_object_is_refused_by_its_name(sharded: Path, file: str, what: str) -> None:
    (sharded / file).write_bytes(BAD_JSON[what])
    refused_by_all(sharded, file)


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_json_file_that_is_huge_is_refused_before_it_is_parsed(sharded: Path, file: str) -> None:
    with (sharded / file).open("r+b") as stream:
        stream.truncate(10 * 2**30)  # sparse
    assert "more than 67108864 bytes" in refused("inspect", sharded)


# ------------------------------------------------------------------------------------------------- what is no file


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


ODD_FILES = [
    make_fifo,
    make_folder,
    make_link_to_nothing,
    make_link_to_itself,
    make_link_to_zeros,
    make_socket,
]


MIGHT_HANG = [make_fifo, make_link_to_zeros]
"""For these the command runs in a process of its own, with a limit of time."""


@pytest.mark.slow
@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_weights_that_are_no_regular_file_are_refused_and_never_waited_for(
    tmp_path: Path, kind: str, make: Callable[[Path], None]
) -> None:
    source = small_models.write_model(tmp_path / "source", kind=kind)
    path = next(source.glob("*model.*"))
    path.unlink()
    make(path)
    run = refused_by_script if make in MIGHT_HANG else refused
    for args in (["inspect", source], ["convert", source, tmp_path / "new"]):
        assert path.name in run(*args)
    if make is not make_folder:
        run("inspect", path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("make", [make_fifo, make_folder, make_link_to_zeros])
def test_a_config_that_is_no_regular_file_is_refused_and_never_waited_for(
    source: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    (source / "config.json").unlink()
    make(source / "config.json")
    for args in (["inspect", source], ["split", source, tmp_path / "new", "-tp", 2]):
        assert "config.json: not a regular file" in refused_by_script(*args)
    assert not (tmp_path / "new").exists()


def test_a_side_file_that_is_a_fifo_is_passed_over(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")
    found = subprocess.run(
        [SHARDPREP, "convert", source, tmp_path / "new"], timeout=30, check=True, capture_output=True
    )
    assert b"39 tensors" in found.stdout
    assert "tokenizer.json" not in contents(tmp_path / "new")


@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("command", ["verify", "export"])
def test_a_manifest_that_is_no_regular_file_is_refused(
    tmp_path: Path, command: str, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    make(folder / "shardprep.json")
    more = [tmp_path / "new"] if command == "export" else []
    run = refused_by_script if make in MIGHT_HANG else refused
    assert "no manifest here" in run(command, folder, *more)
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------------- config.json


def split_refuses(source: Path, *options: object) -> str:
    """What split says to `source`; nothing is written."""
    new = source.parent / "new"
    message = refused("split", source, new, *(options or ("-tp", 2)))
    assert not new.exists()
    assert message == refused("split", source, new, *(options or ("-tp", 2)), "--dry-run")
    return message


@pytest.mark.parametrize("wrong", ["x", -1, 0, 1e99, True, 4.0, [4], {"a": 4}, 3, 5])
def test_a_number_of_layers_that_cannot_be_is_refused_in_words(source: Path, wrong: object) -> None:
    change_json(source / "config.json", lambda config: config.update(num_hidden_layers=wrong))
    message = split_refuses(source)
    assert "config.json" in message
    assert "num_hidden_layers" in message or "layers" in message


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("wrong", ["x", -1, 0, 1e99, True, 7, 10**30, [], {}])
def test_a_size_that_does_not_fit_the_tensors_is_refused_in_words(
    source: Path, key: str, wrong: object
) -> None:
    change_json(source / "config.json", lambda config: config.update({key: wrong}))
    assert "config.json" in split_refuses(source)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_a_size_that_is_not_there_is_named(source: Path, key: str) -> None:
    change_json(source / "config.json", lambda config: _none(config.pop(key)))
    assert key in split_refuses(source)


def _none(_: object) -> None:
    return None


def test_a_number_of_layers_beyond_all_measure_takes_no_memory(source: Path, tmp_path: Path) -> None:
    change_json(source / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    command = ["split", source, tmp_path / "new", "-tp", 2]
    assert "layers" in refused_by_script(*command, preexec_fn=little_memory)


@pytest.mark.parametrize("wrong", ["lama", "of_mine", "", UGLY, None])
def test_an_unknown_model_type_is_refused_saying_what_to_do(source: Path, wrong: object) -> None:
    change_json(source / "config.json", lambda config: config.update(model_type=wrong))
    message = split_refuses(source)
    assert "no layout rules for model_type" in message
    assert "--allow-generic" in message
    assert ("did you mean" in message and "llama" in message) == (wrong == "lama")


@pytest.mark.parametrize("wrong", [1, [], ["llama"], {}, True])
def test_a_model_type_that_is_no_string_is_refused(source: Path, wrong: object) -> None:
    change_json(source / "config.json", lambda config: config.update(model_type=wrong))
    refused_by_all(source, "config.json: model_type must be a string")


def test_no_config_is_refused_by_split_and_not_by_convert(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    assert "no config.json" in split_refuses(source)
    assert CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "new")]).exit_code == 0


def test_a_config_that_says_quantized_of_tensors_that_are_not_is_refused(source: Path) -> None:
    change_json(
        source / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"})
    )
    assert r"quantized by gptq, but no tensor holds packed numbers (.qweight)" in split_refuses(source)


def test_a_tensor_that_the_architecture_lacks_is_named(source: Path) -> None:
    tensors = torch.load(source / "pytorch_model.bin")
    torch.save({**tensors, f"vision.{UGLY}": torch.ones(2)}, source / "pytorch_model.bin")
    assert "vision.\\n\\u001b[31m\\u202e\\u2066\\u007f\\u009bred: no layout rule" in split_refuses(source)


def test_a_layer_without_tensors_is_named(source: Path) -> None:
    tensors = torch.load(source / "pytorch_model.bin")
    torch.save({k: v for k, v in tensors.items() if ".2." not in k}, source / "pytorch_model.bin")
    assert "layer 2 has no tensors" in split_refuses(source)


@pytest.mark.parametrize(
    ("tp", "sizes"), [(3, "1, 2, 4"), (5, "1, 2, 4"), (64, "1, 2, 4"), (4096, "1, 2, 4")]
)
def test_an_impossible_tensor_parallel_size_is_refused_with_those_that_work(
    source: Path, tp: int, sizes: str
) -> None:
    message = split_refuses(source, "-tp", tp)
    assert f"cannot be shared by {tp} tensor ranks" in message
    assert f"sizes that work for this model: {sizes}" in message
    assert "self_attn" in message or "mlp" in message


@pytest.mark.parametrize(
    "stages",
    [
        "",
        "x",
        "0-3,",
        "-1-3",
        "0-1,3",
        "0-1,1-3",
        "0-3,4",
        "2-1,2-3",
        "0-0",
        "0-99999999",
        "1,2,3",
        "0..3",
        UGLY,
    ],
)
def test_stages_that_make_no_sense_are_refused(source: Path, stages: str) -> None:
    message = split_refuses(source, "-tp", 2, "--stages", stages)
    assert "stages" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-tp", "0"], "-tp"),
        (["-tp", "x"], "-tp"),
        (["-tp", "4097"], "-tp"),
        (["-tp", "1.5"], "-tp"),
        (["-tp", UGLY], "-tp"),
        (["-tp", "2", "-pp", "0"], "-pp"),
        (["-tp", "2", "-pp", "5"], "4 layers cannot fill 5"),
        (["-tp", "2", "-pp", "3", "--stages", "0-1,2-3"], "2 stages were given for pipeline parallel size 3"),
        (["-tp", "2", "--max-part-size", "0"], "at least 1 byte"),
        (["-tp", "2", "--max-part-size", "5XB"], "is not a size"),
        (["-tp", "2", "--max-part-size", "-1"], "is not a size"),
        (["-tp", "2", "--max-part-size", UGLY], "is not a size"),
        (["-tp", "2", "--max-workers", "0"], "--max-workers"),
        (["-tp", "2", "--max-workers", "257"], "--max-workers"),
        ([], "-tp"),
        (["-tp", "2", "--nonsense"], "--nonsense"),
        (["-tp", "2", f"--{UGLY}"], "No such option"),
        (["-tp", "2", UGLY], "unexpected extra argument"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(source: Path, options: list[str], words: str) -> None:
    assert words in refused("split", source, source.parent / "new", *options)
    assert not (source.parent / "new").exists()


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "convert", "split", "verify", "export"])
def test_a_path_that_is_not_there_is_named_and_escaped(tmp_path: Path, command: str) -> None:
    more = {
        "convert": [tmp_path / "new"],
        "export": [tmp_path / "new"],
        "split": [tmp_path / "new", "-tp", 2],
    }
    for path in (tmp_path / "nothing", tmp_path / UGLY, "", tmp_path / "file" / "below"):
        (tmp_path / "file").write_bytes(b"")
        refused_by_script(command, path, *more.get(command, []))
    refused(command, tmp_path / ("x" * 300), *more.get(command, []), code=1)
    assert "\\n\\u001b[31m\\u202e" in refused(command, tmp_path / UGLY, *more.get(command, []))
    assert not (tmp_path / "new").exists()


def test_a_command_that_does_not_exist_is_escaped_and_near_ones_are_named() -> None:
    assert "\x1b" not in refused_by_script(UGLY)
    assert "Did you mean 'convert'?" in refused_by_script("covnert")


def test_names_in_folders_files_and_tensors_are_escaped(tmp_path: Path) -> None:
    source = tmp_path / UGLY
    source.mkdir()
    torch.save({UGLY: torch.ones(2).to_sparse()}, source / f"{UGLY}.bin")
    message = refused_by_script("inspect", source)
    assert message.count("\\n\\u001b[31m\\u202e") >= 2
    torch.save({UGLY: torch.ones(2)}, source / f"{UGLY}.bin")
    found = subprocess.run([SHARDPREP, "inspect", source], capture_output=True, check=True, text=True)
    assert all(line.isprintable() for line in found.stdout.splitlines())
    assert "\\n\\u001b[31m\\u202e" in found.stdout


def test_a_tied_name_that_the_metadata_could_not_record_is_refused(source: Path, tmp_path: Path) -> None:
    tensor = torch.ones(2)
    torch.save({"a": tensor, "format": tensor}, source / "pytorch_model.bin")
    (source / "config.json").unlink()
    assert "tied to a tensor named format" in refused("convert", source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_that_no_utf8_can_hold_is_refused(safe_source: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    raw = f'{{"\\ud800":{entry}}}'.encode()
    (safe_source / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"x")
    refused_by_all(safe_source, "surrogate")


def test_a_pickled_name_that_no_utf8_can_hold_is_refused(source: Path) -> None:
    torch.save({"\ud800": torch.ones(2)}, source / "pytorch_model.bin")
    refused_by_all(source, "pytorch_model.bin")


def test_a_config_with_half_a_character_is_carried_over(source: Path, tmp_path: Path) -> None:
    change_json(
        source / "config.json", lambda config: _none((config.pop("torch_dtype"), config.update(x="\ud800")))
    )
    assert CliRunner().invoke(main, ["split", str(source), str(tmp_path / "new"), "-tp", "2"]).exit_code == 0
    assert json.loads((tmp_path / "new" / "config.json").read_bytes())["x"] == "\ud800"


def test_a_folder_without_weights_is_refused(source: Path) -> None:
    (source / "pytorch_model.bin").unlink()
    refused_by_all(source, "no weight files here")


def test_several_weight_files_without_an_index_are_refused(source: Path) -> None:
    shutil.copy(source / "pytorch_model.bin", source / "model.bin")
    refused_by_all(source, "2 weight files and no index.json")


def test_a_text_that_is_called_a_weight_file_is_refused(source: Path) -> None:
    (source / "pytorch_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    refused_by_all(source, "pytorch_model.bin")


def test_a_model_of_no_bytes_is_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tensors = {"model.layers.0.input_layernorm.weight": torch.ones(0)}
    small_models.write_checkpoint(source, tensors, small_models.llama_config(layers=1))
    result = CliRunner().invoke(main, ["split", str(source), str(tmp_path / "new"), "-tp", "2"])
    assert result.exit_code == 0, result.output


# -------------------------------------------------------------------------------------------------------- destinations


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound shard set."""
    folder = tmp_path_factory.mktemp("module")
    source = small_models.write_model(folder / "source")
    assert CliRunner().invoke(main, ["split", str(source), str(folder / "set"), "-tp", "2"]).exit_code == 0
    return folder / "set"


def writers(source: Path, shard_set: Path, destination: Path) -> Iterator[list[object]]:
    """Each command that writes."""
    yield ["convert", source, destination]
    yield ["split", source, destination, "-tp", 2]
    yield ["export", shard_set, destination]


def test_a_destination_that_holds_anything_is_refused_and_kept(
    source: Path, shard_set: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "there"
    for name in ("a.txt", "model.safetensors", "shardprep.json", ".hidden", "config.json", "folder/", UGLY):
        shutil.rmtree(destination, ignore_errors=True)
        destination.mkdir()
        (destination / name).mkdir() if name.endswith("/") else (destination / name).write_text("mine")
        before = contents(destination)
        for command in writers(source, shard_set, destination):
            assert "nothing is overwritten" in refused(*command)
        assert contents(destination) == before


def test_a_destination_that_is_no_folder_is_refused_and_kept(
    source: Path, shard_set: Path, tmp_path: Path
) -> None:
    for make in ODD_FILES:
        destination = tmp_path / make.__name__
        if make is make_folder:
            destination.write_bytes(b"mine")
        else:
            make(destination)
        before = os.lstat(destination)
        for command in writers(source, shard_set, destination):
            assert destination.name in (refused_by_script if make is make_fifo else refused)(*command)
        assert os.lstat(destination) == before
        assert make is not make_folder or destination.read_bytes() == b"mine"


def test_a_destination_below_a_file_cannot_be_written(source: Path, shard_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for command in writers(source, shard_set, tmp_path / "file" / "below"):
        assert "cannot be written: Not a directory" in refused(*command, code=1)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_destination_that_is_the_source_is_refused_and_kept(source: Path, shard_set: Path) -> None:
    for folder, command in ((source, "convert"), (source, "split"), (shard_set, "export")):
        before = contents(folder)
        options = ["-tp", 2] if command == "split" else []
        assert "nothing is overwritten" in refused(command, folder, folder, *options)
        assert contents(folder) == before


def test_a_destination_inside_the_source_leaves_the_source_as_it_was(source: Path) -> None:
    before = contents(source)
    for command, options in (("convert", []), ("split", ["-tp", "2"])):
        inside = source / f"inside-{command}"
        result = CliRunner().invoke(main, [command, str(source), str(inside), *options])
        assert result.exit_code == 0, result.output
    assert {name: data for name, data in contents(source).items() if not name.startswith("inside")} == before


def test_a_partial_folder_that_is_a_file_cannot_be_written(
    source: Path, shard_set: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "there"
    destination.mkdir()
    (destination / ".shardprep-partial").write_text("mine")
    for command in writers(source, shard_set, destination):
        assert "cannot be written" in refused(*command, code=1)
    assert contents(destination) == {".shardprep-partial": b"mine"}


def heed_modes() -> None:
    """In the child, before it runs: let the modes of files count for root too, as they do for everybody else."""
    drop, capabilities = (
        24,
        (1, 2),
    )  # PR_CAPBSET_DROP; CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH (linux/capability.h)
    for capability in capabilities:
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_or_read_is_named(
    source: Path, shard_set: Path, tmp_path: Path
) -> None:
    closed, unread = tmp_path / "closed", tmp_path / "unread"
    closed.mkdir(mode=0o555)
    unread.mkdir(mode=0o000)
    for destination in (closed, closed / "new"):
        for command in writers(source, shard_set, destination):
            message = refused_by_script(*command, code=1, preexec_fn=heed_modes)
            assert "cannot be written: Permission denied" in message
    assert "is not readable" in refused_by_script("inspect", unread, preexec_fn=heed_modes)
    (source / "pytorch_model.bin").chmod(0)
    message = refused_by_script("inspect", source, preexec_fn=heed_modes)
    assert "pytorch_model.bin: cannot be opened: Permission denied" in message
    assert list(closed.iterdir()) == []


def test_what_cannot_be_printed_is_a_problem_and_no_traceback(source: Path) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [SHARDPREP, "inspect", source], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert found.returncode == 1
    assert b"No space left on device" in found.stderr
    assert b"Traceback" not in found.stderr


# ---------------------------------------------------------------------------------------------------- damaged sources


def test_a_flipped_bit_in_a_storage_is_caught_by_its_crc_and_leaves_nothing(
    source: Path, tmp_path: Path
) -> None:
    path = source / "pytorch_model.bin"
    raw = bytearray(path.read_bytes())
    needle = torch.load(path)["model.layers.1.mlp.up_proj.weight"].view(torch.uint8).numpy().tobytes()[:64]
    raw[raw.index(needle) + 3] ^= 16
    path.write_bytes(raw)
    for options in (["convert"], ["split", "-tp", 2]):
        message = refused_by_script(options[0], source, tmp_path / "new", *options[1:], code=1)
        assert "pytorch_model.bin" in message
        assert "crc32" in message
        assert not (tmp_path / "new").exists()
        (tmp_path / "empty").mkdir(exist_ok=True)
        refused(options[0], source, tmp_path / "empty", *options[1:], code=1)
        assert list((tmp_path / "empty").iterdir()) == []


def test_a_damaged_shard_set_is_not_exported(shard_set: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shard_set, folder)
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(raw)
        return folder

    part = sorted(path.name for path in shard_set.glob("*.safetensors"))[0]
    for name in (part, "config.json", "LICENSE"):
        folder = damaged(name)
        message = refused("export", folder, tmp_path / "new", code=1)
        assert name in message
        assert "match" in message
        assert name in refused("verify", folder, code=1)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["part", "LICENSE"])
def test_a_shard_set_that_lacks_a_file_is_not_exported(shard_set: Path, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(shard_set, tmp_path / "set"))
    path = sorted(folder.glob("*.safetensors"))[0] if what == "part" else folder / what
    path.unlink()
    for command in (["verify", folder], ["export", folder, tmp_path / "new"]):
        assert path.name in refused(*command)
    assert not (tmp_path / "new").exists()


def test_a_shard_set_is_no_source_for_convert_and_split(shard_set: Path, tmp_path: Path) -> None:
    assert "shardprep export" in refused("convert", shard_set, tmp_path / "new")
    assert "shard set already" in refused("split", shard_set, tmp_path / "new", "-tp", 2)


def test_a_checkpoint_is_no_shard_set(source: Path, tmp_path: Path) -> None:
    assert "no manifest here" in refused("verify", source)
    assert "no manifest here" in refused("export", source, tmp_path / "new")
