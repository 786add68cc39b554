"""Slot means of launch/pretrain.py, which is interrupted within a slot and goes on with fewer ranks."""

import json
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from training.conftest import config
from training.rank_processes import Launcher, losses

import wsm_ds
from wsm_ds.layouts import find_checkpoints
from wsm_ds.layouts.saved_step import saved_counts
from wsm_ds.planning.recipe_options import WindowOptions

Arguments = tuple[str, ...]


def with_slots(folder: Path, every: int) -> str:
    """A ds_config with slots."""
    path = folder / "slots.json"
    path.write_text(json.dumps(json.loads(Path(config(2)).read_text()) | {"wsm_ds": {"slot_every": every}}))
    return str(path)


def slots(run: Path) -> dict[int, int]:
    """The first step of each slot, by its last one."""
    found = [saved_counts(checkpoint.path).snapshot for checkpoint in find_checkpoints(run / "snapshots")]
    return {slot.last: slot.first for slot in found if slot is not None}


def merged(run: Path, out: Path) -> dict[str, np.ndarray]:
    """The mean of the masters over steps 7 to 24."""
    window = WindowOptions(run=run / "snapshots", from_step=7, to_step=24, allow=["warmup", "lr-change"])
    wsm_ds.merge(out=out, format="safetensors", dtype="fp32", **window)
    return load_file(out / "model.safetensors")


def test_slots_of_a_run_that_is_interrupted_within_one_are_means_of_the_same_updates(
    launcher: Launcher, arguments: Arguments, tmp_path: Path
) -> None:
    common = ("--config", with_slots(tmp_path, 5), *arguments, "--dropout", "0")
    whole = launcher.start(tmp_path / "whole", *common)
    assert whole.wait() == [0, 0], whole.output
    assert slots(whole.run) == {5: 1, 6: 6, 10: 7, 12: 11, 15: 13, 18: 16, 20: 19, 24: 21}

    asked = launcher.start(tmp_path / "broken", *common).until_step(7)
    asked.send(signal.SIGTERM)
    assert asked.wait() == [75, 75], asked.output
    last = launcher.start(tmp_path / "broken", *common, ranks=1)
    assert last.wait() == [0], last.output
    found = slots(last.run)
    assert sorted(found)[-1] == 24
    assert all(found[last_step] == before + 1 for before, last_step in pairwise(sorted(found)))
    assert losses(last.run) == pytest.approx(losses(whole.run), abs=2e-3)
    one, other = merged(whole.run, tmp_path / "one"), merged(last.run, tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(np.allclose(one[name], other[name], atol=2e-4) for name in one)
    # All else of the merge is the full checkpoint's.
    out = tmp_path / "carried"
    wsm_ds.merge(run=last.run / "snapshots", last=2, carry_from=last.run, out=out, allow=["warmup", "lr-change"])
    assert wsm_ds.inspect_run(out)[0].is_complete


def test_a_kill_sets_aside_the_slots_that_are_trained_again(
    launcher: Launcher, arguments: Arguments, tmp_path: Path
) -> None:
    common = ("--config", with_slots(tmp_path, 5), *arguments)
    killed = launcher.start(tmp_path / "run", *common).until_step(11)
    killed.send(signal.SIGKILL)
    assert killed.wait() == [-9, -9]
    last = launcher.start(tmp_path / "run", *common)
    assert last.wait() == [0, 0], last.output
    assert slots(last.run) == {5: 1, 6: 6, 10: 7, 12: 11, 15: 13, 18: 16, 20: 19, 24: 21}
    assert not list((last.run / "snapshots").glob(".*.part"))
