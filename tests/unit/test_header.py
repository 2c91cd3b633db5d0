"""A safetensors header is read strictly by the format: what the reference reader refuses is refused here too."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as reference

from shardprep_runtime.errors import FormatError
from shardprep_runtime.format.dtypes import BITS, nbytes
from shardprep_runtime.format.header import (
    MAX_HEADER_BYTES,
    PAGE,
    Header,
    dump_header,
    loads_strict,
    parse_header,
    read_header,
)

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header (JSON, text or bytes) and data."""
    text = header if isinstance(header, bytes | str) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


def parse(raw: bytes, *, size: int | None = None) -> Header:
    """Parse the header of a whole file."""
    length = 8 + int.from_bytes(raw[:8], "little")
    return parse_header(raw[:length], len(raw) if size is None else size, where="file")


def one(**changes: Any) -> bytes:
    """A file of four bytes with one tensor, `t`, whose entry is changed; None removes a field."""
    entry = {key: value for key, value in {**U8, **changes}.items() if value is not None}
    return file_of({"t": entry}, b"abcd")


def two(first: list[int], second: list[int], data: bytes) -> bytes:
    """A file of two U8 tensors, `a` and `b`, at these offsets."""
    entries = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in (("a", first), ("b", second))
    }
    return file_of(entries, data)


def nested(depth: int) -> str:
    """A list in a list, and so on."""
    return "[" * depth + "]" * depth


def bad_files() -> dict[str, tuple[bytes, str]]:
    """What is wrong -> (the file, words that the error must have)."""
    entry = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    return {
        "no bytes": (b"", "truncated"),
        "seven bytes": (b"\x02" + bytes(6), "truncated"),
        "no header": (bytes(8), "does not begin"),
        "longer than the file": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
        "longer than the format allows": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "claims"),
        "longer than any memory": (b"\xff" * 8 + b"{}", "claims"),
        "not UTF-8": (file_of(b'{"\xff":1}'), "not UTF-8"),
        "not an object": (file_of("[]"), "does not begin"),
        "a space before the object": (file_of(" {}"), "does not begin"),
        "a byte order mark": (file_of(b"\xef\xbb\xbf{}"), "does not begin"),
        "half an object": (file_of('{"t":'), "not JSON"),
        "two objects": (file_of("{}{}"), "not JSON"),
        "padded by zeros": (file_of(b"{}\0\0"), "not JSON"),
        "a duplicate name": (file_of(f'{{"t":{entry},"t":{entry}}}', b"abcd"), "stands twice"),
        "a duplicate field": (
            file_of('{"t":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', b"abcd"),
            "stands twice",
        ),
        "a duplicate __metadata__": (file_of('{"__metadata__":{},"__metadata__":{}}'), "stands twice"),
        "a duplicate key of __metadata__": (file_of('{"__metadata__":{"a":"b","a":"c"}}'), "stands twice"),
        "half a surrogate pair": (file_of(f'{{"\\ud800":{entry}}}', b"abcd"), "surrogate"),
        "half a pair in __metadata__": (file_of('{"__metadata__":{"a":"\\udfff"}}'), "surrogate"),
        "a control character in a name": (file_of(f'{{"a\nb":{entry}}}', b"abcd"), "not JSON"),
        "NaN": (file_of('{"__metadata__":{"a":NaN}}'), "NaN is not JSON"),
        "Infinity": (one(shape=[float("inf")]), "Infinity is not JSON"),
        "deep nesting": (file_of(f'{{"t":{nested(100_000)}}}'), "nested too deeply"),
        "an integer of a million digits": (file_of('{"t":' + "9" * 1_000_000 + "}"), "not JSON"),
        "a hole before the first": (two([1, 2], [2, 3], b"abc"), "hole"),
        "a hole between": (two([0, 1], [2, 3], b"abc"), "hole"),
        "an overlap": (two([0, 2], [1, 3], b"abc"), "overlaps"),
        "the same bytes twice": (two([0, 2], [0, 2], b"ab"), "overlaps"),
        "trailing bytes": (one() + b"x", "trailing"),
        "missing bytes": (one()[:-1], "truncated"),
        "no data at all": (one()[:-4], "truncated"),
        "a size that is not the shape's": (one(shape=[3]), "takes 3 bytes"),
        "a wider dtype": (one(dtype="F32"), "takes 16 bytes"),
        "offsets that are swapped": (one(data_offsets=[4, 0]), "begin <= end"),
        "one offset": (one(data_offsets=[0]), "begin <= end"),
        "three offsets": (one(data_offsets=[0, 2, 4]), "begin <= end"),
        "an unknown dtype": (one(dtype="F128"), "unknown dtype"),
        "a dtype in small letters": (one(dtype="u8"), "unknown dtype"),
        "a dtype that is no string": (one(dtype=["U8"]), "unknown dtype"),
        "float4 of an odd count": (one(dtype="F4", shape=[7]), "byte boundary"),
        "float6 of a count that is no multiple of four": (one(dtype="F6_E2M3", shape=[5]), "byte boundary"),
        "sixty-five dims": (one(shape=[1] * 65), "at most 64"),
        "a shape that overflows": (one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "larger than any file"),
        "no dtype": (one(dtype=None), "expected exactly"),
        "no shape": (one(shape=None), "expected exactly"),
        "no offsets": (one(data_offsets=None), "expected exactly"),
        "a field that the format lacks": (one(strides=[1]), "expected exactly"),
        "an entry that is a list": (file_of({"t": ["U8", [4], [0, 4]]}, b"abcd"), "expected exactly"),
        "an entry that is a string": (file_of({"t": "U8"}), "expected exactly"),
        "an entry that is null": (file_of({"t": None}), "expected exactly"),
        "__metadata__ as a list": (file_of({"__metadata__": []}), "strings to strings"),
        "__metadata__ as false": (file_of({"__metadata__": False}), "strings to strings"),
        "__metadata__ with a number": (file_of({"__metadata__": {"a": 1}}), "strings to strings"),
        "__metadata__ with null": (file_of({"__metadata__": {"a": None}}), "strings to strings"),
        "__metadata__ with an object": (file_of({"__metadata__": {"a": {}}}), "strings to strings"),
    }


@pytest.mark.parametrize("what", bad_files())
def test_a_breach_of_the_format_is_refused_in_words(what: str) -> None:
    raw, words = bad_files()[what]
    with pytest.raises(FormatError, match=r"^file: ") as caught:
        parse(raw)
    assert words in str(caught.value)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "odd", [-1, 1.0, 4.0, True, False, 2**63, 2**64, 10**30, "4", None, [4], {}, 0.5, 1e99]
)
@pytest.mark.parametrize("place", ["shape", "begin", "end"])
def test_only_integers_from_0_to_2_to_the_63_are_sizes_and_offsets(place: str, odd: object) -> None:
    raw = {
        "shape": one(shape=[odd]),
        "begin": one(data_offsets=[odd, 4]),
        "end": one(data_offsets=[0, odd]),
    }[place]
    with pytest.raises(FormatError, match=r"shape must be|data_offsets must be"):
        parse(raw)


@pytest.mark.parametrize("odd", [None, 4, "4", {"0": 4}, True])
@pytest.mark.parametrize("place", ["shape", "data_offsets"])
def test_shapes_and_offsets_are_lists(place: str, odd: object) -> None:
    entry = {**U8, place: odd}
    with pytest.raises(FormatError, match="must be"):
        parse(file_of({"t": entry}, b"abcd"))


def test_a_name_from_the_file_is_printed_escaped_and_short() -> None:
    name = "\n\x1b[31m\u202e\x7f" + "x" * 10_000
    with pytest.raises(FormatError) as caught:
        parse(file_of({name: {**U8, "dtype": "F32"}}))
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert "\\n\\u001b[31m\\u202e\\u007f" in message
    assert len(message) < 400


def test_spaces_after_the_object_and_empty_files_are_sound() -> None:
    assert parse(file_of("{}   ")).tensors == {}
    assert parse(file_of('{"__metadata__":null}')).metadata == {}
    assert parse(file_of('{"__metadata__":{"a":"b"}}')).metadata == {"a": "b"}


def test_a_whole_surrogate_pair_is_a_character() -> None:
    entry = json.dumps(U8)
    assert list(parse(file_of(f'{{"\\ud83d\\ude00":{entry}}}', b"abcd")).tensors) == ["\U0001f600"]


def test_empty_tensors_may_share_an_offset_with_others() -> None:
    empty = {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]}
    scalar = {"dtype": "U8", "shape": [], "data_offsets": [4, 5]}
    found = parse(file_of({"z": empty, "t": U8, "s": scalar, "y": empty}, b"abcde"))
    assert {name: span.stop - span.start for name, span in found.tensors.items()} == {
        "t": 4, "z": 0, "y": 0, "s": 1,
    }  # fmt: skip


def test_a_kilobyte_that_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    huge = 2**40
    claims = [
        (MAX_HEADER_BYTES).to_bytes(8, "little") + b"{" + b" " * 1000,
        (2**63).to_bytes(8, "little") + b"{" + b" " * 1000,
        file_of({"t": {"dtype": "U8", "shape": [huge], "data_offsets": [0, huge]}}, b"x" * 900),
        file_of({"t": {"dtype": "F32", "shape": [2**62] * 60, "data_offsets": [0, 4]}}, b"abcd"),
        file_of('{"t":' + nested(500) + "}"),
        file_of('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(100)) + ',"x":1}}'),
    ]
    for raw in claims:
        path.write_bytes(raw)
        assert len(raw) < 2100
        fd = os.open(path, os.O_RDONLY)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError):
                read_header(fd, where="file")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            os.close(fd)
        assert peak < 2**20


@given(st.data())
def test_every_truncation_of_a_sound_file_is_refused(data: st.DataObject) -> None:
    raw = two([0, 3], [3, 5], b"abcde")
    length = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(FormatError):
        parse(raw[:length])


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(BITS))


@given(
    st.dictionaries(names, st.tuples(dtypes, shapes), max_size=6),
    st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=4),
)
def test_what_is_dumped_is_parsed_again(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    tensors = {  # the narrow dtypes must end at a byte
        name: (dtype if BITS[dtype] >= 8 else "U8", shape) for name, (dtype, shape) in tensors.items()
    }
    raw = dump_header(tensors, metadata)
    assert len(raw) % PAGE == 0
    size = len(raw) + sum(nbytes(*each) for each in tensors.values())
    header = parse_header(raw, size, where="file")
    assert {name: (span.dtype, span.shape) for name, span in header.tensors.items()} == tensors
    assert header.metadata == metadata
    assert header.nbytes == len(raw)


def test_the_reference_reader_reads_what_is_dumped() -> None:
    tensors = {"b": ("F4", (2, 4)), "a": ("BF16", (3,)), "": ("I64", ()), "\U0001f600": ("U8", (0, 5))}
    raw = dump_header(tensors, {"format": "pt"}) + bytes(4 + 6 + 8)
    found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in reference(raw)}
    assert found.keys() == tensors.keys()
    assert {name: found[name][1] for name in ("a", "", "\U0001f600")} == {
        "a": (3,),
        "": (),
        "\U0001f600": (0, 5),
    }


# ------------------------------------------------------------------------------- the reference reader beside this one


def is_accepted(raw: bytes) -> bool:
    """Whether this reader takes the file; it raises nothing but FormatError."""
    try:
        parse(raw)
    except FormatError:
        return False
    return True


def reference_accepts(raw: bytes) -> bool:
    """Whether the reader of the safetensors package takes the file."""
    try:
        reference(raw)
    except SafetensorError:
        return False
    return True


def stricter(raw: bytes) -> bool:
    """Whether the file is one of those that only this reader refuses, each for its reason.

    A key that stands twice (the last would win), a header that does not begin with `{` (the format's own words),
    a field that the format lacks, and an entry written as a list or a dtype as an object, which only serde knows.
    """
    try:
        text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()
        fields = loads_strict(text, where="file")
    except FormatError as error:
        return "stands twice" in str(error) or "is not JSON" in str(error)
    entries = [entry for name, entry in fields.items() if name != "__metadata__"]
    return not text.startswith("{") or any(
        not isinstance(entry, dict)
        or entry.keys() != {"dtype", "shape", "data_offsets"}
        or isinstance(entry["dtype"], dict)
        or len(entry["shape"]) > 64
        for entry in entries
    )


SEEDS = [
    one(),
    two([0, 3], [3, 5], b"abcde"),
    file_of(
        '{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]},'
        '"b":{"dtype":"F4","shape":[2,2],"data_offsets":[4,6]},"c":{"dtype":"F32","shape":[0],"data_offsets":[6,6]}}  ',
        b"abcdef",
    ),
]
VALUES: list[Any] = [
    0,
    1,
    2,
    3,
    4,
    6,
    -1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    1.0,
    1e400,
    True,
    None,
    "",
    "U8",
    "F4",
]
VALUES += [
    "F32",
    "F6_E2M3",
    "x",
    [],
    [0],
    [4],
    [2, 2],
    [0, 4],
    [4, 0],
    {},
    {"a": "b"},
    [2**62, 4],
    [0, 2**62, 8],
]
VALUES += [[2**62, 8, 0], [8, 0], [-0.0]]


def mutate_fields(rng: random.Random, value: Any) -> Any:
    """A copy of `value` in which something is replaced, removed, added or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["__metadata__", "d", "shape", ""])] = rng.choice(VALUES)
            case 2:
                changed[rng.choice("xyz")] = changed.pop(key)
            case _:
                changed[key] = mutate_fields(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_fields(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def test_fields_that_the_reference_refuses_are_refused_and_none_other() -> None:
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(6000):
        seed = rng.choice(SEEDS)
        length = int.from_bytes(seed[:8], "little")
        fields = mutate_fields(rng, json.loads(seed[8 : 8 + length]))
        raw = file_of(json.dumps(fields), seed[8 + length :])
        ours, theirs = is_accepted(raw), reference_accepts(raw)
        assert theirs or not ours, raw
        assert ours or not theirs or stricter(raw), raw
        accepted += ours
        refused += not ours
    assert accepted > 100
    assert refused > 3000


def test_bytes_that_the_reference_refuses_are_refused_and_none_other() -> None:
    rng = random.Random(1)
    accepted = 0
    for _ in range(12_000):
        raw = bytearray(rng.choice(SEEDS))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] = rng.choice(b' 0123456789-+.eE{}[]:,"\\\n\t\x00\x7f\xffabFU')
                case 1:
                    raw[at] ^= 1 << rng.randrange(8)
                case 2:
                    del raw[at]
                    raw[0] = (raw[0] - (at >= 8)) % 256
                case 3:
                    raw.insert(at, rng.choice(b' 0123456789-.e{}[]:,"\n'))
                    raw[0] = (raw[0] + (at >= 8)) % 256
        ours, theirs = is_accepted(bytes(raw)), reference_accepts(bytes(raw))
        assert theirs or not ours, bytes(raw)
        assert ours or not theirs or stricter(bytes(raw)), bytes(raw)
        accepted += ours
    assert accepted > 100


def test_the_last_of_two_tensors_of_one_name_would_win_in_the_reference() -> None:
    entry = json.dumps(U8)
    raw = file_of(f'{{"t":{entry},"t":{entry}}}', b"abcd")
    assert reference_accepts(raw)
    assert not is_accepted(raw)
