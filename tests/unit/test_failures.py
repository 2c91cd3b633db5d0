"""An error crosses from a worker to the front end as what it is, and nothing else does."""

from __future__ import annotations

import pytest

from shardprep_runtime.errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    ShardprepError,
    UnsupportedError,
    WorkerError,
    WorkerLostError,
)
from shardprep_runtime.workers.failures import Failure, failure_of, raised


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


def test_what_names_no_error_of_ours_makes_no_other_class() -> None:
    for kind in ("SystemExit", "WorkerLostError", "quote", "annotations", ""):
        assert type(raised(Failure(kind, "x"), "stage-1")) is WorkerError
