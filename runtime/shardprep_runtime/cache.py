"""Keep what was fetched for all workers of a host: one copy of each blob's ranges, bounded, shared by the page cache.

blobs/<64 hex>           a part, as large as it is, with holes where nobody has needed it yet
blobs/<64 hex>.landed    its map (landing.py)
manifests/<64 hex>.json  manifests by their digest

Who has a part open holds a shared lock on it for as long as the descriptor or a mapping of it lives, so that nothing
that is used is evicted; the one that was opened longest ago goes first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from .errors import InputError, WriteError, quote
from .landing import Landing, land_in_file
from .manifest import Part

SHARE: Final = 0.5
"""Of the file system that a cache may fill unless it is told otherwise."""

Range = tuple[int, int]


class Cache:
    """A folder of this user's."""

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        """`max_bytes` is for all blobs together; default: half of the file system. Raises InputError, WriteError."""
        self.folder = folder
        self._blobs = folder / "blobs"
        try:
            for each in (folder, self._blobs, folder / "manifests"):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise WriteError(
                f"{quote(folder)}: the cache cannot be made: {error.strerror}; choose another folder, or cache=None"
            ) from None
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
            raise InputError(
                f"{quote(folder)}: others can write to the cache: what lies there cannot be trusted; choose another"
            )
        self.max_bytes = max_bytes if max_bytes is not None else int(shutil.disk_usage(folder).total * SHARE)

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.partition(":")[2]

    # ---------------------------------------------------------------------------------------------------- manifests
    def manifest(self, digest: str) -> bytes | None:
        """The manifest of this digest, unchecked, if it is here."""
        try:
            return (self.folder / "manifests" / f"{digest.partition(':')[2]}.json").read_bytes()
        except OSError:
            return None

    def keep_manifest(self, digest: str, raw: bytes) -> None:
        """Keep a manifest for a later start without the store."""
        path = self.folder / "manifests" / f"{digest.partition(':')[2]}.json"
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with suppress(OSError):  # a full disk is no reason not to start
                temporary.write_bytes(raw)
                temporary.rename(path)

    # -------------------------------------------------------------------------------------------------------- blobs
    def open(self, part: Part) -> Landing:
        """The part's file, made if it is new, locked against eviction. Raises WriteError."""
        path = self._path(part.digest)
        try:
            while True:
                landing = land_in_file(part, path, trust=False)
                fcntl.flock(landing.data, fcntl.LOCK_SH)
                # between opening and locking it may have been evicted
                with suppress(FileNotFoundError):
                    if path.stat().st_ino == os.fstat(landing.data).st_ino:
                        os.utime(path)
                        return landing
                landing.close()
                os.close(landing.data)
        except OSError as error:
            raise WriteError(f"{quote(path)}: cannot be written: {error.strerror}") from None

    def make_room(self, wanted: Sequence[tuple[Landing, Sequence[Range]]]) -> None:
        """Set the ranges [start, stop) of each part aside, evicting what is not in use for them.

        Raises WriteError where they do not fit into the cache.
        """
        needed = sum(stop - start for _, ranges in wanted for start, stop in ranges)
        with self._locked():
            used = {path: found.st_blocks * 512 for path, found in self._files()}
            excess = sum(used.values()) + needed - self.max_bytes
            for path, _ in sorted(self._files(), key=lambda item: item[1].st_mtime):
                if excess <= 0:
                    break
                if self._evict(path):
                    excess -= used[path]
            if excess > 0:
                raise WriteError(
                    f"{quote(self.folder)}: {needed:,} bytes do not fit into the cache of {self.max_bytes:,} beside "
                    "what is in use; give it more room (SHARDPREP_CACHE_SIZE), or use cache=None"
                )
            for landing, ranges in wanted:
                for start, stop in ranges:
                    landing.reserve(start, stop)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._blobs.iterdir():
            if not path.name.endswith(".landed"):
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    def _evict(self, path: Path) -> bool:
        """Remove a blob that nobody has open; whether it could be."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.with_name(path.name + ".landed").unlink(missing_ok=True)
            path.unlink()
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time counts and evicts."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
