"""A rank that gives ds_configs to DeepSpeed, and reports what it says.

Its argument is JOBS.json, a list of {"config": …}; it writes to JOBS.json.rank{r}, for each job, the error that
`deepspeed.initialize` ends with, or the gradient clipping of the engine. `deepspeed_runs.launch` starts it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch

import wsm_ds  # noqa: F401  registers WSMLR

deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}  # no op is compiled (a minute, and a lock)


def outcome(config: dict[str, Any]) -> dict[str, Any]:
    model = torch.nn.Linear(4, 4)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config={"train_micro_batch_size_per_gpu": 1} | config
        )
    except Exception as error:  # whatever it is, it is the answer
        return {"error": type(error).__name__, "message": str(error)}
    return {
        "clipping": engine.gradient_clipping(),
    }


if __name__ == "__main__":
    jobs_file = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    reports = [outcome(job["config"]) for job in json.loads(jobs_file.read_text())]
    Path(f"{jobs_file}.rank{os.environ['RANK']}").write_text(json.dumps(reports))
