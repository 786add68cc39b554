"""The positions at which a merge reads its curve."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsm_ds.schedules.coefficients import merge_coefficients
from wsm_ds.schedules.figures import lag
from wsm_ds.schedules.grid import grid


def test_the_grid_divides_the_window_by_the_number_of_checkpoints() -> None:
    assert grid(4).tolist() == [0.25, 0.5, 0.75]
    assert grid(1).tolist() == []


@given(st.integers(1, 200), st.integers(0, 10**13), st.integers(1, 10**13))
@settings(deadline=None)
def test_an_uneven_grid_with_equal_intervals_is_the_even_one_to_the_bit(n: int, first: int, interval: int) -> None:
    steps = [first + i * interval for i in range(n)]
    expected = grid(n).tolist()
    assert grid(steps=steps).tolist() == expected
    assert grid(steps=np.array(steps, dtype=np.int64), oldest_interval=interval).tolist() == expected
    assert grid(steps=[float(step) for step in steps]).tolist() == expected


def test_an_uneven_grid_counts_durations_and_not_checkpoints() -> None:
    assert grid(steps=[100, 200, 500], oldest_interval=400).tolist() == [0.5, 0.625]


def test_the_oldest_interval_is_the_median_of_the_others() -> None:
    assert grid(steps=[0, 1, 3, 10]).tolist() == [2 / 12, 3 / 12, 5 / 12]
    assert grid(steps=[0, 1, 4]).tolist() == [2 / 6, 3 / 6]


def test_linear_on_an_uneven_grid_weights_each_checkpoint_by_its_own_interval() -> None:
    c = merge_coefficients("linear", steps=[1000, 1100, 1400], oldest_interval=400)
    assert c.tolist() == pytest.approx([0.5, 0.125, 0.375], abs=1e-15)


def test_token_counts_beyond_float64_stay_exact() -> None:
    start = 2**53
    steps = [start, start + 1, start + 3, start + 6]
    assert grid(steps=steps, oldest_interval=2).tolist() == [2 / 8, 3 / 8, 5 / 8]
    assert lag([0.0, 1.0, 0.0, 0.0], steps) == 5.0


@given(st.lists(st.integers(1, 10**13), min_size=1, max_size=30), st.integers(1, 10**13))
@settings(deadline=None)
def test_grid_positions_are_the_exact_fractions_rounded_once(intervals: Any, oldest: Any) -> None:
    steps = [10**13]
    for interval in intervals:
        steps.append(steps[-1] + interval)
    durations = [oldest, *intervals]
    expected = [float(Fraction(sum(durations[:i]), sum(durations))) for i in range(1, len(durations))]
    assert grid(steps=steps, oldest_interval=oldest).tolist() == expected
