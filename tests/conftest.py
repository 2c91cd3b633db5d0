"""Which tests a run has, and which of them fork the processes that they start."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

import warm

hypothesis.settings.register_profile("tests", deadline=None)  # how long an example takes is up to the machine
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run everything: also what is marked `sweep`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the sweep out, unless it is asked for by `--sweep` or by `-m sweep`; give each group to one process."""
    if not config.getoption("--sweep") and "sweep" not in config.getoption("-m"):
        left_out = [item for item in items if item.get_closest_marker("sweep")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    if hasattr(config, "workerinput"):
        for item in items:
            _name_group(item)


def _name_group(item: pytest.Item) -> None:
    """Tell pytest-xdist a test's group, so that what its module sets up is set up once.

    pytest-xdist 3.8 adds `@GROUP` to what pytest before 9.2 took for a test's id. pytest 9.2 takes something else, and
    without this every process would set up every module.
    """
    groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
    suffix = "@" + "_".join(groups)
    if groups and not item.nodeid.endswith(suffix) and hasattr(item, "_id"):
        item._id = type(item._id).parse(item.nodeid + suffix)


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
