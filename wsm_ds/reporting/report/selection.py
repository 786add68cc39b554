"""Which candidates of a tuning a report shows, in which order and color."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wsm_ds.evaluation.evaluation import Metric
from wsm_ds.sizes import format_count
from wsm_ds.tuning.results import CandidateResult, Span, TuningResult

MOST_SERIES = 6
"""More lines in one picture cannot be told apart. The others are in the table."""


@dataclass(frozen=True)
class Ranking:
    """The measured candidates of a tuning, best first.

    Attributes:
        result: the tuning.
        measured: candidates that have the deciding metric, best first.
        colors: class of the color by the name of the series.
    """

    result: TuningResult
    measured: tuple[CandidateResult, ...]
    colors: dict[str, str]

    def metric(self, candidate: CandidateResult) -> Metric:
        """The deciding metric of a measured candidate."""
        return candidate.metrics[self.result.metric]

    def color(self, candidate: CandidateResult) -> str:
        """Class of the color of a candidate."""
        if candidate.kind != "merge":
            return candidate.kind
        return self.colors.get(series_name(candidate), "other")

    def mark(self, candidate: CandidateResult) -> str:
        """What stands beside a candidate in a picture: "recommended", "best" or nothing."""
        advice = self.result.recommendation
        if advice is not None and candidate.name == advice.name:
            return "recommended"
        best = advice.best if advice is not None else None
        return "best" if candidate.name == (best or self.measured[0].name) else ""

    @property
    def newest_raw(self) -> CandidateResult | None:
        """The newest raw checkpoint that was measured."""
        raw = [c for c in self.measured if c.kind == "raw"]
        named = [c for c in raw if self.result.recommendation and c.name == self.result.recommendation.raw]
        return next(iter(named or sorted(raw, key=end_steps, reverse=True)), None)

    @property
    def chosen(self) -> CandidateResult | None:
        """The recommended candidate, or the best one where nothing is recommended."""
        advice = self.result.recommendation
        named = [c for c in self.measured if advice is not None and c.name == advice.name]
        return next(iter(named or self.measured), None)


def rank(result: TuningResult) -> Ranking:
    """Orders the candidates of a tuning that have a finite value of its metric.

    Args:
        result: the tuning.
    """
    sign = -1.0 if result.maximize else 1.0
    measured = [c for c in result.candidates if is_measured(c, result.metric)]
    measured.sort(key=lambda c: sign * c.metrics[result.metric].value)
    names = dict.fromkeys(series_name(c) for c in measured if c.kind == "merge")
    colors = {name: f"s{number}" for number, name in enumerate(list(names)[:MOST_SERIES])}
    return Ranking(result, tuple(measured), colors)


def is_measured(candidate: CandidateResult, metric: str) -> bool:
    """Whether a candidate has a finite value of a metric."""
    return metric in candidate.metrics and math.isfinite(candidate.metrics[metric].value)


def series_name(candidate: CandidateResult) -> str:
    """What a merge has in common with those of other windows: its curve, and its spread if it is not WSM's.

    Args:
        candidate: a merge.
    """
    curve = candidate.curve or "other coefficients"
    return curve if candidate.spread in (None, "wsm") else f"{curve}, {candidate.spread}"


def end_steps(candidate: CandidateResult) -> float:
    """The step of the newest checkpoint of a candidate; -1 for a folder without a manifest."""
    return -1.0 if candidate.end is None else candidate.end.steps


def has_tokens(spans: Iterable[Span | None]) -> bool:
    """Whether all lengths are known in tokens."""
    return all(span is None or span.tokens is not None for span in spans)


def length(span: Span, in_tokens: bool) -> float:
    """A length in tokens or in steps."""
    return span.tokens if in_tokens and span.tokens is not None else span.steps


def by_series(candidates: Sequence[CandidateResult]) -> dict[str, list[CandidateResult]]:
    """Groups merges by the name of their series, in the order of the first of each."""
    groups: dict[str, list[CandidateResult]] = defaultdict(list)
    for candidate in candidates:
        groups[series_name(candidate)].append(candidate)
    return dict(groups)


def window_words(candidate: CandidateResult, in_tokens: bool) -> str:
    """The window of a merge in few characters, such as "25B" or "800"."""
    return "-" if candidate.window is None else format_count(length(candidate.window, in_tokens))
