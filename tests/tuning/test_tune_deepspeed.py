"""Whole tunings of runs that DeepSpeed wrote."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tuned import BLOCKS, LENGTH, loss_of, write_tokens

from wsm_ds.cli import main
from wsm_ds.errors import EvaluationError, OutputExists, RecipeError, WindowError
from wsm_ds.evaluation.models import build_model
from wsm_ds.evaluation.records import Records
from wsm_ds.loading import load_merge
from wsm_ds.planning.recipe import load_recipe
from wsm_ds.tuning.candidates import candidates_of
from wsm_ds.tuning.results import TuningResult
from wsm_ds.tuning.transfer import read_tuned, windows_near
from wsm_ds.tuning.tune import Step, read_result, tune

Requests = Callable[..., Any]
SINGLES = [f"step{step}" for step in range(14, 0, -2)]
GRID = [f"last{last}-{curve}" for curve in ("linear", "1-sqrt") for last in (4, 2, 8)]


class Stopped(Exception):
    """Ends a tuning in its middle."""


def values_of(result: TuningResult) -> dict[str, float]:
    return {one.name: one.metrics["loss"].value for one in result.candidates if one.metrics}


def test_every_candidate_is_measured_once_and_the_result_lies_in_the_folder(request_of: Requests) -> None:
    request, steps = request_of(), list[Step]()
    result = tune(request, on_step=steps.append)
    assert [step.candidate for step in steps] == [one.name for one in result.candidates] == ["step16", *GRID, *SINGLES]
    assert [step.done for step in steps] == list(range(1, 15))
    assert {step.total for step in steps} == {14}
    assert result.waiting == ()
    assert result.recommendation is not None
    assert read_result(request.out) == result
    assert result.candidates == TuningResult.model_validate_json((request.out / "tuning.json").read_text()).candidates
    by_name = {one.name: one for one in result.candidates}
    assert by_name["last4-linear"].steps == (10, 12, 14, 16)
    assert by_name["last4-linear"].coefficients == (0.25,) * 4
    assert by_name["last4-linear"].window is not None
    assert by_name["last4-linear"].window.steps == 8
    assert by_name["last4-linear"].fraction == 0.5
    assert (by_name["step16"].kind, by_name["step16"].window.steps) == ("raw", 0)  # type: ignore[union-attr]
    assert result.read_bytes > 0


def test_a_value_is_that_of_the_merge_in_a_model(request_of: Requests) -> None:
    request = request_of(windows=("2", "4"), curves=("1-sqrt",))
    result = tune(request)
    for one in result.candidates:
        model = build_model("ds_models:TinyModel", "fp32")
        tags = [f"global_step{step}" for step in one.steps]
        load_merge(model, run=request.run, tags=tags, coefficients=list(one.coefficients))
        subject = next(candidate.subject for candidate in candidates_of(request) if candidate.name == one.name)
        alone = request.screening.measure(model, subject)
        assert alone.metrics["loss"] == one.metrics["loss"], one.name


def test_the_differences_are_those_of_numpy_on_the_recorded_blocks(request_of: Requests) -> None:
    request = request_of()
    result = tune(request)
    assert result.recommendation is not None
    blocks = {
        evaluation.subject.name: np.array(evaluation.blocks.nats) / LENGTH
        for evaluation in Records(request.out / "evaluations.jsonl").all()
        if evaluation.blocks is not None
    }
    best = blocks[str(result.recommendation.best)]
    for one in result.candidates:
        difference = blocks[one.name] - best
        assert one.difference is not None
        assert one.difference.value == pytest.approx(difference.mean(), abs=1e-12)
        assert one.difference.error == pytest.approx(difference.std(ddof=1) / np.sqrt(BLOCKS), rel=1e-9)


@pytest.mark.parametrize("after", [1, 5, 13])
def test_a_tuning_that_was_stopped_goes_on_and_ends_alike(request_of: Requests, tmp_path: Path, after: int) -> None:
    whole, request = tune(request_of(out=tmp_path / "whole")), request_of()

    def stop(step: Step) -> None:
        if step.done == after:
            raise Stopped

    with pytest.raises(Stopped):
        tune(request, on_step=stop)
    with (request.out / "evaluations.jsonl").open("a") as file:
        file.write('{"subject": {"name": "torn')
    steps = list[Step]()
    result = tune(request, on_step=steps.append)
    assert len(steps) == 14 - after
    assert values_of(result) == values_of(whole)
    assert result.recommendation == whole.recommendation


def test_processes_share_the_candidates(request_of: Requests, tmp_path: Path) -> None:
    whole = tune(request_of(out=tmp_path / "whole"))
    first = tune(request_of(share=(0, 3)))
    assert len(first.candidates) == 5
    assert len(first.waiting) == 9
    tune(request_of(share=(2, 3)))
    last = tune(request_of(share=(1, 3)))
    assert last.waiting == ()
    assert values_of(last) == values_of(whole)
    assert last.recommendation == whole.recommendation


def test_no_measurement_is_begun_after_the_budget(request_of: Requests) -> None:
    result = tune(request_of(budget_s=1e-6))
    assert len(result.candidates) <= 1
    assert len(result.waiting) >= 13
    assert tune(request_of()).waiting == ()


def test_a_checkpoint_with_a_nan_costs_its_windows_alone(request_of: Requests, long_runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(long_runs / "narrow", run)
    for file in (run / "global_step10").glob("*optim_states.pt"):
        poison(file)
    result = tune(request_of(run=run, windows=("2", "4"), options={"allow": ("foreign-files",)}))
    failed = {one.name for one in result.candidates if one.failure is not None}
    assert failed == {"last4-linear", "last4-1-sqrt", "step10"}
    assert result.recommendation is not None
    assert any(warning.startswith("3 of 8 candidates have no value") for warning in result.recommendation.warnings)


def poison(file: Path) -> None:
    """Makes a master of a checkpoint NaN, as DeepSpeed would save it."""
    import torch

    state = torch.load(file, weights_only=False)
    with torch.no_grad():
        state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][0] = float("nan")
    torch.save(state, file)


def test_the_second_held_out_set_measures_what_is_recommended(request_of: Requests, tmp_path: Path) -> None:
    confirm = loss_of(write_tokens(tmp_path / "second.npy", seed=7))
    result = tune(request_of(confirm=confirm))
    found = result.recommendation
    assert found is not None
    assert found.confirmed is not None
    assert found.confirmed_raw is not None
    assert (
        found.confirmed.value != next(one for one in result.candidates if one.name == found.name).metrics["loss"].value
    )
    assert not any("--confirm" in warning for warning in found.warnings)


def test_a_baseline_is_measured_like_the_others(request_of: Requests, long_runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert main(["export", str(long_runs / "narrow"), "--tag", "global_step8", "--out", str(folder)]) == 0
    result = tune(request_of(baselines={"branch": folder}))
    values = values_of(result)
    assert values["branch"] == values["step8"]
    assert result.recommendation is not None
    assert "The baseline branch is" in result.recommendation.sentence


def test_best_yaml_is_a_recipe_of_the_recommended_merge(request_of: Requests, tmp_path: Path) -> None:
    request = request_of(windows=("2", "4"))
    result = tune(request)
    assert result.recommendation is not None
    chosen = next(one for one in result.candidates if one.name == result.recommendation.name)
    recipe = load_recipe(request.out / "best.yaml", run=request.run, out=tmp_path / "merged")
    assert main(["merge", str(request.run), "--recipe", str(request.out / "best.yaml"), "--out", str(recipe.out)]) == 0
    manifest = json.loads((recipe.out / "wsm_merge.json").read_text())
    assert [source["step"] for source in manifest["sources"]] == list(chosen.steps)
    assert [source["coefficient"] for source in manifest["sources"]] == list(chosen.coefficients)
    assert manifest["recipe"]["tuned"]["metric"] == "loss"


def test_the_finding_of_a_small_model_is_carried_to_one_twice_as_wide(
    request_of: Requests, long_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_of()
    tune(request)
    best = request.out / "best.yaml"
    content = yaml.safe_load(best.read_text())
    content["tuned"] |= {"kind": "merge", "window_fraction": 0.25, "window_steps": 4.0, "curve": "1-sqrt"}
    best.write_text(yaml.safe_dump(content))
    data = write_tokens(tmp_path / "held_out.npy")
    model = tmp_path / "wide.py"
    model.write_text("from ds_models import TinyModel\n\ndef make():\n    return TinyModel(18)\n")
    command = ["tune", str(long_runs / "twice_as_wide"), "--near", str(best), "--data", str(data), "--model"]
    command += [
        f"{model}:make",
        "--sequence-length",
        str(LENGTH),
        "--vocabulary",
        "13",
        "--out",
        str(tmp_path / "wide"),
    ]
    assert main(command) == 0
    result = read_result(tmp_path / "wide")
    assert result is not None
    merges = [one for one in result.candidates if one.kind == "merge"]
    assert sorted(len(one.steps) for one in merges) == [2, 4]
    assert {one.curve for one in merges} == {"1-sqrt"}
    assert "recipe" in capsys.readouterr().out


def test_windows_near_another_runs(request_of: Requests) -> None:
    tune(request_of(windows=("2",)))
    tuned = read_tuned(request_of().out / "best.yaml").model_copy(
        update={"kind": "merge", "window_fraction": 0.1, "window_tokens": 4e9}
    )
    steps = list(range(1000, 41000, 1000))
    assert windows_near(tuned, steps, None) == ("2", "4", "8")
    tokens = [step * 1_000_000 for step in steps]  # 40B in all: a tenth is 4B, as the tokens say
    assert windows_near(tuned, steps, tokens) == ("2", "4", "8")
    tokens = [step * 4_000_000 for step in steps]  # a tenth is four checkpoints, 4B tokens are one
    assert windows_near(tuned, steps, tokens) == ("2", "4", "8")
    with pytest.raises(WindowError, match="Save more often"):
        windows_near(tuned, [1000, 40000], None)


def test_what_cannot_work_is_refused_before_anything_is_measured(request_of: Requests, tmp_path: Path) -> None:
    for values, error, words in (
        ({"windows": ("2", "64")}, WindowError, "64"),
        ({"baselines": {"gone": tmp_path / "gone"}}, EvaluationError, "gone"),
        ({"screening": loss_of(tmp_path / "no.npy")}, EvaluationError, "no.npy"),
        ({"model": "ds_models:NoModel"}, EvaluationError, "NoModel"),
        ({"model": None}, RecipeError, "has no config.json"),
    ):
        with pytest.raises(error, match=words):
            tune(request_of(**values))
        assert not (request_of().out / "evaluations.jsonl").exists()


def test_the_folder_of_another_runs_tuning_is_refused(request_of: Requests, long_runs: Path) -> None:
    tune(request_of(windows=("2",)))
    before = (request_of().out / "tuning.json").read_bytes()
    with pytest.raises(OutputExists, match="is the tuning of"):
        tune(request_of(run=long_runs / "twice_as_wide"))
    assert (request_of().out / "tuning.json").read_bytes() == before


COUNT_FILES = (
    "import json, pathlib, sys; print(json.dumps({'files': {'count': len(list(pathlib.Path(sys.argv[1]).iterdir()))}}))"
)


def command_line(request: Any, tmp_path: Path, *more: str) -> list[str]:
    words = ["tune", str(request.run), "--windows", "2,4", "--data", str(tmp_path / "held_out.npy"), "--model"]
    words += ["ds_models:TinyModel", "--sequence-length", str(LENGTH), "--vocabulary", "13"]
    return [*words, "--out", str(request.out), *more]


def test_finalists_are_exported_measured_by_a_command_and_the_best_is_kept(
    request_of: Requests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, script = request_of(), tmp_path / "count.py"
    script.write_text(COUNT_FILES)
    final = ("--final", f"{sys.executable} {script} {{}}", "--metric", "files.count", "--finalists", "1")
    assert main(command_line(request, tmp_path, *final, "--curve", "linear,1-sqrt")) == 0
    printed = capsys.readouterr().out
    result = read_result(request.out)
    assert result is not None
    assert result.metric == "files.count"
    finalists = [one for one in result.candidates if one.stage == 2]
    assert sorted(one.kind for one in finalists) == ["merge", "raw"]
    assert all(set(one.metrics) >= {"loss", "files.count"} for one in finalists)
    assert [path.name for path in (request.out / "models").iterdir()] == ["step16"]
    assert (request.out / "report.html").read_text().startswith("<!doctype html>")
    assert "recipe" in printed
    assert "report" in printed


def test_a_command_that_crashes_for_one_candidate_costs_that_candidate(request_of: Requests, tmp_path: Path) -> None:
    request, script = request_of(), tmp_path / "crash.py"
    script.write_text("import sys\nprint('{\"v\": 1}' if 'last' in sys.argv[1] else 1/0)\n")
    assert main(command_line(request, tmp_path, "--final", f"{sys.executable} {script} {{}}", "--metric", "v")) == 0
    result = read_result(request.out)
    assert result is not None
    assert result.recommendation is not None
    assert {one.name for one in result.candidates if one.failure} == {"step16"}
    assert any("have no value: step16" in warning for warning in result.recommendation.warnings)


def test_json_events_tell_all_that_people_see(
    request_of: Requests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_of()
    assert main([*command_line(request, tmp_path), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["evaluation"] * 6 + ["result"]
    assert events[-1]["recommendation"] == json.loads((request.out / "tuning.json").read_text())["recommendation"]


def test_a_dry_run_shows_the_candidates_and_writes_nothing(
    request_of: Requests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_of()
    assert main([*command_line(request, tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "last4-linear" in printed
    assert "6 candidates" in printed
    assert not request.out.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--near", "x.yaml"), "--windows or --near, not both"),
        (("--share", "4/4"), "from 0 to 3"),
        (("--windows", "100B"), "Give --run-sequence-length (the tokens of a sample)"),
        (("--share", "a"), "--share must be I/N"),
        (("--budget", "long"), "--budget must be a time"),
        (("--baseline", "folder"), "--baseline must be NAME=FOLDER"),
        (("--spread", "narrow"), "--spread: unknown spread 'narrow'"),
        (("--windows", "4.5"), "--windows: '4.5' is not a whole number"),
        (("--windows", "99"), "--windows: 99 complete checkpoints were asked for"),
        (("--curve", "steep"), "steep"),
        (("--final", "no-such-program {}"), "no-such-program"),
        (("--disk-room", "1B", "--keep", "all"), "--disk-room"),
    ],
)
def test_wrong_flags_are_named(
    request_of: Requests, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    request = request_of()
    assert main(command_line(request, tmp_path, *more)) in (2, 3)
    assert words in capsys.readouterr().err
    assert not (request.out / "evaluations.jsonl").exists()


def test_shuffled_data_and_few_blocks_are_said(request_of: Requests, tmp_path: Path) -> None:
    path = tmp_path / "shuffled.npy"
    np.save(path, np.random.default_rng(3).integers(0, 13, 10 * (LENGTH + 1)).astype(np.uint16))
    result = tune(request_of(screening=loss_of(path)))
    assert result.recommendation is not None
    said = " ".join(result.recommendation.warnings)
    assert "only 10 blocks" in said
    assert "tokens in their order" in said


def test_a_run_that_goes_on_meanwhile_changes_no_candidate(
    request_of: Requests, long_runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(long_runs / "narrow", run, ignore=shutil.ignore_patterns("global_step16"))
    (run / "latest").write_text("global_step14")
    request = request_of(run=run, windows=("2", "4"), memory_room=0)

    def save(step: Step) -> None:
        if step.done == 1:
            shutil.copytree(long_runs / "narrow/global_step16", run / "global_step16")

    result = tune(request, on_step=save)
    assert {one.steps[-1] for one in result.candidates if one.kind == "merge"} == {14}
    alone = tune(request_of(run=run, windows=("2", "4"), ends=(14,), out=tmp_path / "alone"))
    assert sorted(values_of(result).values()) == sorted(values_of(alone).values())
    again = tune(request)
    assert {one.steps[-1] for one in again.candidates if one.kind == "merge"} == {16}
    assert values_of(again)["step14"] == values_of(result)["step14"]
