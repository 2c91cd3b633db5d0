"""Say a worker's error in plain words and facts that travel to another process, and raise it there as what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, get_args

from .. import errors
from ..errors import (
    InputError,
    Missing,
    MissingError,
    ShardprepError,
    StoreError,
    WorkerError,
    WorkerLostError,
    quote,
)

Again = TypeVar("Again", bound=WorkerError)

KINDS: Final = {
    kind.__name__: kind
    for kind in vars(errors).values()
    # a worker that has lost another process has failed itself, and is there
    if isinstance(kind, type) and issubclass(kind, ShardprepError) and kind is not WorkerLostError
}
"""By name: no class comes over a network."""

FACTS: Final[Mapping[type, Mapping[str, type]]] = {
    StoreError: {"status": int, "code": str},
    MissingError: {"missing": str},
}
"""What errors of a class, and of those below it, carry beside their message: names, with types."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Instead of a result: no traceback, nothing of the libraries of the process that failed."""

    kind: str
    """Name of the error's class."""
    message: str
    """What people read."""
    facts: Mapping[str, str | int] = field(default_factory=dict)
    """What code asks of the error instead: `status`, `code`, `missing`."""


def failure_of(error: BaseException) -> Failure:
    """What to send of `error`. One that is not ours is a WorkerError that starts with the name of its class."""
    kind, message = type(error).__name__, str(error)
    if kind in KINDS:
        return Failure(kind, message, _facts(KINDS[kind], vars(error)))
    if isinstance(error, WorkerError):
        return Failure(WorkerError.__name__, message)
    line = " ".join(message.split())  # torch puts a stack of C++ calls below its first line
    return Failure(WorkerError.__name__, f"{kind}: {quote(line, limit=500)}" if line else kind)


def read_failure(said: Mapping[str, Any]) -> Failure:
    """A failure as another process says it, by its fields; what cannot be read of it is left out."""
    facts = said.get("facts")
    return Failure(str(said.get("kind")), str(said.get("message")), facts if isinstance(facts, dict) else {})


def raised(failure: Failure, worker: str) -> ShardprepError:
    """The error to raise for what a worker sent.

    Args:
        failure: What was read of it.
        worker: Its name, which the message begins with; refused input is the request's fault, and names no worker.
    """
    kind = KINDS.get(failure.kind, WorkerError)
    make: Any = kind  # only some take facts
    message = failure.message if issubclass(kind, InputError) else f"{worker}: {failure.message}"
    found: ShardprepError = make(message, **_facts(kind, failure.facts))
    return found


def again(error: Again) -> Again:
    """The same error, to be raised once more: a traceback belongs to one raise."""
    make: Any = type(error)
    found: Again = make(str(error), **vars(error))
    return found


def _facts(kind: type, given: Mapping[str, object]) -> dict[str, str | int]:
    """Those of `given` that an error of that class carries."""
    found: dict[str, Any] = {}
    for base, facts in FACTS.items():
        for name, expected in facts.items() if issubclass(kind, base) else ():
            value = given.get(name)
            if type(value) is expected and (name != "missing" or value in get_args(Missing)):
                found[name] = value
    return found
