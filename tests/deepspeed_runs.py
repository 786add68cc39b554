"""Starts the ranks of a worker (`ds_worker.py`, `trainer_worker.py`) and collects what they reported."""

import json
import os
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from forked import ENVIRONMENT, TESTS, as_torchrun, fork, free_port

STAGES, DTYPES = (1, 2, 3), ("bf16", "fp16", "fp32")
PATIENCE_S = 900.0


def launch(
    jobs: list[dict[str, Any]], *, world_size: int, folder: Path, worker: str = "ds_worker.py"
) -> list[list[dict[str, Any]]]:
    """Runs `jobs` in one set of processes of `worker`; returns each rank's reports, one a job."""
    jobs_file, log = folder / "jobs.json", folder / "ranks.log"
    jobs_file.write_text(json.dumps(jobs))
    common = os.environ | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        fork(TESTS / worker, [str(jobs_file)], common | as_torchrun(rank, world_size), folder=folder, log=log)
        for rank in range(world_size)
    ]
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        while (codes := [rank.exitcode for rank in ranks]) != [0] * world_size:
            assert set(codes) <= {None, 0}, log.read_text()[-9000:]
            running = [rank.sentinel for rank, code in zip(ranks, codes, strict=True) if code is None]
            ended = wait(running, deadline_s - time.monotonic())
            assert ended, f"the ranks have not ended in {PATIENCE_S:g} s\n{log.read_text()[-9000:]}"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [json.loads(Path(f"{jobs_file}.rank{rank}").read_text()) for rank in range(world_size)]
