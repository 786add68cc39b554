"""Figures that describe a row of coefficients: how much noise it averages out, how old it is, and how wide.

All arrays are float64, oldest first. Ages are counted back from the newest checkpoint, in steps, samples or tokens.
"""

import math
from collections.abc import Iterable

from numpy.typing import ArrayLike

from wsm_ds.errors import CurveError
from wsm_ds.schedules.coefficients import row_of_coefficients
from wsm_ds.schedules.curves import Array
from wsm_ds.schedules.grid import exact_steps


def effective_sample_size(c: ArrayLike, *, allow_negative: bool = False) -> float:
    """Returns ESS = 1 / Σ c_j²: the number of equally weighted checkpoints that average out as much noise.

    It is below 1 if negative coefficients make the sum noisier than one checkpoint.

    Example:
        >>> effective_sample_size([0.25, 0.25, 0.25, 0.25])
        4.0

    Args:
        c: [N], oldest first.
        allow_negative: whether some coefficients may be negative.

    Raises:
        CurveError: `c` is not 1-D, is empty, not finite, negative, or all zero.
    """
    squares = math.fsum(row_of_coefficients(c, allow_negative=allow_negative) ** 2)
    if squares == 0.0:
        raise CurveError("coefficients are all zero")
    return 1.0 / squares


def lag(c: ArrayLike, steps: Iterable[float], *, allow_negative: bool = False) -> float:
    """Returns the lag Σ_j c_j (s_k - s_j): the mean age of the merge, in the unit of `steps` (steps or tokens).

    Example:
        >>> lag([0.25, 0.25, 0.25, 0.25], steps=[1000, 2000, 3000, 4000])
        1500.0

    Args:
        c: [N], oldest first.
        steps: [N], the checkpoints' positions, rising.
        allow_negative: whether some coefficients may be negative. The lag of a sum beyond the newest checkpoint is
            negative.

    Raises:
        CurveError: `c` is not 1-D, is empty, not finite, or negative; `steps` do not rise; or their lengths differ.
    """
    coefficients, ages = _with_ages(c, steps, allow_negative)
    return math.fsum(weight * age for weight, age in zip(coefficients.tolist(), ages, strict=True))


def age_deviation(c: ArrayLike, steps: Iterable[float]) -> float:
    """Returns the standard deviation of the age of a merge's weights, √(Σ_j c_j (s_k - s_j - lag)²).

    Example:
        >>> age_deviation([0.25, 0.25, 0.25, 0.25], steps=[1000, 2000, 3000, 4000])
        1118.033988749895

    Args:
        c: [N], oldest first, not negative, with the sum 1.
        steps: [N], the checkpoints' positions, rising.

    Raises:
        CurveError: `c` is not 1-D, is empty, not finite, or negative; `steps` do not rise; or their lengths differ.
    """
    coefficients, ages = _with_ages(c, steps, allow_negative=False)
    weights = coefficients.tolist()
    mean = math.fsum(weight * age for weight, age in zip(weights, ages, strict=True))
    return math.sqrt(math.fsum(weight * (age - mean) ** 2 for weight, age in zip(weights, ages, strict=True)))


def _with_ages(c: ArrayLike, steps: Iterable[float], allow_negative: bool) -> tuple[Array, list[float]]:
    """The coefficients, and the age of each checkpoint."""
    coefficients, positions = row_of_coefficients(c, allow_negative=allow_negative), exact_steps(steps)
    if len(coefficients) != len(positions):
        raise CurveError(f"found {len(coefficients)} coefficients and {len(positions)} steps")
    return coefficients, [float(positions[-1] - position) for position in positions]
