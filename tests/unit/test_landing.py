"""The map beside a part that arrives: begun anew when it must be, believed when it may be, and never marked too early."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shardprep_runtime import read_manifest
from shardprep_runtime.errors import WriteError
from shardprep_runtime.format.manifest import Part
from shardprep_runtime.shard.landing import (
    ABSENT,
    DOUBTED,
    GIVEN,
    HEAD,
    LANDED,
    VERIFIED,
    Landing,
    LandingSink,
    land_in_file,
    land_in_memory,
    read_map,
)
from shardprep_runtime.shard.parts import Numbered, open_part

SHARDS = Path(__file__).parents[1] / "data/v1/phi3-fused-tp2"
MANIFEST = read_manifest(SHARDS)
PART = max(MANIFEST.parts, key=lambda part: part.size)
OTHER = replace(PART, digest="sha256:" + "0" * 64)
RAW = (SHARDS / PART.path).read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "part"


@pytest.fixture
def landed(path: Path) -> Iterator[Callable[..., Landing]]:
    """Opens landings of `path`, and closes what the test has left open."""
    made: list[Landing] = []

    def land(part: Part = PART, *, trust: bool = False) -> Landing:
        made.append(land_in_file(part, path, trust=trust))
        return made[-1]

    yield land
    for each in made:
        close(each)


@pytest.fixture(scope="module")
def numbered() -> Iterator[Numbered]:
    """The blocks of the part, of which it has many."""
    part = open_part(SHARDS, PART, MANIFEST)
    found = Numbered(part)
    assert len(found.blocks) > 5
    yield found
    part.close()


def close(landing: Landing) -> None:
    for fd in (landing.data, landing.chart):
        os.close(fd)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reboot(path: Path) -> None:
    """Let the map be one that was begun during another boot."""
    chart = path.with_name("part.landed")
    raw = chart.read_bytes()
    chart.write_bytes(raw[: HEAD - 64] + b"another boot".ljust(64, b"\0") + raw[HEAD:])


# ----------------------------------------------------------------------------------------------------------- the map


def test_a_new_map_says_that_nothing_is_there(path: Path, landed: Callable[..., Landing]) -> None:
    landing = landed()
    assert landing.state(5) == bytes(6)
    assert path.stat().st_size == PART.size
    assert path.stat().st_blocks == 0
    assert read_map(path, PART, 5) == bytearray(6)


def test_what_is_marked_is_there_for_everybody_and_later(path: Path, landed: Callable[..., Landing]) -> None:
    first, second = landed(), landed()
    first.mark(3, VERIFIED)
    first.mark(1, LANDED)
    expected = bytes([ABSENT, LANDED, ABSENT, VERIFIED, ABSENT, ABSENT])
    for landing in (first, second, landed()):
        assert landing.state(5) == expected
    assert read_map(path, PART, 5) == bytearray(expected)
    second.mark(3, ABSENT)
    assert first.state(3)[3] == ABSENT


def test_a_map_of_another_part_is_begun_anew(path: Path, landed: Callable[..., Landing]) -> None:
    landed(OTHER).mark(1, VERIFIED)
    assert read_map(path, PART, 5) is None
    landing = landed()
    assert landing.state(5) == bytes(6)
    assert read_map(path, OTHER, 5) is None


@pytest.mark.parametrize("size", [0, 1, PART.size - 1, PART.size + 1])
def test_a_map_beside_a_file_of_another_size_is_begun_anew(
    path: Path, landed: Callable[..., Landing], size: int
) -> None:
    landed().mark(1, VERIFIED)
    os.truncate(path, size)
    assert landed().state(5) == bytes(6)
    assert path.stat().st_size == PART.size


def test_a_file_that_is_gone_takes_its_map_with_it(path: Path, landed: Callable[..., Landing]) -> None:
    landed().mark(1, VERIFIED)
    path.unlink()
    assert landed().state(5) == bytes(6)


@pytest.mark.parametrize("raw", [b"", b"\0" * 500, b"shardprep landed 2\n".ljust(500, b"\2"), b"\xff" * 40])
def test_what_is_no_map_is_begun_anew(path: Path, landed: Callable[..., Landing], raw: bytes) -> None:
    landed()
    path.with_name("part.landed").write_bytes(raw)
    assert read_map(path, PART, 5) is None
    assert landed().state(5) == bytes(6)


def test_a_map_of_an_earlier_boot_is_not_proof(path: Path, landed: Callable[..., Landing]) -> None:
    """What the kernel had not yet written when the machine went down reads as zeros."""
    landing = landed()
    for number, value in enumerate((VERIFIED, LANDED, ABSENT, VERIFIED)):
        landing.mark(number, value)
    reboot(path)
    assert landed(trust=True).state(3) == bytes([VERIFIED, LANDED, ABSENT, VERIFIED])
    assert landed().state(3) == bytes([DOUBTED, DOUBTED, ABSENT, DOUBTED])
    reread = landed()
    reread.mark(0, VERIFIED)
    assert landed().state(3) == bytes([VERIFIED, DOUBTED, ABSENT, DOUBTED])


def test_a_map_that_is_cut_off_says_that_the_rest_is_absent(
    path: Path, landed: Callable[..., Landing]
) -> None:
    landing = landed()
    landing.mark(2, VERIFIED)
    os.truncate(path.with_name("part.landed"), HEAD + 1)
    assert landing.state(4) == bytes(5)
    assert read_map(path, PART, 4) == bytearray(5)
    landing.mark(4, VERIFIED)
    assert landing.state(9) == bytes([0, 0, 0, 0, VERIFIED, 0, 0, 0, 0, 0])


def test_no_symbolic_link_is_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    for name in ("part", "part.landed"):
        (tmp_path / name).symlink_to(victim)
        before = open_files()
        with pytest.raises(OSError) as caught:
            land_in_file(PART, path, trust=False)
        assert caught.value.errno == errno.ELOOP
        assert open_files() == before
        (tmp_path / name).unlink()
    assert victim.read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------------------ claims


def test_blocks_are_claimed_by_one_at_a_time(landed: Callable[..., Landing]) -> None:
    first, second = landed(), landed()
    assert first.claim(3, 6)
    assert not second.claim(5, 8)
    assert not second.claim(1, 4)
    assert second.claim(6, 8)
    assert second.claim(1, 3)
    assert not first.claim(7, 8)
    first.release(3, 5)
    assert second.claim(3, 5)
    assert not second.claim(5, 6)


CLAIM = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from test_landing import PART
from shardprep_runtime.shard.landing import land_in_file
landing = land_in_file(PART, Path({path!r}), trust=False)
print(landing.claim(2, 5), flush=True)
time.sleep(60)
"""


def test_a_claim_ends_with_the_process_that_was_killed(path: Path, landed: Callable[..., Landing]) -> None:
    landing = landed()
    code = CLAIM.format(paths=[str(Path(__file__).parent)], path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        assert not landing.claim(4, 5)
        assert landing.claim(5, 9)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert landing.claim(2, 5)


def test_a_claim_is_not_the_lock_of_the_cache(landed: Callable[..., Landing]) -> None:
    first, second = landed(), landed()
    fcntl.flock(first.data, fcntl.LOCK_SH)
    fcntl.flock(second.data, fcntl.LOCK_SH)
    assert first.claim(1, 2)
    assert not second.claim(1, 2)


# ---------------------------------------------------------------------------------------------------------- the data


def test_bytes_that_are_set_aside_are_counted_until_they_are_there(landed: Callable[..., Landing]) -> None:
    big = replace(PART, size=2**20)
    landing = landed(big)
    assert landing.set_aside(0) == 0
    landing.reserve(0, 2**19)
    landing.reserve(0, 2**19)
    assert landing.set_aside(0) == 2**19
    landing.write(b"x" * 2**18, 0)
    assert landing.set_aside(2**18) == 2**18
    assert landing.set_aside(2**20) == 0
    assert os.fstat(landing.data).st_size == 2**20


def test_what_the_file_system_cannot_hold_is_a_write_error(landed: Callable[..., Landing]) -> None:
    landing = landed()
    with pytest.raises(WriteError, match="bytes cannot be set aside"):
        landing.reserve(0, 2**62)
    reader = os.open("/proc/self/cmdline", os.O_RDONLY)
    full = Landing(PART, reader, os.dup(landing.chart), in_memory=False)
    with pytest.raises(WriteError, match=f"{PART.path}: cannot be written"):
        full.write(b"x", 0)
    close(full)


def test_memory_that_is_given_back_reads_as_zeros_and_only_whole_pages_are() -> None:
    part = replace(PART, size=5 * 4096)
    landing = land_in_memory(part)
    landing.write(b"x" * part.size, 0)
    landing.forget(100, 3 * 4096 + 100)
    assert os.pread(landing.data, part.size, 0) == b"x" * 4096 + bytes(2 * 4096) + b"x" * 2 * 4096
    assert os.fstat(landing.data).st_blocks * 512 == 3 * 4096
    landing.forget(100, 200)
    landing.forget(0, 0)
    assert os.pread(landing.data, 100, 100) == b"x" * 100
    close(landing)


def test_a_file_that_others_use_is_never_given_back(landed: Callable[..., Landing]) -> None:
    landing = landed(replace(PART, size=2 * 4096))
    landing.write(b"x" * 8192, 0)
    landing.forget(0, 8192)
    assert os.pread(landing.data, 8192, 0) == b"x" * 8192


# ---------------------------------------------------------------------------------------------------------- the sink


@pytest.mark.parametrize("place", ["file", "memory"])
def test_a_block_is_marked_when_it_is_whole_and_not_before(
    numbered: Numbered, landed: Callable[..., Landing], place: str
) -> None:
    makers: dict[str, Callable[[], Landing]] = {
        "file": landed,
        "memory": lambda: land_in_memory(PART),
    }
    landing = makers[place]()
    seen: list[tuple[int, int]] = []
    sink = LandingSink(
        landing,
        numbered.blocks[1:3],
        2,
        verify=True,
        scratch=memoryview(bytearray(64)),
        landed=lambda number, nbytes: seen.append((number, nbytes)),
    )
    first, second = numbered.blocks[1:3]
    at = first.start
    while sink.left:
        assert sink.left == second.stop - at
        sink.room()[:1] = RAW[at : at + 1]
        sink.landed(1)
        at += 1
        there = [number for number, block in ((2, first), (3, second)) if at >= block.stop]
        assert [number for number, _ in seen] == there
        assert [n for n, value in enumerate(landing.state(len(numbered.blocks))) if value] == there
    assert seen == [(2, first.stop - first.start), (3, second.stop - second.start)]
    assert sink.bad == []
    found = os.pread(landing.data, PART.size, 0)
    assert found[first.start : second.stop] == RAW[first.start : second.stop]
    if place != "file":
        close(landing)


def test_a_sink_ends_when_nobody_wants_the_bytes_any_more(
    numbered: Numbered, landed: Callable[..., Landing]
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop() -> None:
        raise Stop

    landing = landed()
    sink = LandingSink(
        landing,
        numbered.blocks[:1],
        1,
        verify=True,
        scratch=memoryview(bytearray(64)),
        landed=lambda *_: None,
        stopped=stop,
    )
    with pytest.raises(Stop):
        sink.landed(1)
    assert landing.state(3) == bytes(4)
    assert path_blocks(landing) == 0


def path_blocks(landing: Landing) -> int:
    return os.fstat(landing.data).st_blocks


def test_the_values_of_a_map_are_frozen() -> None:
    """Another version of this program may have written the map."""
    assert (ABSENT, LANDED, VERIFIED, GIVEN) == (0, 1, 2, 3)
    assert HEAD == 128
