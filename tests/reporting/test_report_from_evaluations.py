"""Evaluations become candidates: of which checkpoints they are made, and how they differ."""

import math

import numpy as np
import pytest
from made_results import evaluation

from wsm_ds.errors import RecipeError
from wsm_ds.evaluation.evaluation import Metric
from wsm_ds.reporting.report.from_evaluations import from_evaluations
from wsm_ds.tuning.results import CandidateResult, Span, TuningResult

RAW = evaluation("step400", [33.0, 35.0, 31.0, 37.0], kind="checkpoint", steps=(400,))
MERGED = evaluation("last4", [30.0, 33.0, 29.5, 33.5], steps=(100, 200, 300, 400))


def named(result: TuningResult) -> dict[str, CandidateResult]:
    return {candidate.name: candidate for candidate in result.candidates}


def test_a_merge_says_its_window_its_age_and_its_effective_number_of_checkpoints() -> None:
    merge = named(from_evaluations([RAW, MERGED], run="/run", tokens_per_step=1000))["last4"]
    assert merge.window == Span(steps=400, tokens=400_000)
    assert merge.end == Span(steps=400, tokens=400_000)
    assert merge.fraction == 1.0
    assert merge.mean_age == Span(steps=150, tokens=150_000)
    assert merge.deviation is not None
    assert math.isclose(merge.deviation.steps, np.std([100, 200, 300, 400]))
    assert merge.ess == 4.0
    assert merge.curve == "linear"


def test_tokens_come_from_the_manifest_of_a_merge_and_tell_those_of_its_raw_checkpoints() -> None:
    manifest = {"curve": "cosine", "spread": "qam", "window": {"tokens": [700, 1400, 2100, 2800]}}
    found = named(from_evaluations([RAW, MERGED], run="/run", manifest_of=lambda subject: manifest))
    assert found["last4"].tokens == (700, 1400, 2100, 2800)
    assert found["last4"].window == Span(steps=400, tokens=2800)
    assert (found["last4"].curve, found["last4"].spread) == ("cosine", "qam")
    assert found["step400"].end == Span(steps=400, tokens=2800)
    assert named(from_evaluations([RAW, MERGED], run="/run"))["last4"].tokens is None


def test_the_paired_error_is_numpys_of_the_recorded_blocks() -> None:
    raw = named(from_evaluations([RAW, MERGED], run="/run"))["step400"]
    pairs = np.array([33.0, 35.0, 31.0, 37.0]) / 10 - np.array([30.0, 33.0, 29.5, 33.5]) / 10
    assert raw.difference is not None
    assert math.isclose(raw.difference.value, pairs.mean())
    assert raw.difference.error is not None
    assert math.isclose(raw.difference.error, pairs.std(ddof=1) / 2)


def test_the_best_one_differs_by_nothing() -> None:
    best = named(from_evaluations([RAW, MERGED], run="/run"))["last4"]
    assert best.difference is not None
    assert (best.difference.value, best.difference.error) == (0.0, 0.0)


def test_where_more_is_better_the_difference_is_positive_for_the_smaller_one() -> None:
    scores = [
        evaluation(name, [1.0, 1.0], metrics={"acc": Metric(value=value, maximize=True)}, steps=(1, 2), blocks=None)
        for name, value in (("a", 0.5), ("b", 0.75))
    ]
    worse = named(from_evaluations(scores, run="/run"))["a"]
    assert worse.difference is not None
    assert (worse.difference.value, worse.difference.error) == (0.25, None)


@pytest.mark.parametrize("nats", [[30.0, 33.0, 29.5], [30.0]])
def test_other_blocks_give_no_paired_error(nats: list[float]) -> None:
    other = evaluation("other", nats, steps=(300, 400))
    for candidate in from_evaluations([RAW, other], run="/run").candidates:
        assert candidate.difference is not None
        assert candidate.difference.error in (None, 0.0)
    assert named(from_evaluations([RAW, other], run="/run"))["step400"].difference.error is None  # type: ignore[union-attr]


def test_sources_have_their_weights_in_the_paired_error() -> None:
    both = [
        one.model_copy(
            update={
                "evaluator": one.evaluator | {"weights": {"wiki": 0.75, "code": 0.25}},
                "blocks": one.blocks.model_copy(update={"sources": ("wiki", "code"), "source": (0, 0, 1, 1)}),
            }
        )
        for one in (RAW, MERGED)
        if one.blocks is not None
    ]
    raw = named(from_evaluations(both, run="/run"))["step400"]
    errors = [np.std([0.3, 0.2], ddof=1) / math.sqrt(2), np.std([0.15, 0.35], ddof=1) / math.sqrt(2)]
    assert raw.difference is not None
    assert raw.difference.error == pytest.approx(math.hypot(0.75 * errors[0], 0.25 * errors[1]))


def test_another_metric_than_the_loss_has_no_paired_error() -> None:
    both = [one.model_copy(update={"metrics": {"bits": Metric(value=float(n))}}) for n, one in enumerate((MERGED, RAW))]
    raw = named(from_evaluations(both, run="/run"))["step400"]
    assert raw.difference is not None
    assert raw.difference.error is None


def test_the_last_result_counts_and_a_later_failure_does_not_hide_it() -> None:
    failed = MERGED.model_copy(update={"metrics": {}, "blocks": None, "failure": "killed"})
    newer = MERGED.model_copy(update={"metrics": {"loss": Metric(value=2.0)}})
    assert named(from_evaluations([failed, MERGED], run="/run"))["last4"].failure is None
    assert named(from_evaluations([MERGED, failed], run="/run"))["last4"].metrics == MERGED.metrics
    assert named(from_evaluations([MERGED, newer], run="/run"))["last4"].metrics["loss"].value == 2.0
    assert named(from_evaluations([RAW, failed], run="/run"))["last4"].failure == "killed"


def test_losses_on_other_data_are_not_mixed() -> None:
    other = RAW.model_copy(update={"evaluator": {"kind": "loss", "identity": "a" * 64}})
    result = from_evaluations([RAW, MERGED, other], run="/run")
    assert result.metric == "loss (ffffff)"
    assert set(named(result)["step400"].metrics) == {"loss (ffffff)", "loss (aaaaaa)"}
    assert from_evaluations([RAW, other], run="/run", metric="loss (aaaaaa)").metric == "loss (aaaaaa)"


def test_several_evaluators_of_one_model_are_one_candidate() -> None:
    acc = RAW.model_copy(
        update={
            "evaluator": {"kind": "command", "identity": "b"},
            "metrics": {"acc": Metric(value=0.5)},
            "blocks": None,
        }
    )
    (candidate,) = from_evaluations([RAW, acc], run="/run").candidates
    assert set(candidate.metrics) == {"loss", "acc"}
    assert candidate.seconds == 4.0


def test_equal_names_of_different_models_are_told_apart() -> None:
    other = RAW.model_copy(update={"subject": RAW.subject.model_copy(update={"identity": "0" * 64})})
    names = [candidate.name for candidate in from_evaluations([RAW, other], run="/run").candidates]
    assert names == [f"step400 ({RAW.subject.identity[:6]})", "step400 (000000)"]


def test_an_unknown_metric_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(RecipeError, match=r"no evaluation has 'los' \(did you mean 'loss'\?\); there are loss\."):
        from_evaluations([RAW], run="/run", metric="los")


def test_no_evaluation_is_an_error() -> None:
    with pytest.raises(RecipeError, match="there is no evaluation to report"):
        from_evaluations([], run="/run")
