"""Decay curves: the shape of the learning-rate decay that a merge emulates.

A curve is a pure function d(s) of the fraction s of the decay that is over, 0 <= s <= 1. Its value is the factor
on the peak learning rate, and it never rises. One object serves two uses: a merge reads the curve on a grid
(`wsm_ds.schedules.coefficients`), a scheduler reads it at every step.

Source: Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training",
arXiv 2507.17634.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import CurveError, did_you_mean

Array = NDArray[np.float64]


def linear(s: Array) -> Array:
    """d(s) = 1 - s. The merge is the uniform mean (SMA, LAWA, SWA)."""
    return 1.0 - s


def cosine(s: Array) -> Array:
    """d(s) = (1 + cos(pi s)) / 2. The checkpoints in the middle of the window have the largest coefficients."""
    return (1.0 + np.cos(np.pi * s)) / 2.0


def one_minus_sqrt(s: Array) -> Array:
    """d(s) = 1 - sqrt(s). The *oldest* checkpoint has the largest coefficient, 1/sqrt(N).

    Several public implementations have this order backwards.
    """
    return 1.0 - np.sqrt(s)


def power(s: Array, exponent: float) -> Array:
    """d(s) = 1 - s^p. p = 1 is the mean, p = 1/2 is 1-sqrt, p = 2 gives coefficients that rise almost linearly."""
    return 1.0 - np.power(s, exponent)


def inverse_sqrt(s: Array, final_ratio: float) -> Array:
    """d(s) = 1 / sqrt(1 + a s) with a = 1/r^2 - 1, so d(1) = r.

    It is computed as r / hypot(r, sqrt((1 - r^2) s)), which is equal and does not overflow for a tiny r.
    """
    return final_ratio / np.hypot(final_ratio, np.sqrt((1.0 - final_ratio * final_ratio) * s))


def exponential(s: Array, final_ratio: float) -> Array:
    """d(s) = r^s, so d(1) = r. Its coefficients are those of `ema` in the opposite order."""
    return np.exp(math.log(final_ratio) * s)


def ema(s: Array, ratio: float = 0.1) -> Array:
    """d(s) = 1 - r^(1 - s). An exponential moving average with the factor 1 - r^(1/N) for each new checkpoint.

    It is the only curve with d(0) = 1 - r instead of 1. The coefficients never read d(0), because their grid starts
    at s = 1/N: the missing r^(1 - 1/N) is the coefficient that the average leaves to its first checkpoint. A learning
    rate that follows this curve falls from the peak to (1 - r) peak in the first step of the decay.
    """
    return -np.expm1(math.log(ratio) * (1.0 - s))


def _interpolated(s: Array, *points: float) -> Array:
    # np.interp may leave the interval by one rounding, hence the clip.
    return np.clip(np.interp(s, points[0::2], points[1::2]), points[-1], 1.0)


class _Shape(NamedTuple):
    """A named curve: its function, and the name, upper limit and default of its one parameter, if it has one."""

    function: Callable[..., Array]
    parameter: str = ""
    upper: float = math.inf
    default: float | None = None

    def usage(self, name: str) -> str:
        if not self.parameter:
            return name
        limits = f"0 < {self.parameter} < {self.upper:g}"
        if self.default is None:
            return f"{name}:{self.parameter} ({limits})"
        return f"{name}[:{self.parameter}] ({limits}, default {self.default})"


_SHAPES = {
    "linear": _Shape(linear),
    "cosine": _Shape(cosine),
    "1-sqrt": _Shape(one_minus_sqrt),
    "power": _Shape(power, "P"),
    "inverse-sqrt": _Shape(inverse_sqrt, "R", upper=1.0),
    "exponential": _Shape(exponential, "R", upper=1.0),
    "ema": _Shape(ema, "R", upper=1.0, default=0.1),
}
_ALIASES = {"mean": "linear", "minus-sqrt": "1-sqrt", "one-minus-sqrt": "1-sqrt"}
_TABLE = "table"


@dataclass(frozen=True)
class Curve:
    """A decay curve with its name and parameters. Curves are equal if these two are; a curve can be pickled.

    `str(curve)` is the text from which `parse_curve` makes an equal curve. A curve of your own is
    `Curve("name", (), function)`; `parse_curve` cannot make it from a text.

    Attributes:
        name: one of the names that `parse_curve` knows, or your own.
        parameters: the arguments of `function` after s; of a table s_0, d_0, s_1, d_1, …
        function: (float64 array of s, *parameters) -> float64 array of the same shape.
    """

    name: str
    parameters: tuple[float, ...]
    function: Callable[..., Array] = field(compare=False, repr=False)

    @overload
    def __call__(self, s: float) -> np.float64: ...

    @overload
    def __call__(self, s: Array) -> Array: ...

    def __call__(self, s: float | Array) -> np.float64 | Array:
        """Returns d(s), the factor on the peak learning rate.

        Example:
            >>> float(named_curve("1-sqrt")(0.25))
            0.5
            >>> named_curve("linear")(np.array([0.25, 0.5])).tolist()
            [0.75, 0.5]

        Args:
            s: fraction of the decay that is over, within [0, 1]; a scalar or a float64 array.

        Returns:
            float64, of the shape of `s` (a scalar for a scalar).

        Raises:
            CurveError: s is outside [0, 1] or NaN; names the curve and the first such value.
        """
        positions = np.asarray(s, dtype=np.float64)
        outside = positions[~((positions >= 0.0) & (positions <= 1.0))]
        if outside.size:
            raise CurveError(f"curve {self} is defined on 0 <= s <= 1, found s = {outside[0]}")
        factors = np.asarray(self.function(positions, *self.parameters), dtype=np.float64)
        scalar_or_array: np.float64 | Array = factors[()]
        return scalar_or_array

    @property
    def is_linear(self) -> bool:
        """Whether d(s) = 1 - s, however it was written: "linear", "power:1" or "table:1,0"."""
        written = ((linear, ()), (power, (1.0,)), (_interpolated, (0.0, 1.0, 1.0, 0.0)))
        return (self.function, self.parameters) in written

    def __str__(self) -> str:
        texts = [repr(float(parameter)).removesuffix(".0") for parameter in self.parameters]
        if self.name == _TABLE:
            texts = [f"{s}={d}" for s, d in zip(texts[0::2], texts[1::2], strict=True)]
        return f"{self.name}:{','.join(texts)}" if texts else self.name


def named_curve(name: str, *parameters: float) -> Curve:
    """Returns the curve of that name.

    Example:
        >>> str(named_curve("power", 0.5)), str(named_curve("mean"))
        ('power:0.5', 'linear')

    Args:
        name: linear (mean), cosine, 1-sqrt (minus-sqrt), power, inverse-sqrt, exponential or ema.
        *parameters: power takes its exponent p > 0. inverse-sqrt and exponential take d(1), within (0, 1). ema takes
            r, the weight that it leaves to everything before the window, within (0, 1), by default 0.1.

    Raises:
        CurveError: unknown name (lists the valid ones), wrong number of parameters, or one out of range.
    """
    name = _ALIASES.get(name, name)
    shape = _SHAPES.get(name)
    if shape is None:
        suggestion = did_you_mean(name, [*_SHAPES, *_ALIASES, _TABLE])
        raise CurveError(f"unknown decay curve {name!r}{suggestion}; valid curves: {_valid_curves()}")
    if shape.default is not None and not parameters:
        parameters = (shape.default,)
    if len(parameters) != bool(shape.parameter):
        listed = f"found {len(parameters)}: {', '.join(map(str, parameters))}" if parameters else "found none"
        expected = "takes one parameter" if shape.parameter else "takes no parameter"
        raise CurveError(f"decay curve {name!r} {expected}, {listed}; write {shape.usage(name)}")
    for parameter in parameters:
        if not 0.0 < parameter < shape.upper:
            raise CurveError(f"decay curve {name!r}: {parameter} is out of range; write {shape.usage(name)}")
    return Curve(name, tuple(float(parameter) for parameter in parameters), shape.function)


def curve_from_points(points: Iterable[tuple[float, float]]) -> Curve:
    """Returns a curve through points (s, d), linear between them.

    Example:
        >>> str(curve_from_points([(0, 1), (0.5, 0.25), (1, 0)]))
        'table:0=1,0.5=0.25,1=0'

    Args:
        points: at least two; s rises from 0 to 1, d does not rise, d(0) = 1, every d is within [0, 1].

    Raises:
        CurveError: a rule above is broken; names the point and the values.
    """
    try:
        table = [(float(s), float(d)) for s, d in points]
    except (TypeError, ValueError) as error:
        raise CurveError(f"a table is a list of pairs of numbers (s, d): {error}") from None
    if len(table) < 2:
        raise CurveError(f"a table needs at least the points s = 0 and s = 1, found {len(table)} point(s)")
    for i, (s, d) in enumerate(table):
        if not (0.0 <= s <= 1.0 and 0.0 <= d <= 1.0):
            raise CurveError(f"table point {i}: s and d must be within [0, 1], found s = {s}, d = {d}")
    for i, ((s, d), (next_s, next_d)) in enumerate(pairwise(table), start=1):
        if next_s <= s:
            raise CurveError(f"table point {i}: s must rise, found {next_s} after {s}")
        if next_d > d:
            raise CurveError(f"table point {i}: d must not rise, found {next_d} after {d}")
    if table[0] != (0.0, 1.0) or table[-1][0] != 1.0:
        raise CurveError(f"a table must start at s = 0 with d = 1 and end at s = 1, found {table[0]} … {table[-1]}")
    return Curve(_TABLE, tuple(value for point in table for value in point), _interpolated)


def curve_from_values(values: Iterable[float]) -> Curve:
    """Returns a curve through equally spaced values, linear between them.

    Args:
        values: at least two, from d(0) = 1 to d(1), not rising, within [0, 1].

    Raises:
        CurveError: as `curve_from_points`.
    """
    table = list(values)
    last = max(len(table) - 1, 1)
    return curve_from_points((i / last, value) for i, value in enumerate(table))


def parse_curve(text: str) -> Curve:
    """Returns the curve that a text names.

    Example:
        >>> str(parse_curve("ema"))
        'ema:0.1'
        >>> parse_curve("Minus_Sqrt") == named_curve("1-sqrt")
        True
        >>> str(parse_curve("table:1,0.2,0"))
        'table:0=1,0.5=0.2,1=0'

    Args:
        text: a name with or without a parameter ("linear", "power:0.5"), a table of points s=d
            ("table:0=1,0.5=0.2,1=0"), or a table of equally spaced values of d ("table:1,0.2,0"). Names may have
            hyphens or underscores, small or capital letters.

    Raises:
        CurveError: the name is unknown (lists the valid ones with their parameters); a parameter is not a number, is
            out of range, or is one too many or too few.
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip().lower().replace("_", "-")
    cells = rest.split(",") if colon else []
    if name != _TABLE:
        return named_curve(name, *(_parse_number(cell, text) for cell in cells))
    rows = [[_parse_number(number, text) for number in cell.split("=")] for cell in cells]
    if all(len(row) == 1 for row in rows):
        return curve_from_values(row[0] for row in rows)
    if all(len(row) == 2 for row in rows):
        return curve_from_points((row[0], row[1]) for row in rows)
    raise CurveError(f"{text!r}: a table holds either points s=d or values d, not both")


def _valid_curves() -> str:
    names = ", ".join(shape.usage(name) for name, shape in _SHAPES.items())
    aliases = ", ".join(f"{alias} = {name}" for alias, name in _ALIASES.items())
    return f"{names}, {_TABLE}:S=D,S=D,… or {_TABLE}:D,D,…; aliases: {aliases}"


def _parse_number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CurveError(f"{whole!r}: expected a number, found {text!r}") from None
