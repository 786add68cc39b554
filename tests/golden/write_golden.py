"""Writes the golden checkpoints anew with the DeepSpeed that is installed: `python tests/golden/write_golden.py`.

Run it by hand, with torch and DeepSpeed, when the set of runs below changes; then update the literal values in
`tests/layouts/test_golden.py`. The tests themselves need neither torch nor DeepSpeed.

`RUN/global_step1` and `RUN/global_step2` are what DeepSpeed wrote from two ranks. `masters.npz` holds the whole fp32
parameters of each checkpoint, as `torch.load` and a literal concatenation of the partitions give them, under
`RUN/TAG/NAME`: our reader has no part in it.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import torch  # noqa: E402
from deepspeed_runs import launch  # noqa: E402
from reference import whole  # noqa: E402

TAGS = ("global_step1", "global_step2")
RUNS: dict[str, dict[str, Any]] = {
    "stage0_fp32": {"stage": 0, "dtype": "fp32"},
    "zero1_bf16": {"stage": 1, "dtype": "bf16"},
    "bf16_optimizer": {"stage": 1, "dtype": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "zero2_bf16": {"stage": 2, "dtype": "bf16"},
    "zero3_bf16": {"stage": 3, "dtype": "bf16", "zero": {"sub_group_size": 40}},
}
"""Jobs of `ds_worker.py`. Stage 3 has several sub-groups in a parameter group."""


def write_runs(root: Path, scratch: Path) -> None:
    """Lets DeepSpeed write every run. Scripts that it copies into a run's folder are deleted."""
    common = {"do": "train", "width": 4, "steps": 2, "every": 1, "warmup": 0}
    jobs = [common | job | {"run": str(root / name)} for name, job in RUNS.items()]
    launch(jobs, world_size=2, folder=scratch)
    for script in root.glob("*/*.py"):
        script.unlink()


def masters(checkpoint: Path, stage: int) -> dict[str, torch.Tensor]:
    """The whole fp32 parameters of a checkpoint, by name."""
    if stage:
        return whole(checkpoint, stage, kinds=())["master"]
    model = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
    return {name: tensor for name, tensor in model["module"].items() if tensor.dtype == torch.float32}


def main() -> None:
    """Replaces the runs and `masters.npz` in this folder."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "golden")
        write_runs(root, Path(scratch))
        arrays = {
            f"{name}/{tag}/{parameter}": tensor.detach().numpy()
            for name, job in RUNS.items()
            for tag in TAGS
            for parameter, tensor in masters(root / name / tag, job["stage"]).items()
        }
        for name in RUNS:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(root / name, FOLDER / name)
    np.savez_compressed(FOLDER / "masters.npz", **arrays)


if __name__ == "__main__":
    main()
