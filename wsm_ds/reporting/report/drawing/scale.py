"""From values to pixels, and the ticks of an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wsm_ds.sizes import COUNT_UNITS

NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
"""Steps between ticks, as multiples of a power of ten."""
FAR = 4.0
"""A value is out of the picture if it is more than FAR times as far from the best as three quarters of the others."""


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low, high: the values at its ends; `low` < `high`.
        start, end: their places, in pixels.
        is_log: whether it is logarithmic; then `low` > 0.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, in pixels. A value that lies outside is placed at the nearer end."""
        inside = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether a value lies between the ends."""
        return self.low <= value <= self.high


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers from `low` to `high`.

    >>> ticks(0.0, 10.0, 6), ticks(3.12, 3.31, 5)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [3.15, 3.2, 3.25, 3.3])

    Args:
        low: the beginning of the axis.
        high: its end, larger than `low`.
        most: how many ticks there may be, 2 or more.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    # Where an end lies on a tick, one tick more fits than steps.
    step = next(nice * power for nice in (*NICE, 20.0) if (high - low) / (nice * power) < most - 1e-6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, 2 - math.floor(math.log10(step)))
    return [round(number * step, decimals) for number in range(first, last + 1)]


def tick_words(values: Sequence[float]) -> list[str]:
    """Returns the labels of ticks, with as many digits as it takes to tell where they are.

    >>> tick_words([3.15, 3.2, 3.25]), tick_words([0.0, 2.5e9, 5e9]), tick_words([1000.0, 2000.0])
    (['3.15', '3.20', '3.25'], ['0', '2.5B', '5B'], ['1000', '2000'])
    >>> tick_words([19_250.0, 19_500.0])
    ['19.25K', '19.5K']

    Args:
        values: rising.
    """
    if max(map(abs, values), default=0.0) >= 10_000:
        extent = (max(values) - min(values)) or abs(values[0])
        off = [max(abs(_rounded(value, digits) - value) for value in values) / extent for digits in range(3, 15)]
        digits = next((digits for digits, part in enumerate(off, 3) if part < 0.005), 15)
        return [_short(value, digits) for value in values]
    decimals = next((d for d in range(9) if all(abs(v - round(v, d)) < 1e-10 for v in values)), 9)
    return [f"{value:.{decimals}f}" for value in values]


def _short(value: float, digits: int) -> str:
    """Like `format_count`, with more digits."""
    rounded = _rounded(value, digits)
    fitting = [unit for unit in ("T", "B", "M", "K") if abs(rounded) >= COUNT_UNITS[unit]]
    return f"{rounded / COUNT_UNITS[fitting[0]]:.{digits}g}{fitting[0]}" if fitting else f"{rounded:.{digits}g}"


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def span_of(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Returns the ends of an axis that shows all values with a margin; some length, even for equal values.

    Args:
        values: one or more.
        margin: as a share of their range.
    """
    low, high = min(values), max(values)
    extent = (high - low) or abs(high) * 0.1 or 1.0
    return low - extent * margin, high + extent * margin


def without_far(values: Sequence[float], best: str) -> list[float]:
    """Returns the values that a picture shows: a diverged candidate must not squeeze all others into one line.

    >>> without_far([3.1, 3.2, 3.15, 3.3, 11.0], "less")
    [3.1, 3.2, 3.15, 3.3]

    Args:
        values: one or more.
        best: "less" or "more"; with "" all values are kept.
    """
    if not best or len(values) < 3:
        return list(values)
    sign = 1.0 if best == "less" else -1.0
    worse = sorted(sign * value for value in values)
    quarter = worse[(3 * (len(worse) - 1)) // 4]
    limit = worse[0] + FAR * max(quarter - worse[0], 1e-12)
    return [value for value in values if sign * value <= limit]
