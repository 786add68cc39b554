"""Starts a worker (`ds_worker.py`, `trainer_worker.py`) under torchrun and collects what its ranks reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
STAGES, DTYPES = (1, 2, 3), ("bf16", "fp16", "fp32")


def launch(
    jobs: list[dict[str, Any]], *, world_size: int, folder: Path, worker: str = "ds_worker.py"
) -> list[list[dict[str, Any]]]:
    """Runs `jobs` in one set of processes of `worker`; returns each rank's reports, one a job."""
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    done = subprocess.run(
        [*command, str(TESTS / worker), str(jobs_file)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(Path(f"{jobs_file}.rank{rank}").read_text()) for rank in range(world_size)]
