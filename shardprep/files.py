"""Say what reading needs of a checkpoint's files, wherever they lie, and read those of a folder on this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from shardprep_runtime.errors import FormatError, SourceError, quote

PARTIAL: Final = ".shardprep-partial"
"""Folder within a destination where what is being written lies until it is whole."""

JOURNAL: Final = ".journal.json"  # with a dot: no side file of a checkpoint has such a name
"""File in `PARTIAL` that says what is being written, and what is there already."""


class Stretch(Protocol):
    """Bytes that are read front to back by one thread."""

    def read_into(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on, counted from the start of the file.

        Raises:
            SourceError: Where the file ends before, or is no longer the one that was opened.
        """


class File(Stretch, Protocol):
    """One open file. Safe to read from several threads."""

    @property
    def name(self) -> str:
        """Relative to its folder."""

    @property
    def where(self) -> str:
        """How a message names it."""

    @property
    def size(self) -> int:
        """In bytes, when it was opened."""

    @property
    def version(self) -> str:
        """Differs once the file is another: when it was changed, or an ETag."""

    @property
    def fd(self) -> int | None:
        """Of a file on this machine, which the kernel can map and copy."""

    def stretch(self, start: int, stop: int) -> Stretch:
        """To read bytes [start, stop) front to back in small steps, without fetching any beyond them."""

    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Small ranges, bytes [start, stop), that are read soon: a file far away fetches them together."""

    def is_unchanged(self) -> bool:
        """Whether the file is still the one that was opened."""

    def close(self) -> None:
        """It is read no more."""

    def __enter__(self) -> File: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Folder(Protocol):
    """The files of a checkpoint: those that lie in one folder, not in folders of it."""

    @property
    def path(self) -> Path | None:
        """Of a folder on this machine."""

    @property
    def workers(self) -> int | None:
        """How many threads read it best; None: as many as suit this machine."""

    def where(self, name: str = "") -> str:
        """How a message names a file of it, or itself."""

    def names(self) -> list[str]:
        """Of all that lies in it and is not hidden, sorted."""

    def has(self, name: str) -> bool:
        """Whether anything has this name."""

    def is_file(self, name: str) -> bool:
        """Whether a file has this name."""

    def open(self, name: str) -> File:
        """Open a file. Raises FormatError where it cannot be."""

    def close(self) -> None:
        """It is used no more."""


def read_at(file: File, count: int, offset: int) -> bytes:
    """Exactly `count` bytes from `offset`. Raises FormatError where the file is too short for them."""
    if offset + count > file.size:
        left = max(0, file.size - offset)
        raise FormatError(f"{file.where}: truncated: {count} bytes expected at {offset}, {left} found")
    found = bytearray(count)
    with memoryview(found) as into:
        file.read_into(into, offset)
    return bytes(found)


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


class LocalFile:
    """A file on this machine, read by its descriptor."""

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / name
        self.name, self.where = name, quote(path)
        self.fd = open_regular(path)
        found = os.fstat(self.fd)
        self.size, self.version = found.st_size, str(found.st_mtime_ns)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def read_into(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.fd, [into[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"{self.where}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise ended(self, offset + done)
            done += got

    def stretch(self, start: int, stop: int) -> Stretch:
        return self  # the kernel reads ahead

    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def is_unchanged(self) -> bool:
        found = os.fstat(self.fd)
        return (found.st_size, str(found.st_mtime_ns)) == (self.size, self.version)


class LocalFolder:
    """A folder on this machine."""

    workers = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, name: str = "") -> str:
        return quote(self.path / name)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def is_file(self, name: str) -> bool:
        return (self.path / name).is_file()

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path, name)

    def close(self) -> None:
        pass


def ended(file: File, at: int) -> SourceError:
    """The error of a file that ends at byte `at`, before what was indexed does."""
    return SourceError(f"{file.where}: ends at byte {at}; it changed while it was read")
