"""Keep what a quantization has done so far in a folder beside its destination, so that a killed one goes on from there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from shardprep_runtime.errors import InputError, WriteError, quote
from shardprep_runtime.shard.filesystem import sync_folder

SUFFIX: Final = ".quantizing"
JOURNAL: Final = "journal.json"
LOCK: Final = "lock"

PATIENCE: Final = 10.0
"""Seconds in which an engine notices that nobody hears it any more."""


class Work:
    """A folder that holds a run's intermediate files. Use as a context manager: it holds a lock for as long."""

    def __init__(self, folder: Path, fingerprint: str, *, warn: Callable[[str], None]) -> None:
        """`fingerprint` stands for all that decides what is made here: with another one all is begun anew."""
        self.folder, self.fingerprint, self.warn = folder, fingerprint, warn

    def __enter__(self) -> Work:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteError(f"{quote(self.folder)}: cannot be written: {error.strerror}") from None
        if not self._locked():
            os.close(self._lock)
            raise InputError(f"{quote(self.folder)}: another shardprep is quantizing here; wait for it")
        try:
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    @property
    def lock(self) -> int:
        """The descriptor of the lock. A process that inherits it holds the lock for as long as it lives."""
        return self._lock

    def _locked(self) -> bool:
        """Take the lock. The engine of a run that was killed has it for a moment longer."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)
            else:
                return True

    def _begin(self) -> None:
        found = self.read(JOURNAL)
        there = {entry.name for entry in self.folder.iterdir()} - {LOCK}
        if found is None and there:
            raise InputError(
                f"{quote(self.folder)}: holds {quote(min(there))}, which no run of ours put there; choose another "
                "folder with --work"
            )
        if found is not None and found.get("fingerprint") != self.fingerprint:
            self.warn(f"{quote(self.folder)}: an unfinished run with other input or options is discarded")
            for name in there - {JOURNAL}:
                self.remove(name)
        self.write(JOURNAL, {"fingerprint": self.fingerprint})

    def read(self, name: str) -> dict[str, Any] | None:
        """What an earlier run wrote under `name`; None where it did not come so far."""
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write a small file, whole and on disk before it has its name.

        Args:
            name: Within the folder.
            facts: Its content, as JSON.
        """
        path = self.folder / f".{name}.unfinished"
        with open(path, "wb") as file:
            file.write(json.dumps(facts).encode())
            file.flush()
            os.fsync(file.fileno())
        path.rename(self.folder / name)
        sync_folder(self.folder)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def discard(self) -> None:
        """Remove all of it, the journal last: while it is there, the next run knows that this one was ours."""
        for entry in list(self.folder.iterdir()):
            if entry.name not in (JOURNAL, LOCK):
                self.remove(entry.name)
        for name in (JOURNAL, LOCK):
            self.remove(name)
        with contextlib.suppress(OSError):  # somebody's own file came in meanwhile
            self.folder.rmdir()
