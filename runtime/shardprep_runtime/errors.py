"""Name every way in which shardprep refuses or fails.

    ShardprepError
    ├── InputError            refused before any work; the command line exits with 2
    │   ├── FormatError       a file is not what its format says: damaged, hostile, truncated
    │   ├── UnsupportedError  the file is sound, but holds what cannot be represented
    │   ├── ManifestError     the manifest is damaged, newer than this reader, or contradicts itself
    │   └── LayoutError       a grid, rank or size that the layout rules do not allow
    └── ProblemError          the work was begun and a problem is reported; the command line exits with 1
        ├── IntegrityError    bytes that do not match their digest
        ├── SourceError       a source could not be read to its end, or changed while it was
        ├── WriteError        the destination could not take the bytes
        ├── StoreError        an object store refused, or could not be reached in time
        │   ├── MissingError  no such object or bucket
        │   ├── DeniedError   credentials are missing, expired or not allowed; the clock or the region is wrong
        │   └── ConflictError a conditional put came too late: somebody else's was first
        └── WorkerError       a worker of a split model failed
            ├── WorkerLostError  it has ended, hangs or cannot be reached
            └── CacheLostError   it does not hold a sequence as far as a step needs it; send the whole again

A message says what is wrong, what was expected, what was found and what to do, and puts every name that came
from a file through `quote`.
"""

from __future__ import annotations

import json
from typing import Literal

Missing = Literal["object", "bucket", "upload", "revision", "repository"]
"""Kinds of things that a store may lack; a repository is a model or a data set of a hub."""


class ShardprepError(Exception):
    """Base of all errors that shardprep raises on purpose."""


class InputError(ShardprepError):
    """Refused input: nothing was done and nothing was written."""


class FormatError(InputError):
    """A file is not what its format says."""


class UnsupportedError(InputError):
    """Sound input that shardprep cannot represent or does not know."""


class ManifestError(InputError):
    """A manifest that must not be followed."""


class LayoutError(InputError):
    """A grid, rank or size that the layout rules do not allow."""


class ProblemError(ShardprepError):
    """A problem found while working."""


class IntegrityError(ProblemError):
    """Bytes that do not match their digest."""


class SourceError(ProblemError):
    """A source that could not be read to its end, or changed meanwhile."""


class WriteError(ProblemError):
    """The destination could not take the bytes."""


class StoreError(ProblemError):
    """An object store refused, or could not be reached in time. Code reads `status` and `code`, never the message."""

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        """Keep what the store answered.

        Args:
            message: The text for people.
            status: The status of the HTTP answer; None without an answer, or where it is unknown.
            code: The store's own name of the error, such as S3's `NoSuchBucket`; None as for `status`.
        """
        super().__init__(message)
        self.status = status
        self.code = code


class MissingError(StoreError):
    """The store does not have what was asked for."""

    def __init__(
        self,
        message: str,
        *,
        missing: Missing = "object",
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        """Keep what is missing.

        Args:
            message: The text for people.
            missing: The kind of thing that is not there.
            status: As StoreError has it.
            code: As StoreError has it.
        """
        super().__init__(message, status=status, code=code)
        self.missing = missing


class DeniedError(StoreError):
    """A store denied access: credentials, clock or region are wrong."""


class ConflictError(StoreError):
    """A conditional put came too late: somebody else's was first."""


class WorkerError(ProblemError):
    """A worker of a split model failed; the message is the worker's own."""


class WorkerLostError(WorkerError):
    """A worker has ended, hangs or cannot be reached."""

    def __init__(self, message: str, *, worker: str, is_certain: bool = False) -> None:
        super().__init__(message)
        self.worker = worker
        self.is_certain = is_certain
        """Whether the worker's process is known to have ended, so that asking it again is useless."""


class CacheLostError(WorkerError):
    """A worker's cache lacks positions of a sequence that a step needs; the whole sequence must be sent again."""


def quote(name: object, *, limit: int = 120) -> str:
    """Write a name from outside as printable ASCII on one line, with control characters escaped.

    Args:
        name: The name; anything else is turned into text first.
        limit: Characters at most, roughly; the middle of a longer name is left out.
    """
    text = json.dumps(str(name))[1:-1].replace('\\"', '"').replace("\x7f", "\\u007f")
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 2) :]}"
