"""A launcher starts who is missing, once, and nobody who is not to come; words and plans name what there is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shardprep.cli.launching import TRANSPORTS
from shardprep_runtime.errors import InputError, IntegrityError, WorkerError
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.failures import Failure
from shardprep_runtime.workers.kinds import KINDS, LINKS, RPC, kind_named
from shardprep_runtime.workers.launchers.crew import Crew, Starter
from shardprep_runtime.workers.launchers.elsewhere import Elsewhere
from shardprep_runtime.workers.launchers.launcher import Started
from shardprep_runtime.workers.launchers.words import LAUNCHERS
from shardprep_runtime.workers.worker import WorkerOptions
from shardprep_runtime.workers.worker_process import WorkerJob

OPTIONS = WorkerOptions(shard_set=open_set("nowhere"), stages=((0, 1), (1, 2)))


class Fake(Started):
    """A process that says what the test has it say."""

    def __init__(self, job: WorkerJob) -> None:
        super().__init__(job, None)
        self.said: list[str | Failure] = []
        self.is_killed = False
        self._over = threading.Event()
        self._how: str | None = None

    def messages(self) -> Iterator[str | Failure]:
        self._over.wait(60)
        yield from self.said

    def has_ended(self) -> bool:
        return self._over.is_set()

    def how(self) -> str | None:
        return self._how

    def kill(self) -> None:
        self.is_killed = True
        self._over.set()

    def wait(self, timeout: float) -> bool:
        return self.has_ended()

    def ends(self, *said: str | Failure, how: str | None = None) -> None:
        self.said, self._how = list(said), how
        self._over.set()
        assert self.reader is not None
        self.reader.join(60)


class Crewed:
    """A crew of fakes, and a transport that says who has joined."""

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        self.fakes: list[Fake] = []
        self.said: list[str] = []
        self.joined: dict[str, int | None] = {}
        self.tell_lost: Callable[[str, str], None] = lambda *_: None
        meeting: Any = SimpleNamespace(address="127.0.0.1:1", end=lambda: None)
        options = WorkerOptions(
            shard_set=OPTIONS.shard_set, stages=OPTIONS.stages, tensor_parallel_size=tensor_parallel_size
        )
        self.crew = Crew(options, self.said.append, Starter("127.0.0.1", self._start), meeting, "a secret")
        self.crew.reach(cast(Any, self))

    def _start(self, job: WorkerJob, secret: str) -> Fake:
        assert secret == "a secret"
        self.fakes.append(Fake(job))
        return self.fakes[-1]

    def workers(self) -> Mapping[str, Any]:
        return {name: SimpleNamespace(pp_rank=pp_rank) for name, pp_rank in self.joined.items()}

    def watch(self, lost: Callable[[str, str], None]) -> None:
        self.tell_lost = lost

    @property
    def names(self) -> list[str]:
        return [each.worker for each in self.fakes]


@pytest.fixture
def crewed() -> Iterator[Crewed]:
    found = Crewed()
    yield found
    found.crew.close()


def test_the_words_of_the_command_line_are_those_that_name_launchers() -> None:
    assert tuple(LAUNCHERS) == TRANSPORTS


def test_a_kind_is_found_by_its_name_and_no_other() -> None:
    assert {name: kind_named(name) for name in KINDS} == {"links": LINKS, "rpc": RPC}
    assert (LINKS.details(3), dict(RPC.details(3))) == ({}, {"world_size": 4})
    with pytest.raises(InputError, match="the transport pigeons; this version knows links and rpc"):
        kind_named("pigeons")


def test_workers_from_elsewhere_have_a_secret_that_people_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDPREP_SECRET", raising=False)
    with pytest.raises(InputError, match="SHARDPREP_SECRET is not set"):
        Elsewhere().chosen_secret()
    monkeypatch.setenv("SHARDPREP_SECRET", "said in the environment")
    assert Elsewhere().chosen_secret() == "said in the environment"
    assert Elsewhere(secret="said to the launcher").chosen_secret() == "said to the launcher"
    with Elsewhere().ready(OPTIONS, 2, None) as starter:
        assert starter.start is None


def test_a_worker_that_is_on_its_way_is_not_started_twice(crewed: Crewed) -> None:
    crewed.crew.start(1)
    crewed.crew._replace(1)
    assert crewed.names == ["stage-1"]
    crewed.joined["stage-1"] = 1
    del crewed.joined["stage-1"]  # it was there, and is lost
    crewed.tell_lost("stage-1", "it has ended")
    crewed.crew._replace(1)
    assert crewed.names == ["stage-1", "stage-1-2"]
    assert crewed.fakes[0].is_killed  # it may hang, and hold the stage's memory
    crewed.crew._replace(1)
    assert crewed.names == ["stage-1", "stage-1-2"]


def test_spares_are_started_for_those_that_were_used_and_no_more(crewed: Crewed) -> None:
    crewed.crew.spares = 2
    for _ in range(2):
        crewed.crew._start_spares()
    assert crewed.names == ["spare", "spare-2"]
    crewed.joined |= {"spare": None, "spare-2": None}
    crewed.crew._start_spares()
    assert len(crewed.names) == 2
    crewed.joined["spare"] = 1  # was promoted
    crewed.crew._start_spares()
    assert crewed.names == ["spare", "spare-2", "spare-3"]
    crewed.crew.stop()
    crewed.crew._start_spares()
    assert len(crewed.names) == 3


def test_what_a_worker_has_failed_with_is_raised_with_its_name(crewed: Crewed) -> None:
    crewed.crew.start(0)
    crewed.crew.check()
    crewed.fakes[0].ends("stage-0: begins", Failure("IntegrityError", "a part is damaged"))
    assert crewed.said == ["stage-0: begins", "stage-0: a part is damaged"]
    assert crewed.crew.workers == {}
    with pytest.raises(IntegrityError, match=r"^stage-0: a part is damaged$"):
        crewed.crew.check()


def test_one_that_ends_without_a_word_says_how(crewed: Crewed) -> None:
    crewed.crew.start(0)
    crewed.fakes[0].ends(how="by signal 9")
    with pytest.raises(WorkerError, match=r"^stage-0: its process has ended by signal 9$"):
        crewed.crew.check()


def test_tensor_ranks_end_together() -> None:
    crewed = Crewed(tensor_parallel_size=2)
    crewed.crew.start(0)
    assert [len(ranks) for ranks in crewed.crew.workers.values()] == [2]
    crewed.fakes[1].ends(how="by signal 9")
    assert crewed.fakes[0].is_killed
    crewed.crew.close()


def test_nobody_is_started_after_the_end(crewed: Crewed) -> None:
    crewed.crew.close()
    with pytest.raises(WorkerError, match="has ended"):
        crewed.crew.start(0)
