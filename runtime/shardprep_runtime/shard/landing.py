"""Keep a part while its bytes arrive: a file of the part's size, and a map that says which of its blocks are there.

The map is a small file beside it, one byte a block, written once the block's bytes are: it is the journal from which
a killed fetch goes on, and what processes that fill the same file tell each other by. A process that fetches blocks
holds a lock on their bytes of the map (an open file description lock), which ends with the process however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..errors import WriteError, quote
from ..format.manifest import Part
from ..stores.store import SCRATCH
from .parts import Block

ABSENT: Final = 0
LANDED: Final = 1
"""There, and nobody has compared it with its digest."""
VERIFIED: Final = 2
DOUBTED: Final = 4
"""There when the machine went down: whether it came to disk, its digest must say."""
GIVEN: Final = 3
"""Was there, in memory that was given back once a joined copy had taken its place."""

MAGIC: Final = b"shardprep landed 1\n".ljust(32, b"\0")
HEAD: Final = len(MAGIC) + 32 + 64
"""Bytes of the map before the first block's: magic, the part's digest, the boot during which it was begun."""

HEADER: Final = 0
"""The number of the part's header in its map; its blocks follow, in the order of their bytes."""


_DOUBT: Final = bytes.maketrans(bytes([LANDED, VERIFIED]), bytes([DOUBTED, DOUBTED]))


class Landing:
    """One part that is arriving, in memory of this process or in a file that several processes fill."""

    def __init__(self, part: Part, data: int, chart: int, *, in_memory: bool) -> None:
        """Takes the descriptors of the data and of the map over."""
        self.part, self.data, self.chart, self.in_memory = part, data, chart, in_memory

    # ----------------------------------------------------------------------------------------------------- the map
    def state(self, count: int) -> bytearray:
        """What is there of the header and `count` blocks."""
        found = bytearray(os.pread(self.chart, 1 + count, HEAD))
        return found.ljust(1 + count, b"\0")

    def mark(self, number: int, value: int) -> None:
        """Say that a block, all of whose bytes were written, is there (or is not)."""
        os.pwrite(self.chart, bytes([value]), HEAD + number)

    def claim(self, first: int, last: int) -> bool:
        """Whether the blocks [first, last) are ours to fetch: nobody else is at any of them."""
        return self._lock(fcntl.F_WRLCK, first, last)

    def release(self, first: int, last: int) -> None:
        """Let others have them."""
        self._lock(fcntl.F_UNLCK, first, last)

    def _lock(self, kind: int, first: int, last: int) -> bool:
        wanted = struct.pack("hhqqi4x", kind, os.SEEK_SET, HEAD + first, last - first, 0)
        try:
            fcntl.fcntl(self.chart, fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError:
            return False
        except OSError:
            # a file system without such locks: two processes may fetch a block twice, and write the same
            return True
        return True

    # ----------------------------------------------------------------------------------------------------- the data
    def reserve(self, start: int, stop: int) -> None:
        """Have the file system set bytes [start, stop) aside. Raises WriteError where it has no room."""
        number = _fallocate(self.data, start, stop - start)
        if number not in (0, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise WriteError(
                f"{quote(self.part.path)}: {stop - start:,} bytes cannot be set aside: {os.strerror(number)}"
            )

    def set_aside(self, landed: int) -> int:
        """Bytes that the file system keeps ready for what is still to come, `landed` being there."""
        return max(0, os.fstat(self.data).st_blocks * 512 - landed)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes of the part. Raises WriteError."""
        view = memoryview(data)
        while view:
            try:
                done = os.pwrite(self.data, view, offset)
            except OSError as error:
                raise WriteError(f"{quote(self.part.path)}: cannot be written: {error.strerror}") from None
            view, offset = view[done:], offset + done

    def forget(self, start: int, stop: int) -> None:
        """Give the memory of whole pages within [start, stop) back; their bytes are zeros from now on."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self.in_memory and first < last:
            with suppress(OSError), mmap.mmap(self.data, last - first, offset=first) as pages:
                pages.madvise(mmap.MADV_REMOVE)

    def sync(self) -> None:
        """Bring data and map to disk, the data first."""
        os.fsync(self.data)
        os.fsync(self.chart)

    def close(self) -> None:
        """Close the map. The data's descriptor goes on to whoever reads the part."""
        os.close(self.chart)

    def abandon(self) -> None:
        """Close both: nobody will read the part."""
        self.close()
        os.close(self.data)


def _fallocate(fd: int, start: int, count: int) -> int:
    """fallocate(2); its errno, 0 where it succeeded.

    Not posix_fallocate, which writes zeros where the file system cannot allocate, and so may overwrite what another
    process has just written.
    """
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return errno.ENOSYS
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return 0 if call(fd, 0, start, count) == 0 else ctypes.get_errno()


def land_in_memory(part: Part) -> Landing:
    """A part that arrives in memory: a file that has no name and goes with its last descriptor."""
    data = os.memfd_create("shardprep-part", os.MFD_CLOEXEC)
    try:
        os.ftruncate(data, part.size)
        chart = os.memfd_create("shardprep-map", os.MFD_CLOEXEC)
    except BaseException:
        os.close(data)
        raise
    os.pwrite(chart, _head(part), 0)
    return Landing(part, data, chart, in_memory=True)


def land_in_file(part: Part, path: Path, *, trust: bool) -> Landing:
    """A part that arrives in the file `path`, with its map in `path` + `.landed`; both are made where they are not.

    A file or map that is not of this part is begun anew. Raises OSError.

    Args:
        trust: Believe a map that was begun before the machine last booted: its data may not have come to disk. Without,
            its blocks count as unverified.
    """
    data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        chart = os.open(
            path.with_name(path.name + ".landed"),
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o666,
        )
        try:
            # while it is begun, nobody else looks at it
            fcntl.flock(chart, fcntl.LOCK_EX)
            _begin(part, data, chart, trust=trust)
            fcntl.flock(chart, fcntl.LOCK_UN)
        except BaseException:
            os.close(chart)
            raise
    except BaseException:
        os.close(data)
        raise
    return Landing(part, data, chart, in_memory=False)


def _begin(part: Part, data: int, chart: int, *, trust: bool) -> None:
    wanted = _head(part)
    found = os.pread(chart, HEAD, 0)
    same = found[: len(MAGIC) + 32] == wanted[: len(MAGIC) + 32]
    if not same or os.fstat(data).st_size != part.size:
        os.ftruncate(chart, 0)
        os.ftruncate(data, part.size)
        os.pwrite(chart, wanted, 0)
    elif found != wanted and not trust:
        known = os.pread(chart, os.fstat(chart).st_size, HEAD)
        os.pwrite(chart, known.translate(_DOUBT), HEAD)
        os.pwrite(chart, wanted, 0)


def _head(part: Part) -> bytes:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        boot = b""
    return MAGIC + bytes.fromhex(part.digest.partition(":")[2]) + boot[:64].ljust(64, b"\0")


def read_map(path: Path, part: Part, count: int) -> bytearray | None:
    """What is there of a part in the file `path`, by the map beside it; None where there is no map of this part."""
    try:
        raw = path.with_name(path.name + ".landed").read_bytes()
    except OSError:
        return None
    return parse_map(raw, part, count)


def parse_map(raw: bytes, part: Part, count: int) -> bytearray | None:
    """What a map's bytes say of the header and `count` blocks; None where it is not the map of this part."""
    fixed = len(MAGIC) + 32
    if raw[:fixed] != _head(part)[:fixed]:
        return None
    return bytearray(raw[HEAD : HEAD + 1 + count]).ljust(1 + count, b"\0")


class LandingSink:
    """Takes a run of blocks into a landing: each is digested while it is in a core's cache, and marked once it is there."""

    def __init__(
        self,
        landing: Landing,
        blocks: Sequence[Block],
        first: int,
        *,
        verify: bool,
        scratch: memoryview,
        landed: Callable[[int, int], None],
        stopped: Callable[[], None] = lambda: None,
    ) -> None:
        """`first` is the number of the first block. `landed` is told of each block that is there, and its bytes;
        `stopped` is asked often, and raises where nobody wants the bytes any more."""
        self._landing, self._blocks, self._first, self._verify = landing, blocks, first, verify
        self._scratch, self._landed, self._stopped = scratch, landed, stopped
        self._at, self._stop = blocks[0].start, blocks[-1].stop
        self._block = 0
        self.bad: list[int] = []
        """Numbers of blocks that came with other bytes than they should have."""
        self._begin_digest()

    def _begin_digest(self) -> None:
        if self._verify:
            from blake3 import blake3

            self._digest = blake3()

    @property
    def left(self) -> int:
        return self._stop - self._at

    def room(self) -> memoryview:
        # fresh memory is cheaper to write to than to receive into: the kernel need not clear its pages first
        return self._scratch[: self.left]

    def landed(self, count: int) -> None:
        self._stopped()
        data = self.room()[:count]
        self._landing.write(data, self._at)
        while data:
            block = self._blocks[self._block]
            own = data[: block.stop - self._at]
            if self._verify:
                self._digest.update(own)
            self._at += len(own)
            data = data[len(own) :]
            if self._at == block.stop:
                self._close(block)

    def _close(self, block: Block) -> None:
        number = self._first + self._block
        if self._verify and self._digest.hexdigest() != block.digest:
            self.bad.append(number)
        else:
            self._landing.mark(number, VERIFIED if self._verify else LANDED)
            self._landed(number, block.stop - block.start)
        self._block += 1
        self._begin_digest()


def new_scratch() -> memoryview:
    """A thread's buffer for bytes on their way into a file."""
    return memoryview(bytearray(SCRATCH))
