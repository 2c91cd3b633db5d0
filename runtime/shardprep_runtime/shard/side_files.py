"""Bring what travels with the weights from a store into a folder: side files and the manifest, which comes last.

An engine needs config.json and the tokenizer in a folder before it can be started; its ranks then bring the weights.
A pull of parts keeps the same order in the same folder (shardprep/publish/pull.py).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ..errors import InputError, IntegrityError, ManifestError, WriteError, quote
from ..format import manifest as manifests
from ..format.manifest import Manifest, SideFile
from ..stores.store import Store, read, where
from .fetch import TRIES
from .filesystem import sync_folder
from .loading import SPARSE
from .revisions import blob_key

MARKER: Final = ".shardprep-pull"
"""Holds the digest of the manifest that is being pulled, until the manifest itself is there."""

NEW: Final = f"{MARKER}-new"
"""A small file that is being written; one at a time."""

MAP: Final = f"{SPARSE}.landed"
"""What the name of a part's map ends in."""

SIDE_BY_SIDE: Final = 4
"""Side files that are fetched at a time, beside the parts."""

MAX_SIDE_FILE: Final = 2**30
"""A larger side file is refused before it is fetched: they are read whole."""


def bring_side_files(store: Store, raw: bytes, manifest: Manifest, destination: Path) -> Path:
    """Bring the side files and the manifest `raw` from a store into `destination`; gives that.

    Several processes may do so at once, and ranks may be pulled into the same folder. What is there of this very
    manifest is kept.

    Raises:
        InputError: Before anything is written, for a folder that holds something else.
        StoreError, IntegrityError, WriteError: Later; the same call then resumes.
    """
    make_folder(destination)
    with alone(destination):
        prepare(destination, manifests.digest_of(raw), manifest)
    missing = [side for side in manifest.side_files if not is_here(destination, side)]
    with ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="shardprep-side") as pool:
        for side, data in zip(
            missing, pool.map(lambda each: fetch_side_file(store, each), missing), strict=True
        ):
            with alone(destination):
                write_small(destination / side.path, data)
    finish(destination, raw)
    return destination


def finish(destination: Path, raw: bytes) -> None:
    """Write the manifest: all that it promises to be in this folder has come."""
    sync_folder(destination)
    with alone(destination):
        # last: a folder that has a manifest is complete
        write_small(destination / manifests.FILE_NAME, raw)
        sync_folder(destination)
        (destination / MARKER).unlink(missing_ok=True)


def make_folder(destination: Path) -> None:
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{quote(destination)}: exists and is no folder; choose another destination"
        ) from None
    except OSError as error:
        raise WriteError(f"{quote(destination)}: cannot be written: {error.strerror}") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Others who pull into the folder wait until this is done: it looks at names, and makes or changes them."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without such locks: two pulls at once may fetch a block twice
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def prepare(destination: Path, digest: str, manifest: Manifest) -> None:
    """Prove that the folder is empty, or one that a pull of this very manifest has begun or finished."""
    there = {entry.name for entry in destination.iterdir()} - {NEW}
    found = None
    if manifests.FILE_NAME in there:
        found = manifests.digest_of((destination / manifests.FILE_NAME).read_bytes())
    elif MARKER in there:
        found = (destination / MARKER).read_text("ascii", "replace").strip()
    if found not in (None, digest):
        raise InputError(
            f"{quote(destination)}: holds another manifest ({quote(found)}) than the one to be pulled ({digest}); "
            "choose an empty or new folder"
        )
    own = {MARKER, manifests.FILE_NAME} | {
        name
        for each in (*(part.path for part in manifest.parts), *(side.path for side in manifest.side_files))
        for name in (each.partition("/")[0], each + SPARSE, each + MAP)
    }
    foreign = there - own
    if foreign or (there and found is None):
        what = quote(min(foreign or there))
        raise InputError(
            f"{quote(destination)}: holds {what}; nothing is overwritten: choose an empty or new folder"
        )
    if found is None:
        write_small(destination / MARKER, f"{digest}\n".encode())


def is_here(folder: Path, side: SideFile) -> bool:
    """Whether the very side file lies in the folder."""
    path = folder / side.path
    return (
        path.is_file()
        and path.stat().st_size == side.size
        and manifests.digest_of(path.read_bytes()) == side.digest
    )


def fetch_side_file(store: Store, side: SideFile) -> bytes:
    """A side file's bytes. Raises IntegrityError where the store's is not what it should be."""
    if side.size > MAX_SIDE_FILE:
        raise ManifestError(
            f"{quote(side.path)}: a side file of {side.size} bytes; expected at most {MAX_SIDE_FILE}"
        )
    key = blob_key(side.digest)
    for _ in range(TRIES):
        raw = read(store, key, 0, side.size)
        if manifests.digest_of(raw) == side.digest:
            return raw
    raise IntegrityError(
        f"{where(store, key)}: does not match its digest in the manifest ({quote(side.path)}), {TRIES} times: "
        "the copy that lies there is damaged; put it there again"
    )


def write_small(path: Path, data: bytes) -> None:
    """Write a small file whole: a temporary name, fsync, rename. The caller is alone in the folder."""
    temporary = path.with_name(NEW)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"{quote(path)}: cannot be written: {error.strerror}") from None
