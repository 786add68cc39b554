"""Random states of Python, numpy and torch come back exactly."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from lazy import torch

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.training.random_states import load_random_states, save_random_states, seed_random_states, states_file

Drawn = tuple[float, float, float, list[float], list[float]]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def draw() -> Drawn:
    """Of every source; `gauss` and `randn` keep a second value for the next call."""
    normal = float(np.random.randn()), random.gauss(0, 1)
    return random.random(), *normal, torch.rand(3).tolist(), torch.nn.functional.dropout(torch.ones(8)).tolist()


def test_what_is_drawn_after_loading_is_what_was_drawn_after_saving(tmp_path: Path) -> None:
    seed_random_states(1, 0, 0)
    draw()
    save_random_states(tmp_path, rank=3)
    expected = [draw(), draw()]
    assert load_random_states(tmp_path, rank=3)
    assert [draw(), draw()] == expected


def test_seed_step_and_rank_decide_the_states_of_a_rank_that_has_none(tmp_path: Path) -> None:
    assert not load_random_states(tmp_path, rank=0)
    drawn = []
    for seed, step, rank in [(1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 1), (1, 0, 0)]:
        seed_random_states(seed, step, rank)
        drawn.append(draw())
    assert drawn[0] == drawn[4]
    assert len({str(values) for values in drawn}) == 4


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    states_file(tmp_path, 0).write_text('{"python": 1}')
    with pytest.raises(BrokenCheckpoint, match=r"random_state_rank_00000.json holds no random states"):
        load_random_states(tmp_path, rank=0)
