"""Stages are balanced by bytes and by the memory of their devices."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep.layout.stages import balance_stages

SIZES = st.integers(1, 50)


def fullest(
    bounds: tuple[tuple[int, int], ...], layers: list[int], fixed: list[int], rooms: list[int]
) -> float:
    return max(
        (sum(layers[a:b]) + extra) / room for (a, b), extra, room in zip(bounds, fixed, rooms, strict=True)
    )


def all_stages(layers: int, count: int, needs: list[list[int]]) -> list[tuple[tuple[int, int], ...]]:
    found = [tuple(pairwise((0, *cuts, layers))) for cuts in combinations(range(1, layers), count - 1)]
    return [
        bounds
        for bounds in found
        if all(any(a <= need < b for need in group) for group in needs for a, b in bounds)
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_other_stages_leave_the_fullest_device_emptier(data: st.DataObject) -> None:
    layers = data.draw(st.lists(SIZES, min_size=1, max_size=9))
    count = data.draw(st.integers(1, min(4, len(layers))))
    fixed = data.draw(st.lists(st.integers(0, 80), min_size=count, max_size=count))
    rooms = data.draw(st.lists(SIZES, min_size=count, max_size=count))
    needs = data.draw(
        st.sampled_from([[], [list(range(1, len(layers), 2))], [list(range(0, len(layers), 3))]])
    )
    others = all_stages(len(layers), count, needs)
    found = balance_stages(layers, fixed, rooms, needs)
    if not others:
        assert found is None
        return
    assert found in others
    best = min(fullest(bounds, layers, fixed, rooms) for bounds in others)
    assert fullest(found, layers, fixed, rooms) == pytest.approx(best, rel=1e-6)


def test_equal_layers_on_equal_devices_are_shared_evenly() -> None:
    assert balance_stages([5] * 8, [0, 0], [100, 100]) == ((0, 4), (4, 8))


def test_the_embedding_and_the_head_take_the_place_of_layers() -> None:
    assert balance_stages([5] * 8, [10, 0, 0, 10], [100] * 4) == ((0, 1), (1, 4), (4, 7), (7, 8))


def test_a_larger_device_gets_more_layers() -> None:
    assert balance_stages([1] * 12, [0, 0, 0], [24, 16, 8]) == ((0, 6), (6, 10), (10, 12))


def test_what_is_equally_good_differs_least() -> None:
    """The last stage decides how full the fullest is; the others share what is left."""
    assert balance_stages([1, 1, 1, 1, 9], [0, 0, 0], [10] * 3) == ((0, 2), (2, 4), (4, 5))


def test_each_stage_holds_a_layer_that_it_needs() -> None:
    assert balance_stages([1] * 8, [0, 0], [10, 10], [[6, 7]]) == ((0, 7), (7, 8))
    assert balance_stages([1] * 8, [0, 0, 0], [10] * 3, [[6, 7]]) is None


def test_there_are_no_more_stages_than_layers() -> None:
    assert balance_stages([1, 1], [0] * 3, [10] * 3) is None
