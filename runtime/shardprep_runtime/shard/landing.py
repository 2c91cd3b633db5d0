"""Keep a part while its bytes arrive: a file of the part's size, and a map that says which of its blocks are there.

The map is a small file beside the data. After a head it has one byte for the part's header and one for each block. A
killed fetch goes on from it, and processes that fill the same file tell each other by it. The life of a block:

1. `land_in_file` opens data and map. It holds an exclusive flock on the map while it reads the head, and begins both
   files anew where the head is of another part. `land_in_memory` makes two files without a name, which need no flock.
2. A thread claims a run of blocks: it locks their bytes of the map. The lock is one of the open file description
   (fcntl(2), F_OFD_SETLK). It never waits, and ends with the last descriptor, however the process ends.
3. Under the claim the thread reads the map again: whoever held the blocks before may have brought some of them.
4. It writes the bytes that come into the data. Where they are to be verified, it digests them on the way.
5. It marks the block in the map once all bytes are written and no digest differs. A mark never precedes its bytes.
6. It releases the claim.

Other locks come before the claim, in this order. A cache's `lock`, or a pull's lock on its folder, is held while the
files are opened. A cache then keeps a shared flock on the data while it is open or mapped: nobody evicts it (cache.py).

A process that crashes leaves marked blocks, which are whole, and others, which the next fetch writes over. A machine
that crashes may lose bytes and keep their marks. So the head names the boot: after another one all marks become
DOUBTED, and digests decide.
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
"""The block is there; nobody has compared it with its digest."""
VERIFIED: Final = 2
"""The block is there and matches its digest."""
GIVEN: Final = 3
"""The block was there. Its memory was given back once a joined copy had taken its place."""
DOUBTED: Final = 4
"""The block was there before the machine last booted; its digest must say whether it came to disk."""

MAGIC: Final = b"shardprep landed 1\n".ljust(32, b"\0")
HEAD: Final = len(MAGIC) + 32 + 64
"""Bytes at the start of a map: magic, the part's digest, and the boot during which the map was begun."""

HEADER: Final = 0
"""The number of a part's header in its map. Blocks follow from 1, in the order of their bytes."""

_DOUBT: Final = bytes.maketrans(bytes([LANDED, VERIFIED]), bytes([DOUBTED, DOUBTED]))


class Landing:
    """One part that is arriving, in memory of this process or in a file that several processes fill."""

    def __init__(self, part: Part, data: int, chart: int, *, in_memory: bool) -> None:
        """Take both descriptors over: `close` and `abandon` close them.

        Args:
            part: The part that arrives.
            data: Descriptor of a file of the part's size, open for reading and writing.
            chart: Descriptor of its map, open for reading and writing.
            in_memory: Whether the data is memory of this process, which `forget` can free.
        """
        self.part, self.data, self.chart, self.in_memory = part, data, chart, in_memory

    # ----------------------------------------------------------------------------------------------------- the map
    def state(self, count: int) -> bytearray:
        """What the map says of the header and `count` blocks: one byte each, by number."""
        found = bytearray(os.pread(self.chart, 1 + count, HEAD))
        return found.ljust(1 + count, b"\0")

    def mark(self, number: int, value: int) -> None:
        """Say in the map what is there of a block, after its bytes were written.

        Args:
            number: Number of the block, or HEADER.
            value: ABSENT, LANDED, VERIFIED or GIVEN.
        """
        os.pwrite(self.chart, bytes([value]), HEAD + number)

    def claim(self, first: int, last: int) -> bool:
        """Lock blocks that this process is about to fetch. Does not wait, and does not exclude threads of one landing.

        Args:
            first: Number of the first block.
            last: One past the number of the last block.

        Returns:
            Whether they are ours now. If not, another landing of the file holds at least one of them.
        """
        return self._lock(fcntl.F_WRLCK, first, last)

    def release(self, first: int, last: int) -> None:
        """Unlock blocks that were claimed.

        Args:
            first: Number of the first block.
            last: One past the number of the last block.
        """
        self._lock(fcntl.F_UNLCK, first, last)

    def _lock(self, kind: int, first: int, last: int) -> bool:
        wanted = struct.pack("hhqqi4x", kind, os.SEEK_SET, HEAD + first, last - first, 0)
        try:
            fcntl.fcntl(self.chart, fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError:
            return False
        except OSError:
            # a file system without such locks: two processes may fetch a block twice, and write the same bytes
            return True
        return True

    # ----------------------------------------------------------------------------------------------------- the data
    def reserve(self, start: int, stop: int) -> None:
        """Have the file system set room aside for bytes that will come.

        Args:
            start: First byte of the part.
            stop: One past the last byte.

        Raises:
            WriteError: Where there is not enough room.
        """
        number = _fallocate(self.data, start, stop - start)
        if number not in (0, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise WriteError(
                f"{quote(self.part.path)}: {stop - start:,} bytes cannot be set aside: {os.strerror(number)}"
            )

    def set_aside(self, landed: int) -> int:
        """Bytes that were set aside and not yet filled, where `landed` bytes of the part are there."""
        return max(0, os.fstat(self.data).st_blocks * 512 - landed)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes of the part; the caller marks their block.

        Args:
            data: The bytes.
            offset: Where in the part they begin.

        Raises:
            WriteError: Where the disk is full or fails.
        """
        view = memoryview(data)
        while view:
            try:
                done = os.pwrite(self.data, view, offset)
            except OSError as error:
                raise WriteError(f"{quote(self.part.path)}: cannot be written: {error.strerror}") from None
            view, offset = view[done:], offset + done

    def forget(self, start: int, stop: int) -> None:
        """Free the memory of whole pages within a range; they read as zeros from then on. A file is left as it is.

        Args:
            start: First byte of the part.
            stop: One past the last byte.
        """
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self.in_memory and first < last:
            with suppress(OSError), mmap.mmap(self.data, last - first, offset=first) as pages:
                pages.madvise(mmap.MADV_REMOVE)

    def sync(self) -> None:
        """Bring data and map to disk, the data first."""
        os.fsync(self.data)
        os.fsync(self.chart)

    def close(self) -> None:
        """Close the map. Whoever reads the part owns the data's descriptor (OpenPart)."""
        os.close(self.chart)

    def abandon(self) -> None:
        """Close data and map, where nobody will read the part."""
        self.close()
        os.close(self.data)


def _fallocate(fd: int, start: int, count: int) -> int:
    """Call fallocate(2), and give its errno: 0 where it succeeded.

    posix_fallocate will not do. Where the file system cannot allocate, it writes zeros, perhaps over what another
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
    """Begin a part in memory: in files that have no name and go with their last descriptor.

    Raises:
        OSError: Where there is not enough memory or descriptors.
    """
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
    """Begin a part in a file, or go on with it; a file or map of another part is begun anew.

    Args:
        part: The part that arrives.
        path: The data's file. Its map is `path` + `.landed`. Both are made where they are missing.
        trust: Believe marks from before the machine last booted, though their bytes may not have come to disk.
            Otherwise they become DOUBTED.

    Raises:
        OSError: Where either file cannot be opened or written.
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
    """The head of a part's map that is begun during this boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        boot = b""
    return MAGIC + bytes.fromhex(part.digest.partition(":")[2]) + boot[:64].ljust(64, b"\0")


def read_map(path: Path, part: Part, count: int) -> bytearray | None:
    """What the map beside a file says is there of a part. Takes no lock.

    Args:
        path: The data's file.
        part: The part that it should be of.
        count: How many blocks the part has.

    Returns:
        One byte for the header and one for each block, by number; None where the file has no map, or one of another
        part.
    """
    try:
        raw = path.with_name(path.name + ".landed").read_bytes()
    except OSError:
        return None
    fixed = len(MAGIC) + 32
    if raw[:fixed] != _head(part)[:fixed]:
        return None
    return bytearray(raw[HEAD : HEAD + 1 + count]).ljust(1 + count, b"\0")


class LandingSink:
    """Take the bytes of one request into a landing, block by block (a Sink, stores/store.py).

    Each block is digested while it is in a core's cache, and marked once it is whole.
    """

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
        """Expect blocks that lie beside each other.

        Args:
            landing: Where they land.
            blocks: The blocks, in the order of their bytes; at least one.
            first: Number of the first of them.
            verify: Compare each with its digest before it is marked.
            scratch: The thread's buffer (`new_scratch`).
            landed: Is told the number and the size in bytes of each block that was marked.
            stopped: Is called often; raises where nobody wants the bytes any more.
        """
        self._landing, self._blocks, self._first, self._verify = landing, blocks, first, verify
        self._scratch, self._landed, self._stopped = scratch, landed, stopped
        self._at, self._stop = blocks[0].start, blocks[-1].stop
        self._block = 0
        self.bad: list[int] = []
        """Numbers of blocks whose bytes did not match their digest; they were not marked."""
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
    """A thread's buffer for bytes on their way into a landing."""
    return memoryview(bytearray(SCRATCH))
