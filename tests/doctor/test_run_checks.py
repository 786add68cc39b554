"""Findings in a run, made from checkpoints that DeepSpeed wrote."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from packaging.version import Version

from wsm_ds.cli import main
from wsm_ds.doctor import Report, examine
from wsm_ds.doctor.findings import Finding
from wsm_ds.doctor.run_checks import Intent, RunFacts, Save, check_run
from wsm_ds.errors import CheckpointNotFound
from wsm_ds.layouts import find_checkpoints, read_layout

GOLDEN = Path(__file__).parent.parent / "golden"
NOW = Version("0.19.8")
LAYOUTS = tuple(read_layout(checkpoint) for checkpoint in find_checkpoints(GOLDEN / "zero3_bf16"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of ZeRO-3 with two checkpoints, which can be changed."""
    return Path(shutil.copytree(GOLDEN / "zero3_bf16", tmp_path / "run"))


def by_name(findings: list[Finding] | Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in (findings.findings if isinstance(findings, Report) else findings)}


def facts(*steps: int, seconds: float = 1.0, free_bytes: int = 10**9) -> RunFacts:
    """A run with checkpoints at these steps, one an hour, each of 1000 bytes."""
    saves = tuple(
        Save(f"global_step{step}", step, 1000, 3600.0 * number, 3600.0 * number + seconds)
        for number, step in enumerate(steps)
    )
    return RunFacts(Path("RUN"), saves, LAYOUTS, free_bytes)


def check(of: RunFacts, intent: Intent | None = None, timeout_s: float | None = None) -> dict[str, Finding]:
    return by_name(check_run(of, intent or Intent(), NOW, timeout_s))


def test_a_run_is_judged_by_the_config_that_its_checkpoint_holds(run: Path) -> None:
    report = examine(run, deepspeed="0.19.8")
    assert report.exit_code == 0
    found = by_name(report)
    assert found["clipping-by-default"].level == "warning"  # write_golden.py sets no gradient_clipping
    assert "frozen.weight" in found["frozen-kept-gathered"].found
    assert "other-deepspeed" not in found


def test_a_resume_with_another_version_is_named(run: Path) -> None:
    assert (
        "written by DeepSpeed 0.19.8, not 0.19.2" in by_name(examine(run, deepspeed="0.19.2"))["other-deepspeed"].found
    )
    assert "frozen-kept-gathered" not in by_name(examine(run, deepspeed="0.19.2"))


def test_an_unreadable_checkpoint_is_an_error_with_the_readers_reason(run: Path) -> None:
    (victim,) = (run / "global_step1").glob("*zero_pp_rank_1*_optim_states.pt")
    victim.write_bytes(victim.read_bytes()[:500])
    report = examine(run)
    assert report.exit_code == 1
    assert victim.name in by_name(report)["unreadable-checkpoint"].effect
    for path in run.glob("*/*model_states.pt"):
        path.write_bytes(b"")
    assert {finding.name for finding in examine(run).findings} == {"unreadable-checkpoint"}


def test_a_file_of_another_save_and_a_second_run_are_errors(run: Path) -> None:
    (first,) = (run / "global_step1").glob("*zero_pp_rank_1*_optim_states.pt")
    shutil.copyfile(first, run / "global_step2" / first.name)
    found = by_name(examine(run))
    assert "not of one save" in found["unreadable-checkpoint"].effect
    assert "several-runs" not in found
    for name in ("checkpoints/checkpoint_0", "step_2"):
        shutil.copytree(GOLDEN / "zero2_bf16/global_step1", run / name / "pytorch_model")
    assert by_name(examine(run))["several-runs"].level == "error"


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        examine(tmp_path)


def test_saves_off_the_grid_are_named() -> None:
    assert "off-grid-saves" not in check(facts(100, 200, 300, 400))
    found = check(facts(100, 200, 237, 300, 400))["off-grid-saves"]
    assert "global_step237 (step 237)" in found.found
    assert "global_step200" not in found.found
    assert "every 100 steps" in found.found


def test_one_last_save_off_the_grid_does_not_move_the_grid() -> None:
    found = check(facts(100, 200, 300, 400, 451))["off-grid-saves"]
    assert "step 451" in found.found
    assert "step 400" not in found.found


def test_a_plan_that_does_not_fit_the_runs_interval_is_named() -> None:
    found = check(facts(100, 200, 300), Intent(interval_steps=50, every_steps=75, last=8))
    assert found["other-interval"].level == "warning"
    assert found["interval-does-not-fit"].level == "error"
    assert found["window-not-full"].level == "note"
    assert not {"other-interval", "interval-does-not-fit", "window-not-full"} & set(
        check(facts(100, 200, 300), Intent(interval_steps=100, every_steps=200, last=3))
    )


def test_a_window_in_the_warmup_and_a_changing_rate_are_errors() -> None:
    oldest, newest = LAYOUTS
    quiet = facts(1, 2)
    assert not {"warmup-in-window", "rate-changes"} & set(check(quiet))
    warm = dataclasses.replace(quiet, window=(oldest, dataclasses.replace(newest, warmup_num_steps=2)))
    assert check(warm)["warmup-in-window"].level == "error"
    decayed = dataclasses.replace(newest, learning_rates=tuple((rate or 0) / 2 for rate in newest.learning_rates))
    assert check(dataclasses.replace(quiet, window=(oldest, decayed)))["rate-changes"].level == "error"
    last_bit = dataclasses.replace(
        newest, learning_rates=tuple((rate or 0) * (1 + 2**-52) for rate in newest.learning_rates)
    )
    assert "rate-changes" not in check(dataclasses.replace(quiet, window=(oldest, last_bit)))


@pytest.mark.parametrize(("seconds", "level"), [(299, None), (300, "warning"), (600, "error")])
def test_a_save_near_the_timeout_is_reported(seconds: float, level: str | None) -> None:
    found = check(facts(1, 2, seconds=seconds)).get("save-near-timeout")
    assert (found and found.level) == level
    assert "save-near-timeout" not in check(facts(1, 2, seconds=seconds), timeout_s=7200.0)


def test_the_time_of_a_save_comes_from_its_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((run / "global_step2").iterdir())
    os.utime(files[0], (files[1].stat().st_mtime - 2000,) * 2)
    assert by_name(examine(run, deepspeed="0.19.2"))["save-near-timeout"].level == "error"  # 30 minutes
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "120")
    assert "save-near-timeout" not in by_name(examine(run))


def test_the_disk_forecast_counts_what_the_plan_needs() -> None:
    few = check(facts(100, 200, 300, free_bytes=4999), Intent(steps=700))["disk-forecast"]
    assert few.level == "note"
    assert "room for 4 more checkpoints" in few.found
    assert "400 steps" in few.found
    assert "0.2 days" in few.found
    assert check(facts(100, 200, 300, free_bytes=4999), Intent(steps=800))["disk-forecast"].level == "warning"
    assert check(facts(100, 200, 300, free_bytes=999))["disk-forecast"].level == "error"


def test_the_command_prints_text_or_json_and_ends_with_its_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run), "--deepspeed", "0.19.8"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == f"{run}, judged for DeepSpeed 0.19.8 (--deepspeed)"
    assert text.splitlines()[-1].startswith("0 errors, 1 warning,")
    assert main(["doctor", str(run), "--every", "3", "--interval", "2", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["name"] == "interval-does-not-fit"
    assert set(report["findings"][0]) == {"name", "level", "found", "effect", "cure", "source"}
    assert main(["doctor", str(run / "absent")]) == 3
    assert main(["doctor", str(run), "--deepspeed", "x"]) == 2
