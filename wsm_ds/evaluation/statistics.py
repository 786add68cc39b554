"""Means, and their standard errors, from the losses of blocks.

A held-out set is a sample of blocks from each of its sources. Source s has the weight W_s, and its mean is that of its
tokens, R_s = Σ nats / Σ tokens. The loss is Σ W_s R_s. The error of R_s comes from how much its B blocks differ:

    e_s² = B / (B − 1) · Σ_b (nats_b − R_s tokens_b)² / (Σ_b tokens_b)²

which is sd(x) / √B where all blocks have the same number of tokens and x_b = nats_b / tokens_b. The errors of sources
add up as (Σ W_s² e_s²)^½. Sums are exact (`math.fsum`), so the order of the blocks changes no bit.

Two models on the same blocks are compared by their differences, block by block, with the same formulas: most of what
makes blocks differ is the text, which both share.
"""

import math
from collections.abc import Mapping, Sequence

from wsm_ds.errors import RecipeError
from wsm_ds.evaluation.evaluation import Blocks, Metric

LOSS, BITS_PER_BYTE = "loss", "bits_per_byte"
NATS_PER_TOKEN, BITS = "nats/token", "bits/byte"


def loss_metrics(blocks: Blocks, weights: Mapping[str, float] | None = None) -> dict[str, Metric]:
    """The metrics that the losses of blocks give: "loss" and "bits_per_byte", and "loss/SOURCE" for each of several.

    Args:
        blocks: of one model; all values finite.
        weights: of the sources, by name; None: their numbers of tokens.
    """
    metrics = {LOSS: weighted(blocks, blocks.nats, blocks.tokens, weights, NATS_PER_TOKEN)}
    bits = [nats / math.log(2) for nats in blocks.nats]
    if blocks.nbytes is not None:
        metrics[BITS_PER_BYTE] = weighted(blocks, bits, blocks.nbytes, weights, BITS)
    for number, name in enumerate(blocks.sources if len(blocks.sources) > 1 else ()):
        of_source = [block for block, source in enumerate(blocks.source) if source == number]
        metrics[f"{LOSS}/{name}"] = _mean(blocks.nats, blocks.tokens, of_source, NATS_PER_TOKEN)
        if blocks.nbytes is not None:
            metrics[f"{BITS_PER_BYTE}/{name}"] = _mean(bits, blocks.nbytes, of_source, BITS)
    return metrics


def paired_difference(first: Blocks, second: Blocks, weights: Mapping[str, float] | None = None) -> Metric:
    """How much larger the loss of the first model is than that of the second, on the same blocks.

    Args:
        first: the losses of one model.
        second: the losses of the other one.
        weights: of the sources, by name; None: their numbers of tokens.

    Returns:
        The difference in nats a token, and its paired standard error.

    Raises:
        RecipeError: the blocks are not the same.
    """
    if (first.sources, first.source, first.tokens) != (second.sources, second.source, second.tokens):
        raise RecipeError("the losses of two models can be compared only on the same blocks of the same held-out data.")
    differences = [one - other for one, other in zip(first.nats, second.nats, strict=True)]
    return weighted(first, differences, first.tokens, weights, NATS_PER_TOKEN)


def weighted(
    blocks: Blocks, values: Sequence[float], counts: Sequence[int], weights: Mapping[str, float] | None, unit: str
) -> Metric:
    """The mean of all sources, weighted, with its error.

    Args:
        blocks: says of which source each block is.
        values: sums over the blocks.
        counts: of what each sum is over.
        weights: of the sources, by name; None: their counts.
        unit: of the mean.
    """
    groups: dict[int, list[int]] = {}
    for block, source in enumerate(blocks.source):
        groups.setdefault(source, []).append(block)
    shares = {
        source: float(sum(counts[block] for block in group)) if weights is None else weights[blocks.sources[source]]
        for source, group in groups.items()
    }
    total = math.fsum(shares.values())
    means = [(shares[source] / total, _mean(values, counts, group, unit)) for source, group in groups.items()]
    errors = [(share * mean.error) ** 2 for share, mean in means if mean.error is not None]
    error = math.sqrt(math.fsum(errors)) if len(errors) == len(means) else None
    return Metric(value=math.fsum(share * mean.value for share, mean in means), error=error, unit=unit)


def _mean(values: Sequence[float], counts: Sequence[int], group: Sequence[int], unit: str) -> Metric:
    """Σ values / Σ counts of some blocks, with its error; a single block tells no error."""
    total = sum(counts[block] for block in group)
    if total == 0:  # bytes, where a source holds special tokens alone
        return Metric(value=0.0, unit=unit)
    mean = math.fsum(values[block] for block in group) / total
    if len(group) < 2:
        return Metric(value=mean, unit=unit)
    squares = math.fsum((values[block] - mean * counts[block]) ** 2 for block in group)
    return Metric(value=mean, error=math.sqrt(squares * len(group) / (len(group) - 1)) / total, unit=unit)
