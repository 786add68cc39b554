"""Numbers of a report as people read them."""

import math
from collections.abc import Sequence

from wsm_ds.evaluation.evaluation import Metric
from wsm_ds.sizes import format_count
from wsm_ds.tuning.results import Difference, Span


def span_words(span: Span | None) -> str:
    """Returns a length of training: tokens where they are known, and steps.

    >>> span_words(Span(steps=800, tokens=3.2e9)), span_words(Span(steps=800)), span_words(None)
    ('3.2B tokens (800 steps)', '800 steps', '-')
    """
    if span is None:
        return "-"
    steps = f"{span.steps:,.5g} steps" if abs(span.steps) < 1e5 else f"{span.steps:,.0f} steps"
    return steps if span.tokens is None else f"{format_count(span.tokens)} tokens ({steps})"


def span_cell(span: Span | None, in_tokens: bool) -> str:
    """Returns a length for a column of a table, whose header says the units.

    >>> span_cell(Span(steps=800, tokens=3.2e9), True), span_cell(Span(steps=800), False), span_cell(None, False)
    ('3.2B / 800', '800', '-')

    Args:
        span: the length; None, or no length, is "-".
        in_tokens: whether the tokens stand before the steps.
    """
    if span is None or span.steps == 0:
        return "-"
    steps = f"{span.steps:,.0f}" if span.steps >= 100 else f"{span.steps:.3g}"
    return f"{format_count(span.tokens)} / {steps}" if in_tokens and span.tokens is not None else steps


def seconds_words(seconds: float) -> str:
    """Returns a time in the two largest units that it has.

    >>> seconds_words(0.25), seconds_words(75), seconds_words(3720), seconds_words(200_000)
    ('0.25 s', '1 min 15 s', '1 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def decimals_for(values: Sequence[float]) -> int:
    """Returns the decimals that tell values apart: about a hundredth of their range, from 0 to 8.

    >>> decimals_for([3.21, 3.25]), decimals_for([10, 4000]), decimals_for([2.0])
    (4, 0, 4)

    Args:
        values: finite numbers.
    """
    extent = max(values, default=0.0) - min(values, default=0.0)
    if extent <= 0:
        return 4
    return min(max(2 - math.floor(math.log10(extent)), 0), 8)


def value_words(value: float, error: float | None, decimals: int | None = None) -> str:
    """Returns a value and its standard error, with as many decimals as the error has meaning.

    >>> value_words(3.214567, 0.0123), value_words(3.2, None), value_words(-0.000021, 0.000013)
    ('3.215 ± 0.012', '3.2000', '-0.000021 ± 0.000013')

    Args:
        value: of the measurement.
        error: its standard error; None: not known.
        decimals: of a value without an error.
    """
    if error is None or not math.isfinite(error):
        return f"{value:.{4 if decimals is None else decimals}f}"
    if error == 0:
        return f"{value:.{4 if decimals is None else decimals}f} ± 0"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 10)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def metric_words(metric: Metric | None, decimals: int | None = None) -> str:
    """Returns a measured value with its error, or "-"."""
    return "-" if metric is None else value_words(metric.value, metric.error, decimals)


def difference_words(difference: Difference | None) -> str:
    """Returns a difference to the best candidate with its sign, or "-"."""
    if difference is None:
        return "-"
    if difference.value == 0 and not difference.error:
        return "0"
    text = value_words(difference.value, difference.error)
    return f"+{text}" if difference.value > 0 else text
