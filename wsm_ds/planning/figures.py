"""What a window is, in figures: how long it is, how old and how wide the merge is, and what to be warned of."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.planning.course import Course
from wsm_ds.planning.recipe_options import UNITS, Unit
from wsm_ds.planning.slots import Span
from wsm_ds.schedules.figures import age_deviation, effective_sample_size, lag
from wsm_ds.sizes import format_count

WIDEST = math.sqrt((32**2 - 1) / 12)
"""Standard deviation of the index in the mean of 32 checkpoints, the widest merge with a good published result."""


@dataclass(frozen=True)
class Amount:
    """A length of training.

    Attributes:
        steps: optimizer steps.
        samples: None: not known.
        tokens: None: not known.
    """

    steps: float
    samples: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class DataSwitch:
    """How a merge lies around a change of the training data.

    Attributes:
        step: the last step before the change.
        checkpoints_after: number of checkpoints of the window that were saved after it.
        weight_after: sum of their coefficients.
        updates_after: share of the window's updates that were made after it, each counted with its decay factor.
    """

    step: int
    checkpoints_after: int
    weight_after: float
    updates_after: float


@dataclass(frozen=True)
class WindowFigures:
    """The figures of a window and its coefficients.

    Attributes:
        duration: of the window, with the interval that the oldest checkpoint stands for; 0 for one checkpoint alone.
        end: from the beginning of the run to the newest checkpoint.
        mean_age: of the weights, counted back from the newest checkpoint.
        deviation: standard deviation of that age; None if a coefficient is negative.
        ess: effective number of checkpoints; of slot means: of their samples.
        data_switch: None: the recipe names no change of the data.
        warnings: sentences.
    """

    duration: Amount
    end: Amount
    mean_age: Amount
    deviation: Amount | None
    ess: float
    data_switch: DataSwitch | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not known, or not asked for, is left out."""
        values = {name: _without_none(value) for name, value in asdict(self).items() if name != "ess"}
        return {name: value for name, value in values.items() if value not in (None, [], ())}


def _without_none(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def window_figures(
    course: Course,
    coefficients: NDArray[np.float64],
    *,
    unit: Unit = "steps",
    oldest_interval: float | None = None,
    data_switch: int | None = None,
    spans: Sequence[Span] | None = None,
) -> WindowFigures:
    """Returns the figures of a window.

    Args:
        course: of the run at the window's checkpoints.
        coefficients: float64[N], oldest first, with the sum 1.
        unit: in which `oldest_interval` is; `course` knows it.
        oldest_interval: the interval that the oldest checkpoint stands for; None: the median of the others.
        data_switch: the last step before a change of the data.
        spans: what each checkpoint is the mean of; None: all are points.
    """
    spans = spans or [Span()] * len(coefficients)
    counts = {name: counted for name in UNITS if (counted := course.known(name)) is not None}
    oldest = _oldest_intervals(counts, unit, oldest_interval)
    is_negative = bool((coefficients < 0.0).any())

    def amount(of: Callable[[Unit], float]) -> Amount:
        return Amount(**{name: of(name) for name in counts})

    ages = {name: _ages(coefficients, counts[name], course.steps, oldest, name, spans) for name in counts}
    switch = (
        None if data_switch is None else _data_switch(course.steps, coefficients, oldest["steps"], data_switch, spans)
    )
    figures = WindowFigures(
        duration=amount(lambda name: counts[name][-1] - counts[name][0] + oldest[name]),
        end=amount(lambda name: counts[name][-1]),
        mean_age=amount(lambda name: ages[name].mean),
        deviation=None if is_negative else amount(lambda name: ages[name].deviation),
        ess=_samples(coefficients, spans),
        data_switch=switch,
    )
    warnings = [*_of_a_wide_merge(coefficients, figures), *_of_a_switch(switch, len(coefficients))]
    return WindowFigures(**{**vars(figures), "warnings": tuple(warnings)})


@dataclass(frozen=True)
class _Ages:
    mean: float
    deviation: float


def _ages(
    c: NDArray[np.float64],
    counts: Sequence[int],
    steps: Sequence[int],
    oldest: Mapping[Unit, float],
    unit: Unit,
    spans: Sequence[Span],
) -> _Ages:
    """Mean and standard deviation of the age of a merge's weights; those of a slot mean lie before its end."""
    if not any(span.is_mean for span in spans):
        mean = lag(c, counts, allow_negative=True)
        return _Ages(mean, math.nan if (c < 0.0).any() else age_deviation(c, counts))
    # Counts for each step, within each slot.
    before = oldest[unit] / oldest["steps"] if oldest["steps"] else 1.0
    rates = [before, *((b - a) / (t - s) for (a, b), (s, t) in zip(pairwise(counts), pairwise(steps), strict=True))]
    weights = c.tolist()
    ages = [counts[-1] - at + span.age * rate for at, span, rate in zip(counts, spans, rates, strict=True)]
    mean = math.fsum(weight * age for weight, age in zip(weights, ages, strict=True))
    squares = (
        weight * ((age - mean) ** 2 + span.variance * rate**2)
        for weight, age, span, rate in zip(weights, ages, spans, rates, strict=True)
    )
    return _Ages(mean, math.sqrt(max(math.fsum(squares), 0.0)))


def _samples(c: NDArray[np.float64], spans: Sequence[Span]) -> float:
    """The effective number of samples: each of a slot's has an equal part of the slot's weight."""
    if not any(span.is_mean for span in spans):
        return effective_sample_size(c, allow_negative=True)
    return 1.0 / math.fsum(weight**2 / span.count for weight, span in zip(c.tolist(), spans, strict=True))


def _oldest_intervals(counts: dict[Unit, tuple[int, ...]], unit: Unit, given: float | None) -> dict[Unit, float]:
    """The interval that the oldest checkpoint stands for, in every unit; 0 for one checkpoint alone."""
    measured = counts[unit]
    intervals = [newer - older for older, newer in pairwise(measured)]
    oldest = given if given is not None else float(np.median(intervals)) if intervals else 0.0

    def per_unit(name: Unit) -> float:
        # Other units pass as fast before the oldest checkpoint as after it.
        bounds = counts[name]
        if intervals:
            return (bounds[1] - bounds[0]) / intervals[0]
        return bounds[0] / measured[0] if measured[0] else 0.0

    return {name: oldest if name == unit else oldest * per_unit(name) for name in counts}


def _data_switch(
    steps: Sequence[int], c: NDArray[np.float64], oldest_interval: float, step: int, spans: Sequence[Span]
) -> DataSwitch:
    """Decay factor i scales the updates between checkpoints i - 1 and i; those before the oldest have the factor 1.

    Within a slot mean it falls from this factor to the next one, in a straight line.
    """
    bounds = [steps[0] - oldest_interval, *steps]
    factors = np.cumsum(c[::-1])[::-1].tolist()
    total = math.fsum(w * (end - begin) for w, (begin, end) in zip(factors, pairwise(bounds), strict=True))
    after = math.fsum(
        w * max(0.0, end - max(begin, step)) for w, (begin, end) in zip(factors, pairwise(bounds), strict=True)
    )
    if any(span.is_mean for span in spans):
        total, after = (_falling_updates(factors, bounds, begin) for begin in (-math.inf, step))
    # A slot mean may lie after the switch in part.
    shares = [min(max(saved - step, 0) / span.length, 1.0) for saved, span in zip(steps, spans, strict=True)]
    weight = math.fsum(weight * share for weight, share in zip(c.tolist(), shares, strict=True))
    count = sum(share > 0 for share in shares)
    return DataSwitch(step, count, weight, after / total if total else float(shares[-1] > 0))


def _falling_updates(factors: Sequence[float], bounds: Sequence[float], step: float) -> float:
    """The updates after a step, each with its decay factor, which falls from each bound to the next."""
    total = 0.0
    for (begin, end), (high, low) in zip(pairwise(bounds), pairwise([*factors, 0.0]), strict=True):
        if end <= step:
            continue
        share = (end - max(begin, step)) / (end - begin)
        # The mean of the factors over the last `share` of the interval.
        total += share * (end - begin) * (low + (high - low) * share / 2)
    return total


def _of_a_wide_merge(c: NDArray[np.float64], figures: WindowFigures) -> list[str]:
    """A warning of a long, flat window."""
    if figures.deviation is None:
        return []
    width = age_deviation(c, range(len(c)))
    if width <= WIDEST * (1 + 1e-9):
        return []
    tokens = figures.deviation.tokens
    in_tokens = "" if tokens is None else f", {format_count(tokens)} tokens"
    return [
        f"the weights of this merge are spread wide: standard deviation {width:.1f} checkpoints "
        f"({format_count(figures.deviation.steps)} steps{in_tokens}), more than in the mean of 32 checkpoints. For "
        "such merges of 40 checkpoints of a 9B model repeated text was reported: 12 to 14 points of GSM8K, where every "
        "single checkpoint had 29 to 38 and narrower merges of the same window 43 to 45 (arXiv 2609.35168). Compare it "
        "with a shorter window and with --spread qam, and let it generate text."
    ]


def _of_a_switch(switch: DataSwitch | None, n: int) -> list[str]:
    """A warning of a window that holds checkpoints from before and after a change of the data."""
    is_beside = switch is not None and (switch.checkpoints_after == 0 or switch.weight_after > 1.0 - 1e-12)
    if switch is None or is_beside:
        return []
    return [
        f"the window goes across the change of the data after step {switch.step}: {switch.checkpoints_after} of {n} "
        f"checkpoints are from after it, with {switch.weight_after:.1%} of the weight, and {switch.updates_after:.1%} "
        "of the updates, weighted, were made with the new data. So this merge is another experiment than one within "
        "one data set; compare it only with merges whose window crosses the change alike."
    ]
