"""Coefficients of a merge, from a decay curve or from the user.

Let θ_0 … θ_k be checkpoints, oldest first, N = k + 1, with the updates θ_i = θ_{i-1} - g_i between them. Then

    Σ_j c_j θ_j  =  θ_0 - Σ_{i=1..k} w_i g_i,      w_i = Σ_{j>=i} c_j,      c_j = w_j - w_{j+1}

with w_0 = 1 and w_{k+1} = 0. g_i is the sum of the updates of interval i, between θ_{i-1} and θ_i. So a merge with the
*coefficients* c_0 … c_k equals a run whose updates of interval i are scaled by the *decay factor* w_i. All arrays here
are float64, oldest first: N coefficients, N - 1 decay factors.

Source: Tian et al., arXiv 2507.17634, Theorem 3.1; docs/theory.md, "The identity". The grid is that of the paper: it
reproduces every digit of the weights in the paper's Figure 2. Megatron-LM's merge tool has the same grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from wsm_ds.errors import CurveError
from wsm_ds.schedules.curves import Array, Curve, parse_curve
from wsm_ds.schedules.grid import grid, interval_shares
from wsm_ds.schedules.spread import Spread, parse_spread, spread_coefficients

SUM_TOLERANCE = 1e-9
"""How far the sum of the user's coefficients may be from 1."""
_RISE_TOLERANCE = 1e-12  # a curve's function rounds; the user's decay factors must not rise at all


def decay_factors(
    curve: Curve | str,
    *,
    n: int | None = None,
    steps: Iterable[float] | None = None,
    oldest_interval: float | None = None,
    floor: float = 0.0,
) -> Array:
    """Returns the decay factors w_i = m + (1 - m) d(s_i), i = 1 … k, with the floor m.

    Example:
        >>> decay_factors("linear", n=4, floor=0.5).tolist()
        [0.875, 0.75, 0.625]

    Args:
        curve: a curve, or a text for `parse_curve`.
        n: as in `grid`.
        steps: as in `grid`.
        oldest_interval: as in `grid`.
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
    spread: Spread | str = "wsm",
) -> Array:
    """Returns the coefficients of the merge that emulates `curve`.

    With the floor m they are c = m e_k + (1 - m) c⁰: e_k is the newest checkpoint alone, c⁰ the merge without floor.
    Another spread than "wsm" gives a narrower row with the same mean index (docs/theory.md, "Narrower merges").

    The coefficients of `linear` are the shares of the intervals in the window. They are computed as exact fractions,
    and each is rounded once. Those of other curves are differences of decay factors that are rounded to float64.

    Example:
        >>> merge_coefficients("cosine", n=4).round(6).tolist()
        [0.146447, 0.353553, 0.353553, 0.146447]
        >>> merge_coefficients("1-sqrt", n=4).round(6).tolist()
        [0.5, 0.207107, 0.158919, 0.133975]
        >>> merge_coefficients("linear", n=4, spread="qam").tolist()
        [0.09375, 0.40625, 0.40625, 0.09375]

    Args:
        curve: a curve, or a text for `parse_curve`.
        n: number of checkpoints N >= 1, evenly spaced. Give either this or `steps`.
        steps: the checkpoints' positions, rising, in steps or tokens.
        oldest_interval: as in `grid`, in the unit of `steps`.
        floor: m = min_lr / peak_lr, within [0, 1].
        spread: a spread, or a text for `parse_spread`: "wsm", "qam", "maxent", or a dial as "qam:0.5".

    Returns:
        float64[N], oldest first, not negative; [1.0] for N = 1.

    Raises:
        CurveError: `curve` is not valid; both or neither of `n` and `steps` are given; N < 1; the steps do not rise;
            an interval is not positive; `floor` is not within [0, 1]; or `spread` is not valid.
    """
    curve = parse_curve(curve) if isinstance(curve, str) else curve
    spread = parse_spread(spread) if isinstance(spread, str) else spread
    positions = None if steps is None else list(steps)
    if curve.is_linear:
        c = _linear_coefficients(interval_shares(n, steps=positions, oldest_interval=oldest_interval), floor)
        if spread.kind == "wsm":
            return c
    w = decay_factors(curve, n=n, steps=positions, oldest_interval=oldest_interval, floor=floor)
    return spread_coefficients(c if curve.is_linear else coefficients_from_decay_factors(w), w, spread)


def _linear_coefficients(shares: list[Fraction], floor: float) -> Array:
    """(1 - m) times each interval's share of the window, and m more for the newest; exact, then rounded once."""
    _require_floor(floor)
    m = Fraction(floor)
    # Nearly always all intervals are equal, and a window may have a million of them.
    rounded = {share: float((1 - m) * share) for share in set(shares)}
    return np.array([*(rounded[share] for share in shares[:-1]), float((1 - m) * shares[-1] + m)])


def apply_floor(w: ArrayLike, floor: float) -> Array:
    """Returns the decay factors m + (1 - m) w_i, for a decay that ends at the ratio m = min_lr / peak_lr.

    The floor is applied to the decay factors and not to the coefficients, so that the coefficients, which are their
    differences, still sum to 1.

    Args:
        w: float64[N - 1], decay factors, not rising, within [0, 1].
        floor: m, within [0, 1].

    Returns:
        float64[N - 1], not rising, within [m, 1].

    Raises:
        CurveError: m is not within [0, 1], or `w` rises or leaves [0, 1]; names the value.
    """
    _require_floor(floor)
    return floor + (1.0 - floor) * _checked_decay_factors(w, "decay factors")


def _require_floor(floor: float) -> None:
    if not 0.0 <= floor <= 1.0:
        raise CurveError(f"floor, the ratio min_lr / peak_lr, must be within [0, 1], found {floor}")


def coefficients_from_decay_factors(w: ArrayLike) -> Array:
    """Returns c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k (Theorem 3.1), from any row of decay factors.

    Example:
        >>> coefficients_from_decay_factors([0.75, 0.5, 0.25]).tolist()
        [0.25, 0.25, 0.25, 0.25]

    Args:
        w: float64[N - 1], w_1 … w_k, within [0, 1], not rising.

    Returns:
        float64[N], not negative. The difference of two neighbours is nearly always exact in float64, so the sum is
        nearly always exactly 1.

    Raises:
        CurveError: `w` is not 1-D, not finite, leaves [0, 1] or rises; names the index and the values.
    """
    bounded = np.concatenate(([1.0], _checked_decay_factors(w, "decay factors"), [0.0]))
    return bounded[:-1] - bounded[1:]


def decay_factors_from_coefficients(c: ArrayLike) -> Array:
    """Returns w_i = Σ_{j>=i} c_j, i = 1 … k: the steps of the learning-rate staircase that the merge emulates.

    Example:
        >>> decay_factors_from_coefficients([0.25, 0.25, 0.25, 0.25]).tolist()
        [0.75, 0.5, 0.25]

    Args:
        c: float64[N], oldest first, not negative, with the sum 1.

    Returns:
        float64[N - 1], not rising, within [0, 1].

    Raises:
        CurveError: `c` is not 1-D, is empty, not finite or negative, or its sum is not 1; names the index and the
            value, or the sum.
    """
    sums_from_newest = np.cumsum(check_coefficients(c)[:0:-1])
    return np.minimum(sums_from_newest[::-1], 1.0)


def check_coefficients(c: ArrayLike, *, allow_negative: bool = False) -> Array:
    """Returns the user's coefficients as an array. It checks them and does not normalise them.

    Args:
        c: [N], oldest first.
        allow_negative: whether some may be negative: the sum then lies beyond the checkpoints, not between them.

    Returns:
        float64[N].

    Raises:
        CurveError: `c` is not 1-D, is empty, not finite or negative (names the index and the value), or its sum is
            more than 1e-9 away from 1 (names the sum).
    """
    coefficients = row_of_coefficients(c, allow_negative=allow_negative)
    total = math.fsum(coefficients)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise CurveError(
            f"coefficients must sum to 1 within {SUM_TOLERANCE:g}, found the sum {total!r} of "
            f"{len(coefficients)} coefficients; divide them by this sum if only their ratios matter"
        )
    return coefficients


def weight_decay_aware_coefficients(
    w: ArrayLike, *, learning_rate: float, weight_decay: float, interval_steps: ArrayLike
) -> Array:
    """Returns coefficients for AdamW: decoupled weight decay becomes weaker together with the learning rate.

    With ρ_i = (1 - ηλ)^T_i, P_i = Π_{m>i} (1 - η w_m λ)^T_m and W_i = w_i P_i:
    c_k = W_k, c_i = W_i - ρ_{i+1} W_{i+1}, c_0 = P_0 - ρ_1 W_1 Use the plain coefficients for weights that
    the optimizer does not decay (norms, biases). Inside each interval this is still an approximation (docs/theory.md,
    "What is exact").

    Args:
        w: float64[k], decay factors, not rising, within [0, 1].
        learning_rate: η, constant over the window.
        weight_decay: λ, that of the optimizer; 0 gives the plain coefficients. ηλ must be below 1.
        interval_steps: T, optimizer updates between checkpoints: one number, or [k] numbers, one for each interval.

    Returns:
        float64[k + 1], not negative. Their sum is slightly below 1, so a recipe's `coefficients` refuse them.

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

    # log1p and exp keep the precision of 1 - ηλ, which is close to 1.
    raw_shrink = np.exp(intervals * np.log1p(-decay_per_step))
    shrink = np.exp(intervals * np.log1p(-decay_per_step * factors))
    products = np.append(np.cumprod(shrink[::-1])[::-1], 1.0)
    scaled = factors * products[1:]
    coefficients = np.append(products[:1], scaled)
    coefficients[:-1] -= raw_shrink * scaled
    return coefficients.clip(min=0.0)


def running_merge_factor(n: int, exponent: float = 1.0) -> float:
    """Returns a_n = ((n - 1) / n)^p of the running merge M_n = a_n M_{n-1} + (1 - a_n) θ_n, n = 1, 2, …

    After n checkpoints M_n is their merge under d(s) = 1 - s^p, computed in the memory of one checkpoint. p = 1 is
    the running mean, p = 1/2 is 1-sqrt. The window starts at the first checkpoint, so a_1 = 0.

    Example:
        >>> [running_merge_factor(n) for n in (1, 2, 4)]
        [0.0, 0.5, 0.75]

    Args:
        n: number of the checkpoint within the window, from 1.
        exponent: p > 0.

    Raises:
        CurveError: n < 1, or p is not positive and finite.
    """
    if n < 1:
        raise CurveError(f"n counts checkpoints from 1, found {n}")
    if not 0.0 < exponent < math.inf:
        raise CurveError(f"exponent must be positive and finite, found {exponent}")
    return float(((n - 1) / n) ** exponent)


def _row(values: Any, argument: str) -> Array:
    try:
        row = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CurveError(f"{argument} must be a list of numbers: {error}") from None
    if row.ndim != 1:
        raise CurveError(f"{argument} must be one list of numbers, found shape {row.shape}")
    bad = np.flatnonzero(~np.isfinite(row))
    if bad.size:
        raise CurveError(f"{argument} must be finite, found {row[bad[0]]} at index {bad[0]}")
    return row


def row_of_coefficients(c: ArrayLike, *, allow_negative: bool = False) -> Array:
    """Returns coefficients as an array. Their sum may be any.

    Args:
        c: [N], oldest first.
        allow_negative: whether some may be negative.

    Raises:
        CurveError: `c` is not 1-D, is empty, not finite or negative; names the index and the value.
    """
    row = _row(c, "coefficients")
    if row.size == 0:
        raise CurveError("coefficients are empty: a merge needs at least one checkpoint")
    bad = np.flatnonzero(row < 0)
    if bad.size and not allow_negative:
        raise CurveError(f"coefficients must not be negative, found {row[bad[0]]} at index {bad[0]}")
    return row


def _checked_decay_factors(w: ArrayLike, argument: str, tolerance: float = 0.0) -> Array:
    row = _row(w, argument)
    outside = np.flatnonzero((row < -tolerance) | (row > 1.0 + tolerance))
    if outside.size:
        raise CurveError(f"{argument} must be within [0, 1], found {row[outside[0]]} at index {outside[0]}")
    lowest = np.minimum.accumulate(row)
    rises = np.flatnonzero(row > lowest + tolerance)
    if rises.size:
        i = rises[0]
        raise CurveError(f"{argument} must not rise, found {row[i]} at index {i} after {lowest[i]}")
    return np.clip(lowest, 0.0, 1.0)
