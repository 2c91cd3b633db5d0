"""What is read from a torch file is what torch.load would have read from it."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import os
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.serialization import config

import torch_corpus as corpus
from lazily import torch
from shardprep.files import LocalFolder
from shardprep.source import torch_files
from shardprep.source.torch_files import TorchFile, is_torch_file, read_torch_file
from shardprep_runtime.errors import FormatError, UnsupportedError
from shardprep_runtime.format import dtypes

LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = [
    *(pytest.param({"pickle_protocol": protocol}, id=f"zip-{protocol}") for protocol in range(2, 6)),
    *(
        pytest.param({"pickle_protocol": protocol, **LEGACY}, id=f"legacy-{protocol}")
        for protocol in range(2, 6)
    ),
]


def save(obj: Any, path: Path, **options: Any) -> TorchFile:
    torch.save(obj, path, **options)
    return read_torch_file(LocalFolder(path.parent), path.name)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    packed = tensor.detach().contiguous()
    return packed.flatten().view(torch.uint8).numpy().tobytes() if packed.numel() else b""


def assert_same(found: TorchFile, path: Path, *wrappers: str, saved: Any = None) -> None:
    expected = torch.load(path, weights_only=False) if saved is None else saved
    for wrapper in wrappers:
        expected = expected[wrapper]
    expected = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert found.tensors.keys() | found.aliases.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = found.tensors[found.aliases.get(name, name)]
        shape = list(tensor.shape)
        if ours.dtype == "F4":
            shape[-1] *= 2
        assert dtypes.TORCH[ours.dtype] == str(tensor.dtype).removeprefix("torch.")
        assert list(ours.shape) == shape
        assert corpus.tensor_bytes(ours, path.parent) == raw_bytes(tensor), name


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(96, dtype=torch.uint8) % 2
    return {
        ours: raw.clone().view(getattr(torch, theirs)).reshape(3, -1)
        for ours, theirs in dtypes.TORCH.items()
        if hasattr(torch, theirs)
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


# values


@pytest.mark.parametrize("options", FORMATS)
def test_every_dtype_of_safetensors_is_read(path: Path, options: dict[str, Any]) -> None:
    found = save(every_dtype(), path, **options)
    assert found.tensors.keys() == dtypes.TORCH.keys()
    assert all(name == tensor.dtype for name, tensor in found.tensors.items())
    # torch 2.13 cannot read the untyped storages (float8 and the like) of its own legacy files
    assert_same(found, path, saved=every_dtype() if "_use_new_zipfile_serialization" in options else None)


def shapes_and_views() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32)
    matrix = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "slice beyond": base.reshape(6, 10)[:, 10:],
        "window": base[7:19],
        "rows": base.reshape(6, 10)[2:4],
        "columns": base.reshape(6, 10)[:, 3:5],
        "every third": base[::3],
        "transposed": matrix.t(),
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "thin": base[::10].reshape(6, 1, 1),
        "one row": base.reshape(6, 10)[1:2].t().t(),
        "expanded": torch.arange(3, dtype=torch.int16).reshape(3, 1).expand(3, 5),
        "diagonal": base[:36].reshape(6, 6).diagonal(),
    }


@pytest.mark.parametrize("options", FORMATS)
def test_views_are_read_as_torch_reads_them(path: Path, options: dict[str, Any]) -> None:
    found = save(shapes_and_views(), path, **options)
    assert_same(found, path)
    strided = {name for name, tensor in found.tensors.items() if tensor.extents[0].strides is not None}
    assert strided == {"columns", "every third", "transposed", "permuted", "thin", "expanded", "diagonal"}


def test_strides_of_dims_of_size_one_make_no_tensor_strided(path: Path) -> None:
    found = save({"w": torch.arange(6.0).as_strided((1, 6, 1), (77, 1, 99))}, path)
    assert found.tensors["w"].extents[0].strides is None


def test_tensors_stay_in_the_order_of_the_file(path: Path) -> None:
    found = save({name: torch.ones(1) for name in "zebra"}, path)
    assert list(found.tensors) == ["z", "e", "b", "r", "a"]


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tied_tensors_stand_once_and_overlapping_ones_each(path: Path, options: dict[str, Any]) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    weights = {
        "embed": whole,
        "head": whole,
        "same view": whole.view(3, 4),
        "flat": whole.view(12),
        "part": whole[1:],
        "turned": whole.t(),
        "turned too": whole.t(),
        "equal but apart": whole.clone(),
    }
    found = save(weights, path, **options)
    assert found.aliases == {"head": "embed", "same view": "embed", "turned too": "turned"}
    assert_same(found, path)


def test_parameters_and_buffers_are_tensors(path: Path) -> None:
    adorned = torch.nn.Parameter(torch.arange(3.0))
    adorned.note = "kept by torch, of no use to us"  # type: ignore[attr-defined]
    found = save(
        {
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "with state": adorned,
            "buffer": torch.nn.Buffer(torch.ones(3)),
            "size": torch.ones(torch.Size([2, 2])),
        },
        path,
    )
    assert_same(found, path)


def test_a_state_dict_with_metadata_and_hooks_is_read(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    found = save(model.state_dict(), path)
    assert "1.num_batches_tracked" in found.tensors
    assert found.left_out == ()
    assert_same(found, path)


# where the weights are


@pytest.mark.parametrize("wrapper", torch_files.WRAPPERS)
def test_a_wrapper_is_opened_and_what_stands_beside_it_is_left_out(path: Path, wrapper: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    found = save(
        {
            "rng": torch.get_rng_state(),
            "optimizer": optimizer.state_dict(),
            wrapper: model.state_dict(),
            "ema": {"weight": torch.zeros(2, 3)},
            "epoch": 3,
        },
        path,
    )
    assert list(found.tensors) == ["weight", "bias"]
    assert {out.name: out.reason for out in found.left_out} == {
        "rng": f"a tensor beside the weights in {wrapper}",
        "optimizer": f"a dict beside the weights in {wrapper}",
        "ema": f"a dict beside the weights in {wrapper}",
        "epoch": f"a value of type int beside the weights in {wrapper}",
    }
    assert_same(found, path, wrapper)


def test_two_wrappers_deep_is_found_and_three_are_refused(path: Path) -> None:
    weights = {"w": torch.ones(2)}
    found = save({"model": {"state_dict": weights, "step": 1}}, path)
    assert list(found.tensors) == ["w"]
    assert [out.name for out in found.left_out] == ["model.step"]
    with pytest.raises(UnsupportedError, match="more than two wrappers deep"):
        save({"model": {"state_dict": {"module": weights}}}, path)


def test_a_tensor_beside_an_empty_model_is_not_taken_for_the_model(path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no tensors in model, where the weights should be"):
        save({"rng": torch.zeros(3), "model": {}}, path)


def test_two_wrappers_that_hold_tensors_are_refused_by_name(path: Path) -> None:
    weights = {"w": torch.ones(2)}
    with pytest.raises(UnsupportedError, match="both state_dict and model hold tensors"):
        save({"model": weights, "state_dict": weights}, path)
    assert save({"model": {"name": "tiny"}, "state_dict": weights}, path).tensors.keys() == {"w"}


def test_an_unknown_wrapper_is_refused_by_name(path: Path) -> None:
    for beside in ({}, {"rng": torch.zeros(3)}):
        with pytest.raises(UnsupportedError, match="net_g: a dict that holds tensors among the weights"):
            save({**beside, "net_g": {"w": torch.ones(2)}}, path)


def test_entries_without_tensors_are_left_out_with_the_reason(path: Path) -> None:
    found = save(
        {
            "w": torch.ones(2),
            "version": 7,
            "none": None,
            "names": ["a", "b"],
            "layer._extra_state": {"scale": torch.ones(1)},
            "blob": b"bytes",
            "date": datetime.date(2020, 1, 1),
        },
        path,
    )
    assert found.tensors.keys() == {"w"}
    assert {out.name: out.reason for out in found.left_out} == {
        "version": "a value of type int, not a tensor",
        "none": "None, not a tensor",
        "names": "a value of type list, not a tensor",
        "layer._extra_state": "a dict, not a tensor",
        "blob": "a _codecs.encode object, not a tensor",
        "date": "a datetime.date object, not a tensor",
    }


class Settings:
    """Stands for a class of the user's own."""

    def __init__(self) -> None:
        self.rate = 0.1


class Table(dict[str, Any]):
    """Stands for a dict of the user's own."""


class Ordered(collections.OrderedDict[str, Any]):
    """Stands for an OrderedDict of the user's own."""


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "users_own", sys.modules[__name__])
    for kind in (Settings, Table, Ordered):
        monkeypatch.setattr(kind, "__module__", "users_own")


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.usefixtures("importable")
def test_what_training_leaves_beside_the_weights_is_left_out(path: Path, protocol: int) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "numpy scalar": np.float32(1.5),
        "numpy array": np.arange(4),
        "numpy rng": np.random.get_state(),
        "generator": np.random.default_rng(3),
        "path": pathlib.Path("/tmp/x"),
        "partial": functools.partial(dict, a=1),
        "counter": collections.Counter("abca"),
        "groups": collections.defaultdict(list, {"a": [1]}),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "layout": torch.strided,
        "settings": Settings(),
        "table": Table(a=1),
        "big": 2**70,
        "huge text": "x" * 70_000,
        "bytearray": bytearray(b"abc"),
        "pi": 3.14,
        "flags": (True, False, None, -5, 70_000),
    }
    found = save({"model": {"w": torch.ones(2)}, **beside}, path, pickle_protocol=protocol)
    assert found.tensors.keys() == {"w"}
    assert [out.name for out in found.left_out] == list(beside)


def test_a_defaultdict_of_tensors_is_read(path: Path) -> None:
    found = save(collections.defaultdict(list, {"w": torch.ones(2)}), path)
    assert_same(found, path)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_weights_in_a_class_of_the_users_own_are_refused_by_its_name(
    path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedError, match=r"a users_own\.Table object, expected a dict"):
        save(Table(w=torch.ones(2)), path, **options)
    with pytest.raises(UnsupportedError, match=r"w: a users_own\.Table object that holds tensors"):
        save({"w": Table(w=torch.ones(2))}, path, **options)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_weights_in_a_subclass_of_ordereddict_are_read_without_its_class(
    path: Path, options: dict[str, Any]
) -> None:
    weights = Ordered(w=torch.arange(2.0), b=torch.ones(3))
    assert_same(save(weights, path, **options), path, saved=weights)


def test_the_state_of_an_optimizer_among_the_weights_is_left_out(path: Path) -> None:
    found = save(
        {"w": torch.ones(2), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "lr": 0.1}, path
    )
    assert found.tensors.keys() == {"w"}
    assert [(out.name, out.reason) for out in found.left_out] == [
        ("optimizer", "a dict, not a tensor"),
        ("lr", "a value of type float, not a tensor"),
    ]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_is_refused_by_name_with_advice(
    path: Path, wrapped: bool, options: dict[str, Any]
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(
        UnsupportedError, match=r"a whole pickled module, torch\.nn.modules\.container\.Sequential"
    ) as error:
        save({"model": model, "epoch": 1} if wrapped else model, path, **options)
    assert "torch.save(model.state_dict(), ...)" in str(error.value)


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        (torch.ones(3), "a tensor, expected a dict"),
        ([torch.ones(3)], "type list, expected a dict"),
        ({}, "no tensors found"),
        ({"epoch": 1}, "no tensors found"),
        ({0: torch.ones(3)}, "a key that is a value of type int"),
        ({"w": torch.ones(3), 0: 1}, "a key that is a value of type int"),
        ({"w": [torch.ones(3)]}, "w: a value of type list that holds tensors"),
        ({"w": torch.ones(3).untyped_storage()}, "w: a bare storage that holds tensors"),
        ({"__metadata__": torch.ones(3)}, "safetensors reserves this name"),
    ],
)
def test_what_is_no_mapping_of_names_to_tensors_is_refused(path: Path, obj: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        save(obj, path)


# kinds of tensors


@pytest.mark.filterwarnings("ignore")  # torch warns of kinds that it is about to drop
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex128), "no dtype for torch.complex128"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "no dtype for torch.complex32"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "no dtype for torch.bits8"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "quantized torch tensor"),
        (lambda: torch.eye(2).to_sparse(), "sparse; call .to_dense"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse; call .to_dense"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (lambda: torch.zeros(2, device="meta"), "on the meta device"),
        (lambda: torch.nn.Parameter(torch.zeros(2, device="meta")), "on the meta device"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugate or negative bit"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "conjugate or negative bit"),
        (lambda: torch.nn.parameter.UninitializedParameter(), "never initialized"),
    ],
)
def test_tensors_that_cannot_be_carried_over_are_refused_by_name(path: Path, make: Any, words: str) -> None:
    weights = {"fine": torch.ones(1), "layer.odd": make()}
    with pytest.raises(UnsupportedError, match=rf"layer\.odd.*{words}"):
        save(weights, path)
    assert save({"model": {"fine": torch.ones(1)}, "beside": weights}, path).tensors.keys() == {"fine"}


def test_a_tensor_subclass_is_refused_by_the_name_of_its_class(path: Path) -> None:
    hooks = corpus.named("collections", "OrderedDict") + b")R"
    plain = corpus.tup(corpus.storage(), b"K\x00", corpus.ints((4,)), corpus.ints((1,)), b"\x89", hooks)
    for module, name, words in [
        ("torchao", "Quantized", "w cannot be carried over: it is a torchao.Quantized"),
        ("torch._subclasses.fake_tensor", "FakeTensor", "FakeTensor"),
    ]:
        body = corpus.reduce(
            "torch._tensor",
            "_rebuild_from_type_v2",
            corpus.named("torch._utils", "_rebuild_tensor_v2"),
            corpus.named(module, name),
            plain,
            b"}",
        )
        corpus.write_zip(path, corpus.pickled(corpus.mapping(w=body)))
        with pytest.raises(UnsupportedError, match=words):
            read_torch_file(LocalFolder(path.parent), path.name)


def test_float4_must_be_packed(path: Path) -> None:
    raw = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    found = save({"w": raw[1:].view(torch.float4_e2m1fn_x2)}, path)
    assert (found.tensors["w"].dtype, found.tensors["w"].shape) == ("F4", (2, 8))
    assert corpus.tensor_bytes(found.tensors["w"], path.parent) == bytes(range(4, 12))
    with pytest.raises(UnsupportedError, match="float4 tensor that is not packed"):
        save({"w": raw.view(torch.float4_e2m1fn_x2).t()}, path)


def test_expansion_is_bounded_for_one_tensor_and_for_all(path: Path) -> None:
    one = torch.ones(1)
    million = 2**20
    assert save({"w": one.expand(16 * million)}, path).tensors["w"].nbytes == 64 * million
    with pytest.raises(UnsupportedError, match="w: expanded from a storage of 4 bytes"):
        save({"w": one.expand(17 * million)}, path)
    with pytest.raises(UnsupportedError, match="expanded tensors must be saved expanded once"):
        save({str(n): one.expand(million, n) for n in range(2, 9)}, path)


# containers


@pytest.fixture
def checksums_off() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("checksums_off")
def test_a_file_saved_without_checksums_has_no_record_to_check(path: Path) -> None:
    found = save({"w": torch.ones(3)}, path)
    assert found.tensors["w"].extents[0].record is None
    assert_same(found, path)


@pytest.mark.parametrize("alignment", [64, 4096, 65_536 // 2])
def test_any_alignment_of_storages_is_read(path: Path, alignment: int) -> None:
    with config.patch({"save.storage_alignment": alignment}):
        found = save(shapes_and_views(), path)
    assert_same(found, path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", [name for name in dtypes.TORCH if name != "F4"])
def test_big_endian_files_are_told_apart(path: Path, dtype: str, protocol: int) -> None:
    tensor = every_dtype()[dtype].clone()
    itemsize = 4 if dtype == "C64" else tensor.element_size()
    values = {"w": tensor, "t": tensor.t()}
    torch.save(values, path, pickle_protocol=protocol)
    little = read_torch_file(LocalFolder(path.parent), path.name)
    start = little.tensors["w"].extents[0].offset
    raw = path.read_bytes()
    swapped = np.frombuffer(raw[start : start + 96], np.uint8).reshape(-1, itemsize)[:, ::-1].tobytes()
    data = _member(raw, "data.pkl")
    entries = corpus.members(data, {"0": swapped})
    entries[1].data = b"big"
    path.write_bytes(corpus.zipped(entries))
    found = read_torch_file(LocalFolder(path.parent), path.name)
    for name, value in values.items():
        assert found.tensors[name].extents[0].big_endian == (tensor.element_size() > 1)
        assert corpus.tensor_bytes(found.tensors[name], path.parent) == raw_bytes(value)


def _member(raw: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return archive.read(next(found for found in archive.namelist() if found.endswith(name)))


@pytest.mark.parametrize("count_order", ["little", "big"])
def test_a_legacy_file_of_a_big_endian_machine_holds_little_endian_data(path: Path, count_order: Any) -> None:
    torch.save({"w": torch.arange(5.0)}, path, **LEGACY)
    raw = path.read_bytes()
    at = raw.index(b"little_endian")
    at = raw.index(b"\x88", at)
    count = raw.rindex((5).to_bytes(8, "little"))
    changed = raw[:at] + b"\x89" + raw[at + 1 : count] + (5).to_bytes(8, count_order) + raw[count + 8 :]
    path.write_bytes(changed)
    found = read_torch_file(LocalFolder(path.parent), path.name)
    assert not found.tensors["w"].extents[0].big_endian
    assert corpus.tensor_bytes(found.tensors["w"], path.parent) == raw_bytes(torch.arange(5.0))


def test_a_legacy_view_of_a_storage_is_found_in_it(path: Path) -> None:
    def persistent(window: bytes) -> bytes:
        head = [
            corpus.text("storage"),
            corpus.named("torch", "FloatStorage"),
            corpus.text("k"),
            corpus.text("cpu"),
        ]
        return corpus.tup(*head, b"K\x06", window) + b"Q"

    def legacy(window: tuple[int, int]) -> bytes:
        part = persistent(corpus.tup(corpus.text("v"), *map(corpus.integer, window)))
        body = corpus.mapping(
            whole=corpus.view((6,), source=persistent(b"N")), part=corpus.view((2,), source=part)
        )
        return _legacy_bytes(body, {"k": (6, bytes(range(24)))})

    path.write_bytes(legacy((3, 2)))
    found = read_torch_file(LocalFolder(path.parent), path.name)
    assert corpus.tensor_bytes(found.tensors["part"], path.parent) == bytes(range(12, 20))
    path.write_bytes(legacy((5, 2)))
    with pytest.raises(FormatError, match="a part of storage k that does not lie in it"):
        read_torch_file(LocalFolder(path.parent), path.name)
    path.write_bytes(legacy((3, 1)))
    with pytest.raises(FormatError, match="part: reaches element 1 of a storage of 1"):
        read_torch_file(LocalFolder(path.parent), path.name)


def _legacy_bytes(body: bytes, storages: dict[str, tuple[int, bytes]]) -> bytes:
    magic = corpus.pickled(corpus.integer(0x1950A86A20F9469CFC6C))
    info = corpus.pickled(corpus.mapping(little_endian=b"\x88"))
    keys = corpus.pickled(b"](" + b"".join(map(corpus.text, storages)) + b"e")
    data = b"".join(numel.to_bytes(8, "little") + raw for numel, raw in storages.values())
    return magic + corpus.pickled(corpus.integer(1001)) + info + corpus.pickled(body) + keys + data


def test_a_legacy_file_of_python_2_is_read(path: Path) -> None:
    def py2(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    kept = corpus.tup(
        py2("storage"), corpus.named("torch", "LongStorage"), py2("42"), py2("cpu"), b"K\x02", b"N"
    )
    shape, stride = b"K\x02\x85", b"K\x01\x85"
    tensor = (
        corpus.named("torch._utils", "_rebuild_tensor") + b"(" + kept + b"QK\x00" + shape + stride + b"tR"
    )
    pairs = b"]](" + py2("w") + tensor + b"ea"
    body = corpus.reduce("collections", "OrderedDict", pairs)
    path.write_bytes(_legacy_bytes(body, {"42": (2, bytes(16))}))
    assert read_torch_file(LocalFolder(path.parent), path.name).tensors["w"].shape == (2,)
    beside = b"}(" + py2("model") + body + py2("big") + b"I4294967296\n" + py2("flag") + b"I01\nu"
    path.write_bytes(_legacy_bytes(beside, {"42": (2, bytes(16))}))
    assert [out.name for out in read_torch_file(LocalFolder(path.parent), path.name).left_out] == [
        "big",
        "flag",
    ]


def test_a_legacy_file_whose_pickle_is_longer_than_the_first_window_is_read(path: Path) -> None:
    found = save({"model": {"w": torch.ones(3)}, "notes": "x" * 2**21}, path, **LEGACY)
    assert_same(found, path, "model")


def test_a_member_beyond_4_gib_is_read_by_its_zip64_fields(path: Path) -> None:
    """The layout that torch writes (checked against a file of its own), as a sparse file."""
    huge = 2**32 + 64
    weights = corpus.mapping(
        big=corpus.view((huge,), source=corpus.storage("0", huge, "ByteStorage")),
        w=corpus.view((4,), source=corpus.storage("1", 4)),
    )
    data = corpus.pickled(weights)
    directory, end = b"", 0
    with path.open("wb") as file:
        for name, size, content in [
            ("data.pkl", len(data), data),
            ("data/0", huge, b""),
            ("data/1", 16, bytes(range(16))),
            ("version", 2, b"3\n"),
        ]:
            raw_name = f"archive/{name}".encode()
            wide_size = size >= 2**32 - 1
            offsets = [end] * (end >= 2**32 - 1)
            wide = [size, size] * wide_size + offsets
            extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            early = [size, 0] * wide_size + offsets
            local_extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *early) if wide else b""
            short, at = (2**32 - 1 if wide_size else size), min(end, 2**32 - 1)
            crc32 = zlib.crc32(content)
            file.seek(end)
            file.write(
                struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(raw_name), len(extra))
            )
            file.write(raw_name + local_extra + content)
            end += 30 + len(raw_name) + len(extra) + size
            file.seek(end)
            tail = struct.pack("<4sLQQ" if wide else "<4sLLL", b"PK\x07\x08", crc32, size, size)
            end += file.write(tail)
            head = (
                b"PK\x01\x02",
                0,
                0,
                0x808,
                0,
                0,
                0,
                crc32,
                short,
                short,
                len(raw_name),
                len(extra),
                0,
                0,
                0,
                0,
                at,
            )
            directory += struct.pack("<4s6H3L5H2L", *head) + raw_name + extra
        file.write(
            directory + corpus.end64(4, len(directory), end) + corpus.end_record(4, len(directory), 2**32 - 1)
        )
    found = read_torch_file(LocalFolder(path.parent), path.name)
    assert found.tensors["big"].shape == (huge,)
    extent = found.tensors["w"].extents[0]
    assert extent.offset > 2**32
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 16, extent.offset) == bytes(range(16))


def test_members_that_no_tensor_refers_to_are_reported(path: Path) -> None:
    data = corpus.pickled(corpus.mapping(w=corpus.view()))
    path.write_bytes(corpus.zipped([*corpus.members(data), corpus.Entry("archive/data/9", b"x" * 8)]))
    found = read_torch_file(LocalFolder(path.parent), path.name)
    assert [(out.name, out.reason) for out in found.left_out] == [
        ("data/9", "a member of the zip that no tensor refers to")
    ]


def test_the_digest_changes_with_any_byte_of_the_weights_and_of_their_description(path: Path) -> None:
    first = save({"w": torch.zeros(3)}, path).source
    assert (
        first == save({"w": torch.zeros(3)}, path).source
        or first.digest == save({"w": torch.zeros(3)}, path).source.digest
    )
    others = [{"w": torch.ones(3)}, {"v": torch.zeros(3)}, {"w": torch.zeros(3, 1)}]
    assert len({first.digest, *(save(other, path).source.digest for other in others)}) == 4
    assert first.digest.startswith("sha256:")
    assert first.path == "model.bin"


def test_paths_are_relative_to_the_checkpoint_and_links_are_followed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "sub").mkdir(parents=True)
    link = tmp_path / "snapshot" / "sub" / "model.bin"
    link.symlink_to(tmp_path / "blob")
    found = read_torch_file(LocalFolder(tmp_path / "snapshot"), "sub/model.bin")
    assert found.source.path == found.tensors["w"].extents[0].file == "sub/model.bin"


# what is no torch file


def test_torch_files_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "zip")
    torch.save({}, tmp_path / "legacy", **LEGACY)
    (tmp_path / "text").write_text("{}")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    known = {path.name for path in tmp_path.iterdir() if is_torch_file(LocalFolder(tmp_path), path.name)}
    assert known == {"zip", "legacy"}
    assert not is_torch_file(LocalFolder(tmp_path), "missing")
    assert not is_torch_file(LocalFolder(tmp_path), ".")


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(FormatError, match="not a regular file"):
            read_torch_file(LocalFolder(tmp_path), name)
    with pytest.raises(FormatError, match="cannot be opened: No such file"):
        read_torch_file(LocalFolder(tmp_path), "missing")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a torch file"),
        (b"{}", "not a torch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"storages" + bytes(600), "the tar format"),
        (b"\x80\x02}.", "a pickle, but not one that torch.save wrote"),
    ],
)
def test_other_files_are_refused_with_advice(path: Path, raw: bytes, words: str) -> None:
    path.write_bytes(raw)
    with pytest.raises((FormatError, UnsupportedError), match=words):
        read_torch_file(LocalFolder(path.parent), path.name)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_refused_by_name(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(UnsupportedError, match="TorchScript program"):
        read_torch_file(LocalFolder(path.parent), path.name)


def test_reading_imports_neither_torch_nor_numpy_nor_pickle(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    program = (
        "import sys; from pathlib import Path; from shardprep.files import LocalFolder\n"
        "from shardprep.source.torch_files import read_torch_file as read\n"
        f"read(LocalFolder(Path({str(path.parent)!r})), {path.name!r})\n"
        "print([name for name in ('torch', 'numpy', 'pickle', 'zipfile', 'tarfile') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
