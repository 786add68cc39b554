import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from wsm_ds.evaluation.evaluation import Blocks, Metric
from wsm_ds.evaluation.statistics import loss_metrics
from wsm_ds.tuning.recommendation import Comparison, Measured, recommend
from wsm_ds.tuning.warnings import loss_of_guessing, warnings_of

TOKENS = 100
Nats = NDArray[np.float64]


def measured(name: str, nats: Nats, *, duration: float = 0.0, kind: str = "merge", newest: bool = False) -> Measured:
    blocks = Blocks(
        sources=("web",), source=(0,) * len(nats), nats=tuple((nats * TOKENS).tolist()), tokens=(TOKENS,) * len(nats)
    )
    return Measured(name, kind, duration, newest, loss_metrics(blocks)["loss"], blocks)  # type: ignore[arg-type]


def texts(count: int = 200) -> Nats:
    """How hard each block is: far more different than models are."""
    return 3.0 + np.random.default_rng(1).normal(0, 0.5, count)


def noise(seed: int, count: int = 200) -> Nats:
    return np.random.default_rng(seed).normal(0, 0.01, count)


def raw(shift: float = 0.0) -> Measured:
    return measured("step400", texts() + shift, kind="raw", newest=True)


def test_the_error_of_a_difference_is_that_of_the_pairs() -> None:
    one, other = measured("a", texts() + noise(2)), measured("b", texts() + noise(3))
    difference = Comparison("loss", (one, other)).difference(one, other)
    pairs = (texts() + noise(2)) - (texts() + noise(3))
    assert difference.value == pytest.approx(pairs.mean(), rel=1e-12)
    assert difference.error == pytest.approx(pairs.std(ddof=1) / math.sqrt(200), rel=1e-9)
    assert (difference.error or 1.0) < 0.1 * (one.metric.error or 0)  # unpaired errors could not tell the two apart


def test_the_shortest_window_within_one_error_of_the_best_is_chosen() -> None:
    long = measured("last16-linear", texts() - 0.0502 + noise(4) - noise(4).mean(), duration=1600)
    short = measured("last8-linear", texts() - 0.05 + noise(5) - noise(5).mean(), duration=800)
    shortest = measured("last4-linear", texts() - 0.02 + noise(6), duration=400)
    comparison = Comparison("loss", (raw(), long, short, shortest))
    assert comparison.best.name == "last16-linear"
    found = recommend(comparison)
    assert (found.name, found.best, found.raw) == ("last8-linear", "last16-linear", "step400")
    assert "within one standard error" in found.sentence
    assert "better than the raw checkpoint step400 by 0.0" in found.sentence


def test_nothing_better_than_the_raw_checkpoint_is_said_plainly() -> None:
    found = recommend(Comparison("loss", (raw(), measured("last4-linear", texts() + 0.1 + noise(7), duration=400))))
    assert found.name == "step400"
    assert found.sentence.startswith("No merge is better than the raw checkpoint: use step400")
    assert "last4-linear, is worse by 0.0" in found.sentence or "last4-linear, is worse by 0.1" in found.sentence


def test_errors_that_cannot_tell_are_said_plainly() -> None:
    merge = measured("last4-linear", texts() - 0.0001 + noise(8) - noise(8).mean(), duration=400)
    found = recommend(Comparison("loss", (raw(), merge)))
    assert (found.name, found.best) == ("step400", "last4-linear")
    assert found.sentence.startswith("The errors cannot tell the best merge, last4-linear, from the raw checkpoint")


def test_a_baseline_and_an_older_checkpoint_are_named_and_not_chosen() -> None:
    merge = measured("last4-linear", texts() - 0.05 + noise(9), duration=400)
    decayed = measured("decayed", texts() - 0.2 + noise(10), kind="baseline")
    older = measured("step300", texts() - 0.3 + noise(11), kind="raw")
    found = recommend(Comparison("loss", (raw(), merge, decayed, older)))
    assert (found.name, found.best) == ("last4-linear", "step300")
    assert "The baseline decayed is better by 0.1" in found.sentence
    assert "The older checkpoint step300 alone is better by 0.2" in found.sentence


def test_metrics_without_blocks_are_compared_by_their_own_errors_and_more_may_be_better() -> None:
    def accuracy(name: str, value: float, duration: float, *, newest: bool = False) -> Measured:
        kind = "raw" if newest else "merge"
        return Measured(name, kind, duration, newest, Metric(value=value, error=0.03, maximize=True))  # type: ignore[arg-type]

    best, short, plain = accuracy("a", 0.70, 800), accuracy("b", 0.68, 400), accuracy("step400", 0.60, 0, newest=True)
    comparison = Comparison("acc", (best, short, plain))
    assert comparison.difference(plain, best).value == pytest.approx(0.1)
    assert comparison.difference(plain, best).error == pytest.approx(math.hypot(0.03, 0.03))
    assert recommend(comparison).name == "b"


def test_nothing_to_choose_from() -> None:
    assert recommend(Comparison("loss", (measured("decayed", texts(), kind="baseline"),))).name is None


def test_few_blocks_are_warned_of() -> None:
    few = measured("last4-linear", texts(10), duration=400)
    (warning,) = warnings_of(Comparison("loss", (few,)), "last4-linear", [], None)
    assert "only 10 blocks" in warning
    assert "about 24 %" in warning


def test_shuffled_data_are_noticed() -> None:
    tokens = np.random.default_rng(5).zipf(1.3, 40_000) % 1000
    guessing = loss_of_guessing(tokens)
    shares = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    assert guessing == pytest.approx(float(-(shares * np.log(shares)).sum()), abs=0.02)
    comparison = Comparison("loss", (measured("last4-linear", np.full(50, guessing + 0.1), duration=400),))
    (warning,) = warnings_of(comparison, "last4-linear", [], guessing)
    assert "tokens in their order" in warning
    assert warnings_of(Comparison("loss", (measured("a", np.full(50, guessing - 1)),)), "a", [], guessing) == ()


@pytest.mark.parametrize("diverged", [0, 3, 7])
def test_a_checkpoint_that_diverged_is_named(diverged: int) -> None:
    losses = [3.0 - 0.01 * number for number in range(8)]
    losses[diverged] += 1.0
    singles = [
        (100 * number, measured(f"step{100 * number}", texts() - 3 + value, kind="raw"))
        for number, value in enumerate(losses)
    ]
    comparison = Comparison("loss", tuple(one for _, one in singles))
    (warning,) = warnings_of(comparison, None, singles, None)
    assert f"The checkpoint of step {100 * diverged} alone is far worse" in warning


def test_checkpoints_that_fall_evenly_are_not_conspicuous() -> None:
    singles = [(n, measured(f"step{n}", texts() - 0.05 * n, kind="raw")) for n in range(8)]
    assert all(a.badness > b.badness for (_, a), (_, b) in pairwise(singles))
    assert warnings_of(Comparison("loss", tuple(one for _, one in singles)), None, singles, None) == ()


def test_the_longest_window_is_warned_of_if_it_is_chosen() -> None:
    long, short = measured("b", texts() - 1, duration=800), measured("a", texts(), duration=400)
    assert "longer ones may be better" in warnings_of(Comparison("loss", (long, short)), "b", [], None)[0]
    assert warnings_of(Comparison("loss", (long, short)), "a", [], None) == ()


@pytest.mark.parametrize("diverged", range(4))
def test_one_of_four_checkpoints_that_diverged_is_named(diverged: int) -> None:
    shifts = [0.03, 0.02, 0.01, 0.0]
    shifts[diverged] += 3.0
    singles = [(100 * at, measured(f"step{100 * at}", texts() + shift)) for at, shift in enumerate(shifts)]
    comparison = Comparison("loss", tuple(one for _, one in singles))
    (warning,) = warnings_of(comparison, None, singles, None)
    assert f"The checkpoint of step {100 * diverged} alone is far worse" in warning


def test_a_merge_with_the_same_value_is_not_called_worse() -> None:
    found = recommend(Comparison("loss", (raw(), measured("last4-linear", texts(), duration=400))))
    assert found.name == "step400"
    assert "The best merge, last4-linear, has the same value." in found.sentence
