"""From a recipe to its window: the checkpoints, their coefficients, and checks that they can be merged."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, WindowError, few
from wsm_ds.layouts import Checkpoint, Layout, find_checkpoints, read_layout
from wsm_ds.layouts.run import deleted_steps, find_tag
from wsm_ds.planning.names import MatchedNames, with_names_of_newest
from wsm_ds.planning.recipe import MergeRecipe
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
    recipe: MergeRecipe, read: ReadLayout = read_layout, warn: Callable[..., None] = log.warning
) -> Window:
    """Finds, reads and checks the checkpoints of a recipe. Reads metadata only.

    Args:
        recipe: what the user asks for.
        read: reads a layout; a caller with several recipes passes a function that reads each checkpoint once.
        warn: logs that a checkpoint is skipped; a caller with several recipes passes a function that logs it once.

    Raises:
        CheckpointNotFound, BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
        WindowError: no checkpoint lies in the range, a step occurs twice, the window lies inside the warmup, or the
            learning rate changes in it. The message names the checkpoints.
        LayoutMismatch: the checkpoints do not hold the same model; the message names the differences.
    """
    layouts = sorted(_read_window(recipe, read, warn), key=lambda layout: layout.step)
    steps = [layout.step for layout in layouts]
    repeated = sorted({step for step in steps if steps.count(step) > 1})
    if repeated:
        tags = [layout.tag for layout in layouts if layout.step in repeated]
        raise WindowError(
            f"step {few(repeated)} is in the window more than once: {few(tags)}. "
            "Choose the checkpoints by tags (--tags A,B,…)."
        )
    named, matched_names = with_names_of_newest(layouts, recipe.rename_sources)
    if matched_names:
        warn("names of %s: %s", layouts[-1].tag, few(matched_names, 2))
    for layout in named[:-1]:
        check_same_model(layout, named[-1])
    _check_learning_rates(layouts, recipe.allow)
    return Window(named, _coefficients(recipe, steps), matched_names)


def _coefficients(recipe: MergeRecipe, steps: list[int]) -> NDArray[np.float64]:
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
    sources: Sequence[Mapping[str, Any]], recipe: MergeRecipe, read: ReadLayout = read_layout
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
    layouts = tuple(
        read(Checkpoint(source["step"], source["tag"], Path(source["path"])), allowed) for source in sources
    )
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


def _read_window(recipe: MergeRecipe, read: ReadLayout, warn: Callable[..., None]) -> list[Layout]:
    """The layouts of the checkpoints that the recipe chooses by tags, by `last` or by a range of steps."""
    allowed = frozenset(recipe.allow_globals)
    if recipe.tags is not None:
        return [read(find_tag(recipe.run, tag), allowed) for tag in recipe.tags]
    checkpoints = find_checkpoints(recipe.run)
    if recipe.last is not None:
        until = recipe.to_step
        tags = {checkpoint.tag for checkpoint in checkpoints}
        # A universal checkpoint beside the checkpoint that it was converted from is the same step a second time.
        originals = [c for c in checkpoints if c.tag.removesuffix("_universal") not in tags - {c.tag}]
        return _newest_complete([c for c in originals if until is None or c.named_step <= until], recipe, read, warn)
    low, high = recipe.from_step or 0, recipe.to_step or 0
    # A tag without a step has `named_step` -1; the layout has its step.
    layouts = [read(c, allowed) for c in checkpoints if c.named_step < 0 or low <= c.named_step <= high]
    layouts = [layout for layout in layouts if low <= layout.step <= high]
    if not layouts:
        raise WindowError(
            f"{recipe.run} holds no checkpoint from step {low} to {high} (--from, --to); {_tags_of(checkpoints)}"
        )
    return layouts


def _tags_of(checkpoints: list[Checkpoint]) -> str:
    return f"it holds {few(checkpoint.tag for checkpoint in checkpoints)}."


def _newest_complete(
    checkpoints: list[Checkpoint], recipe: MergeRecipe, read: ReadLayout, warn: Callable[..., None]
) -> list[Layout]:
    """The newest `recipe.last` layouts. Broken ones at the end of the run are skipped: they may not be complete yet."""
    layouts: list[Layout] = []
    for checkpoint in reversed(checkpoints):
        if len(layouts) == recipe.last:
            break
        try:
            layout = read(checkpoint, frozenset(recipe.allow_globals))
        except BrokenCheckpoint as error:
            if layouts:
                raise BrokenCheckpoint(
                    f"{error} It is among the newest {recipe.last} checkpoints. Repair it, or choose the window "
                    "without it by tags (--tags A,B,…)."
                ) from error
            warn("%s is skipped: %s", checkpoint.tag, str(error))
            continue
        if recipe.to_step is None or layout.step <= recipe.to_step:
            layouts.append(layout)
    until = "" if recipe.to_step is None else f" up to step {recipe.to_step}"
    if len(layouts) < (recipe.last or 0):
        raise WindowError(
            f"last (--last): {recipe.last} complete checkpoints{until} were asked for, but "
            f"{recipe.run} has {len(layouts)}; {_tags_of(checkpoints)}"
        )
    steps = [layout.step for layout in layouts]
    deleted = sorted(step for step in deleted_steps(recipe.run) - set(steps) if min(steps) < step < max(steps))
    if deleted:
        raise WindowError(
            f"the newest {recipe.last} checkpoints{until} of {recipe.run} are not all there any more: `wsm-ds prune` "
            f"has deleted {'step' if len(deleted) == 1 else 'steps'} {few(deleted)}. Choose the window by its steps "
            "(--from, --to), or by tags (--tags)."
        )
    return layouts


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
    return "absent" if info is None else f"{info.role} {list(info.shape)}"


def _rates(layout: Layout) -> str:
    return "[" + ", ".join(f"{rate:.12g}" for rate in layout.learning_rates) + "]"


def _check_learning_rates(layouts: list[Layout], allow: tuple[str, ...]) -> None:
    """Refuses a window in which the rate is not constant: a merge emulates a decay from a constant rate."""
    oldest = layouts[0]
    warmup = layouts[-1].warmup_num_steps
    if "warmup" not in allow and warmup is not None and oldest.step < warmup and len(layouts) > 1:
        raise WindowError(
            f"{oldest.tag} (step {oldest.step}) lies inside the warmup of {warmup} steps; a merge emulates a decay "
            "from a constant rate. Start the window later, or pass --allow warmup."
        )
    changed = [layout for layout in layouts if set(layout.learning_rates) != set(oldest.learning_rates)]
    if changed and "lr-change" not in allow:
        raise WindowError(
            f"the learning rate changes inside the window: {_rates(oldest)} at {oldest.tag}, "
            f"{_rates(changed[0])} at {changed[0].tag}. Choose a window of constant rate, or pass "
            "--allow lr-change."
        )
