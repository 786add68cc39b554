"""Coefficients: the published weights, their sums and figures, and the errors of wrong arguments."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsm_ds.errors import CurveError
from wsm_ds.schedules.coefficients import (
    apply_floor,
    check_coefficients,
    coefficients_from_decay_factors,
    decay_factors,
    decay_factors_from_coefficients,
    merge_coefficients,
    running_merge_factor,
    weight_decay_aware_coefficients,
)
from wsm_ds.schedules.curves import Curve, curve_from_values
from wsm_ds.schedules.figures import effective_sample_size, lag

CURVES = ["linear", "cosine", "1-sqrt", "power:2", "inverse-sqrt:0.1", "exponential:0.1", "ema"]
COUNTS = st.integers(1, 200)

relaxed = settings(deadline=None)

PUBLISHED = [
    ("cosine", 4, ".146447 .353553 .353553 .146447"),
    ("1-sqrt", 4, ".500000 .207107 .158919 .133975"),
    ("cosine", 8, ".038060 .108386 .162212 .191342 .191342 .162212 .108386 .038060"),
    ("1-sqrt", 8, ".353553 .146447 .112372 .094734 .083463 .075456 .069389 .064586"),
    ("cosine", 10, ".024472 .071020 .110616 .139384 .154508 .154508 .139384 .110616 .071020 .024472"),
    ("1-sqrt", 10, ".316228 .130986 .100509 .084733 .074651 .067490 .062063 .057767 .054256 .051317"),
    ("ema", 10, ".126 .033 .041 .052 .065 .082 .103 .130 .163 .206"),
    (
        "1-sqrt",
        16,
        ".250000 .103553 .079459 .066987 .059017 .053355 .049065 .045669 "
        ".042893 .040569 .038587 .036869 .035362 .034027 .032831 .031754",
    ),
]


@pytest.mark.parametrize(("curve", "n", "printed"), PUBLISHED)
def test_published_weights_are_reproduced_to_every_printed_digit(curve: str, n: int, printed: str) -> None:
    digits = len(printed.split()[0]) - 1
    found = [f"{c:.{digits}f}".removeprefix("0") for c in merge_coefficients(curve, n=n)]
    assert found == printed.split()


@pytest.mark.parametrize("curve", ["linear", "mean", "power:1", "table:1,0"])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 32, 49, 1000])
def test_linear_is_the_uniform_mean_to_the_last_bit(curve: str, n: int) -> None:
    assert merge_coefficients(curve, n=n).tolist() == [1 / n] * n
    assert merge_coefficients(curve, steps=range(700, 700 + 7 * n, 7), oldest_interval=7).tolist() == [1 / n] * n


def test_linear_coefficients_of_an_uneven_window_are_the_shares_of_its_intervals() -> None:
    assert merge_coefficients("linear", steps=iter([100, 200, 250]), oldest_interval=60).tolist() == [
        60 / 210,
        100 / 210,
        50 / 210,
    ]


def test_a_floor_goes_to_the_newest_of_linear_coefficients_and_each_is_rounded_once() -> None:
    found = merge_coefficients("linear", n=3, floor=0.1)
    tenth = Fraction(0.1)  # the float that is written 0.1
    older, newest = (1 - tenth) / 3, (1 - tenth) / 3 + tenth
    assert found.tolist() == [float(older), float(older), float(newest)]


def test_a_curve_of_ones_own_is_not_taken_for_linear_because_of_its_name() -> None:
    own = Curve("linear", (), lambda s: 1.0 - s * s)
    assert merge_coefficients(own, n=2).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("curve", CURVES)
def test_one_checkpoint_gets_everything(curve: str) -> None:
    assert merge_coefficients(curve, n=1, floor=0.25).tolist() == [1.0]
    assert merge_coefficients(curve, steps=[7000]).tolist() == [1.0]
    assert merge_coefficients(curve, steps=[7000], oldest_interval=500).tolist() == [1.0]


def test_one_minus_sqrt_gives_the_oldest_checkpoint_one_over_sqrt_n() -> None:
    c = merge_coefficients("1-sqrt", n=16)
    assert c[0] == 0.25
    assert (np.diff(c) < 0).all()


@pytest.mark.parametrize("curve", CURVES)
def test_the_newest_checkpoint_always_counts(curve: str) -> None:
    assert (merge_coefficients(curve, n=16) > 0).all()


def test_exponential_is_the_mirror_image_of_ema() -> None:
    forward = merge_coefficients("ema:0.2", n=9)
    np.testing.assert_allclose(merge_coefficients("exponential:0.2", n=9)[::-1], forward, rtol=0, atol=1e-15)


def test_ema_coefficients_are_those_of_the_recursion_over_checkpoints() -> None:
    n, ratio = 10, 0.1
    alpha = 1 - ratio ** (1 / n)
    weights = np.eye(n)[0]
    for newest in range(1, n):
        weights = (1 - alpha) * weights + alpha * np.eye(n)[newest]
    np.testing.assert_allclose(merge_coefficients("ema:0.1", n=n), weights, rtol=0, atol=1e-15)


@given(st.sampled_from(CURVES), COUNTS, st.floats(0.0, 1.0))
@relaxed
def test_coefficients_are_not_negative_and_sum_to_one(curve: str, n: int, floor: float) -> None:
    c = merge_coefficients(curve, n=n, floor=floor)
    assert c.shape == (n,)
    assert c.dtype == np.float64
    assert (c >= 0).all()
    assert abs(math.fsum(c) - 1.0) <= 2**-53
    check_coefficients(c)


@pytest.mark.parametrize("curve", CURVES)
def test_coefficients_of_a_very_long_window_stay_valid(curve: str) -> None:
    c = merge_coefficients(curve, n=1_000_000)
    assert c.min() >= 0.0
    assert abs(math.fsum(c) - 1.0) <= 2**-53


@given(st.lists(st.floats(0.0, 1.0), max_size=50))
@relaxed
def test_decay_factors_survive_the_way_to_coefficients_and_back(values: list[float]) -> None:
    w = np.array(sorted(values, reverse=True))
    c = coefficients_from_decay_factors(w)
    assert (c >= 0).all()
    np.testing.assert_allclose(decay_factors_from_coefficients(c), w, rtol=0, atol=1e-14)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50).filter(lambda values: sum(values) > 1e-3))
@relaxed
def test_coefficients_survive_the_way_to_decay_factors_and_back(values: list[float]) -> None:
    c = np.array(values) / math.fsum(values)
    w = decay_factors_from_coefficients(c)
    assert ((w >= 0) & (w <= 1)).all()
    np.testing.assert_allclose(coefficients_from_decay_factors(w), c, rtol=0, atol=1e-14)


def test_a_users_table_of_decay_factors_becomes_coefficients() -> None:
    assert coefficients_from_decay_factors([0.75, 0.75, 0.25]).tolist() == [0.25, 0.0, 0.5, 0.25]
    assert decay_factors_from_coefficients([0.25, 0.0, 0.5, 0.25]).tolist() == [0.75, 0.75, 0.25]
    assert coefficients_from_decay_factors([]).tolist() == [1.0]
    assert decay_factors_from_coefficients([1.0]).tolist() == []


def test_a_users_table_of_curve_values_becomes_coefficients() -> None:
    curve = curve_from_values([1.0, 0.5, 0.25, 0.0])
    assert decay_factors(curve, n=3).tolist() == pytest.approx([0.5, 0.25], abs=1e-15)


# The floor


def test_a_floor_moves_its_share_to_the_newest_checkpoint() -> None:
    assert merge_coefficients("linear", n=4, floor=0.5).tolist() == [0.125, 0.125, 0.125, 0.625]
    assert merge_coefficients("1-sqrt", n=4, floor=1.0).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert apply_floor([0.5, 0.0], 0.25).tolist() == [0.625, 0.25]


@given(st.sampled_from(CURVES), COUNTS, st.floats(0.0, 1.0))
@relaxed
def test_the_floor_formula_holds_and_a_zero_floor_changes_no_bit(curve: str, n: int, m: float) -> None:
    plain = merge_coefficients(curve, n=n)
    expected = m * np.eye(n)[-1] + (1 - m) * plain
    np.testing.assert_allclose(merge_coefficients(curve, n=n, floor=m), expected, rtol=0, atol=4e-16)
    assert merge_coefficients(curve, n=n, floor=0.0).tobytes() == plain.tobytes()


# Figures


def test_effective_sample_size_counts_equal_weights_and_ignores_zeros() -> None:
    assert effective_sample_size(np.full(8, 0.125)) == 8.0
    assert effective_sample_size([0.0, 1.0, 0.0]) == 1.0
    assert effective_sample_size([0.5, 0.25, 0.25]) == pytest.approx(8 / 3)


def test_lag_is_the_mean_age_in_the_unit_of_the_steps() -> None:
    assert lag([0.25, 0.25, 0.25, 0.25], [1000, 2000, 3000, 4000]) == 1500.0
    assert lag([0.5, 0.25, 0.25], [0, 100, 400]) == 275.0
    assert lag([0.0, 1.0], [5, 9]) == 0.0


# The running merge


@pytest.mark.parametrize(("exponent", "curve"), [(1.0, "linear"), (0.5, "1-sqrt"), (2.0, "power:2")])
def test_the_running_merge_equals_the_direct_one_after_every_checkpoint(exponent: float, curve: str) -> None:
    checkpoints = np.random.default_rng(0).normal(size=(40, 6))
    running = np.full(6, 1e9)
    for n in range(1, 41):
        factor = running_merge_factor(n, exponent)
        running = factor * running + (1 - factor) * checkpoints[n - 1]
        direct = merge_coefficients(curve, n=n) @ checkpoints[:n]
        np.testing.assert_allclose(running, direct, rtol=0, atol=1e-14)


# What a wrong argument is told

RISING = Curve("rising", (), lambda s: np.where(s < 0.5, 0.25, 0.75))
TOO_HIGH = Curve("too high", (), lambda s: 2.0 - s)
SHAPELESS = Curve("shapeless", (), lambda s: np.array(0.5))
UNDEFINED = Curve("undefined", (), lambda s: np.where(s > 0.5, np.nan, 1.0 - s))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either n or steps, found neither"),
        ({"n": 4, "steps": [1, 2]}, "give either n or steps, found both"),
        ({"n": 0}, "must be a whole number >= 1, found 0"),
        ({"n": -3}, "must be a whole number >= 1, found -3"),
        ({"n": 2.5}, r"must be a whole number >= 1, found 2\.5"),
        ({"n": float("nan")}, "n must be a finite number, found nan"),
        ({"n": "four"}, "n must be a finite number, found 'four'"),
        ({"n": 4, "oldest_interval": 10}, "oldest_interval needs steps"),
        ({"steps": []}, "steps is empty"),
        ({"steps": [100, 300, 300]}, r"steps must rise, found steps\[1\] = 300 and steps\[2\] = 300"),
        ({"steps": [300, 100]}, r"steps must rise, found steps\[0\] = 300 and steps\[1\] = 100"),
        ({"steps": [-5, 100]}, r"must not be negative, found steps\[0\] = -5"),
        ({"steps": [1.0, float("nan")]}, r"steps\[1\] must be a finite number, found nan"),
        ({"steps": [1.0, float("inf")]}, r"steps\[1\] must be a finite number, found inf"),
        ({"steps": [[1, 2], [3, 4]]}, r"steps\[0\] must be a finite number"),
        ({"steps": np.ones((2, 2))}, r"steps\[0\] must be a finite number"),
        ({"steps": [1, 2], "oldest_interval": 0}, "oldest_interval must be positive, found 0"),
        ({"steps": [1, 2], "oldest_interval": float("inf")}, "oldest_interval must be a finite number"),
        ({"n": 4, "floor": -0.1}, r"floor, .* must be within \[0, 1\], found -0\.1"),
        ({"n": 4, "floor": 1.5}, r"floor, .* found 1\.5"),
        ({"n": 4, "floor": float("nan")}, "floor, .* found nan"),
        ({"n": 4, "curve": "lineer"}, "unknown decay curve 'lineer'"),
        ({"n": 4, "curve": RISING}, r"curve rising must not rise, found 0\.75 at index 1 after 0\.25"),
        ({"n": 4, "curve": TOO_HIGH}, r"curve too high must be within \[0, 1\], found 1\.75 at index 0"),
        ({"n": 4, "curve": SHAPELESS}, r"curve shapeless gave shape \(\) for 3 positions"),
        ({"n": 4, "curve": UNDEFINED}, "curve undefined must be finite, found nan at index 2"),
    ],
)
def test_a_wrong_argument_of_a_merge_is_told_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CurveError, match=message):
        merge_coefficients(**{"curve": "linear", **arguments})


@pytest.mark.parametrize(
    ("w", "message"),
    [
        ([0.5, 0.6], r"decay factors must not rise, found 0\.6 at index 1 after 0\.5"),
        ([0.5, 0.5 + 1e-15], "decay factors must not rise"),
        ([1.5, 0.5], r"decay factors must be within \[0, 1\], found 1\.5 at index 0"),
        ([0.5, -0.5], r"found -0\.5 at index 1"),
        ([0.5, float("nan")], "decay factors must be finite, found nan at index 1"),
        ([[0.5]], r"decay factors must be one list of numbers, found shape \(1, 1\)"),
        (0.5, r"found shape \(\)"),
        (["a"], "decay factors must be a list of numbers"),
    ],
)
def test_a_wrong_table_of_decay_factors_is_told_what_is_wrong(w: Any, message: str) -> None:
    for function in (coefficients_from_decay_factors, lambda w: apply_floor(w, 0.1)):
        with pytest.raises(CurveError, match=message):
            function(w)


@pytest.mark.parametrize(
    ("c", "message"),
    [
        ([0.5, 0.4], r"must sum to 1 within 1e-09, found the sum 0\.9 of 2 coefficients"),
        ([0.5, 0.5 + 2e-9], "must sum to 1"),
        ([1.5, -0.5], r"coefficients must not be negative, found -0\.5 at index 1"),
        ([0.5, float("inf")], "coefficients must be finite, found inf at index 1"),
        ([float("nan"), 1.0], "coefficients must be finite, found nan at index 0"),
        ([], "coefficients are empty"),
        ([[0.5, 0.5]], r"coefficients must be one list of numbers, found shape \(1, 2\)"),
        ([[0.5], [0.25, 0.25]], "coefficients must be a list of numbers"),
    ],
)
def test_wrong_coefficients_are_told_what_is_wrong(c: Any, message: str) -> None:
    for function in (check_coefficients, decay_factors_from_coefficients):
        with pytest.raises(CurveError, match=message):
            function(c)


def test_valid_coefficients_are_returned_as_a_float64_copy() -> None:
    given_row = np.array([0.25, 0.75 + 5e-10])
    checked = check_coefficients(given_row)
    assert checked.tolist() == given_row.tolist()
    assert not np.shares_memory(checked, given_row)


def test_figures_of_a_wrong_row_are_refused() -> None:
    with pytest.raises(CurveError, match="coefficients are all zero"):
        effective_sample_size([0.0, 0.0])
    with pytest.raises(CurveError, match="found 2 coefficients and 3 steps"):
        lag([0.5, 0.5], [1, 2, 3])
    with pytest.raises(CurveError, match=r"found steps\[0\] = 2 and steps\[1\] = 1"):
        lag([0.5, 0.5], [2, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be finite and not negative, found -1\.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and not negative, found nan"),
        ({"learning_rate": 2.0, "weight_decay": 0.5}, r"must be below 1, found 1\.0"),
        ({"interval_steps": 0}, r"interval_steps must be positive, found 0\.0"),
        ({"interval_steps": float("inf")}, "interval_steps must be finite, found inf"),
        ({"interval_steps": [10, 10, 10]}, "interval_steps must be one number or 2, found 3"),
        ({"interval_steps": [10, -10]}, r"interval_steps must be positive, found -10\.0"),
        ({"w": [0.25, 0.5]}, "decay factors must not rise"),
    ],
)
def test_a_wrong_argument_of_the_weight_decay_aware_coefficients_is_told_what_is_wrong(
    changed: dict[str, Any], message: str
) -> None:
    arguments = {"w": [0.5, 0.25], "learning_rate": 0.1, "weight_decay": 0.1, "interval_steps": 10}
    with pytest.raises(CurveError, match=message):
        weight_decay_aware_coefficients(**{**arguments, **changed})


def test_a_wrong_argument_of_the_running_merge_is_told_what_is_wrong() -> None:
    with pytest.raises(CurveError, match="n counts checkpoints from 1, found 0"):
        running_merge_factor(0)
    with pytest.raises(CurveError, match=r"exponent must be positive and finite, found 0\.0"):
        running_merge_factor(3, 0.0)
