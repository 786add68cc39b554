"""Runs of eight checkpoints, held-out tokens, and requests to tune them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_folder, train
from deepspeed_runs import launch
from tuned import loss_of, write_tokens

WIDTHS = {"narrow": 9, "twice_as_wide": 18}


@pytest.fixture(scope="session")
def long_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/narrow` and `RUNS/twice_as_wide`: ZeRO-2, bf16, two ranks, global_step2, 4, … 16."""
    with run_folder("long_runs", tmp_path_factory) as (root, is_made):
        if not is_made:
            jobs = [
                train(root / name, stage=2, dtype="bf16", steps=16) | {"width": width} for name, width in WIDTHS.items()
            ]
            launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.fixture
def request_of(long_runs: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes a request for a tuning; keywords replace what it says."""
    from wsm_ds.tuning.request import make_request

    def make(**values: Any) -> Any:
        common = {
            "run": long_runs / "narrow",
            "out": tmp_path / "tuning",
            "windows": ("2", "4", "8"),
            "curves": ("linear", "1-sqrt"),
            "screening": loss_of(write_tokens(tmp_path / "held_out.npy")),
            "model": "ds_models:TinyModel",
        }
        return make_request(**{**common, **values})

    return make
