"""Define how the files of a checkpoint are read, wherever they lie, and read those of a folder on this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from shardprep_runtime.errors import FormatError, SourceError, quote

PARTIAL: Final = ".shardprep-partial"
"""Folder within a destination that holds unfinished files until all are whole."""

JOURNAL: Final = ".journal.json"  # with a dot: no side file of a checkpoint has such a name
"""File in `PARTIAL` that identifies the run that writes there, and lists the files that it will write."""


class Stretch(Protocol):
    """Bytes that are read front to back by one thread."""

    def read_into(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on.

        Args:
            into: Where the bytes go; its length says how many.
            offset: First byte, counted from the start of the file.

        Raises:
            SourceError: Where the file ends earlier, or has changed since it was opened.
        """


class File(Stretch, Protocol):
    """One open file. Safe to read from several threads."""

    @property
    def name(self) -> str:
        """The file's name, relative to its folder."""

    @property
    def where(self) -> str:
        """The file as error messages name it."""

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""

    @property
    def version(self) -> str:
        """Changes when the file does: its time of modification, or the ETag of an object."""

    @property
    def fd(self) -> int | None:
        """The descriptor of a file on this machine, which the kernel can map and copy; None for any other."""

    def stretch(self, start: int, stop: int) -> Stretch:
        """Open a stretch of the file, to be read front to back in small steps. Nothing beyond it is fetched.

        Args:
            start: First byte.
            stop: One past the last byte.
        """

    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce small ranges that will be read soon, so that a file in a store fetches them together.

        Args:
            ranges: Bytes [start, stop) of each.
        """

    def is_unchanged(self) -> bool:
        """Whether the file is still the one that was opened."""

    def close(self) -> None:
        """Close the file; no stretch of it may be read any more."""

    def __enter__(self) -> File: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Folder(Protocol):
    """The files of a checkpoint: those in one folder, without its subfolders."""

    @property
    def path(self) -> Path | None:
        """The path of a folder on this machine; None for any other."""

    @property
    def workers(self) -> int | None:
        """The number of threads that read it best; None: as many as suit this machine."""

    def where(self, name: str = "") -> str:
        """Name the folder, or a file in it, for an error message."""

    def names(self) -> list[str]:
        """List the names of everything in the folder that is not hidden, sorted."""

    def has(self, name: str) -> bool:
        """Whether anything has this name."""

    def is_file(self, name: str) -> bool:
        """Whether a file has this name."""

    def open(self, name: str) -> File:
        """Open a file of the folder.

        Raises:
            FormatError: Where the file is missing, or cannot be opened.
        """

    def close(self) -> None:
        """Close the folder, and with it what it holds open."""


def read_at(file: File, count: int, offset: int) -> bytes:
    """Read exactly `count` bytes.

    Args:
        offset: First byte, counted from the start of the file.

    Raises:
        FormatError: Where the file is too short.
    """
    if offset + count > file.size:
        left = max(0, file.size - offset)
        raise FormatError(f"{file.where}: truncated: {count} bytes expected at {offset}, {left} found")
    found = bytearray(count)
    with memoryview(found) as into:
        file.read_into(into, offset)
    return bytes(found)


def open_regular(path: Path) -> int:
    """Open a regular file and give its descriptor.

    Raises:
        FormatError: For anything else. A FIFO is refused too, and does not make this wait.
    """
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
    """Make the error of a file that is shorter than it was when it was indexed.

    Args:
        at: The byte at which it ends.
    """
    return SourceError(f"{file.where}: ends at byte {at}; it changed while it was read")
