"""A slot that cannot be written does not appear, and stops nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from averaging_runs import slot_run
from deepspeed_runs import launch

import wsm_ds
from wsm_ds.errors import RecipeError, WindowError
from wsm_ds.layouts import find_checkpoints, read_layout

ENGINE = {"stage": 2, "dtype": "bf16", "engine": "noisy"}


@pytest.mark.parametrize("fault", ["nan", "full"])
def test_a_slot_that_cannot_be_written_is_dropped_and_the_training_goes_on(fault: str, tmp_path: Path) -> None:
    job = {"do": "fault", "fault": fault, "run": str(tmp_path / "run"), **ENGINE}
    sound = {"do": "fault", "fault": "none", "run": str(tmp_path / "sound"), **ENGINE}
    reports = launch([job, sound], world_size=2, folder=tmp_path, worker="averaging_worker.py")
    for faulty, other in reports:
        assert faulty["left"] == ["global_step3", "global_step9"]
        assert other["left"] == ["global_step3", "global_step6", "global_step9"]
        assert faulty["losses"] == other["losses"]
    said = (tmp_path / "ranks.log").read_text()
    assert ("holds a NaN or an infinity" if fault == "nan" else "there is no room") in said
    snapshots = tmp_path / "run" / "snapshots"
    with pytest.raises(
        WindowError, match="no slot of the window holds steps 4 to 6, between global_step3 and global_st"
    ):
        wsm_ds.plan_merge(run=snapshots, last=2, out=tmp_path / "out", format="safetensors")
    plan = wsm_ds.plan_merge(
        run=snapshots, last=2, out=tmp_path / "out", format="safetensors", allow=["missing-slots", "warmup"]
    )
    assert plan.outputs[0].coefficients == pytest.approx((1 / 3, 2 / 3))


def test_a_rank_that_dies_leaves_nothing_under_a_final_name_and_later_snapshots_are_set_aside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = {"do": "killed", "run": str(run), **ENGINE}
    ((report,), _) = launch([job], world_size=2, folder=tmp_path, worker="averaging_worker.py")
    assert report["before"] == ["global_step3", "part"]
    assert report["after"] == ["global_step3"]
    assert report["resumed"] == []
    assert [path.name for path in (run / "job" / "unusable").iterdir()] == ["snapshot-global_step3-0"]


def test_weights_and_figures_of_uneven_slots_are_those_of_their_updates(tmp_path: Path) -> None:
    snapshots = slot_run(tmp_path, ends=(10, 20, 40), stage=2)
    plan = wsm_ds.plan_merge(run=snapshots, last=3, out=tmp_path / "out", format="safetensors", allow=["warmup"])
    (output,) = plan.outputs
    assert output.coefficients == pytest.approx((0.25, 0.25, 0.5), abs=1e-15)
    assert output.lag_steps == pytest.approx(np.mean([40 - step for step in range(1, 41)]))
    assert output.ess == pytest.approx(40.0)
    assert output.figures["deviation"]["steps"] == pytest.approx(np.std(np.arange(1, 41)))
    assert output.figures["duration"]["steps"] == 40


def test_wrong_windows_and_outputs_of_slots_are_refused_with_what_helps(tmp_path: Path) -> None:
    snapshots = slot_run(tmp_path, ends=(10, 20), stage=2)

    def plan(**options: object) -> None:
        wsm_ds.plan_merge(**{"run": snapshots, "out": tmp_path / "out", "format": "safetensors", **options})  # type: ignore[arg-type]

    with pytest.raises(WindowError, match=r"global_step10 \(from step 1\) lies inside the warmup of 2 steps"):
        plan(last=2)
    with pytest.raises(RecipeError, match=r"--carry-from RUN\), or write the weights alone"):
        plan(last=2, format="zero", allow=["warmup", "lr-change"])
    plan(last=2, allow=["warmup"])
    plan(last=1)
    changing = slot_run(tmp_path / "changing", ends=(10, 20), stage=2, changes_at=15)
    with pytest.raises(
        WindowError, match="the learning rate changed within the steps of global_step20; a merge emulat"
    ):
        plan(run=changing, last=2, allow=["warmup"])
    points = slot_run(tmp_path / "points", ends=(30,), stage=2, kind="point")
    shutil.copytree(points / "global_step30", snapshots / "global_step30")
    with pytest.raises(
        WindowError, match="global_step20 is a mean over the steps of a slot, and global_step30 the wei"
    ):
        plan(last=2)


def test_inspect_says_what_each_snapshot_is(tmp_path: Path) -> None:
    snapshots = slot_run(tmp_path, ends=(10, 20), stage=3)
    from wsm_ds.reporting.tables import inspection_report

    report = inspection_report(wsm_ds.inspect_run(snapshots)).splitlines()
    assert [line.split()[-3:] for line in report] == [
        ["complete", "framework", "masters"],
        ["mean", "of", "1-10"],
        ["mean", "of", "11-20"],
    ]
    (first, _) = find_checkpoints(snapshots)
    assert read_layout(first).snapshot is not None
