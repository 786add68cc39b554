"""A checkpoint of another number of ranks, or of another ZeRO stage, rewritten so that DeepSpeed loads it.

DeepSpeed refuses it ("The checkpoint being loaded used a DP world size of 2 but the current world size is 4"): each of
its files is the partition of one rank. Its own way, a universal checkpoint, restores neither buffers nor frozen
parameters, and costs a conversion. So all ranks of the job write the checkpoint anew in its native form, sharing the
work by bytes; it lies in RUN/job until it is loaded, and takes as much room as one checkpoint for so long.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.layouts import Layout
from wsm_ds.merging import one_recipe, plan_merge, run_plan
from wsm_ds.outputs.resharding.form import DEFAULT_SUB_GROUP_SIZE, zero_config
from wsm_ds.torchfile import open_torch_file
from wsm_ds.training.job import JobFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What must be equal for DeepSpeed to load a checkpoint. `sub_group_size` counts in stage 3 alone."""

    stage: int
    world_size: int
    sub_group_size: int | None

    @property
    def words(self) -> str:
        """For people."""
        return f"ZeRO-{self.stage} on {self.world_size} ranks"


def shape_of_layout(layout: Layout) -> Shape:
    """How a checkpoint was saved."""
    return Shape(layout.stage, layout.world_size, _sub_group_size(layout) if layout.stage == 3 else None)


def shape_of_engine(engine: Any) -> Shape:
    """How an engine would save."""
    stage = int(engine.zero_optimization_stage())
    return Shape(stage, int(engine.dp_world_size), int(engine.zero_sub_group_size()) if stage == 3 else None)


def _sub_group_size(layout: Layout) -> int:
    model = next(archive.path for archive in layout.archives if archive.path.name.endswith("model_states.pt"))
    size = zero_config(open_torch_file(model).tree).get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)
    return int(size) if isinstance(size, int | float) else DEFAULT_SUB_GROUP_SIZE


def resharded_folder(job: JobFolder, tag: str, shape: Shape) -> Path:
    """Where the rewritten checkpoint lies until it is loaded."""
    return job.folder / f"resharded-{tag}-zero{shape.stage}-{shape.world_size}-ranks"


def reshard_together(checkpoint: Path, shape: Shape, out: Path, ranks: Ranks) -> None:
    """Writes `checkpoint` in another form to `out`; goes on where a killed attempt stopped.

    Ranks: all.

    Raises:
        UnsupportedLayout: the checkpoint's form cannot be changed (the reason is named).
        InsufficientCapacity: the disk or the memory is too small.
        PeerFailed: another rank failed.
    """
    with ranks.together():
        recipe = one_recipe(
            checkpoint.parent,
            out=out,
            tag=checkpoint.name,
            stage=shape.stage,
            world_size=shape.world_size,
            sub_group_size=shape.sub_group_size,
        )
        ranks.barrier("met")
        plan = plan_merge(recipe)
        run_plan(plan, ranks=ranks)


def remove_resharded(job: JobFolder, but: Path | None = None) -> None:
    """Removes rewritten checkpoints, and what is left of unfinished ones. Ranks: rank 0."""
    for folder in [*job.folder.glob("resharded-*"), *job.folder.glob(".resharded-*.wsm-staging")]:
        if but is None or folder.name not in (but.name, f".{but.name}.wsm-staging"):
            shutil.rmtree(folder, ignore_errors=True)
