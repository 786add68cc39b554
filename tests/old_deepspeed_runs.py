"""Installs a version of DeepSpeed beside the environment's own, and starts ranks that import it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked import as_torchrun, free_port

WORKER = Path(__file__).with_name("old_deepspeed_worker.py")
PATIENCE_S = 900.0
CPU = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1"}


def install(version: str, folder: Path) -> None:
    """Builds the source archive from PyPI and puts DeepSpeed alone into a folder.

    What DeepSpeed needs is in the environment already: the newest version needs no less than the older ones.
    """
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder)]  # its setup.py imports torch
    command = [sys.executable, "-m", "pip", "install", *options, f"deepspeed=={version}"]
    subprocess.run(command, check=True, env=os.environ | CPU)


def launch(jobs: list[dict[str, Any]], *, deepspeed: Path, world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Does `jobs` in `world_size` new processes with the DeepSpeed of a folder; returns each rank's reports."""
    folder.mkdir()
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    common = os.environ | CPU | {"PYTHONPATH": str(deepspeed), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                environment = common | as_torchrun(rank, world_size)
                command = [sys.executable, str(WORKER), str(jobs_file)]
                ranks.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output))
        for process, log in zip(ranks, logs, strict=True):
            assert process.wait(PATIENCE_S) == 0, log.read_text()[-9000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [json.loads(Path(f"{jobs_file}.rank{rank}").read_text()) for rank in range(world_size)]
