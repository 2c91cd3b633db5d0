"""Know which workers are there: which answer, which have ended, which hang; and whom that concerns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ...errors import WorkerLostError
from ..failures import again
from ..transport import WorkerInfo

PING_PERIOD: Final = 0.5
"""Seconds between two pings of a worker that answers."""

HANG_TIMEOUT: Final = 2.0
"""Seconds without an answer after which a worker counts as hung."""

Lost = Callable[[WorkerLostError], None]
"""Told of the loss of a worker that something waits for."""


@dataclass(slots=True, eq=False)
class _Peer:
    info: WorkerInfo
    lost: WorkerLostError | None = None
    by_ping: bool = False  # lost because it leaves pings without an answer: one brings it back
    asked: float | None = None  # since when a ping is under way
    waiting: set[Lost] = field(default_factory=set)

    def refusal(self) -> WorkerLostError | None:
        """Why it is vain to ask; a worker that was only too slow for one call may be asked again."""
        return again(self.lost) if self.lost is not None and (self.lost.is_certain or self.by_ping) else None


class Presence:
    """The workers of a transport. Safe to use from several threads; calls nobody while it holds its lock.

    Args:
        ping: Sends a worker, by name, a ping and returns at once; whoever learns of the answer says `answered`.
    """

    def __init__(
        self,
        ping: Callable[[str], None],
        *,
        period: float = PING_PERIOD,
        hang_timeout: float = HANG_TIMEOUT,
    ) -> None:
        self._ping = ping
        self._period = period
        self._hang_timeout = hang_timeout
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._watchers: list[Callable[[str, str], None]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardprep-pings", daemon=True)

    def start(self) -> None:
        """Begin to ping."""
        self._thread.start()

    def stop(self) -> None:
        """No more pings, and who watches is not told of anything from now on: the end of workers is meant."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._watchers.clear()

    def close(self) -> None:
        """Tell who still waits that this is the end."""
        self.stop()
        with self._lock:
            waiting = [(name, each) for name, peer in self._peers.items() for each in peer.waiting]
            for peer in self._peers.values():
                peer.waiting.clear()
        for name, lost in waiting:
            lost(WorkerLostError(f"{name}: the front end was closed", worker=name, is_certain=True))

    def infos(self) -> Mapping[str, WorkerInfo]:
        """What the workers that are there have said of themselves."""
        with self._lock:
            return {name: peer.info for name, peer in self._peers.items() if peer.lost is None}

    def joined(self, info: WorkerInfo) -> None:
        """A worker has said what it is: a new one, one that has changed, or that was started again."""
        with self._lock:
            peer = self._peers.get(info.name)
            if peer is None or peer.info.pid != info.pid or peer.info.host != info.host:
                self._peers[info.name] = _Peer(info)
            else:
                peer.info, peer.lost = info, None

    def wait_for(self, name: str, lost: Lost) -> None:
        """Have somebody told if a worker is lost before `done_with`.

        Args:
            lost: Is told, once.

        Raises:
            WorkerLostError: Where it is vain to ask.
        """
        with self._lock:
            peer = self._peers.get(name)
            if peer is None:
                raise WorkerLostError(f"{name}: no such worker", worker=name, is_certain=True)
            error = peer.refusal()
            if error is None:
                peer.waiting.add(lost)
        if error is not None:
            raise error

    def done_with(self, name: str, lost: Lost) -> None:
        with self._lock:
            if name in self._peers:
                self._peers[name].waiting.discard(lost)

    def answered(self, name: str, *, is_ping: bool = False) -> None:
        """A worker has said something: one that was taken for hung is there again.

        Args:
            is_ping: It has answered a ping.
        """
        with self._lock:
            peer = self._peers[name]
            if is_ping:
                peer.asked = None
            if peer.lost is not None and not peer.lost.is_certain and (peer.by_ping or not is_ping):
                peer.lost = None

    def lost(self, error: WorkerLostError, *, by_ping: bool = False) -> None:
        """A worker is lost: tell who waits for it, and, where that is certain, who watches.

        Args:
            error: Names the worker.
            by_ping: It leaves pings without an answer: an answer to one brings it back.
        """
        with self._lock:
            peer = self._peers.get(error.worker)
            if peer is None or (peer.lost is not None and peer.lost.is_certain >= error.is_certain):
                return
            peer.lost = error
            peer.by_ping = by_ping
            waiting, peer.waiting = peer.waiting, set()
            watchers = list(self._watchers) if error.is_certain else []
        for each in waiting:
            each(again(error))
        for watcher in watchers:
            watcher(error.worker, str(error))

    def watch(self, lost: Callable[[str, str], None]) -> None:
        with self._lock:
            self._watchers.append(lost)

    def _run(self) -> None:
        while not self._is_over.wait(self._period):
            now = time.monotonic()
            due, hung = [], []
            with self._lock:
                for name, peer in self._peers.items():
                    if peer.lost is not None and peer.lost.is_certain:
                        continue
                    if peer.asked is None:
                        peer.asked = now
                        due.append(name)
                    elif now - peer.asked > self._hang_timeout and peer.lost is None:
                        hung.append((name, now - peer.asked))
            for name, seconds in hung:
                message = f"{name} hangs: it has not answered for {seconds:.1f} s"
                self.lost(WorkerLostError(message, worker=name), by_ping=True)
            for name in due:
                self._ping(name)
