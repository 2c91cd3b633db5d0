"""Give the bytes of a source tensor, packed and little-endian, whatever way they lie in its files."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from isal.isal_zlib import crc32

from shardprep_runtime import dtypes
from shardprep_runtime.errors import FormatError, IntegrityError, SourceError, quote

from .index import Extent, Index, Record, SourceFile, Tensor

if TYPE_CHECKING:
    import numpy as np

CHUNK = 256 * 2**10
"""Bytes that are in flight per thread: small enough to stay in a core's own cache between read, digest and write."""


def open_regular(path: Path) -> int:
    """A descriptor of a regular file. Raises FormatError for anything else; a FIFO does not hang it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(f"{quote(path)}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{quote(path)}: not a regular file")
    return fd


class Sources:
    """The open files of a checkpoint, each proved to be the one that was indexed. Safe to use from several threads."""

    def __init__(self, index: Index) -> None:
        self.root = index.root
        self._files = {file.path: file for file in index.files}
        self._fds: dict[str, int] = {}
        self._checked: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def fd(self, path: str) -> int:
        """The descriptor of a source file. Raises SourceError where the file is no longer the one indexed."""
        with self._lock:
            if path not in self._fds:
                fd = open_regular(self.root / path)
                self._fds[path] = fd
                self._same(self._files[path], fd)
            return self._fds[path]

    def check_unchanged(self) -> None:
        """Raises SourceError where a file that was read has changed since it was indexed."""
        for path, fd in self._fds.items():
            self._same(self._files[path], fd)

    def _same(self, file: SourceFile, fd: int) -> None:
        found = os.fstat(fd)
        if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
            raise SourceError(
                f"{quote(self.root / file.path)}: the file changed while it was read; "
                "what was written from it is not used; run again"
            )

    def read_into(self, path: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        fd = self.fd(path)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"{quote(self.root / path)}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise self.ended(path, offset + done)
            done += got

    def ended(self, path: str, at: int) -> SourceError:
        """The error of a file that ends at byte `at`, before what was indexed does."""
        return SourceError(f"{quote(self.root / path)}: ends at byte {at}; it changed while it was read")

    def check_record(self, path: str, record: Record) -> None:
        """Read a record once and compare its crc32; a record that was checked is not read again."""
        with self._lock:
            if (path, record.start) in self._checked:
                return
            self._checked.add((path, record.start))
        buffer = memoryview(bytearray(min(CHUNK, record.stop - record.start)))
        found = 0
        for at in range(record.start, record.stop, CHUNK):
            chunk = buffer[: min(CHUNK, record.stop - at)]
            self.read_into(path, chunk, at)
            found = crc32(chunk, found)
        self.compare(path, record, found)

    def compare(self, path: str, record: Record, found: int) -> None:
        """Raises IntegrityError where a record's crc32 is not the one that the zip's directory states."""
        if found != record.crc32:
            raise IntegrityError(
                f"{quote(self.root / path)}: bytes {record.start} to {record.stop} have crc32 {found:08x}, the zip's "
                f"directory says {record.crc32:08x}: the file is damaged (or was saved with crc32 switched off)"
            )


class Reader(Protocol):
    """The packed bytes of one tensor, in the dtype in which it is written."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the packed tensor, valid until the next call."""


class PlainReader:
    """A tensor that lies packed in one run of a file. Sums its record's crc32 as it goes where it is the record."""

    def __init__(self, sources: Sources, tensor: Tensor) -> None:
        extent = tensor.extents[0]
        self.sources, self.path, self.offset, self.size = sources, extent.file, extent.offset, tensor.nbytes
        record = extent.record
        self.record = record
        if record is not None and (record.start, record.stop) != (self.offset, self.offset + self.size):
            sources.check_record(
                self.path, record
            )  # a view of a larger storage: its bytes alone cannot be summed
            self.record = None
        self.crc = 0
        self.buffer = memoryview(bytearray(min(self.size, CHUNK)))

    def read(self, start: int, stop: int) -> memoryview:
        if stop - start > len(self.buffer):
            self.buffer = memoryview(bytearray(stop - start))
        chunk = self.buffer[: stop - start]
        self.sources.read_into(self.path, chunk, self.offset + start)
        if self.record is not None:
            self.crc = crc32(chunk, self.crc)
        return chunk

    def finish(self) -> None:
        """Call once all bytes were read in order."""
        if self.record is not None:
            self.sources.compare(self.path, self.record, self.crc)


class JoinedReader:
    """A tensor that lies in several packed blocks along one dim: one of a shard set."""

    def __init__(self, sources: Sources, tensor: Tensor) -> None:
        self.sources, self.extents = sources, tensor.extents
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
            for extent, (low, high) in zip(self.extents, self.bounds, strict=True):
                a, b = max(low, -base), min(high, len(out) - base)
                if a < b:
                    at = extent.offset + row * (high - low) + a - low
                    self.sources.read_into(extent.file, out[base + a : base + b], at)
        return out

    def _column(self, number: int, first: int, last: int) -> memoryview:
        """Rows [first, last) of one block."""
        low, high = self.bounds[number]
        column = memoryview(bytearray((last - first) * (high - low)))
        extent = self.extents[number]
        self.sources.read_into(extent.file, column, extent.offset + first * (high - low))
        return column


class GatheredReader:
    """A tensor whose elements must be gathered (strides), swapped (big-endian) or cast. Needs numpy."""

    def __init__(self, sources: Sources, tensor: Tensor, dtype: str) -> None:
        import numpy as np

        extent = tensor.extents[0]
        if extent.record is not None:
            sources.check_record(extent.file, extent.record)
        self.itemsize = dtypes.BITS[tensor.dtype] // 8
        self.target_size = dtypes.BITS[dtype] // 8
        self.cast = (tensor.dtype, dtype) if tensor.dtype != dtype else None
        self.swap = extent.big_endian
        # complex64 is a pair of float32, each swapped by itself
        self.word = np.dtype(f"u{4 if tensor.dtype == 'C64' else self.itemsize}")
        self.flat = _elements(sources.fd(extent.file), extent, tensor, self.itemsize).flat

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


def _elements(fd: int, extent: Extent, tensor: Tensor, itemsize: int) -> np.ndarray[Any, Any]:
    """The tensor's elements as unsigned integers of their width, strided over a mapping of the file."""
    import numpy as np

    strides = extent.strides
    if strides is None:
        strides = tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    base = extent.offset - extent.offset % mmap.ALLOCATIONGRANULARITY
    length = extent.offset + reach * itemsize - base
    mapping = mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=base)
    flat = np.frombuffer(mapping, f"u{itemsize}", count=reach, offset=extent.offset - base)
    return np.lib.stride_tricks.as_strided(
        flat, tensor.shape, tuple(stride * itemsize for stride in strides), writeable=False
    )


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
