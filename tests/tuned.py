"""Held-out tokens for tunings, and the evaluator that measures on them."""

from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, LENGTH, BLOCKS = 13, 16, 60


def write_tokens(path: Path, seed: int = 0, blocks: int = BLOCKS) -> Path:
    """Tokens that follow each other more often than chance."""
    random = np.random.default_rng(seed)
    steps = random.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=blocks * (LENGTH + 1))
    np.save(path, (np.cumsum(steps) % VOCABULARY).astype(np.uint16))
    return path


def loss_of(path: Path, **values: Any) -> Any:
    """The evaluator that measures the loss on a file of tokens."""
    from wsm_ds.evaluation.held_out import DataSource
    from wsm_ds.evaluation.loss import LossEvaluator

    return LossEvaluator(
        data=(DataSource(name=path.stem, path=path),),
        sequence_length=LENGTH,
        blocks=BLOCKS,
        vocabulary=VOCABULARY,
        model="ds_models:TinyModel",
        **values,
    )
