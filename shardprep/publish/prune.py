"""Show the revisions of a store, and remove the blobs that none of them names.

Pushing and pruning at the same time is safe:

1. A prune puts a mark into the store, then lists the blobs, then reads the manifests.
2. It removes only blobs that are old and that no manifest names which it has ever seen. Every few seconds it reads the
   manifests again and renews its mark.
3. A push puts its manifest, then waits until every mark is gone, stale or renewed twice, then looks for its blobs.

So either the prune has seen the new manifest, or the push finds that blobs are missing and sends them again.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardprep_runtime.errors import InputError, ManifestError, StoreError, quote
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Manifest, Part, SideFile
from shardprep_runtime.format.read_manifest import parse_manifest
from shardprep_runtime.shard.revisions import (
    BLOBS,
    MANIFESTS,
    MARKS,
    blob_key,
    fetch_manifest,
    is_blob_key,
    list_revisions,
    manifest_key,
    revision_of,
)
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access, Stat, Store, where

from ..write.conduct import Conduct

GRACE: Final = 7 * 86400.0
"""Age in seconds below which a blob stays that no manifest names: longer than any push takes from its first blob to its
manifest."""

FRESH: Final = 300.0
"""Seconds without renewal after which a mark counts as left by a prune that died."""

BATCH: Final = 15.0
"""Seconds for which blobs are removed before the manifests are read again."""

READERS: Final = 16
"""Manifests that are read at a time."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One manifest of a store."""

    revision: str
    manifest_digest: str
    """`sha256:...` of the manifest."""
    modified: float
    """Time at which the manifest was put, in seconds since the epoch."""
    size: int
    """Bytes of the revision's parts and side files, which other revisions may share."""
    nbytes: int
    """Bytes of its tensors, each once."""
    grain: int
    problem: str | None = None
    """The reason why the manifest cannot be read; the sizes are 0 then. None for a good manifest."""


def revisions(uri: str | Path, *, access: Access | None = None) -> list[Revision]:
    """List the revisions in a store, in the order of their names.

        for each in revisions("s3://models/llama-70b"):
            print(each.revision, each.manifest_digest)

    Args:
        uri: A URI, or a store's folder.
        access: Endpoint, profile and the like.

    Raises:
        StoreError: Where they cannot be listed.
    """
    with open_store(uri, access) as store:
        there = list_revisions(store)
        with ThreadPoolExecutor(READERS, thread_name_prefix="shardprep-ask") as pool:
            found = list(pool.map(lambda item: _describe(store, *item), there.items()))
    return [each for each in found if each is not None]


def _describe(store: Store, revision: str, stat: Stat) -> Revision | None:
    raw = b""
    try:
        found = fetch_manifest(store, revision)
        if found is None:
            return None
        raw = found[0]
        manifest = parse_manifest(raw, where=where(store, manifest_key(revision)))
    except ManifestError as error:
        digest = manifests.digest_of(raw) if raw else ""
        return Revision(revision, digest, stat.modified, 0, 0, 0, str(error))
    size = sum(each.size for each in _files(manifest))
    return Revision(revision, manifests.digest_of(raw), stat.modified, size, manifest.nbytes, manifest.grain)


def _files(manifest: Manifest) -> list[Part | SideFile]:
    return [*manifest.parts, *manifest.side_files]


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What prune removed, or would remove."""

    uri: str
    revisions: tuple[str, ...]
    """Names of the revisions that stay."""
    deleted_revisions: tuple[str, ...]
    blobs_kept: int
    """Number of blobs that some revision names."""
    blobs_spared: int
    """Number of blobs that no revision names but that are younger than the grace."""
    blobs_removed: int
    bytes_removed: int
    foreign: int
    """Number of objects that lie among the blobs but are not blobs; prune never touches them."""
    uploads_aborted: int | None
    """Number of unfinished uploads older than the grace that were dropped; None in a dry run, which does not look."""
    dry_run: bool


def prune(
    uri: str | Path,
    *,
    grace: float = GRACE,
    delete_revisions: Sequence[str] = (),
    dry_run: bool = False,
    access: Access | None = None,
    conduct: Conduct | None = None,
) -> PruneReport:
    """Remove the blobs of a store that no revision names.

        report = prune("s3://models/llama-70b", delete_revisions=["2026-01"], dry_run=True)
        print(report.blobs_removed, report.bytes_removed)

    Args:
        uri: A URI, or a store's folder.
        grace: Age in seconds below which blobs stay.
        delete_revisions: Remove these manifests first; at least one revision must stay. Blobs that only these named, and
            that are older than the grace, go at once, also where a worker still reads them.
        dry_run: Say what would be removed, remove nothing.
        access: Endpoint, profile and the like.
        conduct: Who is told of warnings.

    Raises:
        InputError: Where the store has no manifest, or one that cannot be read, such as one of a newer shardprep.
            Nothing is removed then.
        StoreError: Where a listing fails, or lacks an object that is there.
    """
    if grace < 0:
        raise InputError(f"a grace of {grace} s is in the future")
    conduct = conduct or Conduct()
    with open_store(uri, access) as store:
        named = _Named(store, conduct.warn)
        there = named.look(leave_out=delete_revisions)
        deleted = tuple(dict.fromkeys(delete_revisions))
        _check_deletion(store, there, deleted)
        mark = None if dry_run else _Mark(store)
        try:
            if deleted and not dry_run:
                store.delete([manifest_key(revision) for revision in deleted])
            found = []
            for stat in store.list(BLOBS):
                found.append(stat)
                if mark is not None and mark.age > BATCH:
                    mark.renew()
            named.check_listing({stat.key for stat in found})
            stays = named.look(leave_out=deleted if dry_run else ())
            before = (mark.now if mark else time.time()) - grace
            blobs = [stat for stat in found if is_blob_key(stat.key)]
            unnamed = [stat for stat in blobs if stat.key not in named.keys]
            old = [stat for stat in unnamed if stat.modified < before]
            removed = old if mark is None else _remove(store, old, named, mark)
            aborted = None if dry_run else store.abort_uploads(BLOBS, before=before)
        finally:
            if mark is not None:
                mark.close()
        return PruneReport(
            uri=store.uri,
            revisions=tuple(revision for revision in stays if revision not in deleted or not dry_run),
            deleted_revisions=deleted,
            blobs_kept=sum(stat.key in named.keys for stat in blobs),
            blobs_spared=len(unnamed) - len(old),
            blobs_removed=len(removed),
            bytes_removed=sum(stat.size for stat in removed),
            foreign=len(found) - len(blobs),
            uploads_aborted=aborted,
            dry_run=dry_run,
        )


def _check_deletion(store: Store, there: Sequence[str], deleted: Sequence[str]) -> None:
    for revision in deleted:
        manifest_key(revision)
        if revision not in there:
            raise InputError(f"{quote(store.uri)}: no revision {quote(revision)}; nothing was removed")
    if not set(there) - set(deleted):
        raise InputError(
            f"{quote(store.uri)}: no revision would be left; nothing was removed: to give up all of it, remove the "
            "prefix with the tools of the store"
        )


def _remove(store: Store, old: Sequence[Stat], named: _Named, mark: _Mark) -> list[Stat]:
    """Remove blobs a few at a time, as long as no manifest names them, and list those that were removed."""
    removed: list[Stat] = []
    end = -math.inf
    for stat in old:
        if time.monotonic() >= end:
            # renewed only here while removing: two changes of the mark prove that removals by an older look are over
            mark.renew()
            named.look()
            mark.check()
            mark.renew()
            end = time.monotonic() + BATCH
        if stat.key not in named.keys:
            mark.check()
            store.delete([stat.key])
            removed.append(stat)
    return removed


class _Named:
    """The blobs that manifests name. Every manifest that was ever seen counts, so that a listing that lacks some does not
    cause more removals."""

    def __init__(self, store: Store, warn: Callable[[str], None]) -> None:
        self._store, self._warn = store, warn
        self._read: dict[str, str] = {}
        """Revision -> version of its manifest that was read."""
        self._by_revision: dict[str, set[str]] = {}
        self.keys: set[str] = set()

    def look(self, *, leave_out: Sequence[str] = ()) -> list[str]:
        """List the manifests, read those that are new, and give the names of all revisions.

        Args:
            leave_out: Revisions that are not counted.

        Raises:
            InputError: Where there is no manifest, or one that cannot be read.
        """
        there = {}
        for stat in self._store.list(MANIFESTS):
            revision = revision_of(stat.key)
            if revision is not None:
                there[revision] = stat.version
            elif stat.key.endswith(".json"):
                raise InputError(
                    f"{where(self._store, stat.key)}: not a manifest as this shardprep names them; nothing is removed "
                    "while what it may refer to is not known"
                )
        if not there:
            raise InputError(
                f"{quote(self._store.uri)}: no manifests are there; nothing is removed, since all blobs would be: is the "
                "prefix the right one?"
            )
        new = [
            name
            for name, version in there.items()
            if name not in leave_out and self._read.get(name) != version
        ]
        with ThreadPoolExecutor(READERS, thread_name_prefix="shardprep-ask") as pool:
            found = list(pool.map(self._fetch, new))
        for revision, manifest in zip(new, found, strict=True):
            if manifest is not None:
                digests = [each.digest for each in _files(manifest)]
                self._by_revision.setdefault(revision, set()).update(map(blob_key, digests))
                self.keys |= self._by_revision[revision]
                self._read[revision] = there[revision]
        return sorted(there)

    def _fetch(self, revision: str) -> Manifest | None:
        try:
            found = fetch_manifest(self._store, revision)
            if found is None:  # removed meanwhile: it does not protect its blobs any more
                return None
            return parse_manifest(found[0], where=where(self._store, manifest_key(revision)))
        except ManifestError as error:
            raise InputError(f"{error}; nothing is removed while a manifest cannot be followed") from None

    def check_listing(self, listed: set[str]) -> None:
        """Check that a listing of blobs has every blob that manifests name and that exists.

        Args:
            listed: Keys in the listing.

        Raises:
            StoreError: Where one is missing: nothing may be removed by such a listing.
        """
        for revision, keys in self._by_revision.items():
            lacking = sorted(keys - listed)
            with ThreadPoolExecutor(READERS, thread_name_prefix="shardprep-ask") as pool:
                heads = list(pool.map(self._store.head, lacking))
            for key, stat in zip(lacking, heads, strict=True):
                if stat is not None:
                    raise StoreError(
                        f"{where(self._store, key)}: is there, but the store did not list it; nothing is removed on the "
                        "word of such a listing"
                    )
            if lacking:
                self._warn(
                    f"revision {quote(revision)} is broken: {len(lacking)} of its blobs are not there; push it again"
                )


class _Mark:
    """An object in the store that says that a prune is at work."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = MARKS + secrets.token_hex(16)
        self._count = 0
        self.renew()
        found = store.head(self._key)
        if found is None:
            raise StoreError(f"{where(store, self._key)}: was written and is not there; nothing is removed")
        self.now = found.modified
        """The time by the clock of the store, which gives blobs their ages."""

    @property
    def age(self) -> float:
        """Seconds since the mark was renewed."""
        return time.monotonic() - self._renewed

    def renew(self) -> None:
        """Put the mark again, with another content, so that its version changes."""
        self._renewed = time.monotonic()
        self._count += 1
        self._store.put(self._key, str(self._count).encode())

    def check(self) -> None:
        """Check that the mark is still fresh.

        Raises:
            StoreError: Where it may have gone stale, so that a push may not have waited for this prune.
        """
        if self.age > FRESH / 2:
            raise StoreError(
                f"{quote(self._store.uri)}: the store (or this process) stood still for too long; run prune again"
            )

    def close(self) -> None:
        with suppress(StoreError):  # a mark that stays goes stale
            self._store.delete([self._key])


def wait_for_prunes(store: Store, published: Stat, *, warn: Callable[[str], None]) -> None:
    """Wait until every prune at work has seen a manifest. Returns at once where the store may not be listed.

    Args:
        published: The manifest's object, as it was put.
        warn: Is told when the waiting begins.
    """
    begun = time.monotonic()
    versions: dict[str, set[str]] = {}
    told = False
    while True:
        now = published.modified + time.monotonic() - begun
        try:
            fresh = [mark for mark in store.list(MARKS) if now - mark.modified < FRESH]
        except StoreError:
            return
        for mark in fresh:
            versions.setdefault(mark.key, set()).add(mark.version)
        if all(len(versions[mark.key]) > 2 for mark in fresh):
            return
        if not told:
            warn(
                "a prune is at work in the store; waiting for its end, to see that it removed nothing of this"
            )
            told = True
        time.sleep(1)
