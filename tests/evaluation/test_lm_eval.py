"""lm-eval's results are read as version 0.4.13 writes them; with it installed, it runs for real, without a network."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from made_models import save_llama
from made_tokenizers import save_byte_level

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.evaluation import Evaluation, Metric, Subject
from wsm_ds.evaluation.evaluator import MeasurementFailed
from wsm_ds.evaluation.lm_eval import LmEvalEvaluator, metrics_of

PROGRAM = os.environ.get("WSM_TEST_LM_EVAL", shutil.which("lm-eval"))
"""The program that the tests run; unset: the one that is installed."""
WRITTEN: dict[str, Any] = {
    "results": {
        "choose_local": {
            "name": "choose_local", "alias": "choose_local", "sample_len": 20, "acc,none": 0.25,
            "acc_stderr,none": 0.09933992677987828, "acc_norm,none": 0.3, "acc_norm_stderr,none": 0.1,
        },
        "text_local": {
            "name": "text_local", "alias": "text_local", "sample_len": 20, "word_perplexity,none": 633999042.7053705,
            "word_perplexity_stderr,none": "N/A", "bits_per_byte,none": 5.705347399238179,
            "bits_per_byte_stderr,none": "N/A",
        },
        "gsm": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.02, "exact_match,flexible": 0.6},
    },
    "groups": {"both": {"acc,none": 0.4, "acc_stderr,none": 0.01, "alias": "both"}},
    "higher_is_better": {
        "choose_local": {"acc": True, "acc_norm": True},
        "text_local": {"word_perplexity": False, "bits_per_byte": False},
        "gsm": {"exact_match": True}, "both": {"acc": True},
    },
    "versions": {"choose_local": 1.0}, "n-samples": {"choose_local": {"original": 20, "effective": 20}},
}  # fmt: skip
"""What `lm-eval run` wrote for a local task, shortened, with a group and a filter beside it."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_llama(tmp_path / "model", vocab_size=300)
    save_byte_level(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks of one's own, whose data lie beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"question": f"The window number {number}?", "choices": [" what", " the", " decides"], "answer": number % 3}
        for number in range(12)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    common |= {"test_split": "test", "metadata": {"version": 1.0}}
    choose = {"task": "choose_local", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    choose |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    text: dict[str, Any] = {"task": "text_local", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    text |= {"doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}]}
    for task in (choose | {"metric_list": [accuracy]}, text):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return folder


def measured(folder: Path, **values: Any) -> Evaluation:
    subject = Subject(name="model", kind="folder", identity="abcdefgh1", path=str(folder))
    return LmEvalEvaluator.model_validate(values).measure_folder(folder, subject)


def test_values_errors_and_directions_are_read() -> None:
    metrics = metrics_of(WRITTEN, Path("results.json"))
    assert metrics == {
        "both/acc": Metric(value=0.4, error=0.01, maximize=True),
        "choose_local/acc": Metric(value=0.25, error=0.09933992677987828, maximize=True),
        "choose_local/acc_norm": Metric(value=0.3, error=0.1, maximize=True),
        "text_local/word_perplexity": Metric(value=633999042.7053705),
        "text_local/bits_per_byte": Metric(value=5.705347399238179),
        "gsm/exact_match,strict-match": Metric(value=0.5, error=0.02, maximize=True),
        "gsm/exact_match,flexible": Metric(value=0.6, maximize=True),
    }


@pytest.mark.parametrize("written", [{}, {"results": []}, {"results": {}}, {"results": {"t": {"alias": "t"}}}, []])
def test_what_is_not_its_file_is_a_failure(written: Any) -> None:
    with pytest.raises(MeasurementFailed):
        metrics_of(written, Path("results.json"))


def stand_in(tmp_path: Path, code: str) -> str:
    """A program that does what a part of lm-eval does."""
    script = tmp_path / "stand_in.py"
    script.write_text(f"import sys, json, pathlib\nwords = sys.argv[1:]\n{code}")
    return f"{sys.executable} {script}"


def test_the_command_line_says_what_was_asked_for(tmp_path: Path, model: Path) -> None:
    code = (
        f"written = {WRITTEN!r}\nwritten['versions'] = dict(zip(words[1::2], words[2::2]))\n"
        "folder = pathlib.Path(words[words.index('--output_path') + 1], 'model')\nfolder.mkdir()\n"
        "(folder / 'results_2026-01-02T03-04-05.6.json').write_text(json.dumps(written))"
    )
    made = measured(
        model, tasks=["choose_local", "gsm"], limit=5, model_args="parallelize=True", program=stand_in(tmp_path, code)
    )
    assert made.failure is None
    words = made.evaluator["versions"]
    assert words["--model_args"] == f"pretrained={model.resolve()},dtype=bfloat16,parallelize=True"
    assert (words["--tasks"], words["--limit"], words["--batch_size"]) == ("choose_local,gsm", "5", "auto")
    assert made.metrics["score"].value == pytest.approx((0.25 + 0.5) / 2)
    assert made.metrics["score"].error == pytest.approx(((0.09933992677987828**2 + 0.02**2) ** 0.5) / 2)
    program = stand_in(tmp_path, code)
    chosen = measured(model, tasks=["gsm"], metric="gsm/exact_match,flexible", program=program)
    assert "score" not in chosen.metrics
    for values, words_of_failure in (
        ({"metric": "gsm/f1"}, "the metric gsm/f1 is not among those of lm-eval"),
        ({"tasks": ["gsm", "text_local"]}, "more is better for some alone"),
        ({"tasks": ["gsm", "other"]}, "lm-eval gives no metric of other"),
    ):
        failure = measured(model, **{"tasks": ["gsm"], "program": program, **values}).failure
        assert failure is not None
        assert words_of_failure in failure


def test_an_end_without_a_file_is_a_failure(tmp_path: Path, model: Path) -> None:
    failed = measured(model, tasks=["gsm"], program=stand_in(tmp_path, "print('saving failed')"))
    assert failed.failure == "lm-eval ended without an error, and wrote no results_*.json; see its stderr"


def test_what_it_needs_is_said_before_it_runs(tmp_path: Path, model: Path) -> None:
    with pytest.raises(EvaluationError, match="the program no-lm-eval is not found"):
        measured(model, tasks=["gsm"], program="no-lm-eval")
    program = stand_in(tmp_path, "")
    with pytest.raises(EvaluationError, match="is not a folder"):
        measured(model, tasks=["gsm"], program=program, include_path=str(tmp_path / "absent"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    failure = measured(model, tasks=["gsm"], program=program).failure
    assert failure is not None
    assert "has no tokenizer" in failure
    (model / "config.json").unlink()
    failure = measured(model, tasks=["gsm"], program=program).failure
    assert failure is not None
    assert "--include config.json" in failure


def test_a_changed_task_file_changes_the_identity(tasks: Path) -> None:
    evaluator = LmEvalEvaluator(tasks=("choose_local",), include_path=tasks)
    first = evaluator.identity()
    assert evaluator.model_copy(update={"batch_size": "4"}).identity() == first
    (tasks / "choose_local.yaml").write_text((tasks / "choose_local.yaml").read_text() + " ")
    assert evaluator.identity() != first


@pytest.mark.skipif(PROGRAM is None, reason="lm-eval is not installed")
def test_it_runs_for_real_on_local_tasks(
    tmp_path: Path, model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    options = {"program": PROGRAM, "include_path": str(tasks), "device": "cpu", "batch_size": "4", "dtype": "fp32"}
    made = measured(
        model, tasks=["choose_local", "text_local"], metric="choose_local/acc", keep=str(tmp_path), **options
    )
    assert made.failure is None
    accuracy, bits = made.metrics["choose_local/acc"], made.metrics["text_local/bits_per_byte"]
    assert (accuracy.maximize, bits.maximize) == (True, False)
    assert round(12 * accuracy.value) in range(13)
    assert accuracy.error is not None
    assert 4 < bits.value < 12
    assert made.evaluator["n-samples"]["choose_local"]["effective"] == 12
    (kept,) = tmp_path.glob("model-abcdefgh-*")
    assert list(kept.rglob("samples_choose_local_*.jsonl"))
    failed = measured(model, tasks=["no_such_task"], **options)
    assert failed.failure is not None
