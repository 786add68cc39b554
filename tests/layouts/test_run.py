"""What of a run's folder counts as a checkpoint."""

import shutil
from pathlib import Path

from wsm_ds.inspection import inspect_run
from wsm_ds.layouts.run import DELETED, deleted_steps, find_checkpoints, latest_tag


def test_what_jobs_keep_in_a_run_is_passed_over(runs: Path, tmp_path: Path) -> None:
    whole = runs / "w2_s2_bf16/global_step2"
    run = tmp_path / "run"
    for place in ("global_step2", "job", "job/global_step4", "job/attempt-3/global_step4", ".wsm-prune", ".hidden"):
        shutil.copytree(whole, run / place, dirs_exist_ok=True)
    assert [checkpoint.tag for checkpoint in find_checkpoints(run)] == ["global_step2"]
    assert [item.checkpoint.tag for item in inspect_run(run)] == ["global_step2"]


def test_the_record_of_what_was_deleted_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    assert deleted_steps(tmp_path) == set()
    (tmp_path / DELETED).parent.mkdir()
    (tmp_path / DELETED).write_text('{"step": 200, "tag": "x"}\n[]\n{"step": 300}\n{"ste')
    assert deleted_steps(tmp_path) == {200, 300}


def test_latest_is_read_as_a_name(tmp_path: Path) -> None:
    assert latest_tag(tmp_path) is None
    (tmp_path / "latest").write_text("global_step40\n")
    assert latest_tag(tmp_path) == "global_step40"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # a link to a checkpoint may have this name
    assert latest_tag(tmp_path) is None
