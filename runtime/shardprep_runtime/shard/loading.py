"""Open the parts that a view needs: mapped from a folder, or arriving from a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ..errors import FormatError, WriteError, quote
from ..format.manifest import Manifest, Part
from ..format.view import Place, View, plan_view
from ..stores.folder import FolderStore
from ..stores.store import Store
from .cache import Cache
from .fetch import WORKERS, Crew, open_arrivals
from .filesystem import Io, choose_io
from .landing import Landing, land_in_memory, read_map
from .parts import Numbered, OpenPart, default_workers, open_part
from .shard import Shard, Verify

SPARSE: Final = ".sparse"
"""End of the name of a part of which only some ranges are there: so no reader takes it for whole."""


def load_parts(
    store: Store, key: Callable[[Part], str], manifest: Manifest, place: Place, *, workers: int | None = None
) -> Shard:
    """Read one worker's shard into memory, of a set whose manifest is not written yet.

    Args:
        store: Has the parts. The shard closes it; if this fails, the caller does.
        key: The key under which the store has a part.
        manifest: The manifest that will be written.
        place: Which shard.
        workers: Threads that fetch; default: 16.
    """
    view = plan_view(manifest, place)
    keys = [key(part) for part in view.parts]
    return fetched(store, keys, view, manifest, None, verify="blocks", workers=workers)


def folder_shard(
    folder: Path, view: View, manifest: Manifest, *, io: Io, verify: Verify, workers: int | None
) -> Shard:
    """Open a shard whose parts lie in a folder: mapped, or read into memory where mapping is slow.

    Args:
        folder: The folder.
        view: What the worker loads.
        manifest: The set's manifest.
        io: How to read, as `choose_io` has it. Parts that are there in part are mapped whatever it says.
        verify: As `ShardSet.verify` has it.
        workers: Threads; default: 16 that read, or to verify the cores of this process, at most 8.

    Raises:
        FormatError, IntegrityError, ManifestError: Where parts are missing, damaged or not this set's.
    """
    whole = all((folder / part.path).exists() for part in view.parts)
    if whole and choose_io(folder, io) == "read":
        keys = [part.path for part in view.parts]
        return fetched(FolderStore(folder), keys, view, manifest, None, verify=verify, workers=workers)
    return _mapped(folder, view, manifest, verify=verify, workers=workers)


def fetched(
    store: Store,
    keys: Sequence[str],
    view: View,
    manifest: Manifest,
    cache: Cache | None,
    *,
    verify: Verify,
    workers: int | None,
    processes: int = 1,
) -> Shard:
    """Begin to fetch a shard; returns once its headers are proved, while blocks still arrive.

    Args:
        store: Has the parts. The shard closes it; if this fails, the caller does.
        keys: Keys of the view's parts in the store, in the order of `view.parts`.
        view: What the worker loads.
        manifest: The set's manifest.
        cache: Where the bytes land; None: in the memory of this process.
        verify: As `ShardSet.verify` has it.
        workers: Threads that fetch, in each process; default: 16.
        processes: Processes that fetch, this one included.

    Raises:
        FormatError, IntegrityError, ManifestError: Where a header is not what the manifest says.
        StoreError: Where the store cannot be reached.
        WriteError: Where there is not enough room, in the cache or in memory.
    """
    workers = workers or WORKERS
    landings: list[tuple[Part, str, Landing]] = []
    try:
        for part, key in zip(view.parts, keys, strict=True):
            landings.append((part, key, cache.open(part) if cache is not None else land_in_memory(part)))
    except BaseException as error:
        for _, _, landing in landings:
            landing.abandon()
        if isinstance(error, OSError):
            raise WriteError(
                f"{quote(part.path)}: {part.size:,} bytes: no memory: {error.strerror}"
            ) from None
        raise
    arrivals = open_arrivals(store, landings, manifest, check_digest=verify != "off", workers=workers)
    shard = None
    try:
        shard = Shard(view, [arrival.part for arrival in arrivals], manifest)
        crew: Crew | None = None
        if processes > 1:
            from .fetch_processes import HelperProcesses  # imports the S3 store

            crew = HelperProcesses(processes - 1, manifest)
        shard.arrive(store, arrivals, cache, verify=verify == "blocks", workers=workers, crew=crew)
    except BaseException:
        for arrival in arrivals:
            arrival.part.close()
            arrival.landing.close()
        raise
    return shard


def _mapped(folder: Path, view: View, manifest: Manifest, *, verify: Verify, workers: int | None) -> Shard:
    """Open a shard by mapping the parts in a folder."""
    parts: list[OpenPart] = []
    maps: dict[OpenPart, bytearray] = {}
    try:
        for part in view.parts:
            found, landed = _open(folder, part, manifest, check_digest=verify != "off")
            parts.append(found)
            if landed is not None:
                maps[found] = landed
        shard = Shard(view, parts, manifest)
        for opened, landed in maps.items():
            _check_there(shard, opened, Numbered(opened), landed)
        shard.read_exactly()
        if verify == "blocks":
            shard.check(manifest.block_bytes, workers=workers or default_workers())
    except BaseException:
        for opened in parts:
            opened.close()
        raise
    return shard


def _open(
    folder: Path, part: Part, manifest: Manifest, *, check_digest: bool
) -> tuple[OpenPart, bytearray | None]:
    """A part, and its map where only some of its ranges were pulled.

    A pull renames a part once it is whole, at any moment: so whenever the sparse file fails, the whole one is looked
    for again.
    """
    whole, sparse = folder / part.path, folder / (part.path + SPARSE)
    if not whole.exists() and sparse.exists():
        try:
            found = open_part(folder, part, manifest, check_digest=check_digest, name=part.path + SPARSE)
        except FormatError:
            if not whole.exists():
                raise
        else:
            landed = read_map(sparse, part, len(Numbered(found).blocks))
            if landed is not None:
                return found, landed
            found.close()
            if not whole.exists():
                raise FormatError(f"{found.where}: nothing says which of its bytes are there; pull it again")
        # a pull for another rank has just made the part whole
    return open_part(folder, part, manifest, check_digest=check_digest), None


def _check_there(shard: Shard, part: OpenPart, numbered: Numbered, landed: bytearray) -> None:
    """Raises FormatError where the view needs bytes of a part that were not pulled."""
    for each, piece, start, stop in shard.ranges():
        if each is part and not all(
            landed[number] for number in numbered.numbers(piece.span.start + start, piece.span.start + stop)
        ):
            raise FormatError(
                f"{part.where}: only some of its ranges were pulled into this folder, and not those of "
                f"{quote(piece.name)} that rank {shard.view.rank} needs; pull for this rank too, or --all"
            )
