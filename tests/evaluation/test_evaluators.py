"""Evaluators from YAML; a wrong key or value is named with what is expected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsm_ds.errors import RecipeError
from wsm_ds.evaluation.commands import CommandEvaluator
from wsm_ds.evaluation.evaluators import load_evaluators, make_evaluator
from wsm_ds.evaluation.loss import LossEvaluator


def test_a_file_holds_one_evaluator_or_several(tmp_path: Path) -> None:
    data = tmp_path / "held.bin"
    data.write_bytes(np.arange(100, 200).astype("<u2").tobytes())
    file = tmp_path / "evaluators.yaml"
    file.write_text(f"kind: loss\ndata: web={data}@2\nsequence_length: 8\n")
    (loss,) = load_evaluators(file)
    assert isinstance(loss, LossEvaluator)
    assert loss.weights == {"web": 2.0}
    file.write_text(f"- kind: loss\n  data: [{data}]\n- kind: command\n  command: echo 1\n  maximize: true\n")
    first, second = load_evaluators(file)
    assert isinstance(first, LossEvaluator)
    assert isinstance(second, CommandEvaluator)
    assert second.maximize


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "los"}, r"the `kind` of an evaluator is loss, generate, command, lm-eval, not 'los' \(did you mean"),
        ({}, "not None"),
        ({"kind": "loss"}, "`data` is missing"),
        ({"kind": "loss", "data": []}, "`data`: .*at least 1 item"),
        ({"kind": "loss", "data": "a.bin", "seq": 5}, "has no key 'seq'.*sequence_length"),
        ({"kind": "loss", "data": "a.bin", "blocks": 0}, "`blocks` must be at least 1, not 0"),
        ({"kind": "loss", "data": "a.bin", "dtype": "int8"}, "`dtype` must be bf16, fp16 or fp32, not 'int8'"),
        ({"kind": "lm-eval", "tasks": []}, "`tasks`"),
        ({"kind": "command"}, "`command` is missing"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_evaluator(values)


@pytest.mark.parametrize("text", ["", "[]", "3", "- 3", "- kind: loss\n- kind: loss"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "evaluators.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"evaluators.yaml"):
        load_evaluators(file)
