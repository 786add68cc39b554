"""Coefficients of a merge, from a decay curve or from the user, and the figures that describe them.

Checkpoints θ_0 … θ_k, oldest first, N = k + 1, and updates θ_i = θ_{i-1} - g_i between them. Then

    Σ_j c_j θ_j  =  θ_0 - Σ_{i=1..k} w_i g_i,      w_i = Σ_{j>=i} c_j,      c_j = w_j - w_{j+1}

with w_0 = 1 and w_{k+1} = 0: the *coefficients* c_0 … c_k scale the i-th segment of updates by the *decay
factor* w_i. All arrays here are float64, oldest first: N coefficients, N - 1 decay factors.

Source: Tian et al., arXiv 2507.17634, Theorem 3.1. The grid is the paper's (it gives the weights of its
Figure 2, to the printed digit) and that of Megatron-LM's merge tool.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from wsm_ds.errors import CurveError
from wsm_ds.schedules.curves import Array, Curve, parse_curve

SUM_TOLERANCE = 1e-9
MOST_CHECKPOINTS = 1_000_000
"""Of an even window, which is given as a number alone."""
_RISE_TOLERANCE = 1e-12  # of a curve's own rounding; a user's table may not rise at all


def grid(n: int | None = None, *, steps: Iterable[float] | None = None, oldest_interval: float | None = None) -> Array:
    """Positions s_1 … s_k at which the curve is read.

    Even: s_i = i / N. Uneven: with τ_i = steps_i - steps_{i-1} and τ_0 = oldest_interval,
    s_i = Σ_{m<i} τ_m / Σ_{m<=k} τ_m, which is i / N again if all τ are equal. Exact fractions, rounded
    once. Never i / k: that would give the newest checkpoint the weight 0.

    Args:
        n: number of checkpoints N >= 1, evenly spaced; or else
        steps: the checkpoints' positions, rising, in steps or tokens (any unit); ints of any size.
        oldest_interval: what the oldest checkpoint stands for, in the unit of `steps`; the median of the
            other intervals if not given.

    Returns:
        float64[N - 1], rising, within (0, 1).

    Raises:
        CurveError: both or neither of `n` and `steps`, N < 1, steps that do not rise (names the index and
            the values), an interval that is not positive.
    """
    if (n is None) == (steps is None):
        raise CurveError("give either n or steps, found " + ("neither" if n is None else "both"))
    if steps is not None:
        return _uneven_grid(_exact_steps(steps), oldest_interval)
    if oldest_interval is not None:
        raise CurveError("oldest_interval needs steps: n alone means evenly spaced checkpoints")
    count = _exact(n, "n")
    if count < 1 or count.denominator != 1:
        raise CurveError(f"n, the number of checkpoints, must be a whole number >= 1, found {n}")
    if count > MOST_CHECKPOINTS:
        raise CurveError(f"n, the number of checkpoints, is at most {MOST_CHECKPOINTS}, found {n}")
    return np.arange(1, int(count), dtype=np.float64) / float(count)


def decay_factors(
    curve: Curve | str,
    *,
    n: int | None = None,
    steps: Iterable[float] | None = None,
    oldest_interval: float | None = None,
    floor: float = 0.0,
) -> Array:
    """Decay factors w_i = m + (1 - m) d(s_i), i = 1 … k, with the floor m.

    Args:
        curve: a curve, or a text for `parse_curve`.
        n: as in `grid`; so are `steps` and `oldest_interval`.
        floor: m = min_lr / peak_lr, within [0, 1].

    Returns:
        float64[N - 1], not rising, within [0, 1].

    Raises:
        CurveError: as `grid`, `parse_curve` and `apply_floor`; or the curve rises or leaves [0, 1].
    """
    curve = parse_curve(curve) if isinstance(curve, str) else curve
    positions = grid(n, steps=steps, oldest_interval=oldest_interval)
    values = np.asarray(curve(positions))
    if values.shape != positions.shape:
        raise CurveError(f"curve {curve} gave shape {values.shape} for {positions.shape[0]} positions")
    w = _checked_decay_factors(values, f"curve {curve}", _RISE_TOLERANCE)
    return apply_floor(w, floor)


def merge_coefficients(
    curve: Curve | str,
    *,
    n: int | None = None,
    steps: Iterable[float] | None = None,
    oldest_interval: float | None = None,
    floor: float = 0.0,
) -> Array:
    """Coefficients of the merge that emulates `curve`: c = m e_k + (1 - m) c⁰ with the floor m.

    >>> merge_coefficients("linear", n=4).tolist()
    [0.25, 0.25, 0.25, 0.25]

    Args:
        curve: as in `decay_factors`; so are the others.

    Returns:
        float64[N], oldest first, not negative; [1.0] for N = 1.

    Raises:
        CurveError: as `decay_factors`.
    """
    w = decay_factors(curve, n=n, steps=steps, oldest_interval=oldest_interval, floor=floor)
    return coefficients_from_decay_factors(w)


def apply_floor(w: ArrayLike, floor: float) -> Array:
    """Decay factors m + (1 - m) w_i, for a decay that ends at the ratio m = min_lr / peak_lr.

    Done here and not on the coefficients, so that these still telescope to the sum 1.

    Raises:
        CurveError: m is not within [0, 1], or `w` is no valid row of decay factors.
    """
    if not 0.0 <= floor <= 1.0:
        raise CurveError(f"floor, the ratio min_lr / peak_lr, must be within [0, 1], found {floor}")
    return floor + (1.0 - floor) * _checked_decay_factors(w, "decay factors")


def coefficients_from_decay_factors(w: ArrayLike) -> Array:
    """c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k (Theorem 3.1), also for a table w of your own.

    Args:
        w: float64[N - 1], w_1 … w_k, within [0, 1], not rising.

    Returns:
        float64[N], not negative. Differences of neighbours are nearly always exact, so the sum is too.

    Raises:
        CurveError: `w` is not 1-D, not finite, leaves [0, 1] or rises; names the index and the values.
    """
    bounded = np.concatenate(([1.0], _checked_decay_factors(w, "decay factors"), [0.0]))
    return bounded[:-1] - bounded[1:]


def decay_factors_from_coefficients(c: ArrayLike) -> Array:
    """w_i = Σ_{j>=i} c_j, i = 1 … k: the staircase learning rate that the coefficients emulate.

    Raises:
        CurveError: as `check_coefficients`.
    """
    sums_from_newest = np.cumsum(check_coefficients(c)[:0:-1])
    return np.minimum(sums_from_newest[::-1], 1.0)


def check_coefficients(c: ArrayLike) -> Array:
    """The user's coefficients as float64[N], if they are valid; they are not normalised.

    Raises:
        CurveError: not 1-D or empty, not finite, negative (names index and value), or the sum is more
            than 1e-9 away from 1.
    """
    coefficients = _non_negative(c)
    total = math.fsum(coefficients)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise CurveError(
            f"coefficients must sum to 1 within {SUM_TOLERANCE:g}, found the sum {total!r} of "
            f"{len(coefficients)} coefficients; divide them by it if only their ratios were meant"
        )
    return coefficients


def effective_sample_size(c: ArrayLike) -> float:
    """ESS = 1 / Σ c_j²: of how many equally weighted checkpoints the merge averages the noise.

    Raises:
        CurveError: not 1-D or empty, not finite, negative, or all zero.
    """
    squares = math.fsum(_non_negative(c) ** 2)
    if squares == 0.0:
        raise CurveError("coefficients are all zero")
    return 1.0 / squares


def lag(c: ArrayLike, steps: Iterable[float]) -> float:
    """Lag Σ_j c_j (s_k - s_j): how old the merge is, in the unit of `steps` (steps or tokens).

    Raises:
        CurveError: as `grid` for `steps`, `effective_sample_size` for `c`; or their lengths differ.
    """
    coefficients, positions = _non_negative(c), _exact_steps(steps)
    if len(coefficients) != len(positions):
        raise CurveError(f"found {len(coefficients)} coefficients and {len(positions)} steps")
    ages = (float(positions[-1] - position) for position in positions)
    return math.fsum(weight * age for weight, age in zip(coefficients.tolist(), ages, strict=True))


def weight_decay_aware_coefficients(
    w: ArrayLike, *, learning_rate: float, weight_decay: float, interval_steps: ArrayLike
) -> Array:
    """Coefficients that also emulate how decoupled weight decay (AdamW) weakens with the learning rate.

    With ρ_i = (1 - ηλ)^T_i, P_i = Π_{m>i} (1 - η w_m λ)^T_m and W_i = w_i P_i:
    c_k = W_k, c_i = W_i - ρ_{i+1} W_{i+1}, c_0 = P_0 - ρ_1 W_1. Weights that the optimizer does not decay
    (norms, biases) want the plain coefficients. Still an approximation inside each segment.

    Args:
        w: float64[k], decay factors, not rising, within [0, 1].
        learning_rate: η, the constant one of the window.
        weight_decay: λ, the optimizer's; 0 gives the plain coefficients. ηλ must be below 1.
        interval_steps: T, optimizer updates between checkpoints: one number, or one per interval, [k].

    Returns:
        float64[k + 1], not negative. The sum is slightly below 1, so `check_coefficients` refuses them.

    Raises:
        CurveError: an argument above is out of range or of the wrong shape; names it and the value.
    """
    factors = _checked_decay_factors(w, "decay factors")
    is_scalar = np.isscalar(interval_steps)
    intervals = _row([interval_steps] if is_scalar else interval_steps, "interval_steps")
    if not is_scalar and intervals.shape != factors.shape:
        raise CurveError(f"interval_steps must be one number or {len(factors)}, found {len(intervals)}")
    if (intervals <= 0).any():
        raise CurveError(f"interval_steps must be positive, found {intervals.min()}")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise CurveError(f"{name} must be finite and not negative, found {value}")
    decay_per_step = learning_rate * weight_decay
    if decay_per_step >= 1.0:
        raise CurveError(f"learning_rate * weight_decay must be below 1, found {decay_per_step}")

    raw_shrink = np.exp(intervals * np.log1p(-decay_per_step))
    shrink = np.exp(intervals * np.log1p(-decay_per_step * factors))
    products = np.append(np.cumprod(shrink[::-1])[::-1], 1.0)
    scaled = factors * products[1:]
    coefficients = np.append(products[:1], scaled)
    coefficients[:-1] -= raw_shrink * scaled
    return coefficients.clip(min=0.0)


def running_merge_factor(n: int, exponent: float = 1.0) -> float:
    """a_n = ((n - 1) / n)^p of the running merge M_n = a_n M_{n-1} + (1 - a_n) θ_n, n = 1, 2, …

    After n checkpoints M_n is their merge under d(s) = 1 - s^p, in the memory of one checkpoint: p = 1 is
    the running mean, p = 1/2 is 1-sqrt. The window's start is fixed, and a_1 = 0.

    Raises:
        CurveError: n < 1, or p is not positive and finite.
    """
    if n < 1:
        raise CurveError(f"n counts checkpoints from 1, found {n}")
    if not 0.0 < exponent < math.inf:
        raise CurveError(f"exponent must be positive and finite, found {exponent}")
    return float(((n - 1) / n) ** exponent)


def _exact(value: Any, what: str) -> Fraction:
    try:
        return Fraction(operator.index(value))
    except TypeError:
        if isinstance(value, float) and math.isfinite(value):
            return Fraction(value)
    raise CurveError(f"{what} must be a finite number, found {value!r}")


def _exact_steps(steps: Iterable[float]) -> list[Fraction]:
    positions = [_exact(step, f"steps[{i}]") for i, step in enumerate(steps)]
    if not positions:
        raise CurveError("steps is empty: a merge needs at least one checkpoint")
    if positions[0] < 0:
        raise CurveError(f"steps must not be negative, found steps[0] = {positions[0]}")
    for i, (older, newer) in enumerate(pairwise(positions), start=1):
        if newer <= older:
            raise CurveError(f"steps must rise, found steps[{i - 1}] = {older} and steps[{i}] = {newer}")
    return positions


def _uneven_grid(positions: Sequence[Fraction], oldest_interval: float | None) -> Array:
    intervals = sorted(newer - older for older, newer in pairwise(positions))
    if oldest_interval is not None:
        oldest = _exact(oldest_interval, "oldest_interval")
        if oldest <= 0:
            raise CurveError(f"oldest_interval must be positive, found {oldest_interval}")
    elif intervals:
        oldest = (intervals[(len(intervals) - 1) // 2] + intervals[len(intervals) // 2]) / 2
    else:
        return np.empty(0)
    start = positions[0] - oldest
    duration = positions[-1] - start
    return np.array([float((position - start) / duration) for position in positions[:-1]])


def _row(values: Any, what: str) -> Array:
    try:
        row = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CurveError(f"{what} must be a list of numbers: {error}") from None
    if row.ndim != 1:
        raise CurveError(f"{what} must be one list of numbers, found shape {row.shape}")
    bad = np.flatnonzero(~np.isfinite(row))
    if bad.size:
        raise CurveError(f"{what} must be finite, found {row[bad[0]]} at index {bad[0]}")
    return row


def _non_negative(c: ArrayLike) -> Array:
    row = _row(c, "coefficients")
    if row.size == 0:
        raise CurveError("coefficients are empty: a merge needs at least one checkpoint")
    bad = np.flatnonzero(row < 0)
    if bad.size:
        raise CurveError(f"coefficients must not be negative, found {row[bad[0]]} at index {bad[0]}")
    return row


def _checked_decay_factors(w: ArrayLike, what: str, tolerance: float = 0.0) -> Array:
    row = _row(w, what)
    outside = np.flatnonzero((row < -tolerance) | (row > 1.0 + tolerance))
    if outside.size:
        raise CurveError(f"{what} must be within [0, 1], found {row[outside[0]]} at index {outside[0]}")
    lowest = np.minimum.accumulate(row)
    rises = np.flatnonzero(row > lowest + tolerance)
    if rises.size:
        i = rises[0]
        raise CurveError(f"{what} must not rise, found {row[i]} at index {i} after {lowest[i]}")
    return np.clip(lowest, 0.0, 1.0)
