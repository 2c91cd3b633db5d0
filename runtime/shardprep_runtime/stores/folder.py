"""A store in a folder: what a shared file system is to a fleet, and the store without a network in tests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from ..errors import ConflictError, SourceError, StoreError, quote
from ..format.manifest import check_path
from .store import Body, Chunk, FileRange, Sink, Stat, changed, missing, where

UPLOADS: Final = ".uploads"
"""Unfinished files lie in here, so that a listing never meets one."""

READ: Final = 4 * 2**20
"""Bytes of one read: what a network file system is asked for at a time."""

NO_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
"""Where the kernel copies nothing between two files itself: they are of different kinds of file systems, mostly."""


class FolderStore:
    """Objects are files under a folder, replaced only by renaming."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def __enter__(self) -> FolderStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        pass

    def _path(self, key: str) -> Path:
        return self.folder / check_path(key)

    def head(self, key: str) -> Stat | None:
        try:
            found = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{where(self, key)}: {error.strerror}") from None
        return _stat(key, found) if stat.S_ISREG(found.st_mode) else None

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(self, key) from None
        except OSError as error:
            raise StoreError(f"{where(self, key)}: cannot be opened: {error.strerror}") from None
        try:
            found = _stat(key, os.fstat(fd))
            if version not in (None, found.version):
                raise changed(self, key)
            at = start
            while sink.left:
                try:
                    got = os.preadv(fd, [sink.room()[:READ]], at)
                except OSError as error:
                    raise SourceError(f"{where(self, key)}: cannot be read: {error.strerror}") from None
                if not got:
                    raise SourceError(
                        f"{where(self, key)}: ends at byte {at}, {sink.left} more were expected"
                    )
                sink.landed(got)
                at += got
            if _stat(key, os.fstat(fd)).version != found.version:
                raise changed(self, key)
            return found.version
        finally:
            os.close(fd)

    def put(self, key: str, data: bytes) -> Stat:
        with self._written(key, data) as path:
            self._place(path, key)
        return self._known(key)

    def put_if(self, key: str, data: bytes, *, version: str | None) -> Stat:
        with self._written(key, data) as path, self._locked():
            found = self.head(key)
            if (found.version if found else None) != version:
                raise ConflictError(f"{where(self, key)}: was written by somebody else meanwhile")
            self._place(path, key)
            return self._known(key)

    def _known(self, key: str) -> Stat:
        found = self.head(key)
        if found is None:
            raise missing(self, key)
        return found

    def _place(self, finished: Path, key: str) -> None:
        """Give a finished file its name."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            finished.rename(path)
        except OSError as error:
            raise StoreError(f"{where(self, key)}: cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        """A finished file under a name of its own; removed at the end if it is still there."""
        upload = self.upload(key, [(0, len(data))])
        try:
            upload.send(0, Chunk(data))
            upload.sync()
            yield upload.path
        finally:
            upload.leave()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Between looking at a version and renaming over it nobody else may."""
        fd = os.open(self.folder / UPLOADS / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def upload(self, key: str, parts: Sequence[tuple[int, int]]) -> FolderUpload:
        return FolderUpload(self, key, parts)

    def list(self, prefix: str) -> Iterator[Stat]:
        within = prefix.rpartition("/")[0]
        folder = self._path(within) if within else self.folder
        if not self.folder.is_dir():
            raise StoreError(f"{quote(self.folder)}: no such folder")

        def fail(error: OSError) -> None:
            if error.errno != errno.ENOENT:
                raise StoreError(f"{quote(self.folder)}: cannot be listed: {error.strerror}") from None

        for path, _, names in os.walk(folder, onerror=fail):
            for name in names:
                key = (Path(path) / name).relative_to(self.folder).as_posix()
                ours = key.startswith(prefix) and not key.startswith(f"{UPLOADS}/")
                found = self.head(key) if ours else None
                if found is not None:
                    yield found

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._path(key).unlink(missing_ok=True)
            except NotADirectoryError:
                continue
            except OSError as error:
                raise StoreError(f"{where(self, key)}: cannot be removed: {error.strerror}") from None

    def abort_uploads(self, prefix: str, *, before: float) -> int:
        count = 0
        folder = self.folder / UPLOADS
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if path.name != "lock" and path.stat().st_mtime < before:
                    path.unlink()
                    count += 1
        return count


class FolderUpload:
    """A file that is being written under a name of its own."""

    def __init__(self, store: FolderStore, key: str, parts: Sequence[tuple[int, int]]) -> None:
        self.store, self.key, self.parts = store, key, tuple(parts)
        store._path(key)  # what is not a key is refused before anything is written
        folder = store.folder / UPLOADS
        self.path = folder / f"{time.time_ns():x}-{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(f"{quote(folder)}: cannot be written: {error.strerror}") from None

    def has(self, number: int, chunk: Callable[[], Chunk]) -> bool:
        return False

    def send(self, number: int, chunk: Chunk) -> bool:
        start, _ = self.parts[number]
        try:
            _write(self._fd, chunk.body, start)
        except OSError as error:
            raise StoreError(f"{where(self.store, self.key)}: cannot be written: {error.strerror}") from None
        return False

    def sync(self) -> None:
        """Bring the file to disk."""
        try:
            # the kernel's own clock ticks a few milliseconds: too coarse to tell two versions of a size by their time
            now = time.time_ns()
            os.utime(self._fd, ns=(now, now))
            os.fsync(self._fd)
        except OSError as error:
            raise StoreError(f"{where(self.store, self.key)}: cannot be written: {error.strerror}") from None

    def finish(self) -> Stat:
        self.sync()
        self.store._place(self.path, self.key)
        self.leave()
        return self.store._known(self.key)

    def leave(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)


def _write(fd: int, body: Body, offset: int) -> None:
    if isinstance(body, FileRange):
        at = body.start
        while at < body.stop:
            try:
                done = os.copy_file_range(body.fd, fd, body.stop - at, at, offset)
            except OSError as error:
                if error.errno not in NO_COPY:
                    raise
                for chunk in FileRange(body.fd, at, body.stop).chunks():
                    _write(fd, chunk, offset)
                    offset += len(chunk)
                return
            if not done:
                raise OSError(errno.EIO, "the file became shorter")
            at, offset = at + done, offset + done
        return
    view = memoryview(body)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _stat(key: str, found: os.stat_result) -> Stat:
    return Stat(
        key, found.st_size, f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}", found.st_mtime
    )
