"""Whatever a file claims, nothing in it runs, and reading it costs no more than its size suggests."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

import torch_corpus as corpus
from lazily import torch
from shardprep.files import LocalFolder
from shardprep.source import torch_files, torch_pickle
from shardprep.source.torch_files import TorchFile, read_torch_file
from shardprep.source.torch_pickle import read_pickle
from shardprep_runtime.errors import FormatError, UnsupportedError
from torch_corpus import Entry, integer, mapping, named, pickled, reduce, text, tup, view

GOOD = pickled(mapping(w=view()))
REFUSED = (FormatError, UnsupportedError)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def read(path: Path) -> TorchFile:
    return read_torch_file(LocalFolder(path.parent), path.name)


def read_data(path: Path, data: bytes) -> TorchFile:
    return read(corpus.write_zip(path, data))


# execution

CANARY = "touch {}"


def command(canary: Path) -> bytes:
    return text(CANARY.format(canary))


def calls(canary: Path) -> dict[str, bytes]:
    """Payloads each of which makes `canary` when pickle.loads reads it."""
    run = command(canary)
    stack_global = text("os") + text("system") + b"\x93"
    make = tup(text(f"open({str(canary)!r}, 'w').close()"))
    return {
        "GLOBAL and REDUCE": pickled(named("os", "system") + tup(run) + b"R"),
        "its C name": pickled(named("posix", "system") + tup(run) + b"R"),
        "STACK_GLOBAL": pickled(stack_global + tup(run) + b"R", 4),
        "INST": pickled(b"(" + run + b"ios\nsystem\n"),
        "OBJ": pickled(
            b"("
            + named("subprocess", "Popen")
            + text("true")
            + b"o0"
            + named("os", "system")
            + tup(run)
            + b"R"
        ),
        "eval": pickled(named("builtins", "eval") + make + b"R"),
        "exec of Python 2's name": pickled(named("__builtin__", "eval") + make + b"R"),
        "subprocess by a tuple": pickled(
            named("subprocess", "check_call") + tup(b"](" + text("touch") + text(str(canary)) + b"e") + b"R"
        ),
        "through getattr": pickled(
            reduce("builtins", "getattr", reduce("builtins", "__import__", text("os")), text("system"))
            + tup(run)
            + b"R"
        ),
        "a dotted name": pickled(
            text("torch.serialization") + text("os.system") + b"\x93" + tup(run) + b"R", 4
        ),
        "a partial called": pickled(reduce("functools", "partial", named("os", "system"), run) + b")R"),
        "BUILD with __setstate__": pickled(
            named("argparse", "Namespace")
            + b")\x81}"
            + text("__setstate__")
            + named("os", "system")
            + b"sb"
            + run
            + b"b"
        ),
        "an argument of a tensor": pickled(mapping(w=view(source=named("os", "system") + tup(run) + b"R"))),
        "beside the weights": pickled(mapping(model=mapping(w=view()), args=reduce("os", "system", run))),
        "popped before the weights": pickled(reduce("os", "system", run) + b"0" + mapping(w=view())),
        "within a list in a dict": pickled(
            mapping(model=mapping(w=view()), x=b"](" + reduce("os", "system", run) + b"e")
        ),
        "map over a list": pickled(
            reduce("builtins", "list", reduce("builtins", "map", named("os", "system"), b"](" + run + b"e"))
        ),
        "torch's own loader": pickled(reduce("torch.serialization", "os.system", run)),
        "numpy's runstring": pickled(
            reduce("numpy.testing._private.utils", "runstring", text(f"open({str(canary)!r}, 'w')"), b"}")
        ),
    }


NAMES = list(calls(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_is_refused_and_never_runs(tmp_path: Path, path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    payload = calls(canary)[name]
    for file in (payload, corpus.zipped(corpus.members(payload)), _legacy(payload)):
        path.write_bytes(file)
        with pytest.raises(REFUSED) as error:
            read(path)
        assert "model.bin" in str(error.value)
        assert len(str(error.value).splitlines()) <= 3
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["GLOBAL and REDUCE", "STACK_GLOBAL", "INST", "eval", "BUILD with __setstate__"]
)
def test_the_same_payload_does_run_in_pickle(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    pickle.loads(calls(canary)[name])
    assert canary.exists()


def _legacy(main: bytes, *, keys: bytes | None = None, data: bytes = b"") -> bytes:
    parts = [
        pickled(integer(0x1950A86A20F9469CFC6C)),
        pickled(integer(1001)),
        pickled(mapping(little_endian=b"\x88")),
        main,
        pickled(b"]") if keys is None else keys,
    ]
    return b"".join(parts) + data


def test_a_refused_call_is_named(path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"model\.bin: data\.pkl: names posix\.system.*refused, nothing was executed"
    ):
        read_data(path, pickled(reduce("posix", "system", text("true"))))
    with pytest.raises(FormatError, match=r"calls torch\.hub\.load: refused"):
        read_data(path, pickled(reduce("torch.hub", "load", text("a/b"))))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "type"),
        ("__builtin__", "apply"),
        ("__builtin__", "execfile"),
        ("commands", "getoutput"),
        ("operator", "attrgetter"),
        ("operator", "methodcaller"),
        ("importlib", "import_module"),
        ("runpy", "_run_code"),
        ("pty", "spawn"),
        ("socket", "create_connection"),
        ("webbrowser", "open"),
        ("ctypes", "CDLL"),
        ("types", "CodeType"),
        ("types", "FunctionType"),
        ("pickle", "loads"),
        ("_pickle", "loads"),
        ("shutil", "rmtree"),
        ("pathlib", "Path.unlink"),
        ("collections", "abc.sys.modules"),
        ("codecs", "decode"),
        ("_codecs", "decode"),
        ("functools", "reduce"),
        ("logging.config", "listen"),
        ("pip", "main"),
        ("pip._internal", "main"),
        ("torch", "load"),
        ("torch", "_utils.sys.modules"),
        ("torch.jit", "load"),
        ("torch.hub", "load"),
        ("torch.utils.cpp_extension", "load_inline"),
        ("torch.storage", "os.system"),
        ("numpy", "load"),
        ("numpy.f2py.diagnose", "run"),
        ("numpy.testing._private.utils", "runstring"),
        ("transformers.utils.hub", "cached_file"),
        ("transformers", "os.system"),
        ("accelerate.utils", "execute_subprocess_async"),
        ("users.own", "function"),
        ("users.own", "make"),
        ("", ""),
        ("__main__", "main"),
    ],
)
def test_calls_that_are_not_known_to_be_harmless_are_refused(path: Path, module: str, name: str) -> None:
    found = text(module) + text(name) + b"\x93"
    with pytest.raises(FormatError, match="refused, nothing was executed"):
        read_data(path, pickled(mapping(model=mapping(w=view()), args=found + b")R"), 4))


@pytest.mark.parametrize(
    "target",
    [b"N", b"K\x01", b"]", b"}", text("os.system"), view(), named("argparse", "Namespace") + b")\x81"],
)
def test_only_names_are_called(path: Path, target: bytes) -> None:
    for opcode in (b"R", b"\x81"):
        with pytest.raises(FormatError, match="refused, nothing was executed"):
            read_data(path, pickled(target + b")" + opcode))


@pytest.mark.parametrize("opcode", [b"\x81", b"}\x92"])
def test_instances_of_unknown_classes_are_left_out_and_of_the_standard_library_refused(
    path: Path, opcode: bytes
) -> None:
    instance = named("users.own", "Settings") + b")" + opcode
    found = read_data(path, pickled(mapping(model=mapping(w=view()), args=instance)))
    assert [out.reason for out in found.left_out] == [
        "a users.own.Settings object beside the weights in model"
    ]
    for module, name in [("subprocess", "Popen"), ("os", "_wrap_close"), ("users.own", "os.system")]:
        with pytest.raises(FormatError, match="refused, nothing was executed"):
            read_data(
                path,
                pickled(
                    mapping(model=mapping(w=view()), args=text(module) + text(name) + b"\x93)" + opcode), 4
                ),
            )


@pytest.mark.parametrize(
    "opcode",
    [
        b"\x82\x01",  # EXT1, EXT2, EXT4: numbers that a registry of the process turns into globals
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        b"Pid\n",  # PERSID
        b"p0\n",  # text memo, floats, strings of protocol 0
        b"F1.5\n",
        b"S'x'\n",
        b"Vx\n",
        b"L5L\n",
        b"(l",
        b"(d",
        b"2",
        b"\x8b\xff\xff\xff\x7f",  # LONG4
        b"\x97",  # NEXT_BUFFER
        b"\x98",
        b"\x80\x02",
        b"\x00",
        b"\xff",
    ],
)
def test_opcodes_that_torch_never_writes_are_refused(path: Path, opcode: bytes) -> None:
    with pytest.raises(FormatError, match=r"which torch\.save does not write"):
        read_data(path, pickled(b"N" + opcode))


# references to storages


def persistent(*parts: bytes) -> bytes:
    return tup(*parts) + b"Q"


@pytest.mark.parametrize(
    "source",
    [
        b"NQ",
        text("0") + b"Q",
        b"]Q",
        b")Q",
        persistent(text("module"), named("users", "Net"), text("f"), text("s")),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu")),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x04", b"N"),
        persistent(text("stor"), named("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x04"),
        persistent(text("storage"), text("FloatStorage"), text("0"), text("cpu"), b"K\x04"),
        persistent(text("storage"), named("torch", "OddStorage"), text("0"), text("cpu"), b"K\x04"),
        persistent(text("storage"), named("users", "FloatStorage"), text("0"), text("cpu"), b"K\x04"),
        persistent(text("storage"), named("torch", "FloatStorage"), b"K\x00", text("cpu"), b"K\x04"),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), b"K\x00", b"K\x04"),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), b"\x88"),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), text("4")),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), integer(-4)),
        persistent(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), integer(2**63)),
        b"](" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04eQ",
    ],
)
def test_every_reference_to_a_storage_is_checked(path: Path, source: bytes) -> None:
    with pytest.raises(FormatError, match=r"model\.bin: data\.pkl: byte"):
        read_data(path, pickled(mapping(w=view(source=source))))


def test_a_storage_must_be_there_with_its_declared_size(path: Path) -> None:
    for numel in (0, 3, 5, 2**40, 2**61, 2**62):
        with pytest.raises(FormatError, match="storage 0 is declared with"):
            read_data(path, pickled(mapping(w=view((1,), source=corpus.storage(numel=numel)))))
    for key in ("1", "../0", "0\0", "/etc/passwd", ""):
        with pytest.raises(FormatError, match="is not in the zip"):
            read_data(path, pickled(mapping(w=view(source=corpus.storage(key)))))
    with pytest.raises(FormatError, match="16 bytes in one place, 12 in another"):
        read_data(path, pickled(mapping(w=view(), v=view((3,), source=corpus.storage(numel=3)))))


def test_storages_beside_the_weights_are_checked_too(path: Path) -> None:
    with pytest.raises(FormatError, match="storage 7 is not in the zip"):
        read_data(path, pickled(mapping(model=mapping(w=view()), x=corpus.storage("7"))))


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "words"),
    [
        ((5,), (1,), 0, "reaches element 4 of a storage of 4"),
        ((4,), (1,), 1, "reaches element 4 of a storage of 4"),
        ((1,), (1,), 4, "reaches element 4 of a storage of 4"),
        ((), (), 4, "reaches element 4 of a storage of 4"),
        ((2, 2), (3, 1), 0, "reaches element 4 of a storage of 4"),
        ((2,), (2**62,), 0, "reaches element"),
        ((2**62,), (1,), 0, "reaches element"),
        ((2**32, 2**32), (0, 0), 0, "more elements than a tensor can have"),
        ((2**62, 2), (0, 0), 0, "more elements than a tensor can have"),
        ((2**62,), (0,), 0, "expanded from a storage of 16 bytes"),
        ((2**30,), (0,), 0, "expanded from a storage of 16 bytes"),
        ((1,) * 65, (1,) * 65, 0, "65 dims, torch allows 64"),
        ((-4,), (1,), 0, "must be integers from 0"),
        ((4,), (-1,), 3, "must be integers from 0"),
        ((4,), (1,), -1, "must be integers from 0"),
        ((4,), (), 0, "one stride to a size"),
        ((), (1,), 0, "one stride to a size"),
        ((2**64,), (1,), 0, "must be integers from 0"),
    ],
)
def test_a_view_must_lie_in_its_storage(
    path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, words: str
) -> None:
    with pytest.raises(REFUSED, match=rf"model\.bin: layer\.w: .*{words}"):
        read_data(path, pickled(b"}" + text("layer.w") + view(shape, strides, offset) + b"s"))


@pytest.mark.parametrize("odd", [b"\x88", b"N", text("1"), b"G" + struct.pack(">d", 1.0), b")"])
def test_only_integers_are_sizes_strides_and_offsets(path: Path, odd: bytes) -> None:
    one, hooks = tup(b"K\x01"), named("collections", "OrderedDict") + b")R"
    for offset, shape, stride in [(odd, one, one), (b"K\x00", tup(odd), one), (b"K\x00", one, tup(odd))]:
        tensor = reduce(
            "torch._utils", "_rebuild_tensor_v2", corpus.storage(), offset, shape, stride, b"\x89", hooks
        )
        with pytest.raises(FormatError, match="must be integers from 0"):
            read_data(path, pickled(mapping(w=tensor)))


def test_rebuild_functions_are_given_what_torch_gives_them(path: Path) -> None:
    one, kept = tup(b"K\x01"), corpus.storage()
    for name, args in [
        ("_rebuild_tensor", [kept, b"K\x00", one]),
        ("_rebuild_tensor", [kept, b"K\x00", one, one, b"N"]),
        ("_rebuild_tensor_v2", [kept, b"K\x00", one, one]),
        ("_rebuild_tensor_v2", [kept, b"K\x00", one, one, b"\x89", b"N", b"K\x01"]),
        ("_rebuild_tensor_v2", [b"N", b"K\x00", one, one, b"\x89", b"N"]),
        ("_rebuild_tensor_v2", [kept, b"K\x00", b"K\x01", one, b"\x89", b"N"]),
        ("_rebuild_tensor_v3", [kept, b"K\x00", one, one, b"\x89", b"N"]),
        ("_rebuild_tensor_v3", [kept, b"K\x00", one, one, b"\x89", b"N", text("float32")]),
        ("_rebuild_tensor_v3", [kept, b"K\x00", one, one, b"\x89", b"N", named("users", "float32")]),
        ("_rebuild_parameter", [kept, b"\x89", b"N"]),
        ("_rebuild_parameter", [view()]),
        ("_rebuild_parameter", []),
    ]:
        with pytest.raises(FormatError, match=r"data\.pkl"):
            read_data(path, pickled(mapping(w=reduce("torch._utils", name, *args))))
    with pytest.raises(UnsupportedError, match="conjugate or negative bit"):
        read_data(path, pickled(mapping(w=view(metadata=mapping(neg=b"\x88")))))
    assert read_data(path, pickled(mapping(w=view(metadata=mapping(neg=b"\x89"))))).tensors


def test_a_tensor_with_a_state_of_its_own_is_refused(path: Path) -> None:
    for state in (b"N", tup(corpus.storage(), b"K\x00", tup(b"K\x02"), tup(b"K\x01"))):
        with pytest.raises(FormatError, match="sets the state of a tensor"):
            read_data(path, pickled(mapping(w=view() + state + b"b")))


def test_a_storage_on_the_meta_device_has_no_data(path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"w is on the meta device"):
        read_data(path, pickled(mapping(w=view(source=corpus.storage(location="meta")))))


# the shape of a pickle


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"}.",
        b"\x80",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x01}.",
        b"\x80\x06}.",
        b"\x80\x02}}.",
        b"\x80\x02(}.",
        b"\x80\x020.",
        b"\x80\x021.",
        b"\x80\x02t.",
        b"\x80\x02\x87.",
        b"\x80\x02N(\x85.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02N(K\x01e.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}K\x01a.",
        b"\x80\x02}(NN(u.",
        b"\x80\x02h\x00.",
        b"\x80\x02q\x00.",
        b"\x80\x02}q\x05.",
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02I1_0\n.",
        b"\x80\x02I" + b"9" * 5000 + b"\n.",
        b"\x80\x02c" + b"a" * 5000 + b"\nb\n.",
        b"\x80\x02ca\xff\nb\n.",
        b"\x80\x02NN\x93.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",  # a lone surrogate
        b"\x80\x02X\x03\x00\x00\x00\xc0\x80a.",  # an overlong NUL
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02B\xff\xff\xff\xff.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x05\x96" + b"\xff" * 8 + b".",
        b"\x80\x02\x8a\xff.",
        b"\x80\x02J\x00.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        b"\x80\x04\x95" + struct.pack("<Q", 3) + b"}.",
        b"\x80\x04\x95" + struct.pack("<Q", 1) + b"K\x01.",
        b"\x80\x04\x95" + struct.pack("<Q", 12) + b"\x95" + struct.pack("<Q", 2) + b"}..",
    ],
)
def test_a_pickle_that_does_not_add_up_is_refused(path: Path, data: bytes) -> None:
    with pytest.raises(FormatError):
        read_data(path, data)


def test_nothing_may_follow_the_stop(path: Path) -> None:
    payload = pickled(reduce("os", "system", text("true")))
    for rest in (b"\0", payload, b"\n", GOOD):
        with pytest.raises(FormatError, match="goes on after its end"):
            read_data(path, GOOD + rest)


def test_a_key_that_stands_twice_is_refused(path: Path) -> None:
    with pytest.raises(FormatError, match="w stands twice"):
        read_data(path, pickled(b"}(" + text("w") + view() + text("w") + view((1,)) + b"u"))


def test_every_truncation_and_every_prefix_is_refused(path: Path) -> None:
    whole = corpus.zipped(corpus.members(GOOD))
    legacy = _legacy_good()
    for file in (whole, legacy):
        path.write_bytes(file)
        assert read(path).tensors
        for stop in range(len(file)):
            path.write_bytes(file[:stop])
            with pytest.raises(REFUSED):
                read(path)
        for extra in (b"\0", b"PK\x05\x06" + bytes(18), GOOD, whole):
            for changed in (file + extra, extra + file):
                path.write_bytes(changed)
                with pytest.raises(REFUSED):
                    read(path)
    for stop in range(len(GOOD)):
        with pytest.raises(FormatError):
            read_data(path, GOOD[:stop])


# cost


def peak_of(path: Path) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(REFUSED):
            read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def laughs(depth: int = 60) -> bytes:
    """Lists of two references to the list before: 2**60 leaves."""
    body = b"]\x94"
    for level in range(depth):
        get = b"h" + bytes([level])
        body += b"](" + get + get + b"e\x94"
    return body


def small_bombs() -> dict[str, bytes]:
    tuples = b")\x94" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(150))
    self_list = b"]\x94h\x00a"
    pairs = b"](" + b"](K\x01K\x02e" * 60 + b"e\x94"
    grow = pairs + b"0" + b"".join(named("collections", "OrderedDict") + b"h\x00\x85R" for _ in range(10))
    return {
        "billion laughs": pickled(laughs(), 4),
        "billion laughs as weights": pickled(b"}" + text("w") + laughs() + b"s", 4),
        "billion laughs as a key": pickled(b"}(" + tuples + view() + b"u", 4),
        "laughing tuples in a set": pickled(b"\x8f(" + tuples + b"\x90", 4),
        "laughing tuples as a shape": pickled(
            tuples
            + b"0"
            + mapping(
                w=reduce("torch._utils", "_rebuild_tensor", corpus.storage(), b"K\0", b"h\x95", b"h\x95")
            ),
            4,
        ),
        "a list in itself": pickled(self_list, 4),
        "a list in itself as weights": pickled(b"}" + text("w") + b"]\x94h\x00as", 4),
        "a dict in itself": pickled(b"}\x94" + text("model") + b"h\x00s", 4),
        "a dict in itself as two wrappers": pickled(
            b"}\x94(" + text("model") + b"h\x00" + text("module") + b"h\x00u", 4
        ),
        "memo far away": pickled(b"}r\xff\xff\xff\xff"),
        "LONG4 of two gigabytes": pickled(b"\x8b\xff\xff\xff\x7f"),
        "text of four gigabytes": pickled(b"X\xff\xff\xff\xff"),
        "bytes of an exabyte": pickled(b"\x8e" + b"\xff" * 7 + b"\x0f", 4),
        "a frame of an exabyte": pickled(b"\x95" + b"\xff" * 7 + b"\x0f", 4),
        "marks": pickled(b"(" * 900),
        "lists": pickled(b"]" * 900),
        "nested lists": pickled(b"]" * 450 + b"a" * 449),
        "a storage of exabytes": pickled(mapping(w=view((1,), source=corpus.storage(numel=2**62)))),
        "an expanded scalar": pickled(mapping(w=view((2**50,), (0,)))),
        "an OrderedDict of one list again and again": pickled(grow, 4),
    }


@pytest.mark.parametrize("name", list(small_bombs()))
def test_a_kilobyte_takes_neither_memory_nor_work(path: Path, name: str) -> None:
    data = small_bombs()[name]
    assert len(data) < 1100
    corpus.write_zip(path, data)
    assert peak_of(path) < 4 * 2**20
    path.write_bytes(_legacy(data))
    assert peak_of(path) < 4 * 2**20


def test_work_is_bounded_by_the_bytes_of_the_pickle() -> None:
    for data in small_bombs().values():
        try:
            found = read_pickle(data, where="bomb")
        except FormatError:
            continue
        assert found.opcodes <= len(data)


def test_copies_of_one_long_list_count_as_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 10_000)
    pairs = b"](" + b"](K\x01K\x02e" * 500 + b"e\x94"
    body = (
        pairs
        + b"]("
        + b"".join(named("collections", "OrderedDict") + b"h\x00\x85R" for _ in range(500))
        + b"e"
    )
    with pytest.raises(FormatError, match="more than 10000 opcodes"):
        read_data(path, pickled(body, 4))


def test_opcodes_are_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1000)
    with pytest.raises(FormatError, match="more than 1000 opcodes"):
        read_data(path, pickled(b"N0" * 600 + b"}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "opener",
    [
        pytest.param(b"]", id="lists"),
        pytest.param(b"}" + text("w"), id="dicts", marks=pytest.mark.sweep),
        pytest.param(b"}" + text("model"), id="wrappers", marks=pytest.mark.sweep),
    ],
)
def test_a_million_levels_are_no_deeper_than_one(path: Path, opener: bytes) -> None:
    closer = b"a" if opener == b"]" else b"s"

    def levels(depth: int) -> bytes:
        return opener * depth + b"N" + closer * depth

    for data in (
        levels(100_000),
        b"}" + text("w") + levels(100_000) + b"s",
        b"}" + text("w") + b"N" + b"\x85" * 100_000 + b"s",
    ):
        with pytest.raises(REFUSED):
            read_data(path, pickled(data))
    depth = 1_000_000 if opener == b"]" else 100_000
    found = read_data(path, pickled(mapping(model=mapping(w=view()), deep=levels(depth))))
    assert [out.name for out in found.left_out] == ["deep"]


def test_asking_many_values_of_one_long_list_costs_no_more_than_asking_one(path: Path) -> None:
    shared = b"](" + b"N" * 3000 + b"e\x94"
    body = (
        shared + b"0}(" + text("w") + view() + b"".join(text(str(n)) + b"h\x00" for n in range(3000)) + b"u"
    )
    calls = 0

    def counted(value: object) -> object:
        nonlocal calls
        calls += 1
        return original(value)

    original = torch_files._parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_files, "_parts", counted)
        found = read_data(path, pickled(body, 4))
    assert len(found.left_out) == 3000
    assert calls < 20


def test_names_are_printed_escaped_and_short(path: Path) -> None:
    name = "\x1b[31m\n" + "w" * 10_000
    with pytest.raises(FormatError) as error:
        read_data(path, pickled(b"}" + text(name) + view((5,)) + b"s"))
    assert "\x1b" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400


# zips


def refuse_zip(path: Path, raw: bytes, words: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(REFUSED, match=words):
        read(path)


def changed(name: str, **fields: object) -> list[Entry]:
    entries = corpus.members(GOOD)
    entry = next(entry for entry in entries if entry.name.endswith(name))
    for key, value in fields.items():
        setattr(entry, key, value)
    return entries


def test_the_zips_that_the_tests_make_are_sound(path: Path) -> None:
    for zip64 in (False, True):
        path.write_bytes(corpus.zipped(corpus.members(GOOD), zip64=zip64))
        assert corpus.tensor_bytes(read(path).tensors["w"], path.parent) == bytes(range(16))
    path.write_bytes(corpus.zipped(corpus.members(GOOD, top="ein Ordner-ü")))
    assert read(path).tensors


def test_hidden_duplicate_and_overlapping_members_are_refused(path: Path) -> None:
    good = corpus.members(GOOD)
    hidden = Entry("archive/data.pkl", GOOD, listed=False)
    refuse_zip(path, corpus.zipped([hidden, *good]), "bytes before the first member")
    refuse_zip(path, corpus.zipped([good[0], hidden, *good[1:]]), "leaves .* bytes before what follows")
    refuse_zip(path, corpus.zipped([*good, hidden]), "leaves .* bytes before what follows")
    refuse_zip(path, corpus.zipped([*good, Entry("archive/data.pkl", GOOD)]), "same name")
    refuse_zip(path, corpus.zipped([*good, Entry("archive/DATA.PKL", GOOD)]), "same name")
    refuse_zip(path, corpus.zipped(changed("version", offset=0)), "overlaps what follows it")
    refuse_zip(path, corpus.zipped(changed("version", before=b"gap")), "leaves 3 bytes before what follows")
    refuse_zip(path, corpus.zipped(changed("data.pkl", before=b"gap")), "neither a zip nor a pickle")
    refuse_zip(
        path, corpus.zipped(changed("data/0", descriptor=b"x" * 16)), "leaves 16 bytes before what follows"
    )
    refuse_zip(path, corpus.zipped(changed("data/0", size=15)), "leaves 1 bytes")
    refuse_zip(path, corpus.zipped(changed("data/0", size=17)), "leaves -1 bytes|overlaps")
    refuse_zip(path, corpus.zipped(changed("data/0", size=2**31)), "overlaps what follows it")


def test_bytes_before_and_after_a_zip_are_refused(path: Path) -> None:
    whole = corpus.zipped(corpus.members(GOOD))
    refuse_zip(
        path, corpus.zipped(corpus.members(GOOD), prefix=b"PK\x03\x04"), "4 bytes before the first member"
    )
    refuse_zip(path, whole + b"x", "no end record in the last 22 bytes")
    refuse_zip(path, whole + whole, "directory")
    refuse_zip(path, GOOD + whole, "a pickle, but not one that torch.save wrote")


def test_members_that_torch_does_not_write_are_refused(path: Path) -> None:
    refuse_zip(path, corpus.zipped(changed("data/0", method=8)), "data/0 is compressed")
    refuse_zip(path, corpus.zipped(changed("data/0", local_method=8)), "its local header contradicts")
    refuse_zip(path, corpus.zipped(changed("data/0", packed=8)), "data/0 is compressed")
    refuse_zip(path, corpus.zipped(changed("data/0", flags=0x801)), "encrypted")
    refuse_zip(path, corpus.zipped(changed("data/0", flags=0x840)), "encrypted")
    refuse_zip(path, corpus.zipped(changed("data/0", flags=0x820)), "otherwise special")
    refuse_zip(path, corpus.zipped(changed("data/0", comment=b"hi")), "damaged|special|truncated")
    refuse_zip(path, corpus.zipped(changed("data/0", extra=b"\x55\x54\x01\x00x")), "extra field")
    refuse_zip(path, corpus.zipped(changed("data/0", local_extra=b"\x55\x54\x01\x00x")), "extra field")
    refuse_zip(path, corpus.zipped(changed("data/0", local_extra=b"FB\xff\x00x")), "extra field")
    refuse_zip(path, corpus.zipped(changed("data/0", local_extra=b"FB")), "extra field")
    path.write_bytes(corpus.zipped(changed("data/0", local_extra=b"FB\x03\x00ZZZ")))
    assert read(path).tensors


@pytest.mark.parametrize(
    "name",
    [
        "/archive/x",
        "archive/../x",
        "archive/./x",
        "archive//x",
        "archive/x/",
        "archive/a\\b",
        "archive/a\0b",
        "archive/a\nb",
        "x",
    ],
)
def test_unsafe_names_are_refused(path: Path, name: str) -> None:
    refuse_zip(path, corpus.zipped([*corpus.members(GOOD), Entry(name, b"1")]), "unsafe name|in one folder")


def test_two_top_folders_and_undecodable_names_are_refused(path: Path) -> None:
    refuse_zip(
        path, corpus.zipped([*corpus.members(GOOD), Entry("other/x", b"1")]), "in one folder, this one has 2"
    )
    raw = corpus.zipped([*corpus.members(GOOD), Entry("archive/zz", b"1")])
    refuse_zip(path, raw.replace(b"archive/zz", b"archive/\xff\xfe"), "cannot be decoded")
    refuse_zip(
        path, corpus.zipped([*corpus.members(GOOD), Entry("archive/ü", b"1", flags=0)]), "cannot be decoded"
    )


def test_local_headers_must_equal_the_directory(path: Path) -> None:
    refuse_zip(
        path, corpus.zipped(changed("data/0", local_name="archive/data/1")), "contradicts the directory"
    )
    refuse_zip(
        path, corpus.zipped(changed("data/0", local_name="archive/data/00")), "contradicts the directory"
    )
    refuse_zip(path, corpus.zipped(changed("data/0", local_size=8)), "contradict the directory")
    refuse_zip(path, corpus.zipped(changed("data/0", local_size=2**32 - 1)), "contradict the directory")
    refuse_zip(path, corpus.zipped(changed("data/0", local_crc32=1)), "contradict the directory")
    refuse_zip(path, corpus.zipped(changed("data/0", flags=0x808)), "leaves 0 bytes before what follows")


@pytest.mark.parametrize("layout", ["<4sLLL", "<4sLQQ"])
def test_the_descriptor_after_the_data_must_equal_the_directory(path: Path, layout: str) -> None:
    good = struct.pack(layout, b"PK\x07\x08", zlib.crc32(bytes(range(16))), 16, 16)
    zeros = {"flags": 0x808, "local_size": 0, "local_crc32": 0}
    path.write_bytes(corpus.zipped(changed("data/0", descriptor=good, **zeros)))
    assert read(path).tensors
    for bad in (
        struct.pack(layout, b"PK\x07\x08", 1, 16, 16),
        struct.pack(layout, b"PK\x07\x08", zlib.crc32(bytes(range(16))), 15, 16),
        struct.pack(layout, b"PK\x07\x08", zlib.crc32(bytes(range(16))), 16, 17),
        struct.pack(layout, b"PK\x00\x00", zlib.crc32(bytes(range(16))), 16, 16),
    ):
        refuse_zip(
            path, corpus.zipped(changed("data/0", descriptor=bad, **zeros)), "descriptor after its data"
        )


def test_lies_of_zip64_are_refused(path: Path) -> None:
    entries = corpus.members(GOOD)
    body = corpus.zipped(entries, tail=b"")
    start = body.index(b"PK\x01\x02")
    length, count = len(body) - start, len(entries)
    plain = corpus.end_record(count, length, start)
    for tail in (
        corpus.end64(count, length, start) + corpus.end_record(count + 1, length, start),
        corpus.end64(count, length, start) + corpus.end_record(count, length - 1, start),
        corpus.end64(count + 1, length, start) + corpus.end_record(2**16 - 1, length, start),
        corpus.end64(count, 2**62, start) + corpus.end_record(count, 2**32 - 1, start),
        corpus.end64(count, length, 2**62) + corpus.end_record(count, length, 2**32 - 1),
        corpus.end64(2**62, length, start) + corpus.end_record(2**16 - 1, length, start),
        corpus.end64(count, length, start, offset=0) + plain,
        corpus.end64(count, length, start, offset=2**63) + plain,
        corpus.end64(count, length, start)[:-20] + plain,
        corpus.end64(count, length, start)[-20:] + plain,
        b"x" + corpus.end64(count, length, start) + plain,
        corpus.end64(count, length, start) + b"x" + plain,
        corpus.end_record(2**16 - 1, length, start),
        corpus.end_record(count, 2**32 - 1, start),
        corpus.end_record(count, length, 2**32 - 1),
        corpus.end_record(count, length, 0),
        corpus.end_record(count - 1, length, start),
        corpus.end_record(0, length, start),
        corpus.end_record(0, 0, len(body)),
        corpus.end_record(count, length, start, b"comment"),
        plain[:-2] + b"\x07\x00",
        plain[:4] + b"\x01\x00" + plain[6:],
    ):
        refuse_zip(path, body + tail, "end record|directory|disks")
    for extra in (
        struct.pack("<2HQ", 1, 8, 16),
        struct.pack("<2H2Q", 1, 16, 16, 16) * 2,
        struct.pack("<2HL", 1, 4, 16),
        struct.pack("<2H4Q", 1, 32, 16, 16, 0, 0),
    ):
        refuse_zip(path, corpus.zipped(changed("data/0", extra=extra)), "zip64 sizes")
    wide = struct.pack("<2H2Q", 1, 16, 2**63, 2**63)
    refuse_zip(path, corpus.zipped(changed("data/0", extra=wide, size=2**32 - 1, local_size=16)), "overlaps")
    wide = struct.pack("<2H2Q", 1, 16, 16, 16)
    lie = struct.pack("<2H2Q", 1, 16, 17, 17)
    fields = {"extra": wide, "size": 2**32 - 1}
    path.write_bytes(corpus.zipped(changed("data/0", local_extra=wide, **fields)))
    assert read(path).tensors
    refuse_zip(
        path, corpus.zipped(changed("data/0", local_extra=lie, **fields)), "zip64 sizes of its local header"
    )


def test_what_is_read_here_is_checked_against_its_crc(path: Path) -> None:
    raw = corpus.zipped(corpus.members(GOOD))
    at = raw.index(b"little")
    refuse_zip(path, raw[:at] + b"Little" + raw[at + 6 :], "byteorder does not match its CRC-32")
    at = raw.index(GOOD) + len(GOOD) - 30
    refuse_zip(path, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], "data.pkl does not match its CRC-32")


def test_the_crc_of_a_storage_is_handed_on_for_the_copy(path: Path) -> None:
    path.write_bytes(corpus.zipped(changed("data/0", crc32=7)))
    record = read(path).tensors["w"].extents[0].record
    assert record
    assert (record.stop - record.start, record.crc32) == (16, 7)


def test_members_that_make_a_checkpoint_are_required(path: Path) -> None:
    good = corpus.members(GOOD)
    refuse_zip(path, corpus.zipped(good[1:]), "without data.pkl")
    refuse_zip(path, corpus.zipped(good[:-1]), "without the member version")
    refuse_zip(path, corpus.zipped(changed("version", data=b"11")), "format version 11")
    refuse_zip(path, corpus.zipped(changed("version", data=b"x")), "format version x")
    refuse_zip(path, corpus.zipped(changed("version", data=b"3" * 99)), "99 bytes, expected at most 16")
    refuse_zip(path, corpus.zipped(changed("byteorder", data=b"middle")), "byteorder is middle")


# the legacy format


def _legacy_source(key: str = "0", numel: int = 4) -> bytes:
    head = [text("storage"), named("torch", "FloatStorage"), text(key), text("cpu")]
    return persistent(*head, integer(numel), b"N")


def _legacy_good(
    count: int = 4, data: bytes = bytes(range(16)), keys: tuple[str, ...] = ("0",), numel: int = 4
) -> bytes:
    main = pickled(mapping(w=view(source=_legacy_source(numel=numel))))
    listed = pickled(b"](" + b"".join(map(text, keys)) + b"e")
    return _legacy(main, keys=listed, data=count.to_bytes(8, "little") + data)


def test_a_legacy_file_must_add_up(path: Path) -> None:
    path.write_bytes(_legacy_good())
    assert corpus.tensor_bytes(read(path).tensors["w"], path.parent) == bytes(range(16))
    for raw, words in [
        (_legacy_good(count=3), "the count before its data says 3"),
        (_legacy_good(count=2**62), "the count before its data says"),
        (_legacy_good(numel=2**60), "ends beyond the end of the file"),
        (_legacy_good(data=bytes(15)), "truncated"),
        (_legacy_good(data=bytes(17)), "1 bytes after the last storage"),
        (_legacy_good(keys=()), "stands in only one"),
        (_legacy_good(keys=("0", "0")), "not a list of different names"),
        (_legacy_good(keys=("0", "1")), "stands in only one"),
        (_legacy(GOOD, keys=pickled(b"K\x01")), "unknown way"),
        (_legacy(pickled(b"}"), keys=pickled(b"K\x01")), "not a list of different names"),
        (_legacy(pickled(b"}"), keys=pickled(b"]K\x01a")), "not a list of different names"),
        (pickled(integer(5)), "not one that torch.save wrote"),
        (pickled(integer(0x1950A86A20F9469CFC6C)), "truncated|not a pickle"),
        (pickled(integer(0x1950A86A20F9469CFC6C)) + pickled(integer(1002)), "unknown version"),
        (
            pickled(integer(0x1950A86A20F9469CFC6C)) + pickled(integer(1001)) + pickled(b"}"),
            "byte order is not stated",
        ),
    ]:
        refuse_zip(path, raw, words)


# damage


def real_files(tmp_path: Path) -> list[bytes]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    whole = {
        "model": model.state_dict(),
        "epoch": 3,
        "lr": 0.1,
        "names": ["a", {"b": (1, 2)}],
        "rng": torch.zeros(3),
    }
    files = []
    for number, (obj, options) in enumerate(
        [
            (whole, {}),
            (model.state_dict(), {"pickle_protocol": 4}),
            (whole, {"_use_new_zipfile_serialization": False}),
        ]
    ):
        torch.save(obj, tmp_path / str(number), **options)
        files.append((tmp_path / str(number)).read_bytes())
    return files


@pytest.mark.parametrize("which", range(3))
def test_damage_is_refused_or_harmless_and_never_another_error(
    tmp_path: Path, path: Path, which: int
) -> None:
    rng = random.Random(which)
    good = real_files(tmp_path)[which]
    data = _data_pickle(good)
    accepted = 0
    for _ in range(1000):
        # half of the time the pickle is damaged within a sound zip, or the zip's CRC would hide the interpreter
        inner = data is not None and rng.random() < 0.5
        raw = bytearray(data if inner and data is not None else good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            match rng.randrange(5):
                case 0:
                    raw[at] ^= 1 << rng.randrange(8)
                case 1:
                    raw[at] = rng.randrange(256)
                case 2:
                    del raw[at : at + rng.randint(1, 8)]
                case 3:
                    raw[at:at] = rng.randbytes(rng.randint(1, 8))
                case 4:
                    other = rng.randrange(len(raw))
                    raw[at : at + 8] = raw[other : other + 8]
            if not raw:
                raw = bytearray(b"\0")
        file = corpus.zipped(corpus.members(bytes(raw), _storages(good))) if inner else bytes(raw)
        path.write_bytes(file)
        try:
            found = read(path)
        except REFUSED as error:
            assert len(str(error).splitlines()) <= 3
            continue
        accepted += 1
        for tensor in found.tensors.values():
            assert tensor.extents[0].offset >= 0
            assert tensor.nbytes == 0 or tensor.extents[0].offset < len(file)
            if tensor.extents[0].strides is None:
                assert tensor.extents[0].offset + tensor.nbytes <= len(file)
    assert accepted < 1000


def _storages(good: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        return {name.rpartition("/")[2]: archive.read(name) for name in names}


def _data_pickle(good: bytes) -> bytes | None:
    if not good.startswith(b"PK"):
        return None
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        return archive.read(archive.namelist()[0])


def test_random_opcodes_are_refused_or_harmless(path: Path) -> None:
    rng = random.Random(7)
    pieces = [
        GOOD[2:-1],
        view(),
        b"}",
        b"]",
        b")",
        b"N",
        b"(",
        b"t",
        b"e",
        b"u",
        b"s",
        b"a",
        b"0",
        b"1",
        b"\x94",
        b"h\x00",
    ]
    pieces += [
        b"R",
        b"\x81",
        b"\x92",
        b"b",
        b"Q",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x93",
        b"\x90",
        b"\x91",
        b"\x8f",
        b"I5\n",
    ]
    pieces += [
        text("w"),
        text("model"),
        named("torch", "Size"),
        named("collections", "OrderedDict"),
        corpus.storage(),
    ]
    pieces += [
        named("torch._utils", "_rebuild_parameter"),
        named("torch._tensor", "_rebuild_from_type_v2"),
        b"K\x04",
        b"\x88",
    ]
    for _ in range(2000):
        body = b"".join(rng.choices(pieces, k=rng.randint(1, 12)))
        try:
            read_data(path, pickled(body, 4))
        except REFUSED as error:
            assert os.linesep not in str(error).partition("\n")[0]
