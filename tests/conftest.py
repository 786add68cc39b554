"""Runs that DeepSpeed wrote, made once a test session."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import DTYPES, STAGES, launch
from hypothesis import HealthCheck, settings
from marks import pytest_collection_modifyitems, pytest_configure, pytest_ignore_collect

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_ignore_collect"]

# A shared machine may be slow at any moment. No test is timed.
settings.register_profile("without a clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without a clock")
KEPT_RUNS = "WSM_TEST_RUNS"
"""A folder in which `runs` and `other_world_sizes` stay from one test session to the next; unset: made in each."""
LONG_RUNS = {"narrow": 9, "twice_as_wide": 18}
"""Their widths."""
WIDE = ((2, "bf16"), (2, "fp32"), (3, "bf16"))


def train(run: Path, *, stage: int, dtype: str, steps: int) -> dict[str, Any]:
    """A job of `ds_worker.py`: a run that saves every second step."""
    return {"do": "train", "stage": stage, "dtype": dtype, "steps": steps, "every": 2, "run": str(run)}


@contextmanager
def run_folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it has its runs from an earlier session)."""
    if KEPT_RUNS not in os.environ:
        yield tmp_path_factory.mktemp(name), False
        return
    writers = [Path(__file__).with_name(name) for name in ("conftest.py", "ds_worker.py", "ds_models.py")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in writers))
    key.update(f"{version('torch')} {version('deepspeed')}".encode())
    folder = Path(os.environ[KEPT_RUNS], f"{name}-{key.hexdigest()[:16]}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / ".made"
        yield folder / name, made.exists()
        made.touch()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w2_s{stage}_{dtype}` with global_step2, 4, 6 from two ranks; one of them also in HF Trainer's folders.

    `RUNS/wide_s{stage}_{dtype}` have one checkpoint of 0.6 M trained parameters, whose files are mostly numbers.
    """
    with run_folder("runs", tmp_path_factory) as (root, is_made):
        if not is_made:
            make_runs(root, tmp_path_factory.mktemp("train"))
    return root


def make_runs(root: Path, folder: Path) -> None:
    """What the fixture `runs` says."""
    jobs = [
        train(root / f"w2_s{stage}_{dtype}", stage=stage, dtype=dtype, steps=6) for stage in STAGES for dtype in DTYPES
    ]
    trainer = train(root / "hf", stage=2, dtype="bf16", steps=4) | {"hf": True}
    wide = [
        train(root / f"wide_s{stage}_{dtype}", stage=stage, dtype=dtype, steps=2)
        | {"width": 400, "zero": {"sub_group_size": 10**9}}
        for stage, dtype in WIDE
    ]
    reports = launch([*jobs, trainer, *wide], world_size=2, folder=folder)
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=False):
            Path(job["run"], f"losses.rank{rank}.json").write_text(json.dumps(report["losses"]))


@pytest.fixture(scope="session")
def other_world_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/w{world_size}_s{stage}`, bf16, global_step2 and 4, from 1, 3 and 4 ranks."""
    with run_folder("world_sizes", tmp_path_factory) as (root, is_made):
        for world_size in () if is_made else (1, 3, 4):
            jobs = [train(root / f"w{world_size}_s{stage}", stage=stage, dtype="bf16", steps=4) for stage in STAGES]
            launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.fixture(scope="session")
def long_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/narrow` and `RUNS/twice_as_wide`: ZeRO-2, bf16, two ranks, global_step2, 4, … 16."""
    with run_folder("long_runs", tmp_path_factory) as (root, is_made):
        if not is_made:
            jobs = [
                train(root / name, stage=2, dtype="bf16", steps=16) | {"width": width}
                for name, width in LONG_RUNS.items()
            ]
            launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
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
