"""Figures of a window: lengths in every unit, changes of the data, and what is warned of."""

import numpy as np
import pytest

from wsm_ds.planning.course import Course
from wsm_ds.planning.figures import Amount, WindowFigures, window_figures
from wsm_ds.schedules.coefficients import merge_coefficients


def figures(steps: range, *, curve: str = "linear", spread: str = "wsm", switch: int | None = None) -> WindowFigures:
    """Of an even window with 10 tokens a step."""
    course = Course(tuple(steps), tokens=tuple(10 * step for step in steps))
    c = merge_coefficients(curve, steps=steps, spread=spread)
    return window_figures(course, c, data_switch=switch)


def test_an_even_window_in_steps_and_tokens() -> None:
    found = figures(range(100, 500, 100))
    assert found.duration == Amount(400.0, None, 4000.0)
    assert found.end == Amount(400, None, 4000)
    assert found.mean_age == Amount(150.0, None, 1500.0)
    assert found.deviation == Amount(12500**0.5, None, 1250000**0.5)
    assert found.ess == 4.0
    assert found.warnings == ()
    assert "data_switch" not in found.to_json()
    assert found.to_json()["end"] == {"steps": 400, "tokens": 4000}


def test_the_interval_before_the_oldest_passes_in_other_units_as_fast_as_the_next_one() -> None:
    """The batch grows: 1, then 2, then 4 tokens a step."""
    course = Course((10, 20, 30, 40), tokens=(10, 20, 40, 80))
    c = np.full(4, 0.25)
    assert window_figures(course, c).duration == Amount(40.0, None, 80.0)
    assert window_figures(course, c, unit="tokens", oldest_interval=5.0).duration == Amount(35.0, None, 75.0)


def test_one_checkpoint_has_no_length_unless_it_is_given() -> None:
    alone = Course((50,), tokens=(1000,))
    assert window_figures(alone, np.ones(1)).duration == Amount(0.0, None, 0.0)
    assert window_figures(alone, np.ones(1), unit="tokens", oldest_interval=100.0).duration == Amount(5.0, None, 100.0)
    assert window_figures(Course((0,)), np.ones(1), data_switch=0).data_switch is not None


def test_a_sum_beyond_the_newest_has_a_negative_age_and_no_deviation() -> None:
    found = window_figures(Course((10, 20)), np.array([-0.5, 1.5]))
    assert (found.mean_age, found.deviation, found.ess) == (Amount(-5.0), None, 0.4)


def test_updates_after_a_change_of_the_data_count_with_their_decay_factors() -> None:
    """Intervals 0-100, …, 300-400 have the factors 1, 3/4, 1/2, 1/4; the change lies in the middle of the third."""
    switch = figures(range(100, 500, 100), switch=250).data_switch
    assert switch is not None
    assert (switch.step, switch.checkpoints_after, switch.weight_after) == (250, 2, 0.5)
    assert switch.updates_after == pytest.approx((0.5 * 50 + 0.25 * 100) / 250)


@pytest.mark.parametrize(("switch", "after", "is_warned"), [(99, 4, False), (100, 3, True), (399, 1, True),
                                                            (400, 0, False)])  # fmt: skip
def test_only_a_window_across_the_change_is_warned_of(switch: int, after: int, is_warned: bool) -> None:
    found = figures(range(100, 500, 100), switch=switch)
    assert found.data_switch is not None
    assert found.data_switch.checkpoints_after == after
    assert [f"after step {switch}: {after} of 4" in warning for warning in found.warnings] == [True] * is_warned


@pytest.mark.parametrize(
    ("n", "curve", "spread", "is_warned"),
    [(32, "linear", "wsm", False), (33, "linear", "wsm", True), (40, "1-sqrt", "wsm", True),
     (40, "linear", "qam", False), (40, "linear", "qam:0.5", False), (200, "linear", "qam", False)],
)  # fmt: skip
def test_a_merge_that_is_spread_wider_than_any_with_a_good_result_is_warned_of(
    n: int, curve: str, spread: str, is_warned: bool
) -> None:
    warnings = figures(range(5, 5 * n + 1, 5), curve=curve, spread=spread).warnings
    assert ["repeated text" in warning and "2609.35168" in warning for warning in warnings] == [True] * is_warned
    assert all("tokens)" in warning for warning in warnings)
