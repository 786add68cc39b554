"""Tables and lines of a tuning, for people."""

from collections.abc import Sequence
from pathlib import Path

from wsm_ds.evaluation.statistics import LOSS
from wsm_ds.reporting.tables import counted, table
from wsm_ds.sizes import format_count, format_size
from wsm_ds.tuning.conclusion import ordered
from wsm_ds.tuning.results import CandidateResult, Span, TuningResult
from wsm_ds.tuning.tune import BEST, Step


def candidates_report(candidates: Sequence[CandidateResult]) -> str:
    """Returns a table of candidates that are not measured yet.

    Args:
        candidates: in the order of measurement.
    """
    header = ["candidate", "kind", "checkpoints", "window", "mean age", "ESS"]
    rows = [
        [one.name, one.kind, str(len(one.steps) or "-"), _length(one.window), _length(one.mean_age), _number(one.ess)]
        for one in candidates
    ]
    return f"{table(header, rows)}\n{counted(len(rows), 'candidate')}"


def step_line(step: Step) -> str:
    """Returns the line of a measurement that was made just now.

    Args:
        step: the measurement.
    """
    result = step.result
    name = next(iter(step.evaluation.metrics), None)
    name = result.metric if result.metric in step.evaluation.metrics else name
    metric = step.evaluation.metrics.get(name) if name is not None else None
    value = f"no value: {step.evaluation.failure}" if metric is None else f"{name} {_value(metric.value, metric.error)}"
    best = result.recommendation.best if result.recommendation is not None else None
    so_far = f"   best so far {best}" if best is not None else ""
    left = f"   {round(step.left_s) // 60} min {round(step.left_s) % 60:02d} s left" if step.done < step.total else ""
    return f"{step.done:3d} of {step.total}  {step.candidate:28}  {value}{so_far}{left}"


def result_report(result: TuningResult, out: Path) -> str:
    """Returns the table of all candidates, the recommendation and its warnings.

    Args:
        result: of the tuning.
        out: its folder.
    """
    screened = LOSS if result.metric != LOSS and any(LOSS in one.metrics for one in result.candidates) else None
    rows = []
    for one in ordered(result.candidates, result.maximize, result.metric):
        difference, is_merge = one.difference, one.kind == "merge"
        rows.append(
            [
                one.name,
                _length(one.window) if is_merge else "-",
                _number(one.ess) if is_merge else "-",
                *([_measured(one, screened)] if screened is not None else []),
                _measured(one, result.metric),
                "-" if difference is None else _value(difference.value, difference.error),
            ]
        )
    unit = f" ({result.unit})" if result.unit else ""
    header = ["candidate", "window", "ESS", *([screened] if screened is not None else []), f"{result.metric}{unit}"]
    lines = [table([*header, "worse than the best by"], rows), ""]
    lines.append(f"measured on {result.data}; merges read {format_size(result.read_bytes)}")
    if result.waiting:
        lines.append(f"{counted(len(result.waiting), 'candidate')} not measured: run the same command again to go on")
    if result.recommendation is not None:
        lines += ["", result.recommendation.sentence]
        lines += _confirmed(result)
        lines += [f"- {warning}" for warning in result.recommendation.warnings]
        lines += ["", f"recipe  {out / BEST}"]
    return "\n".join(lines)


def _confirmed(result: TuningResult) -> list[str]:
    found = result.recommendation
    if found is None or found.confirmed is None:
        return []
    raw = found.confirmed_raw
    of_raw = "" if raw is None or found.name == found.raw else f"; {found.raw}: {_value(raw.value, raw.error)}"
    return [
        f"On the second held-out set, {found.name}: {_value(found.confirmed.value, found.confirmed.error)}{of_raw}."
    ]


def _value(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _measured(one: CandidateResult, name: str) -> str:
    metric = one.metrics.get(name)
    return "-" if metric is None else _value(metric.value, metric.error)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _length(span: Span | None) -> str:
    if span is None:
        return "-"
    return f"{round(span.steps, 2):g} steps" + ("" if span.tokens is None else f", {format_count(span.tokens)} tokens")
