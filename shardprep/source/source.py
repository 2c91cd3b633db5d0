"""Say what an open checkpoint is, wherever it lies."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from ..files import Folder


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is open to be read. Use as a context manager."""

    folder: Folder
    file: str | None
    """The one weight file that was named; None: the folder."""
    uri: str
    """Where it came from, as a manifest tells it: no path of this machine, no credentials."""
    revision: str | None = None
    """The commit, where it lies under version control."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.close()
