"""What is taken for a count of samples or tokens in a model file, and what is not."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazy import torch

from wsm_ds.layouts.saved_counts import SavedCounts, counts_of
from wsm_ds.torchfile import open_torch_file


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, SavedCounts(7)),
        ({"global_samples": 28}, SavedCounts(7, 28)),
        ({"global_samples": 28, "consumed_train_samples": np.int32(40)}, SavedCounts(7, 40)),
        ({"args": argparse.Namespace(consumed_train_samples=np.int64(2**40), seq_length=np.uint32(5))},
         SavedCounts(7, 2**40, None, 5)),
        ({"args": {"consumed_train_tokens": 90, "seq_length": 3}}, SavedCounts(7, None, 90, 3)),  # GPT-NeoX
        ({"tokens": 48, "checkpoint_version": 3.0}, SavedCounts(7, None, 48)),
        ({"tokens": 48}, SavedCounts(7)),  # anybody's
        ({"wsm_training": {"seed": 1, "context": 64}, "global_samples": 2}, SavedCounts(7, 2, None, 64)),
        ({"wsm_training": {"sequence_length": 32}, "seq_len": 16}, SavedCounts(7, None, None, 16)),
        ({"global_samples": True, "consumed_train_samples": -1, "seq_len": 0, "args": "none"}, SavedCounts(7)),
        ({"global_samples": 2.5, "consumed_train_tokens": np.float64(3), "args": None}, SavedCounts(7)),
    ],
)  # fmt: skip
def test_counts_of_a_file(tmp_path: Path, state: dict[str, Any], expected: SavedCounts) -> None:
    torch.save({"global_steps": 7, **state}, tmp_path / "model.pt")
    assert counts_of(open_torch_file(tmp_path / "model.pt").tree) == expected
