"""Coefficients: the published weights, the identity with a replayed decay, and what a wrong row is told."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsm_ds.errors import CurveError
from wsm_ds.schedules.coefficients import (
    apply_floor,
    check_coefficients,
    coefficients_from_decay_factors,
    decay_factors,
    decay_factors_from_coefficients,
    effective_sample_size,
    lag,
    merge_coefficients,
    running_merge_factor,
    weight_decay_aware_coefficients,
)
from wsm_ds.schedules.curves import Curve, curve_from_values
from wsm_ds.schedules.grid import grid

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
def test_published_weights_are_reproduced_to_every_printed_digit(curve, n, printed):
    digits = len(printed.split()[0]) - 1
    found = [f"{c:.{digits}f}".removeprefix("0") for c in merge_coefficients(curve, n=n)]
    assert found == printed.split()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 32, 1000])
def test_linear_is_the_uniform_mean(n):
    np.testing.assert_allclose(merge_coefficients("mean", n=n), np.full(n, 1 / n), rtol=0, atol=2**-52)


@pytest.mark.parametrize("curve", CURVES)
def test_one_checkpoint_gets_everything(curve):
    assert merge_coefficients(curve, n=1, floor=0.25).tolist() == [1.0]
    assert merge_coefficients(curve, steps=[7000]).tolist() == [1.0]
    assert merge_coefficients(curve, steps=[7000], oldest_interval=500).tolist() == [1.0]


def test_one_minus_sqrt_gives_the_oldest_checkpoint_one_over_sqrt_n() -> None:
    c = merge_coefficients("1-sqrt", n=16)
    assert c[0] == 0.25
    assert (np.diff(c) < 0).all()


@pytest.mark.parametrize("curve", CURVES)
def test_the_newest_checkpoint_always_counts(curve):
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
def test_coefficients_are_not_negative_and_sum_to_one(curve, n, floor):
    c = merge_coefficients(curve, n=n, floor=floor)
    assert c.shape == (n,)
    assert c.dtype == np.float64
    assert (c >= 0).all()
    assert abs(math.fsum(c) - 1.0) <= 2**-53
    check_coefficients(c)


@pytest.mark.parametrize("curve", CURVES)
def test_coefficients_of_a_very_long_window_stay_valid(curve):
    c = merge_coefficients(curve, n=1_000_000)
    assert c.min() >= 0.0
    assert abs(math.fsum(c) - 1.0) <= 2**-53


@given(st.lists(st.floats(0.0, 1.0), max_size=50))
@relaxed
def test_decay_factors_survive_the_way_to_coefficients_and_back(values):
    w = np.array(sorted(values, reverse=True))
    c = coefficients_from_decay_factors(w)
    assert (c >= 0).all()
    np.testing.assert_allclose(decay_factors_from_coefficients(c), w, rtol=0, atol=1e-14)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50).filter(lambda values: sum(values) > 1e-3))
@relaxed
def test_coefficients_survive_the_way_to_decay_factors_and_back(values):
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


# Grids


def test_the_grid_divides_the_window_by_the_number_of_checkpoints() -> None:
    assert grid(4).tolist() == [0.25, 0.5, 0.75]
    assert grid(1).tolist() == []


@given(COUNTS, st.integers(0, 10**13), st.integers(1, 10**13))
@relaxed
def test_an_uneven_grid_with_equal_intervals_is_the_even_one_to_the_bit(n, first, interval):
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
@relaxed
def test_grid_positions_are_the_exact_fractions_rounded_once(intervals, oldest):
    steps = [10**13]
    for interval in intervals:
        steps.append(steps[-1] + interval)
    durations = [oldest, *intervals]
    expected = [float(Fraction(sum(durations[:i]), sum(durations))) for i in range(1, len(durations))]
    assert grid(steps=steps, oldest_interval=oldest).tolist() == expected


# The floor


def test_a_floor_moves_its_share_to_the_newest_checkpoint() -> None:
    assert merge_coefficients("linear", n=4, floor=0.5).tolist() == [0.125, 0.125, 0.125, 0.625]
    assert merge_coefficients("1-sqrt", n=4, floor=1.0).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert apply_floor([0.5, 0.0], 0.25).tolist() == [0.625, 0.25]


@given(st.sampled_from(CURVES), COUNTS, st.floats(0.0, 1.0))
@relaxed
def test_the_floor_formula_holds_and_a_zero_floor_changes_no_bit(curve, n, m):
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


# The identity with a replay of recorded updates


def record(make_optimizer, intervals, steps_per_interval):
    """Trains a noisy logistic regression; the checkpoints and each segment's parameters, step by step."""
    torch.manual_seed(7)
    inputs = torch.randn(64, 12, dtype=torch.float64)
    labels = (inputs @ torch.randn(12, dtype=torch.float64) > 0).double()
    theta = torch.randn(12, dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer([theta])
    path = [theta.detach().numpy().copy()]
    for _ in range(intervals * steps_per_interval):
        batch = torch.randint(64, (8,))
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs[batch] @ theta, labels[batch])
        loss.backward()
        optimizer.step()
        path.append(theta.detach().numpy().copy())
    return np.array(path)


def replay(path, w, steps_per_interval, decay_per_step=0.0):
    """The recorded updates once more, each scaled by its segment's decay factor."""
    theta = path[0]
    for step in range(1, len(path)):
        factor = w[(step - 1) // steps_per_interval]
        update = (1 - decay_per_step) * path[step - 1] - path[step]
        theta = (1 - factor * decay_per_step) * theta - factor * update
    return theta


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_merge_is_the_replay_with_the_staircase_learning_rate(name):
    path = record(OPTIMIZERS[name], intervals=7, steps_per_interval=5)
    for curve in CURVES:
        for floor in (0.0, 0.1):
            c = merge_coefficients(curve, n=8, floor=floor)
            expected = replay(path, decay_factors(curve, n=8, floor=floor), 5)
            error = np.linalg.norm(c @ path[::5] - expected) / np.linalg.norm(expected)
            assert error < 1e-12, (curve, floor, error)


def test_a_merge_of_uneven_checkpoints_is_the_replay_too() -> None:
    path = record(OPTIMIZERS["adam"], intervals=20, steps_per_interval=1)
    steps = [0, 3, 4, 11, 20]
    w = decay_factors("1-sqrt", steps=steps)
    per_step = np.repeat(w, np.diff(steps))
    merged = merge_coefficients("1-sqrt", steps=steps) @ path[steps]
    np.testing.assert_allclose(merged, replay(path, per_step, 1), rtol=1e-12)


# Weight decay


def adamw_path(learning_rate, weight_decay, intervals, steps_per_interval):
    return record(
        lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay),
        intervals,
        steps_per_interval,
    )


@pytest.mark.parametrize("curve", ["linear", "1-sqrt"])
def test_weight_decay_aware_coefficients_are_several_times_nearer_to_the_replay_of_adamw(curve):
    # ηλ · steps = 4.78e-4 · 0.1 · 25 000: the 400B-token window at 16M tokens per update, in fewer steps.
    eta, lam, intervals, length = 0.0159, 0.1, 15, 50
    path = adamw_path(eta, lam, intervals, length)
    w = decay_factors(curve, n=intervals + 1)
    aware = weight_decay_aware_coefficients(w, learning_rate=eta, weight_decay=lam, interval_steps=length)
    expected = replay(path, w, length, eta * lam)

    def error(c):
        return np.linalg.norm(c @ path[::length] - expected) / np.linalg.norm(expected - path[0])

    plain_error, aware_error = error(coefficients_from_decay_factors(w)), error(aware)
    assert 0.03 < plain_error < 0.25
    assert aware_error < 0.04
    assert aware_error < plain_error / 3


def test_weight_decay_aware_coefficients_are_exact_at_one_step_per_interval() -> None:
    path = adamw_path(0.05, 0.4, intervals=12, steps_per_interval=1)
    w = decay_factors("cosine", n=13)
    c = weight_decay_aware_coefficients(w, learning_rate=0.05, weight_decay=0.4, interval_steps=1)
    np.testing.assert_allclose(c @ path, replay(path, w, 1, 0.02), rtol=1e-12)


def test_weight_decay_aware_coefficients_follow_the_formula_by_hand() -> None:
    # ηλ = 1/2, T = 1 and 2: ρ = 1/2, 1/4; w = 1, 1/2: P = (9/32, 9/16, 1), W = (9/16, 1/2).
    c = weight_decay_aware_coefficients([1, 0.5], learning_rate=0.5, weight_decay=1.0, interval_steps=[1, 2])
    np.testing.assert_allclose(c, [9 / 32 - 9 / 32, 9 / 16 - 1 / 8, 1 / 2], rtol=0, atol=1e-15)


@given(st.sampled_from(CURVES), COUNTS, st.floats(0, 1e-2), st.floats(0, 0.5), st.integers(1, 10**5))
@relaxed
def test_weight_decay_aware_coefficients_are_never_negative_nor_above_one_in_sum(curve, n, eta, lam, length):
    w = decay_factors(curve, n=n)
    c = weight_decay_aware_coefficients(w, learning_rate=eta, weight_decay=lam, interval_steps=length)
    assert (c >= 0).all()
    assert math.fsum(c) <= 1 + 1e-12
    per_interval = weight_decay_aware_coefficients(
        w, learning_rate=eta, weight_decay=lam, interval_steps=np.full(n - 1, length)
    )
    np.testing.assert_allclose(per_interval, c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("curve", CURVES)
def test_without_weight_decay_the_aware_coefficients_are_the_plain_ones(curve):
    w = decay_factors(curve, n=9)
    aware = weight_decay_aware_coefficients(w, learning_rate=0.1, weight_decay=0.0, interval_steps=1000)
    assert aware.tolist() == merge_coefficients(curve, n=9).tolist()


# The running merge


@pytest.mark.parametrize(("exponent", "curve"), [(1.0, "linear"), (0.5, "1-sqrt"), (2.0, "power:2")])
def test_the_running_merge_equals_the_direct_one_after_every_checkpoint(exponent, curve):
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
SHAPELESS = Curve("shapeless", (), lambda s: np.float64(0.5))
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
def test_a_wrong_argument_of_a_merge_is_told_what_is_wrong(arguments, message):
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
def test_a_wrong_table_of_decay_factors_is_told_what_is_wrong(w, message):
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
def test_wrong_coefficients_are_told_what_is_wrong(c, message):
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
def test_a_wrong_argument_of_the_weight_decay_aware_coefficients_is_told_what_is_wrong(changed, message):
    arguments = {"w": [0.5, 0.25], "learning_rate": 0.1, "weight_decay": 0.1, "interval_steps": 10}
    with pytest.raises(CurveError, match=message):
        weight_decay_aware_coefficients(**{**arguments, **changed})


def test_a_wrong_argument_of_the_running_merge_is_told_what_is_wrong() -> None:
    with pytest.raises(CurveError, match="n counts checkpoints from 1, found 0"):
        running_merge_factor(0)
    with pytest.raises(CurveError, match=r"exponent must be positive and finite, found 0\.0"):
        running_merge_factor(3, 0.0)
