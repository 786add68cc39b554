"""Runs that DeepSpeed wrote, made once a test session."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import launch

STAGES, DTYPES = (1, 2, 3), ("bf16", "fp16", "fp32")


def train(run: Path, *, stage: int, dtype: str, steps: int) -> dict[str, Any]:
    """A job of `ds_worker.py`: a run that saves every second step."""
    return {"do": "train", "stage": stage, "dtype": dtype, "steps": steps, "every": 2, "run": str(run)}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w2_s{stage}_{dtype}` with global_step2, 4, 6 from two ranks; one of them also in HF Trainer's folders."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [
        train(root / f"w2_s{stage}_{dtype}", stage=stage, dtype=dtype, steps=6) for stage in STAGES for dtype in DTYPES
    ]
    trainer = train(root / "hf", stage=2, dtype="bf16", steps=4) | {"hf": True}
    reports = launch([*jobs, trainer], world_size=2, folder=tmp_path_factory.mktemp("train"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=False):
            Path(job["run"], f"losses.rank{rank}.json").write_text(json.dumps(report["losses"]))
    return root


@pytest.fixture(scope="session")
def other_world_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w{world_size}_s{stage}`, bf16, global_step2 and 4, from 1, 3 and 4 ranks."""
    root = tmp_path_factory.mktemp("world_sizes")
    for world_size in (1, 3, 4):
        jobs = [train(root / f"w{world_size}_s{stage}", stage=stage, dtype="bf16", steps=4) for stage in STAGES]
        launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"))
    return root


COMPILE = """
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion
for make in (FusedAdam, DeepSpeedCPUAdam, DeepSpeedCPULion):
    make([torch.nn.Parameter(torch.ones(1))])
"""


@pytest.fixture(scope="session")
def compiled_ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DeepSpeed's CPU optimizers, compiled once by one process, in a folder of this session where no old lock lies."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or str(tmp_path_factory.mktemp("torch_extensions"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        patch.setenv("DS_ACCELERATOR", "cpu")
        subprocess.run([sys.executable, "-c", COMPILE], check=True, capture_output=True, timeout=600)
        yield
