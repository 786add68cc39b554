"""A model inside DeepSpeed's inference engine is measured like the model itself."""

from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from made_models import llama_config, save_llama
from transformers import LlamaForCausalLM

from wsm_ds.evaluation.evaluation import Evaluation, Subject
from wsm_ds.evaluation.evaluators import make_evaluator

SUBJECT = Subject(name="model", kind="folder", identity="m", path="/m")


def make() -> torch.nn.Module:
    engine: torch.nn.Module = deepspeed.init_inference(LlamaForCausalLM(llama_config()), dtype=torch.float32)
    return engine


@pytest.mark.parametrize("kind", ["loss", "generate"])
def test_it_gives_the_same_figures(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "held.bin"
    data.write_bytes(np.random.default_rng(1).integers(0, 97, 300).astype("<u2").tobytes())
    options = {"sequence_length": 16} if kind == "loss" else {"prompt_tokens": 8, "most_tokens": 8}

    def measured(model: str | None) -> Evaluation:
        evaluator = make_evaluator({"kind": kind, "data": str(data), "model": model} | options)
        return evaluator.measure_folder(save_llama(tmp_path / "m"), SUBJECT)

    inside, plain = measured(f"{__file__}:make"), measured(None)
    assert inside.failure is None
    assert (inside.metrics, inside.blocks) == (plain.metrics, plain.blocks)
