"""Recorded evaluations in the form of a tuning, so that one report serves both."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from wsm_ds.errors import RecipeError, did_you_mean, few
from wsm_ds.evaluation.evaluation import Blocks, Evaluation, Subject
from wsm_ds.evaluation.statistics import LOSS, paired_difference
from wsm_ds.planning.course import Course
from wsm_ds.planning.figures import Amount, window_figures
from wsm_ds.tuning.results import CandidateResult, Difference, Span, TuningResult

KINDS: dict[str, Literal["merge", "raw", "baseline"]] = {"merge": "merge", "checkpoint": "raw", "folder": "baseline"}
"""Kind of the candidate by kind of the subject."""


def from_evaluations(
    evaluations: Iterable[Evaluation],
    *,
    run: str,
    metric: str | None = None,
    tokens_per_step: float | None = None,
    manifest_of: Callable[[Subject], dict[str, Any]] = lambda subject: {},
) -> TuningResult:
    """Returns evaluations in the form of a tuning that recommends nothing.

    Of several evaluations of one model by one evaluator, the last that has a result counts. What different evaluators
    call by one name is kept apart: losses on other data are another metric.

    Args:
        evaluations: in the order of their records.
        run: what the report is about: a folder.
        metric: the one that decides; None: the one that was measured of most models.
        tokens_per_step: of the run; None: only what the manifests of merges tell.
        manifest_of: gives the manifest of a merge, or an empty dict where there is none.

    Raises:
        RecipeError: there is no evaluation, or no metric of this name; the message names those that are there.
    """
    latest = _latest(evaluations)
    names = _metric_names(latest)
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in latest:
        groups.setdefault(evaluation.subject.identity, []).append(evaluation)
    decides = _deciding(metric, names, latest)
    subjects = [group[-1].subject for group in groups.values()]
    manifests = [manifest_of(subject) if subject.kind == "merge" else {} for subject in subjects]
    tokens = _tokens(subjects, manifests, tokens_per_step)
    unique = _unique_names(subjects)
    candidates = [
        _candidate(group, names, unique[identity], tokens, manifest)
        for (identity, group), manifest in zip(groups.items(), manifests, strict=True)
    ]
    losses = {unique[e.subject.identity]: e for e in latest if e.blocks and names[_evaluator(e)].get(LOSS) == decides}
    measured = [c.metrics[decides] for c in candidates if decides in c.metrics]
    lengths = [candidate.end for candidate in candidates if candidate.end is not None]
    return TuningResult(
        run=run,
        metric=decides,
        unit=measured[0].unit if measured else "",
        maximize=measured[0].maximize if measured else False,
        data=_data_words(next((e.blocks for e in losses.values()), None)),
        run_length=max(lengths, key=lambda span: span.steps, default=None),
        candidates=_compared(candidates, decides, losses),
        seconds={"evaluate": sum(evaluation.seconds for evaluation in latest)},
    )


def _evaluator(evaluation: Evaluation) -> str:
    """What two evaluations share if they measured the same in the same way."""
    identity = evaluation.evaluator.get("identity")
    if isinstance(identity, str):
        return identity
    return hashlib.sha256(json.dumps(evaluation.evaluator, sort_keys=True, default=str).encode()).hexdigest()


def _latest(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    kept: dict[tuple[str, str], Evaluation] = {}
    for evaluation in evaluations:
        key = evaluation.subject.identity, _evaluator(evaluation)
        if key not in kept or evaluation.failure is None or kept[key].failure is not None:
            kept[key] = evaluation
    if not kept:
        raise RecipeError("there is no evaluation to report: measure first, by wsm-ds evaluate or wsm-ds tune.")
    return list(kept.values())


def _metric_names(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, str]]:
    """The name in the report of each metric of each evaluator."""
    found: dict[str, dict[str, str]] = {}
    for evaluation in evaluations:
        found.setdefault(_evaluator(evaluation), {}).update({name: name for name in evaluation.metrics})
    for evaluator, names in found.items():
        others = {name for other, known in found.items() if other != evaluator for name in known}
        for name in names:
            if name in others:
                names[name] = f"{name} ({evaluator[:6]})"
    return found


def _deciding(metric: str | None, names: dict[str, dict[str, str]], evaluations: Sequence[Evaluation]) -> str:
    counts: dict[str, int] = {}
    for evaluation in evaluations:
        for name in evaluation.metrics:
            shown = names[_evaluator(evaluation)][name]
            counts[shown] = counts.get(shown, 0) + 1
    if metric is not None and metric not in counts:
        raise RecipeError(
            f"`metric`: no evaluation has {metric!r}{did_you_mean(metric, counts)}; there are {few(counts) or 'none'}."
        )
    # `max` takes the first of equals: the order of the records, and of the metrics in a record.
    return metric or max(counts, key=lambda name: counts[name], default="loss")


def _unique_names(subjects: Sequence[Subject]) -> dict[str, str]:
    """A name for each subject by its identity. Where two have the same, as the outputs of a watch have, the step of the
    newest checkpoint is added, or else the beginning of the identity."""
    given = [subject.name for subject in subjects]
    dated = [f"{subject.name}@{subject.sources[-1].step}" if subject.sources else subject.name for subject in subjects]
    names = {}
    for subject, date in zip(subjects, dated, strict=True):
        choices = [name for name, known in ((subject.name, given), (date, dated)) if known.count(name) == 1]
        names[subject.identity] = choices[0] if choices else f"{subject.name} ({subject.identity[:6]})"
    return names


def _candidate(
    group: Sequence[Evaluation],
    names: dict[str, dict[str, str]],
    name: str,
    tokens: Mapping[int, int],
    manifest: Mapping[str, Any],
) -> CandidateResult:
    subject = group[-1].subject
    metrics = {names[_evaluator(e)][key]: value for e in group for key, value in e.metrics.items()}
    failures = [evaluation.failure for evaluation in group if evaluation.failure is not None]
    return CandidateResult(
        name=name,
        kind=KINDS[subject.kind],
        metrics=metrics,
        failure="; ".join(failures) or None,
        seconds=sum(evaluation.seconds for evaluation in group),
        **(_place(subject, tokens, manifest) if subject.sources else {}),
    )


def _place(subject: Subject, tokens: Mapping[int, int], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a candidate that say of which checkpoints it is made."""
    steps = tuple(source.step for source in subject.sources)
    coefficients = np.array([source.coefficient for source in subject.sources])
    counts = tuple(tokens[step] for step in steps) if tokens.keys() >= set(steps) else None
    is_merge = subject.kind == "merge"
    figures = window_figures(Course(steps=steps, tokens=counts), coefficients)
    place: dict[str, Any] = {
        "steps": steps,
        "tokens": counts,
        "coefficients": tuple(coefficients.tolist()),
        "end": _span(figures.end),
        "window": _span(figures.duration) if is_merge else Span(steps=0, tokens=None if counts is None else 0),
    }
    if not is_merge:
        return place
    parts = (figures.duration.steps, figures.end.steps)
    if figures.duration.tokens is not None and figures.end.tokens:
        parts = (figures.duration.tokens, figures.end.tokens)
    return place | {
        "fraction": parts[0] / parts[1] if parts[1] else None,
        "curve": str(manifest["curve"]) if "curve" in manifest else _shape(place["coefficients"]),
        "spread": manifest.get("spread"),
        "mean_age": _span(figures.mean_age),
        "deviation": None if figures.deviation is None else _span(figures.deviation),
        "ess": figures.ess,
    }


def _span(amount: Amount) -> Span:
    return Span(steps=amount.steps, tokens=amount.tokens)


def _tokens(
    subjects: Sequence[Subject], manifests: Sequence[Mapping[str, Any]], tokens_per_step: float | None
) -> dict[int, int]:
    """The tokens at each step, where known. All are of one run, so the manifest of a merge tells of other models."""
    steps = {source.step for subject in subjects for source in subject.sources}
    if tokens_per_step is not None:
        return {step: round(step * tokens_per_step) for step in steps}
    known: dict[int, int] = {}
    for subject, manifest in zip(subjects, manifests, strict=True):
        window = manifest.get("window")
        counts = window.get("tokens") if isinstance(window, dict) else None
        if isinstance(counts, list) and len(counts) == len(subject.sources):
            known |= {source.step: int(count) for source, count in zip(subject.sources, counts, strict=True)}
    return known


def _shape(coefficients: Sequence[float]) -> str:
    """The curve of a merge whose manifest is gone, as far as its coefficients tell."""
    is_mean = max(coefficients) - min(coefficients) < 1e-6
    return "linear" if is_mean else "other coefficients"


def _data_words(blocks: Blocks | None) -> str:
    if blocks is None:
        return ""
    return f"{', '.join(blocks.sources)}: {len(blocks.tokens):,} blocks, {sum(blocks.tokens):,} tokens"


def _compared(
    candidates: Sequence[CandidateResult], metric: str, losses: Mapping[str, Evaluation]
) -> tuple[CandidateResult, ...]:
    """The candidates with their differences to the best one.

    Args:
        candidates: all.
        metric: in which they differ.
        losses: the evaluations with blocks, by the names of the candidates, if the metric is their loss.
    """
    measured = {c.name for c in candidates if metric in c.metrics and math.isfinite(c.metrics[metric].value)}
    if not measured:
        return tuple(candidates)
    sign = -1.0 if next(c for c in candidates if c.name in measured).metrics[metric].maximize else 1.0
    best = min((c for c in candidates if c.name in measured), key=lambda c: sign * c.metrics[metric].value)

    def difference(candidate: CandidateResult) -> Difference | None:
        if candidate.name not in measured:
            return None
        value = sign * (candidate.metrics[metric].value - best.metrics[metric].value)
        error = 0.0 if candidate is best else _paired_error(losses.get(candidate.name), losses.get(best.name))
        return Difference(value=value, error=error)

    return tuple(candidate.model_copy(update={"difference": difference(candidate)}) for candidate in candidates)


def _paired_error(one: Evaluation | None, other: Evaluation | None) -> float | None:
    """The standard error of the difference of two losses; None unless they were measured on the same blocks."""
    if one is None or other is None or one.blocks is None or other.blocks is None:
        return None
    try:
        return paired_difference(one.blocks, other.blocks, one.evaluator.get("weights")).error
    except RecipeError:
        return None
