"""Put shard sets into a store: blobs first, each only if it is missing, the manifest last and conditionally.

A push that dies leaves every revision as it was. Blobs are never replaced, so that a reader of another revision never
meets a change; what no revision names any more is removed by `prune` alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

from shardprep_runtime.errors import (
    ConflictError,
    InputError,
    IntegrityError,
    ManifestError,
    ShardprepError,
    SourceError,
    StoreError,
    WriteError,
    quote,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Manifest
from shardprep_runtime.format.read_manifest import find_manifest, read_manifest
from shardprep_runtime.shard.revisions import (
    DEFAULT_REVISION,
    blob_key,
    check_revision,
    fetch_manifest,
    manifest_key,
)
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access, Stat, Store, read, where

from ..files import open_regular
from ..source import locate_pieces, open_parts
from ..write.conduct import Conduct
from ..write.plan import Plan, PlannedPart
from ..write.staging import KeyOf, Written
from .prune import wait_for_prunes
from .send import CONNECTIONS, Blob, Sender, is_there, open_blob

ROUNDS: Final = 3
"""How often blobs that vanish while they are published are sent again."""

T = TypeVar("T")
R = TypeVar("R")

RECEIPT: Final = ".receipt"
UNFINISHED: Final = ".unfinished"


@dataclass(frozen=True, slots=True)
class PushReport:
    """What push did, or would do."""

    uri: str
    revision: str
    manifest_digest: str
    """`sha256:...` of the manifest, the root of the chain of trust."""
    replaced: str | None
    """The digest of the manifest that the revision had before; None where it is new or the same."""
    blobs: int
    """Parts and side files, alike ones once."""
    blobs_sent: int
    bytes_sent: int
    """Of blobs, over the network; less than theirs where an earlier push that was killed had sent some."""
    bytes_present: int
    """Of blobs that needed not be sent."""
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
    """Put the shard set in `folder` into the store at `uri` (`s3://bucket/prefix`, a folder) as `revision`.

    Only blobs that the store lacks are sent, each byte of them read once and proved by its digest; so a file that
    changed since the split makes the push fail with IntegrityError, and nothing is published. The same call
    resumes. ConflictError: somebody else has published another manifest under this revision meanwhile.

    Args:
        manifest_digest: `sha256:...`: refuse a shard set whose manifest has another.
        dry_run: Say what would be sent, send nothing.
        conduct: Its workers are connections, 16 if None.
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
    """The files of a shard set, open until `stack` ends; files that are alike once.

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
    """Those that the store lacks. Raises StoreError where one has another size there."""
    there = _in_parallel(lambda blob: is_there(store, blob), blobs, workers)
    return [blob for blob, found in zip(blobs, there, strict=True) if not found]


def _in_parallel(call: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """What `call` gives for each, in their order; on an error no more are begun."""
    with ThreadPoolExecutor(workers, thread_name_prefix="shardprep-ask") as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _send(store: Store, blobs: Sequence[Blob], *, workers: int, progress: Callable[[int], None]) -> int:
    """Send blobs; the bytes that went over the network."""
    if not blobs:
        return 0
    with Sender(store, workers=workers) as sender:
        smallest, *others = sorted(blobs, key=lambda blob: blob.size)
        sender.add(smallest, progress=progress)
        sender.drain()  # from here on it is known whether the store checks what it gets, and memory can be spared
        for blob in others:
            sender.add(blob, progress=progress)
        sender.drain()
        return sender.bytes_sent


def put_manifest(
    store: Store, key: str, raw: bytes, before: tuple[bytes, Stat] | None, *, warn: Callable[[str], None]
) -> None:
    """Publish a manifest whose blobs are there, in place of `before`, what the key had when the work began.

    Comes back once no prune is at work that has not seen it: then blobs that are there stay.

    Raises ConflictError where it has something else now. Bytes that are there already are no conflict, whoever put
    them: ourselves, when the answer to an earlier try was lost.
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
    except ShardprepError:  # then the first error is the one to tell
        return False


# ------------------------------------------------------------------------------------------------ split, into a store


class StoreStaging:
    """A store that a split is written to, part by part, through a bounded scratch folder on this machine.

    A part is written to the scratch folder; once it is whole it is sent, by the same code and with the same checks
    as in a push (the digests were computed on the way into the file, so the check covers the file), and removed.
    The scratch folder holds at most `bound` bytes: twice those of the parts that must be open at a time in the order
    of the tensors (with parts of 1 GiB about 2 GiB a rank of the grain), once for parts that are being written and
    once for those on their way. A new part waits until there is room. (Only where one tensor takes a thread longer
    than all the parts that the others write meanwhile may it be a part of each rank more: they cannot wait for it.)
    Beside them lies a small receipt of each part that the store has, by which the same split resumes after a kill.
    """

    def __init__(
        self,
        uri: str | Path,
        plan: Plan,
        fingerprint: str,
        *,
        revision: str,
        scratch: Path | None,
        access: Access | None,
        conduct: Conduct,
    ) -> None:
        """`fingerprint` stands for all that decides the bytes of the parts. `scratch`: a folder to hold ours."""
        self.revision = check_revision(revision)
        self._uri, self._access, self._conduct = uri, access, conduct
        self.sizes = {part.path: part.size for part in plan.parts}
        self.bound = 2 * open_bytes(plan, self.sizes, workers=conduct.workers)
        name = hashlib.sha256(f"{fingerprint} {uri}".encode()).hexdigest()[:32]
        self.folder = (scratch or Path(tempfile.gettempdir())) / f"shardprep-{name}"
        self.where = quote(self.folder)
        self._held: dict[str, int] = {}
        """Bytes that each file in the scratch folder has or will have."""
        self._sending: set[str] = set()
        self._fds: dict[str, int] = {}
        self._keys: dict[str, tuple[str, int]] = {}
        """Name -> key and size of its blob, which is in the store."""
        self._there: dict[str, Written] = {}
        self._changed = threading.Condition()

    def __enter__(self) -> StoreStaging:
        with contextlib.ExitStack() as stack:
            self._store = stack.enter_context(open_store(self._uri, self._access))
            self._before = fetch_manifest(self._store, self.revision)
            self._make_folder()
            stack.callback(os.close, self._lock)
            stack.push(self._tidy)
            self._read_receipts()
            self._sender = stack.enter_context(Sender(self._store))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from None

    def _tidy(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the receipts for a rerun. Where the input itself was at fault there can be none."""
        for fd in self._fds.values():
            os.close(fd)
        if isinstance(error, InputError | IntegrityError | SourceError):
            shutil.rmtree(self.folder, ignore_errors=True)
        elif error is not None:
            self._clear()

    def _cannot_write(self, error: OSError) -> WriteError:
        return WriteError(
            f"{self.where}: cannot be written: {error.strerror}; choose another --scratch folder, or smaller parts "
            "(what the store has is kept: the same command resumes)"
        )

    def _make_folder(self) -> None:
        """Our own folder, in one that everybody may write to: nobody else may have made it, or look into it."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            found = self.folder.lstat()
        except OSError as error:
            raise self._cannot_write(error) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise InputError(
                f"{self.where}: is not a folder that only this user may enter; remove it, or choose another --scratch"
            )
        try:
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"{self.where}: another shardprep is at the same split; wait for it") from None
        self._clear()

    def _clear(self) -> None:
        """Remove files that were not sent whole: written again they are the same, and requests that arrived are kept."""
        for entry in self.folder.iterdir():
            if entry.name.endswith(UNFINISHED):
                entry.unlink()

    def _read_receipts(self) -> None:
        """Find out what an earlier run has sent, and the store still has."""
        found = {}
        for name in self.sizes:
            try:
                fields = json.loads((self.folder / (name + RECEIPT)).read_bytes())
                written = Written(int(fields["size"]), int(fields["header_size"]), str(fields["digest"]))
                found[name] = written, blob_key(written.digest)
            except (OSError, ValueError, KeyError, TypeError, ManifestError):
                continue
        stats = _in_parallel(lambda name: self._store.head(found[name][1]), found, CONNECTIONS)
        for (name, (written, key)), known in zip(found.items(), stats, strict=True):
            if known is not None and known.size == written.size == self.sizes[name]:
                self._there[name] = written
                self._keys[name] = key, written.size

    @property
    def mover(self) -> Conduct:
        """For writing to the scratch folder: progress is what the store has."""
        return Conduct(self._conduct.workers, lambda _: self._begin(), warn=self._conduct.warn)

    def _begin(self) -> None:
        self._conduct.begin(sum(self.sizes.values()))
        self._conduct.progress(sum(written.size for written in self._there.values()))

    def check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if min(needed, self.bound) > free:
            raise WriteError(
                f"{self.where}: {min(needed, self.bound):,} bytes of scratch space are needed, {free:,} are free; "
                "make room, choose another --scratch folder, or smaller parts"
            )

    def finished(self, part: PlannedPart) -> Written | None:
        return self._there.get(part.path)

    def create(self, name: str) -> int:
        size = self.sizes.get(name, 0)
        with self._changed:
            # what is being written cannot wait for itself: once nothing is on its way, go on
            while self._sending and sum(self._held.values()) + size > self.bound:
                self._changed.wait(timeout=1)
                self._sender.check()
            self._held[name] = size
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _path(self, name: str) -> Path:
        return self.folder / (name + UNFINISHED)

    def finish(self, name: str, fd: int, written: Written) -> None:
        with self._changed:
            self._fds[name] = fd
            self._sending.add(name)
        blob = open_blob(fd, written, where=quote(self._path(name)))
        progress = self._conduct.progress if name in self.sizes else lambda _: None
        if is_there(self._store, blob):  # of another revision
            progress(blob.size)
            self._sent(name, blob, written)
            return
        self._sender.add(blob, sent=lambda: self._sent(name, blob, written), progress=progress)

    def _sent(self, name: str, blob: Blob, written: Written) -> None:
        if name in self.sizes:
            fields = {"size": written.size, "header_size": written.header_size, "digest": written.digest}
            receipt = self.folder / (name + RECEIPT)
            new = receipt.with_name(receipt.name + UNFINISHED)
            new.write_text(json.dumps(fields))
            new.rename(receipt)
        self._path(name).unlink()
        with self._changed:
            os.close(self._fds.pop(name))
            self._keys[name] = blob.key, blob.size
            del self._held[name]
            self._sending.discard(name)
            self._changed.notify_all()

    def write(self, name: str, data: bytes) -> None:
        fd = self.create(name)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        except BaseException:
            os.close(fd)
            raise
        self.finish(name, fd, Written(len(data), len(data), manifests.digest_of(data)))

    def reopen(self) -> tuple[Store, KeyOf]:
        self._sender.drain()
        return open_store(self._uri, self._access), lambda file: blob_key(file.digest)

    def complete(self, name: str, data: bytes) -> None:
        """Publish the manifest once every blob is seen to be in the store, look again, and remove the scratch folder."""
        self._sender.drain()
        self._all_there()
        key = manifest_key(self.revision)
        put_manifest(self._store, key, data, self._before, warn=self._conduct.warn)
        self._all_there()
        shutil.rmtree(self.folder)

    def _all_there(self) -> None:
        """Raises StoreError where a blob is no longer in the store; its receipt goes, so that it is written again."""
        names = list(self._keys)
        stats = _in_parallel(lambda name: self._store.head(self._keys[name][0]), names, CONNECTIONS)
        gone = [
            name
            for name, known in zip(names, stats, strict=True)
            if known is None or known.size != self._keys[name][1]
        ]
        for name in gone:
            (self.folder / (name + RECEIPT)).unlink(missing_ok=True)
        if gone:
            raise StoreError(
                f"{quote(self._store.uri)}: {len(gone)} blobs were removed while the split was written, by a prune it "
                "seems; run again: only these are written and sent"
            )


def open_bytes(plan: Plan, sizes: Mapping[str, int], *, workers: int | None) -> int:
    """The most bytes of parts that are open at a time while the moves of `plan` are carried out by so many threads."""
    from shardprep_runtime.shard.parts import default_workers

    ahead = (workers or default_workers()) - 1
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, move in enumerate(plan.moves):
        for piece in move.pieces:
            first.setdefault(piece.part, number)
            last[piece.part] = number
    changes = [0] * (len(plan.moves) + 1)
    for part, number in first.items():
        size = sizes[plan.parts[part].path]
        changes[max(0, number - ahead)] += size
        changes[last[part] + 1] -= size
    most = held = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most
