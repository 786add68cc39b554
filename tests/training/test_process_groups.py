"""Ranks from whichever launcher there is."""

import os

import pytest

from wsm_ds.errors import RecipeError
from wsm_ds.training.process_groups import NAMES, find_ranks


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name in NAMES or name.startswith("SLURM_")]:
        del os.environ[name]


def found() -> dict[str, str]:
    find_ranks()
    return {name: os.environ[name] for name in NAMES}


def test_a_launcher_is_believed() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "5"}
    os.environ.update(given, SLURM_PROCID="9", SLURM_STEP_NUM_TASKS="10")
    assert found() == given


def test_a_slurm_step_of_one_task_a_rank_is_understood() -> None:
    os.environ.update(SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="1", MASTER_ADDR="n1", MASTER_PORT="5")
    assert found() == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "5"}


def test_a_process_without_a_launcher_is_alone() -> None:
    ranks = found()
    assert {name: ranks[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }


def test_half_a_launcher_is_refused() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="2")
    with pytest.raises(RecipeError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"):
        find_ranks()
