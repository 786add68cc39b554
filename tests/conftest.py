"""Runs that DeepSpeed wrote, made once a test session."""

from pathlib import Path

import pytest
from deepspeed_runs import launch

STAGES, DTYPES = (1, 2, 3), ("bf16", "fp16", "fp32")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w2_s{stage}_{dtype}` with global_step2, 4, 6 from two ranks; one of them also in HF Trainer's folders."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [
        {
            "do": "train",
            "stage": stage,
            "dtype": dtype,
            "steps": 6,
            "every": 2,
            "run": str(root / f"w2_s{stage}_{dtype}"),
        }
        for stage in STAGES
        for dtype in DTYPES
    ]
    trainer = {"do": "train", "stage": 2, "dtype": "bf16", "steps": 4, "every": 2, "run": str(root / "hf"), "hf": True}
    launch([*jobs, trainer], world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.fixture(scope="session")
def other_world_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w{world_size}_s{stage}`, bf16, global_step2 and 4, from 1, 3 and 4 ranks."""
    root = tmp_path_factory.mktemp("world_sizes")
    for world_size in (1, 3, 4):
        jobs = [
            {
                "do": "train",
                "stage": stage,
                "dtype": "bf16",
                "steps": 4,
                "every": 2,
                "run": str(root / f"w{world_size}_s{stage}"),
            }
            for stage in STAGES
        ]
        launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"))
    return root
