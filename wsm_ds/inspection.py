"""What a run's folder holds: every checkpoint, and whether it is whole."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import WsmError
from wsm_ds.layouts import Checkpoint, Layout, find_checkpoints, read_layout
from wsm_ds.layouts.run import find_tag


@dataclass(frozen=True)
class Inspected:
    """A checkpoint and its layout, or why it has none."""

    checkpoint: Checkpoint
    layout: Layout | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain data. Bytes are those of all files; parameters count tied ones once."""
        layout = self.layout
        head = {
            "tag": self.checkpoint.tag,
            "path": str(self.checkpoint.path),
            "is_complete": layout is not None,
        }
        if layout is None:
            return head | {"problem": self.problem}
        return head | {
            "step": layout.step,
            "zero_stage": layout.stage,
            "dtype": layout.dtype.name,
            "world_size": layout.world_size,
            "model_parallel_size": layout.model_parallel_size,
            "parameters": layout.numel,
            "bytes": layout.nbytes,
            "learning_rates": list(layout.learning_rates),
            "warmup_num_steps": layout.warmup_num_steps,
            "optimizer_states": list(layout.state_names),
        }

    def details(self) -> dict[str, Any]:
        """`to_json` and every tensor of the checkpoint."""
        if self.layout is None:
            return self.to_json()
        tensors = {
            name: {"shape": list(info.shape), "dtype": info.dtype.name, "role": info.role}
            for name, info in self.layout.tensors.items()
        }
        return self.to_json() | {"tensors": tensors, "tied": self.layout.aliases}


def inspect_run(
    run: str | os.PathLike[str], tag: str | None = None, allow_globals: frozenset[str] = frozenset()
) -> list[Inspected]:
    """Reads the metadata of every checkpoint of `run`, or of the one called `tag`, oldest first.

    Raises:
        CheckpointNotFound: there is none.
    """
    checkpoints = [find_tag(Path(run), tag)] if tag else find_checkpoints(Path(run))
    return [_inspect(checkpoint, allow_globals) for checkpoint in checkpoints]


def _inspect(checkpoint: Checkpoint, allow_globals: frozenset[str]) -> Inspected:
    try:
        return Inspected(checkpoint, read_layout(checkpoint, allow_globals), None)
    except WsmError as error:
        return Inspected(checkpoint, None, str(error))
