"""Means and errors of block losses equal numpy's, and the order of blocks changes no bit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.errors import RecipeError
from wsm_ds.evaluation.evaluation import Blocks
from wsm_ds.evaluation.statistics import loss_metrics, paired_difference

LOSSES = st.lists(st.floats(0.1, 20), min_size=2, max_size=40)


def one_source(nats: list[float], tokens: int = 8, nbytes: int | None = None) -> Blocks:
    return Blocks(
        sources=("held",), source=(0,) * len(nats), nats=tuple(nats), tokens=(tokens,) * len(nats),
        nbytes=None if nbytes is None else (nbytes,) * len(nats),
    )  # fmt: skip


@given(LOSSES)
def test_the_mean_and_its_error_are_numpys(losses: list[float]) -> None:
    x = np.array(losses)
    metric = loss_metrics(one_source((8 * x).tolist()))["loss"]
    assert metric.value == pytest.approx(x.mean(), rel=1e-13)
    assert metric.error == pytest.approx(x.std(ddof=1) / math.sqrt(len(x)), rel=1e-9, abs=1e-12)
    assert metric.unit == "nats/token"
    assert not metric.maximize


@given(st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.1, 20)), min_size=2, max_size=40))
def test_the_paired_error_is_numpys(pairs: list[tuple[float, float]]) -> None:
    x, y = np.array(pairs).T
    difference = paired_difference(one_source((8 * x).tolist()), one_source((8 * y).tolist()))
    assert difference.value == pytest.approx((x - y).mean(), abs=1e-12)
    assert difference.error == pytest.approx((x - y).std(ddof=1) / math.sqrt(len(x)), rel=1e-9, abs=1e-12)


@given(LOSSES, st.randoms())
def test_the_order_of_blocks_changes_no_bit(losses: list[float], random: "st.DrawFn") -> None:
    shuffled = list(losses)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert loss_metrics(one_source(losses)) == loss_metrics(one_source(shuffled))


def test_bits_per_byte_count_the_bytes_of_the_text() -> None:
    metrics = loss_metrics(one_source([8 * math.log(2), 8 * math.log(4)], tokens=8, nbytes=16))
    assert metrics["bits_per_byte"].value == pytest.approx(0.75)
    assert "bits_per_byte" not in loss_metrics(one_source([1.0, 2.0]))


def test_sources_count_by_their_tokens_or_by_their_weights() -> None:
    blocks = Blocks(sources=("web", "code"), source=(0, 0, 0, 1), nats=(8.0, 16.0, 24.0, 8.0), tokens=(8, 8, 8, 8))
    metrics = loss_metrics(blocks)
    assert metrics["loss"].value == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert metrics["loss"].error is None  # one block tells no error
    assert metrics["loss/web"].value == pytest.approx(2)
    assert metrics["loss/web"].error == pytest.approx(1 / math.sqrt(3))
    assert metrics["loss/code"].value == pytest.approx(1)
    weighted = loss_metrics(blocks, {"web": 1.0, "code": 3.0})
    assert weighted["loss"].value == pytest.approx(2 * 0.25 + 1 * 0.75)
    both = Blocks(sources=("web", "code"), source=(0, 0, 1, 1), nats=(8.0, 16.0, 24.0, 8.0), tokens=(8,) * 4)
    assert loss_metrics(both)["loss"].error == pytest.approx(math.hypot(0.5 * 0.5, 0.5 * 1.0))


def test_other_blocks_cannot_be_paired() -> None:
    with pytest.raises(RecipeError, match="only on the same blocks"):
        paired_difference(one_source([1.0, 2.0]), one_source([1.0, 2.0], tokens=9))
