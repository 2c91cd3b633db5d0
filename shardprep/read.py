"""Give the bytes of a source tensor, packed and little-endian, whatever way they lie in its files."""

from __future__ import annotations

import mmap
import threading
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from isal.isal_zlib import crc32

from shardprep_runtime import dtypes
from shardprep_runtime.errors import IntegrityError, SourceError

from .files import File
from .index import Extent, Index, Record, Tensor

if TYPE_CHECKING:
    import numpy as np

CHUNK = 256 * 2**10
"""Bytes that are in flight per thread: small enough to stay in a core's own cache between read, digest and write."""


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
        """A source file, opened once. Raises SourceError where it is no longer the one indexed."""
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
        """Whether the caller is the first that wants a record checked, and so has to do it."""
        with self._lock:
            if (path, record.start) in self._checked:
                return False
            self._checked.add((path, record.start))
            return True

    def check_record(self, path: str, record: Record) -> None:
        """Read a record once and compare its crc32; a record that was checked is not read again."""
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
    """Raises IntegrityError where a record's crc32 is not the one that the zip's directory states."""
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
    """The packed bytes of one tensor, in the dtype in which it is written."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the packed tensor, valid until the next call."""


class PlainReader:
    """A tensor that lies packed in one run of a file. Sums its record's crc32 as it goes where it is the record."""

    def __init__(self, sources: Sources, tensor: Tensor) -> None:
        extent = tensor.extents[0]
        self.file, self.offset, self.size = sources.file(extent.file), extent.offset, tensor.nbytes
        record = extent.record
        self.record = record
        if record is not None and (record.start, record.stop) != (self.offset, self.offset + self.size):
            # a view of a larger storage: its bytes alone cannot be summed
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
        """Call once all bytes were read in order."""
        if self.record is not None:
            compare(self.file, self.record, self.crc)


class JoinedReader:
    """A tensor that lies in several packed blocks along one dim: one of a shard set."""

    def __init__(self, sources: Sources, tensor: Tensor) -> None:
        self.extents = tensor.extents
        self.files = [sources.file(extent.file) for extent in tensor.extents]
        inner = dtypes.nbytes(tensor.dtype, tensor.shape[tensor.dim + 1 :])
        self.row = inner * tensor.shape[tensor.dim]
        self.bounds = [(e.start * inner, (e.stop or 0) * inner) for e in self.extents]

    def read(self, start: int, stop: int) -> memoryview:
        if self.row >= CHUNK:
            return self._within_rows(start, stop)
        first, last = start // self.row, -(-stop // self.row)
        columns = [(self._column(i, first, last), high - low) for i, (low, high) in enumerate(self.bounds)]
        rows = b"".join(
            column[row * width : (row + 1) * width]
            for row in range(last - first)
            for column, width in columns
        )
        return memoryview(rows)[start - first * self.row : stop - first * self.row]

    def _within_rows(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), row by row: rows are long, so the runs within each block are too."""
        out = memoryview(bytearray(stop - start))
        for row in range(start // self.row, -(-stop // self.row)):
            base = row * self.row - start  # where the row begins in `out`
            for extent, file, (low, high) in zip(self.extents, self.files, self.bounds, strict=True):
                a, b = max(low, -base), min(high, len(out) - base)
                if a < b:
                    at = extent.offset + row * (high - low) + a - low
                    file.read_into(out[base + a : base + b], at)
        return out

    def _column(self, number: int, first: int, last: int) -> memoryview:
        """Rows [first, last) of one block."""
        low, high = self.bounds[number]
        column = memoryview(bytearray((last - first) * (high - low)))
        self.files[number].read_into(column, self.extents[number].offset + first * (high - low))
        return column


class GatheredReader:
    """A tensor whose elements must be gathered (strides), swapped (big-endian) or cast. Needs numpy."""

    def __init__(self, sources: Sources, tensor: Tensor, dtype: str) -> None:
        import numpy as np

        extent = tensor.extents[0]
        self.itemsize = dtypes.BITS[tensor.dtype] // 8
        self.target_size = dtypes.BITS[dtype] // 8
        self.cast = (tensor.dtype, dtype) if tensor.dtype != dtype else None
        self.swap = extent.big_endian
        # complex64 is a pair of float32, each swapped by itself
        self.word = np.dtype(f"u{4 if tensor.dtype == 'C64' else self.itemsize}")
        self.flat = _elements(sources, extent, tensor, self.itemsize).flat

    def read(self, start: int, stop: int) -> memoryview:
        found: np.ndarray[Any, Any] = self.flat[start // self.target_size : stop // self.target_size]
        if self.swap:
            found = found.view(self.word).byteswap()
        if self.cast is not None:
            source, target = map(numpy_dtype, self.cast)
            import numpy as np

            with np.errstate(over="ignore"):  # beyond the range becomes inf, as in torch
                found = found.view(source).astype(target)
        return memoryview(found.view("u1"))  # type: ignore[arg-type]


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
    """Memory that holds an extent up to byte `stop`, its record checked, and the byte at which it begins."""
    file, record = sources.file(extent.file), extent.record
    if file.fd is not None:
        if record is not None:
            sources.check_record(extent.file, record)
        base = extent.offset - extent.offset % mmap.ALLOCATIONGRANULARITY
        return mmap.mmap(file.fd, stop - base, prot=mmap.PROT_READ, offset=base), base
    # far away: one request brings what is gathered, and the first time all that its checksum covers
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
    """The reader for a tensor that is to be written as `dtype`."""
    extent = tensor.extents[0]
    if len(tensor.extents) > 1:
        return JoinedReader(sources, tensor)
    if tensor.nbytes and (extent.strides is not None or extent.big_endian or dtype != tensor.dtype):
        return GatheredReader(sources, tensor, dtype)
    return PlainReader(sources, tensor)
