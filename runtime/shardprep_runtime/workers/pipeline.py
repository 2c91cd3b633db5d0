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
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Final

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
from .policy import Event, EventKind, Policy
from .route import Key, Loss, Losses, Mender, Pipe, Route, key_of
from .transport import Health, Output, Step, Transport, WorkerInfo

if TYPE_CHECKING:
    import torch

EVENTS: Final = 1000
"""How many of them are remembered."""

CACHE_LOSSES: Final = 3
"""After which a sequence that loses its caches in one and the same step, while no worker is lost, is given up."""


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
        if (stages if isinstance(stages, int) else len(stages)) < 1:
            raise InputError("a pipeline needs at least one stage")
        self._on_event = on_event
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
        self._losses = Losses(self._changed)
        self._digests: dict[Key, str] = {}  # by worker, what its first probe gave
        self._fallback_users = 0

        own = Route(transport, (), ())
        self._mender = Mender(
            Pipe(
                policy=self.policy,
                prove=lambda name, timeout: self._ask(own, name, probe=True, timeout=timeout),
                allow=self._allow,
                tell=self._tell,
                sleep=self._sleep,
                open_fallback=fallback,
                replace=replace,
            ),
            transport,
            stages,
            self._losses,
        )
        self._route = self._mender.own_route()  # where a stage has no worker yet, the first step sees to it

        self._look = threading.Event()
        transport.watch(self._on_lost)
        self._overseer = threading.Thread(target=self._oversee, name="shardprep-pipeline", daemon=True)
        self._overseer.start()

    # ------------------------------------------------------------------------------------------------- what others see
    @property
    def pipeline_parallel_size(self) -> int:
        return len(self._mender.holders)

    @property
    def manifest_digest(self) -> str | None:
        """Digest of the manifest that all workers hold; None as long as there is none."""
        return self._mender.manifest_digest

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
            return self._route is not None and self._route.transport is self._mender.fallback

    @property
    def sequences(self) -> int:
        """How many sequences are open."""
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
            fallback, self._mender.fallback = self._mender.fallback, None
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
                loss = self._losses.known.get(name)
                if loss is not None:
                    raise WorkerLostError(loss.why, worker=name, is_certain=loss.is_certain)
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
            self._losses.doubted.difference_update(route.keys)
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
            first = self._digests.setdefault(key_of(health.info), health.probe)
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
            self._losses.known[worker] = Loss(why, is_certain=True)
            running = [each for each, route in self._running.items() if worker in route.names]
        for outcome in running:
            _settle(outcome, error=WorkerLostError(why, worker=worker, is_certain=True))
        self._look.set()

    def _report(self, route: Route, worker: str, loss: Loss) -> None:
        """Say that a worker of `route` is lost, or whoever of it where none of this name is on it."""
        with self._changed:
            if self._route is not route and route.transport is not self._mender.fallback:
                return  # that was seen to meanwhile
            if worker not in route.names:
                loss = Loss(loss.why, is_certain=False, is_named=False)
            for name in (worker,) if loss.is_named else route.names:
                self._losses.report(name, loss, is_mending=self._mending)

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
        return self._route is not None and self._losses.concern(self._route.names)

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
                is_here = held is not None and held.transport is self._mender.fallback
                if held is not None and is_here and not self._losses.concern(held.names):
                    found = held
                elif self._route is not None and not self._has_loss():
                    found = self._route
                if found is not None:
                    if user is not None:  # under the same lock: what it uses is not closed meanwhile
                        was = held is not None and held.transport is not self.transport
                        self._fallback_users += int(found.transport is not self.transport) - int(was)
                    return found
                self._begin_mending()
            self._mend(self._mender.find_route)

    def _begin_mending(self) -> None:
        """Holds the lock."""
        self._mending = True
        self._losses.dealt.clear()

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
                    self._losses.part_with(info)
                    self._tell("dropped", info.name, None, 0, str(error))
        self._ready()

    def _restore(self) -> None:
        """Go back to the transport's workers where each stage can have one again."""
        mender = self._mender
        free = mender.free()
        held = {info.pp_rank for info in free}
        gaps = [stage for stage, holder in enumerate(mender.holders) if holder is None and stage not in held]
        if len(gaps) > sum(info.pp_rank is None for info in free):
            return
        with self._changed:
            if self._mending or self._closed:
                return
            self._begin_mending()
            present = self._route

        def find() -> Route | None:
            mender.sort_out([])
            if mender.fill([]):
                return present
            found = mender.own_route()
            self._tell("restored", None, None, 0, "all stages have workers again")
            return found

        self._mend(find)
        self._let_go()

    def _let_go(self) -> None:
        """Close the transport of this process where nobody needs it any more."""
        with self._changed:
            found = self._mender.fallback
            if found is None or self._fallback_users or self._mending:
                return
            if self._route is not None and self._route.transport is found:
                return
            self._mender.fallback = None
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
        """What the last step gave."""
        self.seconds = 0.0
        """What it took."""
        self.recovery = 0.0
        """What the last `feed` took beside: losses, and sending all positions again."""

    @property
    def positions(self) -> int:
        """How many positions are computed, or can be built upon as if they were."""
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
