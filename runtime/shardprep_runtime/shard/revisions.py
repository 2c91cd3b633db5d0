"""Name what lies where in a store of shard sets, and read its manifests.

    blobs/<64 hex>               a part, named by the sha256 of its header, which holds a digest of every block;
                                 or a side file, named by its sha256. Never replaced.
    manifests/<revision>.json    the exact bytes of a manifest. The only names that change; written last.
    prunes/<id>                  there while a prune is at work

Pushes wait for the last; readers look at the first two alone.
"""

from __future__ import annotations

import hashlib
import re
from itertools import islice
from typing import Final

from ..errors import FormatError, InputError, ManifestError, MissingError, StoreError, quote
from ..format import manifest as manifests
from ..format.manifest import Manifest
from ..format.read_manifest import parse_manifest
from ..stores.store import Stat, Store, read_small, where

BLOBS: Final = "blobs/"
MANIFESTS: Final = "manifests/"
MARKS: Final = "prunes/"
DEFAULT_REVISION: Final = "main"

SHOWN: Final = 10
"""Revisions that a message names at most."""


def blob_key(digest: str) -> str:
    """The key of the part or side file with this digest, `sha256:...`. Raises ManifestError for anything else."""
    found = re.fullmatch(r"sha256:([0-9a-f]{64})", digest)
    if found is None:
        raise ManifestError(f"{quote(digest)} is not a digest; expected sha256: and 64 hex digits")
    return BLOBS + found[1]


def is_blob_key(key: str) -> bool:
    """Whether `blob_key` makes this key: nothing else below `blobs/` is ours."""
    return re.fullmatch(BLOBS + r"[0-9a-f]{64}", key) is not None


def check_revision(revision: str) -> str:
    """Give `revision` back if it can be a revision's name. Raises InputError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", revision):
        raise InputError(
            f"{quote(revision)} is not a revision's name; use 1 to 128 letters, digits, '.', '_' and '-', "
            "and do not begin with '.'"
        )
    return revision


def manifest_key(revision: str) -> str:
    """The key of a revision's manifest. Raises InputError for what cannot be a revision's name."""
    return f"{MANIFESTS}{check_revision(revision)}.json"


def revision_of(key: str) -> str | None:
    """The revision whose manifest lies at `key`; None where `manifest_key` does not make this key."""
    found = re.fullmatch(MANIFESTS + r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})\.json", key)
    return found[1] if found else None


def list_revisions(store: Store) -> dict[str, Stat]:
    """Revision -> its manifest's object, sorted by name. Raises StoreError rather than giving some of them."""
    found = {revision: stat for stat in store.list(MANIFESTS) if (revision := revision_of(stat.key))}
    return dict(sorted(found.items()))


def fetch_manifest(store: Store, revision: str) -> tuple[bytes, Stat] | None:
    """Fetch a revision's manifest, unparsed and unchecked.

    Args:
        store: The store.
        revision: Name of the revision.

    Returns:
        Its bytes, and what the store says of the object; None where the store does not have it.

    Raises:
        ManifestError: For one that is larger than a manifest may be, before it is fetched.
        InputError: For what cannot be a revision's name.
        StoreError: Where the store cannot be read, or damages what it sends.
    """
    try:
        found = read_small(store, manifest_key(revision), most=manifests.MAX_BYTES)
        # nothing above a manifest proves it unless the user pins it; the ETag mostly is its md5
        if found is not None and not _may_be_of(found[1].version, found[0]):
            again = read_small(store, manifest_key(revision), most=manifests.MAX_BYTES)
            if again is not None and again != found:
                raise StoreError(
                    f"{where(store, manifest_key(revision))}: came with other bytes when it was read again; something "
                    "in between damages it, or it was just replaced: run again"
                )
        return found
    except FormatError as error:
        raise ManifestError(str(error)) from None
    except MissingError:  # removed between looking and reading
        return None


def _may_be_of(version: str, raw: bytes) -> bool:
    """Whether a version can be that of these bytes: False where it is the md5 of others.

    They were damaged on the way, or the store keeps them encrypted and gives the md5 of that.
    """
    etag = version.strip('"')
    if not re.fullmatch(r"[0-9a-f]{32}", etag):
        return True
    return hashlib.md5(raw, usedforsecurity=False).hexdigest() == etag


def read_revision(store: Store, revision: str, digest: str | None = None) -> tuple[bytes, Manifest]:
    """Fetch and parse a revision's manifest.

    Args:
        store: The store.
        revision: Name of the revision.
        digest: `sha256:...` that it must have; None: whatever lies there is followed.

    Returns:
        Its exact bytes, and the manifest.

    Raises:
        MissingError: Where the store does not have the revision; names those that it has.
        ManifestError: For another digest, or a manifest that is malformed or too new.
        InputError, StoreError: As `fetch_manifest` has them.
    """
    found = fetch_manifest(store, revision)
    if found is None:
        raise MissingError(
            f"{quote(store.uri)}: no revision {quote(revision)}; {_those_there(store)}", missing="revision"
        )
    raw, _ = found
    at = where(store, manifest_key(revision))
    if digest is not None and digest != manifests.digest_of(raw):
        raise ManifestError(
            f"{at}: its digest is {manifests.digest_of(raw)}, expected {quote(digest)}; do not load it"
        )
    return raw, parse_manifest(raw, where=at)


def _those_there(store: Store) -> str:
    try:
        there = list_revisions(store)
    except MissingError as error:
        return f"{error}"
    except StoreError:  # who may read may still not be allowed to list
        return "its revisions cannot be listed"
    if not there:
        return "nothing has been pushed there, or the prefix is another one"
    named = ", ".join(map(quote, islice(there, SHOWN)))
    return f"there are {named}" + (f" and {len(there) - SHOWN} more" if len(there) > SHOWN else "")
