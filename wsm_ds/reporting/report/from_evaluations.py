"""Recorded evaluations in the form of a tuning, so that one report serves both."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import numpy as np

from wsm_ds.errors import RecipeError, did_you_mean, few
from wsm_ds.evaluation.evaluation import Blocks, Evaluation, Subject
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
        tokens_per_step: of the run; None: only what the sources of the subjects tell.
        manifest_of: gives the manifest of a merge, or an empty dict where there is none.

    Raises:
        RecipeError: there is no evaluation, or no metric of this name; the message names those that are there.
    """
    latest = _latest(evaluations)
    names = _metric_names(latest)
    by_subject: dict[str, list[Evaluation]] = {}
    for evaluation in latest:
        by_subject.setdefault(evaluation.subject.identity, []).append(evaluation)
    decides = _deciding(metric, names, latest)
    unique = _unique_names([group[-1].subject for group in by_subject.values()])
    candidates = [
        _candidate(group, names, unique[identity], tokens_per_step, manifest_of)
        for identity, group in by_subject.items()
    ]
    blocks = {
        unique[e.subject.identity]: e.blocks for e in latest if decides in names[_evaluator(e)].values() and e.blocks
    }
    measured = [c.metrics[decides] for c in candidates if decides in c.metrics]
    lengths = [candidate.end for candidate in candidates if candidate.end is not None]
    return TuningResult(
        run=run,
        metric=decides,
        unit=measured[0].unit if measured else "",
        maximize=measured[0].maximize if measured else False,
        data=_data_words(next(iter(blocks.values()), None)),
        run_length=max(lengths, key=lambda span: span.steps, default=None),
        candidates=_compared(candidates, decides, blocks),
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
    tokens_per_step: float | None,
    manifest_of: Callable[[Subject], dict[str, Any]],
) -> CandidateResult:
    subject = group[-1].subject
    metrics = {names[_evaluator(e)][key]: value for e in group for key, value in e.metrics.items()}
    failures = [evaluation.failure for evaluation in group if evaluation.failure is not None]
    place: dict[str, Any] = {}
    if subject.sources:
        manifest = manifest_of(subject) if subject.kind == "merge" else {}
        place = _place(subject, tokens_per_step, manifest)
    return CandidateResult(
        name=name,
        kind=KINDS[subject.kind],
        metrics=metrics,
        failure="; ".join(failures) or None,
        seconds=sum(evaluation.seconds for evaluation in group),
        **place,
    )


def _place(subject: Subject, tokens_per_step: float | None, manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields of a candidate that say of which checkpoints it is made."""
    steps = [source.step for source in subject.sources]
    coefficients = [source.coefficient for source in subject.sources]
    tokens = _tokens(subject, tokens_per_step)
    recipe = manifest.get("recipe", {})
    place: dict[str, Any] = {
        "steps": tuple(steps),
        "tokens": tokens,
        "coefficients": tuple(coefficients),
        "end": Span(steps=steps[-1], tokens=tokens[-1] if tokens else None),
        "window": Span(steps=0.0, tokens=0.0 if tokens else None),
    }
    if subject.kind != "merge":
        return place
    window = _spans(_duration, steps, tokens)
    age = _spans(lambda at: _mean_age(at, coefficients), steps, tokens)
    deviation = _spans(lambda at: _deviation(at, coefficients), steps, tokens)
    squares = sum(c * c for c in coefficients)
    return place | {
        "window": window,
        "fraction": _length(window) / _length(place["end"]) if steps[-1] else None,
        "curve": str(manifest["curve"]) if "curve" in manifest else _shape(coefficients),
        "spread": recipe.get("spread") if isinstance(recipe, dict) else None,
        "mean_age": age,
        "deviation": deviation,
        "ess": 1 / squares if squares else None,
    }


def _tokens(subject: Subject, tokens_per_step: float | None) -> tuple[int, ...] | None:
    counts = [source.tokens for source in subject.sources]
    if tokens_per_step is not None:
        return tuple(round(source.step * tokens_per_step) for source in subject.sources)
    known = tuple(count for count in counts if count is not None)
    return known if len(known) == len(counts) else None


def _length(span: Span) -> float:
    return span.steps if span.tokens is None else span.tokens


def _spans(measure: Callable[[Sequence[float]], float], steps: Sequence[int], tokens: Sequence[int] | None) -> Span:
    return Span(steps=measure(steps), tokens=None if tokens is None else measure(tokens))


def _duration(at: Sequence[float]) -> float:
    """The oldest checkpoint stands for an interval before it, as long as the median of the others."""
    intervals = [b - a for a, b in pairwise(at)]
    return at[-1] - at[0] + (median(intervals) if intervals else 0.0)


def _mean_age(at: Sequence[float], coefficients: Sequence[float]) -> float:
    return sum(c * (at[-1] - one) for one, c in zip(at, coefficients, strict=True))


def _deviation(at: Sequence[float], coefficients: Sequence[float]) -> float:
    mean = _mean_age(at, coefficients)
    squares = sum(c * (at[-1] - one - mean) ** 2 for one, c in zip(at, coefficients, strict=True))
    return math.sqrt(max(squares, 0.0))  # negative coefficients can make it negative


def _shape(coefficients: Sequence[float]) -> str:
    """The curve of a merge whose manifest is gone, as far as its coefficients tell."""
    is_mean = max(coefficients) - min(coefficients) < 1e-6
    return "linear" if is_mean else "other coefficients"


def _data_words(blocks: Blocks | None) -> str:
    if blocks is None:
        return ""
    return f"{', '.join(blocks.sources)}: {len(blocks.tokens):,} blocks, {sum(blocks.tokens):,} tokens"


def _compared(
    candidates: Sequence[CandidateResult], metric: str, blocks: dict[str, Blocks]
) -> tuple[CandidateResult, ...]:
    """The candidates with their differences to the best one."""
    measured = [c for c in candidates if metric in c.metrics and math.isfinite(c.metrics[metric].value)]
    if not measured:
        return tuple(candidates)
    sign = -1.0 if measured[0].metrics[metric].maximize else 1.0
    best = min(measured, key=lambda c: sign * c.metrics[metric].value)
    compared = []
    for candidate in candidates:
        difference = None
        if any(candidate is one for one in measured):
            value = sign * (candidate.metrics[metric].value - best.metrics[metric].value)
            error = _paired_error(candidate, best, metric, blocks)
            difference = Difference(value=value, error=error)
        compared.append(candidate.model_copy(update={"difference": difference}))
    return tuple(compared)


def _paired_error(one: CandidateResult, other: CandidateResult, metric: str, blocks: dict[str, Blocks]) -> float | None:
    """Standard error of the difference over blocks (THEORY.md 9): sd(x - y) / sqrt(number of blocks).

    None unless both have the same blocks and the metric is the mean of their tokens.
    """
    if one is other:
        return 0.0
    first, second = blocks.get(one.name), blocks.get(other.name)
    if first is None or second is None or first.tokens != second.tokens or len(first.tokens) < 2:
        return None
    pairs = ((one.metrics[metric], first), (other.metrics[metric], second))
    if not all(math.isclose(m.value, sum(b.nats) / sum(b.tokens), rel_tol=1e-9) for m, b in pairs):
        return None
    count = len(first.tokens)
    differences = (np.array(first.nats) - np.array(second.nats)) * count / sum(first.tokens)
    return float(np.std(differences, ddof=1) / math.sqrt(count))
