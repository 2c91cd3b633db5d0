"""A header of a link is read back as it was written, and anything else is refused before memory is set aside for it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep_runtime.errors import FormatError, WorkerError
from shardprep_runtime.workers.links.link import (
    DEFAULT_LIMITS,
    DTYPES,
    HEADER,
    MAX_TAIL,
    Header,
    Limits,
    Op,
    read_header,
    read_tail,
    write_header,
    write_tail,
)

FIELDS = (
    "magic",
    "op",
    "number",
    "generation",
    "dtype",
    "batch",
    "positions",
    "width",
    "past",
    "keep",
    "bytes",
    "tail",
)
"""Of a header, in order; what follows is 0."""


@st.composite
def headers(draw: st.DrawFn) -> Header:
    dtype = draw(st.sampled_from((None, *DTYPES)))
    return Header(
        op=draw(st.sampled_from(Op)),
        number=draw(st.integers(0, 2**62)),
        generation=draw(st.integers(0, 2**62)),
        dtype=dtype,
        batch=draw(st.integers(1, 64)) if dtype else 0,
        positions=draw(st.integers(1, 2**10)) if dtype else 0,
        width=draw(st.integers(1, 2**12)) if dtype not in (None, DTYPES[0]) else 0,
        past=draw(st.integers(0, 2**20)),
        keep_all=draw(st.booleans()),
        tail_bytes=draw(st.integers(0, MAX_TAIL)),
    )


@given(headers())
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    raw = write_header(header)
    assert len(raw) == HEADER.size
    assert read_header(raw, DEFAULT_LIMITS) == header


@given(st.binary(min_size=0, max_size=2 * HEADER.size))
def test_bytes_of_any_kind_are_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        read_header(raw, DEFAULT_LIMITS)


@given(headers(), st.integers(0, 15), st.integers(-(2**63), 2**63 - 1))
def test_a_header_of_which_one_number_is_another_stays_within_limits_or_is_refused(
    header: Header, place: int, value: int
) -> None:
    limits = Limits(batch=64, positions=2**20, width=2**12, nbytes=2**30)
    values = list(HEADER.unpack(write_header(header)))
    values[place] = value
    raw = HEADER.pack(*values)
    try:
        found = read_header(raw, limits)
    except FormatError:
        return
    assert 0 <= found.batch <= limits.batch
    assert 0 <= found.positions <= limits.positions
    assert 0 <= found.width <= limits.width
    assert 0 <= found.nbytes <= limits.nbytes
    assert 0 <= found.tail_bytes <= MAX_TAIL
    assert write_header(found) == raw


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("magic", 7, "not a frame, or of another version"),
        ("op", 99, "unknown kind 99"),
        ("op", 0, "unknown kind 0"),
        ("dtype", len(DTYPES) + 1, "dtype"),
        ("dtype", 1, "only token ids are I64"),
        ("dtype", 0, "tensor of dtype None"),
        ("batch", 0, "shape"),
        ("batch", -1, "batch -1"),
        ("batch", 2**40, "batch"),
        ("positions", 3, "24 bytes for a BF16 tensor"),
        ("positions", 2**62, "positions"),
        ("width", 0, "only token ids"),
        ("width", 2**50, "width"),
        ("past", -1, "past -1"),
        ("keep", 2, "keep 2; from 0 to 1"),
        ("bytes", 23, "says 23 bytes"),
        ("bytes", -24, "bytes of the tensor -24"),
        ("tail", MAX_TAIL + 1, "bytes of the tail"),
        ("tail", -1, "bytes of the tail"),
    ],
)
def test_a_header_that_lies_is_refused(name: str, value: int, words: str) -> None:
    values = list(
        HEADER.unpack(
            write_header(Header(Op.STEP, 1, 1, "BF16", batch=2, positions=2, width=3, tail_bytes=4))
        )
    )
    values[FIELDS.index(name)] = value
    with pytest.raises(FormatError, match=words):
        read_header(HEADER.pack(*values), DEFAULT_LIMITS)


def test_what_is_not_used_is_zero() -> None:
    values = list(HEADER.unpack(write_header(Header(Op.PING))))
    for place in range(len(FIELDS), len(values)):
        with pytest.raises(FormatError, match="unused"):
            read_header(HEADER.pack(*values[:place], 1, *values[place + 1 :]), DEFAULT_LIMITS)


def test_a_tail_is_an_object() -> None:
    for tail in ({"a": [1, 2.5, None, "b"]}, {}):
        assert read_tail(write_tail(tail)) == tail
    for raw in (b"[1]", b"1", b"{", b"\xff", b"nul", b"[" * MAX_TAIL, json.dumps("a").encode()):
        with pytest.raises(FormatError, match="the tail of a frame"):
            read_tail(raw)


def test_a_tail_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(WorkerError, match="at most 16384"):
        write_tail({"a": "b" * MAX_TAIL})
