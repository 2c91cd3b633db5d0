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
    """The one weight file that the user named; None where the user named the folder."""
    uri: str
    """Where the checkpoint came from, as a manifest records it: without paths of this machine and without credentials."""
    revision: str | None = None
    """The commit of a checkpoint that lies under version control."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.close()
