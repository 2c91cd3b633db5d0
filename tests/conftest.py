"""Which tests a run has, and which of them fork the processes that they start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import warm


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run everything: also what is marked `sweep`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the sweep out, unless it is asked for by `--sweep` or by `-m sweep`."""
    if config.getoption("--sweep") or "sweep" in config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("sweep")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Fork what integration tests start, but for those marked `cold`, whose subject is how a process starts.

    That is settled before any fixture: a fixture's processes are forked where those of the first test that wants it are.
    """
    warm.choose("integration" in item.path.parts and not item.get_closest_marker("cold"))
    try:
        return (yield)
    finally:
        warm.choose(False)


def pytest_sessionfinish() -> None:
    warm.SERVER.close()
