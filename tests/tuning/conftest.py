"""Requests to tune a run of eight checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuned import loss_of, write_tokens


@pytest.fixture
def request_of(long_runs: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes a request for a tuning; keywords replace what it says."""
    from wsm_ds.tuning.request import make_tuning_request

    def make(**values: Any) -> Any:
        common = {
            "run": long_runs / "narrow",
            "out": tmp_path / "tuning",
            "windows": ("2", "4", "8"),
            "curves": ("linear", "1-sqrt"),
            "screening": loss_of(write_tokens(tmp_path / "held_out.npy")),
            "model": "ds_models:TinyModel",
        }
        return make_tuning_request(**{**common, **values})

    return make
