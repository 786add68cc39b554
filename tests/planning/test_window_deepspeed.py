"""Windows of checkpoints that are not of one course of training, and rules that do nothing."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import launch

from wsm_ds.errors import LayoutMismatch, RecipeError, WindowError
from wsm_ds.merging import merge


@pytest.fixture(scope="module")
def went_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saved at 2, 4 and 6, and then was trained again up to 4."""
    run = tmp_path_factory.mktemp("back") / "run"
    job = {"do": "train", "stage": 2, "dtype": "bf16", "every": 2, "run": str(run)}
    jobs = [job | {"steps": 6}, job | {"steps": 4, "batch": "same"}]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return run


def test_checkpoints_that_the_training_left_behind_are_in_no_window(went_back: Path, tmp_path: Path) -> None:
    assert (went_back / "latest").read_text() == "global_step4"
    windows: tuple[dict[str, Any], ...] = ({"last": 2}, {"last": 2, "to_step": 6}, {"from_step": 4, "to_step": 6})
    for window in windows:
        with pytest.raises(WindowError, match=r"global_step4 .*was written after global_step6.*--to 4"):
            merge(run=went_back, out=tmp_path / "out", **window)
    merge(run=went_back, last=2, to_step=4, out=tmp_path / "new")
    merge(run=went_back, tags=("global_step2", "global_step6"), out=tmp_path / "old")


def test_an_older_latest_alone_shows_nothing(runs: Path, tmp_path: Path) -> None:
    """The newest save is not finished, was made with save_latest=False, or `latest` was edited for a resume."""
    run = Path(shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run"))
    (run / "latest").write_text("global_step4")
    merge(run=run, last=2, out=tmp_path / "out")
    model = "mp_rank_00_model_states.pt"
    os.utime(run / "global_step4" / model, ns=(0, 0))
    (run / "latest").write_text("global_step6")
    os.utime(run / "global_step6" / model, ns=(0, 0))  # a copy with other times
    merge(run=run, last=2, out=tmp_path / "copied")


def test_a_rule_that_matches_no_name_is_not_passed_over(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs / "w2_s2_bf16"
    with pytest.raises(RecipeError, match="'hiden' matches no tensor's name"):
        merge(run=run, last=2, format="safetensors", rename={"hiden": "inner"}, out=tmp_path / "out")
    for rules, words in (
        ({"global_step4": {"hiden": "inner"}}, "global_step4:hiden"),
        ({"global_step2": {"hidden": "inner"}}, "global_step2:hidden"),
    ):
        caplog.clear()
        merge(run=run, last=2, rename_sources=rules, out=tmp_path / words.replace(":", "-"))
        assert f"--rename-sources {words} matches no name" in caplog.text


def test_states_of_two_optimizers_are_not_merged(runs: Path, tmp_path: Path) -> None:
    """AdamW and then one that has some of its states: the first checkpoint's further states are not passed over."""
    run = Path(shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run"))
    merge(run=run, tags=("global_step6",), optimizer_states="drop", out=tmp_path / "dropped")
    shutil.rmtree(run / "global_step6")
    shutil.copytree(tmp_path / "dropped/global_step6", run / "global_step6")
    with pytest.raises(LayoutMismatch, match=r"global_step4 holds the optimizer states exp_avg, exp_avg_sq, .* none"):
        merge(run=run, last=2, optimizer_states="merge", out=tmp_path / "out")


def test_two_kinds_of_names_in_a_window_are_not_passed_over(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for name, step in (("one_step2", 2), ("one_step4", 4), ("other_step6", 6)):
        shutil.copytree(runs / f"w2_s2_bf16/global_step{step}", run / name)
    (run / "loop").symlink_to("loop")  # is no checkpoint, and stops nothing
    merge(run=run, last=2, to_step=4, out=tmp_path / "one")
    merge(run=run, tags=("one_step4", "other_step6"), out=tmp_path / "chosen")
    assert "kinds of names" not in caplog.text
    merge(run=run, last=2, out=tmp_path / "both")
    assert "several kinds of names: one_step4, other_step6" in caplog.text
