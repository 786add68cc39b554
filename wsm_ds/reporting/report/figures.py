"""The figures of a report, as data, made from the measured candidates."""

from collections.abc import Callable, Sequence

from wsm_ds.reporting.report.document import Bar, Dots, HeatMap, Level, Plot, Point, Row, Series
from wsm_ds.reporting.report.numbers import metric_words, seconds_words
from wsm_ds.reporting.report.selection import (
    Ranking,
    by_series,
    end_steps,
    has_tokens,
    length,
    series_name,
    window_words,
)
from wsm_ds.sizes import format_count
from wsm_ds.tuning.results import CandidateResult

MOST_ROWS = 16
"""Candidates in the picture of the differences, besides the newest raw checkpoint and the baselines."""
MOST_COURSES = 4
"""Kinds of merges in the picture along the run. They lie close together."""
LOG_FROM = 6.0
"""Ratio of the longest to the shortest window from which on the axis is logarithmic."""


def value_label(ranking: Ranking) -> str:
    """Name and unit of the deciding metric."""
    result = ranking.result
    return f"{result.metric}, {result.unit}" if result.unit else result.metric


def window_plot(ranking: Ranking) -> Plot | None:
    """The metric against the window of the merges that end at the newest checkpoint; None for fewer than two windows.

    Args:
        ranking: the measured candidates.
    """
    merges = [c for c in ranking.measured if c.kind == "merge" and c.window is not None and c.window.steps > 0]
    newest = max(map(end_steps, merges), default=-1.0)
    merges = [c for c in merges if end_steps(c) == newest]
    if len({c.window.steps for c in merges if c.window}) < 2:
        return None
    in_tokens = has_tokens(c.window for c in merges)
    series = tuple(
        Series(name, _points(ranking, group, lambda c: length(c.window, in_tokens) if c.window else 0.0), color)
        for name, group in by_series(merges).items()
        if (color := ranking.colors.get(name)) is not None
    )
    lengths = [point.x for line in series for point in line.points]
    return Plot(
        title="Metric against the window",
        x_label=f"window, {'tokens' if in_tokens else 'steps'}",
        y_label=value_label(ranking),
        series=series,
        levels=_levels(ranking),
        is_log=min(lengths) > 0 and max(lengths) / min(lengths) >= LOG_FROM,
        best="more" if ranking.result.maximize else "less",
    )


def _points(
    ranking: Ranking, group: Sequence[CandidateResult], position: Callable[[CandidateResult], float]
) -> tuple[Point, ...]:
    points = []
    for candidate in sorted(group, key=position):
        metric = ranking.metric(candidate)
        words = f"{candidate.name}: {metric_words(metric)}"
        points.append(Point(position(candidate), metric.value, metric.error, words, ranking.mark(candidate)))
    return tuple(points)


def _levels(ranking: Ranking) -> tuple[Level, ...]:
    """The newest raw checkpoint and the baselines, which have no window."""
    raw = ranking.newest_raw
    baselines = [c for c in ranking.measured if c.kind == "baseline"]
    compared = [(c, f"raw {c.name}") for c in (raw,) if c is not None] + [(c, c.name) for c in baselines[:3]]
    return tuple(Level(name, (m := ranking.metric(c)).value, m.error, ranking.color(c)) for c, name in compared)


def run_plot(ranking: Ranking) -> Plot | None:
    """The metric along the run: raw checkpoints, and beside them the merges that end there ("annealed").

    Args:
        ranking: the measured candidates.

    Returns:
        None for fewer than three raw checkpoints, unless merges end at two places or more.
    """
    placed = [c for c in ranking.measured if c.end is not None and c.kind != "baseline"]
    raw = [c for c in placed if c.kind == "raw"]
    in_tokens = has_tokens(c.end for c in placed)
    groups = _courses(ranking, [c for c in placed if c.kind == "merge"])
    if len({end_steps(c) for c in raw}) < 3 and not any(len({end_steps(c) for c in group}) > 1 for _, group in groups):
        return None

    def position(candidate: CandidateResult) -> float:
        return length(candidate.end, in_tokens) if candidate.end else 0.0

    series = [Series("raw checkpoints", _points(ranking, raw, position), "raw")] if raw else []
    series += [
        Series(name, _points(ranking, group, position), f"s{number}") for number, (name, group) in enumerate(groups)
    ]
    return Plot(
        title="Metric along the run, raw and merged",
        x_label=f"training, {'tokens' if in_tokens else 'steps'}",
        y_label=value_label(ranking),
        series=tuple(series),
        levels=tuple(level for level in _levels(ranking) if level.color == "baseline"),
        best="more" if ranking.result.maximize else "less",
    )


def _courses(ranking: Ranking, merges: Sequence[CandidateResult]) -> list[tuple[str, list[CandidateResult]]]:
    """Merges of the same kind that end at two places or more: those with the most places first.

    The kinds of the recommended and of the best merge are there in any case, before the others.
    """
    groups: dict[str, list[CandidateResult]] = {}
    for candidate in merges:
        groups.setdefault(f"last {len(candidate.steps)}, {series_name(candidate)}", []).append(candidate)
    courses = [
        (name, group)
        for name, group in groups.items()
        if len({end_steps(c) for c in group}) > 1 or any(ranking.mark(c) for c in group)
    ]

    def order(course: tuple[str, list[CandidateResult]]) -> tuple[int, int]:
        marks = {ranking.mark(candidate) for candidate in course[1]}
        return (0 if "recommended" in marks else 1 if "best" in marks else 2, -len(course[1]))

    return sorted(courses, key=order)[:MOST_COURSES]


def heat_map(ranking: Ranking) -> HeatMap | None:
    """Window against end point, for the curve and the spread of the chosen merge, or of the best one with two of each.

    Args:
        ranking: the measured candidates.

    Returns:
        None if no curve has two windows and two end points.
    """
    merges = [c for c in ranking.measured if c.kind == "merge" and c.window is not None and c.end is not None]
    groups = [
        (name, group)
        for name, group in by_series(merges).items()
        if len({len(c.steps) for c in group}) > 1 and len({end_steps(c) for c in group}) > 1
    ]
    if not groups:
        return None
    name, group = next((one for one in groups if ranking.chosen in one[1]), groups[0])
    return _heat_map(ranking, name, group)


def _heat_map(ranking: Ranking, name: str, merges: Sequence[CandidateResult]) -> HeatMap:
    counts = sorted({len(c.steps) for c in merges})
    ends = sorted({end_steps(c) for c in merges})
    in_tokens = has_tokens(span for c in merges for span in (c.end, c.window))
    of_cell = {(len(c.steps), end_steps(c)): c for c in reversed(merges)}
    in_words = {len(c.steps): window_words(c, in_tokens) for c in sorted(merges, key=end_steps)}
    end_words = {end_steps(c): format_count(length(c.end, in_tokens)) for c in merges if c.end is not None}
    return HeatMap(
        title=f"{value_label(ranking)}: window against end point, {name}",
        x_label=f"end of the merge, {'tokens' if in_tokens else 'steps'}",
        y_label=f"window, {'tokens' if in_tokens else 'steps'} (checkpoints)",
        columns=tuple(end_words[end] for end in ends),
        rows=tuple(f"{in_words[count]} ({count})" for count in counts),
        cells=tuple(
            tuple(ranking.metric(c).value if (c := of_cell.get((count, end))) else None for end in ends)
            for count in counts
        ),
        best="more" if ranking.result.maximize else "less",
    )


def difference_dots(ranking: Ranking) -> Dots | None:
    """The paired differences to the best candidate, best first; None for fewer than two.

    Args:
        ranking: the measured candidates.
    """
    compared = [c for c in ranking.measured if c.difference is not None]
    raw = ranking.newest_raw
    kept = {c.name for c in compared[:MOST_ROWS]} | {c.name for c in compared if c.kind == "baseline"}
    kept |= {c.name for c in (raw, ranking.chosen) if c is not None}
    rows = tuple(
        Row(c.name, c.difference.value, c.difference.error, ranking.color(c), ranking.mark(c))
        for c in compared
        if c.difference is not None and c.name in kept
    )
    unit = f", {ranking.result.unit}" if ranking.result.unit else ""
    label = f"worse than the best by ({ranking.result.metric}{unit})"
    return Dots("Difference to the best candidate", label, rows) if len(rows) > 1 else None


def coefficient_plots(ranking: Ranking) -> tuple[Plot, ...]:
    """The coefficients of the recommended and the best merge, and of the other finalists: four at most.

    Args:
        ranking: the measured candidates.
    """
    merges = [c for c in ranking.measured if c.kind == "merge" and len(c.coefficients) > 1]
    first = sorted((c for c in merges if ranking.mark(c)), key=ranking.mark, reverse=True)  # recommended, best
    others = [c for c in merges if c.stage == 2 and c not in first]
    return tuple(_stems(ranking, c) for c in (first + others)[:4])


def _stems(ranking: Ranking, candidate: CandidateResult) -> Plot:
    positions = candidate.tokens if candidate.tokens is not None else candidate.steps
    points = tuple(
        Point(x, c, words=f"step {step}: {c:.6f}")
        for x, c, step in zip(positions, candidate.coefficients, candidate.steps, strict=True)
    )
    mark = ranking.mark(candidate)
    return Plot(
        title=f"Coefficients of {candidate.name}" + (f" ({mark})" if mark else ""),
        x_label=f"training, {'steps' if candidate.tokens is None else 'tokens'}",
        y_label="coefficient",
        series=(Series("", points, ranking.color(candidate), "stems"),),
        best="",
    )


def cost_bar(ranking: Ranking) -> Bar | None:
    """The seconds by kind of work; None for fewer than two kinds."""
    seconds = {name: value for name, value in ranking.result.seconds.items() if value > 0}
    if len(seconds) < 2:
        return None
    return Bar("Seconds by kind of work", tuple((name, s, seconds_words(s)) for name, s in seconds.items()))
