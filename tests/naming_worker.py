"""One training, saved after every update under the names that frameworks and scripts use. Jobs: `ds_worker.py`."""

from pathlib import Path
from typing import Any

from ds_worker import build_engine, run_jobs, train_steps  # prepares DeepSpeed for CPU


def do_save_as(job: dict[str, Any]) -> dict[str, Any]:
    """After update i, saves each of job["names"][i - 1], paths SAVE_DIR/TAG below job["run"]."""
    engine = build_engine(job)
    for step, names in enumerate(job["names"], start=1):
        train_steps(engine, step - 1, 1)
        for name in names:
            path = Path(job["run"], name)
            engine.save_checkpoint(str(path.parent), tag=path.name)
    return {}


if __name__ == "__main__":
    run_jobs({"save_as": do_save_as})
