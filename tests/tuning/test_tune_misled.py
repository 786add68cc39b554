"""Tunings whose run, data, model, evaluation or folder misleads them: they say so, refuse it by name, or are right."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tuned import LENGTH, loss_of, write_tokens

from wsm_ds.cli import main
from wsm_ds.errors import EvaluationError, InsufficientCapacity, OutputLocked, RecipeError, WindowError
from wsm_ds.evaluation.records import Records
from wsm_ds.tuning.results import TuningResult
from wsm_ds.tuning.tune import Step, read_result, tune

Requests = Callable[..., Any]


@pytest.fixture
def growing(long_runs: Path, tmp_path: Path) -> Path:
    """A run whose newest checkpoint is global_step14; `go_on` adds global_step16."""
    run = tmp_path / "growing"
    shutil.copytree(long_runs / "narrow", run, ignore=shutil.ignore_patterns("global_step16"))
    (run / "latest").write_text("global_step14")
    return run


def go_on(run: Path, long_runs: Path) -> None:
    shutil.copytree(long_runs / "narrow/global_step16", run / "global_step16")
    (run / "latest").write_text("global_step16")


def values_of(result: TuningResult, metric: str = "loss") -> dict[str, float]:
    return {one.name: one.metrics[metric].value for one in result.candidates if metric in one.metrics}


def exported_steps(out: Path) -> dict[str, list[int]]:
    """The steps of the checkpoints in each exported model, as its manifest says."""
    manifests = {path.parent.name: json.loads(path.read_text()) for path in out.glob("models/*/wsm_merge.json")}
    return {name: [source["step"] for source in manifest["sources"]] for name, manifest in manifests.items()}


def program(tmp_path: Path, code: str, name: str = "measure.py") -> str:
    """The line of a command that runs `code`. In it `NAME` is the candidate's name and `size` that of its weights."""
    script = tmp_path / name
    script.write_text(
        "import os, pathlib, sys, time\nNAME = os.environ['WSM_NAME']\n"
        f"size = sum(file.stat().st_size for file in pathlib.Path(sys.argv[1]).glob('*.safetensors'))\n{code}\n"
    )
    return f"{sys.executable} '{script}' {{}}"


def measured_by(tmp_path: Path, code: str, **values: Any) -> Any:
    """An evaluator that runs `code`."""
    from wsm_ds.evaluation.commands import CommandEvaluator

    return CommandEvaluator(command=program(tmp_path, code), **values)


def warnings_in(result: TuningResult) -> str:
    assert result.recommendation is not None
    return " ".join(result.recommendation.warnings)


def test_a_run_that_goes_on_during_the_tuning_changes_no_candidate(
    request_of: Requests, growing: Path, long_runs: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline"
    assert main(["export", str(growing), "--tag", "global_step2", "--out", str(baseline)]) == 0
    finals = (measured_by(tmp_path, "print(size)"),)
    values = {"run": growing, "windows": ("2", "4"), "curves": ("linear",), "baselines": {"branch": baseline}}
    request = request_of(finals=finals, keep="finalists", **values)
    alone = tune(request_of(out=tmp_path / "alone", **values))

    def add(step: Step) -> None:
        if step.done == 1:
            go_on(growing, long_runs)

    result = tune(request, on_step=add)
    assert values_of(result) == values_of(alone)
    assert exported_steps(request.out) == {
        "step14": [14], "last2-linear": [12, 14], "last4-linear": [8, 10, 12, 14]
    }  # fmt: skip


def test_a_run_that_went_on_is_measured_anew_where_it_changed(
    request_of: Requests, growing: Path, long_runs: Path, tmp_path: Path
) -> None:
    values = {"run": growing, "windows": ("2", "4"), "curves": ("linear",)}
    final = measured_by(tmp_path, "print(size)")
    request = request_of(finals=(final,), keep="finalists", **values)
    tune(request)
    go_on(growing, long_runs)
    steps = list[Step]()
    result = tune(request, on_step=steps.append)
    assert [step.candidate for step in steps if "loss" in step.evaluation.metrics] == [
        "step16", "last4-linear", "last2-linear",
    ]  # fmt: skip
    assert values_of(result) == values_of(tune(request_of(out=tmp_path / "anew", **values)))
    assert exported_steps(request.out)["last4-linear"] == [10, 12, 14, 16]
    best = yaml.safe_load((request.out / "best.yaml").read_text())
    assert best.get("to_step", 16) == 16
    assert best["tuned"]["run_steps"] == 16


def test_a_checkpoint_that_is_gone_takes_its_merges_along(
    request_of: Requests, growing: Path, long_runs: Path, tmp_path: Path
) -> None:
    go_on(growing, long_runs)
    values = {"run": growing, "curves": ("linear",)}
    request = request_of(windows=("2", "4"), **values)
    before = tune(request)
    shutil.rmtree(growing / "global_step12")
    result = tune(request)
    steps = {one.name: one.steps for one in result.candidates}
    assert steps["last4-linear"] == (8, 10, 14, 16)
    assert "step12" not in steps
    assert values_of(result)["last4-linear"] != values_of(before)["last4-linear"]
    assert values_of(result) == values_of(tune(request_of(out=tmp_path / "anew", windows=("2", "4"), **values)))
    with pytest.raises(WindowError, match="8"):
        tune(request_of(windows=("2", "8"), **values))
    assert read_result(request.out) == result


def test_a_checkpoint_that_goes_during_the_tuning_costs_its_merges_alone(request_of: Requests, growing: Path) -> None:
    def remove(step: Step) -> None:
        if step.done == 1:
            shutil.rmtree(growing / "global_step8")

    request = request_of(run=growing, windows=("2", "4"), curves=("linear",), memory_room=1)
    result = tune(request, on_step=remove)
    assert all("global_step8" in str(one.failure) for one in result.candidates if one.failure is not None)
    assert {one.name for one in result.candidates if one.failure is not None} == {"last4-linear", "step8"}
    assert set(values_of(result)) == {"step14", "last2-linear", "step12", "step10"}
    assert result.recommendation is not None
    assert "2 of 6 candidates have no value: last4-linear, step8" in warnings_in(result)


def test_a_second_tuning_of_a_folder_at_once_is_refused(request_of: Requests, tmp_path: Path) -> None:
    request, refused = request_of(windows=("2", "4")), list[str]()

    def again(step: Step) -> None:
        with pytest.raises(OutputLocked, match="another process tunes") as error:
            tune(request)
        refused.append(str(error.value))

    result = tune(request, on_step=again)
    assert len(refused) == len(result.candidates) == 8
    assert "--out" in refused[0]
    assert len(Records(request.out / "evaluations.jsonl").all()) == 8


def test_a_command_that_fails_at_times_is_tried_again_for_those_alone(request_of: Requests, tmp_path: Path) -> None:
    count = (
        f"calls = pathlib.Path({str(tmp_path / 'calls')!r})\n"
        "number = int(calls.read_text()) if calls.exists() else 0\ncalls.write_text(str(number + 1))\n"
        "sys.exit('unlucky') if number % 2 else print(len(NAME))"
    )
    request = request_of(screening=measured_by(tmp_path, count), model=None, windows=("2", "4"), curves=("linear",))
    first = tune(request)
    failed = [one.name for one in first.candidates if one.failure is not None]
    assert failed == ["last4-linear", "step14", "step10"]
    assert all("unlucky" in str(one.failure) for one in first.candidates if one.failure is not None)
    assert first.recommendation is not None
    assert first.recommendation.name not in failed
    second = tune(request)
    assert [one.name for one in second.candidates if one.failure is not None] == ["step14"]
    assert [one.name for one in tune(request).candidates if one.failure is not None] == ["step14"]
    last = tune(request)
    assert values_of(last, "value") == {one.name: len(one.name) for one in last.candidates}
    assert int((tmp_path / "calls").read_text()) == 6 + 3 + 1 + 1
    assert list((request.out / "models").iterdir()) == []


def test_a_command_that_hangs_for_one_candidate_is_ended(request_of: Requests, tmp_path: Path) -> None:
    code = "time.sleep(600) if NAME == 'last4-linear' else print(size)"
    screening = measured_by(tmp_path, code, timeout_s=2.0)
    result = tune(request_of(screening=screening, model=None, windows=("2", "4"), curves=("linear",)))
    (failed,) = [one for one in result.candidates if one.failure is not None]
    assert failed.name == "last4-linear"
    assert "took more than 2 s and was ended" in str(failed.failure)


def test_a_nan_costs_its_candidates_alone_where_they_are_exported(
    request_of: Requests, growing: Path, tmp_path: Path
) -> None:
    change_masters(growing / "global_step8", lambda masters: masters.fill_(float("nan")))
    screening = measured_by(tmp_path, "print(size)")
    values = {"windows": ("2", "4"), "curves": ("linear",), "options": {"allow": ("foreign-files",)}}
    result = tune(request_of(run=growing, screening=screening, model=None, **values))
    assert {one.name for one in result.candidates if one.failure is not None} == {"last4-linear", "step8"}
    assert result.waiting == ()


def test_measurements_that_all_fail_are_an_error(
    request_of: Requests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, line = request_of(), program(tmp_path, "sys.exit('no such benchmark')")
    words = ["tune", str(request.run), "--windows", "2", "--command", line, "--out", str(request.out)]
    assert main(words) == EvaluationError.exit_code
    said = capsys.readouterr().err
    assert "none of 3 models could be measured" in said
    assert "no such benchmark" in said
    assert not (request.out / "best.yaml").exists()


def test_a_final_measurement_without_any_value_leaves_the_choice_to_the_screening(
    request_of: Requests, tmp_path: Path
) -> None:
    result = tune(request_of(finals=(measured_by(tmp_path, "sys.exit('out of memory')"),), windows=("2", "4")))
    assert result.metric == "loss"
    assert "has no value for any of 4 models, so loss decides" in warnings_in(result)
    assert "out of memory" in warnings_in(result)


def change_masters(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    """Changes all masters of a checkpoint, as a training that went wrong would have saved them."""
    import torch

    for file in checkpoint.glob("*optim_states.pt"):
        state = torch.load(file, weights_only=False)
        for masters in state["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
            with torch.no_grad():
                change(masters)
        torch.save(state, file)


@pytest.mark.parametrize("step", [8, 14])
def test_a_checkpoint_that_diverged_is_named_and_its_merges_are_not_chosen(
    request_of: Requests, growing: Path, step: int
) -> None:
    change_masters(growing / f"global_step{step}", lambda masters: masters.mul_(40.0))
    values = {"windows": ("2", "4"), "curves": ("linear",), "options": {"allow": ("foreign-files",)}}
    result = tune(request_of(run=growing, **values))
    assert f"The checkpoint of step {step} alone is far worse than its neighbours" in warnings_in(result)
    assert warnings_in(result).count("far worse") == 1
    assert result.recommendation is not None
    if step == 8:
        assert result.recommendation.name in ("last2-linear", "step14")
    else:
        assert "The older checkpoint" in result.recommendation.sentence


def test_tokens_of_another_vocabulary_are_refused(request_of: Requests, tmp_path: Path) -> None:
    import numpy as np

    path = write_tokens(tmp_path / "other.npy")
    np.save(path, np.load(path) + 5)
    with pytest.raises(EvaluationError, match="another tokenizer"):
        tune(request_of(screening=loss_of(path)))
    assert not request_of().out.exists()


def test_the_second_held_out_set_must_be_another_one(request_of: Requests, tmp_path: Path) -> None:
    first, second = write_tokens(tmp_path / "held_out.npy"), tmp_path / "second.npy"
    shutil.copy(first, second)
    with pytest.raises(RecipeError, match=r"60 of its 60 blocks are in --data, too"):
        tune(request_of(screening=loss_of(first), confirm=loss_of(second)))
    assert not request_of().out.exists()


def test_one_block_tells_no_error(request_of: Requests, tmp_path: Path) -> None:
    request = request_of(screening=loss_of(write_tokens(tmp_path / "one.npy", blocks=1)), windows=("2", "4"))
    assert "A held-out set of one block tells no error" in warnings_in(tune(request))


def test_other_code_of_the_model_is_measured_anew(request_of: Requests, tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    code = "from ds_models import TinyModel\n\n\ndef make():\n    return TinyModel()\n"
    model.write_text(code)
    request = request_of(windows=("2",), curves=("linear",), model=f"{model}:make")
    tune(request)
    steps = list[Step]()
    tune(request, on_step=steps.append)
    assert steps == []
    model.write_text(code + "\n# now with a layer that has no weights\n")
    tune(request, on_step=steps.append)
    assert len(steps) == 3


def test_a_folder_inside_the_run_and_names_with_spaces_disturb_nothing(
    long_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "my disk"
    run, out = place / "a run", place / "a run/my tuning"
    shutil.copytree(long_runs / "narrow", run)
    data = write_tokens(place / "held out.npy")
    line = program(place, "print(len(NAME))", name="measure it.py")
    words = ["tune", str(run), "--windows", "2,4", "--data", str(data), "--model", "ds_models:TinyModel"]
    words += ["--sequence-length", str(LENGTH), "--vocabulary", "13", "--out", str(out), "--final", line]
    assert main([*words, "--keep", "all"]) == 0
    first = read_result(out)
    assert first is not None
    assert len(list((out / "models").iterdir())) == 3
    assert main([*words, "--keep", "all"]) == 0
    assert read_result(out) == first
    assert main(["merge", str(run), "--recipe", str(out / "best.yaml"), "--out", str(place / "the merge")]) == 0
    manifest = json.loads((place / "the merge/wsm_merge.json").read_text())
    chosen = next(one for one in first.candidates if first.recommendation and one.name == first.recommendation.name)
    assert [source["step"] for source in manifest["sources"]] == list(chosen.steps)
    capsys.readouterr()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_tuning_goes_on_when_there_is_room(
    request_of: Requests, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finals = (measured_by(tmp_path, "print(size)"),)
    values = {"windows": ("2", "4"), "curves": ("linear",), "finals": finals, "keep": "all"}
    request, filled = request_of(out=small_disk / "tuning", **values), 0
    for left_bytes in (2048, 20480, 36864):  # too little for the first record, for a later one, for the models
        free_bytes = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(max(0, free_bytes - left_bytes)))
        with pytest.raises((InsufficientCapacity, OSError), match="small/tuning"):
            tune(request)
        filled += 1
        (small_disk / "filler").unlink()
    assert filled == 3
    steps = list[Step]()
    result = tune(request, on_step=steps.append)
    assert result.waiting == ()
    assert 0 < len(steps) < 9
    assert values_of(result) == values_of(tune(request_of(out=tmp_path / "alone", **values)))
    assert len(exported_steps(request.out)) == 3
    capsys.readouterr()


def test_a_file_in_the_place_of_the_folder_is_named(
    request_of: Requests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    request = request_of(windows=("2",))
    words = ["tune", str(request.run), "--windows", "2", "--data", str(tmp_path / "held_out.npy"), "--model"]
    words += ["ds_models:TinyModel", "--sequence-length", str(LENGTH), "--vocabulary", "13", "--out"]
    for out in (file, file / "below"):
        assert main([*words, str(out)]) in (2, 3)
        assert str(file) in capsys.readouterr().err
    assert file.read_text() == "mine"
