"""Say a worker's error in plain words that travel to another process, and raise it there as the error that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .. import errors
from ..errors import InputError, ShardprepError, WorkerError, WorkerLostError, quote

KINDS: Final = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ShardprepError) and kind is not WorkerLostError
}
"""By name: no class comes over a network."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Instead of a result: no traceback, nothing of the libraries of the process that failed."""

    kind: str
    message: str


def failure_of(error: BaseException) -> Failure:
    """What to send of `error`. One that is not ours is a WorkerError that starts with the name of its class."""
    kind, message = type(error).__name__, str(error)
    if kind in KINDS:
        return Failure(kind, message)
    if isinstance(error, WorkerError):
        return Failure(WorkerError.__name__, message)
    line = " ".join(message.split())  # torch puts a stack of C++ calls below its first line
    return Failure(WorkerError.__name__, f"{kind}: {quote(line, limit=500)}" if line else kind)


def raised(failure: Failure, worker: str) -> ShardprepError:
    """The error to raise for what `worker` sent."""
    kind = KINDS.get(failure.kind, WorkerError)
    if issubclass(kind, InputError):
        return kind(failure.message)  # of the request, not of the worker
    return kind(f"{worker}: {failure.message}")
