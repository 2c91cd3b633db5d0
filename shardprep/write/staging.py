"""Keep unfinished files apart, so that a destination is either complete or plainly incomplete.

All files are written into a folder `.shardprep-partial` inside the destination, and so on the same file system. Each
has a temporary name until it is whole and on disk. When all are, they are renamed into the destination. The file that
makes the destination complete comes last. The next run that would write the same bytes resumes one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from shardprep_runtime.errors import (
    InputError,
    IntegrityError,
    ProblemError,
    SourceError,
    WriteError,
    quote,
)
from shardprep_runtime.format.header import read_header
from shardprep_runtime.format.manifest import Part, SideFile, digest_of
from shardprep_runtime.shard.filesystem import sync_folder
from shardprep_runtime.stores.folder import FolderStore
from shardprep_runtime.stores.store import Store

from ..files import JOURNAL, PARTIAL, open_regular
from .plan import PlannedPart

LOCK: Final = ".lock"
UNFINISHED: Final = ".unfinished"


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file, as a manifest describes it."""

    size: int
    """Bytes of the file."""
    header_size: int
    """Bytes, from the start of the file, that `digest` covers: the header of a part, all of a side file."""
    digest: str
    """`sha256:...` of the first `header_size` bytes."""


KeyOf = Callable[[Part | SideFile], str]


class Destination(Protocol):
    """Where files are written one by one. They count for nothing until the last of them, the manifest, is there."""

    @property
    def where(self) -> str:
        """The destination as error messages name it."""

    def check_room(self, needed: int) -> None:
        """Check that `needed` more bytes fit.

        Raises:
            WriteError: Where they do not.
        """

    def finished(self, part: PlannedPart) -> Written | None:
        """Give the part if an earlier run has finished it, so that it is not written again."""

    def create(self, name: str) -> int:
        """Give a descriptor for writing a file, which nobody takes for finished yet. May wait until there is room."""

    def finish(self, name: str, fd: int, written: Written) -> None:
        """Take over a file that is whole.

        Args:
            fd: Its descriptor, which this closes, if not at once.
            written: Its size and digest.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once.

        Args:
            data: All of its bytes.
        """

    def reopen(self) -> tuple[Store, KeyOf]:
        """Open the finished files for reading.

        Returns:
            A store, which the caller closes, and a function that gives the key of each file in it.
        """

    def complete(self, name: str, data: bytes) -> None:
        """Write the file that makes the destination complete, once all others are there for good.

        Args:
            data: All of its bytes.
        """


class Staging:
    """A folder that is being written. Use as a context manager, which holds the folder's lock."""

    def __init__(
        self, destination: Path, fingerprint: str, files: Sequence[str], *, warn: Callable[[str], None]
    ) -> None:
        """`fingerprint` digests all that decides the bytes of the files; `files` are their names, in order of renaming."""
        self.destination = destination
        self.where = quote(destination)
        self.folder = destination / PARTIAL
        self.fingerprint = fingerprint
        self.files = tuple(files)
        self.warn = warn

    def __enter__(self) -> Staging:
        self._refuse_foreign()
        self.published = [name for name in self.files if (self.destination / name).is_file()]
        try:
            self.made = not self.destination.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteError(f"{quote(self.destination)}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(
                f"{quote(self.destination)}: another shardprep is writing here; wait for it"
            ) from None
        try:
            self._start()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, OSError):
                raise self._cannot_write(error) from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what a rerun can use. Remove everything where the input was at fault, since a rerun would fail too."""
        if isinstance(error, InputError | IntegrityError | SourceError):
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.made:
                with contextlib.suppress(OSError):
                    self.destination.rmdir()
        elif error is not None and self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name.endswith(UNFINISHED):
                    entry.unlink()
        os.close(self._lock)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> WriteError:
        return WriteError(
            f"{quote(self.destination)}: cannot be written: {error.strerror}; "
            "finished parts are kept: the same command resumes"
        )

    def _refuse_foreign(self) -> None:
        """Raise InputError where the destination holds anything that is not an unfinished run of ours."""
        if not self.destination.exists() and not self.destination.is_symlink():
            return
        if not self.destination.is_dir():
            raise InputError(
                f"{quote(self.destination)}: exists and is not a folder; choose another destination"
            )
        there = {entry.name for entry in self.destination.iterdir()} - {PARTIAL}
        own = self._journal()
        foreign = there - set(own[1] if own else ())
        if foreign or (there and own is not None and own[0] != self.fingerprint):
            what = f"holds {quote(min(foreign))}" if foreign else "holds files of another unfinished run"
            raise InputError(
                f"{quote(self.destination)}: {what}; nothing is overwritten: choose an empty or new folder"
            )

    def _journal(self) -> tuple[str, list[str]] | None:
        try:
            found = json.loads((self.folder / JOURNAL).read_bytes())
            return str(found["fingerprint"]), [str(name) for name in found["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _start(self) -> None:
        own = self._journal()
        if own is not None and own[0] != self.fingerprint:
            self.warn(f"{quote(self.folder)}: an unfinished run with other input or options is discarded")
        for entry in self.folder.iterdir():
            stale = own is None or own[0] != self.fingerprint or entry.name.endswith(UNFINISHED)
            if entry.name != LOCK and stale:
                entry.unlink()
        self.write(JOURNAL, json.dumps({"fingerprint": self.fingerprint, "files": self.files}).encode())

    def check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.destination).free
        if needed > free:
            raise WriteError(
                f"{self.where}: {needed:,} bytes are needed, {free:,} are free; make room or write elsewhere"
            )

    def finished(self, part: PlannedPart) -> Written | None:
        """Give the part if an earlier run finished it. A file has its name only after an fsync, so it is whole."""
        for path in (self.folder / part.path, self.destination / part.path):
            if path.is_file():
                return self._examine(part, path)
        return None

    def _examine(self, part: PlannedPart, path: Path) -> Written:
        fd = open_regular(path)
        try:
            raw, header = read_header(fd, where=quote(path))
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        planned = {piece.name: (piece.form.dtype, piece.shape) for piece in part.pieces}
        if {name: (span.dtype, span.shape) for name, span in header.tensors.items()} != planned:
            raise ProblemError(f"{quote(path)}: not what was to be written; remove {quote(self.folder)}")
        return Written(size, len(raw), digest_of(raw))

    def create(self, name: str) -> int:
        """Give a descriptor for writing a file under its temporary name. Its mode follows the umask."""
        return os.open(
            self.folder / (name + UNFINISHED), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
        )

    def finish(self, name: str, fd: int, written: Written) -> None:
        """Bring the file to disk, and rename it to its name among the finished ones.

        Args:
            fd: Its descriptor, which this closes.
        """
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        (self.folder / (name + UNFINISHED)).rename(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once.

        Args:
            data: All of its bytes.
        """
        write_whole(self, name, data)

    def reopen(self) -> tuple[Store, KeyOf]:
        def key(file: Part | SideFile) -> str:
            # there: an earlier run was killed while it renamed
            is_published = (self.destination / file.path).exists()
            return file.path if is_published else f"{PARTIAL}/{file.path}"

        return FolderStore(self.destination), key

    def complete(self, name: str, data: bytes) -> None:
        self.write(name, data)
        self.publish()

    def publish(self) -> None:
        """Rename all files into the destination in their order, then remove the staging folder."""
        sync_folder(self.folder)
        for name in self.files[:-1]:
            self._publish(name)
        sync_folder(self.destination)
        # the file that makes the folder complete, once all others are there for good
        self._publish(self.files[-1])
        sync_folder(self.destination)
        self._remove()

    def _remove(self) -> None:
        """Remove the staging folder, the journal last: by the journal the next run knows that the folder is ours."""
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL:
                entry.unlink()
        (self.folder / JOURNAL).unlink()
        self.folder.rmdir()

    def _publish(self, name: str) -> None:
        # not there: renamed by an earlier run, where `finished` has found it
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).rename(self.destination / name)


def write_whole(staging: Destination, name: str, data: bytes) -> None:
    """Write a small file whole into a destination.

    Args:
        staging: Where it is created and finished.
        data: All of its bytes.
    """
    fd = staging.create(name)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    staging.finish(name, fd, Written(len(data), len(data), digest_of(data)))
