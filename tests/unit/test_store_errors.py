"""An error of a store says in facts what it is, so that no code reads its message."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest

from shardprep_runtime.errors import (
    ConflictError,
    DeniedError,
    Missing,
    MissingError,
    StoreError,
)
from shardprep_runtime.stores.retry import Patience, Transient
from shardprep_runtime.stores.s3_answers import refusal
from shardprep_runtime.stores.s3_upload import _may_lack_checksums
from shardprep_runtime.stores.store import Access


@pytest.mark.parametrize("kind", [StoreError, MissingError, DeniedError, ConflictError])
def test_facts_survive_a_pickle(kind: type[StoreError]) -> None:
    found = pickle.loads(pickle.dumps(kind("s3://b/k: refused", status=400, code="Odd")))
    assert type(found) is kind
    assert (str(found), found.status, found.code) == ("s3://b/k: refused", 400, "Odd")


def test_what_is_missing_survives_a_pickle() -> None:
    found = pickle.loads(pickle.dumps(MissingError("s3://b: no such bucket", missing="bucket", status=404)))
    assert (found.missing, found.status, found.code) == ("bucket", 404, None)


def test_an_error_without_an_answer_has_no_status() -> None:
    error = MissingError("folder/k: no such object")
    assert (error.missing, error.status, error.code) == ("object", None, None)


def answer(status: int, code: str, headers: Mapping[str, str] = {}) -> Exception:
    """What is made of an answer of S3."""
    return refusal("s3://bucket/k", status, code, "why", headers, host="localhost:1", region="us-east-1")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "InvalidArgument", StoreError),
        (501, "NotImplemented", StoreError),
        (403, "AccessDenied", DeniedError),
        (403, "RequestTimeTooSkewed", DeniedError),
        (301, "PermanentRedirect", DeniedError),
        (412, "PreconditionFailed", ConflictError),
    ],
)
def test_a_refusal_of_s3_keeps_status_and_code(status: int, code: str, kind: type[StoreError]) -> None:
    error = answer(status, code)
    assert type(error) is kind
    assert (error.status, error.code) == (status, code)


@pytest.mark.parametrize(
    ("code", "missing"),
    [("NoSuchBucket", "bucket"), ("NoSuchKey", "object"), ("", "object"), ("NoSuchUpload", "upload")],
)
def test_a_missing_thing_of_s3_is_told_apart(code: str, missing: Missing) -> None:
    error = answer(404, code)
    assert isinstance(error, MissingError)
    assert (error.missing, error.status, error.code) == (missing, 404, code or None)


def test_giving_up_keeps_what_the_last_answer_was() -> None:
    error = answer(503, "SlowDown")
    assert isinstance(error, Transient)
    with pytest.raises(StoreError, match="answered 503 SlowDown: why; given up after 1 tries") as given_up:
        Patience(0.0).pause(error, where="s3://bucket/k")
    assert (given_up.value.status, given_up.value.code) == (503, "SlowDown")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (501, "NotImplemented", True),
        (400, "InvalidArgument", True),
        (400, None, True),
        (400, "BadDigest", False),
        (400, "XAmzContentSHA256Mismatch", False),
        (500, "InternalError", False),
        (None, None, False),
    ],
)
def test_only_a_store_that_may_not_know_checksums_is_asked_without(
    status: int | None, code: str | None, expected: bool
) -> None:
    assert _may_lack_checksums(StoreError("answered 400 in words", status=status, code=code)) is expected


@pytest.mark.parametrize(
    ("text", "kind", "facts"),
    [
        ("Server returned non-2xx status code: 404 Not Found: NoSuchBucket", MissingError, (404, "bucket")),
        ("Server returned non-2xx status code: 403 Forbidden: no", DeniedError, (403, None)),
        ("Server returned non-2xx status code: 400 Bad Request: no", StoreError, (400, None)),
        ("Server returned non-2xx status code: 503 Unavailable: no", Transient, (503, None)),
        ("connection closed", Transient, (None, None)),
    ],
)
def test_the_words_of_obstore_become_facts(
    text: str,
    kind: type[Exception],
    facts: tuple[int | None, Missing | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    from obstore.exceptions import GenericError
    from obstore.store import MemoryStore

    from shardprep_runtime.stores import gs_az

    monkeypatch.setattr(gs_az, "_connect", lambda *_: lambda tries: MemoryStore())
    error = gs_az.ObstoreStore("gs", "bucket", "", Access())._meaning("k", GenericError(text))
    assert type(error) is kind
    assert (getattr(error, "status", None), getattr(error, "missing", None)) == facts
