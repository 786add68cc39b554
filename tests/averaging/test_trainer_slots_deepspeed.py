"""Slot means of a training with HF Trainer, whose ds_config says how long a slot is."""

from pathlib import Path

from deepspeed_runs import launch

import wsm_ds
from wsm_ds.layouts import find_checkpoints
from wsm_ds.layouts.saved_step import saved_counts


def test_each_slot_and_each_checkpoint_of_trainer_ends_with_a_snapshot(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = {"do": "trainer", "stage": 2, "tied": True, "run": str(run), "steps": 14, "every": 6, "slot_every": 4}
    resumed = job | {"steps": 18, "resume": str(run / "checkpoint-12")}
    launch([job, resumed], world_size=2, folder=tmp_path, worker="trainer_worker.py")
    found = [saved_counts(checkpoint.path).snapshot for checkpoint in find_checkpoints(run / "snapshots")]
    assert [(slot.first, slot.last) for slot in found if slot is not None] == [
        (1, 4), (5, 6), (7, 8), (9, 12), (13, 16), (17, 18)
    ]  # fmt: skip
    merged = tmp_path / "merged"
    wsm_ds.merge(run=run / "snapshots", last=3, out=merged, carry_from=run)
    assert (merged / "trainer_state.json").is_file()
    assert wsm_ds.inspect_run(merged)[0].is_complete
