"""The loss of a held-out set equals a literal reference, to the last bit on any number of ranks and in any batches."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import free_port
from made_models import VOCABULARY, OwnLoss, llama, save_llama

from wsm_ds.errors import EvaluationError, RecipeError
from wsm_ds.evaluation.evaluation import Evaluation, Subject
from wsm_ds.evaluation.held_out import DataSource
from wsm_ds.evaluation.loss import (
    BYTES_PER_ACTIVATION,
    BYTES_PER_LOGIT,
    DEVICE_SHARE,
    LossEvaluator,
    batch_rows,
)

SUBJECT = Subject(name="model", kind="folder", identity="m", path="/m")
ON_RANKS = """
import json, sys
from wsm_ds.distributed.launcher import launched_ranks
from wsm_ds.evaluation.evaluation import Subject
from wsm_ds.evaluation.loss import LossEvaluator
from made_models import llama
evaluator = LossEvaluator.model_validate_json(sys.argv[1])
ranks = launched_ranks()
with ranks.together():
    print(evaluator.measure(llama(), Subject.model_validate_json(sys.argv[2]), ranks).model_dump_json())
"""


@pytest.fixture
def data(tmp_path: Path) -> tuple[DataSource, ...]:
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, 1000).astype("<u2")
    for name, part in (("web", tokens[:600]), ("code", tokens[600:])):
        (tmp_path / f"{name}.bin").write_bytes(part.tobytes())
    return tuple(DataSource(name=name, path=tmp_path / f"{name}.bin") for name in ("web", "code"))


def evaluator_of(data: tuple[DataSource, ...], **options: Any) -> LossEvaluator:
    return LossEvaluator(data=data, **({"sequence_length": 32, "blocks": 11} | options))


def nats_of(evaluation: Evaluation) -> tuple[float, ...]:
    assert evaluation.failure is None
    assert evaluation.blocks is not None
    return evaluation.blocks.nats


def test_it_equals_a_literal_reference(data: tuple[DataSource, ...]) -> None:
    model, evaluator = llama(), evaluator_of(data)
    evaluation = evaluator.measure(model, SUBJECT)
    tokens = evaluator.held_out().tokens
    assert tokens.shape == (22, 33)
    expected = []
    for row in torch.from_numpy(tokens):
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=row[None, :-1]).logits[0].double(), dim=-1)
        expected.append(-math.fsum(log_p[i, token].item() for i, token in enumerate(row[1:].tolist())))
    assert nats_of(evaluation) == pytest.approx(expected, rel=1e-6)
    assert evaluation.metrics["loss"].value == pytest.approx(sum(expected) / (22 * 32), rel=1e-6)
    assert set(evaluation.metrics) == {"loss", "loss/web", "loss/code"}
    assert evaluation.evaluator["identity"] == evaluator.identity()
    assert evaluation.evaluator["tokens"] == 22 * 32
    assert {"wsm_ds", "torch", "transformers"} <= set(evaluation.versions)
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batches_change_no_bit(data: tuple[DataSource, ...], dtype: str) -> None:
    model = llama(dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    alone = evaluator_of(data, batch_size=1, dtype=dtype).measure(model, SUBJECT)
    for batch_size in (2, 5, 22, None):
        evaluator = evaluator_of(data, batch_size=batch_size, dtype=dtype)
        together = evaluator.measure(model, SUBJECT)
        assert nats_of(together) == nats_of(alone)
        assert together.metrics == alone.metrics
        assert together.evaluator["identity"] == alone.evaluator["identity"]


def test_ranks_change_no_bit(data: tuple[DataSource, ...]) -> None:
    evaluator = evaluator_of(data, batch_size=4)
    alone = evaluator.measure(llama(), SUBJECT)
    for world_size in (3,):
        meeting = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", ON_RANKS, evaluator.model_dump_json(), SUBJECT.model_dump_json()]
        ranks = [
            subprocess.Popen(command, env=os.environ | meeting | paths | {"RANK": str(rank)}, stdout=subprocess.PIPE)
            for rank in range(world_size)
        ]
        for process in ranks:
            made = Evaluation.model_validate(json.loads(process.communicate(timeout=200)[0]))
            assert process.returncode == 0
            assert (made.blocks, made.metrics) == (alone.blocks, alone.metrics)


@pytest.mark.parametrize("form", ["tokens", "rows", "one"])
def test_a_models_own_losses_may_have_any_of_three_forms(data: tuple[DataSource, ...], form: str) -> None:
    reference = OwnLoss("tokens")
    tokens = evaluator_of(data).held_out().tokens
    with torch.no_grad():
        expected = reference.loss(torch.from_numpy(tokens)).double().sum(1).tolist()
    model = OwnLoss(form)
    model.train()
    made = evaluator_of(data, batch_size=8).measure(model, SUBJECT)
    assert nats_of(made) == pytest.approx(expected, rel=1e-6)
    assert model.training
    assert model.logits.grad is None
    if form == "one":  # one call for each block, and one that showed that it gives a single number
        assert model.calls == 22 + 1


def test_a_folder_is_measured_as_its_model_in_memory(tmp_path: Path, data: tuple[DataSource, ...]) -> None:
    evaluator = evaluator_of(data)
    folder = save_llama(tmp_path / "m")
    assert nats_of(evaluator.measure_folder(folder, SUBJECT)) == nats_of(evaluator.measure(llama(), SUBJECT))


def test_what_decides_the_figures_decides_the_identity(data: tuple[DataSource, ...]) -> None:
    identity = evaluator_of(data).identity()
    same: list[dict[str, Any]] = [{"batch_size": 3}, {"model": "m"}, {"vocabulary": 97}]
    others: list[dict[str, Any]] = [
        {"sequence_length": 16}, {"blocks": 5}, {"dtype": "bf16"}, {"data": data[:1]}, {"data": data[::-1]},
        {"data": tuple(source.model_copy(update={"weight": 2.0}) for source in data)},
    ]  # fmt: skip
    assert {evaluator_of(**({"data": data} | changes)).identity() for changes in same} == {identity}
    assert len({identity, *(evaluator_of(**({"data": data} | changes)).identity() for changes in others)}) == 7


def test_weights_are_given_to_all_sources_or_to_none(data: tuple[DataSource, ...]) -> None:
    halves = (data[0].model_copy(update={"weight": 3.0}), data[1])
    with pytest.raises(RecipeError, match="--data: code has no weight"):
        evaluator_of(halves).identity()
    weighted = tuple(source.model_copy(update={"weight": 1.0}) for source in data)
    made = evaluator_of(weighted).measure(llama(), SUBJECT).metrics
    assert made["loss"].value == pytest.approx((made["loss/web"].value + made["loss/code"].value) / 2)


def test_a_loss_that_is_not_finite_fails_that_model_alone(data: tuple[DataSource, ...]) -> None:
    model, evaluator = llama(), evaluator_of(data)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = math.nan
    failed = evaluator.measure(model, SUBJECT)
    assert failed.failure is not None
    assert "the loss is not a finite number in" in failed.failure
    assert (failed.metrics, failed.blocks) == ({}, None)
    assert Evaluation.model_validate_json(failed.model_dump_json()) == failed
    assert evaluator.measure(llama(), SUBJECT).failure is None


def test_an_error_of_the_model_is_its_failure(data: tuple[DataSource, ...]) -> None:
    class Broken(OwnLoss):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this device")

    failure = evaluator_of(data).measure(Broken(), SUBJECT).failure
    assert failure == "RuntimeError: no kernel for this device (in blocks of `sequence_length` 32)"


def test_what_does_not_fit_is_refused_before_anything_is_measured(data: tuple[DataSource, ...]) -> None:
    with pytest.raises(EvaluationError, match="hold token 96, and the model knows 50 tokens"):
        evaluator_of(data).measure(llama(vocab_size=50), SUBJECT)
    with pytest.raises(EvaluationError, match="hold token 96, and the model knows 60 tokens"):
        evaluator_of(data, vocabulary=60).measure(OwnLoss(), SUBJECT)
    with pytest.raises(EvaluationError, match="`sequence_length` 32 is longer than the 16 positions"):
        evaluator_of(data).measure(llama(max_position_embeddings=16), SUBJECT)
    with pytest.raises(RecipeError, match=r"most parameters of the model are torch.bfloat16, not fp32"):
        evaluator_of(data).measure(llama(dtype=torch.bfloat16), SUBJECT)
    with pytest.raises(EvaluationError, match=r"loss\(batch\) returns the shape \[2, 1\]"):
        evaluator_of(data, batch_size=2).measure(OwnLoss("wrong"), SUBJECT)
    with pytest.raises(EvaluationError, match=r"the model returns .*Give it a method loss"):
        evaluator_of(data).measure(torch.nn.Embedding(97, 97).requires_grad_(False).apply(_flatten), SUBJECT)


def _flatten(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output.mean())


def test_a_model_with_a_config_of_its_own_may_take_tokens_alone(data: tuple[DataSource, ...]) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"layers": 1}
            self.table = OwnLoss().logits

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.table[tokens]

    assert nats_of(evaluator_of(data).measure(Plain(), SUBJECT)) == nats_of(
        evaluator_of(data).measure(OwnLoss(), SUBJECT)
    )


def test_a_batch_that_the_memory_does_not_hold_is_halved(data: tuple[DataSource, ...]) -> None:
    class Small(OwnLoss):
        room = 2

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            if len(batch) > self.room:
                raise torch.OutOfMemoryError("no room")
            return super().loss(batch)

    small, none = Small(), Small()
    none.room = 0
    evaluator = evaluator_of(data, batch_size=16)
    assert nats_of(evaluator.measure(small, SUBJECT)) == nats_of(evaluator.measure(OwnLoss(), SUBJECT))
    failure = evaluator.measure(none, SUBJECT).failure
    assert failure == f"OutOfMemoryError: no room (in blocks of `sequence_length` {evaluator.sequence_length})"


def test_a_batch_is_as_large_as_the_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, model = torch.device("cpu"), torch.device("cuda", 0), llama()
    assert [batch_rows(model, cpu, length) for length in (16, 1000, 2048, 5000)] == [128, 2, 1, 1]
    memory = types.SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    per_token = BYTES_PER_LOGIT * VOCABULARY + BYTES_PER_ACTIVATION * 32
    for room, rows in ((0, 1), (7, 1), (64, 8), (100, 8), (1 << 30, 4096)):
        memory.total_memory = weights + int(room * 8 * per_token / 8 / DEVICE_SHARE) + 1
        assert batch_rows(model, gpu, 8) == rows, room
