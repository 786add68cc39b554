"""Narrower merges with the same centre: how far the coefficients spread around their mean.

A merge of decay factors w_1 … w_k has the coefficients c_j = w_j - w_{j+1} ("wsm"). They spread over the whole window.
Two other rows have the same mean index Σ j c_j = Σ w_i and a smaller variance, Σ w_i (1 - w_i):

- "qam": the coefficients q_j of the polynomial Π_i (1 - w_i + w_i t) = Σ_j q_j t^j, that is, the distribution of a sum
  of independent Bernoulli variables with the means w_i.
- "maxent": the row exp(a + b j + c j²) with the mean and the variance of "qam".

A dial λ lies between: (1 - λ) c + λ q. The width of both grows as √N. So it depends on how often the run was saved.

Source of "qam": arXiv 2609.35168; docs/theory.md, "Narrower merges".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from wsm_ds.errors import CurveError, did_you_mean, few
from wsm_ds.schedules.curves import Array

Kind = Literal["wsm", "qam", "maxent"]
KINDS: tuple[Kind, ...] = ("wsm", "qam", "maxent")
MOST_FACTORS = 20_000
"""The work for one row grows as N²; this many take about a second."""
_MOST_ITERATIONS = 200
_MOST_HALVINGS = 60
_LEAST_FRACTION = 1e-5
_MOMENT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Spread:
    """A kind of spread, and how much of it.

    Attributes:
        kind: "wsm", "qam" or "maxent".
        share: the dial λ, within [0, 1]: 0 gives the coefficients of "wsm".
    """

    kind: Kind = "wsm"
    share: float = 1.0

    def __str__(self) -> str:
        if self.share == 1.0 or self.kind == "wsm":
            return self.kind
        return f"{self.kind}:{self.share!r}"


def parse_spread(text: str) -> Spread:
    """Returns the spread that a text names.

    Example:
        >>> parse_spread("qam"), str(parse_spread("QAM:0.50"))
        (Spread(kind='qam', share=1.0), 'qam:0.5')

    Args:
        text: "wsm", "qam" or "maxent"; the latter two also with the dial λ, as "qam:0.5".

    Raises:
        CurveError: the name is unknown, or the dial is not a number within [0, 1].
    """
    name, colon, dial = text.strip().partition(":")
    kind = next((kind for kind in KINDS if kind == name.strip().lower()), None)
    if kind is None:
        raise CurveError(
            f"unknown spread {text!r}{did_you_mean(name, KINDS)}; write wsm, qam, maxent, or a dial between wsm and "
            "another one, as qam:0.5"
        )
    if not colon:
        return Spread(kind)
    try:
        share = float(dial)
    except ValueError:
        share = -1.0
    if kind == "wsm" or not 0.0 <= share <= 1.0:
        raise CurveError(f"spread {text!r}: the dial is a number from 0 (wsm) to 1 after qam or maxent, as qam:0.5")
    return Spread(kind, share)


def spread_coefficients(c: Array, w: Array, spread: Spread) -> Array:
    """Returns the coefficients with another spread and the same mean index.

    Args:
        c: float64[N], the coefficients of "wsm", oldest first.
        w: float64[N - 1], the decay factors that they come from, not rising, within [0, 1].
        spread: the kind and the dial.

    Returns:
        float64[N], oldest first, not negative.

    Raises:
        CurveError: see `bernoulli_sum` and `maximum_entropy`.
    """
    if spread.kind == "wsm" or spread.share == 0.0:
        return c
    q = bernoulli_sum(w) if spread.kind == "qam" else maximum_entropy(w)
    return q if spread.share == 1.0 else (1.0 - spread.share) * c + spread.share * q


def bernoulli_sum(w: Array) -> Array:
    """Returns the coefficients of Π_i (1 - w_i + w_i t), lowest power first.

    Example:
        >>> bernoulli_sum(np.array([0.75, 0.5, 0.25])).tolist()
        [0.09375, 0.40625, 0.40625, 0.09375]

    Args:
        w: float64[N - 1], within [0, 1].

    Returns:
        float64[N], not negative, with the mean Σ w_i and the variance Σ w_i (1 - w_i).

    Raises:
        CurveError: there are more than `MOST_FACTORS` factors.
    """
    if len(w) > MOST_FACTORS:
        raise CurveError(
            f"the spreads qam and maxent are for at most {MOST_FACTORS + 1} checkpoints, found {len(w) + 1}"
        )
    q = np.zeros(len(w) + 1)
    q[0] = 1.0
    for count, factor in enumerate(w, start=1):
        q[1 : count + 1] = (1.0 - factor) * q[1 : count + 1] + factor * q[:count]
        q[0] *= 1.0 - factor
    return q


def maximum_entropy(w: Array) -> Array:
    """Returns the row of largest entropy with the mean and the variance of `bernoulli_sum`: exp(a + b j + c j²).

    Args:
        w: float64[N - 1], within [0, 1].

    Returns:
        float64[N], not negative; mean and variance agree with those of `bernoulli_sum` to 9 digits.

    Raises:
        CurveError: there are more than `MOST_FACTORS` factors, or no such row is found.
    """
    q = bernoulli_sum(w)
    # Only a row on one or two neighbours has these moments then, or rounding cannot tell it from them.
    if np.count_nonzero(np.minimum(w, 1.0 - w) > _LEAST_FRACTION) < 2:
        return q
    variance = float((w * (1.0 - w)).sum())
    scale = max(1.0, math.sqrt(variance))
    x = (np.arange(len(q), dtype=np.float64) - w.sum()) / scale
    # A normal distribution, or for a small variance two neighbours that are as likely as it says.
    first = np.array([0.0, -0.5 if scale > 1.0 else max(-0.5 / variance, math.log(variance / 2.0))])
    row = _with_moments(np.stack([x, x * x]), np.array([0.0, variance / scale**2]), first)
    if row is None:
        raise CurveError(f"no maxent coefficients were found for the decay factors {few(w.tolist())}; use qam")
    return row


def _with_moments(powers: Array, target: Array, first: Array) -> Array | None:
    """The row ∝ exp(a x + b x²) with given moments, by Newton's method on the dual, which is convex.

    Args:
        powers: float64[2, N], x and x².
        target: float64[2], the moments: the means of x and of x².
        first: float64[2], a and b to begin with.

    Returns:
        float64[N], with the sum 1; None if the moments are not reached.
    """
    parameters = first
    value, row = _dual(parameters, powers, target)
    error = powers @ row - target
    for _ in range(_MOST_ITERATIONS):
        centred = powers - (powers @ row)[:, None]
        step = np.linalg.lstsq((centred * row) @ centred.T, error, rcond=None)[0]
        for _ in range(_MOST_HALVINGS):
            next_value, next_row = _dual(parameters - step, powers, target)
            next_error = powers @ next_row - target
            # Near the end the value changes by less than its rounding, and only the error tells.
            if next_value < value or np.abs(next_error).max() < np.abs(error).max():
                break
            step = step / 2.0
        else:
            break
        parameters, value, row, error = parameters - step, next_value, next_row, next_error
    return row if np.abs(error).max() <= _MOMENT_TOLERANCE * target[1] else None


def _dual(parameters: Array, powers: Array, target: Array) -> tuple[float, Array]:
    """log Σ exp(a x + b x²) minus a and b times their targets, and the row of these parameters."""
    with np.errstate(over="ignore", invalid="ignore"):  # a step that was too long: it is not taken
        exponents = parameters @ powers
        top = exponents.max()
        weights = np.exp(exponents - top)
        total = weights.sum()
        return float(top + np.log(total) - parameters @ target), weights / total
