"""Send steps through the stages, and carry on when a worker is lost: whose place is taken, and what is sent again.

    with Pipeline(transport, stages) as pipeline, pipeline.sequence() as sequence:
        logits = sequence.feed(prompt)
        while ...:
            logits = sequence.feed(next_token)

Any number of threads feed sequences of their own. Where a worker is lost, one thread mends the route and the others
wait for it: the worker is asked again, unless its loss is certain; another that holds the stage already takes it; a
spare is promoted; a replacement is waited for; a transport in this process takes over. Then each sequence sends all of
its positions again, under a new name: what a stage had of it under the old one, in part, is never built upon.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ..errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    ProblemError,
    ShardprepError,
    WorkerError,
    WorkerLostError,
    quote,
)
from ..format.grid import Stages
from ..stage.stage import Keep
from .transport import Health, Output, Step, Transport, WorkerInfo

if TYPE_CHECKING:
    import torch

LOOK_EVERY: Final = 0.02
"""Seconds between two looks for a worker that is to join."""

EVENTS: Final = 1000
"""That are remembered."""

CACHE_LOSSES: Final = 3
"""After which a sequence that loses its caches in one and the same step, while no worker is lost, is given up."""

EventKind = Literal[
    "lost", "retried", "replaced", "promoted", "dropped", "fallback", "restored", "prefilled", "failed"
]
"""What happened to the route:

    lost       a worker is not used any more
    retried    a worker that seemed lost has answered a probe
    replaced   another worker that holds the stage has taken it
    promoted   a spare has taken the stage
    dropped    a worker that was to take a stage could not; it is not tried again
    fallback   a transport in this process has taken over
    restored   all stages have workers again; new sequences take them
    prefilled  a sequence has sent all of its positions again
    failed     nothing was left to try
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How long to wait, and how often to try. Seconds."""

    step_timeout: float = 30.0
    """Of a step, beside what its positions take and those of the other steps that are under way."""
    position_timeout: float = 0.25
    """More for each of these positions: a long prompt on a slow worker does not count as hung."""
    probe_timeout: float = 5.0
    """Of a probe, and of all that one worker is asked again after a loss that is not certain."""
    probe_period: float = 10.0
    """Between two probes of idle workers; 0: none."""
    retries: int = 3
    """How often a worker is asked again."""
    first_pause: float = 0.05
    """Before that; drawn from 0 to this, which doubles (full jitter)."""
    promotion_timeout: float = 60.0
    replacement_timeout: float = 60.0
    """For which a worker that is to take the place of a lost one is waited for; 0: it is not."""
    attempts: int = 8
    """Losses that one step, and one mending, live through."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the route."""

    time: float
    """Since the epoch."""
    kind: EventKind
    worker: str | None
    stage: int | None
    seconds: float
    """What it took."""
    message: str


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
    why: str
    is_certain: bool
    is_named: bool = True
    """Whether it is known which worker it is about."""


class Pipeline:
    """The stages of a split model as one, whoever holds them. Safe to use from several threads.

    Args:
        transport: What reaches the workers; closed with this.
        stages: Layers [start, stop) of each, or only how many there are.
        fallback: Makes a transport in this process, for when no worker can be had; all of its workers hold stages.
        replace: Begins to start a worker for a stage, which joins the transport later. Does not wait.
        on_event: Is told of each event, in the thread in which it happens; must not raise.
    """

    def __init__(
        self,
        transport: Transport,
        stages: Stages | int,
        policy: Policy | None = None,
        *,
        fallback: Callable[[], Transport] | None = None,
        replace: Callable[[int], None] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.transport = transport
        self.policy = policy or Policy()
        self.stages: Stages | None = None if isinstance(stages, int) else stages
        size = stages if isinstance(stages, int) else len(stages)
        if size < 1:
            raise InputError("a pipeline needs at least one stage")
        self._open_fallback, self._replace, self._on_event = fallback, replace, on_event
        self._prefix = secrets.token_hex(4)  # workers may outlive this
        self._numbers = itertools.count()
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._counters: Counter[str] = Counter()

        self._changed = threading.Condition()  # guards all below
        self._closed = self._draining = False
        self._open = 0  # sequences
        self._running: dict[Future[Output], Route] = {}
        self._positions = 0  # of the steps that run
        self._last_step = time.monotonic()
        self._mending = False
        self._mendings = 0  # that have ended
        self._failure: str | None = None  # of the last
        self._route: Route | None = None
        self._losses: dict[str, Loss] = {}  # that nobody has dealt with yet
        self._dealt: set[str] = set()  # whom the present mending has dealt with
        self._gone: set[Key] = set()  # are not used any more
        self._unfit: set[tuple[Key, int]] = set()  # spares, and stages that they did not prepare for
        self._doubted: set[Key] = set()  # have answered after a loss, but done no step since
        self._digests: dict[Key, str] = {}  # of what their first probe gave
        self._fallback: Transport | None = None
        self._fallback_users = 0

        # what follows is of the one who mends
        self._holders: list[WorkerInfo | None] = [None] * size
        self.manifest_digest: str | None = None
        for info in transport.workers().values():
            if info.pp_rank is not None and info.pp_rank < size and self._holders[info.pp_rank] is None:
                self.manifest_digest = self.manifest_digest or info.manifest_digest
                if self._fits(info, info.pp_rank):
                    self._holders[info.pp_rank] = info
        self._route = self._own_route()  # where a stage has no worker yet, the first step sees to it

        self._look = threading.Event()
        transport.watch(self._on_lost)
        self._overseer = threading.Thread(target=self._oversee, name="shardprep-pipeline", daemon=True)
        self._overseer.start()

    # ------------------------------------------------------------------------------------------------- what others see
    @property
    def pipeline_parallel_size(self) -> int:
        return len(self._holders)

    @property
    def events(self) -> list[Event]:
        """The last of them, oldest first."""
        with self._changed:
            return list(self._events)

    @property
    def counters(self) -> Mapping[str, int]:
        """How often each kind of event happened, and `steps`, `positions`, `probes`, `cache_losses`."""
        with self._changed:
            return dict(self._counters)

    @property
    def route(self) -> tuple[str, ...] | None:
        """Names of the workers that new sequences go through; None: a stage has none at the moment."""
        with self._changed:
            return self._route.names if self._route is not None and not self._has_loss() else None

    @property
    def is_fallback(self) -> bool:
        """Whether new sequences are computed in this process because workers are lost."""
        with self._changed:
            return self._route is not None and self._route.transport is self._fallback

    @property
    def sequences(self) -> int:
        """That are open."""
        with self._changed:
            return self._open

    def workers(self) -> list[WorkerInfo]:
        """Those that can be asked: of the route in order, then spares and others."""
        with self._changed:
            route = self._route
        transport = route.transport if route is not None else self.transport
        found = dict(transport.workers())
        ahead = [found.pop(name) for name in (route.names if route is not None else ()) if name in found]
        return ahead + list(found.values())

    def health(self, *, probe: bool = True) -> list[Health]:
        """What the worker of each stage says of itself; one that is found lost is seen to first. Raises WorkerError."""
        for _ in range(self.policy.attempts):
            route = self._ready()
            try:
                return [self._ask(route, name, probe=probe) for name in route.names]
            except WorkerLostError as error:
                self._report(route, error.worker, Loss(str(error), error.is_certain))
        raise WorkerError(f"workers were lost {self.policy.attempts} times in a row while they were asked")

    @contextlib.contextmanager
    def sequence(self) -> Iterator[OpenSequence]:
        """A new sequence; its caches are given back at the end."""
        with self._changed:
            self._check_open()
            if self._draining:
                raise WorkerError("this model is being drained: it takes no more sequences")
            self._open += 1
        found = OpenSequence(self)
        try:
            yield found
        finally:
            found._end()
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more sequences, and wait until the open ones have ended; False: some have not, `timeout` seconds on."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """End the workers. Steps that are under way raise WorkerError."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            running = list(self._running)
            self._changed.notify_all()
        for outcome in running:
            _settle(outcome, error=WorkerError("the pipeline was closed"))
        self._look.set()
        self.transport.close()  # what a mending waits for ends with it
        self._overseer.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._mending)
            fallback, self._fallback = self._fallback, None
        if fallback is not None:
            fallback.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- steps
    def _step(self, route: Route, step: Step, inputs: torch.Tensor) -> Output:
        """What the step gives. Raises what the transport does, and WorkerLostError as soon as any worker on the way is
        known to be lost."""
        outcome: Future[Output] = Future()
        positions = inputs.numel()
        with self._changed:
            self._check_open()
            for name in route.names:
                if name in self._losses:
                    raise WorkerLostError(
                        self._losses[name].why, worker=name, is_certain=self._losses[name].is_certain
                    )
            self._running[outcome] = route
            self._positions += positions
            timeout = self._allow(self.policy.step_timeout)
        try:
            asked = route.transport.step(route.names, step, inputs, timeout=timeout)
            asked.add_done_callback(lambda done: _settle(outcome, done))
            # the transport ends what hangs; this only guards against one that does not
            patience = None if self._is_local(route) else timeout + self.policy.probe_timeout
            try:
                found = outcome.result(patience)
            except TimeoutError:
                raise WorkerLostError(
                    f"a step got no answer in {timeout:g} seconds, and nobody said why", worker=""
                ) from None
        finally:
            with self._changed:
                del self._running[outcome]
                self._positions -= positions
                self._last_step = time.monotonic()
        with self._changed:
            self._counters["steps"] += 1
            self._counters["positions"] += positions
            self._doubted.difference_update(route.keys)
        return found

    def _allow(self, seconds: float) -> float:
        """`seconds` and what all positions that are under way may take. Holds the lock."""
        return seconds + self._positions * self.policy.position_timeout

    def _is_local(self, route: Route) -> bool:
        """Whether it leads through this process alone, where nothing is lost, and a model on disk takes its time."""
        return route.transport.name == "local"

    def _ask(self, route: Route, name: str, *, probe: bool, timeout: float | None = None) -> Health:
        """The health of a worker of the route. Raises WorkerLostError where it serves what it must not, too."""
        if timeout is None:
            with self._changed:
                timeout = self._allow(self.policy.probe_timeout)
        try:
            found = route.transport.health(name, probe=probe, timeout=timeout)
            if probe:
                self._compare(found)
        except IntegrityError as error:
            raise WorkerLostError(f"{error}", worker=name, is_certain=True) from error
        return found

    def _compare(self, health: Health) -> None:
        """Raises IntegrityError where a worker no longer computes what it did."""
        with self._changed:
            self._counters["probes"] += 1
            if health.probe is None:
                return
            first = self._digests.setdefault(_key(health.info), health.probe)
        if first != health.probe:
            raise IntegrityError(
                f"worker {quote(health.info.name)}: the same forward gave {quote(health.probe)} and "
                f"{quote(first)} before; its memory or its device is damaged"
            )

    # ------------------------------------------------------------------------------------------------------- losses
    def _on_lost(self, worker: str, why: str) -> None:
        """What the transport calls; perhaps with locks of its own held."""
        with self._changed:
            if self._closed:
                return
            self._losses[worker] = Loss(why, is_certain=True)
            running = [each for each, route in self._running.items() if worker in route.names]
        for outcome in running:
            _settle(outcome, error=WorkerLostError(why, worker=worker, is_certain=True))
        self._look.set()

    def _report(self, route: Route, worker: str, loss: Loss) -> None:
        """Say that a worker of `route` is lost, or whoever of it where none of this name is on it."""
        with self._changed:
            if self._route is not route and route.transport is not self._fallback:
                return  # that was seen to meanwhile
            if worker not in route.names:
                loss = Loss(loss.why, is_certain=False, is_named=False)
            for name in (worker,) if loss.is_named else route.names:
                known = self._losses.get(name)
                # of a step that went along the route before this mending began: not of who has taken a place since
                is_old = self._mending and name in self._dealt
                if not is_old and (known is None or not known.is_certain):
                    self._losses[name] = loss

    def _blame(self, route: Route) -> bool:
        """Whether any worker cannot prove that it serves its stage; who cannot counts as lost."""
        is_found = False
        for name in route.names:
            try:
                self._ask(route, name, probe=True)
            except ProblemError as error:
                is_found = True
                is_certain = isinstance(error, WorkerLostError) and error.is_certain
                self._report(route, name, Loss(str(error), is_certain))
        return is_found

    def _has_loss(self) -> bool:
        """Whether the route has one that is to be seen to. Holds the lock."""
        return self._route is not None and not self._losses.keys().isdisjoint(self._route.names)

    def _ready(self, user: OpenSequence | None = None) -> Route:
        """The route for a step; mended first, by one thread, where it has to be. Raises WorkerError where that failed.

        A sequence whose caches are in this process stays there, also once all stages have workers again.
        """
        while True:
            with self._changed:
                self._check_open()
                if self._mending:
                    number = self._mendings
                    while self._mendings == number:
                        self._changed.wait()
                    if self._failure is not None:
                        raise WorkerError(self._failure)
                    continue
                held = user._route if user is not None else None
                found: Route | None = None
                if (
                    held is not None
                    and held.transport is self._fallback
                    and self._losses.keys().isdisjoint(held.names)
                ):
                    found = held
                elif self._route is not None and not self._has_loss():
                    found = self._route
                if found is not None:
                    if user is not None:  # under the same lock: what it uses is not closed meanwhile
                        was = held is not None and held.transport is not self.transport
                        self._fallback_users += int(found.transport is not self.transport) - int(was)
                    return found
                self._begin_mending()
            self._mend(self._find_route)

    def _begin_mending(self) -> None:
        """Holds the lock."""
        self._mending = True
        self._dealt.clear()

    def _mend(self, find: Callable[[], Route | None]) -> None:
        """Have `find` set the route. Raises WorkerError where it does."""
        failure: str | None = "mending was interrupted"
        route: Route | None = None
        try:
            route = find()
            failure = None
        except WorkerError as error:
            failure = str(error)
            raise
        finally:
            with self._changed:
                self._route, self._failure = route, failure
                self._mending = False
                self._mendings += 1
                self._changed.notify_all()

    def _find_route(self) -> Route:
        """A route without gaps. Raises WorkerError, which says what was tried."""
        tried: list[str] = []
        for _ in range(self.policy.attempts):
            self._sort_out(tried)
            gaps = self._fill(tried)
            if gaps:
                gaps = self._wait_for_replacements(gaps, tried)
            if gaps:
                break
            route = self._own_route()
            with self._changed:
                if route is not None and self._losses.keys().isdisjoint(route.names):
                    return route
        route = self._fall_back(tried)
        if route is not None:
            return route
        gaps = [stage for stage, holder in enumerate(self._holders) if holder is None]
        if gaps:
            message = f"no worker for {_stages(gaps)}: " + ("; ".join(tried) or "none has joined")
        else:
            message = f"workers were lost {self.policy.attempts} times while others took their places"
        self._tell("failed", None, gaps[0] if gaps else None, 0, message)
        raise WorkerError(message)

    def _sort_out(self, tried: list[str]) -> None:
        """Part with the holders of stages that are lost."""
        for stage, holder in enumerate(self._holders):
            if holder is None:
                continue
            with self._changed:
                loss = self._losses.pop(holder.name, None)
                if loss is None:
                    continue
                self._dealt.add(holder.name)
            began = time.monotonic()
            if not loss.is_certain:
                if self._is_back(stage, holder, is_named=loss.is_named):
                    continue
                loss = Loss(f"{loss.why}; asked again, without an answer", is_certain=False)
            self._holders[stage] = None
            with self._changed:
                self._gone.add(_key(holder))
            tried.append(f"worker {quote(holder.name)} of stage {stage} is lost ({loss.why})")
            self._tell("lost", holder.name, stage, time.monotonic() - began, loss.why)

    def _is_back(self, stage: int, holder: WorkerInfo, *, is_named: bool) -> bool:
        """Whether a worker that seemed lost answers a probe."""
        began = time.monotonic()
        with self._changed:
            if _key(holder) in self._doubted:
                return False  # it has answered before, and then done no step
            deadline = began + self._allow(self.policy.probe_timeout)
        route = Route(self.transport, (), ())
        for number in range(self.policy.retries):
            pause = random.uniform(0, self.policy.first_pause * 2**number)  # noqa: S311 - keeps no secret
            self._sleep(pause)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                found = self._ask(route, holder.name, probe=True, timeout=left)
            except WorkerLostError as error:
                if error.is_certain:
                    break
                continue
            except (ProblemError, InputError):
                continue
            if _key(found.info) != _key(holder):
                break  # restarted, and without caches
            with self._changed:
                if is_named:
                    self._doubted.add(_key(holder))
                self._losses.pop(holder.name, None)
            seconds = time.monotonic() - began
            self._tell("retried", holder.name, stage, seconds, f"answers again, asked {number + 1} times")
            return True
        return False

    # ---------------------------------------------------------------------------------------------- whose place is taken
    def _fits(self, info: WorkerInfo, stage: int) -> bool:
        """Whether a worker holds this stage of this model."""
        layers = self.stages[stage] if self.stages is not None else None
        return (
            info.pp_rank == stage
            and info.manifest_digest == self.manifest_digest
            and (layers is None or info.layers is None or tuple(info.layers) == tuple(layers))
        )

    def _free(self) -> list[WorkerInfo]:
        """Workers that can be asked and hold no stage of the route."""
        used = {_key(holder) for holder in self._holders if holder is not None}
        if self.manifest_digest is None:
            for info in self.transport.workers().values():
                self.manifest_digest = self.manifest_digest or info.manifest_digest
        with self._changed:
            used |= self._gone
        return [
            info
            for info in self.transport.workers().values()
            if _key(info) not in used and info.manifest_digest == self.manifest_digest
        ]

    def _fill(self, tried: list[str]) -> list[int]:
        """Give each stage without a holder one that is there; the stages for which there is none."""
        return [
            stage
            for stage, holder in enumerate(self._holders)
            if holder is None and not self._take_other(stage, tried) and not self._promote(stage, tried)
        ]

    def _take_other(self, stage: int, tried: list[str]) -> bool:
        """Take a worker that holds the stage already."""
        for info in self._free():
            if not self._fits(info, stage):
                continue
            began = time.monotonic()
            self._forget_loss(info.name)
            try:
                found = self._ask(Route(self.transport, (), ()), info.name, probe=True)
            except (ProblemError, InputError) as error:
                self._drop(info, stage, time.monotonic() - began, str(error), tried)
                continue
            self._holders[stage] = found.info
            self._tell(
                "replaced", info.name, stage, time.monotonic() - began, "holds the stage, and was proved"
            )
            return True
        return False

    def _promote(self, stage: int, tried: list[str]) -> bool:
        """Have a spare take the stage."""
        for info in self._free():
            if info.pp_rank is not None or (_key(info), stage) in self._unfit:
                continue
            began = time.monotonic()
            self._forget_loss(info.name)
            try:
                found = self.transport.promote(info.name, stage, timeout=self.policy.promotion_timeout)
                if not self._fits(found, stage):
                    raise WorkerError(f"it was to hold stage {stage}, and holds another or of another model")
            except InputError as error:
                self._unfit.add((_key(info), stage))
                tried.append(f"spare {quote(info.name)} is not for stage {stage} ({error})")
                continue
            except ProblemError as error:
                self._drop(info, stage, time.monotonic() - began, str(error), tried)
                continue
            self._holders[stage] = found
            self._tell("promoted", info.name, stage, time.monotonic() - began, "was a spare")
            return True
        return False

    def _forget_loss(self, name: str) -> None:
        """What was said of a worker of this name is not about the one that is about to take a place."""
        with self._changed:
            self._losses.pop(name, None)
            self._dealt.add(name)

    def _drop(self, info: WorkerInfo, stage: int, seconds: float, why: str, tried: list[str]) -> None:
        with self._changed:
            self._gone.add(_key(info))
        tried.append(f"worker {quote(info.name)} was to take stage {stage} and could not ({why})")
        self._tell("dropped", info.name, stage, seconds, why)

    def _wait_for_replacements(self, gaps: list[int], tried: list[str]) -> list[int]:
        """Have workers started for these stages, and wait for them; the stages that have none in the end."""
        if not self.transport.can_replace:
            tried.append(f"no spare is left, and {self.transport.name} takes no new workers")
            return gaps
        if self.policy.replacement_timeout <= 0:
            return gaps
        for stage in gaps:
            if self._replace is not None:
                try:
                    self._replace(stage)
                except (ShardprepError, OSError) as error:
                    tried.append(f"a worker for stage {stage} could not be started ({error})")
        deadline = time.monotonic() + self.policy.replacement_timeout
        while gaps and time.monotonic() < deadline:
            self._sleep(LOOK_EVERY)
            gaps = self._fill(tried)
        if gaps:
            tried.append(f"none has joined for {_stages(gaps)} in {self.policy.replacement_timeout:g} s")
        return gaps

    def _fall_back(self, tried: list[str]) -> Route | None:
        """The route through this process; None where there is none."""
        with self._changed:
            old = self._fallback
            if old is not None and not self._losses.keys().isdisjoint(old.workers()):
                self._fallback = None  # it was lost itself
                for name in old.workers():
                    self._losses.pop(name, None)
            else:
                old = None
            found = self._fallback
        if old is not None:
            old.close()
        if found is not None:
            return _route_of(found)
        if self._open_fallback is None:
            return None
        began = time.monotonic()
        try:
            found = self._open_fallback()
            route = _route_of(found)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is said beside all else that was tried
            tried.append(f"this process cannot take over ({type(error).__name__}: {error})")
            return None
        with self._changed:
            self._fallback = found
        self._tell(
            "fallback", route.names[0], None, time.monotonic() - began, "; ".join(tried) or "no workers"
        )
        return route

    def _own_route(self) -> Route | None:
        """Through the transport's workers, where each stage has one."""
        holders = [holder for holder in self._holders if holder is not None]
        if len(holders) < len(self._holders):
            return None
        return Route(self.transport, tuple(each.name for each in holders), tuple(map(_key, holders)))

    # ------------------------------------------------------------------------------------------------------ overseeing
    def _oversee(self) -> None:
        """See to losses, and look for them, while nobody asks for anything."""
        while True:
            noticed = self._look.wait(self.policy.probe_period or None)
            self._look.clear()
            with self._changed:
                if self._closed:
                    return
                route = self._route
                has_loss = self._has_loss()
                is_own = route is not None and route.transport is self.transport
                idle = not self._running and time.monotonic() - self._last_step >= self.policy.probe_period
            # an event has said what went wrong, and who asks next is told
            with contextlib.suppress(ShardprepError):
                if has_loss:
                    self._ready()
                elif route is not None and is_own and idle and not noticed:
                    self._probe_all(route)
                elif not is_own and not noticed:
                    self._restore()

    def _probe_all(self, route: Route) -> None:
        for name in route.names:
            try:
                self._ask(route, name, probe=True)
            except WorkerLostError as error:
                self._report(route, name, Loss(str(error), error.is_certain))
        for info in self.transport.workers().values():
            if info.pp_rank is None and info.name not in route.names:
                try:
                    self.transport.health(info.name, probe=False, timeout=self.policy.probe_timeout)
                except (WorkerLostError, IntegrityError) as error:
                    with self._changed:
                        self._gone.add(_key(info))
                    self._tell("dropped", info.name, None, 0, str(error))
        self._ready()

    def _restore(self) -> None:
        """Go back to the transport's workers where each stage can have one again."""
        free = self._free()
        held = {info.pp_rank for info in free}
        gaps = [stage for stage, holder in enumerate(self._holders) if holder is None and stage not in held]
        if len(gaps) > sum(info.pp_rank is None for info in free):
            return
        with self._changed:
            if self._mending or self._closed:
                return
            self._begin_mending()
            present = self._route

        def find() -> Route | None:
            self._sort_out([])
            if self._fill([]):
                return present
            found = self._own_route()
            self._tell("restored", None, None, 0, "all stages have workers again")
            return found

        self._mend(find)
        self._let_go()

    def _let_go(self) -> None:
        """Close the transport of this process where nobody needs it any more."""
        with self._changed:
            found = self._fallback
            if found is None or self._fallback_users or self._mending:
                return
            if self._route is not None and self._route.transport is found:
                return
            self._fallback = None
        found.close()

    # ----------------------------------------------------------------------------------------------------- bookkeeping
    def _tell(self, kind: EventKind, worker: str | None, stage: int | None, seconds: float, why: str) -> None:
        event = Event(time.time(), kind, worker, stage, seconds, why)
        with self._changed:
            self._counters[kind] += 1
            self._events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def _sleep(self, seconds: float) -> None:
        """Raises WorkerError once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerError("the pipeline is closed")


class OpenSequence:
    """One text, or several of one length, and what the stages hold of it. For one thread at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._name = ""
        self._route: Route | None = None
        self._is_stale = True  # what the stages have of it cannot be built upon
        self._history: torch.Tensor | None = None
        self.trips = 0
        """Steps that came back."""
        self.output: Output | None = None
        """Of the last step."""
        self.seconds = 0.0
        """What it took."""
        self.recovery = 0.0
        """What the last `feed` took beside: losses, and sending all positions again."""

    @property
    def positions(self) -> int:
        """That are computed, or can be built upon as if they were."""
        return self._history.shape[1] if self._history is not None else 0

    def feed(self, ids: torch.Tensor, keep: Keep = "last", *, can_renew: bool = True) -> torch.Tensor:
        """Logits [batch, 1 or positions, vocabulary] after `ids`, [batch, positions], which follow what was fed before.

        Args:
            can_renew: Where a stage does not hold the positions before (CacheLostError), send all of them again.

        Raises:
            InputError: For what the model cannot take.
            WorkerError: Where workers were lost and nobody could take their place, or where one has failed otherwise,
                twice.
        """
        import torch

        if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise InputError(f"ids are {list(ids.shape)} of {ids.dtype}, expected batch x positions of int64")
        if self._history is not None and ids.shape[0] != self._history.shape[0]:
            raise InputError(f"a batch of {ids.shape[0]} follows one of {self._history.shape[0]}")
        began = time.perf_counter()
        policy = self.pipeline.policy
        losses = cache_losses = failures = 0
        while True:
            route = self.pipeline._ready(self)
            if self._is_stale or self._route is None or not self._route.leads_as(route):
                self._renew()
            self._route = route
            try:
                found = self._send(route, ids, keep)
                break
            except WorkerLostError as error:
                self._is_stale = True
                losses += 1
                if losses > policy.attempts:
                    raise WorkerError(
                        f"workers were lost {losses} times in one step; the last time: {error}"
                    ) from error
                self.pipeline._report(route, error.worker, Loss(str(error), error.is_certain))
            except CacheLostError:
                was_whole = self._is_stale
                # a stage that cannot take positions back says the same
                self._is_stale = True
                cache_losses += 1
                with self.pipeline._changed:
                    self.pipeline._counters["cache_losses"] += 1
                if cache_losses > CACHE_LOSSES or (not can_renew and not was_whole):
                    raise
            except (WorkerError, IntegrityError):
                self._is_stale = True
                losses += 1
                if self.pipeline._closed or losses > policy.attempts:
                    raise
                if not self.pipeline._blame(route):
                    failures += 1
                    if failures > 1:
                        raise  # all serve what they must, and fail with this all the same
            except BaseException:
                self._is_stale = True
                raise
        self._history = ids if self._history is None else torch.cat([self._history, ids], 1)
        self.recovery = time.perf_counter() - began - self.seconds if losses or cache_losses else 0.0
        return found.logits

    def rewind(self, positions: int) -> None:
        """Forget all but the first `positions`; the stages do with the next step."""
        if not 0 <= positions <= self.positions:
            raise InputError(f"cannot go back to position {positions} of {self.positions}")
        if self._history is not None and positions < self.positions:
            self._history = self._history[:, :positions] if positions else None

    def _send(self, route: Route, ids: torch.Tensor, keep: Keep) -> Output:
        import torch

        history = self._history
        if not self._is_stale or history is None:
            found = self._step(route, Step(self._name, self.positions, keep), ids)
            self._is_stale = False
            return found
        began = time.monotonic()
        if keep == "last":
            found = self._step(route, Step(self._name, 0), torch.cat([history, ids], 1))
        else:  # nobody wants the logits of all that was there before; they may be gigabytes
            self._step(route, Step(self._name, 0), history)
            found = self._step(route, Step(self._name, history.shape[1], keep), ids)
        self._is_stale = False
        count = history.shape[1]
        self.pipeline._tell("prefilled", None, None, time.monotonic() - began, f"{count} positions again")
        return found

    def _step(self, route: Route, step: Step, ids: torch.Tensor) -> Output:
        began = time.perf_counter()
        self.output = self.pipeline._step(route, step, ids)
        self.seconds = time.perf_counter() - began
        self.trips += 1
        return self.output

    def _renew(self) -> None:
        """Take another name, under which no stage holds anything."""
        self._forget()
        self._name = f"{self.pipeline._prefix}-{next(self.pipeline._numbers)}"
        self._is_stale = True

    def _forget(self) -> None:
        """Have the stages give back what they hold."""
        if self._route is not None and self._name:
            for name in self._route.names:
                self._route.transport.reset(name, self._name)

    def _end(self) -> None:
        if self._route is None:
            return
        if not self.pipeline._closed:
            self._forget()
        if self._route.transport is not self.pipeline.transport:
            with self.pipeline._changed:
                self.pipeline._fallback_users -= 1
            self.pipeline._let_go()


def _settle(
    outcome: Future[Output], done: Future[Output] | None = None, error: Exception | None = None
) -> None:
    """What comes first counts."""
    with contextlib.suppress(InvalidStateError):
        if done is not None and done.cancelled():
            error = WorkerError("the transport has dropped a step")
        elif done is not None:
            failed = done.exception()
            if failed is None:
                outcome.set_result(done.result())
                return
            outcome.set_exception(failed)
            return
        outcome.set_exception(error)


def _key(info: WorkerInfo) -> Key:
    return info.name, info.host, info.pid


def _route_of(transport: Transport) -> Route:
    """Through all workers of a transport that hold stages. Raises WorkerError where one of the stages is missing."""
    held = sorted(
        (info.pp_rank, info.name, info) for info in transport.workers().values() if info.pp_rank is not None
    )
    if not held or [rank for rank, _, _ in held] != list(range(len(held))):
        raise WorkerError(f"{transport.name}: its workers do not hold all stages")
    return Route(transport, tuple(name for _, name, _ in held), tuple(_key(info) for _, _, info in held))


def _stages(numbers: list[int]) -> str:
    return ("stage " if len(numbers) == 1 else "stages ") + ", ".join(map(str, numbers))
