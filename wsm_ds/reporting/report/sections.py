"""The text of a report: its sections, made from a tuning or from evaluations in the form of one."""

from collections.abc import Sequence
from pathlib import Path

from wsm_ds.errors import one_line
from wsm_ds.reporting.report import figures
from wsm_ds.reporting.report.document import Document, Figure, Section, Table
from wsm_ds.reporting.report.numbers import (
    decimals_for,
    difference_words,
    metric_words,
    seconds_words,
    span_cell,
    span_words,
    value_words,
)
from wsm_ds.reporting.report.selection import Ranking, has_tokens, is_measured, rank, series_name
from wsm_ds.reporting.tables import counted
from wsm_ds.sizes import format_size
from wsm_ds.tuning.results import CandidateResult, Span, TuningResult

NO_ADVICE = "No recommendation: these are measurements that were made one by one, not a tuning."
MOST_NAMES = 12


def document(result: TuningResult, recipe: Path | None = None) -> Document:
    """Returns the report of a tuning.

    Args:
        result: what the tuning has found, or evaluations in this form (`candidates.from_evaluations`).
        recipe: the file of the recommended merge, for the command that makes it; None: there is none.
    """
    ranking = rank(result)
    parts = (_advice(ranking, recipe), _windows(ranking), _differences(ranking), _course(ranking), _weights(ranking),
             _all(ranking), _failures(result), _cost(ranking))  # fmt: skip
    advice = result.recommendation
    lead = advice.sentence if advice is not None else NO_ADVICE
    if not ranking.measured:
        lead = advice.sentence if advice is not None else "Nothing is measured yet."
    return Document(
        title=f"Merges of {one_line(Path(result.run).name or result.run)}",
        lead=lead,
        facts=_facts(ranking),
        sections=tuple(part for part in parts if part is not None),
    )


def _facts(ranking: Ranking) -> tuple[tuple[str, str], ...]:
    result, advice = ranking.result, ranking.result.recommendation
    chosen, raw = ranking.chosen, ranking.newest_raw
    facts = [("run", result.run), ("length of the run", span_words(result.run_length))]
    better = "more is better" if result.maximize else "less is better"
    facts.append(("metric", f"{figures.value_label(ranking)} ({better})"))
    if result.data:
        facts.append(("measured on", result.data))
    if chosen is not None:
        name = "recommended" if advice is not None and advice.name == chosen.name else "best"
        facts.append((name, f"{chosen.name}: {metric_words(ranking.metric(chosen))}"))
    if raw is not None and raw is not chosen:
        facts.append(("newest raw checkpoint", f"{raw.name}: {metric_words(ranking.metric(raw))}"))
    done = f"{len(ranking.measured)} of {len(result.candidates) + len(result.waiting)}"
    facts.append(("candidates measured", done if result.waiting or len(ranking.measured) < len(result.candidates)
                  else str(len(ranking.measured))))  # fmt: skip
    return tuple(fact for fact in facts if fact[1] != "-")


def _advice(ranking: Ranking, recipe: Path | None) -> Section | None:
    result, advice = ranking.result, ranking.result.recommendation
    notes = list(advice.warnings) if advice is not None else []
    if result.waiting:
        changes = "" if advice is None else " The recommendation may change."
        notes.insert(0, f"Not finished: {counted(len(result.waiting), 'candidate')} not measured yet "
                     f"({_names(result.waiting)}).{changes}")  # fmt: skip
    text = []
    if advice is not None and advice.confirmed is not None:
        raw = advice.confirmed_raw
        beside = f"; the newest raw checkpoint: {metric_words(raw)}" if raw is not None else ""
        text.append(
            f"On the second held-out set, which chose nothing: {metric_words(advice.confirmed)}{beside}. "
            "This is the honest figure: the best of many on one set looks better than it is."
        )
    chosen = ranking.chosen
    has_command = recipe is not None and advice is not None and chosen is not None and chosen.name == advice.name
    code = f"wsm-ds merge {_quoted(result.run)} --recipe {_quoted(str(recipe))} --out MERGED" if has_command else ""
    if not (notes or text or code):
        return None
    return Section("Recommendation" if advice is not None else "State", tuple(text), tuple(notes), code=code)


def _windows(ranking: Ranking) -> Section | None:
    found: list[Figure | None] = [figures.window_plot(ranking), figures.heat_map(ranking)]
    shown = tuple(figure for figure in found if figure is not None)
    if not shown:
        return None
    text = []
    if shown[0] is found[0]:
        text.append("Each point is a merge that ends at the newest checkpoint. Bars are one standard error of the mean "
                    "over the blocks; neighbours are told apart by their paired differences, below.")  # fmt: skip
        hidden = sorted({series_name(c) for c in ranking.measured if c.kind == "merge"} - set(ranking.colors))
        if hidden:
            text.append(f"Only in the table: {_names(hidden)}.")
    return Section("Windows and curves", tuple(text), figures=shown)


def _differences(ranking: Ranking) -> Section | None:
    dots = figures.difference_dots(ranking)
    if dots is None:
        return None
    others = [row for row in dots.rows if row.value]
    if all(row.error is None for row in others):
        text = "The errors of these differences are not known: the models were not measured on common blocks."
    else:
        text = (
            "Measured in pairs, on the same blocks: the error of a difference is far smaller than that of either mean."
        )
        text += " A point without a bar has no known error." if any(row.error is None for row in others) else ""
    missing = len([c for c in ranking.measured if c.difference is not None]) - len(dots.rows)
    if missing > 0:
        text += f" {counted(missing, 'worse candidate')} only in the table."
    return Section("Differences to the best", (text,), figures=(dots,))


def _course(ranking: Ranking) -> Section | None:
    plot = figures.run_plot(ranking)
    if plot is None:
        return None
    decimals = decimals_for([point.y for series in plot.series for point in series.points])
    ends = sorted({point.x for series in plot.series for point in series.points})
    cells = [{point.x: value_words(point.y, point.error, decimals) for point in series.points}
             for series in plot.series]  # fmt: skip
    header = (plot.x_label, *(series.name for series in plot.series))
    rows = tuple((f"{end:,.0f}", *(cell.get(end, "-") for cell in cells)) for end in ends)
    text = "A merge stands where its newest checkpoint stands: it is compared with the raw one of equal training."
    texts = (text,) if len(plot.series) > 1 else ()
    return Section("Along the run", texts, figures=(plot,), table=Table(header, rows, is_detail=True))


def _weights(ranking: Ranking) -> Section | None:
    plots = figures.coefficient_plots(ranking)
    text = "Each stem is a checkpoint. The coefficients of a merge sum to 1."
    return Section("Coefficients", (text,), figures=plots) if plots else None


def _all(ranking: Ranking) -> Section | None:
    candidates = ranking.measured
    if not candidates:
        return None
    names = list(dict.fromkeys([ranking.result.metric, *(name for c in candidates for name in c.metrics)]))
    decimals = {
        name: decimals_for([c.metrics[name].value for c in candidates if is_measured(c, name)]) for name in names
    }
    columns: dict[str, list[str]] = {}
    for name in names:
        columns[name] = [metric_words(c.metrics.get(name), decimals[name]) for c in candidates]
        if name == ranking.result.metric:
            columns["difference to the best"] = [difference_words(c.difference) for c in candidates]
            columns["checkpoints"] = [str(len(c.steps) or "-") for c in candidates]
            columns["curve"] = [series_name(c) if c.kind == "merge" else c.kind for c in candidates]
            columns |= _spans({"window": [c.window for c in candidates], "end": [c.end for c in candidates]})
    ages = {"mean age": [c.mean_age for c in candidates], "sd of the age": [c.deviation for c in candidates]}
    columns |= _spans(ages)
    columns["effective checkpoints"] = ["-" if c.ess is None else f"{c.ess:.2f}" for c in candidates]
    columns["stage"] = [str(c.stage) if any(other.stage == 2 for other in candidates) else "-" for c in candidates]
    columns["time"] = [seconds_words(c.seconds) if c.seconds else "-" for c in candidates]
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    marks = [ranking.mark(c) for c in candidates]
    first = [f"{c.name} ({mark})" if mark else c.name for c, mark in zip(candidates, marks, strict=True)]
    rows = tuple(zip(first, *shown.values(), strict=True))
    strong = frozenset(number for number, mark in enumerate(marks) if mark)
    return Section("All candidates, best first", table=Table(("candidate", *shown), rows, strong))


def _spans(columns: dict[str, list[Span | None]]) -> dict[str, list[str]]:
    """Columns of lengths, in tokens and steps where the tokens are known."""
    return {
        f"{name}, {'tokens / steps' if has_tokens(spans) else 'steps'}": [
            span_cell(span, has_tokens(spans)) for span in spans
        ]
        for name, spans in columns.items()
    }


def _failures(result: TuningResult) -> Section | None:
    failed = [c for c in result.candidates if c.failure is not None or not is_measured(c, result.metric)]
    if not failed:
        return None
    rows = tuple((c.name, _reason(c, result.metric)) for c in failed)
    text = "These candidates are not compared where a value is missing."
    return Section("Not measured", (text,), table=Table(("candidate", "reason"), rows, is_prose=True))


def _reason(candidate: CandidateResult, metric: str) -> str:
    if candidate.failure is not None:
        return candidate.failure
    metric_ = candidate.metrics.get(metric)
    return f"no {metric} was measured" if metric_ is None else f"{metric} is {metric_.value}"


def _cost(ranking: Ranking) -> Section | None:
    bar, read = figures.cost_bar(ranking), ranking.result.read_bytes
    text = [f"The merges read {format_size(read)}."] if read else []
    if bar is None:
        text += [
            f"Seconds by kind of work: {name} {seconds_words(s)}." for name, s in ranking.result.seconds.items() if s
        ]
    if bar is None and not text:
        return None
    return Section("Cost", tuple(text), figures=(bar,) if bar is not None else ())


def _names(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f", and {more} more" if more > 0 else "")


def _quoted(text: str) -> str:
    from shlex import quote

    return quote(text)
