"""Narrower rows of coefficients: the published test vectors, the laws that they keep, and wrong texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.errors import CurveError
from wsm_ds.schedules.coefficients import decay_factors, merge_coefficients
from wsm_ds.schedules.curves import Array
from wsm_ds.schedules.figures import age_deviation, effective_sample_size, lag
from wsm_ds.schedules.spread import MOST_FACTORS, Spread, bernoulli_sum, maximum_entropy, parse_spread

CURVES = st.sampled_from(["linear", "cosine", "1-sqrt", "power:2", "inverse-sqrt:0.1", "ema", "table:1,1,0.3,0"])
VECTORS = [
    ("linear", 4, ".093750 .406250 .406250 .093750"),
    ("linear", 8, ".002403 .033028 .152122 .312447 .312447 .152122 .033028 .002403"),
    ("1-sqrt", 8, ".049023 .213951 .343964 .264688 .105000 .021295 .002013 .000067"),
    ("cosine", 4, ".062500 .437500 .437500 .062500"),
]


def mean_and_variance(c: Array) -> tuple[float, float]:
    j = np.arange(len(c))
    mean = float((c * j).sum())
    return mean, float((c * (j - mean) ** 2).sum())


@pytest.mark.parametrize(("curve", "n", "printed"), VECTORS)
def test_the_vectors_of_qam(curve: str, n: int, printed: str) -> None:
    found = merge_coefficients(curve, n=n, spread="qam")
    assert [f"{c:.6f}".removeprefix("0") for c in found] == printed.split()


def test_the_figures_of_qam() -> None:
    four, eight = merge_coefficients("linear", n=4, spread="qam"), merge_coefficients("linear", n=8, spread="qam")
    assert lag(four, range(4)) == 1.5
    assert age_deviation(four, range(4)) == pytest.approx(0.790569, abs=5e-7)
    assert effective_sample_size(four) == pytest.approx(2.8764, abs=5e-5)
    assert age_deviation(eight, range(8)) == pytest.approx(1.145644, abs=5e-7)
    assert mean_and_variance(merge_coefficients("1-sqrt", n=8, spread="qam"))[0] == pytest.approx(2.2350, abs=5e-5)


@given(CURVES, st.integers(1, 60), st.floats(0, 1), st.sampled_from(["qam", "maxent"]), st.floats(0, 1))
def test_every_spread_keeps_the_mean_and_the_sum_and_the_dial_lies_between(
    curve: str, n: int, floor: float, kind: str, dial: float
) -> None:
    wsm = merge_coefficients(curve, n=n, floor=floor)
    narrow = merge_coefficients(curve, n=n, floor=floor, spread=kind)
    between = merge_coefficients(curve, n=n, floor=floor, spread=f"{kind}:{dial!r}")
    mean, variance = mean_and_variance(wsm)
    narrow_mean, narrow_variance = mean_and_variance(narrow)
    assert narrow.min() >= 0.0
    assert narrow.sum() == pytest.approx(1.0, abs=1e-12)
    assert narrow_mean == pytest.approx(mean, abs=1e-8)
    assert narrow_variance <= variance + 1e-8
    assert between == pytest.approx((1 - dial) * wsm + dial * narrow, abs=1e-15)


@given(st.lists(st.floats(0, 1), max_size=30).map(lambda w: np.array(sorted(w, reverse=True))))
def test_the_variance_is_that_of_independent_draws_and_maxent_has_the_same_moments(w: Array) -> None:
    q, row = bernoulli_sum(w), maximum_entropy(w)
    mean, variance = mean_and_variance(q)
    assert (mean, variance) == pytest.approx((w.sum(), (w * (1 - w)).sum()), abs=1e-12)
    assert mean_and_variance(row) == pytest.approx((mean, variance), rel=1e-8, abs=1e-8)


def test_maxent_is_the_exponential_of_a_parabola() -> None:
    row = maximum_entropy(decay_factors("1-sqrt", n=12))
    assert np.diff(np.log(row), n=3) == pytest.approx(np.zeros(9), abs=1e-6)


def test_a_qam_row_is_the_polynomial_itself() -> None:
    w = decay_factors("cosine", steps=[10, 20, 50, 60, 90])
    polynomial = np.polynomial.Polynomial([1.0])
    for factor in w:
        polynomial *= np.polynomial.Polynomial([1 - factor, factor])
    assert bernoulli_sum(w) == pytest.approx(polynomial.coef, abs=1e-15)


def test_one_checkpoint_and_two_have_no_other_row() -> None:
    for spread in ("wsm", "qam", "maxent"):
        assert merge_coefficients("linear", n=1, spread=spread).tolist() == [1.0]
        assert merge_coefficients("linear", n=2, spread=spread).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "spread", "written"),
    [("wsm", Spread(), "wsm"), (" QAM ", Spread("qam"), "qam"), ("maxent:0.25", Spread("maxent", 0.25), "maxent:0.25"),
     ("qam:1", Spread("qam"), "qam"), ("qam:0.1", Spread("qam", 0.1), "qam:0.1")],
)  # fmt: skip
def test_texts_name_spreads_and_come_back(text: str, spread: Spread, written: str) -> None:
    assert parse_spread(text) == spread
    assert (str(spread), parse_spread(str(spread))) == (written, spread)


@pytest.mark.parametrize(
    ("text", "words"),
    [("maxnt", "did you mean .maxent"), ("wsm:0.5", "the dial is a number"), ("qam:1.5", "from 0"),
     ("qam:", "the dial"), ("qam:nan", "the dial"), ("maxent:x", "the dial")],
)  # fmt: skip
def test_a_wrong_spread_says_what_is_right(text: str, words: str) -> None:
    with pytest.raises(CurveError, match=words):
        parse_spread(text)


def test_more_checkpoints_than_a_second_of_work_are_refused() -> None:
    with pytest.raises(CurveError, match="at most 20001 checkpoints"):
        bernoulli_sum(np.zeros(MOST_FACTORS + 1))
