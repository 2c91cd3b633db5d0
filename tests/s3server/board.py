"""What all connections share, and all processes where there are several: settings, faults to give, credentials, counts."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, Final

LOGGED: Final = 5000
"""Requests that the log keeps."""

MODES: Final = {
    "status": "any",
    "hang": "any",
    "reset": "any",
    "delay": "any",
    "slow_first_byte": "any",
    "truncate": "body",
    "stall": "body",
    "drip": "body",
    "flip": "body",
    "html": "body",
    "shift": "object",
    "wrong_range": "object",
    "full200": "object",
    "gzip": "object",
    "replace": "object",
    "drop_upload": "upload",
    "lost_response": "write",
    "short_list": "list",
    "empty_list": "list",
}
"""Fault mode -> what a request must have for it: a response with a body, an object's bytes, a body that is sent, ..."""
HOW: Final = (
    {"times", "skip", "method", "match", "min_bytes"}
    | {"code", "name", "location", "region"}
    | {"after", "at", "by", "rate", "delay", "short"}
)
"""What may be said of a fault; `S3Server.fault` says what each is."""


@dataclass(slots=True)
class Settings:
    """What a server is told as it starts."""

    root: Path
    region: str = "us-east-1"
    checksums: bool = True
    """Whether it knows x-amz-checksum-*; radosgw 16 does not."""
    anonymous_read: bool = False
    """Whether GET and HEAD need no signature."""
    min_part_size: int = 5 * 2**20
    """Bytes of a part, but for the last."""
    clock_offset: float = 0.0
    """Seconds that its clock is ahead."""


class Board:
    """Faults to be given, credentials that are good, and what has been counted."""

    def __init__(self, credentials: dict[str, dict[str, Any]]) -> None:
        self._lock = threading.Condition()
        self._faults: list[dict[str, Any]] = []
        self._credentials = credentials
        self._running = 0
        self._forget()

    def _forget(self) -> None:
        self._operations: dict[str, Counter[str]] = {}
        self._modes: Counter[str] = Counter()
        self._log: deque[dict[str, Any]] = deque(maxlen=LOGGED)

    def credential(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._credentials.get(key)

    def rotate(self, key: str, secret: str, token: str | None) -> None:
        """From now on these are good, and whatever was good before has expired."""
        with self._lock:
            for old in self._credentials.values():
                old["expired"] = True
            self._credentials[key] = {"secret": secret, "token": token, "expired": False}

    def fault(self, mode: str, how: dict[str, Any]) -> None:
        if mode not in MODES:
            raise ValueError(f"no fault mode {mode!r}; known are {', '.join(MODES)}")
        if unknown := set(how) - HOW:
            raise ValueError(
                f"a fault has no {', '.join(sorted(unknown))}; known are {', '.join(sorted(HOW))}"
            )
        with self._lock:
            self._faults.append({"mode": mode, "times": 1, "skip": 0, **how, "given": 0})

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, method: str, key: str, size: int, traits: set[str]) -> dict[str, Any] | None:
        """The first fault that is meant for this request, counted as given."""
        with self._lock:
            for fault in self._faults:
                if (
                    MODES[fault["mode"]] not in traits
                    or (fault["times"] and fault["given"] >= fault["times"])
                    or fault.get("method") not in (None, method)
                    or fault.get("match", "") not in key
                    or size < fault.get("min_bytes", 0)
                ):
                    continue
                if fault["skip"]:
                    fault["skip"] -= 1
                    continue
                fault["given"] += 1
                self._modes[fault["mode"]] += 1
                return dict(fault)
        return None

    def begin(self) -> None:
        with self._lock:
            self._running += 1

    def end(self, record: dict[str, Any]) -> None:
        """A request is through, or is held by a fault."""
        with self._lock:
            self._running -= 1
            counts = self._operations.setdefault(record["operation"], Counter())
            counts.update(
                requests=1, sent=record["sent"], received=record["received"], faults=bool(record["fault"])
            )
            self._log.append(record)
            self._lock.notify_all()

    def stats(self) -> dict[str, Any]:
        """Waits a little for requests under way: a client has its last byte before we have counted it."""
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0, timeout=0.5)
            total: Counter[str] = Counter()
            for counts in self._operations.values():
                total.update(counts)
            names = ("requests", "sent", "received", "faults")
            return {
                **{name: total[name] for name in names},
                "operations": {
                    operation: {name: counts[name] for name in names}
                    for operation, counts in self._operations.items()
                },
                "modes": dict(self._modes),
                "pending": [dict(fault) for fault in self._faults],
                "log": list(self._log),
            }

    def reset_stats(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0, timeout=0.5)
            self._forget()


class BoardManager(BaseManager):
    """Gives several serving processes the one board."""
