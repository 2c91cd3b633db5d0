"""A pipeline carries on whoever is lost, and says clearly when it cannot; it never gives other tokens, and never hangs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep_runtime.errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    StoreError,
    WorkerError,
    WorkerLostError,
)
from shardprep_runtime.stage.stage import Keep
from shardprep_runtime.workers.pipeline import OpenSequence, Pipeline
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.transport import Health, Output, Step, Timing, Transport, WorkerInfo

VOCABULARY = 61
PROMPT = [3, 1, 4, 1, 5]
QUICK = Policy(
    step_timeout=2,
    position_timeout=0.01,
    probe_timeout=0.2,
    probe_period=0,
    first_pause=0.001,
    promotion_timeout=1,
    replacement_timeout=0.2,
)

Fault = Literal["kill before", "kill behind", "stall", "drop", "forget", "corrupt", "notice"]
"""What befalls a worker with a step: it ends before or after it computes; it hangs for good; a message is lost, and the
worker answers later; it forgets its caches; it serves another model from now on; only the transport notices its end."""

FAULTS: tuple[Fault, ...] = ("kill before", "kill behind", "stall", "drop", "forget", "corrupt", "notice")


@dataclass
class Held:
    """A worker in memory. What its stage computes depends on every position that it was ever given of a sequence."""

    name: str
    pid: int
    pp_rank: int | None
    digest: str = "sha256:a"
    state: Literal["well", "dead", "stalled", "corrupt"] = "well"
    caches: dict[str, list[int]] = field(default_factory=dict)

    def info(self) -> WorkerInfo:
        layers = None if self.pp_rank is None else (2 * self.pp_rank, 2 * self.pp_rank + 2)
        return WorkerInfo(self.name, self.pp_rank, layers, "here", self.pid, self.digest)

    def compute(self, step: Step, values: list[int]) -> list[int]:
        if step.past == 0:
            self.caches[step.sequence] = []
        cached = self.caches.get(step.sequence)
        if cached is None or len(cached) < step.past:
            raise CacheLostError(f"{self.name}: no such sequence")
        del cached[step.past :]
        out = []
        for value in values:
            cached.append(value)
            mixed = 17 + (self.pp_rank or 0)
            for each in cached:
                mixed = (mixed * 31 + each + 7) % 1_000_003
            out.append(mixed)
        return out


class Memory(Transport):
    """Workers in memory, to which things happen at steps that are given beforehand."""

    name = "memory"

    def __init__(
        self,
        stages: int,
        *,
        spares: int = 0,
        faults: Mapping[int, tuple[int, Fault]] | None = None,
        can_replace: bool = False,
        broken_spares: int = 0,
        spare_fault: Fault | None = None,
    ) -> None:
        self.can_replace = can_replace
        self.pids = iter(range(100, 10_000))
        self.held = {f"w{rank}": Held(f"w{rank}", next(self.pids), rank) for rank in range(stages)}
        for number in range(spares):
            self.held[f"spare{number}"] = Held(f"spare{number}", next(self.pids), None)
        self.bad_spares = {f"spare{number}" for number in range(broken_spares)}
        self.spare_fault = spare_fault
        self.spares_for: dict[str, list[int]] = {}
        self.faults = dict(faults or {})
        self.taken = 0
        self.lock = threading.Lock()
        self.threads = ThreadPoolExecutor(8)
        self.noticed: Callable[[str, str], None] | None = None
        self.asked: Counter[str] = Counter()
        self.resets: list[tuple[str, str]] = []
        self.is_closed = False

    def workers(self) -> Mapping[str, WorkerInfo]:
        return {name: held.info() for name, held in self.held.items() if held.state != "dead"}

    def watch(self, lost: Callable[[str, str], None]) -> None:
        self.noticed = lost

    def join(self, name: str, pp_rank: int | None, **more: Any) -> None:
        self.held[name] = Held(name, next(self.pids), pp_rank, **more)

    def kill(self, name: str, *, notice: bool = False) -> None:
        self.held[name].state = "dead"
        self.held[name].caches.clear()
        if notice and self.noticed is not None:
            self.noticed(name, "its connection was closed")

    def step(
        self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
    ) -> Future[Output]:
        return self.threads.submit(self._run, list(route), step, inputs)

    def _run(self, route: list[str], step: Step, inputs: torch.Tensor) -> Output:
        values: list[int] = inputs[0].tolist()
        with self.lock:
            number, self.taken = self.taken, self.taken + 1
            where, fault = self.faults.pop(number, (0, None))
            for place, name in enumerate(route):
                held = self.held[name]
                befalls = fault if place == where % len(route) else None
                if befalls == "kill before":
                    self.kill(name)
                elif befalls == "notice":
                    self.kill(name, notice=True)
                elif befalls == "stall":
                    held.state = "stalled"
                elif befalls == "corrupt":
                    held.state = "corrupt"
                elif befalls == "forget":
                    held.caches.clear()
                if held.state == "dead":
                    raise WorkerLostError(f"{name} has ended", worker=name, is_certain=number % 2 == 0)
                if held.state == "stalled":
                    raise WorkerLostError(f"{name} gave no answer", worker=name)
                if held.state == "corrupt":
                    raise IntegrityError("a block does not match its digest")
                values = held.compute(step, values)
                if befalls == "kill behind":
                    self.kill(name)
                    raise WorkerLostError(f"{name} has ended", worker=name, is_certain=True)
                if befalls == "drop":
                    raise WorkerLostError(f"{name}: an answer was lost", worker=name)
        chosen = torch.tensor(values if step.keep == "all" else values[-1:]) % VOCABULARY
        logits = torch.nn.functional.one_hot(chosen, VOCABULARY)[None].float()
        return Output(logits, tuple(Timing(name, 0.0) for name in route))

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        self.asked[worker] += 1
        held = self.held.get(worker)
        if held is None or held.state == "dead":
            raise WorkerLostError(f"{worker} has ended", worker=worker, is_certain=held is None)
        if held.state == "stalled":
            time.sleep(min(timeout, 0.02))
            raise WorkerLostError(f"{worker} gave no answer", worker=worker)
        if held.state == "corrupt":
            raise IntegrityError(f"{worker}: layer 0 gives something else than the manifest says")
        return Health(held.info(), len(held.caches), probe=f"sha256:{held.pp_rank}" if probe else None)

    def reset(self, worker: str, sequence: str) -> None:
        self.resets.append((worker, sequence))
        if worker in self.held:
            self.held[worker].caches.pop(sequence, None)

    def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
        if worker in self.bad_spares:
            if self.spare_fault == "corrupt":
                raise IntegrityError(f"{worker}: layer 2 gives something else than the manifest says")
            self.kill(worker)
            raise WorkerLostError(f"{worker} has ended", worker=worker, is_certain=True)
        if worker in self.spares_for and pp_rank not in self.spares_for[worker]:
            raise InputError(
                f"stage {pp_rank}: this spare has the shards of stages {self.spares_for[worker]} only"
            )
        self.held[worker].pp_rank = pp_rank
        return self.held[worker].info()

    def close(self) -> None:
        self.is_closed = True
        self.threads.shutdown()


def gold(count: int, stages: int = 3, prompt: Sequence[int] = tuple(PROMPT)) -> list[int]:
    """The tokens of an undisturbed run."""
    workers = [Held("w", 0, rank) for rank in range(stages)]
    ids, found = list(prompt), []
    for _ in range(count):
        values = ids
        for worker in workers:
            values = worker.compute(Step("s", 0), values)
        found.append(values[-1] % VOCABULARY)
        ids.append(found[-1])
    return found


def tokens(sequence: OpenSequence, count: int, prompt: Sequence[int] = tuple(PROMPT)) -> list[int]:
    found: list[int] = []
    given = list(prompt)
    for _ in range(count):
        logits = sequence.feed(torch.tensor([given]))
        given = [int(logits[0, -1].argmax())]
        found += given
    return found


@contextmanager
def opened(transport: Memory, policy: Policy = QUICK, **more: Any) -> Iterator[Pipeline]:
    with Pipeline(transport, ((0, 2), (2, 4), (4, 6)), policy, **more) as found:
        yield found
    assert transport.is_closed


def kinds(pipeline: Pipeline) -> list[str]:
    return [event.kind for event in pipeline.events]


# --------------------------------------------------------------------------------------------------------- one by one
def test_undisturbed_steps_go_through_the_route_once_each() -> None:
    with opened(Memory(3)) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 6) == gold(6)
        assert sequence.trips == 6
        assert sequence.positions == len(PROMPT) + 5
        assert pipeline.counters == {"steps": 6, "positions": len(PROMPT) + 5}
        assert pipeline.events == []
        assert pipeline.route == ("w0", "w1", "w2")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("fault", ["kill before", "kill behind", "stall", "corrupt", "notice"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_spare_takes_the_place_of_a_lost_worker_and_the_tokens_are_the_same(
    stage: int, fault: Fault, at: int
) -> None:
    transport = Memory(3, spares=1, faults={at: (stage, fault)})
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        names = [f"w{rank}" if rank != stage else "spare0" for rank in range(3)]
        assert pipeline.route == tuple(names)
        expected = ["lost", "promoted"] + (["prefilled"] if at else [])
        assert kinds(pipeline) == expected
        assert pipeline.events[0].worker == f"w{stage}"
        assert (pipeline.events[1].worker, pipeline.events[1].stage) == ("spare0", stage)


def test_a_worker_that_answers_again_keeps_its_stage_but_not_the_sequence() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "drop")})
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert pipeline.route == ("w0", "w1", "w2")
        assert kinds(pipeline) == ["retried", "prefilled"]
        assert transport.asked["w1"] == 1


def test_a_worker_that_answers_but_never_does_its_step_is_lost_in_the_end() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "drop"), 4: (1, "drop")})
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert kinds(pipeline) == ["retried", "lost", "promoted", "prefilled"]


def test_a_worker_is_asked_again_at_most_so_many_times() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "stall")})
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 5) == gold(5)
        assert transport.asked["w1"] == QUICK.retries == 3


def test_a_loss_that_is_certain_is_not_asked_about() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "kill behind")})
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 5) == gold(5)
        assert transport.asked["w1"] == 0


@pytest.mark.parametrize("fault", ["kill before", "corrupt"])
def test_a_spare_that_fails_is_dropped_and_the_next_is_tried(fault: Fault) -> None:
    transport = Memory(3, spares=3, faults={3: (1, "kill before")}, broken_spares=2, spare_fault=fault)
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 5) == gold(5)
        assert pipeline.route == ("w0", "spare2", "w2")
        assert kinds(pipeline) == ["lost", "dropped", "dropped", "promoted", "prefilled"]


def test_a_spare_that_did_not_prepare_for_a_stage_is_kept_for_those_it_did() -> None:
    transport = Memory(3, spares=2, faults={3: (1, "kill before"), 6: (2, "kill before")})
    transport.spares_for = {"spare0": [2]}
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert pipeline.route == ("w0", "spare1", "spare0")
        assert kinds(pipeline) == ["lost", "promoted", "prefilled"] * 2


def test_lost_caches_are_sent_again_without_any_mending() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "forget"), 6: (0, "forget")})
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert kinds(pipeline) == ["prefilled", "prefilled"]
        assert pipeline.counters["cache_losses"] == 2


def test_caches_that_are_lost_over_and_over_are_an_error() -> None:
    class Forgetful(Memory):
        def _run(self, route: list[str], step: Step, inputs: torch.Tensor) -> Output:
            if self.taken > 2:
                raise CacheLostError("w1: no such sequence")
            return super()._run(route, step, inputs)

    with (
        opened(Forgetful(3)) as pipeline,
        pipeline.sequence() as sequence,
        pytest.raises(CacheLostError, match="no such sequence"),
    ):
        tokens(sequence, 8)


def test_a_worker_that_fails_once_is_asked_again_and_one_that_fails_twice_has_its_error_raised() -> None:
    class Failing(Memory):
        failures = (2, 5, 6)

        def _run(self, route: list[str], step: Step, inputs: torch.Tensor) -> Output:
            if self.taken in self.failures:
                self.taken += 1
                raise WorkerError("w1: out of memory")
            return super()._run(route, step, inputs)

    with opened(Failing(3)) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 4) == gold(4)
        assert kinds(pipeline) == ["prefilled"]
        with pytest.raises(WorkerError, match="out of memory"):
            tokens(sequence, 1)


def test_a_worker_that_fails_and_cannot_prove_its_stage_is_lost() -> None:
    class Broken(Memory):
        def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
            if worker == "w1":
                raise WorkerError("w1: its tensor ranks have lost each other")
            return super().health(worker, probe=probe, timeout=timeout)

        def _run(self, route: list[str], step: Step, inputs: torch.Tensor) -> Output:
            if "w1" in route and step.past:
                raise WorkerError("w1: its tensor ranks have lost each other")
            return super()._run(route, step, inputs)

    with opened(Broken(3, spares=1)) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 4) == gold(4)
        assert kinds(pipeline) == ["lost", "promoted", "prefilled"]


def test_a_spare_that_cannot_read_its_shard_is_dropped() -> None:
    class Unreadable(Memory):
        def promote(self, worker: str, pp_rank: int, *, timeout: float) -> WorkerInfo:
            if worker == "spare0":
                raise StoreError("spare0: the store cannot be reached")
            return super().promote(worker, pp_rank, timeout=timeout)

    with opened(Unreadable(3, spares=2, faults={2: (1, "kill before")})) as pipeline:
        with pipeline.sequence() as sequence:
            assert tokens(sequence, 4) == gold(4)
        assert kinds(pipeline) == ["lost", "dropped", "promoted", "prefilled"]


def test_a_replacement_is_started_and_waited_for() -> None:
    transport = Memory(3, can_replace=True, faults={3: (1, "kill before")})
    asked: list[int] = []

    def start(stage: int) -> None:
        asked.append(stage)
        threading.Timer(0.05, lambda: transport.join("cold", stage)).start()

    with opened(transport, replace=start) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert asked == [1]
        assert pipeline.route == ("w0", "cold", "w2")
        assert kinds(pipeline) == ["lost", "replaced", "prefilled"]


def test_a_worker_that_was_restarted_under_its_name_is_a_replacement() -> None:
    """As Ray does with an actor."""
    transport = Memory(3, can_replace=True, faults={3: (1, "kill before")})

    def restart(stage: int) -> None:
        threading.Timer(0.05, lambda: transport.join(f"w{stage}", stage)).start()

    with opened(transport, replace=restart) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert pipeline.route == ("w0", "w1", "w2")
        assert kinds(pipeline) == ["lost", "replaced", "prefilled"]


def test_a_replacement_with_another_model_is_not_taken() -> None:
    transport = Memory(3, can_replace=True, faults={3: (1, "kill before")})

    def start(stage: int) -> None:
        transport.join("wrong", stage, digest="sha256:b")

    with (
        opened(transport, replace=start) as pipeline,
        pipeline.sequence() as sequence,
        pytest.raises(WorkerError, match=r"none has joined for stage 1 in 0\.2 s"),
    ):
        tokens(sequence, 8)


def test_a_worker_that_holds_the_stage_already_comes_before_a_spare() -> None:
    transport = Memory(3, spares=1, faults={3: (2, "kill before")})
    transport.join("double", 2)
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 8) == gold(8)
        assert pipeline.route == ("w0", "w1", "double")


def test_nothing_left_is_an_error_that_says_what_was_tried_and_the_next_step_tries_again() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "stall")}, broken_spares=1)
    with opened(transport) as pipeline, pipeline.sequence() as sequence:
        with pytest.raises(WorkerError, match="no worker for stage 1") as caught:
            tokens(sequence, 8)
        message = str(caught.value)
        assert "worker w1 of stage 1 is lost (w1 gave no answer; asked again, without an answer)" in message
        assert "worker spare0 was to take stage 1 and could not (spare0 has ended)" in message
        assert "no spare is left, and memory takes no new workers" in message
        assert kinds(pipeline)[-1] == "failed"
        assert pipeline.route is None
        transport.join("late", None)
        with pipeline.sequence() as another:
            assert tokens(another, 4) == gold(4)


def test_a_transport_in_this_process_takes_over_and_gives_the_stages_back() -> None:
    transport = Memory(3, faults={3: (1, "kill before")})
    local: list[Memory] = []

    def fall_back() -> Transport:
        local.append(Memory(3))
        return local[-1]

    policy = replace(QUICK, probe_period=0.05)
    with opened(transport, policy, fallback=fall_back) as pipeline:
        with pipeline.sequence() as sequence:
            assert tokens(sequence, 8) == gold(8)
            assert pipeline.is_fallback
            assert kinds(pipeline) == ["lost", "fallback", "prefilled"]
            transport.join("late", 1)
            assert wait_for(lambda: not pipeline.is_fallback)
            taken = transport.taken
            assert tokens(sequence, 1, [7]) is not None  # it goes on where its caches are
            assert transport.taken == taken
            assert not local[0].is_closed
            with pipeline.sequence() as another:
                assert tokens(another, 4) == gold(4)
            assert transport.taken == taken + 4
        assert wait_for(lambda: local[0].is_closed)
        assert kinds(pipeline)[3:] == ["replaced", "restored"]
    assert len(local) == 1


def test_a_fallback_that_cannot_be_made_is_said() -> None:
    def fall_back() -> Transport:
        raise MemoryError("no room")

    with (
        opened(Memory(3, faults={2: (0, "kill before")}), fallback=fall_back) as pipeline,
        pipeline.sequence() as sequence,
        pytest.raises(WorkerError, match=r"this process cannot take over \(MemoryError: no room\)"),
    ):
        tokens(sequence, 8)


def test_a_step_that_an_error_of_the_request_ends_reaches_the_caller_unchanged() -> None:
    class Strict(Memory):
        def _run(self, route: list[str], step: Step, inputs: torch.Tensor) -> Output:
            if int(inputs.max()) >= VOCABULARY:
                raise InputError("token 99: this model knows 61")
            return super()._run(route, step, inputs)

    with opened(Strict(3)) as pipeline, pipeline.sequence() as sequence:
        with pytest.raises(InputError, match="token 99: this model knows 61"):
            sequence.feed(torch.tensor([[99]]))
        assert tokens(sequence, 4) == gold(4)
        assert kinds(pipeline) == []


def test_inputs_that_are_no_ids_are_refused() -> None:
    with opened(Memory(3)) as pipeline, pipeline.sequence() as sequence:
        for wrong in (
            torch.zeros(1, 2),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(1, 0, dtype=torch.int64),
        ):
            with pytest.raises(InputError, match="expected batch x positions of int64"):
                sequence.feed(wrong)
        sequence.feed(torch.zeros(1, 2, dtype=torch.int64))
        with pytest.raises(InputError, match="a batch of 2 follows one of 1"):
            sequence.feed(torch.zeros(2, 1, dtype=torch.int64))


def test_positions_that_are_taken_back_are_computed_anew_with_what_follows() -> None:
    with opened(Memory(3, spares=1, faults={3: (1, "kill before")})) as pipeline:
        with pipeline.sequence() as sequence:
            sequence.feed(torch.tensor([PROMPT]))
            sequence.feed(torch.tensor([[9, 9, 9]]), keep="all")
            sequence.rewind(len(PROMPT) + 1)
            again = sequence.feed(torch.tensor([[8, 7]]), keep="all")
            after_loss = sequence.feed(torch.tensor([[6, 5]]), keep="all")
            assert after_loss.shape == (1, 2, VOCABULARY)
            assert kinds(pipeline) == ["lost", "promoted", "prefilled"]
            with pytest.raises(InputError, match="cannot go back to position 11 of 10"):
                sequence.rewind(11)
        with pipeline.sequence() as other:
            whole = other.feed(torch.tensor([[*PROMPT, 9, 8, 7, 6, 5]]), keep="all")
    assert torch.equal(again, whole[:, 6:8])
    assert torch.equal(after_loss, whole[:, 8:])


def test_the_caches_of_a_sequence_are_given_back_under_each_name_it_had() -> None:
    transport = Memory(3, spares=1, faults={3: (1, "kill before")})
    with opened(transport) as pipeline:
        with pipeline.sequence() as sequence:
            tokens(sequence, 8)
        assert all(not held.caches for held in transport.held.values())
        assert len({name for _, name in transport.resets}) == 2


def test_an_idle_worker_that_hangs_is_replaced_before_anybody_asks() -> None:
    transport = Memory(3, spares=1)
    policy = replace(QUICK, probe_period=0.05)
    with opened(transport, policy) as pipeline:
        transport.held["w2"].state = "stalled"
        assert wait_for(lambda: pipeline.route == ("w0", "w1", "spare0"))
        assert kinds(pipeline) == ["lost", "promoted"]


def test_an_idle_worker_whose_end_the_transport_notices_is_replaced_at_once() -> None:
    transport = Memory(3, spares=1)
    with opened(transport) as pipeline:  # probes no idle worker
        transport.kill("w0", notice=True)
        assert wait_for(lambda: pipeline.route == ("spare0", "w1", "w2"))


def test_an_idle_worker_that_computes_something_else_than_before_is_not_used_any_more() -> None:
    transport = Memory(3, spares=1)
    with opened(transport) as pipeline:
        assert [each.probe for each in pipeline.health()] == ["sha256:0", "sha256:1", "sha256:2"]

        def health(worker: str, *, probe: bool, timeout: float) -> Health:
            found = Memory.health(transport, worker, probe=probe, timeout=timeout)
            return replace(found, probe="sha256:other") if worker == "w1" else found

        transport.health = health  # type: ignore[method-assign]
        assert [each.info.name for each in pipeline.health()] == ["w0", "spare0", "w2"]
        assert "the same forward gave sha256:other and sha256:1 before" in pipeline.events[0].message


def test_a_step_under_way_ends_as_soon_as_the_transport_notices_the_loss() -> None:
    """Also where nothing else ends it: its answer never comes."""

    class Silent(Memory):
        def step(
            self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
        ) -> Future[Output]:
            if "w1" in route and step.past:
                return Future()
            return super().step(route, step, inputs, timeout=timeout)

    transport = Silent(3, spares=1)
    with opened(transport, replace(QUICK, step_timeout=1e6)) as pipeline, pipeline.sequence() as sequence:
        threading.Timer(0.1, lambda: transport.kill("w1", notice=True)).start()
        assert tokens(sequence, 5) == gold(5)  # long before a step is given up


def test_a_step_without_any_answer_is_given_up_and_all_workers_are_asked() -> None:
    class Silent(Memory):
        def step(
            self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
        ) -> Future[Output]:
            if "w1" in route and step.past:
                self.held["w1"].state = "stalled"
                return Future()
            return super().step(route, step, inputs, timeout=timeout)

    policy = replace(QUICK, step_timeout=0.1)
    with opened(Silent(3, spares=1), policy) as pipeline, pipeline.sequence() as sequence:
        assert tokens(sequence, 5) == gold(5)
        assert kinds(pipeline) == ["retried", "lost", "retried", "promoted", "prefilled"]


def test_a_long_prompt_and_what_waits_behind_it_have_more_time() -> None:
    seen: list[float] = []

    class Timed(Memory):
        def step(
            self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
        ) -> Future[Output]:
            seen.append(timeout)
            return super().step(route, step, inputs, timeout=timeout)

    policy = replace(QUICK, step_timeout=10, position_timeout=2)
    with opened(Timed(3), policy) as pipeline, pipeline.sequence() as sequence:
        sequence.feed(torch.ones(1, 100, dtype=torch.int64))
        sequence.feed(torch.ones(1, 1, dtype=torch.int64))
    assert seen == [210, 12]


def test_draining_lets_open_sequences_end_and_takes_no_more() -> None:
    with opened(Memory(3)) as pipeline:
        with pipeline.sequence() as sequence:
            assert not pipeline.drain(timeout=0.01)
            with pytest.raises(WorkerError, match="drained"), pipeline.sequence():
                pass
            assert tokens(sequence, 3) == gold(3)
        assert pipeline.drain(timeout=1)


def test_closing_ends_a_step_that_waits() -> None:
    class Silent(Memory):
        def step(
            self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
        ) -> Future[Output]:
            return Future()

    pipeline = Pipeline(Silent(3), 3, replace(QUICK, step_timeout=60))
    threading.Timer(0.1, pipeline.close).start()
    with pytest.raises(WorkerError, match="was closed"), pipeline.sequence() as sequence:
        tokens(sequence, 1)
    with pytest.raises(WorkerError, match="is closed"), pipeline.sequence():
        pass


def test_closing_ends_a_mending_that_waits() -> None:
    transport = Memory(3, can_replace=True, faults={0: (1, "kill before")})
    pipeline = Pipeline(transport, 3, replace(QUICK, replacement_timeout=1e6))
    threading.Timer(0.2, pipeline.close).start()
    with pytest.raises(WorkerError, match="is closed"), pipeline.sequence() as sequence:
        tokens(sequence, 1)


def test_one_thread_mends_while_the_others_wait() -> None:
    transport = Memory(3, spares=1, faults={20: (1, "kill before")})
    with opened(transport) as pipeline:

        def run(first: int) -> list[int]:
            with pipeline.sequence() as sequence:
                return tokens(sequence, 8, [first, 2])

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(run, range(8)))
        assert found == [gold(8, prompt=[first, 2]) for first in range(8)]
        counted = Counter(kinds(pipeline))
        assert counted["lost"] == counted["promoted"] == 1
        assert 1 <= counted["prefilled"] <= 8


def test_a_step_in_which_workers_are_lost_over_and_over_is_given_up() -> None:
    faults: dict[int, tuple[int, Fault]] = dict.fromkeys(range(50), (1, "kill before"))
    with (
        opened(Memory(3, spares=50, faults=faults)) as pipeline,
        pipeline.sequence() as sequence,
        pytest.raises(
            WorkerError, match="workers were lost 9 times in one step; the last time: spare7 has ended"
        ),
    ):
        tokens(sequence, 1)


def test_events_are_told_as_they_happen() -> None:
    told: list[str] = []
    transport = Memory(3, spares=1, faults={2: (1, "kill before")})
    with opened(transport, on_event=lambda event: told.append(event.kind)) as pipeline:
        with pipeline.sequence() as sequence:
            tokens(sequence, 5)
        assert told == kinds(pipeline) == ["lost", "promoted", "prefilled"]
        assert {kind: pipeline.counters[kind] for kind in told} == dict.fromkeys(told, 1)
        assert all(event.seconds >= 0 and event.time > 1e9 for event in pipeline.events)


# ----------------------------------------------------------------------------------------------------- whatever happens
@settings(max_examples=60, deadline=None)
@given(
    faults=st.dictionaries(
        st.integers(0, 40), st.tuples(st.integers(0, 2), st.sampled_from(FAULTS)), max_size=8
    ),
    spares=st.integers(0, 4),
    broken=st.integers(0, 2),
    replaces=st.booleans(),
    falls_back=st.booleans(),
    sequences=st.integers(1, 4),
)
def test_whatever_is_lost_the_tokens_are_the_same_or_there_is_a_clear_error(
    faults: dict[int, tuple[int, Fault]],
    spares: int,
    broken: int,
    replaces: bool,
    falls_back: bool,
    sequences: int,
) -> None:
    transport = Memory(
        3, spares=spares, broken_spares=broken, faults=faults, can_replace=replaces, spare_fault="corrupt"
    )
    started = iter(range(100))

    def start(stage: int) -> None:
        transport.join(f"cold{next(started)}", stage)

    policy = replace(QUICK, replacement_timeout=0.05, probe_timeout=0.05)
    fallback = (lambda: Memory(3)) if falls_back else None
    with opened(transport, policy, fallback=fallback, replace=start if replaces else None) as pipeline:

        def run(first: int) -> list[int] | WorkerError:
            try:
                with pipeline.sequence() as sequence:
                    return tokens(sequence, 8, [first, 2])
            except WorkerError as error:
                return error

        threads = ThreadPoolExecutor(sequences)
        asked = [threads.submit(run, first) for first in range(sequences)]
        found = [each.result(timeout=30) for each in asked]
        threads.shutdown()
        for first, each in enumerate(found):
            if isinstance(each, WorkerError):
                assert not replaces
                assert not falls_back
                assert "no worker for stage" in str(each)
            else:
                assert each == gold(8, prompt=[first, 2])


@settings(max_examples=60, deadline=None)
@given(
    deeds=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(["last", "all"]), st.integers(0, 5)),
        min_size=2,
        max_size=10,
    ),
    faults=st.dictionaries(
        st.integers(0, 20), st.tuples(st.integers(0, 2), st.sampled_from(FAULTS)), max_size=4
    ),
)
def test_logits_are_the_same_whatever_is_fed_taken_back_and_lost(
    deeds: list[tuple[int, Keep, int]], faults: dict[int, tuple[int, Fault]]
) -> None:
    def run(transport: Memory) -> list[torch.Tensor]:
        found = []
        fed = 0
        with (
            opened(transport, replace(QUICK, probe_timeout=0.05)) as pipeline,
            pipeline.sequence() as sequence,
        ):
            for count, keep, taken_back in deeds:
                sequence.rewind(max(0, sequence.positions - taken_back))
                ids = torch.arange(fed, fed + count)[None] % VOCABULARY
                fed += count
                found.append(sequence.feed(ids, keep=keep))
                assert found[-1].shape[1] == (count if keep == "all" else 1)
        return found

    undisturbed = run(Memory(3))
    disturbed = run(Memory(3, spares=6, faults=faults))
    assert all(map(torch.equal, undisturbed, disturbed))


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
