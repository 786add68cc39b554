"""A tuning of a real run of HF Trainer with a Llama, from the training to the merged model and its report."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed_runs import launch
from lazy import torch
from tuned import LENGTH, VOCABULARY, write_tokens

from wsm_ds.cli import main
from wsm_ds.evaluation.records import Records
from wsm_ds.tuning.results import TuningResult
from wsm_ds.tuning.tune import read_result

LM_EVAL = os.environ.get("WSM_TEST_LM_EVAL", shutil.which("lm-eval"))
"""The program that the tests run; unset: the one that is installed."""
CHECKPOINTS = [f"checkpoint-{step}" for step in range(4, 41, 4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten checkpoints from two ranks, the last eight behind the warmup. The rate is so high that merges are better."""
    folder = tmp_path_factory.mktemp("llama")
    tokens = np.load(write_tokens(folder / "tokens.npy", seed=11, blocks=400))
    np.save(folder / "rows.npy", tokens.reshape(400, LENGTH + 1))
    job = {"do": "trainer", "stage": 2, "tied": True, "steps": 40, "every": 4, "rate": 0.05}
    job |= {"data": str(folder / "rows.npy"), "run": str(folder / "run")}
    launch([job], world_size=2, folder=folder, worker="trainer_worker.py")
    assert sorted(path.name for path in (folder / "run").iterdir()) == sorted(CHECKPOINTS)
    return folder / "run"


def command_line(run: Path, data: Path, out: Path, *more: str) -> list[str]:
    words = ["tune", str(run), "--windows", "2,4,8", "--data", str(data), "--sequence-length", str(LENGTH)]
    return [*words, "--model", str(run / CHECKPOINTS[-1]), "--out", str(out), *more]


def tuned(*words: Any) -> TuningResult:
    assert main(command_line(*words)) == 0
    result = read_result(words[2])
    assert result is not None
    assert result.recommendation is not None
    return result


def warnings_in(result: TuningResult) -> str:
    assert result.recommendation is not None
    return " ".join(result.recommendation.warnings)


def test_what_the_tuning_recommends_is_what_the_merge_has(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, second = (
        write_tokens(tmp_path / f"{name}.npy", seed=seed) for name, seed in (("held", 5), ("second", 6))
    )
    out, merged = tmp_path / "tune", tmp_path / "merged"
    result = tuned(run, held_out, out, "--confirm", str(second))
    chosen = next(one for one in result.candidates if result.recommendation and one.name == result.recommendation.name)
    assert chosen.kind == "merge"
    assert len(result.candidates) == 11
    assert result.recommendation is not None
    assert result.recommendation.confirmed is not None
    assert result.recommendation.confirmed_raw is not None
    assert result.recommendation.confirmed.value < result.recommendation.confirmed_raw.value
    assert chosen.name in (out / "report.md").read_text()
    assert chosen.name in (out / "report.html").read_text()

    recipe = ["merge", str(run), "--recipe", str(out / "best.yaml"), "--format", "safetensors", "--out", str(merged)]
    assert main(recipe) == 0
    measure = ["evaluate", str(merged), "--sequence-length", str(LENGTH), "--out", str(tmp_path / "evaluations.jsonl")]
    for data, metric in ((held_out, chosen.metrics["loss"]), (second, result.recommendation.confirmed)):
        assert main([*measure, "--data", str(data)]) == 0
        made = Records(tmp_path / "evaluations.jsonl").all()[-1]
        assert made.metrics["loss"] == metric
        recorded = [
            one.blocks
            for one in Records(out / "evaluations.jsonl").all()
            if one.subject.name == chosen.name and one.evaluator["identity"] == made.evaluator["identity"]
        ]
        assert recorded == [made.blocks]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    blocks = torch.from_numpy(np.load(held_out).astype(np.int64)).unfold(0, LENGTH + 1, LENGTH)
    with torch.no_grad():
        logits = model(blocks[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), blocks[:, 1:].flatten()).item()
    assert loss == pytest.approx(chosen.metrics["loss"].value, abs=1e-6)
    capsys.readouterr()


def test_data_that_mislead_are_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.load(write_tokens(tmp_path / "held.npy", seed=5))
    order = np.random.default_rng(2)
    for name, misleading in (
        ("shuffled", order.permutation(tokens)),
        ("other-tokenizer", order.permutation(VOCABULARY)[tokens].astype(np.uint16)),
    ):
        np.save(tmp_path / f"{name}.npy", misleading)
        result = tuned(run, tmp_path / f"{name}.npy", tmp_path / name)
        assert "is not below that of guessing each token" in warnings_in(result), name
    np.save(tmp_path / "few.npy", tokens[: 10 * LENGTH + 1])
    result = tuned(run, tmp_path / "few.npy", tmp_path / "few")
    assert "only 10 blocks" in warnings_in(result)
    assert "guessing" not in warnings_in(result)
    np.save(tmp_path / "beyond.npy", tokens + 1)
    assert main(command_line(run, tmp_path / "beyond.npy", tmp_path / "beyond")) != 0
    assert "hold token 13, and the model knows 13 tokens" in capsys.readouterr().err
    assert not (tmp_path / "beyond").exists()


def write_task(folder: Path, tokens: list[int]) -> Path:
    """A task of lm-eval's: the word that follows, among three that may."""
    folder.mkdir()
    starts = range(0, 24 * LENGTH, LENGTH)
    questions = [
        {
            "question": " ".join(f"t{token}" for token in tokens[start : start + 8]),
            "choices": [f"t{(tokens[start + 7] + step) % VOCABULARY}" for step in (1, 2, 5)],
            "answer": [1, 2, 5].index((tokens[start + 8] - tokens[start + 7]) % VOCABULARY),
        }
        for start in starts
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task: dict[str, Any] = {"task": "next_local", "dataset_path": "json", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}, "metadata": {"version": 1.0}}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    task |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc", "higher_is_better": True}]}
    (folder / "next_local.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not installed")
def test_lm_eval_measures_the_finalists(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(str(LM_EVAL)).parent), prepend=os.pathsep)
    held_out = write_tokens(tmp_path / "held.npy", seed=5)
    tasks = write_task(tmp_path / "tasks", np.load(held_out).tolist())
    final = ("--final", "lm-eval:next_local", "--include-path", str(tasks), "--finalists", "1")
    result = tuned(run, held_out, tmp_path / "tune", *final)
    assert (result.metric, result.maximize) == ("score", True)
    finalists = {one.name: one.metrics for one in result.candidates if one.stage == 2}
    assert len(finalists) == 2
    for metrics in finalists.values():
        assert round(24 * metrics["next_local/acc"].value, 6) in range(25)
        assert metrics["score"].value == metrics["next_local/acc"].value > 0.4
        assert metrics["score"].error is not None
    assert result.data == "lm-eval: next_local"
    assert result.recommendation is not None
    if result.recommendation.name == "step40":
        assert "By loss, last" in warnings_in(result)
    assert [path.name for path in (tmp_path / "tune/models").iterdir()] == [result.recommendation.name]
    assert (tmp_path / "tune/models" / str(result.recommendation.name) / "tokenizer.json").is_file()
    assert "next_local" in (tmp_path / "tune/report.md").read_text()
    capsys.readouterr()
