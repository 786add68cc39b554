"""Continuations are greedy, their health is counted as documented, and a text that loops is found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_models import VOCABULARY, OwnLoss, llama, save_llama

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.evaluation import Subject
from wsm_ds.evaluation.generation import GenerateEvaluator, continued, health, is_looping

SUBJECT = Subject(name="model", kind="folder", identity="m", path="/m")


class NextToken(torch.nn.Module):
    """Follows each token by the next one, and the last by `back`."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(VOCABULARY).roll(1, dims=1))
        with torch.no_grad():
            self.table[-1] = torch.eye(VOCABULARY)[back]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "held.bin"
    path.write_bytes(np.random.default_rng(3).integers(0, VOCABULARY, 400).astype("<u2").tobytes())
    return path


def evaluator_of(data: Path, **options: Any) -> GenerateEvaluator:
    defaults = {"data": str(data), "prompts": 10, "prompt_tokens": 8, "most_tokens": 40}
    return GenerateEvaluator.model_validate(defaults | options)


def test_continuations_are_those_of_the_library(data: Path) -> None:
    model = llama()
    prompts = evaluator_of(data).held_out().tokens[:, :8]
    expected = model.generate(
        torch.from_numpy(prompts), attention_mask=torch.ones(10, 8), do_sample=False, max_new_tokens=40, eos_token_id=2,
        pad_token_id=2,
    )[:, 8:].tolist()  # fmt: skip
    made = continued(model, prompts, 40, frozenset([2]))
    assert made == [row[: row.index(2) + 1] if 2 in row else row for row in expected]


def test_a_loop_a_limit_and_an_end_are_told_apart(data: Path) -> None:
    looping = evaluator_of(data, most_tokens=200).measure(NextToken(back=90), SUBJECT)
    assert looping.failure is None
    assert looping.metrics["looping"].value == 1  # 90 … 96 again and again
    assert looping.metrics["at_limit"].value == 1
    assert looping.metrics["repeated_4grams"].value > 0.4
    ended = evaluator_of(data, most_tokens=200, end_tokens=(50,)).measure(NextToken(back=0), SUBJECT)
    assert ended.metrics["looping"].value == 0
    assert ended.metrics["at_limit"].value == 0
    lengths = sorted((50 - int(row[7])) % VOCABULARY or VOCABULARY for row in evaluator_of(data).held_out().tokens)
    assert ended.metrics["median_length"].value == (lengths[4] + lengths[5]) / 2
    assert not looping.metrics["looping"].maximize


def test_batches_and_a_folder_change_nothing(tmp_path: Path, data: Path) -> None:
    first = evaluator_of(data).measure(llama(), SUBJECT)
    assert first.failure is None
    for batch_size in (1, 3):
        assert evaluator_of(data, batch_size=batch_size).measure(llama(), SUBJECT).metrics == first.metrics
    assert evaluator_of(data).measure_folder(save_llama(tmp_path / "m"), SUBJECT).metrics == first.metrics


def test_the_end_tokens_come_from_the_config(data: Path) -> None:
    ends = [evaluator_of(data, **options).measure(llama(eos_token_id=[7, 9]), SUBJECT).metrics
            for options in ({}, {"end_tokens": (7, 9)}, {"end_tokens": ()})]  # fmt: skip
    assert ends[0] == ends[1]
    assert ends[2]["at_limit"].value == 1


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_three_copies_of_anything_are_a_loop(start: list[int], copied: list[int]) -> None:
    copies = max(3, -(-24 // len(copied)))
    assert is_looping(start + copied * copies)


def test_text_without_copies_is_no_loop() -> None:
    assert not is_looping([])
    assert not is_looping([1] * 23)
    assert not is_looping([*[1] * 40, 2])
    metrics = health([[1] * 30, [1, 2, 3]], 30)
    assert (metrics["looping"].value, metrics["at_limit"].value, metrics["median_length"].value) == (0.5, 0.5, 16.5)


def test_models_that_cannot_continue_are_refused_or_fail(data: Path) -> None:
    with pytest.raises(EvaluationError, match="are together longer than the 20 positions"):
        evaluator_of(data).measure(llama(max_position_embeddings=20), SUBJECT)
    failed = evaluator_of(data).measure(OwnLoss(), SUBJECT)
    assert failed.failure is not None
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    assert evaluator_of(data).measure(broken, SUBJECT).failure == "a logit is not a finite number"
