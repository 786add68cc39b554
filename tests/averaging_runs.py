"""Runs with snapshots, each made once by real engines."""

import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from deepspeed_runs import launch


def slot_run(folder: Path, *, ends: Sequence[int], stage: int, kind: str = "mean", changes_at: int = 0) -> Path:
    """RUN/snapshots with slots that end at these steps, as a copy in `folder`; one rank, warmup of two steps."""
    snapshots = _written(tuple(ends), stage, kind, changes_at)
    shutil.copytree(snapshots, folder / "run" / "snapshots")
    return folder / "run" / "snapshots"


@cache
def _written(ends: tuple[int, ...], stage: int, kind: str, changes_at: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="slots"))
    engine = {"stage": stage, "dtype": "bf16", "engine": "noisy"}
    job = {"do": "ends", "run": str(folder / "run"), "ends": ends, "kind": kind, "changes_at": changes_at, **engine}
    launch([job], world_size=1, folder=folder, worker="averaging_worker.py")
    return folder / "run" / "snapshots"
