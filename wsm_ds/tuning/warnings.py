"""What makes a recommendation less sure than its figures say."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wsm_ds.evaluation.statistics import LOSS
from wsm_ds.tuning.recommendation import Comparison, Measured

FEW_BLOCKS = 30
"""With fewer blocks, an error is itself known to 13 % only: 1 / (2 (B - 1))^½."""
OUTLIER = 10.0
"""A checkpoint is conspicuous if it is this many times farther from its neighbours than they usually are."""
FEWEST_NEIGHBOURS = 4


def warnings_of(
    comparison: Comparison, chosen: str | None, singles: Sequence[tuple[int, Measured]], guessing: float | None
) -> tuple[str, ...]:
    """Returns sentences.

    Args:
        comparison: of all candidates.
        chosen: the name of the recommended one.
        singles: raw checkpoints with their steps, rising.
        guessing: the loss of guessing each token by how often it occurs in the held-out data; None: not a loss.
    """
    return tuple(
        sentence
        for sentence in (
            _few_blocks(comparison),
            _guessing(comparison, guessing),
            *_conspicuous(singles),
            _at_the_edge(comparison, chosen),
        )
        if sentence
    )


def loss_of_guessing(tokens: NDArray[np.int64]) -> float:
    """The loss, in nats a token, of a model that knows only how often each token occurs in these data.

    A small sample shows too few of the rare tokens. The term of Miller and Madow corrects most of that.

    Args:
        tokens: any shape.
    """
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum()))


def _few_blocks(comparison: Comparison) -> str:
    counts = {len(one.blocks.nats) for one in comparison.measured if one.blocks is not None}
    if comparison.metric != LOSS or not counts or min(counts) >= FEW_BLOCKS:
        return ""
    if min(counts) == 1:
        return (
            "A held-out set of one block tells no error, so the choice may be chance. Give more held-out data "
            "(--data), or shorter blocks (--sequence-length)."
        )
    percent = 100 / math.sqrt(2 * (min(counts) - 1))
    return (
        f"The held-out set has only {min(counts)} blocks. The errors are themselves uncertain by about {percent:.0f} "
        "%, and the choice may be chance. Give more held-out data (--data), or more blocks (--blocks)."
    )


def _guessing(comparison: Comparison, guessing: float | None) -> str:
    if guessing is None or not comparison.measured or comparison.metric != LOSS:
        return ""
    best = comparison.best
    if best.metric.value < guessing:
        return ""
    return (
        f"The best loss ({best.metric.value:.3f}, {best.name}) is not below that of guessing each token by its "
        f"frequency in the held-out data ({guessing:.3f}). Are the data of this tokenizer, with the tokens in their "
        "order?"
    )


def _conspicuous(singles: Sequence[tuple[int, Measured]]) -> Iterable[str]:
    """Checkpoints that are far worse alone than those around them: windows that hold them suffer."""
    if len(singles) < FEWEST_NEIGHBOURS:
        return
    values = [one.badness for _, one in singles]
    for number, (step, one) in enumerate(singles):
        others = [*values[:number], *values[number + 1 :]]
        usual = statistics.median(abs(b - a) for a, b in pairwise(others))
        around = [*values[max(0, number - 2) : number], *values[number + 1 : number + 3]]
        middle = statistics.median(around)
        if values[number] - middle > max(OUTLIER * usual, 3 * (one.metric.error or 0.0)):
            yield (
                f"The checkpoint of step {step} alone is far worse than its neighbours ({abs(one.metric.value):.3f}, "
                f"they {abs(middle):.3f}). The training may have diverged there. Windows that hold it suffer from it; "
                "choose windows without it, by their end points (--to)."
            )


def _at_the_edge(comparison: Comparison, chosen: str | None) -> str:
    durations = sorted({one.duration for one in comparison.measured if one.kind == "merge"})
    one = next((one for one in comparison.measured if one.name == chosen), None)
    if one is None or one.kind != "merge" or len(durations) < 2 or one.duration != durations[-1]:
        return ""
    return f"The longest window that was tried, {one.name}, is the recommended one: longer ones may be better still."
