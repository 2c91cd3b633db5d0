"""Carry out a plan: move each tensor's bytes from its source into the parts, each source byte once, digesting on the way.

This is the one mover. Bytes go from file to file through a buffer that stays in a core's cache, where crc32 and
blake3 meet them; where there is nothing to check, the kernel copies them by itself. No tensor is ever made.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from math import prod
from typing import Final

from blake3 import blake3

from shardprep_runtime import __version__
from shardprep_runtime.errors import ShardprepError, WriteError
from shardprep_runtime.format.manifest import digest_of
from shardprep_runtime.shard.parts import default_workers, piece_block

from ..files import ended
from ..index import Index
from ..source.bytes import CHUNK, PlainReader, Reader, Sources, open_reader
from .conduct import Conduct, silent
from .plan import Move, Plan, PlannedPiece
from .staging import Destination, Written

KERNEL_COPY: Final = 64 * 2**20
"""Bytes of one copy_file_range: few enough that progress is shown and a stop is noticed."""

ROWS: Final = 2**20
"""Bytes of rows that are read at a time and dealt out to pieces: enough that each piece's share is worth a write."""

WRITE_BACK: Final = (2**20, 16 * 2**20)
"""The kernel is told to write pieces of at least the first size to disk while they are written, in steps of the second.
So the fsync at the end finds little left."""

NOWHERE: Final = -1
"""The descriptor of pieces that are digested and not written."""

NO_KERNEL_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class Stopped(Exception):  # noqa: N818 - no error: another thread has one
    """Ends a thread because another one has failed."""


def carry_out(plan: Plan, index: Index, staging: Destination, conduct: Conduct) -> list[Written]:
    """Write every part of `plan` into `staging`, but those that an earlier run finished.

    Each thread holds a few buffers, whatever the sizes of tensors are.

    Args:
        plan: Which bytes go where.
        index: The checkpoint that the plan was made from.

    Returns:
        What was written, in the order of the parts.

    Raises:
        WriteError: Where the destination cannot be written, such as a full disk.
        IntegrityError: Where the source is damaged.
        SourceError: Where the source changes meanwhile.
    """
    outputs = _Outputs(plan, staging)
    staging.check_room(outputs.missing_bytes())
    conduct.begin(plan.nbytes)
    conduct.progress(plan.nbytes - outputs.missing_bytes())
    with Sources(index) as sources:
        run = _Run(plan, sources, outputs, conduct.progress)
        run.all(conduct.workers or index.folder.workers or default_workers())
        sources.check_unchanged()
    return [outputs.written[i] for i in range(len(plan.parts))]


class _Outputs:
    """The parts that are being written: open from their first piece to their last."""

    def __init__(self, plan: Plan, staging: Destination) -> None:
        self.plan, self.staging = plan, staging
        self.where = staging.where
        self.written: dict[int, Written] = {}
        self.digests: list[dict[str, list[str]]] = [{} for _ in plan.parts]
        self.left = [len(part.pieces) for part in plan.parts]
        self.header_sizes = [part.header_size for part in plan.parts]
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()
        for i, part in enumerate(plan.parts):
            written = staging.finished(part)
            if written is not None:
                self.written[i] = written

    def missing_bytes(self) -> int:
        """Bytes of data that are still to be written."""
        return sum(part.nbytes for i, part in enumerate(self.plan.parts) if i not in self.written)

    def fd(self, number: int) -> int:
        with self._lock:
            if number not in self._fds:
                self._fds[number] = self.staging.create(self.plan.parts[number].path)
            return self._fds[number]

    def done(self, pieces: Sequence[tuple[PlannedPiece, list[str]]]) -> None:
        """Count pieces as written, and finish the parts whose pieces are all written."""
        for piece, digests in pieces:
            with self._lock:
                self.digests[piece.part][piece.name] = digests
                self.left[piece.part] -= 1
                last = self.left[piece.part] == 0
            if last:
                self._finish(piece.part)

    def _finish(self, number: int) -> None:
        part = self.plan.parts[number]
        raw = self.plan.header(part, self.digests[number] if self.plan.block_bytes is not None else None)
        assert len(raw) == part.header_size, part.path  # behind which the data have been written
        fd = self.fd(number)
        write_all(fd, raw, 0)
        with self._lock:
            del self._fds[number]
        written = Written(len(raw) + part.nbytes, len(raw), digest_of(raw))
        self.staging.finish(part.path, fd, written)
        self.written[number] = written

    def finish_empty(self) -> None:
        """Write the parts that have no pieces: a header alone."""
        for i, part in enumerate(self.plan.parts):
            if not part.pieces and i not in self.written:
                self.fd(i)
                self._finish(i)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` by as many pwrites as it takes.

    Args:
        offset: Byte of the file at which `data` begins.
    """
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def begin_write_back(fd: int, offset: int, count: int) -> None:
    """Have the kernel begin to write a range to disk, without waiting (Linux's sync_file_range).

    This is a hint. Where the C library or the file system lacks the call, the fsync at the end writes everything.

    Args:
        offset: First byte of the range.
        count: Bytes of the range.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, count, 2)  # SYNC_FILE_RANGE_WRITE


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    import ctypes

    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


class _PieceWriter:
    """Writes a piece front to back, and digests each block where the plan asks for digests."""

    def __init__(self, fd: int, offset: int, block_bytes: int | None) -> None:
        self.fd, self.offset, self.block_bytes = fd, offset, block_bytes
        self.digests: list[str] = []
        self.hash = blake3()
        self.room = block_bytes or 0
        self.sent = offset
        """First byte that the kernel has not been told to write to disk yet."""

    def write(self, data: memoryview) -> None:
        if self.fd != NOWHERE:
            write_all(self.fd, data, self.offset)
            self.advance(len(data))
        if self.block_bytes is None:
            return
        while data:
            part = data[: self.room]
            self.hash.update(part)
            self.room -= len(part)
            data = data[len(part) :]
            if self.room == 0:
                self._close_block()

    def advance(self, count: int) -> None:
        """Count bytes as written."""
        self.offset += count
        if self.offset - self.sent >= WRITE_BACK[1]:
            self._send()

    def _send(self) -> None:
        begin_write_back(self.fd, self.sent, self.offset - self.sent)
        self.sent = self.offset

    def _close_block(self) -> None:
        assert self.block_bytes is not None
        self.digests.append(self.hash.hexdigest())
        self.hash = blake3()
        self.room = self.block_bytes

    def finish(self) -> list[str]:
        if self.offset - self.sent >= WRITE_BACK[0]:
            self._send()
        if self.block_bytes is not None and self.room < self.block_bytes:
            self._close_block()
        return self.digests


class _Run:
    """Threads that take moves in order until all are done, or until one thread fails."""

    def __init__(
        self, plan: Plan, sources: Sources, outputs: _Outputs | _DigestsOnly, progress: Callable[[int], None]
    ) -> None:
        self.plan, self.sources, self.outputs, self.progress = plan, sources, outputs, progress
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._moves = iter(plan.moves)

    def all(self, workers: int) -> None:
        self.outputs.finish_empty()
        with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="shardprep-write") as pool:
            futures = [pool.submit(self._work) for _ in range(workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also on ctrl-c
                self._stop.set()
                wait(futures)
                self.outputs.close()
        errors = [
            error for future in futures if (error := future.exception()) and not isinstance(error, Stopped)
        ]
        for error in errors:
            raise error

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    move = next(self._moves, None)
                if move is None or self._stop.is_set():
                    return
                self._move(move)
        except ShardprepError:
            self._stop.set()
            raise
        except OSError as error:
            self._stop.set()
            raise WriteError(
                f"{self.outputs.where}: cannot be written: {error.strerror}; "
                "finished parts are kept: the same command resumes"
            ) from None

    def _move(self, move: Move) -> None:
        """Move one tensor into its pieces, but not into parts that are finished already."""
        todo = [piece for piece in move.pieces if piece.part not in self.outputs.written]
        if not todo:
            return
        writers = {id(piece): self._writer(piece) for piece in todo}
        reader = open_reader(self.sources, move.tensor, move.dtype)
        if not self._kernel_copy(move, reader, writers):
            self._copy(move, reader, writers)
        reader.finish()
        self.outputs.done([(piece, writers[id(piece)].finish()) for piece in todo])

    def _writer(self, piece: PlannedPiece) -> _PieceWriter:
        offset = self.outputs.header_sizes[piece.part] + piece.start
        return _PieceWriter(self.outputs.fd(piece.part), offset, self.plan.block_bytes)

    def _copy(self, move: Move, reader: Reader, writers: Mapping[int, _PieceWriter]) -> None:
        """Read the tensor front to back once, and give each piece its share of every row."""
        shape = move.tensor.shape
        rows = prod(shape[: move.dim])
        total = sum(piece.nbytes for piece in move.pieces)
        if not total:
            return
        row = total // rows
        bounds = []  # bytes [start, stop) of each piece in a row
        at = 0
        for piece in move.pieces:
            width = piece.nbytes // rows
            bounds.append((writers.get(id(piece)), at, at + width))
            at += width
        if row >= CHUNK or rows == 1 or len(bounds) == 1:
            whole = len(bounds) == 1
            for start in (0,) if whole else range(0, total, row):
                for writer, low, high in bounds:
                    self._stretch(reader, writer, start + low, start + (total if whole else high))
            return
        batch = max(1, ROWS // row)
        for first in range(0, rows, batch):
            count = min(batch, rows - first)
            data = reader.read(first * row, (first + count) * row)
            for writer, low, high in bounds:
                if writer is not None:
                    own = b"".join([data[at + low : at + high] for at in range(0, count * row, row)])
                    writer.write(memoryview(own))
                    self._step(len(own))

    def _stretch(self, reader: Reader, writer: _PieceWriter | None, start: int, stop: int) -> None:
        """Move bytes [start, stop) of the tensor, which are one run of bytes in their piece too."""
        for at in range(start, stop, CHUNK):
            data = reader.read(at, min(at + CHUNK, stop))
            if writer is not None:
                writer.write(data)
                self._step(len(data))

    def _step(self, count: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self.progress(count)

    def _kernel_copy(self, move: Move, reader: Reader, writers: Mapping[int, _PieceWriter]) -> bool:
        """Let the kernel copy bytes that need neither digest nor crc32; some file systems then share the blocks.

        False where it cannot, before anything was written.
        """
        if (
            not isinstance(reader, PlainReader)
            or reader.file.fd is None
            or reader.record is not None
            or self.plan.block_bytes is not None
            or len(move.pieces) != 1
        ):
            return False
        source, writer = reader.file.fd, writers[id(move.pieces[0])]
        done = 0
        while done < reader.size:
            count = min(KERNEL_COPY, reader.size - done)
            try:
                got = os.copy_file_range(source, writer.fd, count, reader.offset + done, writer.offset)
            except OSError as error:
                if done == 0 and error.errno in NO_KERNEL_COPY:
                    return False
                raise
            if got == 0 and done == 0:
                return False
            if got == 0:
                raise ended(reader.file, reader.offset + done)
            done += got
            writer.advance(got)
            self._step(got)
        return True


def fingerprint(plan: Plan, index: Index) -> str:
    """Digest all that decides the bytes that `plan` writes: our version, the source files, the pieces of each part.

    Args:
        index: The checkpoint that the plan was made from.
    """
    digest = hashlib.sha256(__version__.encode())
    for file in index.files:
        digest.update(repr((file.path, file.size, file.version, file.digest)).encode())
    for name in index.side_files:
        with index.folder.open(name) as side:
            digest.update(repr((name, side.size, side.version)).encode())
    if index.edited:
        digest.update(json.dumps(index.config, sort_keys=True).encode())
    # many pieces are the same block of the same form, which is digested once and then named by a number
    known: dict[tuple[int, int], int] = {}
    for part in plan.parts:
        about = part.path, part.ranks, part.layers, part.placements, part.metadata, plan.block_bytes
        digest.update(repr((part.header_size, *about)).encode())
        blocks = []
        for piece in part.pieces:
            key = id(piece.form), id(piece.piece)
            if key not in known:
                known[key] = len(known)
                block = piece_block(piece.form, piece.piece)
                digest.update(repr((piece.form.dtype, piece.form.shape, block)).encode())
            blocks.append(known[key])
        digest.update(repr([piece.name for piece in part.pieces]).encode())
        digest.update(repr(blocks).encode())
    for tensor in (move.tensor for move in plan.moves):
        if not all(
            extent.file for extent in tensor.extents
        ):  # padded: the form does not say where the zeros are
            digest.update(repr((tensor.name, tensor.dim, tensor.extents)).encode())
    return digest.hexdigest()


def digest_pieces(
    plan: Plan, index: Index, *, workers: int | None = None
) -> dict[tuple[str, int], list[str]]:
    """Compute the digests of all blocks that `plan` would write, without writing.

    Args:
        index: The checkpoint that the plan was made from.
        workers: Threads; default: the cores of this process, at most 8.

    Returns:
        (tensor name, first index of the piece along its dim) -> a digest for each block of the piece.
    """
    sink = _DigestsOnly(plan)
    with Sources(index) as sources:
        _Run(plan, sources, sink, silent).all(workers or default_workers())
    return sink.found


class _DigestsOnly:
    """Takes pieces as `_Outputs` does, keeps their digests and writes nothing."""

    def __init__(self, plan: Plan) -> None:
        self.where = "digests"
        self.written: dict[int, Written] = {}
        self.header_sizes = [0] * len(plan.parts)
        self.found: dict[tuple[str, int], list[str]] = {}

    def fd(self, number: int) -> int:
        return NOWHERE

    def done(self, pieces: Sequence[tuple[PlannedPiece, list[str]]]) -> None:
        for piece, digests in pieces:
            self.found[piece.name, piece.piece.start] = digests

    def finish_empty(self) -> None:
        pass

    def close(self) -> None:
        pass
