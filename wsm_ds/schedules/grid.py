"""The positions, within the decay, at which a merge reads its curve.

See docs/theory.md, "From a curve to coefficients". A window of N checkpoints lasts N intervals: its oldest checkpoint
stands for the interval before it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from wsm_ds.errors import CurveError
from wsm_ds.schedules.curves import Array

MOST_CHECKPOINTS = 1_000_000
"""Largest `n`, so that a mistyped number does not fill the memory."""


def grid(n: int | None = None, *, steps: Iterable[float] | None = None, oldest_interval: float | None = None) -> Array:
    """Returns the positions s_1 … s_k at which the curve is read.

    Evenly spaced checkpoints: s_i = i / N. Others: with τ_i = steps_i - steps_{i-1} and τ_0 = oldest_interval,
    s_i = Σ_{m<i} τ_m / Σ_{m<=k} τ_m, which is i / N again if all τ are equal. The positions are computed as exact
    fractions and rounded once. They are never i / k, which would give the newest checkpoint the coefficient 0.

    Example:
        >>> grid(4).tolist()
        [0.25, 0.5, 0.75]
        >>> grid(steps=[1000, 2000, 4000], oldest_interval=1000).tolist()
        [0.25, 0.5]

    Args:
        n: number of checkpoints N >= 1, evenly spaced. Give either this or `steps`.
        steps: the checkpoints' positions, rising, in steps or tokens (any unit); integers of any size.
        oldest_interval: the interval before the oldest checkpoint, which this checkpoint stands for, in the unit of
            `steps`. Default: the median of the other intervals.

    Returns:
        float64[N - 1], rising, within (0, 1).

    Raises:
        CurveError: both or neither of `n` and `steps` are given; N < 1; the steps do not rise (names the index and
            the values); an interval is not positive.
    """
    if steps is None:
        count = _count(n, oldest_interval)
        return np.arange(1, count, dtype=np.float64) / float(count)
    if n is not None:
        raise CurveError("give either n or steps, found both")
    positions = exact_steps(steps)
    start = positions[0] - _oldest_interval(positions, oldest_interval)
    # Exact fractions: with floats, equal intervals would not give exactly i / N.
    duration = positions[-1] - start
    return np.array([float((position - start) / duration) for position in positions[:-1]])


def interval_shares(
    n: int | None = None, *, steps: Iterable[float] | None = None, oldest_interval: float | None = None
) -> list[Fraction]:
    """Returns the intervals τ_0 … τ_k as exact shares of the window's duration; their sum is 1.

    Example:
        >>> [str(share) for share in interval_shares(3)]
        ['1/3', '1/3', '1/3']
        >>> [str(share) for share in interval_shares(steps=[1000, 2000, 4000], oldest_interval=1000)]
        ['1/4', '1/4', '1/2']

    Args:
        n: as in `grid`.
        steps: as in `grid`.
        oldest_interval: as in `grid`.

    Returns:
        N shares, that of the oldest checkpoint first.

    Raises:
        CurveError: as `grid`.
    """
    if steps is None:
        count = _count(n, oldest_interval)
        return [Fraction(1, count)] * count
    if n is not None:
        raise CurveError("give either n or steps, found both")
    positions = exact_steps(steps)
    bounds = [positions[0] - _oldest_interval(positions, oldest_interval), *positions]
    duration = bounds[-1] - bounds[0]
    return [(newer - older) / duration for older, newer in pairwise(bounds)]


def _count(n: int | None, oldest_interval: float | None) -> int:
    """The number of evenly spaced checkpoints, checked."""
    if n is None:
        raise CurveError("give either n or steps, found neither")
    if oldest_interval is not None:
        raise CurveError("oldest_interval needs steps: n alone means evenly spaced checkpoints")
    count = _exact(n, "n")
    if count < 1 or count.denominator != 1:
        raise CurveError(f"n, the number of checkpoints, must be a whole number >= 1, found {n}")
    if count > MOST_CHECKPOINTS:
        raise CurveError(f"n, the number of checkpoints, is at most {MOST_CHECKPOINTS}, found {n}")
    return int(count)


def exact_steps(steps: Iterable[float]) -> list[Fraction]:
    """Returns the checkpoints' positions as exact numbers.

    Args:
        steps: [N], rising, not negative, in steps or tokens.

    Raises:
        CurveError: `steps` is empty, negative, not finite or does not rise; names the index and the value.
    """
    positions = [_exact(step, f"steps[{i}]") for i, step in enumerate(steps)]
    if not positions:
        raise CurveError("steps is empty: a merge needs at least one checkpoint")
    if positions[0] < 0:
        raise CurveError(f"steps must not be negative, found steps[0] = {positions[0]}")
    for i, (older, newer) in enumerate(pairwise(positions), start=1):
        if newer <= older:
            raise CurveError(f"steps must rise, found steps[{i - 1}] = {older} and steps[{i}] = {newer}")
    return positions


def _exact(value: Any, argument: str) -> Fraction:
    try:
        return Fraction(operator.index(value))
    except TypeError:
        if isinstance(value, float) and math.isfinite(value):
            return Fraction(value)
    raise CurveError(f"{argument} must be a finite number, found {value!r}")


def _oldest_interval(positions: Sequence[Fraction], oldest_interval: float | None) -> Fraction:
    """The interval that the oldest checkpoint stands for: given, or the median of the others (1 if there are none)."""
    if oldest_interval is not None:
        oldest = _exact(oldest_interval, "oldest_interval")
        if oldest <= 0:
            raise CurveError(f"oldest_interval must be positive, found {oldest_interval}")
        return oldest
    intervals = sorted(newer - older for older, newer in pairwise(positions))
    if not intervals:
        return Fraction(1)
    return (intervals[(len(intervals) - 1) // 2] + intervals[len(intervals) // 2]) / 2
