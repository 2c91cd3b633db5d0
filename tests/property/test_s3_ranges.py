"""Whatever range is asked for, and whatever happens on the way, the bytes are the right ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import s3fixtures
from s3fixtures import BUCKET, content, opened
from s3server import S3Server
from shardprep_runtime.stores.s3 import S3Store
from shardprep_runtime.stores.store import read

SIZE = 3 * 2**20 + 12345


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("ranges")
    with S3Server(folder) as found, pytest.MonkeyPatch.context() as patch:
        found.make_bucket(BUCKET)
        (folder / BUCKET / "k").write_bytes(content(SIZE))
        s3fixtures.isolate(patch, folder, found)
        yield found


@pytest.fixture(scope="module", params=["native", "boto3"])
def store(request: pytest.FixtureRequest, server: S3Server) -> Iterator[S3Store]:
    with opened(transfer=request.param, idle_timeout=0.3, deadline=20.0) as found:
        yield found


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Bytes [start, stop) of the object; often near its ends, or short."""
    start = draw(st.one_of(st.integers(0, SIZE - 1), st.integers(0, 20), st.integers(SIZE - 20, SIZE - 1)))
    stop = draw(st.one_of(st.integers(start + 1, SIZE), st.integers(start + 1, min(start + 20, SIZE))))
    return start, stop


AFTER = st.one_of(st.integers(0, 100), st.integers(0, SIZE))
FAULTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"mode": st.just("truncate"), "after": AFTER}),
        st.fixed_dictionaries({"mode": st.just("reset"), "after": AFTER}),
        st.fixed_dictionaries({"mode": st.just("status"), "code": st.sampled_from([500, 503, 429])}),
        st.fixed_dictionaries({"mode": st.just("wrong_range"), "by": st.sampled_from([-1, 1, 1000])}),
        st.fixed_dictionaries({"mode": st.just("html"), "short": st.booleans()}),
        st.fixed_dictionaries({"mode": st.just("full200")}),
        st.fixed_dictionaries({"mode": st.just("stall"), "after": AFTER}),
    ),
    max_size=2,
)


@pytest.mark.slow
@given(ranges(), FAULTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_comes_as_it_is_through_any_two_faults(
    server: S3Server, store: S3Store, wanted: tuple[int, int], faults: list[dict[str, Any]]
) -> None:
    server.clear()
    for fault in faults:
        server.fault(**fault, method="GET")
    start, stop = wanted
    assert read(store, "k", start, stop) == content(SIZE)[start:stop]
