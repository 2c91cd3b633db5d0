"""Keep what was fetched for all workers of a host: one copy of each blob's ranges, bounded, shared by the page cache.

    blobs/<64 hex>           a part in a file of its full size, with holes where nobody has needed it yet
    blobs/<64 hex>.landed    its map (landing.py)
    manifests/<64 hex>.json  manifests by their digest
    lock                     held by the one process that opens, counts or evicts

1. `open` takes `lock`, opens the part's file and its map, and takes a shared flock on the file. Then it releases
   `lock`.
2. The shared flock lasts as long as any descriptor or mapping of that opening, in whichever process. Nobody releases
   it.
3. `make_room` takes `lock`, counts what the cache's files occupy, and evicts until the wanted bytes fit. Then it has
   the file system set them aside.
4. A blob is evicted only by whoever gets an exclusive flock on it at once: nobody has it open. The one that was opened
   longest ago goes first. Its file goes before its map.

Under `lock` no other lock is waited for, but that on a map while it is begun, which is brief. A crash releases every
lock. It may leave a map without its file, which the next `open` begins anew.
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
"""Share of its file system that a cache may fill unless it is told otherwise."""

Range = tuple[int, int]
"""Bytes [start, stop) of a part."""

File = tuple[Path, os.stat_result]


class Cache:
    """A folder that keeps parts and manifests for all workers of one user on this host."""

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        """Make the folder where it is missing.

        Args:
            folder: Where the cache lies, or will.
            max_bytes: Bytes on disk of all parts together; default: half of the file system.

        Raises:
            WriteError: Where the folder cannot be made.
            InputError: Where other users can write to it.
        """
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
        """The bytes of the manifest with this digest, if they are here; the caller compares them with it."""
        try:
            return (self.folder / "manifests" / f"{digest.partition(':')[2]}.json").read_bytes()
        except OSError:
            return None

    def keep_manifest(self, digest: str, raw: bytes) -> None:
        """Keep a manifest for a later start without the store; a disk that is full is left as it is.

        Args:
            digest: `sha256:...` of the manifest.
            raw: Its bytes.
        """
        path = self.folder / "manifests" / f"{digest.partition(':')[2]}.json"
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            try:
                temporary.write_bytes(raw)
                temporary.rename(path)
            except OSError:  # a worker starts without it too
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------------- blobs
    def open(self, part: Part) -> Landing:
        """Open a part's file and map, making what is missing. It is not evicted while it is open or mapped.

        Raises:
            WriteError: Where a file cannot be opened or made.
        """
        path = self._path(part.digest)
        try:
            with self._locked():  # nobody evicts the file between opening and locking
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
        """Have room for what is about to be fetched, and evict parts that nobody has open for it.

        Args:
            wanted: For each part its landing, the ranges that are missing, and how many of its bytes are there.

        Raises:
            WriteError: Where they do not fit into the cache, or the disk, beside what is in use.
        """
        with self._locked():
            # what another worker has set aside of the same part is not counted twice
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
        """Set a range aside; where others have filled the file system, evict the oldest parts for it."""
        while True:
            try:
                landing.reserve(start, stop)
                return
            except WriteError:
                if not self._evict_next(oldest):
                    raise

    def _evict_next(self, oldest: Iterator[File]) -> int:
        """Evict the next part that nobody has open, and give the bytes that it occupied; 0 where there was none."""
        for path, found in oldest:
            if found.st_blocks and self._evict(path):
                return found.st_blocks * 512
        return 0

    def _files(self) -> Iterator[File]:
        """The parts that are kept here. A file without a map is not ours, and is left alone."""
        for path in self._blobs.iterdir():
            if path.with_name(path.name + ".landed").exists():
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    def _evict(self, path: Path) -> bool:
        """Remove a part, and say so, unless somebody has it open."""
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
        """Hold the cache's lock: one process at a time opens, counts and evicts."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def open_cache(cache: Cache | str | os.PathLike[str] | None) -> Cache | None:
    """The cache that a ShardSet names: "host" (SHARDPREP_CACHE_DIR, else ~/.cache/shardprep), a folder, or None.

    Raises:
        WriteError, InputError: As Cache does.
    """
    if cache is None or isinstance(cache, Cache):
        return cache
    folder = environment.cache_folder() if cache == "host" else Path(cache)
    return Cache(folder, max_bytes=environment.cache_bytes())
