"""A merge straight into a live model: the engine's sums go into the tensors of a torch module, without a file.

The tensors get the bits that `export` (of several checkpoints: `merge` into safetensors) writes and `load_state_dict`
reads. The sources are only read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from typing_extensions import TypedDict, Unpack

from wsm_ds.dtypes import BY_NAME
from wsm_ds.engine.live_tensors import LiveTensors
from wsm_ds.engine.model_tensors import (
    Tensors,
    copies_of,
    copy_bytes,
    copy_into,
    described,
    require_fillable,
    tensors_of,
)
from wsm_ds.engine.reader import check_unchanged
from wsm_ds.engine.tasks import tasks_of
from wsm_ds.engine.threads import run_into, workers_for
from wsm_ds.engine.timings import Timings
from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, NonFiniteValue, RecipeError, WsmError, few
from wsm_ds.filesystem.capacity import require_memory
from wsm_ds.filesystem.locks import hold_shared
from wsm_ds.layouts import Layout
from wsm_ds.merge_planning import output_of
from wsm_ds.outputs.live_model import Filling, fill, plan_live_model
from wsm_ds.outputs.zero_checkpoint import OutputWindow
from wsm_ds.planning.memory import PlanningMemory
from wsm_ds.planning.one_save import problem_of
from wsm_ds.planning.plan import Output, OutputFile, OutputNumber, Plan
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.planning.recipe_errors import check_replacements
from wsm_ds.planning.recipe_options import StrPath, WindowOptions
from wsm_ds.planning.streams import ElementRequest, element_streams, source_tables
from wsm_ds.planning.window import Window, select_window, union_of
from wsm_ds.planning.window_recipe import WindowRecipe, make_window_recipe
from wsm_ds.sizes import parse_size

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PARAMETER_DTYPES = ("bf16", "fp16", "fp32")
IN_MEMORY = Path("memory")
"""Stands for the folder of an output that has none."""
Progress = Callable[[int], None]
"""Called with the bytes that were read and made since the last call."""
DATA_ERRORS = (NonFiniteValue, BrokenCheckpoint, LayoutMismatch)
"""What only the elements tell, when they are read."""


class FillOptions(TypedDict, total=False):
    """How a merge goes into a model.

    Attributes:
        dtype: to which the parameters are rounded before the model takes them, as in `export`; None: the dtype that
            each had in the training. A parameter of another dtype then converts them.
        rename: regular expressions and their replacements, applied to every name of the checkpoints, in order.
        allow_missing: names of the model, or patterns with * and ?, that the checkpoints need not have. These tensors
            stay as they are.
        allow_surplus: names of the checkpoints (after `rename`), or patterns, that the model need not have.
        on_bytes: called with the bytes that were read and made since the last call.
    """

    dtype: Literal["bf16", "fp16", "fp32"] | None
    rename: Mapping[str, str] | None
    allow_missing: Sequence[str]
    allow_surplus: Sequence[str]
    on_bytes: Progress


class LoadOptions(WindowOptions, FillOptions, total=False):
    """Options of `load_merge`: which sum (see `WindowRecipe`), and how it goes into the model."""


@dataclass(frozen=True)
class LoadedMerge:
    """What a model in memory holds now.

    Attributes:
        output: the checkpoints, their coefficients and what describes them, as of any other output.
        identity: SHA-256, in hex, of the sources with their coefficients, and of the dtype: equal ones give equal bits.
        kept: names of the model that the checkpoints do not have; these tensors are as they were.
        left_out: names of the checkpoints that the model does not have.
        read_bytes: that the pass has read, for all its models together.
        timings: of that pass.
    """

    output: Output
    identity: str
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    read_bytes: int
    timings: Timings


@dataclass(frozen=True)
class ChosenWindow:
    """A recipe, and the checkpoints that it chooses.

    Attributes:
        recipe: the recipe.
        window: the checkpoints and their coefficients.
    """

    recipe: WindowRecipe
    window: Window

    @property
    def output(self) -> Output:
        """The checkpoints and what describes their coefficients, as of any other output."""
        return output_of(self.recipe, self.window, IN_MEMORY, {})

    def identity(self, dtype: str | None = None) -> str:
        """SHA-256, in hex, of the sources with their coefficients, and of `dtype`: equal ones give equal bits.

        Paths, sizes and times of the files stand for their content.

        Args:
            dtype: see `FillOptions`.
        """
        content = {
            "dtype": dtype,
            "rename_sources": self.recipe.rename_sources,
            "sources": [
                [
                    str(layout.path.resolve()),
                    coefficient,
                    [[a.path.name, a.nbytes, a.mtime_ns] for a in layout.archives],
                ]
                for layout, coefficient in zip(self.window.layouts, self.window.coefficients.tolist(), strict=True)
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_merge(
    model: torch.nn.Module, recipe: WindowRecipe | StrPath | None = None, /, **options: Unpack[LoadOptions]
) -> LoadedMerge:
    """Merges checkpoints into the parameters and persistent buffers of a model that is in memory.

    The model may be on the CPU or on an accelerator. Its tensors get the bits that `export` or `merge` (into
    safetensors) writes and `load_state_dict` reads. Tied tensors are filled once, under all their names, and frozen
    ones as all others. If an error is found while elements are read (a NaN, a damaged file), a part of the model is
    filled already: load it again.

    Example:
        load_merge(model, run="RUN", last=8, curve="1-sqrt")
        load_merge(model, run="RUN", tags=["global_step4000"])  # a checkpoint as it is

    Args:
        model: any module whose names, perhaps after `rename`, are those of the training.
        recipe: the sum, or the run's folder. `dtype` and `rename` of a `MergeRecipe` hold, too.
        options: the fields of a `WindowRecipe`, instead of a recipe; and `FillOptions`.

    Raises:
        RecipeError: a value is wrong, or both a recipe and its fields are given.
        ModelMismatch: the model does not fit the checkpoints, or cannot be filled; see `fill`, `require_fillable`.
        NonFiniteValue, LayoutMismatch, BrokenCheckpoint: a source holds a NaN, has other frozen tensors, or changed.
        BudgetTooSmall, InsufficientCapacity: the memory budget or the memory is too small.
        WsmError: the window cannot be merged, see `plan_merge`.

    Returns:
        What the model holds.

    Memory: the recipe's `memory_budget`, beside the model.
    """
    filling = cast("FillOptions", {key: value for key, value in options.items() if key in FillOptions.__annotations__})
    fields = {key: value for key, value in options.items() if key not in filling}
    chosen = _recipe_of(recipe, fields)
    if isinstance(chosen, MergeRecipe):
        filling = {"dtype": chosen.dtype, "rename": chosen.rename} | filling
    (loaded,) = load_merges([model], [chosen], **filling)
    return loaded


def load_merges(
    models: Sequence[torch.nn.Module], recipes: Sequence[WindowRecipe | ChosenWindow], **options: Unpack[FillOptions]
) -> tuple[LoadedMerge, ...]:
    """Merges into several models in one pass: every checkpoint is read once. See `load_merge`.

    Args:
        models: they share no memory.
        recipes: one for each model, see `choose_windows`; the first one's `memory_budget` and `threads` hold.
        options: see `FillOptions`.

    Raises:
        RecipeError: there are not as many recipes as models, or none.
        WsmError: see `load_merge`.

    Returns:
        What each model holds.
    """
    if len(models) != len(recipes) or not recipes:
        raise RecipeError(f"load_merges needs one recipe for each model; found {len(recipes)} for {len(models)}.")
    tensors = [tensors_of(model) for model in models]
    require_fillable(tensors)
    return _load(tensors, choose_windows(recipes), options, set())


def load_each(
    model: torch.nn.Module,
    recipes: Sequence[WindowRecipe | ChosenWindow],
    *,
    room: int | str = 1 << 30,
    **options: Unpack[FillOptions],
) -> Iterator[LoadedMerge | WsmError]:
    """Merges into one model again and again: with each recipe in turn, and few reads.

    One pass over the checkpoints makes as many merges as there is room for. The first one goes into the model, and the
    others wait in the CPU's memory until it is their turn.

    Example:
        for recipe, loaded in zip(recipes, load_each(model, recipes, room="8GiB")):
            ...  # the model holds the merge of this recipe, if `loaded` is no error

    Args:
        model: see `load_merge`.
        recipes: at least one, see `choose_windows`; the first one's `memory_budget` and `threads` hold.
        room: bytes, or text as "8GiB", for merges that wait. If it is smaller than the model's weights, each merge is
            made by a pass of its own.
        options: see `FillOptions`.

    Raises:
        WsmError: see `load_merge`. A recipe that cannot be planned raises before anything is read.

    Returns:
        An iterator. Each step tells what the model holds, for each recipe in order; or it gives the error that its
        elements raised (a NaN, a damaged file). Such an error costs this recipe alone: the others of its pass are made
        again, in smaller passes.

    Memory: the recipe's `memory_budget` and `room`, beside the model.
    """
    room_bytes = parse_size(room)
    if not recipes:
        raise RecipeError("load_each needs at least one recipe; found none.")
    tensors = tensors_of(model)
    require_fillable([tensors])
    chosen = choose_windows(recipes)
    _plan([tensors] * len(chosen), chosen, options)  # finds what does not fit before the first pass
    waiting = min(room_bytes // max(1, copy_bytes(tensors)), len(chosen) - 1)
    require_memory(int(chosen[0].recipe.memory_budget) + waiting * copy_bytes(tensors))
    return _passes([tensors, *(copies_of(tensors) for _ in range(waiting))], chosen, options)


def choose_windows(recipes: Sequence[WindowRecipe | ChosenWindow]) -> tuple[ChosenWindow, ...]:
    """Finds the checkpoints of recipes. The metadata of each checkpoint are read once, and nothing else.

    Args:
        recipes: at least one; the first one's `memory_budget` holds. What is chosen already stays as it is, even if the
            run has newer checkpoints now.

    Raises:
        WsmError: a window cannot be merged, see `plan_merge`.
    """
    asked = [one.recipe if isinstance(one, ChosenWindow) else one for one in recipes]
    memory = PlanningMemory(asked, None, lambda done, total: None)
    read_once, warn = cache(memory.read), cache(log.warning)
    problems: dict[Path, str | None] = {}

    def find_problem(layout: Layout) -> str | None:
        if layout.path not in problems:
            problems[layout.path] = problem_of(layout)
        return problems[layout.path]

    return tuple(
        one if isinstance(one, ChosenWindow) else ChosenWindow(one, select_window(one, read_once, warn, find_problem))
        for one in recipes
    )


def _recipe_of(recipe: WindowRecipe | StrPath | None, fields: Mapping[str, Any]) -> WindowRecipe:
    """The recipe that a call describes."""
    if isinstance(recipe, WindowRecipe):
        if fields:
            raise RecipeError(f"a recipe and {few(f'`{key}`' for key in fields)} are given; give one of them.")
        return recipe
    if recipe is not None and "run" in fields:
        raise RecipeError(f"the run is given twice: {recipe} and `run` ({fields['run']}).")
    run: dict[str, Any] = {} if recipe is None else {"run": recipe}
    return make_window_recipe(**run, **fields)


def _passes(
    sets: Sequence[Tensors], chosen: Sequence[ChosenWindow], options: FillOptions
) -> Iterator[LoadedMerge | WsmError]:
    reported = set[str]()
    for begin in range(0, len(chosen), len(sets)):
        yield from _each_of(sets, chosen[begin : begin + len(sets)], options, reported)


def _each_of(
    sets: Sequence[Tensors], chosen: Sequence[ChosenWindow], options: FillOptions, reported: set[str]
) -> Iterator[LoadedMerge | WsmError]:
    """Makes the merges of one pass, each in its own set of tensors, and copies them one by one into the first set."""
    try:
        loaded = _load(sets[: len(chosen)], chosen, options, reported)
    except DATA_ERRORS as error:
        if len(chosen) == 1:
            yield error
            return
        log.warning("one of %d merges cannot be made (%s); halves of them are tried", len(chosen), error)
        half = len(chosen) // 2
        for part in (chosen[:half], chosen[half:]):
            yield from _each_of(sets, part, options, reported)
        return
    for number, merge in enumerate(loaded):
        if number:
            copy_into(sets[0], sets[number], except_for=merge.kept)
        yield merge


def _load(
    models: Sequence[Tensors], chosen: Sequence[ChosenWindow], options: FillOptions, reported: set[str]
) -> tuple[LoadedMerge, ...]:
    """Fills each set of tensors with the sum of its window, in one pass. `reported`: what warnings have named."""
    plan, fillings = _plan(models, chosen, options)
    require_memory(plan.memory_bytes)
    workers = workers_for(plan, plan.memory_bytes, plan.threads)
    on_bytes = options.get("on_bytes") or (lambda nbytes: None)
    try:
        with hold_shared(plan.marks()):  # `prune` leaves the checkpoints alone
            timings = run_into(plan, tasks_of(plan), LiveTensors(plan, models), workers, reported, on_bytes)
            check_unchanged(plan.inputs)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{error.filename} is gone since the window was chosen.") from error
    return tuple(
        LoadedMerge(
            output, one.identity(options.get("dtype")), filling.kept, filling.left_out, plan.bytes_to_read, timings
        )
        for output, one, filling in zip(plan.outputs, chosen, fillings, strict=True)
    )


def _check_rename(rename: Mapping[str, str]) -> None:
    try:
        check_replacements(rename)
    except ValueError as error:
        raise RecipeError(f"`rename`: {error}") from error


def _patterns(options: FillOptions, key: Literal["allow_missing", "allow_surplus"]) -> Sequence[str]:
    patterns = options.get(key) or ()
    if isinstance(patterns, str):
        raise RecipeError(f"`{key}` is a list of names and patterns; found {patterns!r}. Write [{patterns!r}].")
    return patterns


def _plan(
    models: Sequence[Tensors], chosen: Sequence[ChosenWindow], options: FillOptions
) -> tuple[Plan, tuple[Filling, ...]]:
    """The plan whose outputs are the models."""
    dtype, rename = options.get("dtype"), options.get("rename") or {}
    if dtype is not None and dtype not in PARAMETER_DTYPES:
        raise RecipeError(f"`dtype` is one of {few(PARAMETER_DTYPES)}; found {dtype!r}.")
    _check_rename(rename)
    allowed = _patterns(options, "allow_missing"), _patterns(options, "allow_surplus")
    layouts = union_of([one.window for one in chosen])
    tables = source_tables(layouts)
    layout_numbers = {layout.path: number for number, layout in enumerate(layouts)}
    files, requests, fillings = list[OutputFile](), list[ElementRequest](), list[Filling]()
    for number, (tensors, one) in enumerate(zip(models, chosen, strict=True)):
        members = tuple(layout_numbers[layout.path] for layout in one.window.layouts)
        window = OutputWindow(OutputNumber(number), members, tuple(one.window.coefficients.tolist()), len(files))
        model = described(tensors)
        filling = fill(window.newest(tables), model, rename, *allowed)
        planned = plan_live_model(tables, window, filling, model, BY_NAME[dtype] if dtype else None)
        files += planned.files
        requests += planned.requests
        fillings.append(filling)
    recipe = chosen[0].recipe
    outputs = tuple(one.output for one in chosen)
    streams = tuple(element_streams(tables, requests))
    plan = Plan(outputs, tables.inputs, tuple(files), streams, tables.names, int(recipe.memory_budget), recipe.threads)
    workers_for(plan, plan.memory_bytes, plan.threads)  # raises BudgetTooSmall before anything is read
    return plan, tuple(fillings)
