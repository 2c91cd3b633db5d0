"""Give the bytes of a source tensor, packed and little-endian, whatever way they lie in its files."""

from __future__ import annotations

import mmap
import threading
from dataclasses import replace
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from isal.isal_zlib import crc32

from shardprep_runtime.errors import IntegrityError, SourceError
from shardprep_runtime.format import dtypes

from ..files import File
from ..index import Extent, Index, Record, Tensor

if TYPE_CHECKING:
    import numpy as np

CHUNK = 256 * 2**10
"""Bytes that each thread moves at a time: few enough to stay in a core's own cache between read, digest and write."""


class Sources:
    """The open files of a checkpoint, each proved to be the one that was indexed. Safe to use from several threads."""

    def __init__(self, index: Index) -> None:
        self._folder = index.folder
        self._indexed = {file.path: file for file in index.files}
        self._open: dict[str, File] = {}
        self._checked: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()

    def file(self, path: str) -> File:
        """Give a source file, opened once.

        Raises:
            SourceError: Where it is no longer the file that was indexed.
        """
        with self._lock:
            if path not in self._open:
                file, indexed = self._folder.open(path), self._indexed[path]
                self._open[path] = file
                if (file.size, file.version) != (indexed.size, indexed.version):
                    raise _changed(file)
            return self._open[path]

    def check_unchanged(self) -> None:
        """Raises SourceError where a file that was read has changed since it was indexed."""
        for file in self._open.values():
            if not file.is_unchanged():
                raise _changed(file)

    def claim(self, path: str, record: Record) -> bool:
        """Whether the caller is the first that wants a record checked, and so has to check it.

        Args:
            path: The file in which the record lies.
        """
        with self._lock:
            if (path, record.start) in self._checked:
                return False
            self._checked.add((path, record.start))
            return True

    def check_record(self, path: str, record: Record) -> None:
        """Read a record and compare its crc32; nothing is read where the record was checked before.

        Args:
            path: The file in which the record lies.

        Raises:
            IntegrityError: Where the crc32 is not the one that the zip's directory states.
        """
        if not self.claim(path, record):
            return
        file = self.file(path)
        ahead = file.stretch(record.start, record.stop)
        buffer = memoryview(bytearray(min(CHUNK, record.stop - record.start)))
        found = 0
        for at in range(record.start, record.stop, CHUNK):
            chunk = buffer[: min(CHUNK, record.stop - at)]
            ahead.read_into(chunk, at)
            found = crc32(chunk, found)
        compare(file, record, found)


def compare(file: File, record: Record, found: int) -> None:
    """Compare a record's crc32 with the one that the zip's directory states.

    Args:
        found: The crc32 of the bytes that were read.

    Raises:
        IntegrityError: Where they differ.
    """
    if found != record.crc32:
        raise IntegrityError(
            f"{file.where}: bytes {record.start} to {record.stop} have crc32 {found:08x}, the zip's "
            f"directory says {record.crc32:08x}: the file is damaged (or was saved with crc32 switched off)"
        )


def _changed(file: File) -> SourceError:
    return SourceError(
        f"{file.where}: the file changed while it was read; what was written from it is not used; run again"
    )


class Reader(Protocol):
    """Gives the packed bytes of one tensor, in the dtype in which they will be written."""

    def read(self, start: int, stop: int) -> memoryview:
        """Read bytes of the packed tensor; a caller reads them front to back, without a gap.

        Args:
            start: First byte, counted from the start of the tensor.
            stop: One past the last byte.

        Returns:
            The bytes, valid until the next call.
        """

    def finish(self) -> None:
        """End the reading; called once, after the last byte.

        Raises:
            IntegrityError: Where the bytes are not those that were indexed.
        """


class PlainReader:
    """Reads a tensor that lies packed in one run of a file.

    Where the tensor is a whole record of a zip, its crc32 is summed on the way. Otherwise the record is checked first.
    """

    def __init__(self, sources: Sources, tensor: Tensor) -> None:
        extent = tensor.extents[0]
        self.file, self.offset, self.size = sources.file(extent.file), extent.offset, tensor.nbytes
        record = extent.record
        self.record = record
        if record is not None and (record.start, record.stop) != (self.offset, self.offset + self.size):
            # a view of a larger storage: the record's crc32 is not that of the view's bytes
            sources.check_record(extent.file, record)
            self.record = None
        self.ahead = self.file.stretch(self.offset, self.offset + self.size)
        self.crc = 0
        self.buffer = memoryview(bytearray(min(self.size, CHUNK)))

    def read(self, start: int, stop: int) -> memoryview:
        if stop - start > len(self.buffer):
            self.buffer = memoryview(bytearray(stop - start))
        chunk = self.buffer[: stop - start]
        self.ahead.read_into(chunk, self.offset + start)
        if self.record is not None:
            self.crc = crc32(chunk, self.crc)
        return chunk

    def finish(self) -> None:
        if self.record is not None:
            compare(self.file, self.record, self.crc)


class JoinedReader:
    """Reads a tensor that lies in several blocks along one dim: from a shard set, or padded with zeros."""

    def __init__(self, sources: Sources, tensor: Tensor, dtype: str) -> None:
        inner = dtypes.nbytes(dtype, tensor.shape[tensor.dim + 1 :])
        self.row = inner * tensor.shape[tensor.dim]
        self.bounds = [(e.start * inner, (e.stop or 0) * inner) for e in tensor.extents]
        runs: dict[tuple[str, Record | None], _Run] = {}
        self.blocks = [_open_block(sources, tensor, extent, dtype, runs) for extent in tensor.extents]
        self.runs = tuple(runs.values())
        self.last: tuple[int, bytes] = (-1, b"")
        """Number and bytes of the last row that was read: a call may end within it, and the next one begin there."""

    def read(self, start: int, stop: int) -> memoryview:
        if self.row >= CHUNK:
            return self._within_rows(start, stop)
        first, last = start // self.row, -(-stop // self.row)
        kept = self.last[1] if self.last[0] == first else b""
        begin = first + 1 if kept else first
        columns = [(self._column(i, begin, last), high - low) for i, (low, high) in enumerate(self.bounds)]
        own = (
            column[row * width : (row + 1) * width]
            for row in range(last - begin)
            for column, width in columns
        )
        rows = b"".join((kept, *own))
        self.last = last - 1, rows[len(rows) - self.row :]
        return memoryview(rows)[start - first * self.row : stop - first * self.row]

    def _within_rows(self, start: int, stop: int) -> memoryview:
        """Read bytes [start, stop) row by row. Rows are long here, so each block is read in long runs."""
        out = memoryview(bytearray(stop - start))
        for row in range(start // self.row, -(-stop // self.row)):
            base = row * self.row - start  # where the row begins in `out`
            for block, (low, high) in zip(self.blocks, self.bounds, strict=True):
                a, b = max(low, -base), min(high, len(out) - base)
                if a < b:
                    block.read_into(out[base + a : base + b], row * (high - low) + a - low)
        return out

    def _column(self, number: int, first: int, last: int) -> memoryview:
        """Read rows [first, last) of one block."""
        low, high = self.bounds[number]
        column = memoryview(bytearray((last - first) * (high - low)))
        if column:
            self.blocks[number].read_into(column, first * (high - low))
        return column

    def finish(self) -> None:
        for run in self.runs:
            run.finish()


class _Run:
    """A run of a file in which blocks of a tensor lie, read front to back.

    The crc32 of its record is summed as long as the bytes come in order. If they did not, `finish` reads the record again.
    """

    def __init__(self, sources: Sources, path: str, record: Record | None, start: int, stop: int) -> None:
        self.sources, self.path, self.record = sources, path, record
        self.file = sources.file(path)
        self.ahead = self.file.stretch(start, stop)
        self.summed, self.crc = record.start if record is not None else -1, 0

    def read_into(self, into: memoryview, offset: int) -> None:
        self.ahead.read_into(into, offset)
        if offset == self.summed:
            self.crc = crc32(into, self.crc)
            self.summed += len(into)

    def finish(self) -> None:
        if self.record is None:
            return
        if self.summed == self.record.stop:
            compare(self.file, self.record, self.crc)
        else:  # a part of the record belongs to other tensors, or blocks were read out of order
            self.sources.check_record(self.path, self.record)


class _Block(Protocol):
    """One block of a tensor."""

    def read_into(self, into: memoryview, start: int) -> None:
        """Fill `into` with bytes of the packed block.

        Args:
            into: Memory that holds zeros.
            start: First byte, counted from the start of the block.
        """


class _Zeros:
    def read_into(self, into: memoryview, start: int) -> None:
        pass


class _Rows:
    """A block whose rows of `width` bytes begin `pitch` bytes apart in a file."""

    def __init__(self, run: _Run, offset: int, width: int, pitch: int) -> None:
        self.run, self.offset, self.width, self.pitch = run, offset, width, pitch

    def read_into(self, into: memoryview, start: int) -> None:
        if self.pitch == self.width:
            self.run.read_into(into, self.offset + start)
            return
        done = 0
        while done < len(into):
            row, at = divmod(start + done, self.width)
            count = min(self.width - at, len(into) - done)
            self.run.read_into(into[done : done + count], self.offset + row * self.pitch + at)
            done += count


class _Gathered:
    def __init__(self, reader: GatheredReader) -> None:
        self.reader = reader

    def read_into(self, into: memoryview, start: int) -> None:
        into[:] = self.reader.read(start, start + len(into))


def _open_block(
    sources: Sources,
    tensor: Tensor,
    extent: Extent,
    dtype: str,
    runs: dict[tuple[str, Record | None], _Run],
) -> _Block:
    """Open the reader of one extent of a tensor; extents in one record share an entry of `runs`."""
    dim = tensor.dim
    shape = (*tensor.shape[:dim], (extent.stop or 0) - extent.start, *tensor.shape[dim + 1 :])
    if not extent.file or not prod(shape):
        return _Zeros()
    width = dtypes.nbytes(tensor.dtype, shape[dim:])
    pitch = width if extent.strides is None else _pitch(extent.strides, shape, dim, tensor.dtype)
    if pitch is None or extent.big_endian or dtype != tensor.dtype:
        alone = replace(extent, start=0, stop=None)
        return _Gathered(GatheredReader(sources, replace(tensor, shape=shape, extents=(alone,)), dtype))
    key = extent.file, extent.record
    if key not in runs:
        start, stop = _reach(tensor, extent)
        runs[key] = _Run(sources, extent.file, extent.record, start, stop)
    return _Rows(runs[key], extent.offset, width, pitch or width)


def _pitch(strides: tuple[int, ...], shape: tuple[int, ...], dim: int, dtype: str) -> int | None:
    """Bytes from the start of one row to the next; a row is `dim` and all dims after it.

    Returns:
        0 where there is only one row; None where rows are not packed, or not evenly spaced.
    """
    step = 1
    for size, stride in zip(reversed(shape[dim:]), reversed(strides[dim:]), strict=True):
        if size > 1 and stride != step:
            return None
        step *= size
    pitch = 0
    for size, stride in zip(reversed(shape[:dim]), reversed(strides[:dim]), strict=True):
        if size > 1:
            if pitch and stride != step:
                return None
            pitch = pitch or stride
            step = stride * size
    return pitch * dtypes.BITS[dtype] // 8


def _reach(tensor: Tensor, extent: Extent) -> tuple[int, int]:
    """Bytes [start, stop) of the file that hold all blocks of the tensor that share a run with this extent."""
    starts, stops = [], []
    for each in tensor.extents:
        if (each.file, each.record) == (extent.file, extent.record):
            shape = (
                *tensor.shape[: tensor.dim],
                (each.stop or 0) - each.start,
                *tensor.shape[tensor.dim + 1 :],
            )
            starts.append(each.offset)
            if each.strides is None:
                stops.append(each.offset + dtypes.nbytes(tensor.dtype, shape))
            else:
                last = sum((size - 1) * stride for size, stride in zip(shape, each.strides, strict=True))
                stops.append(each.offset + (last + 1) * dtypes.BITS[tensor.dtype] // 8)
    return min(starts), max(stops)


class GatheredReader:
    """Reads a tensor whose elements must be gathered (strides), swapped (big-endian) or cast. Needs numpy."""

    def __init__(self, sources: Sources, tensor: Tensor, dtype: str) -> None:
        import numpy as np

        extent = tensor.extents[0]
        self.itemsize = dtypes.BITS[tensor.dtype] // 8
        self.target_size = dtypes.BITS[dtype] // 8
        self.cast = (tensor.dtype, dtype) if tensor.dtype != dtype else None
        self.swap = extent.big_endian
        # a complex64 is two float32, and each of them is swapped by itself
        self.word = np.dtype(f"u{4 if tensor.dtype == 'C64' else self.itemsize}")
        self.flat = _elements(sources, extent, tensor, self.itemsize).flat

    def read(self, start: int, stop: int) -> memoryview:
        found: np.ndarray[Any, Any] = self.flat[start // self.target_size : stop // self.target_size]
        if self.swap:
            found = found.view(self.word).byteswap()
        if self.cast is not None:
            source, target = map(numpy_dtype, self.cast)
            import numpy as np

            with np.errstate(over="ignore"):  # a value beyond the range becomes inf, as in torch
                given = found.view(source)
                if self.cast == ("F64", "F16"):  # rounded twice, as in torch: 1 + 2**-11 + 2**-40 becomes 1
                    given = given.astype(np.float32)
                found = given.astype(target)
        return memoryview(found.view("u1"))  # type: ignore[arg-type]

    def finish(self) -> None:
        pass  # its record was checked before


def _elements(sources: Sources, extent: Extent, tensor: Tensor, itemsize: int) -> np.ndarray[Any, Any]:
    """The tensor's elements as unsigned integers of their width, strided over the bytes of the file."""
    import numpy as np

    strides = extent.strides
    if strides is None:
        strides = tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    mapping, base = _mapped(sources, extent, extent.offset + reach * itemsize)
    flat = np.frombuffer(mapping, f"u{itemsize}", count=reach, offset=extent.offset - base)
    return np.lib.stride_tricks.as_strided(
        flat, tensor.shape, tuple(stride * itemsize for stride in strides), writeable=False
    )


def _mapped(sources: Sources, extent: Extent, stop: int) -> tuple[mmap.mmap, int]:
    """Bring an extent up to byte `stop` of its file into memory, and check its record.

    Returns:
        The memory, and the byte of the file at which it begins.
    """
    file, record = sources.file(extent.file), extent.record
    if file.fd is not None:
        if record is not None:
            sources.check_record(extent.file, record)
        base = extent.offset - extent.offset % mmap.ALLOCATIONGRANULARITY
        return mmap.mmap(file.fd, stop - base, prot=mmap.PROT_READ, offset=base), base
    # in a store: one request brings the extent; the first one for a record brings the whole record, to check its crc32
    first = record is not None and sources.claim(extent.file, record)
    base, stop = (record.start, record.stop) if record is not None and first else (extent.offset, stop)
    memory = mmap.mmap(-1, stop - base)
    with memoryview(memory) as into:
        file.read_into(into, base)
        if record is not None and first:
            compare(file, record, crc32(into))
    return memory, base


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a float dtype; bfloat16 is ml_dtypes'."""
    import numpy as np

    if dtype == "BF16":
        from ml_dtypes import bfloat16

        found: np.dtype[Any] = np.dtype(bfloat16)
        return found
    name = {"F64": "f8", "F32": "f4", "F16": "f2"}[dtype]
    return np.dtype(name)


def open_reader(sources: Sources, tensor: Tensor, dtype: str) -> Reader:
    """Open the reader that a tensor needs.

    Args:
        dtype: The dtype in which the tensor will be written.
    """
    extent = tensor.extents[0]
    if len(tensor.extents) > 1:
        return JoinedReader(sources, tensor, dtype)
    if tensor.nbytes and (extent.strides is not None or extent.big_endian or dtype != tensor.dtype):
        return GatheredReader(sources, tensor, dtype)
    return PlainReader(sources, tensor)
