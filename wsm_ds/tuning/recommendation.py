"""Which candidate to use: the shortest window that the measurements cannot tell from the best one.

On the same held-out blocks, the difference of two candidates is known much better than either of their losses, because
most of what makes blocks differ is the text. So candidates are compared in pairs, block by block. Metrics without
blocks are compared by their own errors, which is far less sharp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from wsm_ds.evaluation.evaluation import Blocks, Metric
from wsm_ds.evaluation.statistics import LOSS, paired_difference
from wsm_ds.tuning.results import Difference, Recommendation

CLEAR_ERRORS = 2.0
"""An older checkpoint is called better than the chosen candidate if it is by this many standard errors."""


@dataclass(frozen=True)
class Measured:
    """A candidate, and the value that decides.

    Attributes:
        name: of the candidate.
        kind: see `CandidateResult`.
        duration: of the window, in steps; 0 for a raw checkpoint.
        is_newest: whether it is the newest raw checkpoint.
        metric: the value that decides.
        blocks: that the value comes from; None if there are none.
    """

    name: str
    kind: Literal["merge", "raw", "baseline"]
    duration: float
    is_newest: bool
    metric: Metric
    blocks: Blocks | None = None

    @property
    def badness(self) -> float:
        """The value, turned so that less is better."""
        return -self.metric.value if self.metric.maximize else self.metric.value

    @property
    def words(self) -> str:
        """The value with its unit."""
        return f"{self.metric.value:.4f} {self.metric.unit}".rstrip()


@dataclass(frozen=True)
class Comparison:
    """Candidates that were measured in the same way.

    Attributes:
        metric: the name of the metric that decides.
        measured: the candidates.
        weights: of the held-out sources, by name; None: their numbers of tokens.
    """

    metric: str
    measured: tuple[Measured, ...]
    weights: Mapping[str, float] | None = None

    @property
    def best(self) -> Measured:
        """The candidate with the best value, whatever it is."""
        return min(self.measured, key=lambda one: one.badness)

    def difference(self, one: Measured, other: Measured) -> Difference:
        """How much worse one candidate is than another; negative where it is better.

        The error is that of the pairs where both have blocks. Else it is (e₁² + e₂²)^½, as if the two were measured on
        different data.

        Args:
            one: a candidate.
            other: another one.
        """
        if one.name == other.name:
            return Difference(value=0.0, error=0.0)
        if self.metric == LOSS and one.blocks is not None and other.blocks is not None:
            paired = paired_difference(one.blocks, other.blocks, self.weights)
            return Difference(value=paired.value, error=paired.error)
        errors = [value for value in (one.metric.error, other.metric.error) if value is not None]
        return Difference(value=one.badness - other.badness, error=math.hypot(*errors) if len(errors) == 2 else None)

    def are_alike(self, one: Measured, best: Measured) -> bool:
        """Whether a candidate is at most one standard error worse than the best one."""
        difference = self.difference(one, best)
        return difference.value <= (difference.error or 0.0)


def recommend(comparison: Comparison) -> Recommendation:
    """Chooses a candidate and gives the reason in words.

    Baselines, and raw checkpoints other than the newest, are never chosen. The sentence says so if one is better.

    Args:
        comparison: of the candidates that have a value.
    """
    eligible = [one for one in comparison.measured if one.kind == "merge" or one.is_newest]
    if not eligible:
        return Recommendation(name=None, sentence="No merge was measured, nor the newest raw checkpoint.")
    best = min(eligible, key=lambda one: one.badness)
    alike = [one for one in eligible if comparison.are_alike(one, best)]
    chosen = min(alike, key=lambda one: (one.duration, one.badness))
    raw = next((one for one in eligible if one.is_newest), None)
    reasons = _of_raw(comparison, chosen, best) if chosen.kind == "raw" else _of_merge(comparison, chosen, best, raw)
    return Recommendation(
        name=chosen.name,
        sentence=" ".join([*reasons, *_of_others(comparison, chosen)]),
        best=comparison.best.name,
        raw=raw.name if raw else None,
    )


def _of_merge(comparison: Comparison, chosen: Measured, best: Measured, raw: Measured | None) -> list[str]:
    """Why a merge is recommended."""
    sentences = [f"Use {chosen.name}: {comparison.metric} {chosen.words}."]
    if raw is not None:
        gain = figure(comparison.difference(raw, chosen))
        sentences.append(f"It is better than the raw checkpoint {raw.name} by {gain}.")
    if chosen.name != best.name:
        away = figure(comparison.difference(chosen, best))
        sentences.append(
            f"{best.name} has the best value, but the difference, {away}, is within one standard error; {chosen.name} "
            "has the shortest window of those."
        )
    return sentences


def _of_raw(comparison: Comparison, raw: Measured, best: Measured) -> list[str]:
    """Why the raw checkpoint is recommended."""
    merges = [one for one in comparison.measured if one.kind == "merge"]
    if not merges:
        return [f"Use the raw checkpoint {raw.name}: {comparison.metric} {raw.words}. No merge was measured."]
    if best.name != raw.name:
        return [
            f"The errors cannot tell the best merge, {best.name}, from the raw checkpoint {raw.name}: the difference "
            f"is {figure(comparison.difference(raw, best))}.",
            f"Measure on more data; until then, use {raw.name}: {comparison.metric} {raw.words}.",
        ]
    closest = min(merges, key=lambda one: one.badness)
    difference = comparison.difference(closest, raw)
    return [
        f"No merge is better than the raw checkpoint: use {raw.name}, {comparison.metric} {raw.words}.",
        f"The best merge, {closest.name}, is worse by {figure(difference)}."
        if difference.value
        else f"The best merge, {closest.name}, has the same value.",
    ]


def _of_others(comparison: Comparison, chosen: Measured) -> list[str]:
    """How the chosen candidate compares with the baselines, and with an older checkpoint that is better."""
    sentences = []
    for one in comparison.measured:
        difference = comparison.difference(one, chosen)
        by = figure(Difference(value=abs(difference.value), error=difference.error))
        if one.kind == "baseline":
            sentences.append(f"The baseline {one.name} is {'worse' if difference.value > 0 else 'better'} by {by}.")
        is_clearly_better = difference.value < -CLEAR_ERRORS * (difference.error or 0.0)
        if one.kind == "raw" and not one.is_newest and one is comparison.best and is_clearly_better:
            sentences.append(f"The older checkpoint {one.name} alone is better by {by}: see what happened after it.")
    return sentences


def figure(difference: Difference) -> str:
    """A difference with its error, for people.

    Args:
        difference: of two candidates.
    """
    return f"{difference.value:.4f} " + (
        "(error not known)" if difference.error is None else f"± {difference.error:.4f}"
    )
