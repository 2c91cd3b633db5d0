"""An error crosses from a worker to the front end as what it is, and nothing else does."""

from __future__ import annotations

import pytest

from shardprep_runtime.errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    MissingError,
    ShardprepError,
    StoreError,
    UnsupportedError,
    WorkerError,
    WorkerLostError,
)
from shardprep_runtime.workers.failures import Failure, again, failure_of, raised, read_failure


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (CacheLostError("s: shorter"), CacheLostError, "stage-1: s: shorter"),
        (IntegrityError("layer 3 differs"), IntegrityError, "stage-1: layer 3 differs"),
        (UnsupportedError("no crop"), UnsupportedError, "no crop"),
        (InputError("token 9"), InputError, "token 9"),
        # another process that this worker had: for the front end this worker has failed, and is there
        (
            WorkerLostError("rank 1 has ended", worker="rank-1"),
            WorkerError,
            "stage-1: rank 1 has ended",
        ),
        (
            RuntimeError("out of memory\n  at #1\n  at #2"),
            WorkerError,
            "RuntimeError: out of memory at #1 at #2",
        ),
        (KeyError(), WorkerError, "stage-1: KeyError"),
    ],
)
def test_an_error_is_the_same_at_the_front_end(
    error: Exception, kind: type[ShardprepError], message: str
) -> None:
    found = raised(failure_of(error), "stage-1")
    assert type(found) is kind
    assert str(found).endswith(message)


def test_facts_of_an_error_come_along() -> None:
    found = raised(failure_of(StoreError("no answer", status=503, code="SlowDown")), "stage-1")
    assert isinstance(found, StoreError)
    assert (found.status, found.code) == (503, "SlowDown")
    lost = raised(failure_of(MissingError("x", missing="revision", status=404)), "stage-1")
    assert isinstance(lost, MissingError)
    assert (lost.missing, lost.status, lost.code) == ("revision", 404, None)


def test_facts_that_cannot_be_true_are_left_out() -> None:
    said = {
        "kind": "MissingError",
        "message": "x",
        "facts": {"missing": "sleep", "status": "9", "worker": "w"},
    }
    found = raised(read_failure(said), "stage-1")
    assert isinstance(found, MissingError)
    assert (found.missing, found.status) == ("object", None)
    assert str(raised(read_failure({"kind": "InputError", "message": "m", "facts": 3}), "stage-1")) == "m"
    assert type(raised(Failure("InputError", "m", {"status": 404}), "stage-1")) is InputError


def test_what_names_no_error_of_ours_makes_no_other_class() -> None:
    for kind in ("SystemExit", "WorkerLostError", "quote", "annotations", ""):
        assert type(raised(Failure(kind, "x"), "stage-1")) is WorkerError


def test_an_error_that_is_raised_once_more_is_another_of_the_same() -> None:
    for error in (WorkerLostError("x has ended", worker="x", is_certain=True), CacheLostError("shorter")):
        found = again(error)
        assert found is not error
        assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
