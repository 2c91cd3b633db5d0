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
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from .. import environment
from ..errors import InputError, WriteError, quote
from ..format.manifest import Part
from .landing import Landing, land_in_file

SHARE: Final = 0.5
"""Of the file system that a cache may fill unless it is told otherwise."""

Range = tuple[int, int]
File = tuple[Path, os.stat_result]


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
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            try:
                temporary.write_bytes(raw)
                temporary.rename(path)
            except OSError:  # a full disk is no reason not to start
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------------- blobs
    def open(self, part: Part) -> Landing:
        """The part's file, made if it is new, locked against eviction. Raises WriteError."""
        path = self._path(part.digest)
        try:
            with self._locked():  # nobody evicts it between opening and locking
                landing = land_in_file(part, path, trust=False)
                try:
                    fcntl.flock(landing.data, fcntl.LOCK_SH)
                    os.utime(landing.data)
                except BaseException:
                    landing.abandon()
                    raise
                return landing
        except OSError as error:
            raise WriteError(f"{quote(path)}: cannot be written: {error.strerror}") from None

    def make_room(self, wanted: Sequence[tuple[Landing, Sequence[Range], int]]) -> None:
        """Set the ranges [start, stop) of each part aside, evicting what is not in use for them.

        `wanted` is (part, ranges, bytes of it that are there). Raises WriteError where they do not fit into the cache.
        """
        with self._locked():
            # what a worker beside us has set aside of the same part is not asked for twice
            needed = sum(
                max(0, sum(stop - start for start, stop in ranges) - landing.set_aside(there))
                for landing, ranges, there in wanted
            )
            files = sorted(self._files(), key=lambda item: item[1].st_mtime)
            excess = sum(found.st_blocks * 512 for _, found in files) + needed - self.max_bytes
            oldest = iter(files)
            while excess > 0 and (freed := self._evict_next(oldest)):
                excess -= freed
            if excess > 0:
                raise WriteError(
                    f"{quote(self.folder)}: {needed:,} bytes do not fit into the cache of {self.max_bytes:,} beside "
                    "what is in use; give it more room (SHARDPREP_CACHE_SIZE), or use cache=None"
                )
            for landing, ranges, _ in wanted:
                for start, stop in ranges:
                    self._reserve(landing, start, stop, oldest)

    def _reserve(self, landing: Landing, start: int, stop: int, oldest: Iterator[File]) -> None:
        """Set a range aside; where others have filled the file system, what is oldest goes for it."""
        while True:
            try:
                landing.reserve(start, stop)
                return
            except WriteError:
                if not self._evict_next(oldest):
                    raise

    def _evict_next(self, oldest: Iterator[File]) -> int:
        """Evict the next blob that can be; the bytes that it had, 0 where there was none."""
        for path, found in oldest:
            if found.st_blocks and self._evict(path):
                return found.st_blocks * 512
        return 0

    def _files(self) -> Iterator[File]:
        """The parts that are kept here. What has no map is none of ours, whoever's it is."""
        for path in self._blobs.iterdir():
            if path.with_name(path.name + ".landed").exists():
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
            path.unlink()
            path.with_name(path.name + ".landed").unlink(missing_ok=True)
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


def open_cache(cache: Cache | str | os.PathLike[str] | None) -> Cache | None:
    """The cache that a ShardSet names: "host" (SHARDPREP_CACHE_DIR, else ~/.cache/shardprep), a folder, or none."""
    if cache is None or isinstance(cache, Cache):
        return cache
    folder = environment.cache_folder() if cache == "host" else Path(cache)
    return Cache(folder, max_bytes=environment.cache_bytes())
