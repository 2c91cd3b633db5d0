"""Put shard sets into a store: first the blobs that are missing, last and conditionally the manifest.

A push that dies leaves every revision as it was. Blobs are never replaced, so that readers of other revisions never
see a change. Only `prune` removes blobs that no revision names any more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from shardprep_runtime.errors import (
    ConflictError,
    ManifestError,
    ShardprepError,
    StoreError,
    quote,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Manifest
from shardprep_runtime.format.read_manifest import find_manifest, read_manifest
from shardprep_runtime.shard.revisions import (
    DEFAULT_REVISION,
    fetch_manifest,
    manifest_key,
)
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access, Stat, Store, read, where

from ..files import open_regular
from ..source import locate_pieces, open_parts
from ..write.conduct import Conduct
from ..write.staging import Written
from .prune import wait_for_prunes
from .send import CONNECTIONS, Blob, Sender, is_there, open_blob

ROUNDS: Final = 3
"""Times that blobs are sent again which vanish while they are being published."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PushReport:
    """What push sent, or would send."""

    uri: str
    revision: str
    manifest_digest: str
    """`sha256:...` of the manifest, the root of the chain of trust."""
    replaced: str | None
    """The digest of the manifest that the revision had before; None where it is new or the same."""
    blobs: int
    """Number of parts and side files; files with the same content count once."""
    blobs_sent: int
    bytes_sent: int
    """Bytes of blobs that crossed the network; fewer than their sizes where a push that was killed had sent some."""
    bytes_present: int
    """Bytes of blobs that the store had already."""
    seconds: float


def push(
    folder: Path,
    uri: str | Path,
    *,
    revision: str = DEFAULT_REVISION,
    access: Access | None = None,
    manifest_digest: str | None = None,
    dry_run: bool = False,
    conduct: Conduct | None = None,
) -> PushReport:
    """Put a shard set into a store. Only blobs that the store lacks are sent, each byte read once and proved.

        report = push(Path("llama-70b-tp8"), "s3://models/llama-70b", revision="2026-11-01")
        print(report.blobs_sent, "of", report.blobs, "blobs were new")

    Args:
        folder: The shard set.
        uri: `s3://bucket/prefix` (`gs://`, `az://`), or a folder.
        revision: The name under which the manifest is published.
        access: Endpoint, profile and the like.
        manifest_digest: `sha256:...` that the manifest must have.
        dry_run: Say what would be sent, send nothing.
        conduct: Its `workers` are connections, 16 by default.

    Raises:
        IntegrityError: For a file that changed since the split. Nothing is published then.
        ConflictError: Where somebody else has published another manifest under this revision meanwhile.
        StoreError: Where the store fails; the same call resumes.
    """
    begun = time.monotonic()
    key = manifest_key(revision)
    conduct = conduct or Conduct()
    workers = conduct.workers or CONNECTIONS
    file = find_manifest(folder)
    raw = file.read_bytes() if file.stat().st_size <= manifests.MAX_BYTES else b""
    digest = manifest_digest or manifests.digest_of(raw)
    manifest = read_manifest(file, digest=digest)
    if manifests.digest_of(raw) != digest:
        raise ManifestError(f"{quote(file)}: changed while it was read; run again")
    with contextlib.ExitStack() as stack:
        blobs = _blobs(file.parent, manifest, stack)
        store = stack.enter_context(open_store(uri, access))
        before = fetch_manifest(store, revision)
        missing = _missing(store, blobs, workers)
        nbytes = sum(blob.size for blob in missing)
        replaced = manifests.digest_of(before[0]) if before and before[0] != raw else None
        sent, bytes_sent = len(missing), nbytes
        same = before is not None and before[0] == raw
        if not dry_run and (missing or not same):
            conduct.begin(nbytes)
            bytes_sent = _send(store, missing, workers=workers, progress=conduct.progress)
            put_manifest(store, key, raw, before, warn=conduct.warn)
            for _ in range(ROUNDS):
                gone = _missing(store, blobs, workers)
                if not gone:
                    break
                conduct.warn(
                    f"{len(gone)} blobs were removed meanwhile, by a prune it seems; they are sent again"
                )
                sent += len(gone)
                bytes_sent += _send(store, gone, workers=workers, progress=lambda _: None)
            else:
                raise StoreError(
                    f"{quote(store.uri)}: blobs vanish as soon as they are sent; end what removes them"
                )
        return PushReport(
            uri=store.uri,
            revision=revision,
            manifest_digest=digest,
            replaced=replaced,
            blobs=len(blobs),
            blobs_sent=sent,
            bytes_sent=bytes_sent,
            bytes_present=sum(blob.size for blob in blobs) - nbytes,
            seconds=round(time.monotonic() - begun, 3),
        )


def _blobs(folder: Path, manifest: Manifest, stack: contextlib.ExitStack) -> list[Blob]:
    """Open the files of a shard set until `stack` ends; files with the same content once.

    Raises IntegrityError, FormatError or ManifestError where a part or its header is not what it should be.
    """
    parts = open_parts(folder, manifest)
    for part in parts:
        stack.callback(part.close)
    locate_pieces(manifest, parts)
    found = {}
    for part in parts:
        part.read_exactly(False)
        written = Written(part.part.size, part.part.header_size, part.part.digest)
        found[part.part.digest] = open_blob(part.fd, written, where=part.where)
    for side in manifest.side_files:
        fd = open_regular(folder / side.path)
        stack.callback(os.close, fd)
        written = Written(side.size, side.size, side.digest)
        found[side.digest] = open_blob(fd, written, where=quote(folder / side.path))
    return list(found.values())


def _missing(store: Store, blobs: Sequence[Blob], workers: int) -> list[Blob]:
    """List the blobs that the store lacks. Raises StoreError where one has another size there."""
    there = in_parallel(lambda blob: is_there(store, blob), blobs, workers)
    return [blob for blob, found in zip(blobs, there, strict=True) if not found]


def in_parallel(call: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """Call a function for many items at a time; after an error no more calls are begun.

    Args:
        call: The function.
        items: What it is called with.
        workers: Threads.

    Returns:
        The results, in the order of the items.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="shardprep-ask") as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _send(store: Store, blobs: Sequence[Blob], *, workers: int, progress: Callable[[int], None]) -> int:
    """Send blobs, and count the bytes that crossed the network."""
    if not blobs:
        return 0
    with Sender(store, workers=workers) as sender:
        smallest, *others = sorted(blobs, key=lambda blob: blob.size)
        sender.add(smallest, progress=progress)
        sender.drain()  # now it is known whether the store compares checksums, and thus whether buffers are needed
        for blob in others:
            sender.add(blob, progress=progress)
        sender.drain()
        return sender.bytes_sent


def put_manifest(
    store: Store, key: str, raw: bytes, before: tuple[bytes, Stat] | None, *, warn: Callable[[str], None]
) -> None:
    """Publish a manifest whose blobs are in the store, and wait until every prune at work has seen it.

    Where the same bytes lie there already, all is well: an earlier try of ours may have put them, and its answer was
    lost.

    Args:
        key: Where the manifest goes.
        raw: Bytes of the manifest.
        before: Bytes and object that the key had when the work began; None: it had none.
        warn: Is told when this has to wait.

    Raises:
        ConflictError: Where the key has another manifest by now.
    """
    if before is not None and before[0] == raw:
        return
    try:
        store.put_if(key, raw, version=before[1].version if before else None)
    except StoreError as error:
        if _stands(store, key, raw):
            pass
        elif isinstance(error, ConflictError):
            raise ConflictError(
                f"{where(store, key)}: somebody else has published another manifest under this revision meanwhile; "
                "nothing of theirs was changed: look at it, and run again to replace it"
            ) from None
        elif before is None:
            raise
        else:
            raise type(error)(
                f"{error}; all blobs are there: with a new name for --revision only the manifest is left to be put"
            ) from None
    published = store.head(key)
    if published is not None:
        wait_for_prunes(store, published, warn=warn)


def _stands(store: Store, key: str, raw: bytes) -> bool:
    try:
        found = store.head(key)
        return found is not None and found.size == len(raw) and read(store, key, 0, found.size) == raw
    except ShardprepError:  # the caller then raises its own error, which came first
        return False
