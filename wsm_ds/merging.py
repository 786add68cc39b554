"""The merge: plan → bytes → published outputs. One call from Python, one command from a shell."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from typing_extensions import Unpack

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.engine.reader import check_unchanged
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.engine.tasks import share, tasks_of
from wsm_ds.engine.threads import run_tasks, workers_for
from wsm_ds.engine.timings import Timings
from wsm_ds.errors import RecipeError
from wsm_ds.filesystem.capacity import disk_usage_bytes, require_disk, require_memory
from wsm_ds.filesystem.durable import write_text
from wsm_ds.filesystem.locks import hold_shared
from wsm_ds.merge_planning import plan_merge
from wsm_ds.planning.arguments import Recipe, recipe_of
from wsm_ds.planning.plan import Plan
from wsm_ds.planning.recipe import MergeRecipe, one_recipe
from wsm_ds.planning.recipe_options import ExportOptions, RecipeOptions, ReshardOptions, StrPath
from wsm_ds.publishing.manifest import description, make_manifest, read_manifest
from wsm_ds.publishing.staging_folder import Staging, commit, staged
from wsm_ds.torchfile import require_readable

log = logging.getLogger(__name__)

CHECKPOINT_FILES = "*/*.pt"
"""Files of a checkpoint in an output, in contrast to those that are copied to stand beside it."""
Progress = Callable[[int], None]
"""Called with the bytes that were read and written since the last call."""


@dataclass(frozen=True)
class MergeOutcome:
    """The result of `run_plan`.

    Attributes:
        manifests: one per output, in the plan's order; empty on all ranks but rank 0.
        timings: seconds of this process's threads, by kind of work.
    """

    manifests: tuple[dict[str, Any], ...]
    timings: Timings


@dataclass(frozen=True)
class MergeResult:
    """One finished output.

    Attributes:
        out: its folder.
        manifest: the content of its `wsm_merge.json`: recipe, sources, coefficients, files with checksums.
        is_new: False if the same merge had already made it, so that nothing was done.
        timings: of the pass that made it together with all other outputs of the call.
    """

    out: Path
    manifest: dict[str, Any]
    is_new: bool
    timings: Timings


def run_plan(
    plan: Plan, on_bytes: Progress = lambda nbytes: None, *, ranks: Ranks | None = None, restart: bool = False
) -> MergeOutcome:
    """Writes and publishes a plan's outputs.

    Every output appears whole, or not at all. Sources are opened read-only. After a kill, the same call goes on.

    Ranks: all, inside `ranks.together()`; each runs its share of the plan, rank 0 publishes.

    Args:
        plan: the same on every rank.
        on_bytes: called with the bytes that were read and written since the last call.
        ranks: those of a launcher; None: this process alone.
        restart: whether to remove the staging folder of another, unfinished merge to the same output.

    Raises:
        OutputExists: an output exists, or another, unfinished merge has its staging folder there.
        OutputLocked: another process writes the output now.
        UnsafePath: another user's folder, a link, or a file of somebody else is where the output is staged.
        NonFiniteValue, LayoutMismatch, BrokenCheckpoint: a source holds a NaN, has other frozen tensors, or changed.
        InsufficientCapacity: the disk or the memory is too small.
        PeerFailed: another rank failed.
        OSError: the disk is full or fails.
    """
    ranks = ranks or Ranks()
    if not plan.outputs:
        return MergeOutcome((), Timings())
    stagings = [Staging(output.out) for output in plan.outputs]
    descriptions = [description(plan, number) for number in range(len(plan.outputs))]
    # Rank 0 makes the staging folders after all ranks have planned: else a late rank would try to continue a merge.
    ranks.barrier("planned")
    with ExitStack() as stack:
        require_memory(plan.memory_bytes)
        files = StagedFiles(plan, [s.content for s in stagings], [s.folder for s in stagings], ranks.rank)
        if ranks.rank == 0:
            stack.enter_context(hold_shared(plan.marks()))
            for output, described in zip(plan.outputs, descriptions, strict=True):
                stack.enter_context(staged(output.out, described, restart=restart))
            _require_disk(plan, stagings)
            files.create()
        ranks.barrier("start")
        for output, described in zip(plan.outputs, descriptions, strict=True):
            ranks.agree(str(output.out), described["identity"])  # each rank has made its plan by itself
        timings = _write(plan, files, ranks, on_bytes)
        manifests = _publish(plan, files, stagings) if ranks.rank == 0 else ()
        ranks.barrier("published")
    return MergeOutcome(manifests, timings)


def _write(plan: Plan, files: StagedFiles, ranks: Ranks, on_bytes: Progress) -> Timings:
    """Runs this rank's share of the tasks. Returns when the files of all ranks are on the disk."""
    workers = workers_for(plan, plan.memory_bytes, plan.threads)
    files.open()
    try:
        tasks = share(tasks_of(plan), ranks.rank, ranks.world_size)
        timings = run_tasks(plan, tasks, files, workers, on_bytes, ranks.check)
        ranks.barrier("written")
        files.seal_rest(ranks.rank, ranks.world_size)
        files.sync()
        check_unchanged(plan.inputs)
        ranks.barrier("synced")
    finally:
        files.close()
    return timings


def _publish(plan: Plan, files: StagedFiles, stagings: Sequence[Staging]) -> tuple[dict[str, Any], ...]:
    """Finishes every output before the first appears."""
    manifests = []
    for number, (output, staging) in enumerate(zip(plan.outputs, stagings, strict=True)):
        written = files.finish(number)
        allowed = frozenset(output.recipe.get("allow_globals") or ())
        checkpoint_files = (file.name for file in written if PurePath(file.name).match(CHECKPOINT_FILES))
        require_readable((staging.content / name for name in checkpoint_files), allowed)
        for name, text in output.texts.items():
            write_text(staging.content / name, text)
        manifests.append(make_manifest(plan, number, written))
    for staging, manifest in zip(stagings, manifests, strict=True):
        commit(staging, manifest)
    return tuple(manifests)


def _require_disk(plan: Plan, stagings: Sequence[Staging]) -> None:
    """Checks the free space of each file system; outputs on the same one need their sum."""
    needs: dict[int, tuple[Path, int, int]] = {}
    for number, staging in enumerate(stagings):
        files = [file for _, file in plan.files_of(number)]
        device = staging.folder.stat().st_dev
        folder, nbytes, count = needs.get(device, (staging.folder.parent, 0, 0))
        missing = max(0, sum(file.nbytes for file in files) - disk_usage_bytes(staging.content))
        needs[device] = (folder, nbytes + missing, count + len(files))
    for folder, nbytes, count in needs.values():
        require_disk(folder, nbytes, count, "the merge")


def merge(recipe: Recipe | None = None, /, **options: Unpack[RecipeOptions]) -> MergeResult:
    """Merges the checkpoints of a recipe, or of its fields as keywords.

    Example:
        merge("RUN", last=8, curve="1-sqrt", out="MERGED").manifest["sources"]

    Args:
        recipe: the recipe, or the run's folder.
        options: the fields of a `MergeRecipe`, instead of a recipe.

    Raises:
        RecipeError: a value is wrong, or both a recipe and options are given.
        WsmError: see `plan_merge` and `run_plan`.
    """
    (result,) = merge_all([recipe_of(recipe, options)])
    return result


def merge_all(recipes: Sequence[MergeRecipe]) -> tuple[MergeResult, ...]:
    """Makes several outputs in one pass: every source is read once. See `make_recipes`.

    Returns:
        One result per recipe, in their order.

    Raises:
        WsmError: see `plan_merge` and `run_plan`.
    """
    plan = plan_merge(recipes)
    new_outputs = {output.out for output in plan.outputs}
    timings = run_plan(plan).timings
    return tuple(
        MergeResult(recipe.out, read_manifest(recipe.out), recipe.out in new_outputs, timings) for recipe in recipes
    )


def export(run: StrPath, *, out: StrPath, tag: str | None = None, **options: Unpack[ExportOptions]) -> MergeResult:
    """Writes one checkpoint's fp32 masters, rounded to `dtype`, as safetensors.

    Args:
        run: the run's folder.
        out: the folder to make; it must not exist.
        tag: the checkpoint's name; None: the newest complete one.
        options: see `MergeRecipe`.

    Raises:
        WsmError: see `plan_merge` and `run_plan`.

    Example:
        export("RUN", out="MODEL", dtype="bf16")
    """
    if (written := dict(options).get("format")) is not None:
        raise RecipeError(f"`format` ({written}): export writes safetensors; call reshard or merge.")
    return merge(one_recipe(run, out=out, tag=tag, format="safetensors", **options))


def reshard(run: StrPath, *, out: StrPath, tag: str | None = None, **options: Unpack[ReshardOptions]) -> MergeResult:
    """Writes one checkpoint for another `world_size` or ZeRO `stage`, or in the form of another checkpoint (`like`).

    Args:
        run: the run's folder.
        out: the folder to make; it must not exist.
        tag: the checkpoint's name; None: the newest complete one.
        options: see `MergeRecipe`.

    Raises:
        WsmError: see `plan_merge` and `run_plan`.

    Example:
        reshard("RUN", out="RUN64", world_size=64)
    """
    return merge(one_recipe(run, out=out, tag=tag, **options))
