"""Name what lies where in a store of shard sets, and read its manifests.

    blobs/<64 hex>               a part, named by the sha256 of its header (which holds a digest of every block), or a
                                 side file, named by its sha256; never replaced
    manifests/<revision>.json    the exact bytes of a manifest: the only names that change, written last
    prunes/<id>                  there while a prune is at work

The last is for pushes to wait for; readers look at the first two alone.
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
    """Where the part or side file with this `sha256:...` digest lies. Raises ManifestError for what is no digest."""
    found = re.fullmatch(r"sha256:([0-9a-f]{64})", digest)
    if found is None:
        raise ManifestError(f"{quote(digest)} is no digest; expected sha256: and 64 hex digits")
    return BLOBS + found[1]


def is_blob_key(key: str) -> bool:
    """Whether a key is one that `blob_key` makes: nothing else below `blobs/` is ours."""
    return re.fullmatch(BLOBS + r"[0-9a-f]{64}", key) is not None


def check_revision(revision: str) -> str:
    """`revision` if it can be the name of one. Raises InputError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", revision):
        raise InputError(
            f"{quote(revision)} is no name of a revision; use 1 to 128 letters, digits, '.', '_' and '-', "
            "with no '.' first"
        )
    return revision


def manifest_key(revision: str) -> str:
    """Where the manifest of a revision lies. Raises InputError for what is no name of one."""
    return f"{MANIFESTS}{check_revision(revision)}.json"


def revision_of(key: str) -> str | None:
    """The revision whose manifest lies at `key`; None where that is no name that `manifest_key` makes."""
    found = re.fullmatch(MANIFESTS + r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})\.json", key)
    return found[1] if found else None


def list_revisions(store: Store) -> dict[str, Stat]:
    """Revision -> its manifest's object, by name. Raises StoreError rather than giving a part of them."""
    found = {revision: stat for stat in store.list(MANIFESTS) if (revision := revision_of(stat.key))}
    return dict(sorted(found.items()))


def fetch_manifest(store: Store, revision: str) -> tuple[bytes, Stat] | None:
    """A revision's manifest as it lies there, unchecked, and what is known of it; None where there is none.

    Raises:
        ManifestError: For one that is larger than a manifest may be, before it is fetched.
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
    """False where the version is an md5 of other bytes (those that were stored encrypted, or those before a fault)."""
    etag = version.strip('"')
    if not re.fullmatch(r"[0-9a-f]{32}", etag):
        return True
    return hashlib.md5(raw, usedforsecurity=False).hexdigest() == etag


def read_manifest(store: Store, revision: str, digest: str | None = None) -> tuple[bytes, Manifest]:
    """The manifest of a revision, as bytes and parsed; it must have `digest` (`sha256:...`) where one is given.

    Raises MissingError, which names revisions that there are, and ManifestError for one that must not be followed.
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
