"""A merge equals a replay of the recorded updates with decayed learning rates; with weight decay nearly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy import torch

from wsm_ds.schedules.coefficients import (
    coefficients_from_decay_factors,
    decay_factors,
    merge_coefficients,
    weight_decay_aware_coefficients,
)
from wsm_ds.schedules.curves import Array

CURVES = ["linear", "cosine", "1-sqrt", "power:2", "inverse-sqrt:0.1", "exponential:0.1", "ema"]


def record(make_optimizer: Callable[[list[torch.Tensor]], Any], intervals: int, steps_per_interval: int) -> Array:
    """Trains a noisy logistic regression; the checkpoints and each interval's parameters, step by step."""
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


def replay(path: Array, w: Any, steps_per_interval: int, decay_per_step: float = 0.0) -> Array:
    """The recorded updates once more, each scaled by its interval's decay factor."""
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
def test_a_merge_is_the_replay_with_the_staircase_learning_rate(name: str) -> None:
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


def adamw_path(learning_rate: float, weight_decay: float, intervals: int, steps_per_interval: int) -> Array:
    return record(
        lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay),
        intervals,
        steps_per_interval,
    )


@pytest.mark.parametrize("curve", ["linear", "1-sqrt"])
def test_weight_decay_aware_coefficients_are_several_times_nearer_to_the_replay_of_adamw(curve: str) -> None:
    # ηλ · steps = 4.78e-4 · 0.1 · 25 000: the 400B-token window at 16M tokens per update, in fewer steps.
    eta, lam, intervals, length = 0.0159, 0.1, 15, 50
    path = adamw_path(eta, lam, intervals, length)
    w = decay_factors(curve, n=intervals + 1)
    aware = weight_decay_aware_coefficients(w, learning_rate=eta, weight_decay=lam, interval_steps=length)
    expected = replay(path, w, length, eta * lam)

    def error(c: Array) -> float:
        return float(np.linalg.norm(c @ path[::length] - expected) / np.linalg.norm(expected - path[0]))

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


@given(st.sampled_from(CURVES), st.integers(1, 200), st.floats(0, 1e-2), st.floats(0, 0.5), st.integers(1, 10**5))
@settings(deadline=None)
def test_weight_decay_aware_coefficients_are_never_negative_nor_above_one_in_sum(
    curve: str, n: int, eta: float, lam: float, length: int
) -> None:
    w = decay_factors(curve, n=n)
    c = weight_decay_aware_coefficients(w, learning_rate=eta, weight_decay=lam, interval_steps=length)
    assert (c >= 0).all()
    assert math.fsum(c) <= 1 + 1e-12
    per_interval = weight_decay_aware_coefficients(
        w, learning_rate=eta, weight_decay=lam, interval_steps=np.full(n - 1, length)
    )
    np.testing.assert_allclose(per_interval, c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("curve", CURVES)
def test_without_weight_decay_the_aware_coefficients_are_the_plain_ones(curve: str) -> None:
    w = decay_factors(curve, n=9)
    aware = weight_decay_aware_coefficients(w, learning_rate=0.1, weight_decay=0.0, interval_steps=1000)
    assert aware.tolist() == coefficients_from_decay_factors(w).tolist()
