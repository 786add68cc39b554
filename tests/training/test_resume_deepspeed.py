"""Runs of launch/pretrain.py that are interrupted in every way, against one that is not."""

import json
import signal
from pathlib import Path

import pytest
from training.conftest import config
from training.rank_processes import Launcher, losses, steps


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_of_an_interrupted_run_are_those_of_an_uninterrupted_one(
    stage: int, launcher: Launcher, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken 'run'"
    common = ("--config", config(stage), *arguments)
    assert launcher.start(whole, *common).wait() == [0, 0]

    asked = launcher.start(broken, *common).until_step(4)
    asked.send(signal.SIGTERM, 1)
    asked.send(signal.SIGTERM, 1)
    assert asked.wait() == [75, 75], asked.output
    (saved,) = {path.name for path in broken.glob("global_step*")}
    assert not (broken / "job/done").exists()

    killed = launcher.start(broken, *common).until_step(14)
    killed.send(signal.SIGKILL)
    assert killed.wait() == [-9, -9]
    assert f"resuming from {broken / saved}" in killed.output

    last = launcher.start(broken, *common)
    assert last.wait() == [0, 0], last.output
    assert {line["attempt"] for line in steps(broken)} == {1, 2, 3}
    assert list(losses(broken)) == list(range(1, 41))
    assert losses(broken) == losses(whole)
    assert json.loads((broken / "job/done").read_text()) == {"step": 40, "attempt": 3}
