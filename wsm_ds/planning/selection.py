"""Which checkpoints of a run a recipe chooses, and their layouts."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from wsm_ds.errors import BrokenCheckpoint, WindowError, few
from wsm_ds.layouts import Checkpoint, Layout, find_checkpoints
from wsm_ds.layouts.layout import are_copies
from wsm_ds.layouts.order import Dated, abandoned, in_order, require_one_series, without_universal_copies
from wsm_ds.layouts.run import deleted_steps, find_tag
from wsm_ds.planning.course import Place, newest_counts
from wsm_ds.planning.window_recipe import WindowRecipe
from wsm_ds.sizes import format_count

ReadLayout = Callable[[Checkpoint, frozenset[str]], Layout]
"""`read_layout`, or a function that caches its results."""


def read_window(recipe: WindowRecipe, read: ReadLayout, warn: Callable[..., None]) -> list[Layout]:
    """Reads the checkpoints that a recipe chooses by tags, by `last`, by tokens or samples, or by a range of steps.

    Args:
        recipe: what the user asks for.
        read: reads a layout.
        warn: logs that a checkpoint is skipped.

    Raises:
        CheckpointNotFound, BrokenCheckpoint, UnsupportedLayout, UnsafePickle: see `read_layout`.
        WindowError: no checkpoint lies in the range, there are too few, or some of them were deleted.
    """
    allowed = frozenset(recipe.allow_globals)
    if recipe.tags is not None:
        return [read(find_tag(recipe.run, tag), allowed) for tag in recipe.tags]
    checkpoints = find_checkpoints(recipe.run)
    require_one_series(recipe.run, checkpoints)
    dated = in_order(without_universal_copies(checkpoints))
    _require_none_abandoned(dated, recipe)
    if recipe.last is not None:
        return _newest_complete(dated, recipe, recipe.last, read, warn)
    if recipe.newest_counts is not None:
        return _newest_counted(dated, recipe, recipe.newest_counts, read, warn)
    low, high = recipe.from_step or 0, recipe.to_step or 0
    return _in_range(dated, recipe, (low, high), read, warn)


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
    dated: Sequence[Dated],
    recipe: WindowRecipe,
    bounds: tuple[int, int],
    read: ReadLayout,
    warn: Callable[..., None],
) -> list[Layout]:
    """The layouts from one step to another, both included."""
    low, high = bounds
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
    dated: Sequence[Dated], recipe: WindowRecipe, count: int, read: ReadLayout, warn: Callable[..., None]
) -> list[Layout]:
    """The newest `count` layouts. Broken ones at the end of the run are skipped: they may not be complete yet."""
    layouts: list[Layout] = []
    skipped: list[tuple[str, BrokenCheckpoint]] = []
    candidates = [d for d in dated if recipe.to_step is None or d.earliest <= recipe.to_step]
    for group in reversed(_of_equal_step(candidates)):
        if len(layouts) == count:
            break
        newest = group[-1]
        try:
            if newest.problem is not None and len(group) == 1:
                raise newest.problem
            layouts.append(_read_step(group, recipe, read, warn))
        except BrokenCheckpoint as error:
            if layouts:
                raise BrokenCheckpoint(
                    f"{error} It is among the newest {count} checkpoints. Repair it, or choose the window "
                    "without it by tags (--tags A,B,…)."
                ) from error
            if not newest.is_placed and any(d.problem is None for d in candidates):
                raise newest.why_it_counts() from error
            skipped.append((newest.checkpoint.tag, error))
    _require_count(layouts, skipped, candidates, recipe, count)
    for tag, problem in skipped:
        warn("%s is skipped: %s", tag, str(problem))
    return layouts


def _require_count(
    layouts: Sequence[Layout],
    skipped: Sequence[tuple[str, BrokenCheckpoint]],
    candidates: Sequence[Dated],
    recipe: WindowRecipe,
    count: int,
) -> None:
    """Raises an error if there are fewer than `count` layouts, or if checkpoints between them were deleted."""
    until = "" if recipe.to_step is None else f" up to step {recipe.to_step}"
    if skipped and not layouts:
        tag, error = skipped[0]
        others = f" None of the other {len(skipped) - 1} checkpoints can be read, either." if len(skipped) > 1 else ""
        raise BrokenCheckpoint(f"{tag}, the newest checkpoint{until}, cannot be read: {error}{others}") from error
    if len(layouts) < count:
        reasons = f" Skipped: {few((problem for _, problem in skipped), 2)}" if skipped else ""
        raise WindowError(
            f"last (--last): {count} complete checkpoints{until} were asked for, but "
            f"{recipe.run} has {len(layouts)}; {_held(candidates)}{reasons}"
        )
    _require_none_deleted([layout.step for layout in layouts], recipe, f"the newest {count} checkpoints{until}")


def _require_none_deleted(steps: Sequence[int], recipe: WindowRecipe, window: str) -> None:
    """Raises WindowError if checkpoints between these steps were deleted.

    Args:
        steps: of the window.
        recipe: names the run.
        window: in words.
    """
    deleted = sorted(step for step in deleted_steps(recipe.run) - set(steps) if min(steps) < step < max(steps))
    if deleted:
        raise WindowError(
            f"{window} of {recipe.run} are not all there any more: `wsm-ds prune` "
            f"has deleted {'step' if len(deleted) == 1 else 'steps'} {few(deleted)}. Choose the window by its steps "
            "(--from, --to), or by tags (--tags)."
        )


def _newest_counted(
    dated: Sequence[Dated], recipe: WindowRecipe, length: int, read: ReadLayout, warn: Callable[..., None]
) -> list[Layout]:
    """The layouts of the newest `length` tokens or samples: those with a count above that of the newest, less `length`.

    The newest one is found as for `last`.
    """
    (newest,) = _newest_complete(dated, recipe, 1, read, warn)
    groups = _of_equal_step(d for d in dated if d.step is not None and d.step <= newest.step)
    places = [Place(group[0].checkpoint.path, group[0].checkpoint.tag, group[0].step or 0) for group in groups]
    places[-1] = Place(newest.path, newest.tag, newest.step)
    counts = newest_counts(places, length, recipe)
    chosen = places[-len(counts) :]
    layouts = _in_range(dated, recipe, (chosen[0].step, newest.step), read, warn)
    length_words = f"the checkpoints of the newest {format_count(length)} {recipe.unit}"
    _require_none_deleted([layout.step for layout in layouts], recipe, length_words)
    return layouts
