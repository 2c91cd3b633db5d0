"""Bring what travels with the weights from a store into a folder: side files and the manifest, which comes last.

An engine needs config.json and the tokenizer in a folder before it starts; its ranks then bring the weights. A pull of
parts keeps the same order in the same folder (shardprep/publish/pull.py):

1. `prepare` proves that the folder is empty, or one of this very manifest, and marks it with the manifest's digest.
2. Side files are fetched, several at a time. Each is written under a temporary name, synced and renamed.
3. `finish` writes the manifest, and then removes the mark.

Whoever looks at names or changes them holds `alone`, a flock on the folder; nobody holds it during a request. A crash
leaves the mark and whole side files, and the same call goes on from there.
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
"""Name of a file with the digest of the manifest that is being pulled; it goes when the manifest is there."""

NEW: Final = f"{MARKER}-new"
"""Name of a small file while it is written; one at a time, since its writer is alone in the folder."""

MAP: Final = f"{SPARSE}.landed"
"""End of the name of the map of a part that is being pulled (landing.py)."""

SIDE_BY_SIDE: Final = 4
"""Side files that are fetched at a time, beside the parts."""

MAX_SIDE_FILE: Final = 2**30
"""Bytes of the largest side file; larger ones are refused before they are fetched, since they are held in memory."""


def bring_side_files(store: Store, raw: bytes, manifest: Manifest, destination: Path) -> Path:
    """Bring side files and the manifest from a store into a folder.

    Several processes may do so at once, and ranks may be pulled into the same folder. What is there of this very
    manifest is kept.

    Args:
        store: Has the side files.
        raw: The manifest's exact bytes.
        manifest: The same, parsed.
        destination: The folder; it is made where it is missing.

    Returns:
        The folder.

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
    """Write the manifest, once everything else is in the folder.

    Args:
        destination: The folder.
        raw: The manifest's exact bytes.
    """
    sync_folder(destination)
    with alone(destination):
        # last: a folder that has a manifest is complete
        write_small(destination / manifests.FILE_NAME, raw)
        sync_folder(destination)
        (destination / MARKER).unlink(missing_ok=True)


def make_folder(destination: Path) -> None:
    """Make a folder where it is missing. Raises InputError for something else of that name, WriteError otherwise."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{quote(destination)}: exists and is not a folder; choose another destination"
        ) from None
    except OSError as error:
        raise WriteError(f"{quote(destination)}: cannot be written: {error.strerror}") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make others who pull into the folder wait: whoever looks at its names or changes them is alone."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without such locks: two pulls at once may fetch a block twice
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def prepare(destination: Path, digest: str, manifest: Manifest) -> None:
    """Prove that a folder is empty, or that a pull of this very manifest has begun or finished in it; mark an empty
    one.

    Args:
        destination: The folder. The caller is alone in it.
        digest: `sha256:...` of the manifest.
        manifest: The manifest.

    Raises:
        InputError: For a folder that holds something else.
    """
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
    """Whether a side file lies in a folder with the manifest's size and digest.

    Args:
        folder: The folder.
        side: What the manifest says of the file.
    """
    path = folder / side.path
    return (
        path.is_file()
        and path.stat().st_size == side.size
        and manifests.digest_of(path.read_bytes()) == side.digest
    )


def fetch_side_file(store: Store, side: SideFile) -> bytes:
    """Fetch a side file.

    Args:
        store: Has it under its digest.
        side: What the manifest says of it.

    Returns:
        Its bytes, which match its digest.

    Raises:
        IntegrityError: Where it comes with wrong bytes, TRIES times.
        ManifestError: For one of more than MAX_SIDE_FILE bytes.
    """
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
    """Write a small file whole: under a temporary name, then fsync and rename.

    Args:
        path: Where it goes; its folder is made where it is missing. The caller is `alone` there.
        data: All of its bytes.

    Raises:
        WriteError: Where it cannot be written.
    """
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
