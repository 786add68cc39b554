"""From evaluations to the result of a tuning. Nothing is measured here, so it can be done again at any time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wsm_ds.evaluation.evaluation import Evaluation, Metric
from wsm_ds.evaluation.evaluator import Evaluator
from wsm_ds.evaluation.generation import GenerateEvaluator
from wsm_ds.evaluation.records import Records
from wsm_ds.sizes import format_count
from wsm_ds.tuning.candidates import Candidate
from wsm_ds.tuning.recommendation import CLEAR_ERRORS, Comparison, Measured, figure, recommend
from wsm_ds.tuning.request import TuningRequest
from wsm_ds.tuning.results import CandidateResult, Recommendation, TuningResult
from wsm_ds.tuning.warnings import warnings_of


@dataclass(frozen=True)
class Found:
    """What is recorded of the candidates.

    Attributes:
        request: of the tuning.
        candidates: all of them.
        records: the evaluations.
        guessing: see `warnings_of`.
    """

    request: TuningRequest
    candidates: tuple[Candidate, ...]
    records: Records
    guessing: float | None = None

    def evaluation(self, candidate: Candidate, evaluator: Evaluator | None) -> Evaluation | None:
        """The newest evaluation of a candidate; one that failed if there is no other."""
        if evaluator is None:
            return None
        subject, measured_by = candidate.subject.identity, evaluator.identity()
        return self.records.find(subject, measured_by) or self.records.find(subject, measured_by, failed=True)

    def measured(self, evaluator: Evaluator) -> list[tuple[Candidate, Measured]]:
        """The candidates that have a value of an evaluator's main metric.

        Args:
            evaluator: what has measured them.
        """
        found = []
        for candidate in self.candidates:
            evaluation = self.evaluation(candidate, evaluator)
            metric = None if evaluation is None else evaluation.metrics.get(evaluator.main_metric)
            if evaluation is not None and metric is not None and evaluation.failure is None:
                figures = candidate.figures
                duration = figures.duration.steps if figures is not None and candidate.kind == "merge" else 0.0
                one = Measured(candidate.name, candidate.kind, duration, candidate.is_newest, metric, evaluation.blocks)
                found.append((candidate, one))
        return found

    def comparison(self, evaluator: Evaluator) -> Comparison:
        """All that an evaluator has measured, to be compared.

        Args:
            evaluator: what has measured them.
        """
        measured = tuple(one for _, one in self.measured(evaluator))
        return Comparison(evaluator.main_metric, measured, getattr(evaluator, "weights", None))

    def finalists(self) -> list[Candidate]:
        """The candidates of the final stage: the best merges, and what they are compared with."""
        measured = self.measured(self.request.screening)
        merges = sorted((pair for pair in measured if pair[0].kind == "merge"), key=lambda pair: pair[1].badness)
        others = [candidate for candidate, _ in measured if candidate.is_newest or candidate.kind == "baseline"]
        return [candidate for candidate, _ in merges[: self.request.finalists]] + others


def conclude(found: Found, seconds: Mapping[str, float], read_bytes: int) -> TuningResult:
    """Puts the result together.

    Args:
        found: what is recorded.
        seconds: by kind of work.
        read_bytes: that merges have read.
    """
    request, screening = found.request, found.request.screening
    deciding = request.final if request.final is not None and found.measured(request.final) else screening
    comparison = found.comparison(deciding)
    best = comparison.best if comparison.measured else None
    by_name = {one.name: one for one in comparison.measured}
    results = []
    for candidate in found.candidates:
        result = _measured(found, candidate)
        if best is not None and candidate.name in by_name:
            difference = comparison.difference(by_name[candidate.name], best)
            result = result.model_copy(update={"difference": difference})
        results.append(result)
    main = best.metric if best is not None else Metric(value=0.0)
    newest = next((candidate for candidate in found.candidates if candidate.is_newest), None)
    return TuningResult(
        run=str(request.run.resolve()),
        metric=deciding.main_metric,
        unit=main.unit,
        maximize=main.maximize,
        data=_data(deciding),
        run_length=newest.described().end if newest is not None else None,
        candidates=tuple(result for result in results if result.metrics or result.failure),
        recommendation=_recommendation(found, comparison, results) if best is not None else None,
        waiting=tuple(result.name for result in results if not result.metrics and not result.failure),
        read_bytes=read_bytes,
        seconds=dict(seconds),
    )


def _measured(found: Found, candidate: Candidate) -> CandidateResult:
    """A candidate with what was measured of it."""
    request = found.request
    finals = [found.evaluation(candidate, evaluator) for evaluator in request.finals]
    evaluations = [found.evaluation(candidate, request.screening), *finals]
    present = [evaluation for evaluation in evaluations if evaluation is not None]
    failures = [evaluation.failure for evaluation in present if evaluation.failure is not None]
    return candidate.described().model_copy(
        update={
            "metrics": {name: metric for evaluation in present for name, metric in evaluation.metrics.items()},
            "stage": 2 if any(finals) else 1,
            "failure": failures[-1] if failures else None,
            "seconds": sum(evaluation.seconds for evaluation in present),
        }
    )


def _recommendation(found: Found, comparison: Comparison, results: Sequence[CandidateResult]) -> Recommendation:
    recommendation = recommend(comparison)
    steps = {one.name: one.steps[-1] for one in results if one.steps}
    screened = found.comparison(found.request.screening)
    raw = [(steps[one.name], one) for one in screened.measured if one.kind == "raw"]
    singles = sorted(raw, key=lambda pair: pair[0])
    warnings = list(warnings_of(comparison, recommendation.name, singles, found.guessing))
    chosen = next((candidate for candidate in found.candidates if candidate.name == recommendation.name), None)
    if chosen is not None and chosen.figures is not None:
        warnings += [_sentence(warning) for warning in chosen.figures.warnings]
    warnings += [*_without_final(found), *_unlike_screening(found, comparison, recommendation)]
    warnings += _generation_warnings(found, recommendation)
    failed = [one.name for one in results if one.failure is not None and comparison.metric not in one.metrics]
    if failed:
        warnings.append(f"{len(failed)} of {len(found.candidates)} candidates have no value: {', '.join(failed)}.")
    merges = sum(one.kind == "merge" for one in comparison.measured)
    confirmed = [_confirmed(found, name) for name in (recommendation.name, recommendation.raw)]
    if found.request.confirm is None and merges > 1:
        warnings.append(
            f"The best of {merges} merges looks better on the data that chose it than it is. For an honest figure "
            "give a second held-out set (--confirm)."
        )
    return recommendation.model_copy(
        update={"warnings": tuple(warnings), "confirmed": confirmed[0], "confirmed_raw": confirmed[1]}
    )


def _without_final(found: Found) -> list[str]:
    """A warning if the final measurement was tried, and has no value at all: then the screening decides."""
    final = found.request.final
    if final is None or found.measured(final):
        return []
    tried = [evaluation for one in found.candidates if (evaluation := found.evaluation(one, final)) is not None]
    if not tried:
        return []
    return [
        f"The final measurement has no value for any of {len(tried)} models, so {found.request.screening.main_metric} "
        f"decides. The newest failure: {tried[-1].failure}"
    ]


def _unlike_screening(found: Found, comparison: Comparison, recommendation: Recommendation) -> list[str]:
    """A warning if the raw checkpoint is recommended by the final measurement, and a finalist clearly by the first."""
    screened = found.comparison(found.request.screening)
    by_name = {one.name: one for one in screened.measured}
    raw = by_name.get(recommendation.name or "")
    merges = [by_name[one.name] for one in comparison.measured if one.kind == "merge" and one.name in by_name]
    if screened.metric == comparison.metric or raw is None or raw.kind != "raw" or not merges:
        return []
    best = min(merges, key=lambda one: one.badness)
    gain = screened.difference(raw, best)
    if gain.error is None or gain.value <= CLEAR_ERRORS * gain.error:
        return []
    return [
        f"By {screened.metric}, {best.name} is better than {raw.name} by {figure(gain)}, which {comparison.metric} "
        "does not show. A measurement with a smaller error may."
    ]


def _generation_warnings(found: Found, recommendation: Recommendation) -> list[str]:
    """A warning if the recommended merge loops clearly more often than the raw checkpoint when it generates."""
    for evaluator in found.request.finals:
        if not isinstance(evaluator, GenerateEvaluator):
            continue
        by_name = {one.name: one for one in found.comparison(evaluator).measured}
        chosen, raw = by_name.get(recommendation.name or ""), by_name.get(recommendation.raw or "")
        if chosen is None or raw is None or chosen is raw:
            continue
        difference = found.comparison(evaluator).difference(chosen, raw)
        if difference.value > CLEAR_ERRORS * (difference.error or 0.0):
            return [
                f"{chosen.name} loops in {chosen.metric.value:.1%} of its continuations, {raw.name} in "
                f"{raw.metric.value:.1%}: a loss does not see that. Compare a shorter window, or --spread qam."
            ]
    return []


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _confirmed(found: Found, name: str | None) -> Metric | None:
    """The value of a candidate on the data that have chosen nothing."""
    confirm = found.request.confirm
    candidate = next((candidate for candidate in found.candidates if candidate.name == name), None)
    if confirm is None or candidate is None:
        return None
    evaluation = found.evaluation(candidate, confirm)
    return None if evaluation is None else evaluation.metrics.get(confirm.main_metric)


def _data(evaluator: Evaluator) -> str:
    """What an evaluator measures on, in words."""
    details = evaluator.details()
    words = []
    if "data" in details:
        words.append(", ".join(f"{name} ({path})" for name, path in details["data"].items()))
    if "blocks" in details:
        words.append(f"{details['blocks']} blocks, {format_count(details['tokens'])} tokens")
    kind = str(evaluator.describe().get("kind", ""))
    if "tasks" in details:
        words.append(f"{kind}: {', '.join(details['tasks'])}")
    if "command" in details:
        words.append(f"{kind}: {details['command']}")
    return "; ".join(words) or kind


def ordered(candidates: Sequence[CandidateResult], maximize: bool, metric: str) -> list[CandidateResult]:
    """Candidates by their value, the best first; those without one at the end.

    Args:
        candidates: of a result.
        maximize: whether more is better.
        metric: the name of the metric.
    """
    sign = -1.0 if maximize else 1.0
    return sorted(
        candidates,
        key=lambda one: (metric not in one.metrics, sign * one.metrics[metric].value if metric in one.metrics else 0.0),
    )
