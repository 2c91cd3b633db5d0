"""Mend a route: find a worker for each stage whose worker is lost.

One thread mends at a time. For each lost worker, in this order:

1. It is asked again, unless its end is certain: three times, with pauses that double. A forward that proves it keeps it.
2. Another worker that holds the stage already takes it, once a forward has proved it.
3. A spare is promoted.
4. Another worker is started, or waited for; it is then found by 2.
5. This process takes over, as far as it may.

Meanwhile others may lose workers and report them, so whoever takes a place is held against new losses alone. What was said
of a worker of that name before it took the place is forgotten (`Losses.forget`). What is reported about the route that is
being mended is not counted twice (`Losses.dealt`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from ..errors import InputError, ProblemError, ShardprepError, WorkerError, WorkerLostError, quote
from ..format.grid import Stages
from .policy import EventKind, Policy
from .transport import Health, Transport, WorkerInfo

LOOK_EVERY: Final = 0.02
"""Seconds between two looks for a worker that is to join."""

Key = tuple[str, str, int]
"""Name, host and process of a worker: one that was restarted under its name is another."""


@dataclass(frozen=True, slots=True)
class Route:
    """Who holds the stages, as far as is known."""

    transport: Transport
    names: tuple[str, ...]
    keys: tuple[Key, ...]

    def leads_as(self, other: Route) -> bool:
        """Whether caches that were made along `other` are where this leads."""
        return self.transport is other.transport and self.keys == other.keys


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known of the loss of a worker."""

    why: str
    is_certain: bool
    is_named: bool = True
    """Whether it is known which worker it is about."""


class Losses:
    """Which workers are lost, as all threads of a pipeline know it. Whoever asks for more than one thing holds `lock`."""

    def __init__(self, lock: threading.Condition) -> None:
        """`lock`: guards this, and what else must be seen together with it."""
        self.lock = lock
        self.known: dict[str, Loss] = {}
        """By name, losses that nobody has dealt with yet."""
        self.dealt: set[str] = set()
        """Names of those with whom the present mending has dealt."""
        self.gone: set[Key] = set()
        """Workers that are not used any more."""
        self.doubted: set[Key] = set()
        """Workers that have answered after a loss, and done no step since."""

    def concern(self, names: Collection[str]) -> bool:
        """Whether any of these workers is lost."""
        with self.lock:
            return not self.known.keys().isdisjoint(names)

    def report(self, name: str, loss: Loss, *, is_mending: bool) -> None:
        """Note a loss that a step has met.

        Args:
            name: The worker that is lost.
            loss: What the step knows of it.
            is_mending: Whether the route is being mended, so that the loss may be an old one.
        """
        with self.lock:
            known = self.known.get(name)
            # of a step that went along the route before this mending began: not of who has taken a place since
            is_old = is_mending and name in self.dealt
            if not is_old and (known is None or not known.is_certain):
                self.known[name] = loss

    def take(self, name: str) -> Loss | None:
        """The loss of a worker, to be dealt with now; None where it is not lost."""
        with self.lock:
            found = self.known.pop(name, None)
            if found is not None:
                self.dealt.add(name)
            return found

    def forget(self, name: str) -> None:
        """What was said of a worker of this name is not about the one that is about to take a place."""
        with self.lock:
            self.known.pop(name, None)
            self.dealt.add(name)

    def part_with(self, info: WorkerInfo) -> None:
        """Use a worker no more."""
        with self.lock:
            self.gone.add(key_of(info))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipe:
    """What a mender needs of the pipeline whose route it is."""

    policy: Policy
    prove: Callable[[str, float | None], Health]
    """Has a worker, by name, prove by a forward that it serves, within so many seconds (None: as long as a probe may
    take). Raises WorkerLostError."""
    allow: Callable[[float], float]
    """So many seconds, and what the steps that are under way may take beside. Wants the lock held."""
    tell: Callable[[EventKind, str | None, int | None, float, str], None]
    """Says what has happened: kind, worker, stage, seconds, why."""
    sleep: Callable[[float], None]
    """Raises WorkerError once the pipeline is closed."""
    open_fallback: Callable[[], Transport] | None
    """Makes a transport in this process, for when no worker can be had."""
    replace: Callable[[int], None] | None
    """Begins to start a worker for a stage."""


class Mender:
    """Knows who holds each stage, and finds others for those that are lost. Only the thread that mends may call it."""

    def __init__(self, pipe: Pipe, transport: Transport, stages: Stages | int, losses: Losses) -> None:
        """Take the workers that are there; where a stage has none yet, the first step sees to it."""
        self._pipe, self._transport, self._losses = pipe, transport, losses
        self._policy = pipe.policy
        self._stages: Stages | None = None if isinstance(stages, int) else stages
        self._unfit: set[tuple[Key, int]] = set()  # spares, and stages that they did not prepare for
        self.fallback: Transport | None = None
        """The transport of this process that has taken over; guarded by the lock of the losses."""
        self.manifest_digest: str | None = None
        """Digest of the manifest that the first worker held; none that holds another is used."""
        self.holders: list[WorkerInfo | None] = [None] * (stages if isinstance(stages, int) else len(stages))
        """The worker of each stage."""
        for info in transport.workers().values():
            if info.pp_rank is None or info.pp_rank >= len(self.holders):
                continue
            self.manifest_digest = self.manifest_digest or info.manifest_digest
            if self.holders[info.pp_rank] is None and self._fits(info, info.pp_rank):
                self.holders[info.pp_rank] = info

    def find_route(self) -> Route:
        """A route without gaps. Raises WorkerError, which says what was tried."""
        tried: list[str] = []
        for _ in range(self._policy.attempts):
            # 1) part with those that are lost; 2) and 3) take who is there; 4) take who comes
            self.sort_out(tried)
            gaps = self.fill(tried)
            if gaps:
                gaps = self._wait_for_replacements(gaps, tried)
            if gaps:
                break
            route = self.own_route()
            if route is not None and not self._losses.concern(route.names):
                return route
            # somebody was lost while others took their places: once more
        # 5) this process
        route = self._fall_back(tried)
        if route is not None:
            return route
        gaps = [stage for stage, holder in enumerate(self.holders) if holder is None]
        if gaps:
            message = f"no worker for {_stages(gaps)}: " + ("; ".join(tried) or "none has joined")
        else:
            message = f"workers were lost {self._policy.attempts} times while others took their places"
        self._pipe.tell("failed", None, gaps[0] if gaps else None, 0, message)
        raise WorkerError(message)

    def own_route(self) -> Route | None:
        """Through the transport's workers; None where a stage has none."""
        holders = [holder for holder in self.holders if holder is not None]
        if len(holders) < len(self.holders):
            return None
        return Route(self._transport, tuple(each.name for each in holders), tuple(map(key_of, holders)))

    # ---------------------------------------------------------------------------------------------------- 1) who is lost
    def sort_out(self, tried: list[str]) -> None:
        """Part with the holders of stages that are lost."""
        for stage, holder in enumerate(self.holders):
            loss = self._losses.take(holder.name) if holder is not None else None
            if holder is None or loss is None:
                continue
            began = time.monotonic()
            if not loss.is_certain:
                if self._is_back(stage, holder, is_named=loss.is_named):
                    continue
                loss = Loss(f"{loss.why}; asked again, without an answer", is_certain=False)
            self.holders[stage] = None
            self._losses.part_with(holder)
            tried.append(f"worker {quote(holder.name)} of stage {stage} is lost ({loss.why})")
            self._pipe.tell("lost", holder.name, stage, time.monotonic() - began, loss.why)

    def _is_back(self, stage: int, holder: WorkerInfo, *, is_named: bool) -> bool:
        """Whether a worker that seemed lost answers a probe."""
        began = time.monotonic()
        with self._losses.lock:
            if key_of(holder) in self._losses.doubted:
                return False  # it has answered before, and then done no step
            deadline = began + self._pipe.allow(self._policy.probe_timeout)
        for number in range(self._policy.retries):
            pause = random.uniform(0, self._policy.first_pause * 2**number)  # noqa: S311 - keeps no secret
            self._pipe.sleep(pause)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                found = self._pipe.prove(holder.name, left)
            except WorkerLostError as error:
                if error.is_certain:
                    break
                continue
            except (ProblemError, InputError):
                continue
            if key_of(found.info) != key_of(holder):
                break  # restarted, and without caches
            with self._losses.lock:
                if is_named:
                    self._losses.doubted.add(key_of(holder))
                self._losses.known.pop(holder.name, None)
            seconds = time.monotonic() - began
            self._pipe.tell(
                "retried", holder.name, stage, seconds, f"answers again, asked {number + 1} times"
            )
            return True
        return False

    # ------------------------------------------------------------------------------------------ 2) and 3) who takes over
    def _fits(self, info: WorkerInfo, stage: int) -> bool:
        """Whether a worker holds this stage of this model."""
        layers = self._stages[stage] if self._stages is not None else None
        return (
            info.pp_rank == stage
            and info.manifest_digest == self.manifest_digest
            and (layers is None or info.layers is None or tuple(info.layers) == tuple(layers))
        )

    def free(self) -> list[WorkerInfo]:
        """Workers that can be asked and hold no stage of the route."""
        used = {key_of(holder) for holder in self.holders if holder is not None}
        if self.manifest_digest is None:
            for info in self._transport.workers().values():
                self.manifest_digest = self.manifest_digest or info.manifest_digest
        with self._losses.lock:
            used |= self._losses.gone
        return [
            info
            for info in self._transport.workers().values()
            if key_of(info) not in used and info.manifest_digest == self.manifest_digest
        ]

    def fill(self, tried: list[str]) -> list[int]:
        """Give each stage without a holder one that is there; the stages for which there is none."""
        return [
            stage
            for stage, holder in enumerate(self.holders)
            if holder is None and not self._take_other(stage, tried) and not self._promote(stage, tried)
        ]

    def _take_other(self, stage: int, tried: list[str]) -> bool:
        """Take a worker that holds the stage already."""
        for info in self.free():
            if not self._fits(info, stage):
                continue
            began = time.monotonic()
            self._losses.forget(info.name)
            try:
                found = self._pipe.prove(info.name, None)
            except (ProblemError, InputError) as error:
                self._drop(info, stage, time.monotonic() - began, str(error), tried)
                continue
            self.holders[stage] = found.info
            seconds = time.monotonic() - began
            self._pipe.tell("replaced", info.name, stage, seconds, "holds the stage, and was proved")
            return True
        return False

    def _promote(self, stage: int, tried: list[str]) -> bool:
        """Have a spare take the stage."""
        for info in self.free():
            if info.pp_rank is not None or (key_of(info), stage) in self._unfit:
                continue
            began = time.monotonic()
            self._losses.forget(info.name)
            try:
                found = self._transport.promote(info.name, stage, timeout=self._policy.promotion_timeout)
                if not self._fits(found, stage):
                    raise WorkerError(f"it was to hold stage {stage}, and holds another or of another model")
            except InputError as error:
                self._unfit.add((key_of(info), stage))
                tried.append(f"spare {quote(info.name)} is not for stage {stage} ({error})")
                continue
            except ProblemError as error:
                self._drop(info, stage, time.monotonic() - began, str(error), tried)
                continue
            self.holders[stage] = found
            self._pipe.tell("promoted", info.name, stage, time.monotonic() - began, "was a spare")
            return True
        return False

    def _drop(self, info: WorkerInfo, stage: int, seconds: float, why: str, tried: list[str]) -> None:
        self._losses.part_with(info)
        tried.append(f"worker {quote(info.name)} was to take stage {stage} and could not ({why})")
        self._pipe.tell("dropped", info.name, stage, seconds, why)

    # --------------------------------------------------------------------------------------------- 4) who is waited for
    def _wait_for_replacements(self, gaps: list[int], tried: list[str]) -> list[int]:
        """Have workers started for these stages, and wait for them; the stages that have none in the end."""
        if not self._transport.can_replace:
            tried.append(f"no spare is left, and {self._transport.name} takes no new workers")
            return gaps
        if self._policy.replacement_timeout <= 0:
            return gaps
        for stage in gaps:
            if self._pipe.replace is not None:
                try:
                    self._pipe.replace(stage)
                except (ShardprepError, OSError) as error:
                    tried.append(f"a worker for stage {stage} could not be started ({error})")
        deadline = time.monotonic() + self._policy.replacement_timeout
        while gaps and time.monotonic() < deadline:
            self._pipe.sleep(LOOK_EVERY)
            gaps = self.fill(tried)
        if gaps:
            tried.append(f"none has joined for {_stages(gaps)} in {self._policy.replacement_timeout:g} s")
        return gaps

    # ---------------------------------------------------------------------------------------------------- 5) this process
    def _fall_back(self, tried: list[str]) -> Route | None:
        """The route through this process; None where there is none."""
        with self._losses.lock:
            old = self.fallback
            if old is not None and self._losses.concern(old.workers().keys()):
                self.fallback = None  # it was lost itself
                for name in old.workers():
                    self._losses.known.pop(name, None)
            else:
                old = None
            found = self.fallback
        if old is not None:
            old.close()
        if found is not None:
            return _route_of(found)
        if self._pipe.open_fallback is None:
            return None
        began = time.monotonic()
        try:
            found = self._pipe.open_fallback()
            route = _route_of(found)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is said beside all else that was tried
            tried.append(f"this process cannot take over ({type(error).__name__}: {error})")
            return None
        with self._losses.lock:
            self.fallback = found
        why = "; ".join(tried) or "no workers"
        self._pipe.tell("fallback", route.names[0], None, time.monotonic() - began, why)
        return route


def key_of(info: WorkerInfo) -> Key:
    """What tells a worker from all others, also from the next one of its name."""
    return info.name, info.host, info.pid


def _route_of(transport: Transport) -> Route:
    """Through all workers of a transport that hold stages. Raises WorkerError where one of the stages is missing."""
    held = sorted(
        (info.pp_rank, info.name, info) for info in transport.workers().values() if info.pp_rank is not None
    )
    if not held or [rank for rank, _, _ in held] != list(range(len(held))):
        raise WorkerError(f"{transport.name}: its workers do not hold all stages")
    return Route(transport, tuple(name for _, name, _ in held), tuple(key_of(info) for _, _, info in held))


def _stages(numbers: list[int]) -> str:
    return ("stage " if len(numbers) == 1 else "stages ") + ", ".join(map(str, numbers))
