"""The merge: recipes → plan → bytes → published outputs. One call from Python, one command from a shell."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from typing_extensions import Unpack

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.dtypes import BY_NAME
from wsm_ds.engine.reader import check_unchanged
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.engine.tasks import share, tasks_of
from wsm_ds.engine.threads import run_tasks, workers_for
from wsm_ds.engine.timings import Timings
from wsm_ds.errors import OutputExists, RecipeError, VerificationFailed
from wsm_ds.filesystem.capacity import disk_usage_bytes, require_disk, require_memory
from wsm_ds.filesystem.durable import require_absent, write_text
from wsm_ds.filesystem.locks import hold_shared
from wsm_ds.layouts import read_layout
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.outputs.resharding.form import RequestedForm
from wsm_ds.outputs.safetensors import plan_safetensors
from wsm_ds.outputs.save_folder import copied_files, output_tag
from wsm_ds.outputs.zero_checkpoint import OutputFiles, OutputWindow, plan_zero_checkpoint
from wsm_ds.planning.arguments import Recipe, recipe_of, recipes_of
from wsm_ds.planning.one_save import FindProblem, problem_of
from wsm_ds.planning.plan import CopySegment, InputFile, InputNumber, Output, OutputFile, OutputNumber, Plan, Source
from wsm_ds.planning.recipe import MergeRecipe, one_recipe
from wsm_ds.planning.recipe_options import ExportOptions, RecipeOptions, ReshardOptions, StrPath
from wsm_ds.planning.streams import ElementRequest, SourceTables, carry_streams, element_streams, source_tables
from wsm_ds.planning.window import ReadLayout, Window, recorded_window, select_window, union_of
from wsm_ds.publishing.identity import is_of_run, is_same_merge, is_same_recipe
from wsm_ds.publishing.manifest import description, make_manifest, read_manifest
from wsm_ds.publishing.staging_folder import Staging, commit, discard, staged, unfinished_merge
from wsm_ds.schedules.coefficients import effective_sample_size, lag
from wsm_ds.torchfile import require_readable

log = logging.getLogger(__name__)

CHECKPOINT_FILES = "*/*.pt"
"""Files of a checkpoint in an output, in contrast to those that are copied to stand beside it."""
Progress = Callable[[int], None]
"""Called with the bytes that were read and written since the last call."""


def plan_merge(
    recipes: Recipe | Sequence[MergeRecipe] | None = None,
    /,
    *,
    read: ReadLayout = read_layout,
    find_problem: FindProblem = problem_of,
    **options: Unpack[RecipeOptions],
) -> Plan:
    """Plans what `merge` would do. Reads metadata only, and writes nothing.

    An output that the same merge has already made is left out. If all are, the plan has no outputs. A killed merge
    keeps the checkpoints with which it began, even if the run has newer ones now.

    Args:
        recipes: one or several; several are made in one pass, and every source is read once. Or the run's folder.
        read: reads a checkpoint's metadata; a caller that plans again and again passes a function that keeps them.
        find_problem: says why a checkpoint's files are not of one save; the same holds.
        options: the fields of one `MergeRecipe`, instead of `recipes`.

    Raises:
        RecipeError: the options are not a valid recipe, or two outputs have the same folder.
        CheckpointNotFound, WindowError, LayoutMismatch: the checkpoints are not a window that can be merged.
        BrokenCheckpoint, UnsupportedLayout, UnsafePickle: a checkpoint cannot be read.
        BudgetTooSmall: the memory budget is smaller than the smallest unit of work.
        OutputExists: the recipe's `out` exists and is not an output of this merge.
    """
    all_recipes = recipes_of(recipes, options)
    read_once, warn = cache(read), cache(log.warning)  # several windows may skip the same checkpoint
    windows = [_window(recipe, read_once, warn, find_problem) for recipe in all_recipes]
    plan = plan_windows(all_recipes, windows)
    remaining = [number for number, recipe in enumerate(all_recipes) if not _is_made(plan, number, recipe.out)]
    if len(remaining) == len(all_recipes):
        return plan
    return plan_windows([all_recipes[number] for number in remaining], [windows[number] for number in remaining])


def _window(recipe: MergeRecipe, read: ReadLayout, warn: Callable[..., None], find_problem: FindProblem) -> Window:
    """The window with which a killed merge of this recipe began, or else the one that the recipe chooses now."""
    unfinished = unfinished_merge(recipe.out)
    if unfinished is not None:
        fields = recipe.model_dump(mode="json")
        if is_same_recipe(unfinished["recipe"], fields) and is_of_run(unfinished, recipe.run):
            return recorded_window(unfinished["sources"], recipe, read)
    elif not (recipe.out / MANIFEST).is_file():
        require_absent(recipe.out)
    return select_window(recipe, read, warn, find_problem)


def _is_made(plan: Plan, number: int, out: Path) -> bool:
    """Whether the same merge has already made this output. If so, removes the rest of its staging folder."""
    if not (out / MANIFEST).is_file():
        require_absent(out)
        return False
    try:
        is_same = is_same_merge(read_manifest(out), description(plan, number))
    except VerificationFailed:
        is_same = False
    if not is_same:
        raise OutputExists(f"{out} exists and is another merge; nothing is ever overwritten. Choose another --out.")
    discard(out)
    return True


def plan_windows(
    recipes: Sequence[MergeRecipe], windows: Sequence[Window], sidecar_names: frozenset[str] | None = None
) -> Plan:
    """Plans recipes whose windows are known.

    Args:
        recipes: one per output.
        windows: one per recipe.
        sidecar_names: names of the files to copy from those that a framework keeps beside a checkpoint; None: all.
    """
    if not recipes:
        return Plan((), (), (), (), (), 0, 1)
    layouts = union_of(windows)
    tables = source_tables(layouts)
    layout_numbers = {layout.path: number for number, layout in enumerate(layouts)}
    inputs, files, requests, outputs = tables.inputs, list[OutputFile](), list[ElementRequest](), list[Output]()
    reads_states = any(map(_reads_states, recipes))
    for number, (recipe, window) in enumerate(zip(recipes, windows, strict=True)):
        members = tuple(layout_numbers[layout.path] for layout in window.layouts)
        output_window = OutputWindow(OutputNumber(number), members, tuple(window.coefficients.tolist()), len(files))
        planned, texts = _files(tables, output_window, recipe, reads_states)
        names = {file.name for file in planned.files} | set(texts)
        paths = copied_files(recipe, window.layouts[-1], sidecar_names)
        copies, copied_inputs = _copies(OutputNumber(number), paths, len(inputs), names)
        files += [*planned.files, *copies]
        inputs += copied_inputs
        requests += planned.requests
        outputs.append(_output(recipe, window, texts))
    streams = element_streams(tables, requests) + carry_streams(inputs, files)
    budget = int(recipes[0].memory_budget)
    plan = Plan(tuple(outputs), inputs, tuple(files), tuple(streams), tables.names, budget, recipes[0].threads)
    workers_for(plan, budget, recipes[0].threads)  # raises BudgetTooSmall before the plan is shown
    return plan


def _reads_states(recipe: MergeRecipe) -> bool:
    """Whether an output reads optimizer states element by element, and does not copy them with whole files."""
    is_resharded = recipe.format == "universal" or recipe.like is not None
    is_resharded |= any(value is not None for value in (recipe.world_size, recipe.stage, recipe.sub_group_size))
    return recipe.optimizer_states == "merge" or (is_resharded and recipe.optimizer_states == "carry")


def _files(
    tables: SourceTables, window: OutputWindow, recipe: MergeRecipe, reads_states: bool
) -> tuple[OutputFiles, dict[str, str]]:
    """The files of one output that the engine makes, and its small text files by name."""
    if recipe.format == "safetensors":
        dtype = BY_NAME[recipe.dtype] if recipe.dtype else None
        return plan_safetensors(tables, window, dtype, int(recipe.max_shard_size), recipe.rename)
    is_universal = recipe.format == "universal"
    form = RequestedForm(is_universal, recipe.stage, recipe.world_size, recipe.sub_group_size, recipe.like)
    tag = output_tag(window.newest(tables), recipe.format)
    allowed = frozenset(recipe.allow_globals)
    files = plan_zero_checkpoint(tables, window, tag, recipe.optimizer_states, allowed, form, reads_states=reads_states)
    return files, {"latest_universal" if is_universal else "latest": tag}


def _output(recipe: MergeRecipe, window: Window, texts: dict[str, str]) -> Output:
    steps = [layout.step for layout in window.layouts]
    return Output(
        out=recipe.out,
        sources=tuple(
            Source(layout.path.resolve(), layout.tag, layout.step, coefficient)
            for layout, coefficient in zip(window.layouts, window.coefficients.tolist(), strict=True)
        ),
        curve=recipe.curve or "given coefficients",
        ess=effective_sample_size(window.coefficients),
        lag_steps=lag(window.coefficients, steps),
        texts=texts,
        recipe=recipe.model_dump(mode="json"),
        matched_names=tuple(match.to_json() for match in window.matched_names),
    )


def _copies(
    output: OutputNumber, paths: tuple[Path, ...], first_input: int, used_names: set[str]
) -> tuple[tuple[OutputFile, ...], tuple[InputFile, ...]]:
    """Files to copy, as files of the output and as inputs; the first input's number is `first_input`."""
    copies, inputs = [], []
    for number, path in enumerate(paths):
        if not path.is_file() or path.name in used_names | {MANIFEST}:
            raise RecipeError(f"include: {path} is not a file, or the output has a {path.name} already.")
        used_names = used_names | {path.name}
        status = path.stat()
        inputs.append(InputFile(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        segments = (CopySegment(0, status.st_size, InputNumber(first_input + number), 0),) if status.st_size else ()
        copies.append(OutputFile(output, path.name, status.st_size, segments, ()))
    return tuple(copies), tuple(inputs)


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
        for file in written:
            if PurePath(file.name).match(CHECKPOINT_FILES):
                require_readable(staging.content / file.name, allowed)
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
