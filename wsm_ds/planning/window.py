"""From a recipe to its window: the checkpoints, their coefficients, and checks that they can be merged."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import LayoutMismatch, WindowError, few
from wsm_ds.layouts import Checkpoint, Layout, read_layout
from wsm_ds.layouts.frameworks import UNIVERSAL
from wsm_ds.layouts.order import NUMBER
from wsm_ds.planning.carried import find_carried
from wsm_ds.planning.constant_rate import check_constant_rate
from wsm_ds.planning.course import CountReader, Course, Place
from wsm_ds.planning.figures import WindowFigures, window_figures
from wsm_ds.planning.names import MatchedNames, unused_rules, with_names_of_newest
from wsm_ds.planning.one_save import FindProblem, problem_of, require_one_save
from wsm_ds.planning.selection import ReadLayout as ReadLayout
from wsm_ds.planning.selection import read_window
from wsm_ds.planning.slots import check_slots, is_of_means, span_of
from wsm_ds.planning.window_recipe import WindowRecipe
from wsm_ds.schedules.coefficients import check_coefficients, merge_coefficients
from wsm_ds.schedules.curves import parse_curve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The checkpoints that are merged into one output.

    Attributes:
        layouts: by rising step, with the names of the newest.
        coefficients: one per layout, float64, with sum 1.
        course: steps, samples and tokens of the run at each layout.
        figures: what describes the window and its coefficients.
        matched_names: what was renamed in older layouts.
        carried: a full checkpoint that gives all but the masters; None: the newest of `layouts`.
    """

    layouts: tuple[Layout, ...]
    coefficients: NDArray[np.float64]
    course: Course
    figures: WindowFigures
    matched_names: tuple[MatchedNames, ...] = ()
    carried: Layout | None = None

    @property
    def origin(self) -> Layout:
        """The checkpoint that gives the output all that is not summed."""
        return self.carried or self.layouts[-1]


def with_carried(window: Window, carry_from: Path, read: ReadLayout, allowed_globals: frozenset[str]) -> Window:
    """Returns the window with the full checkpoint that gives all but the masters.

    Args:
        window: of snapshots.
        carry_from: see `find_carried`.
        read: reads a layout.
        allowed_globals: see `read_layout`.

    Raises:
        WsmError: see `find_carried`.
        LayoutMismatch: the checkpoint does not hold the window's model.
    """
    carried = find_carried(carry_from, window.layouts[-1], read, allowed_globals)
    check_same_model(window.layouts[-1], carried)
    return replace(window, carried=carried)


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
            learning rate changes in it; or it is measured in samples or tokens that the run does not tell, or has no
            score for a checkpoint. The message names the checkpoints.
        LayoutMismatch: the checkpoints do not hold the same model; the message names the differences.
        ForeignFiles: a checkpoint has files of another save.
    """
    layouts = sorted(read_window(recipe, read, warn), key=lambda layout: layout.step)
    _require_one_of_each_step(layouts)
    layouts = best_scored(layouts, recipe)
    if recipe.tags is None:
        _warn_of_several_series(layouts, warn)
    named, matched_names = _with_one_list_of_names(layouts, recipe, warn)
    check_slots(layouts, recipe.allow if recipe.top is None else (*recipe.allow, "missing-slots"))
    check_constant_rate(layouts, recipe.allow, warn)
    require_one_save(layouts, recipe.allow, find_problem)
    if layouts[-1].is_train_mode and not recipe.keeps_training_state:
        warn(
            "%s was saved in the training mode of a schedule-free optimizer: its weights are not the averaged ones, "
            "which one evaluates. Call optimizer.eval() before saving to get those.",
            layouts[-1].path,
        )
    course = CountReader(recipe).course(_places(layouts))
    window = _window(named, _coefficients(recipe, course, layouts), course, recipe, matched_names)
    for warning in window.figures.warnings:
        warn("%s", warning)
    return window


def _require_one_of_each_step(layouts: Sequence[Layout]) -> None:
    steps = [layout.step for layout in layouts]
    repeated = sorted({step for step in steps if steps.count(step) > 1})
    if repeated:
        tags = [layout.tag for layout in layouts if layout.step in repeated]
        raise WindowError(
            f"step {few(repeated)} is in the window more than once: {few(tags)}. A merge needs one checkpoint of each "
            "step: name only one of them (--tags A,B,…)."
        )


def _with_one_list_of_names(
    layouts: Sequence[Layout], recipe: WindowRecipe, warn: Callable[..., None]
) -> tuple[tuple[Layout, ...], tuple[MatchedNames, ...]]:
    """The layouts with the names of the newest, and what was renamed. Checks that they hold the same model."""
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
    return named, matched_names


def _warn_of_several_series(layouts: Sequence[Layout], warn: Callable[..., None]) -> None:
    """Warns if the names of the checkpoints differ by more than numbers: two runs may have saved into one folder."""
    series = {NUMBER.sub("0", layout.tag.removesuffix(UNIVERSAL)): layout.tag for layout in layouts}
    if len(series) > 1:
        warn(
            "the window holds checkpoints with several kinds of names: %s. The files do not say whether they are of "
            "one training; if they are not, choose the checkpoints by tags (--tags A,B,…).",
            few(series.values()),
        )


def best_scored(layouts: list[Layout], recipe: WindowRecipe) -> list[Layout]:
    """The `recipe.top` checkpoints with the best scores, by rising step; all of them if it is not set.

    Of two with the same score, the newer one is taken.

    Args:
        layouts: of the window, by rising step.
        recipe: has the scores, by tag.

    Raises:
        WindowError: there are fewer checkpoints than `top`, or one has no score.
    """
    if recipe.top is None:
        return layouts
    silent = [layout.tag for layout in layouts if layout.tag not in recipe.scores]
    if silent:
        raise WindowError(
            f"top (--top): {few(silent)} {'has' if len(silent) == 1 else 'have'} no score. Evaluate all checkpoints of "
            "the window, or choose one that has scores."
        )
    if len(layouts) < recipe.top:
        raise WindowError(f"top (--top): {recipe.top} checkpoints were asked for, but the window has {len(layouts)}.")
    sign = -1.0 if recipe.maximize else 1.0
    best = sorted(layouts, key=lambda layout: (sign * recipe.scores[layout.tag], -layout.step))[: recipe.top]
    return sorted(best, key=lambda layout: layout.step)


def _places(layouts: Sequence[Layout]) -> list[Place]:
    return [Place(layout.path, layout.tag, layout.step) for layout in layouts]


def _coefficients(recipe: WindowRecipe, course: Course, layouts: Sequence[Layout]) -> NDArray[np.float64]:
    """The coefficients that the recipe states, or those of its curve on the grid of the window's steps or tokens."""
    if recipe.coefficients is None:
        curve, spread = parse_curve(recipe.curve or "linear"), recipe.spread or "wsm"
        if recipe.top is not None:
            return merge_coefficients(curve, n=len(course.steps), floor=recipe.floor, spread=spread)
        positions, oldest = course.required(recipe.unit), oldest_interval(recipe, course, layouts)
        return merge_coefficients(curve, steps=positions, oldest_interval=oldest, floor=recipe.floor, spread=spread)
    coefficients = check_coefficients(recipe.coefficients, allow_negative="negative" in recipe.allow)
    if len(coefficients) != len(course.steps):
        raise WindowError(
            f"coefficients (--coefficients): {len(coefficients)} were given for {len(course.steps)} checkpoints, steps "
            f"{few(course.steps)}. Give one per checkpoint, oldest first."
        )
    return coefficients


def oldest_interval(recipe: WindowRecipe, course: Course, layouts: Sequence[Layout] = ()) -> float | None:
    """The interval that the oldest checkpoint stands for, in the recipe's unit; None: the median of the others.

    In a window of the newest D tokens it is what is left of D. A slot mean stands for its own steps, wherever D begins.

    Args:
        recipe: says how the window is chosen.
        course: of the run at the window's checkpoints.
        layouts: the window.
    """
    counts = course.known(recipe.unit)
    if is_of_means(layouts) and recipe.oldest_interval is None:
        return _length_of_oldest(layouts, course.steps, counts)
    if recipe.newest_counts is not None and recipe.top is None and counts is not None:
        return recipe.newest_counts - (counts[-1] - counts[0])
    return None if recipe.oldest_interval is None else int(recipe.oldest_interval)


def _length_of_oldest(layouts: Sequence[Layout], steps: Sequence[int], counts: Sequence[int] | None) -> float | None:
    """The length of the oldest slot in the unit of `counts`, which passed as fast there as in the next slot."""
    if counts is None:
        return None
    length = span_of(layouts[0].snapshot).length
    if counts == steps:
        return length
    if len(steps) > 1:
        return length * (counts[1] - counts[0]) / (steps[1] - steps[0])
    return length * counts[0] / steps[0]


def _window(
    layouts: tuple[Layout, ...],
    coefficients: NDArray[np.float64],
    course: Course,
    recipe: WindowRecipe,
    matched_names: tuple[MatchedNames, ...],
) -> Window:
    is_measured = course.known(recipe.unit) is not None
    figures = window_figures(
        course,
        coefficients,
        unit=recipe.unit if is_measured else "steps",
        oldest_interval=oldest_interval(recipe, course, layouts) if is_measured else None,
        spans=[span_of(layout.snapshot) for layout in layouts],
        data_switch=recipe.data_switch,
    )
    return Window(layouts, coefficients, course, figures, matched_names)


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
    coefficients = np.array([source["coefficient"] for source in sources])
    return _window(named, coefficients, CountReader(recipe).course(_places(layouts)), recipe, matched_names)


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
