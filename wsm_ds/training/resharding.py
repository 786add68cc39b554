"""Rewrites a checkpoint of another number of ranks, or of another ZeRO stage, so that DeepSpeed loads it.

DeepSpeed refuses such a checkpoint ("The checkpoint being loaded used a DP world size of 2 but the current world size
is 4"), because each file holds the partition of one rank. DeepSpeed's own way, a universal checkpoint, restores neither
buffers nor frozen parameters, and needs a conversion as well. So all ranks of the job together write a native
checkpoint in the form of the engine, and share the work by bytes. The rewritten checkpoint lies in RUN/job until it is
loaded. It needs as much disk space as one checkpoint.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.layouts import Layout
from wsm_ds.merge_planning import shared_plan
from wsm_ds.merging import run_plan
from wsm_ds.outputs.resharding.form import DEFAULT_SUB_GROUP_SIZE, zero_config
from wsm_ds.planning.recipe import one_recipe
from wsm_ds.torchfile import open_torch_file
from wsm_ds.training.job import JobFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineForm:
    """The form of a checkpoint, as far as it must be equal to the engine's for DeepSpeed to load it.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        world_size: data-parallel ranks.
        sub_group_size: of stage 3, in elements, as in DeepSpeed's config; None in other stages.
    """

    stage: int
    world_size: int
    sub_group_size: int | None

    def __str__(self) -> str:
        return f"ZeRO-{self.stage} on {self.world_size} ranks"


def form_of_layout(layout: Layout) -> EngineForm:
    """Returns the form of a checkpoint."""
    return EngineForm(layout.stage, layout.world_size, _sub_group_size(layout) if layout.stage == 3 else None)


def form_of_engine(engine: Any) -> EngineForm:
    """Returns the form in which a DeepSpeed engine saves and loads."""
    stage = int(engine.zero_optimization_stage())
    return EngineForm(stage, int(engine.dp_world_size), int(engine.zero_sub_group_size()) if stage == 3 else None)


def _sub_group_size(layout: Layout) -> int:
    model = next(archive.path for archive in layout.archives if archive.path.name.endswith("model_states.pt"))
    size = zero_config(open_torch_file(model).tree).get("sub_group_size", DEFAULT_SUB_GROUP_SIZE)
    return int(size) if isinstance(size, int | float) else DEFAULT_SUB_GROUP_SIZE


def resharded_folder(job: JobFolder, tag: str, target: EngineForm) -> Path:
    """Returns the folder in which the rewritten checkpoint lies until it is loaded."""
    return job.folder / f"resharded-{tag}-zero{target.stage}-{target.world_size}-ranks"


def reshard_together(checkpoint: Path, target: EngineForm, out: Path, ranks: Ranks) -> None:
    """Rewrites a checkpoint in another form. Continues what a killed attempt has written.

    Args:
        checkpoint: RUN/TAG.
        target: the form of the engine that will load it.
        out: the folder to write.
        ranks: the processes that share the work, in an object for this call alone.

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
            stage=target.stage,
            world_size=target.world_size,
            sub_group_size=target.sub_group_size,
        )
        ranks.barrier("met")
        plan = shared_plan([recipe], ranks)
        run_plan(plan, ranks=ranks)


def remove_resharded(job: JobFolder, keep: Path | None = None) -> None:
    """Removes rewritten checkpoints and their staging folders, finished or not.

    Args:
        job: the run's.
        keep: a rewritten checkpoint that stays, with its staging folder: an attempt will finish or load it.

    Ranks: rank 0.
    """
    for folder in [*job.folder.glob("resharded-*"), *job.folder.glob(".resharded-*.wsm-staging")]:
        if keep is None or folder.name not in (keep.name, f".{keep.name}.wsm-staging"):
            shutil.rmtree(folder, ignore_errors=True)
