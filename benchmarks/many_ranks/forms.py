"""The form of DeepSpeed's files: object trees of a run of two ranks, whose tensors are replaced to make larger runs."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

LLAMA = Path(__file__).with_name("llama.py")
STEP = 3
"""Of the checkpoint that gives the form."""
ARGUMENTS = {
    "zero2": ["--stage", "2"],
    "zero3": ["--stage", "3"],
    "moe": ["--stage", "2", "--experts", "4", "--ep", "2"],
}


@dataclass(frozen=True)
class Form:
    """A checkpoint of two ranks that DeepSpeed wrote.

    Attributes:
        folder: the checkpoint.
    """

    folder: Path

    @cached_property
    def _bytes(self) -> tuple[bytes, bytes]:
        (model, *_) = sorted(
            self.folder.glob("*mp_rank_00_model_states.pt"), key=lambda p: ("expert" in p.name, p.name)
        )
        (optimizer, *_) = sorted(self.folder.glob("*zero_pp_rank_0_*_optim_states.pt"))
        return model.read_bytes(), optimizer.read_bytes()

    def model(self) -> dict[str, Any]:
        """Returns the tree of rank 0's model file; a new one at each call."""
        return _load(self._bytes[0])

    def optimizer(self) -> dict[str, Any]:
        """Returns the tree of rank 0's optimizer file; a new one at each call."""
        return _load(self._bytes[1])


def _load(data: bytes) -> dict[str, Any]:
    import torch

    return dict(torch.load(io.BytesIO(data), weights_only=False, map_location="cpu"))


def form(kind: str, forms: Path) -> Form:
    """Returns the form of a kind of run. DeepSpeed trains it first, if `forms` does not hold it.

    Args:
        kind: "zero2", "zero3" or "moe".
        forms: the folder in which the runs of two ranks are kept.
    """
    run = forms / kind
    folder = run / f"global_step{STEP}"
    if not (run / "latest").is_file() or (run / "latest").read_text() != folder.name:
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(LLAMA)]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run([*ranks, "--out", str(run), *ARGUMENTS[kind]], check=True, env=environment)
    return Form(folder)
