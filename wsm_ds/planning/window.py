"""From a recipe's words to the window: which checkpoints, with which coefficients, and whether they belong together."""

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
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.schedules.coefficients import check_coefficients, merge_coefficients
from wsm_ds.schedules.curves import parse_curve

log = logging.getLogger(__name__)

ReadLayout = Callable[[Checkpoint, frozenset[str]], Layout]
"""`read_layout`, or one that remembers what it has read."""


@dataclass(frozen=True)
class Window:
    """Layouts by rising step, and a coefficient for each (float64, sums to 1)."""

    layouts: tuple[Layout, ...]
    coefficients: NDArray[np.float64]


def select_window(recipe: MergeRecipe, read: ReadLayout = read_layout) -> Window:
    """Finds, reads and checks the checkpoints of a recipe. Reads metadata only.

    Raises:
        CheckpointNotFound, BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
        WindowError: no checkpoint in range, a step twice, inside the warmup, across a change of rate.
        LayoutMismatch: the checkpoints do not hold the same model (the differences are named).
    """
    layouts = sorted(_chosen(recipe, read), key=lambda layout: layout.step)
    steps = [layout.step for layout in layouts]
    twice = sorted({step for step in steps if steps.count(step) > 1})
    if twice:
        tags = [layout.tag for layout in layouts if layout.step in twice]
        raise WindowError(f"step {few(twice)} is in the window more than once: {few(tags)}. Choose by tags.")
    for layout in layouts[:-1]:
        check_same_model(layout, layouts[-1])
    _check_rates(layouts, recipe.allow)
    if recipe.coefficients is not None:
        coefficients = check_coefficients(recipe.coefficients)
        if len(coefficients) != len(layouts):
            raise WindowError(f"{len(coefficients)} coefficients were given for {len(layouts)} checkpoints.")
    else:
        curve = parse_curve(recipe.curve or "linear")
        interval = recipe.oldest_interval
        coefficients = merge_coefficients(curve, steps=steps, oldest_interval=interval, floor=recipe.floor)
    return Window(tuple(layouts), coefficients)


def recorded_window(
    sources: Sequence[Mapping[str, Any]], recipe: MergeRecipe, read: ReadLayout = read_layout
) -> Window:
    """The window that a manifest or a plan has recorded, read again.

    Raises:
        CheckpointNotFound, BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
    """
    allowed = frozenset(recipe.allow_globals)
    layouts = tuple(
        read(Checkpoint(source["step"], source["tag"], Path(source["path"])), allowed) for source in sources
    )
    return Window(layouts, np.array([source["coefficient"] for source in sources]))


def union_of(windows: Sequence[Window]) -> tuple[Layout, ...]:
    """All checkpoints of several windows, by rising step.

    Raises:
        LayoutMismatch: they do not hold the same model.
    """
    layouts = {layout.path: layout for window in windows for layout in window.layouts}
    ordered = sorted(layouts.values(), key=lambda layout: (layout.step, str(layout.path)))
    for layout in ordered[:-1] if len(windows) > 1 else ():
        check_same_model(layout, ordered[-1])
    return tuple(ordered)


def _chosen(recipe: MergeRecipe, read: ReadLayout) -> list[Layout]:
    allowed = frozenset(recipe.allow_globals)
    if recipe.tags is not None:
        return [read(find_tag(recipe.run, tag), allowed) for tag in recipe.tags]
    found = find_checkpoints(recipe.run)
    if recipe.last is not None:
        until = recipe.to_step
        tags = {checkpoint.tag for checkpoint in found}
        once = [c for c in found if c.tag.removesuffix("_universal") not in tags - {c.tag}]  # a copy does not count
        return _newest_complete([c for c in once if until is None or c.named_step <= until], recipe, read)
    low, high = recipe.from_step or 0, recipe.to_step or 0
    layouts = [read(c, allowed) for c in found if c.named_step < 0 or low <= c.named_step <= high]
    layouts = [layout for layout in layouts if low <= layout.step <= high]
    if not layouts:
        raise WindowError(f"{recipe.run} holds no checkpoint from step {low} to {high}; {_held(found)}")
    return layouts


def _held(found: list[Checkpoint]) -> str:
    return f"it holds {few(checkpoint.tag for checkpoint in found)}."


def _newest_complete(found: list[Checkpoint], recipe: MergeRecipe, read: ReadLayout) -> list[Layout]:
    """The newest ones, up to a step if there is one; a broken one at the very end is still being written."""
    layouts: list[Layout] = []
    for checkpoint in reversed(found):
        if len(layouts) == recipe.last:
            break
        try:
            layout = read(checkpoint, frozenset(recipe.allow_globals))
        except BrokenCheckpoint as error:
            if layouts:
                raise
            log.warning("%s is passed over: %s", checkpoint.tag, error)
            continue
        if recipe.to_step is None or layout.step <= recipe.to_step:
            layouts.append(layout)
    until = "" if recipe.to_step is None else f" up to step {recipe.to_step}"
    if len(layouts) < (recipe.last or 0):
        raise WindowError(
            f"{recipe.last} complete checkpoints{until} were asked for, {len(layouts)} are there; {_held(found)}"
        )
    steps = [layout.step for layout in layouts]
    deleted = sorted(step for step in deleted_steps(recipe.run) - set(steps) if min(steps) < step < max(steps))
    if deleted:
        raise WindowError(
            f"the newest {recipe.last} checkpoints{until} of {recipe.run} are not all there any more: `wsm-ds prune` "
            f"has deleted step {few(deleted)}. Choose the window by its steps, or by tags."
        )
    return layouts


def check_same_model(older: Layout, newest: Layout) -> None:
    """Raises LayoutMismatch if names, shapes, roles or model-parallel degrees differ; names the differences."""
    sizes = [layout.model_parallel_size for layout in (older, newest)]
    if sizes[0] != sizes[1]:
        raise LayoutMismatch(
            f"{older.path} was saved with {sizes[0]} model-parallel ranks, {newest.path} with {sizes[1]}; the files do "
            "not say how a tensor is split between them, so only equal degrees are merged."
        )
    differences = [
        f"{name}: {_described(older, name)} against {_described(newest, name)}"
        for name in {**older.tensors, **newest.tensors}
        if _described(older, name) != _described(newest, name)
    ]
    if set(older.aliases.items()) != set(newest.aliases.items()):
        differences.append(f"tied names {older.aliases} against {newest.aliases}")
    if differences:
        raise LayoutMismatch(f"{older.path} and {newest.path} do not hold the same model: {few(differences)}.")


def _described(layout: Layout, name: str) -> str:
    info = layout.tensors.get(name)
    return "absent" if info is None else f"{info.role} {list(info.shape)}"


def _check_rates(layouts: list[Layout], allow: tuple[str, ...]) -> None:
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
            f"the learning rate changes inside the window: {list(oldest.learning_rates)} at {oldest.tag}, "
            f"{list(changed[0].learning_rates)} at {changed[0].tag}. Choose a window of constant rate, or pass "
            "--allow lr-change."
        )
