"""Reads the metadata of a run's checkpoints, and whether each of them is complete."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import Interrupted, WsmError
from wsm_ds.layouts import Checkpoint, Layout, find_checkpoints, read_layout
from wsm_ds.layouts.order import in_order
from wsm_ds.layouts.run import find_tag
from wsm_ds.planning.one_save import problem_of
from wsm_ds.planning.recipe_options import StrPath


@dataclass(frozen=True, slots=True)
class Inspected:
    """The metadata of one checkpoint.

    Attributes:
        checkpoint: the checkpoint's tag and folder, and which framework wrote it.
        layout: its layout; None if it is incomplete or cannot be read.
        problem: why there is no layout, or what shows that its files are not of one save; None if all is well.
    """

    checkpoint: Checkpoint
    layout: Layout | None
    problem: str | None

    @property
    def is_complete(self) -> bool:
        """Whether all its files are there, and of one save."""
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """Returns the metadata as plain data for JSON, without the tensors.

        `bytes` counts all files of the checkpoint. `parameters` counts tied parameters once.
        """
        layout = self.layout
        description: dict[str, Any] = {
            "tag": self.checkpoint.tag,
            "path": str(self.checkpoint.path),
            "saved_by": self.checkpoint.saved_by,
            "save_folder": str(self.checkpoint.save_folder),
            "links": list(self.checkpoint.links),
            "is_complete": self.is_complete,
        }
        if self.problem is not None:
            description["problem"] = self.problem
        if layout is None:
            return description
        if layout.snapshot is not None:
            description["snapshot"] = layout.snapshot.to_json()
        return description | {
            "step": layout.step,
            "zero_stage": layout.stage,
            "dtype": layout.dtype.name,
            "world_size": layout.world_size,
            "model_parallel_size": layout.model_parallel_size,
            "parameters": layout.numel,
            "bytes": layout.nbytes,
            # JSON has no NaN and no infinity.
            "learning_rates": [
                rate if rate is None or math.isfinite(rate) else str(rate) for rate in layout.learning_rates
            ],
            "warmup_num_steps": layout.warmup_num_steps,
            "optimizer_states": list(layout.state_names),
            "indivisible_optimizer_states": layout.indivisible_states,
        }

    def details(self) -> dict[str, Any]:
        """Returns `to_json` with every tensor (name, shape, dtype, role) and what else the state dict holds."""
        if self.layout is None:
            return self.to_json()
        tensors = {
            name: {"shape": list(info.shape), "dtype": info.dtype.name, "role": info.role}
            for name, info in self.layout.tensors.items()
        }
        others = {"extra_states": list(self.layout.extra_states), "opaque": self.layout.opaque}
        return self.to_json() | {"tensors": tensors, "tied": self.layout.aliases} | others


def inspect_run(run: StrPath, tag: str | None = None, allow_globals: frozenset[str] = frozenset()) -> list[Inspected]:
    """Reads the metadata of a run's checkpoints. It reads no tensor and executes no pickle.

    A checkpoint that is incomplete or cannot be read is not an error: its `problem` says why.

    Memory: the layouts of all checkpoints together. `inspect_checkpoints` gives one after the other.

    Args:
        run: the run's folder, which was passed to `save_checkpoint`.
        tag: the tag of one checkpoint; default: all checkpoints.
        allow_globals: full names ("module.Class") that pickles may refer to beside the known ones. They are never
            imported.

    Returns:
        One object for each checkpoint, in the order of their steps, the oldest first.

    Raises:
        CheckpointNotFound: the run does not exist, or holds no such checkpoint; names the checkpoints that exist.
    """
    return list(inspect_checkpoints(checkpoints_of(run, tag), allow_globals))


def checkpoints_of(run: StrPath, tag: str | None = None) -> list[Checkpoint]:
    """Lists the checkpoints of a run in the order of their steps, the oldest first. Reads one file of each.

    Args:
        run: as in `inspect_run`.
        tag: as in `inspect_run`.

    Raises:
        CheckpointNotFound: see `inspect_run`.
    """
    folder = Path(run)
    checkpoints = [find_tag(folder, tag)] if tag else find_checkpoints(folder)
    return [dated.checkpoint for dated in in_order(checkpoints)]


def inspect_checkpoints(checkpoints: Iterable[Checkpoint], allow_globals: frozenset[str]) -> Iterator[Inspected]:
    """Reads the metadata of one checkpoint after the other.

    Memory: the layout of one checkpoint, if the caller keeps none. Checkpoints that are alike share their tables.

    Args:
        checkpoints: their folders.
        allow_globals: as in `inspect_run`.

    Yields:
        One object for each checkpoint, as soon as it is read.
    """
    for checkpoint in checkpoints:
        yield inspect_checkpoint(checkpoint, allow_globals)


def inspect_checkpoint(checkpoint: Checkpoint, allow_globals: frozenset[str]) -> Inspected:
    """Reads the metadata of one checkpoint, and samples of its weights. That it cannot be read is not an error.

    Args:
        checkpoint: its folder.
        allow_globals: as in `inspect_run`.
    """
    try:
        layout = read_layout(checkpoint, allow_globals)
        return Inspected(checkpoint, layout, problem_of(layout))
    except Interrupted:
        raise
    except WsmError as error:
        return Inspected(checkpoint, None, str(error))
