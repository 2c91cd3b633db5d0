"""Facts about runs of blocks that hold for every part and wish, and about bytes that land in whatever portions they come."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep_runtime import read_manifest
from shardprep_runtime.shard import fetch
from shardprep_runtime.shard.fetch import RUN_BYTES, Arrival, Run, plan_runs
from shardprep_runtime.shard.landing import LANDED, VERIFIED, LandingSink, land_in_file, land_in_memory
from shardprep_runtime.shard.parts import Block, Numbered, OpenPart, open_part

SHARDS = Path(__file__).parents[1] / "data/v1/phi3-fused-tp2"
MANIFEST = read_manifest(SHARDS)
PART = max(MANIFEST.parts, key=lambda part: part.size)
RAW = (SHARDS / PART.path).read_bytes()
MIB = 2**20
BLOCKS = 7
"""Of the part, each of at most 256 bytes."""

# ------------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class _Span:
    start: int
    stop: int


@dataclass(frozen=True)
class _Piece:
    span: _Span


class _Part:
    """As much of an open part as its blocks are made of."""

    def __init__(self, header: int, sizes: Sequence[int], block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.pieces = {}
        at = header
        for i, size in enumerate(sizes):
            self.pieces[i] = _Piece(_Span(at, at + size))
            at += size
        self.start, self.stop = header, at


class _Arrival(Numbered):
    """An arrival that arrives nowhere; equal to none but itself, as the real ones."""


def arrival_of(part: _Part) -> Arrival:
    return cast(Arrival, _Arrival(cast(OpenPart, part)))


@st.composite
def parts(draw: st.DrawFn) -> _Part:
    """A part whose blocks are from a byte to 40 MiB long; tensors may be empty."""
    block_bytes = draw(st.sampled_from([1, 7, 256, MIB, 5 * MIB, 16 * MIB, 40 * MIB]))
    sizes = draw(st.lists(st.integers(0, 6 * block_bytes), max_size=6))
    return _Part(draw(st.integers(8, 5000)), sizes, block_bytes)


@given(parts(), st.data())
def test_numbers_are_the_blocks_that_hold_the_bytes(part: _Part, data: st.DataObject) -> None:
    numbered = Numbered(cast(OpenPart, part))
    blocks = numbered.blocks
    assert all(low.stop == high.start for low, high in pairwise(blocks))
    start = data.draw(st.integers(part.start, part.stop))
    stop = data.draw(st.integers(start, part.stop))
    found = numbered.numbers(start, stop)
    expected = [i + 1 for i, block in enumerate(blocks) if block.start < stop and start < block.stop]
    assert list(found) == (expected if start < stop else [])
    assert all(numbered.block(number) is blocks[number - 1] for number in found)


@st.composite
def wishes(draw: st.DrawFn) -> list[tuple[Arrival, _Part, int, int]]:
    """Ranges of a few parts, as a view wants them: in any order, also overlapping, also empty."""
    made = [(arrival_of(part), part) for part in draw(st.lists(parts(), min_size=1, max_size=3))]
    found = []
    for _ in range(draw(st.integers(0, 8))):
        arrival, part = draw(st.sampled_from(made))
        start = draw(st.integers(part.start, part.stop))
        found.append((arrival, part, start, draw(st.integers(start, part.stop))))
    return found


def blocks_of_run(run: Run) -> Iterator[tuple[int, int]]:
    for number in range(run.first, run.last):
        yield id(run.arrival), number


@given(wishes())
def test_runs_tile_exactly_the_blocks_that_are_wanted(wanted: list[tuple[Arrival, _Part, int, int]]) -> None:
    runs = plan_runs((arrival, start, stop) for arrival, _, start, stop in wanted)
    brought = [block for run in runs for block in blocks_of_run(run)]
    assert len(set(brought)) == len(brought)
    assert set(brought) == {
        (id(arrival), number) for arrival, _, start, stop in wanted for number in arrival.numbers(start, stop)
    }
    for run in runs:
        assert run.first < run.last
        assert run.nbytes <= RUN_BYTES or run.last == run.first + 1


@given(wishes())
def test_runs_are_as_long_as_they_may_be(wanted: list[tuple[Arrival, _Part, int, int]]) -> None:
    by_part: dict[int, list[Run]] = {}
    for run in plan_runs((arrival, start, stop) for arrival, _, start, stop in wanted):
        by_part.setdefault(id(run.arrival), []).append(run)
    for runs in by_part.values():
        for low, high in pairwise(sorted(runs, key=lambda run: run.first)):
            if low.last == high.first:
                longer = Run(low.arrival, low.first, high.first + 1)
                assert longer.nbytes > RUN_BYTES


@given(wishes())
def test_the_most_urgent_runs_come_first(wanted: list[tuple[Arrival, _Part, int, int]]) -> None:
    runs = plan_runs((arrival, start, stop) for arrival, _, start, stop in wanted)
    first: dict[tuple[int, int], int] = {}
    for order, (arrival, _, start, stop) in enumerate(wanted):
        for number in arrival.numbers(start, stop):
            first.setdefault((id(arrival), number), order)
    urgency = [min(first[block] for block in blocks_of_run(run)) for run in runs]
    assert urgency == sorted(urgency)


# ------------------------------------------------------------------------------------------------------------ landing


@pytest.fixture(scope="module")
def numbered() -> Iterator[Numbered]:
    part = open_part(SHARDS, PART, MANIFEST)
    found = Numbered(part)
    assert len(found.blocks) == BLOCKS
    yield found
    part.close()


@st.composite
def portions(draw: st.DrawFn) -> dict[str, Any]:
    """A run of blocks, where its bytes are wrong, and in which portions they come."""
    first = draw(st.integers(1, BLOCKS))
    return {
        "first": first,
        "last": draw(st.integers(first + 1, BLOCKS + 1)),
        "wrong": draw(st.lists(st.floats(0, 1, exclude_max=True), max_size=3)),
        "portions": draw(st.lists(st.integers(1, 700), min_size=1, max_size=30)),
        "scratch": draw(st.integers(1, 600)),
        "verify": draw(st.booleans()),
        "in_memory": draw(st.booleans()),
    }


@settings(deadline=None)
@given(case=portions())
def test_bytes_land_right_in_whatever_portions_they_come(numbered: Numbered, case: dict[str, Any]) -> None:
    first, last = case["first"], case["last"]
    blocks: list[Block] = numbered.blocks[first - 1 : last - 1]
    assert len(blocks) == last - first
    start, stop = blocks[0].start, blocks[-1].stop
    sent = bytearray(RAW[start:stop])
    for at in {int(each * len(sent)) for each in case["wrong"]}:
        sent[at] ^= 0x40
    bad = [n for n in range(first, last) if differs(numbered.block(n), sent, start)]
    with tempfile.TemporaryDirectory() as folder:
        landing = (
            land_in_memory(PART) if case["in_memory"] else land_in_file(PART, Path(folder) / "p", trust=False)
        )
        seen: list[tuple[int, int]] = []
        sink = LandingSink(
            landing,
            blocks,
            first,
            verify=case["verify"],
            scratch=memoryview(bytearray(case["scratch"])),
            landed=lambda number, nbytes: seen.append((number, nbytes)),
        )
        at, turn = 0, 0
        while sink.left:
            assert sink.left == len(sent) - at
            room = sink.room()
            assert 1 <= len(room) <= sink.left
            count = min(len(room), case["portions"][turn % len(case["portions"])])
            room[:count] = sent[at : at + count]
            sink.landed(count)
            at, turn = at + count, turn + 1
        expected = [n for n in range(first, last) if not (case["verify"] and n in bad)]
        assert sink.bad == (bad if case["verify"] else [])
        assert seen == [(n, numbered.block(n).stop - numbered.block(n).start) for n in expected]
        state = landing.state(len(numbered.blocks))
        assert {n for n, value in enumerate(state) if value} == set(expected)
        assert {state[n] for n in expected} <= {VERIFIED if case["verify"] else LANDED}
        assert os.pread(landing.data, len(sent), start) == sent
        assert os.pread(landing.data, start, 0) == bytes(start)
        landing.close()
        os.close(landing.data)


def differs(block: Block, sent: bytearray, start: int) -> bool:
    return sent[block.start - start : block.stop - start] != RAW[block.start : block.stop]


def test_a_run_is_what_a_store_is_best_asked_for() -> None:
    assert RUN_BYTES == 16 * MIB
    assert fetch.TRIES == 3
