"""Let a split write to a store, part by part, through a bounded scratch folder on this machine."""

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
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from shardprep_runtime.errors import (
    InputError,
    IntegrityError,
    ManifestError,
    SourceError,
    StoreError,
    WriteError,
    quote,
)
from shardprep_runtime.shard.revisions import (
    blob_key,
    check_revision,
    fetch_manifest,
    manifest_key,
)
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access, Store

from ..write.conduct import Conduct
from ..write.plan import Plan, PlannedPart
from ..write.staging import KeyOf, Written, write_whole
from .push import in_parallel, put_manifest
from .send import CONNECTIONS, Blob, Sender, is_there, open_blob

RECEIPT: Final = ".receipt"
UNFINISHED: Final = ".unfinished"


class StoreStaging:
    """A store that a split is written to, part by part, through a bounded scratch folder on this machine.

    A part is written to the scratch folder. Once it is whole it is sent, by the same code and with the same checks as in
    a push, and removed. Its digests were computed on the way into the file, so that the check covers the file.

    The scratch folder holds at most `bound` bytes: twice the bytes of the parts that must be open at a time in the order
    of the tensors. Half of them are for parts that are being written, half for parts that are being sent. With parts of
    1 GiB this is about 2 GiB for each rank of the grain. A new part waits until there is room. One case exceeds the
    bound by a part for each rank: a tensor for which its thread needs longer than the others for all their parts. They
    cannot wait for it, since it waits for them.

    A small receipt stays for each part that the store has. By the receipts the same split resumes after a kill.
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
        """`fingerprint` digests all that decides the bytes of the parts; `scratch` is the folder that will hold ours."""
        self.revision = check_revision(revision)
        self._uri, self._access, self._conduct = uri, access, conduct
        self.sizes = {part.path: part.size for part in plan.parts}
        self.bound = 2 * open_bytes(plan, self.sizes, workers=conduct.workers)
        name = hashlib.sha256(f"{fingerprint} {uri}".encode()).hexdigest()[:32]
        self.folder = (scratch or Path(tempfile.gettempdir())) / f"shardprep-{name}"
        self.where = quote(self.folder)
        self._held: dict[str, int] = {}
        """Name of each file in the scratch folder -> bytes that it has or will have."""
        self._sending: set[str] = set()
        self._fds: dict[str, int] = {}
        self._keys: dict[str, tuple[str, int]] = {}
        """Name of each file that the store has -> key and size of its blob."""
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
        """Keep the receipts for a rerun, unless the input was at fault: a rerun would fail too."""
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
        """Make our own folder in one that everybody may write to, and refuse one that another user made or may enter."""
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
        """Remove files that were not sent whole. They will be written again with the same bytes; the store keeps the
        parts of uploads that arrived."""
        for entry in self.folder.iterdir():
            if entry.name.endswith(UNFINISHED):
                entry.unlink()

    def _read_receipts(self) -> None:
        """Find the files that an earlier run has sent and that the store still has."""
        found = {}
        for name in self.sizes:
            try:
                fields = json.loads((self.folder / (name + RECEIPT)).read_bytes())
                written = Written(int(fields["size"]), int(fields["header_size"]), str(fields["digest"]))
                found[name] = written, blob_key(written.digest)
            except (OSError, ValueError, KeyError, TypeError, ManifestError):
                continue
        stats = in_parallel(lambda name: self._store.head(found[name][1]), found, CONNECTIONS)
        for (name, (written, key)), known in zip(found.items(), stats, strict=True):
            if known is not None and known.size == written.size == self.sizes[name]:
                self._there[name] = written
                self._keys[name] = key, written.size

    @property
    def mover(self) -> Conduct:
        """How parts are written to the scratch folder: silently, since progress counts what the store has."""
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
            # parts that are being written cannot wait for themselves: go on once nothing is being sent
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
        write_whole(self, name, data)

    def reopen(self) -> tuple[Store, KeyOf]:
        self._sender.drain()
        return open_store(self._uri, self._access), lambda file: blob_key(file.digest)

    def complete(self, name: str, data: bytes) -> None:
        """Publish the manifest once all blobs are in the store, look for them again, and remove the scratch folder.

        Args:
            data: Bytes of the manifest.
        """
        self._sender.drain()
        self._all_there()
        key = manifest_key(self.revision)
        put_manifest(self._store, key, data, self._before, warn=self._conduct.warn)
        self._all_there()
        shutil.rmtree(self.folder)

    def _all_there(self) -> None:
        """Raise StoreError where the store has lost a blob, and remove its receipt, so that a rerun writes it again."""
        names = list(self._keys)
        stats = in_parallel(lambda name: self._store.head(self._keys[name][0]), names, CONNECTIONS)
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
    """Count the bytes of the parts that are open at the same time at most while `plan` is carried out.

    Args:
        sizes: Path of each part -> bytes.
        workers: Threads; default: the cores of this process, at most 8.
    """
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
