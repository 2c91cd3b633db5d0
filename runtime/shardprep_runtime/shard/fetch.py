"""Bring the blocks of a view from a store to where they land, in the order in which they will be wanted, each once.

Several processes of a host may fetch into the same files at once. How a fetch goes:

1. `open_arrivals` opens each part. Its header is read where it landed, or fetched: without a claim, so perhaps twice.
2. `plan_runs` joins wanted blocks that lie beside each other to runs of at most 16 MiB, most urgent first.
3. Each thread takes the most urgent run that is left, and reads in the part's map which of its blocks are missing.
4. It claims them in the map (landing.py). If another fetch is at any of them, the run is put aside for 20 ms.
5. Under the claim it reads the map again, and fetches what is still missing: up to three times, where bytes are wrong.
6. It releases the claim. Each block wakes those who wait for it as soon as it is there.
7. `close` stops all threads; the last of them closes the parts, their landings and the store.

Threads of one fetch share the claims of a landing, and never meet: the queue hands each run to one of them. The
condition `_changed` guards queue and counts. A thread may take it while it holds a claim, never the other way round,
and no request is made under it. What a crash leaves is told in landing.py: claims end, marked blocks stay.

A forked process has none of these threads, and `_changed` may be held in it for ever. So it never waits: it reads the
map, and refuses where a block is missing. Nor can it see that its parent joined a tensor and gave the pieces' memory
back. So `give_back` marks the blocks GIVEN before it frees them. The child joins first and looks at the marks
afterwards: a copy that may hold zeros is refused.
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
"""Bytes of one request, as S3's performance guidelines advise (8 to 16 MB). A longer block is a request of its own."""

WORKERS: Final = 16
"""Connections to a store: S3 gives each 85 to 90 MB/s."""

TRIES: Final = 3
"""How often something is asked for whose bytes do not match their digest."""

LOOK_AGAIN: Final = 0.02
"""Seconds between looks at what another process is fetching."""


class Crew(Protocol):
    """Processes that help a fetch (fetch_processes.py)."""

    def start(self, fetch: Fetch) -> None:
        """Have the processes fetch the runs of `fetch` too."""

    def stop(self) -> None:
        """End the processes; returns once none of them writes any more."""


class _Stopped(Exception):  # noqa: N818 - not an error: nobody wants the bytes any more
    """The fetch was closed."""


class Arrival(Numbered):
    """A part that is being fetched: open already, while its bytes land."""

    def __init__(self, part: OpenPart, landing: Landing, key: str, version: str | None) -> None:
        """Note what is there already.

        Args:
            part: The part, open on the landing's data.
            landing: Where its bytes land.
            key: Key of its object in the store.
            version: Version of the object that the header was read of; None: the header came from the landing.
        """
        super().__init__(part)
        self.landing, self.key = landing, key
        self.version = version
        """Version of the object that every range must be of; None: not known yet."""
        self.old = landing.state(len(self.blocks))
        """The map as it was when this began, by number; a block that turns out damaged becomes ABSENT here."""
        self.done = bytearray(1 + len(self.blocks))
        """1 for each block that this process may hand out, by number."""

    def missing(self, run: Run) -> list[tuple[int, int]]:
        """The bytes [start, stop) of each block of a run that was not there when this began."""
        blocks = (self.block(n) for n in range(run.first, run.last) if not self.old[n])
        return [(block.start, block.stop) for block in blocks]

    def bytes_there(self) -> int:
        """Bytes of the header and the blocks that were there when this began."""
        there = (block for block, value in zip(self.blocks, self.old[1:], strict=True) if value)
        return self.part.part.header_size + sum(block.stop - block.start for block in there)

    def give_back(self, piece: PieceSpan) -> None:
        """Free the memory of a piece of which there is a copy now.

        The map says so first: a forked process that copies the same memory must learn that it may have read zeros.
        """
        for number in self.numbers(piece.span.start, piece.span.stop):
            self.landing.mark(number, GIVEN)
        self.landing.forget(piece.span.start, piece.span.stop)

    def is_given(self, piece: PieceSpan) -> bool:
        """Whether `give_back` of the piece has begun, in this process or the one that it was forked from."""
        state = self.landing.state(len(self.blocks))
        return any(state[n] == GIVEN for n in self.numbers(piece.span.start, piece.span.stop))


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [first, last) of a part, by number, which are asked for at once."""

    arrival: Arrival
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.arrival.block(self.last - 1).stop - self.arrival.block(self.first).start


def plan_runs(wanted: Iterable[tuple[Arrival, int, int]]) -> list[Run]:
    """Join the wanted blocks to runs of at most RUN_BYTES, each block once.

    Args:
        wanted: (part, start, stop): bytes [start, stop) of each part, most urgent first; they may overlap.

    Returns:
        The runs, in the order of the most urgent block of each.
    """
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
    """Open parts that arrive, and fetch the headers that are missing.

    Args:
        store: Has the parts.
        parts: (part, its key in the store, where it lands). The landings are taken over: all are closed if this fails.
        manifest: The set's manifest.
        check_digest: Compare each header with its digest in the manifest.
        workers: Headers that are fetched at a time.

    Returns:
        The open parts, in the same order. The caller closes their `part` and their `landing`.

    Raises:
        IntegrityError: Where a header comes with wrong bytes, TRIES times.
        FormatError, ManifestError: Where a header is not that of a part of this set.
        StoreError, WriteError: Where a header cannot be fetched, or kept.
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
    """The header of a part, and the version of the object that it was fetched of; None where it had landed already."""
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
    """Runs that threads of this process fetch, from `start` until all are there, one fails, or `close`."""

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
            store: Has the parts. Whoever made it closes it, once no thread reads.
            arrivals: The parts that runs are of.
            runs: What to fetch, most urgent first.
            verify: Compare every block with its digest, also those that were there before.
            workers: Threads, each with a connection of its own.
            progress: Is told the size in bytes of each block that is there, from several threads.
            crew: Processes that fetch the same runs.
        """
        self._crew, self._process = crew, os.getpid()
        self.store, self.arrivals, self.runs = store, tuple(arrivals), tuple(runs)
        self.verify, self.workers, self._progress = verify, workers, progress
        self._queue = deque(runs)
        self._held: deque[tuple[float, Run]] = deque()
        """Runs that others are at, and when (time.monotonic) to look at each again; the earliest is first."""
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._active = 0
        self._then: Callable[[], None] | None = None
        self.bytes_fetched = 0
        """Bytes of blocks that this process has brought."""

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
        """Return once some bytes of a part are there.

        Args:
            arrival: The part.
            start: First byte of the part.
            stop: One past the last byte.

        Raises:
            ShardprepError: What ended the fetch, if it ended before.
            SourceError: If the fetch was closed before, or if this process was forked before they were there.
        """
        self._wait(arrival, arrival.numbers(start, stop))

    def wait_all(self) -> None:
        """Return once everything is there. Raises what `wait` raises."""
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
        """Whether this process was forked from the one that fetches: no thread of the fetch runs here."""
        return os.getpid() != self._process

    def _look(self, arrival: Arrival, numbers: range) -> None:
        """Prove by the map that blocks are there, without waiting: in a fork `_changed` may be held for ever."""
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
        """Stop, and return once no thread and no process of the crew writes any more."""
        if self.elsewhere:
            return
        self._end()
        with self._changed:
            self._changed.notify_all()
            while self._active:
                self._changed.wait()

    def close(self, then: Callable[[], None]) -> None:
        """Stop, without waiting for threads.

        Args:
            then: Is called once no thread writes any more: here and now, or by the last thread as it ends.
        """
        if self.elsewhere:
            then()
            return
        self._end()
        with self._changed:
            self._changed.notify_all()
            if self._active:
                self._then = then
                return
        then()

    def _end(self) -> None:
        self._stop.set()
        if self._crew is not None:
            self._crew.stop()

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
        """The most urgent run that is left, or one that others held LOOK_AGAIN ago; None where nothing is left."""
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
            missing = self._missing(run)  # whoever held them before may have brought some
            for i, number in enumerate(missing):
                if i == 0 or missing[i - 1] != number - 1:
                    begin = number
                if i + 1 == len(missing) or missing[i + 1] != number + 1:
                    self._get(arrival, begin, number + 1, scratch, tries=TRIES)
        finally:
            arrival.landing.release(first, last)

    def _missing(self, run: Run) -> list[int]:
        """The numbers of a run's blocks that are not there. The others are checked where they must be, and counted."""
        arrival = run.arrival
        state = arrival.landing.state(len(arrival.blocks))
        missing = []
        for number in range(run.first, run.last):
            if arrival.done[number]:
                continue
            if self._is_there(arrival, number, state[number]):
                self._count(arrival, number, fetched=False)
            else:
                missing.append(number)
        return missing

    def _is_there(self, arrival: Arrival, number: int, value: int) -> bool:
        """Whether a block can be handed out: by what the map says, `value`, and by its digest where in doubt."""
        if value in (ABSENT, GIVEN):
            return value == GIVEN
        # what another process has verified meanwhile is believed; what lay there before is verified once more
        doubted = value == DOUBTED or (self.verify and (value != VERIFIED or arrival.old[number]))
        return not doubted or self._is_sound(arrival, number)

    def _is_sound(self, arrival: Arrival, number: int) -> bool:
        """Compare a block that is there with its digest, and mark it VERIFIED or ABSENT."""
        try:
            arrival.block(number).check()
        except IntegrityError:
            arrival.landing.mark(number, ABSENT)
            arrival.old[number] = ABSENT
            return False
        arrival.landing.mark(number, VERIFIED)
        return True

    def _get(self, arrival: Arrival, first: int, last: int, scratch: memoryview, *, tries: int) -> None:
        """Fetch blocks [first, last) at once, then each that came with wrong bytes: `tries` times in all."""
        sink = LandingSink(
            arrival.landing,
            arrival.blocks[first - 1 : last - 1],
            first,
            verify=self.verify,
            scratch=scratch,
            landed=lambda number, _: self._count(arrival, number, fetched=True),
            stopped=self._check_stop,
        )
        found = self.store.get(arrival.key, arrival.block(first).start, sink, version=arrival.version)
        with self._changed:  # threads that began without a version may each have met another one
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

    def _count(self, arrival: Arrival, number: int, *, fetched: bool) -> None:
        block = arrival.block(number)
        nbytes = block.stop - block.start
        with self._changed:
            if fetched:
                self.bytes_fetched += nbytes
            arrival.done[number] = 1
            self._changed.notify_all()
        self._progress(nbytes)
