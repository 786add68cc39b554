"""Runs that DeepSpeed wrote, made once a test session."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import DTYPES, STAGES, launch

WIDE = ((2, "bf16"), (2, "fp32"), (3, "bf16"))


def train(run: Path, *, stage: int, dtype: str, steps: int) -> dict[str, Any]:
    """A job of `ds_worker.py`: a run that saves every second step."""
    return {"do": "train", "stage": stage, "dtype": dtype, "steps": steps, "every": 2, "run": str(run)}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w2_s{stage}_{dtype}` with global_step2, 4, 6 from two ranks; one of them also in HF Trainer's folders.

    `RUNS/wide_s{stage}_{dtype}` have one checkpoint of 0.6 M trained parameters, whose files are mostly numbers.
    """
    root = tmp_path_factory.mktemp("runs")
    jobs = [
        train(root / f"w2_s{stage}_{dtype}", stage=stage, dtype=dtype, steps=6) for stage in STAGES for dtype in DTYPES
    ]
    trainer = train(root / "hf", stage=2, dtype="bf16", steps=4) | {"hf": True}
    wide = [
        train(root / f"wide_s{stage}_{dtype}", stage=stage, dtype=dtype, steps=2)
        | {"width": 400, "zero": {"sub_group_size": 10**9}}
        for stage, dtype in WIDE
    ]
    reports = launch([*jobs, trainer, *wide], world_size=2, folder=tmp_path_factory.mktemp("train"))
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


COMPILED = (
    "deepspeed.ops.adam:FusedAdam",
    "deepspeed.ops.adam:DeepSpeedCPUAdam",
    "deepspeed.ops.lion:DeepSpeedCPULion",
)
COMPILE = "import sys, torch, pkgutil; pkgutil.resolve_name(sys.argv[1])([torch.nn.Parameter(torch.ones(1))])"


@pytest.fixture(scope="session")
def compiled_ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DeepSpeed's CPU optimizers, each compiled once by one process, in a folder of this session without old locks."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or str(tmp_path_factory.mktemp("torch_extensions"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        patch.setenv("DS_ACCELERATOR", "cpu")
        started = [subprocess.Popen([sys.executable, "-c", COMPILE, name]) for name in COMPILED]
        try:
            assert [process.wait(timeout=900) for process in started] == [0, 0, 0]
        finally:
            for process in started:
                process.kill()
        yield
