"""From recipes to a plan: windows are chosen and read, and the origin of every byte of the outputs is found."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

from typing_extensions import Unpack

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.dtypes import BY_NAME
from wsm_ds.engine.threads import workers_for
from wsm_ds.errors import OutputExists, RecipeError, VerificationFailed
from wsm_ds.filesystem.durable import require_absent
from wsm_ds.layouts.detection import OnFiles
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.outputs.resharding.form import RequestedForm
from wsm_ds.outputs.safetensors import plan_safetensors
from wsm_ds.outputs.save_folder import copied_files, output_tag
from wsm_ds.outputs.zero_checkpoint import OutputFiles, OutputWindow, plan_zero_checkpoint
from wsm_ds.planning import intersect
from wsm_ds.planning import plan as plan_module
from wsm_ds.planning.arguments import Recipe, recipes_of
from wsm_ds.planning.memory import PlanningMemory
from wsm_ds.planning.one_save import FindProblem, problem_of
from wsm_ds.planning.plan import CopySegment, InputFile, InputNumber, Output, OutputFile, OutputNumber, Plan, Source
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.planning.recipe_options import RecipeOptions
from wsm_ds.planning.streams import ElementRequest, SourceTables, carry_streams, element_streams, source_tables
from wsm_ds.planning.window import ReadLayout, Window, recorded_window, select_window, union_of, with_carried
from wsm_ds.planning.window_recipe import WindowRecipe
from wsm_ds.publishing.identity import is_of_run, is_same_merge, is_same_recipe, stated
from wsm_ds.publishing.manifest import description, read_manifest
from wsm_ds.publishing.staging_folder import discard, unfinished_merge
from wsm_ds.torchfile import archive

log = logging.getLogger(__name__)

PLAN_MODULES: tuple[ModuleType, ...] = (plan_module, intersect, archive)
"""Where the classes of a plan are defined."""


def plan_merge(
    recipes: Recipe | Sequence[MergeRecipe] | None = None,
    /,
    *,
    read: ReadLayout | None = None,
    find_problem: FindProblem = problem_of,
    on_files: OnFiles = lambda done, total: None,
    **options: Unpack[RecipeOptions],
) -> Plan:
    """Plans what `merge` would do. Reads metadata only, and writes nothing.

    An output that the same merge has already made is left out. If all are, the plan has no outputs. A killed merge
    keeps the checkpoints with which it began, even if the run has newer ones now.

    Args:
        recipes: one or several; several are made in one pass, and every source is read once. Or the run's folder.
        read: reads a checkpoint's metadata; None: `read_layout`. A caller that plans again and again
            passes a function that keeps them.
        find_problem: says why a checkpoint's files are not of one save; the same holds.
        on_files: called with the number of files whose metadata was read, and the number of all of them as far as it is
            known.
        options: the fields of one `MergeRecipe`, instead of `recipes`.

    Raises:
        RecipeError: the options are not a valid recipe, or two outputs have the same folder.
        CheckpointNotFound, WindowError, LayoutMismatch: the checkpoints are not a window that can be merged.
        BrokenCheckpoint, UnsupportedLayout, UnsafePickle: a checkpoint cannot be read.
        BudgetTooSmall: the memory budget is smaller than the smallest unit of work, or than what the plan needs.
        OutputExists: the recipe's `out` exists and is not an output of this merge.
    """
    all_recipes = recipes_of(recipes, options)
    memory = PlanningMemory(all_recipes, read, on_files)
    read_once, warn = cache(memory.read), cache(log.warning)  # several windows may skip the same checkpoint
    windows = [_window(recipe, read_once, warn, find_problem) for recipe in all_recipes]
    plan = plan_windows(all_recipes, windows)
    remaining = [number for number, recipe in enumerate(all_recipes) if not _is_made(plan, number, recipe.out)]
    if len(remaining) < len(all_recipes):
        plan = plan_windows([all_recipes[number] for number in remaining], [windows[number] for number in remaining])
    return replace(plan, planning_bytes=memory.needed)


def shared_plan(recipes: Sequence[MergeRecipe], ranks: Ranks, on_files: OnFiles = lambda done, total: None) -> Plan:
    """Plans a merge on rank 0 alone, and returns the plan on every rank: metadata are read once.

    Ranks: all.

    Args:
        recipes: the same on every rank.
        ranks: those of a launcher, or this process alone.
        on_files: see `plan_merge`; called on rank 0.

    Raises:
        WsmError: on rank 0, see `plan_merge`.
        RecipeError: rank 0 has other recipes.
        PeerFailed: on the other ranks, the same error; or rank 0 is gone.
    """
    asked = [
        {**stated(recipe.model_dump(mode="json")), "run": str(recipe.run), "out": str(recipe.out)} for recipe in recipes
    ]
    ranks.agree("recipes", json.dumps(asked, sort_keys=True))
    plan: Plan = ranks.share(lambda: plan_merge(recipes, on_files=on_files), PLAN_MODULES)
    return plan


def _window(recipe: MergeRecipe, read: ReadLayout, warn: Callable[..., None], find_problem: FindProblem) -> Window:
    """The window with which a killed merge of this recipe began, or else the one that the recipe chooses now."""
    window = _summed_window(recipe, read, warn, find_problem)
    if recipe.carry_from is None:
        return window
    return with_carried(window, recipe.carry_from, read, frozenset(recipe.allow_globals))


def _summed_window(
    recipe: MergeRecipe, read: ReadLayout, warn: Callable[..., None], find_problem: FindProblem
) -> Window:
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
    summed = union_of(windows)
    # The last one gives the names; the order of the others does not count.
    carried = {window.carried.path: window.carried for window in windows if window.carried is not None}
    layouts = (*(carried[path] for path in carried.keys() - {layout.path for layout in summed}), *summed)
    tables = source_tables(layouts)
    layout_numbers = {layout.path: number for number, layout in enumerate(layouts)}
    inputs, files, requests, outputs = tables.inputs, list[OutputFile](), list[ElementRequest](), list[Output]()
    reads_states = any(map(_reads_states, recipes))
    for number, (recipe, window) in enumerate(zip(recipes, windows, strict=True)):
        members = tuple(layout_numbers[layout.path] for layout in window.layouts)
        coefficients = tuple(window.coefficients.tolist())
        carried_number = None if window.carried is None else layout_numbers[window.carried.path]
        output_window = OutputWindow(OutputNumber(number), members, coefficients, len(files), carried_number)
        planned, texts = _files(tables, output_window, recipe, reads_states)
        names = {file.name for file in planned.files} | set(texts)
        paths = copied_files(recipe, window.origin, sidecar_names)
        copies, copied_inputs = _copies(OutputNumber(number), paths, len(inputs), names)
        files += [*planned.files, *copies]
        inputs += copied_inputs
        requests += planned.requests
        outputs.append(output_of(recipe, window, recipe.out, texts))
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


def output_of(recipe: WindowRecipe, window: Window, out: Path, texts: dict[str, str]) -> Output:
    """Describes an output of a plan.

    Args:
        recipe: asks for it.
        window: gives it.
        out: its folder.
        texts: small files of its root, by name.
    """
    return Output(
        out=out,
        sources=tuple(
            Source(layout.path.resolve(), layout.tag, layout.step, coefficient)
            for layout, coefficient in zip(window.layouts, window.coefficients.tolist(), strict=True)
        ),
        curve=recipe.curve or "given coefficients",
        ess=window.figures.ess,
        lag_steps=window.figures.mean_age.steps,
        texts=texts,
        recipe=recipe.model_dump(mode="json"),
        matched_names=tuple(match.to_json() for match in window.matched_names),
        figures=window.figures.to_json(),
        samples=window.course.samples,
        tokens=window.course.tokens,
        carried=None if window.carried is None else window.carried.path.resolve(),
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
