"""From a recipe to its window: the checkpoints, their coefficients, and checks that they can be merged."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, WindowError, few
from wsm_ds.layouts import Checkpoint, Layout, find_checkpoints, read_layout
from wsm_ds.layouts.frameworks import UNIVERSAL
from wsm_ds.layouts.layout import are_copies
from wsm_ds.layouts.order import NUMBER, Dated, abandoned, in_order, require_one_series, without_universal_copies
from wsm_ds.layouts.run import deleted_steps, find_tag
from wsm_ds.planning.constant_rate import check_constant_rate
from wsm_ds.planning.names import MatchedNames, unused_rules, with_names_of_newest
from wsm_ds.planning.one_save import FindProblem, problem_of, require_one_save
from wsm_ds.planning.window_recipe import WindowRecipe
from wsm_ds.schedules.coefficients import check_coefficients, merge_coefficients
from wsm_ds.schedules.curves import parse_curve

log = logging.getLogger(__name__)

ReadLayout = Callable[[Checkpoint, frozenset[str]], Layout]
"""`read_layout`, or a function that caches its results."""


@dataclass(frozen=True)
class Window:
    """The checkpoints that are merged into one output.

    Attributes:
        layouts: by rising step, with the names of the newest.
        coefficients: one per layout, float64, with sum 1.
        matched_names: what was renamed in older layouts.
    """

    layouts: tuple[Layout, ...]
    coefficients: NDArray[np.float64]
    matched_names: tuple[MatchedNames, ...] = ()


def select_window(
    recipe: WindowRecipe,
    read: ReadLayout = read_layout,
    warn: Callable[..., None] = log.warning,
    find_problem: FindProblem = problem_of,
) -> Window:
    """Finds, reads and checks the checkpoints of a recipe. Reads metadata, and samples of the weights.

    Args:
        recipe: what the user asks for.
        read: reads a layout; a caller with several recipes passes a function that reads each checkpoint once.
        warn: logs that a checkpoint is skipped; a caller with several recipes passes a function that logs it once.
        find_problem: see `require_one_save`.

    Raises:
        CheckpointNotFound, BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
        WindowError: no checkpoint lies in the range, a step occurs twice, the window lies inside the warmup, or the
            learning rate changes in it. The message names the checkpoints.
        LayoutMismatch: the checkpoints do not hold the same model; the message names the differences.
        ForeignFiles: a checkpoint has files of another save.
    """
    layouts = sorted(_read_window(recipe, read, warn), key=lambda layout: layout.step)
    steps = [layout.step for layout in layouts]
    repeated = sorted({step for step in steps if steps.count(step) > 1})
    if repeated:
        tags = [layout.tag for layout in layouts if layout.step in repeated]
        raise WindowError(
            f"step {few(repeated)} is in the window more than once: {few(tags)}. A merge needs one checkpoint of each "
            "step: name only one of them (--tags A,B,…)."
        )
    if recipe.tags is None:
        _warn_of_several_series(layouts, warn)
    named, matched_names = with_names_of_newest(layouts, recipe.rename_sources)
    unused = unused_rules(layouts, recipe.rename_sources)
    if unused:
        warn(
            "--rename-sources %s matches no name in an older checkpoint of the window up to %s (the newest keeps its "
            "names)",
            few(unused),
            layouts[-1].tag,
        )
    if matched_names:
        warn("tensors have the names of %s, and were renamed in %s", layouts[-1].tag, few(matched_names, 2))
    for layout in named[:-1]:
        check_same_model(layout, named[-1])
    check_constant_rate(layouts, recipe.allow, warn)
    require_one_save(layouts, recipe.allow, find_problem)
    if layouts[-1].is_train_mode and not recipe.keeps_training_state:
        warn(
            "%s was saved in the training mode of a schedule-free optimizer: its weights are not the averaged ones, "
            "which one evaluates. Call optimizer.eval() before saving to get those.",
            layouts[-1].path,
        )
    return Window(named, _coefficients(recipe, steps), matched_names)


def _warn_of_several_series(layouts: Sequence[Layout], warn: Callable[..., None]) -> None:
    """Warns if the names of the checkpoints differ by more than numbers: two runs may have saved into one folder."""
    series = {NUMBER.sub("0", layout.tag.removesuffix(UNIVERSAL)): layout.tag for layout in layouts}
    if len(series) > 1:
        warn(
            "the window holds checkpoints with several kinds of names: %s. The files do not say whether they are of "
            "one training; if they are not, choose the checkpoints by tags (--tags A,B,…).",
            few(series.values()),
        )


def _coefficients(recipe: WindowRecipe, steps: list[int]) -> NDArray[np.float64]:
    """The coefficients that the recipe states, or those of its curve on the grid of the window's steps."""
    if recipe.coefficients is None:
        curve = parse_curve(recipe.curve or "linear")
        return merge_coefficients(curve, steps=steps, oldest_interval=recipe.oldest_interval, floor=recipe.floor)
    coefficients = check_coefficients(recipe.coefficients)
    if len(coefficients) != len(steps):
        raise WindowError(
            f"coefficients (--coefficients): {len(coefficients)} were given for {len(steps)} checkpoints, steps "
            f"{few(steps)}. Give one per checkpoint, oldest first."
        )
    return coefficients


def recorded_window(
    sources: Sequence[Mapping[str, Any]], recipe: WindowRecipe, read: ReadLayout = read_layout
) -> Window:
    """Reads the window again that a manifest or an interrupted merge has recorded.

    Args:
        sources: `step`, `tag`, `path` and `coefficient` of each checkpoint, as in the manifest.
        recipe: gives `allow_globals` and `rename_sources`.
        read: see `select_window`.

    Raises:
        CheckpointNotFound, BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
        LayoutMismatch: see `with_names_of_newest`.
    """
    allowed = frozenset(recipe.allow_globals)
    layouts = tuple(read(Checkpoint(source["tag"], Path(source["path"])), allowed) for source in sources)
    named, matched_names = with_names_of_newest(layouts, recipe.rename_sources)
    return Window(named, np.array([source["coefficient"] for source in sources]), matched_names)


def union_of(windows: Sequence[Window]) -> tuple[Layout, ...]:
    """Returns all checkpoints of several windows, each once, by rising step.

    Raises:
        LayoutMismatch: they do not hold the same model, or the newest checkpoints of the windows have different names;
            the message names the differences.
    """
    layouts: dict[Path, Layout] = {}
    for window in windows:
        for layout in window.layouts:
            # A plan has one list of names, and an output has the names of its own newest checkpoint.
            _require_same_names(layouts.setdefault(layout.path, layout), layout)
    for window in windows[1:]:
        _require_same_names(windows[0].layouts[-1], window.layouts[-1])
    ordered = sorted(layouts.values(), key=lambda layout: (layout.step, str(layout.path)))
    for layout in ordered[:-1] if len(windows) > 1 else ():
        check_same_model(layout, ordered[-1])
    return tuple(ordered)


def _require_same_names(one: Layout, other: Layout) -> None:
    is_same = one.names == other.names if one.path == other.path else set(one.names) == set(other.names)
    if not is_same:
        only = few(name for name in one.names if name not in other.tensors)
        raise LayoutMismatch(
            f"windows of one call need {one.path} and {other.path} with one list of tensor names, but only the former "
            f"has {only or 'this order'}. If they hold the same model, make the outputs of the windows in separate "
            "calls."
        )


def _read_window(recipe: WindowRecipe, read: ReadLayout, warn: Callable[..., None]) -> list[Layout]:
    """The layouts of the checkpoints that the recipe chooses by tags, by `last` or by a range of steps."""
    allowed = frozenset(recipe.allow_globals)
    if recipe.tags is not None:
        return [read(find_tag(recipe.run, tag), allowed) for tag in recipe.tags]
    checkpoints = find_checkpoints(recipe.run)
    require_one_series(recipe.run, checkpoints)
    dated = in_order(without_universal_copies(checkpoints))
    _require_none_abandoned(dated, recipe)
    if recipe.last is not None:
        return _newest_complete(dated, recipe, read, warn)
    return _in_range(dated, recipe, read, warn)


def _require_none_abandoned(dated: Sequence[Dated], recipe: WindowRecipe) -> None:
    """Raises WindowError if the window may hold a checkpoint that the training has left behind, see `abandoned`."""
    latest, left = abandoned(recipe.run, dated)
    low, high = recipe.from_step or 0, recipe.to_step
    tags = [d.checkpoint.tag for d in left if d.step is not None and low <= d.step and (high is None or d.step <= high)]
    if latest is not None and tags:
        raise WindowError(
            f"{recipe.run / 'latest'} names {latest.checkpoint.tag} (step {latest.step}), which was written after "
            f"{few(tags)}, although its step is smaller: the training went back to an earlier checkpoint, or its "
            "counter of steps was set back. So these may be of another course of the training. Choose a window "
            f"that ends at {latest.checkpoint.tag} (--to {latest.step}), or choose the checkpoints by tags "
            "(--tags A,B,…; they are ordered by their steps)."
        )


def _of_equal_step(dated: Iterable[Dated]) -> list[tuple[Dated, ...]]:
    """Groups dated checkpoints, which are in order. One of unknown step is a group of its own."""
    groups = groupby(dated, key=lambda d: d.checkpoint.tag if d.step is None else d.step)
    return [tuple(members) for _, members in groups]


def _in_range(
    dated: Sequence[Dated], recipe: WindowRecipe, read: ReadLayout, warn: Callable[..., None]
) -> list[Layout]:
    """The layouts from `recipe.from_step` to `recipe.to_step`."""
    low, high = recipe.from_step or 0, recipe.to_step or 0
    within = [d for d in dated if d.may_lie_in(low, high)]
    if not within:
        raise WindowError(f"{recipe.run} holds no checkpoint from step {low} to {high} (--from, --to); {_held(dated)}")
    for unknown in within:
        if unknown.step is None:
            raise unknown.why_it_counts()
    return [_read_step(group, recipe, read, warn) for group in _of_equal_step(within)]


def _read_step(members: Sequence[Dated], recipe: WindowRecipe, read: ReadLayout, warn: Callable[..., None]) -> Layout:
    """The layout of a step. If it was saved several times, broken saves and copies are left out.

    Raises:
        BrokenCheckpoint: none of its checkpoints is complete.
        WindowError: two of them hold different elements.
    """
    layouts: list[Layout] = []
    problems: list[tuple[Dated, BrokenCheckpoint]] = []
    # A copy that was made beside the series (`best`, `last.ckpt`) often has a name without a number.
    for dated in sorted(members, key=lambda d: not any(map(str.isdigit, d.checkpoint.tag))):
        try:
            layouts.append(read(dated.checkpoint, frozenset(recipe.allow_globals)))
        except BrokenCheckpoint as error:
            problems.append((dated, error))
    if not layouts:
        raise problems[0][1]
    for dated, problem in problems:
        warn("%s is skipped: %s", dated.checkpoint.tag, str(problem))
    for other in layouts[1:]:
        if not are_copies(layouts[0], other):
            raise WindowError(
                f"step {other.step} was saved more than once, as {few(d.checkpoint.tag for d in members)}, and their "
                "elements differ. Choose the checkpoints by tags (--tags A,B,…)."
            )
    return layouts[0]


def _held(dated: Sequence[Dated]) -> str:
    names = [f"{d.checkpoint.tag} (step {'unknown' if d.step is None else d.step})" for d in dated]
    return f"it holds {few(names)}."


def _newest_complete(
    dated: Sequence[Dated], recipe: WindowRecipe, read: ReadLayout, warn: Callable[..., None]
) -> list[Layout]:
    """The newest `recipe.last` layouts. Broken ones at the end of the run are skipped: they may not be complete yet."""
    layouts: list[Layout] = []
    skipped: list[tuple[str, BrokenCheckpoint]] = []
    candidates = [d for d in dated if recipe.to_step is None or d.earliest <= recipe.to_step]
    for group in reversed(_of_equal_step(candidates)):
        if len(layouts) == recipe.last:
            break
        newest = group[-1]
        try:
            if newest.problem is not None and len(group) == 1:
                raise newest.problem
            layouts.append(_read_step(group, recipe, read, warn))
        except BrokenCheckpoint as error:
            if layouts:
                raise BrokenCheckpoint(
                    f"{error} It is among the newest {recipe.last} checkpoints. Repair it, or choose the window "
                    "without it by tags (--tags A,B,…)."
                ) from error
            if not newest.is_placed and any(d.problem is None for d in candidates):
                raise newest.why_it_counts() from error
            skipped.append((newest.checkpoint.tag, error))
    _require_count(layouts, skipped, candidates, recipe)
    for tag, problem in skipped:
        warn("%s is skipped: %s", tag, str(problem))
    return layouts


def _require_count(
    layouts: Sequence[Layout],
    skipped: Sequence[tuple[str, BrokenCheckpoint]],
    candidates: Sequence[Dated],
    recipe: WindowRecipe,
) -> None:
    """Raises an error if there are fewer than `recipe.last` layouts, or if checkpoints between them were deleted."""
    until = "" if recipe.to_step is None else f" up to step {recipe.to_step}"
    if skipped and not layouts:
        tag, error = skipped[0]
        others = f" None of the other {len(skipped) - 1} checkpoints can be read, either." if len(skipped) > 1 else ""
        raise BrokenCheckpoint(f"{tag}, the newest checkpoint{until}, cannot be read: {error}{others}") from error
    if len(layouts) < (recipe.last or 0):
        reasons = f" Skipped: {few((problem for _, problem in skipped), 2)}" if skipped else ""
        raise WindowError(
            f"last (--last): {recipe.last} complete checkpoints{until} were asked for, but "
            f"{recipe.run} has {len(layouts)}; {_held(candidates)}{reasons}"
        )
    steps = [layout.step for layout in layouts]
    deleted = sorted(step for step in deleted_steps(recipe.run) - set(steps) if min(steps) < step < max(steps))
    if deleted:
        raise WindowError(
            f"the newest {recipe.last} checkpoints{until} of {recipe.run} are not all there any more: `wsm-ds prune` "
            f"has deleted {'step' if len(deleted) == 1 else 'steps'} {few(deleted)}. Choose the window by its steps "
            "(--from, --to), or by tags (--tags)."
        )


def check_same_model(older: Layout, newest: Layout) -> None:
    """Checks that two checkpoints hold the same model.

    Args:
        older: the older checkpoint.
        newest: the newest checkpoint of the window.

    Raises:
        LayoutMismatch: names, shapes, roles, tied names or model-parallel degrees differ; the message names the
            differences.
    """
    if older.model_parallel_size != newest.model_parallel_size:
        raise LayoutMismatch(
            f"{older.path} was saved with {older.model_parallel_size} model-parallel ranks, {newest.path} with "
            f"{newest.model_parallel_size}; the files do not say how a tensor is split between the ranks, so only "
            "checkpoints of equal degrees can be merged."
        )
    if older.is_train_mode != newest.is_train_mode:
        modes = {True: "in training mode", False: "in evaluation mode", None: "with another optimizer"}
        raise LayoutMismatch(
            f"{older.path} was saved {modes[older.is_train_mode]}, {newest.path} {modes[newest.is_train_mode]}: the "
            "weights of a schedule-free optimizer mean different things in its two modes. Choose checkpoints of one "
            "mode."
        )
    differences = _differences(older, newest)
    if differences:
        raise LayoutMismatch(
            f"{older.path} and {newest.path} do not hold the same model: {few(differences)}. Choose a window of one "
            "model. If only names differ, say which by --rename-sources TAG:PATTERN=NEW."
        )


def _differences(older: Layout, newest: Layout) -> list[str]:
    """In words, what differs in the tensors of two checkpoints."""
    differences = [
        f"{name}: {_tensor_words(older, name)} against {_tensor_words(newest, name)}"
        for name in {**older.tensors, **newest.tensors}
        if _tensor_words(older, name) != _tensor_words(newest, name)
    ]
    if set(older.aliases.items()) != set(newest.aliases.items()):
        differences.append(f"tied names {older.aliases} against {newest.aliases}")
    return differences


def _tensor_words(layout: Layout, name: str) -> str:
    info = layout.tensors.get(name)
    if info is None:
        return "absent"
    # Floats of several widths can be merged. Whole numbers, 8-bit floats and complex numbers are another tensor.
    numbers = "" if info.dtype.is_floating else f" of {info.dtype.name}"
    return f"{info.role} {list(info.shape)}{numbers}"
