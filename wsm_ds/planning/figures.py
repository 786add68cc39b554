"""What a window is, in figures: how long it is, how old and how wide the merge is, and what to be warned of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.planning.course import Course
from wsm_ds.planning.recipe_options import UNITS, Unit
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
        ess: effective number of checkpoints.
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
) -> WindowFigures:
    """Returns the figures of a window.

    Args:
        course: of the run at the window's checkpoints.
        coefficients: float64[N], oldest first, with the sum 1.
        unit: in which `oldest_interval` is; `course` knows it.
        oldest_interval: the interval that the oldest checkpoint stands for; None: the median of the others.
        data_switch: the last step before a change of the data.
    """
    counts = {name: counted for name in UNITS if (counted := course.known(name)) is not None}
    oldest = _oldest_intervals(counts, unit, oldest_interval)
    is_negative = bool((coefficients < 0.0).any())

    def amount(of: Callable[[Unit], float]) -> Amount:
        return Amount(**{name: of(name) for name in counts})

    switch = None if data_switch is None else _data_switch(course.steps, coefficients, oldest["steps"], data_switch)
    figures = WindowFigures(
        duration=amount(lambda name: counts[name][-1] - counts[name][0] + oldest[name]),
        end=amount(lambda name: counts[name][-1]),
        mean_age=amount(lambda name: lag(coefficients, counts[name], allow_negative=True)),
        deviation=None if is_negative else amount(lambda name: age_deviation(coefficients, counts[name])),
        ess=effective_sample_size(coefficients, allow_negative=True),
        data_switch=switch,
    )
    warnings = [*_of_a_wide_merge(coefficients, figures), *_of_a_switch(switch, len(coefficients))]
    return WindowFigures(**{**vars(figures), "warnings": tuple(warnings)})


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


def _data_switch(steps: Sequence[int], c: NDArray[np.float64], oldest_interval: float, step: int) -> DataSwitch:
    """Decay factor i scales the updates between checkpoints i - 1 and i; those before the oldest have the factor 1."""
    bounds = [steps[0] - oldest_interval, *steps]
    factors = np.cumsum(c[::-1])[::-1].tolist()
    total = math.fsum(w * (end - begin) for w, (begin, end) in zip(factors, pairwise(bounds), strict=True))
    after = math.fsum(
        w * max(0.0, end - max(begin, step)) for w, (begin, end) in zip(factors, pairwise(bounds), strict=True)
    )
    is_after = [saved > step for saved in steps]
    weight = math.fsum(weight for weight, counts in zip(c.tolist(), is_after, strict=True) if counts)
    return DataSwitch(step, sum(is_after), weight, after / total if total else float(is_after[-1]))


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
    if switch is None or switch.checkpoints_after in (0, n):
        return []
    return [
        f"the window goes across the change of the data after step {switch.step}: {switch.checkpoints_after} of {n} "
        f"checkpoints are from after it, with {switch.weight_after:.1%} of the weight, and {switch.updates_after:.1%} "
        "of the updates, weighted, were made with the new data. So this merge is another experiment than one within "
        "one data set; compare it only with merges whose window crosses the change alike."
    ]
