"""Bring the blocks of a view from a store to where they land, in the order in which they will be wanted, each once.

Threads take runs of blocks that lie beside each other, most urgent first, and put their bytes where they belong as
they come. Blocks that another process of the host is at are left to it and looked after later.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import IntegrityError, ShardprepError, SourceError, WriteError, quote
from ..format.manifest import Manifest, Part
from ..stores.store import BufferSink, Store, changed, where
from .landing import ABSENT, DOUBTED, GIVEN, HEADER, LANDED, VERIFIED, Landing, LandingSink, new_scratch
from .parts import Numbered, OpenPart, PieceSpan, check_header

RUN_BYTES: Final = 16 * 2**20
"""Bytes that are asked for at once, as S3's performance guidelines advise (8 to 16 MB); a longer block goes by itself."""

WORKERS: Final = 16
"""Connections to a store: S3 gives each 85 to 90 MB/s."""

TRIES: Final = 3
"""How often a block that comes with wrong bytes is asked for."""

LOOK_AGAIN: Final = 0.02
"""Seconds between looks at what another process is fetching."""


class Crew(Protocol):
    """Processes that help a fetch."""

    def start(self, fetch: Fetch) -> None:
        """Have them fetch the runs of `fetch` too."""

    def stop(self) -> None:
        """End them; returns once they write no more."""


class _Stopped(Exception):  # noqa: N818 - no error: nobody wants the bytes any more
    """The fetch was closed."""


class Arrival(Numbered):
    """A part of a view, open while its bytes arrive."""

    def __init__(self, part: OpenPart, landing: Landing, key: str, version: str | None) -> None:
        super().__init__(part)
        self.landing, self.key = landing, key
        self.version = version
        """Of the object, once it is known: every range must be of the same."""
        self.old = landing.state(len(self.blocks))
        """What was there when this began."""
        self.done = bytearray(1 + len(self.blocks))

    def missing(self, run: Run) -> list[tuple[int, int]]:
        """The bytes [start, stop) of each block of a run that was not there when this began."""
        blocks = (self.block(n) for n in range(run.first, run.last) if not self.old[n])
        return [(block.start, block.stop) for block in blocks]

    def bytes_there(self) -> int:
        """Bytes of the header and the blocks that were there when this began."""
        there = (block for block, value in zip(self.blocks, self.old[1:], strict=True) if value)
        return self.part.part.header_size + sum(block.stop - block.start for block in there)

    def give_back(self, piece: PieceSpan) -> None:
        """Free the memory of a piece of which there is a copy now. The map says so first, to forked processes."""
        for number in self.numbers(piece.span.start, piece.span.stop):
            self.landing.mark(number, GIVEN)
        self.landing.forget(piece.span.start, piece.span.stop)

    def is_given(self, piece: PieceSpan) -> bool:
        """Whether `give_back` has begun, in this process or the one that it was forked from."""
        state = self.landing.state(len(self.blocks))
        return any(state[n] == GIVEN for n in self.numbers(piece.span.start, piece.span.stop))


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [first, last) of a part, which are asked for at once."""

    arrival: Arrival
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.arrival.block(self.last - 1).stop - self.arrival.block(self.first).start


def plan_runs(wanted: Iterable[tuple[Arrival, int, int]]) -> list[Run]:
    """The runs that bring bytes [start, stop) of each part, in the order in which `wanted` names them first."""
    urgency: dict[Arrival, dict[int, int]] = {}
    for order, (arrival, start, stop) in enumerate(wanted):
        of_part = urgency.setdefault(arrival, {})
        for number in arrival.numbers(start, stop):
            of_part.setdefault(number, order)
    runs: list[tuple[int, Run]] = []
    for arrival, of_part in urgency.items():
        numbers = sorted(of_part)
        first = 0
        for i in range(1, len(numbers) + 1):
            joins = i < len(numbers) and numbers[i] == numbers[i - 1] + 1
            if joins and Run(arrival, numbers[first], numbers[i] + 1).nbytes <= RUN_BYTES:
                continue
            run = Run(arrival, numbers[first], numbers[i - 1] + 1)
            runs.append((min(of_part[number] for number in numbers[first:i]), run))
            first = i
    return [run for _, run in sorted(runs, key=lambda item: item[0])]


def open_arrivals(
    store: Store,
    parts: Sequence[tuple[Part, str, Landing]],
    manifest: Manifest,
    *,
    check_digest: bool,
    workers: int,
) -> list[Arrival]:
    """Open parts that arrive: (part, its key in the store, where it lands). Headers that are missing are fetched.

    Takes the landings over: they are closed if this fails. Raises IntegrityError, FormatError or ManifestError.
    """

    def opened(item: tuple[Part, str, Landing]) -> Arrival:
        part, key, landing = item
        at = quote(f"{store.uri.rstrip('/')}/{part.path}")
        raw, version = _header(store, part, key, landing, at=at, check_digest=check_digest)
        return Arrival(
            OpenPart(landing.data, raw, part, manifest, where=at, check_digest=check_digest),
            landing,
            key,
            version,
        )

    try:
        with ThreadPoolExecutor(max(1, min(workers, len(parts))), "shardprep-header") as pool:
            return list(pool.map(opened, parts))
    except BaseException:
        for _, _, landing in parts:
            landing.abandon()
        raise


def _header(
    store: Store, part: Part, key: str, landing: Landing, *, at: str, check_digest: bool
) -> tuple[bytes, str | None]:
    """The header of a part, from where it has landed already or from the store, and the version it was read of."""
    if landing.state(0)[HEADER]:
        raw = os.pread(landing.data, part.header_size, 0)
        with suppress(IntegrityError):
            check_header(raw, part, where=at)
            return raw, None
    failure = None
    for _ in range(TRIES):
        found = bytearray(part.header_size)
        with memoryview(found) as into:
            version = store.get(key, 0, BufferSink(into))
        raw = bytes(found)
        try:
            if check_digest:
                check_header(raw, part, where=at)
        except IntegrityError as error:
            failure = error
            continue
        landing.write(raw, 0)
        landing.mark(HEADER, VERIFIED if check_digest else LANDED)
        return raw, version
    assert failure is not None
    raise failure


class Fetch:
    """Runs that are being fetched by threads of this process, from `start` until all are there or `close`."""

    def __init__(
        self,
        store: Store,
        arrivals: Sequence[Arrival],
        runs: Sequence[Run],
        *,
        verify: bool,
        workers: int = WORKERS,
        progress: Callable[[int], None] = lambda _: None,
        crew: Crew | None = None,
    ) -> None:
        """Nothing is fetched before `start`.

        Args:
            verify: Compare every block with its digest, also those that were there before.
            progress: Is told of bytes that are there, from several threads.
            crew: Processes that fetch the same runs.
        """
        self._crew, self._process = crew, os.getpid()
        self.store, self.arrivals, self.runs = store, tuple(arrivals), tuple(runs)
        self.verify, self.workers, self._progress = verify, workers, progress
        self._queue = deque(runs)
        self._held: deque[tuple[float, Run]] = deque()
        """Runs that others are at, and when to look at them again."""
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._active = 0
        self._then: Callable[[], None] | None = None
        self.bytes_fetched = 0
        """Bytes of blocks that this process has brought."""
        self.bytes_found = 0
        """Bytes of blocks that were there, or that another process has brought."""

    def start(self) -> None:
        """Begin; returns at once."""
        if self._crew is not None:
            self._crew.start(self)
        count = min(self.workers, len(self.runs))
        self._active = count
        for number in range(count):
            # daemons: a worker that ends, or dies, does not wait for bytes that it no longer wants
            threading.Thread(target=self._work, name=f"shardprep-fetch-{number}", daemon=True).start()

    # ----------------------------------------------------------------------------------------------------- waiting
    def wait(self, arrival: Arrival, start: int, stop: int) -> None:
        """Return once bytes [start, stop) of the part are there. Raises what ended the fetch, if it ended before."""
        self._wait(arrival, arrival.numbers(start, stop))

    def wait_all(self) -> None:
        """Return once everything is there. Raises what ended the fetch before."""
        for run in self.runs:
            self._wait(run.arrival, range(run.first, run.last))

    def _wait(self, arrival: Arrival, numbers: range) -> None:
        if self.elsewhere:
            self._look(arrival, numbers)
            return
        with self._changed:
            while not all(arrival.done[number] for number in numbers):
                self._raise()
                self._changed.wait()

    @property
    def elsewhere(self) -> bool:
        """Whether this is a process that was forked from the one that fetches: no thread of the fetch runs here."""
        return os.getpid() != self._process

    def _look(self, arrival: Arrival, numbers: range) -> None:
        """What a forked process does instead of waiting: the locks of `_changed` may be held for ever here."""
        state = arrival.landing.state(len(arrival.blocks))
        for number in numbers:
            if not arrival.done[number] and not self._is_there(arrival, number, state[number]):
                raise SourceError(
                    f"{arrival.part.where}: this process was forked before all of it had arrived; call wait() of the "
                    "shard first, or load in the new process"
                )
            arrival.done[number] = 1

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise SourceError("the shard was closed before all of it had arrived")

    def join(self) -> None:
        """Stop, and return once no thread writes any more."""
        if self.elsewhere:
            return
        self._stop.set()
        if self._crew is not None:
            self._crew.stop()
        with self._changed:
            self._changed.notify_all()
            while self._active:
                self._changed.wait()

    def close(self, then: Callable[[], None]) -> None:
        """Stop. `then` is called once no thread writes any more: now, or by the last of them."""
        if self.elsewhere:
            then()
            return
        self._stop.set()
        if self._crew is not None:
            self._crew.stop()
        with self._changed:
            self._changed.notify_all()
            if self._active:
                self._then = then
                return
        then()

    # ------------------------------------------------------------------------------------------------------- work
    def _work(self) -> None:
        scratch = new_scratch()
        try:
            while (run := self._next()) is not None:
                self._bring(run, scratch)
        except _Stopped:
            pass
        except ShardprepError as error:
            self._fail(error)
        except OSError as error:  # the disk: a store's errors are its own
            self._fail(WriteError(f"what was fetched cannot be written: {error.strerror}"))
        except BaseException as error:  # must reach those who wait
            self._fail(error)
            raise
        finally:
            with self._changed:
                self._active -= 1
                then = self._then if self._active == 0 else None
                self._changed.notify_all()
            if then is not None:
                then()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not self._stop.is_set():
                self._error = error
            self._stop.set()
            self._changed.notify_all()

    def _next(self) -> Run | None:
        """The most urgent run that is left; one that others hold is looked at again from time to time."""
        if self._stop.is_set():
            return None
        with self._changed:
            early = self._held[0][0] - time.monotonic() if self._held else LOOK_AGAIN
            if self._queue and early > 0:
                return self._queue.popleft()
            if not self._held:
                return None
            _, held = self._held.popleft()
        self._stop.wait(max(0.0, early))
        return None if self._stop.is_set() else held

    def _bring(self, run: Run, scratch: memoryview) -> None:
        arrival = run.arrival
        missing = self._missing(run)
        if not missing:
            return
        first, last = missing[0], missing[-1] + 1
        if not arrival.landing.claim(first, last):
            with self._changed:
                self._held.append((time.monotonic() + LOOK_AGAIN, run))
            return
        try:
            missing = self._missing(run)  # who held them may just have ended
            for i, number in enumerate(missing):
                if i == 0 or missing[i - 1] != number - 1:
                    begin = number
                if i + 1 == len(missing) or missing[i + 1] != number + 1:
                    self._get(arrival, begin, number + 1, scratch, tries=TRIES)
        finally:
            arrival.landing.release(first, last)

    def _missing(self, run: Run) -> list[int]:
        """The blocks of a run that are not there. Those that are, are counted; those that should be checked, are."""
        arrival = run.arrival
        state = arrival.landing.state(len(arrival.blocks))
        missing = []
        for number in range(run.first, run.last):
            if arrival.done[number]:
                continue
            if self._is_there(arrival, number, state[number]):
                block = arrival.block(number)
                with self._changed:
                    self.bytes_found += block.stop - block.start
                self._count(arrival, number, block.stop - block.start)
            else:
                missing.append(number)
        return missing

    def _is_there(self, arrival: Arrival, number: int, value: int) -> bool:
        if value == ABSENT:
            return False
        if value == GIVEN:
            return True
        if value == DOUBTED:
            return self._is_sound(arrival, number)
        # what another process has verified while we are at it is taken; what lay there before is looked at again
        if self.verify and (value != VERIFIED or arrival.old[number]):
            return self._is_sound(arrival, number)
        return True

    def _is_sound(self, arrival: Arrival, number: int) -> bool:
        """Compare a block that is there with its digest, and say in the map what came of it."""
        try:
            arrival.block(number).check()
        except IntegrityError:
            arrival.landing.mark(number, ABSENT)
            arrival.old[number] = ABSENT
            return False
        arrival.landing.mark(number, VERIFIED)
        return True

    def _get(self, arrival: Arrival, first: int, last: int, scratch: memoryview, *, tries: int) -> None:
        """Fetch blocks [first, last), and those of them again that come with wrong bytes."""

        def landed(number: int, nbytes: int) -> None:
            with self._changed:
                self.bytes_fetched += nbytes
            self._count(arrival, number, nbytes)

        sink = LandingSink(
            arrival.landing,
            arrival.blocks[first - 1 : last - 1],
            first,
            verify=self.verify,
            scratch=scratch,
            landed=landed,
            stopped=self._check_stop,
        )
        found = self.store.get(arrival.key, arrival.block(first).start, sink, version=arrival.version)
        with self._changed:  # threads that began without one may each have met another
            if arrival.version not in (None, found):
                raise changed(self.store, arrival.key)
            arrival.version = found
        for number in sink.bad:
            if tries == 1:
                block = arrival.block(number)
                raise IntegrityError(
                    f"{where(self.store, arrival.key)}: tensor {quote(block.piece.name)}: block {block.index} (bytes "
                    f"{block.start} to {block.stop}) does not match its digest, {TRIES} times: the copy that lies "
                    "there is damaged; put it there again"
                )
            self._get(arrival, number, number + 1, scratch, tries=tries - 1)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _count(self, arrival: Arrival, number: int, nbytes: int) -> None:
        with self._changed:
            arrival.done[number] = 1
            self._changed.notify_all()
        self._progress(nbytes)
