"""Keep what is half-written apart, so that a folder has all files under their final names or none that matter.

Everything is written into a folder `.shardprep-partial` inside the destination (so on the same file system), each
file under a temporary name until it is whole and on disk. When all are, they are renamed into the destination, the
one that makes it complete last. A run that was killed is resumed by the next that would write the same.
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
    """A finished file, as a manifest names it."""

    size: int
    header_size: int
    """Bytes that `digest` is of: the header of a part, all of a side file."""
    digest: str
    """`sha256:...`"""


KeyOf = Callable[[Part | SideFile], str]


class Destination(Protocol):
    """Where files are written one by one, and stand for nothing before the one that makes them complete is there."""

    @property
    def where(self) -> str:
        """How a message names it."""

    def check_room(self, needed: int) -> None:
        """Raises WriteError where bytes that are still to be written do not fit."""

    def finished(self, part: PlannedPart) -> Written | None:
        """What an earlier run has finished of the parts, so that it need not be written again."""

    def create(self, name: str) -> int:
        """A descriptor for writing a file that nobody takes for finished. May wait until there is room."""

    def finish(self, name: str, fd: int, written: Written) -> None:
        """Take over a file that is whole, and close `fd` sooner or later."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once."""

    def reopen(self) -> tuple[Store, KeyOf]:
        """What was finished so far, to be read: a store, which the caller closes, and each file's key in it."""

    def complete(self, name: str, data: bytes) -> None:
        """Write the file that makes the others complete, once all of them are there for good."""


class Staging:
    """A destination that is being written. Use as a context manager: it holds a lock for as long."""

    def __init__(
        self, destination: Path, fingerprint: str, files: Sequence[str], *, warn: Callable[[str], None]
    ) -> None:
        """`fingerprint` stands for all that decides the bytes of `files`, the final names in the order of renaming."""
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
        """Keep what a rerun can use. Where the input itself was at fault nothing can be: then leave no trace."""
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
        """Raises InputError where the destination holds anything that no unfinished run of ours put there."""
        if not self.destination.exists() and not self.destination.is_symlink():
            return
        if not self.destination.is_dir():
            raise InputError(
                f"{quote(self.destination)}: exists and is no folder; choose another destination"
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
        """What an earlier run wrote. Its header is there only if the data are: it was renamed after an fsync."""
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
        """A descriptor for writing a file under its temporary name. Its mode follows the umask."""
        return os.open(
            self.folder / (name + UNFINISHED), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
        )

    def finish(self, name: str, fd: int, written: Written) -> None:
        """Bring the file to disk and give it its name among the finished ones. Closes `fd`."""
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        (self.folder / (name + UNFINISHED)).rename(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once."""
        fd = self.create(name)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        except BaseException:
            os.close(fd)
            raise
        self.finish(name, fd, Written(len(data), len(data), digest_of(data)))

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
        """Remove the staging folder, the journal last: while it is there, the next run knows that this one was ours."""
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL:
                entry.unlink()
        (self.folder / JOURNAL).unlink()
        self.folder.rmdir()

    def _publish(self, name: str) -> None:
        # not there: renamed by an earlier run, where `finished` has found it
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).rename(self.destination / name)
