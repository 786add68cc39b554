"""The files of a report: where they come from, where they go, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
from made_results import evaluation, made_tuning

from wsm_ds import write_report
from wsm_ds.cli import main
from wsm_ds.errors import EvaluationError, OutputExists, RecipeError, VerificationFailed
from wsm_ds.evaluation.evaluation import Evaluation, Metric
from wsm_ds.reporting.report.inputs import read_tuning

RAW = evaluation("step400", [33.0, 35.0], kind="checkpoint", steps=(400,))
MERGED = evaluation("last2", [30.0, 33.0], steps=(300, 400))


def records(folder: Path, *evaluations: Evaluation) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "evaluations.jsonl"
    file.write_text("".join(f"{one.model_dump_json()}\n" for one in evaluations))
    return file


def tuning(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tuning.json").write_text(made_tuning().model_dump_json())
    return folder


def test_a_tuning_is_reported_in_its_own_folder_and_the_json_is_what_was_read(tmp_path: Path) -> None:
    folder = tuning(tmp_path / "tune")
    files = write_report(folder)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "report.html", "report.json", "report.md", "tuning.json",
    ]  # fmt: skip
    assert read_tuning(files.json) == made_tuning()
    assert "wsm-ds merge" not in files.html.read_text()


def test_the_recipe_of_a_tuning_becomes_a_command(tmp_path: Path) -> None:
    folder = tuning(tmp_path / "tu ne")
    (folder / "best.yaml").write_text("run: /data/run\n")
    files = write_report(folder)
    assert f"wsm-ds merge /data/run --recipe '{folder}/best.yaml' --out MERGED" in files.markdown.read_text()


def test_evaluations_are_reported_and_an_older_report_is_replaced(tmp_path: Path) -> None:
    records(tmp_path, RAW)
    first = write_report(tmp_path).html.read_text()
    records(tmp_path, RAW, MERGED)
    files = write_report(tmp_path)
    assert "last2" not in first
    assert "last2" in files.html.read_text()
    assert [candidate.name for candidate in files.result.candidates] == ["step400", "last2"]


def test_a_report_goes_elsewhere_and_the_run_stays_as_it_is(tmp_path: Path) -> None:
    file = records(tmp_path / "run", RAW, MERGED)
    (tmp_path / "run").chmod(0o555)
    try:
        write_report(tmp_path / "run", out=tmp_path / "new" / "out")
    finally:
        (tmp_path / "run").chmod(0o755)
    assert list((tmp_path / "run").iterdir()) == [file]
    assert (tmp_path / "new" / "out" / "report.html").is_file()


def test_several_files_of_evaluations_are_one_report(tmp_path: Path) -> None:
    files = [records(tmp_path / "a", RAW), records(tmp_path / "b", MERGED)]
    result = write_report(tmp_path, evaluations=files, tokens_per_step=10).result
    assert [c.end.tokens for c in result.candidates if c.end] == [4000.0, 4000.0]


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    file = records(tmp_path, RAW)
    file.write_text(file.read_text() + MERGED.model_dump_json()[:100])
    assert len(write_report(tmp_path).result.candidates) == 1


def test_a_line_that_is_no_evaluation_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = records(tmp_path, RAW)
    file.write_text(file.read_text() + '{"subject": 1}\n' + MERGED.model_dump_json() + "\n")
    with caplog.at_level(logging.WARNING):
        assert len(write_report(tmp_path).result.candidates) == 2
    assert "holds a line that is no evaluation" in caplog.text


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text("step,loss\n1,2\n")
    with pytest.raises(EvaluationError, match="is not a file of evaluations"):
        write_report(tmp_path)
    with pytest.raises(RecipeError, match=r"`evaluations`: .*none.jsonl: no such file"):
        write_report(tmp_path, evaluations=[tmp_path / "none.jsonl"])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ["{", '{"version": 1}', '{"version": 7, "run": "a", "metric": "b"}', ""])
def test_a_damaged_tuning_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(VerificationFailed, match=r"tuning.json is not what a tuning writes: "):
        write_report(tmp_path)


def test_values_that_are_no_numbers_become_failures(tmp_path: Path) -> None:
    result = made_tuning()
    broken = result.candidates[0].model_copy(update={"metrics": {"loss": Metric(value=float("nan"))}})
    text = json.dumps(result.model_copy(update={"candidates": (broken, *result.candidates[1:])}).model_dump())
    (tmp_path / "tuning.json").write_text(text)
    files = write_report(tmp_path)
    assert files.result.candidates[0].failure == "loss is nan"
    assert read_tuning(files.json) == files.result
    assert "loss is nan" in files.markdown.read_text()


def test_a_folder_without_measurements_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds neither tuning.json nor evaluations.jsonl.*wsm-ds evaluate"):
        write_report(tmp_path)
    with pytest.raises(RecipeError, match="is not there"):
        write_report(tmp_path / "none")


def test_options_of_evaluations_are_refused_for_a_tuning(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`metric` is for a report of evaluations"):
        write_report(tuning(tmp_path / "tune"), metric="acc")


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json"])
def test_a_file_that_is_no_report_is_left_alone(tmp_path: Path, name: str) -> None:
    folder = tuning(tmp_path / "tune")
    (folder / name).write_text("mine")
    with pytest.raises(OutputExists, match=f"{name} is there, and is no report"):
        write_report(folder)
    assert (folder / name).read_text() == "mine"
    assert not any((folder / other).exists() for other in {"report.html", "report.md", "report.json"} - {name})


def test_the_command_prints_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records(tmp_path, RAW, MERGED)
    assert main(["report", str(tmp_path), "--metric", "loss", "--tokens-per-step", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["html"] == str(tmp_path / "report.html")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "report.md") in capsys.readouterr().out


def test_the_command_names_its_flags_in_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records(tmp_path, RAW)
    assert main(["report", str(tmp_path), "--metric", "accuracy"]) == 2
    assert "--metric: no evaluation has 'accuracy'; there are loss" in capsys.readouterr().err
