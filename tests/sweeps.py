"""Cases that only `--sweep` runs: all of a kind, of which a few that stand for the others run always."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def swept(
    cases: Iterable[Any], *, but: Container[Any] = (), spread: bool = False, marks: Any = ()
) -> list[Any]:
    """Parameters for pytest.mark.parametrize.

    Args:
        but: The cases that run without `--sweep`, too. Say beside it why these stand for all.
        spread: A case is a tuple, of as many values as the test has parameters.
        marks: Of all cases that only `--sweep` runs, beside `sweep` itself.
    """
    more = [pytest.mark.sweep, *(marks if isinstance(marks, list | tuple) else [marks])]
    return [
        case if case in but else pytest.param(*(case if spread else (case,)), marks=more) for case in cases
    ]
