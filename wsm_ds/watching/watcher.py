"""Merges every window once, as soon as a new checkpoint completes it.

The folders hold all state. A window is merged if its output has a manifest, refused if `NAME.refused.json` exists, and
unfinished if it has a staging folder. So a watch may be killed at any moment and started again.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wsm_ds.errors import (
    BrokenCheckpoint,
    CheckpointNotFound,
    ForeignFiles,
    Interrupted,
    LayoutMismatch,
    NonFiniteValue,
    OutputExists,
    OutputLocked,
    WindowError,
    WsmError,
    few,
)
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.layouts.order import Dated
from wsm_ds.layouts.run import deleted_steps
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import run_plan
from wsm_ds.planning.plan import Plan
from wsm_ds.planning.recipe import MergeRecipe
from wsm_ds.publishing.staging_folder import discard
from wsm_ds.reporting.progress import Progress, Style
from wsm_ds.sizes import format_size
from wsm_ds.watching.commands import Commands, FinishedMerge
from wsm_ds.watching.completeness import Checkpoints
from wsm_ds.watching.events import Event
from wsm_ds.watching.kept_layouts import KEPT, KeptLayouts
from wsm_ds.watching.spec import LOCK, WatchSpec, merged_outputs, require_own_folder, source_steps, write_spec
from wsm_ds.watching.windows import OpenWindow, needed_steps, open_windows

log = logging.getLogger(__name__)

REFUSALS = (WindowError, LayoutMismatch, ForeignFiles, NonFiniteValue)
"""Errors that repeat each time a window is tried. The window is recorded as refused."""
TICK_S = 0.5
LONGEST_PAUSE_S = 3600.0
PATIENCE_LOOKS = 3
"""After the last end point: number of looks for which a window waits for a broken checkpoint."""


@dataclass(frozen=True)
class WatchOptions:
    """How a watch works.

    Attributes:
        poll_s: seconds between two looks; also how long files must not have changed, see `completeness`.
        is_once: merge what is complete now, and end.
        command: words of the command for every merge; see `commands`. Empty: none.
        restart: throw away what another, unfinished merge left at an output's place.
        style: how the progress of a merge is shown.
    """

    poll_s: float = 30.0
    is_once: bool = False
    command: tuple[str, ...] = ()
    restart: bool = False
    style: Style = "quiet"


def watch(
    spec: WatchSpec, options: WatchOptions, check: Callable[[], None] = lambda: None
) -> Generator[Event, None, None]:
    """Merges every window that is complete or becomes complete, and yields what happens.

    It ends after one look with `is_once`, and otherwise when the run has passed the last end point.

    Args:
        spec: what is merged, and where.
        options: how.
        check: called at least twice a second while waiting; an error that it raises ends the watch.

    Raises:
        OutputLocked: another watch merges into `spec.out`.
        BrokenCheckpoint: at the end, if windows were not merged because one of their checkpoints is broken.
        RecipeError: `spec.out` is not a folder for this watch; see `require_own_folder`.
        UnsupportedLayout, UnsafePickle, RecipeError, BudgetTooSmall, OutputExists: no window can be merged with these
            options.
        OSError: at the end, if a merge failed at its last attempt.
    """
    require_own_folder(spec)
    spec.out.mkdir(parents=True, exist_ok=True)
    with hold_lock(spec.out / LOCK, f"another watch merges into {spec.out}"), Commands(options.command) as commands:
        require_own_folder(spec)  # again: a watch that held the lock until now may have written its spec
        write_spec(spec)
        watcher = _Watcher(spec, options, commands)
        yield Event(
            "watching",
            f"watching {spec.run}: {few(spec.recipes)} into {spec.out}",
            {"run": str(spec.run), "out": str(spec.out), "windows": list(spec.recipes), "ends": asdict(spec.ends)},
        )
        looks = 0
        while True:
            yield from watcher.look(check)
            looks = looks + 1 if watcher.is_at_end() else 0
            if looks and watcher.has_waited_enough(looks):
                break
            yield from _wait(commands, options.poll_s, check)
        while not commands.is_idle:
            yield from _wait(commands, TICK_S, check)
        yield watcher.summary()
        watcher.raise_unfinished()


def _wait(commands: Commands, seconds: float, check: Callable[[], None]) -> Iterator[Event]:
    """Sleeps, and starts and ends commands meanwhile."""
    until_s = time.monotonic() + seconds
    while (remaining_s := until_s - time.monotonic()) > 0:
        check()
        yield from commands.step()
        commands.pause(min(remaining_s, TICK_S))


@dataclass(frozen=True)
class _Pause:
    """Why an end point waits, how long this wait is, and until when (monotonic seconds)."""

    error: Exception
    pause_s: float
    until_s: float


class _Watcher:
    """The state of a watch between two looks. The folders hold all of it except for the pauses.

    Attributes:
        resolved: windows that are merged, refused or passed over, as (end point, name).
        merged_steps: steps of the sources of finished merges.
        blocked: why windows of this look wait: the problems of broken checkpoints that they need, or may need.
        pauses: by end point, after a merge that failed.
    """

    def __init__(self, spec: WatchSpec, options: WatchOptions, commands: Commands) -> None:
        self.spec, self.options, self.commands = spec, options, commands
        allowed = frozenset(name for recipe in spec.recipes.values() for name in recipe.allow_globals)
        self.layouts = KeptLayouts(spec.out / KEPT)
        self.checkpoints = Checkpoints(spec.run, allowed, options.poll_s, self.layouts.read)
        self.resolved: set[tuple[int, str]] = set()
        self.merged_steps: set[int] = set()
        self.already_reported: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.pauses: dict[int, _Pause] = {}
        self.blocked: set[str] = set()
        for end, name in merged_outputs(spec):
            self._note_merged(end, name)

    def look(self, check: Callable[[], None]) -> Iterator[Event]:
        """Lists the run, and merges every complete window: one pass for each end point, oldest first."""
        self.checkpoints.look()
        self.blocked = set()
        yield from self._report_if_empty()
        windows: dict[int, list[OpenWindow]] = {}
        for window in self._open_windows():
            windows.setdefault(window.end, []).append(window)
        self.pauses = {end: pause for end, pause in self.pauses.items() if end in windows}
        for end, windows_of_end in windows.items():
            check()
            yield from self._look_at(end, windows_of_end)
            yield from self.commands.step()
            self._forget()

    def is_at_end(self) -> bool:
        """Whether no more windows will come: with `is_once`, or when the run has passed the last end point."""
        until = self.spec.ends.until
        if self.options.is_once:
            return True
        if until is None or self.pauses:
            return False
        return any(self.checkpoints.is_complete(step) for step in self.checkpoints.by_step if step >= until)

    def has_waited_enough(self, looks: int) -> bool:
        """Whether the watch can end after `looks` looks at its end.

        A checkpoint that has not settled is looked at again. A broken one is looked at PATIENCE_LOOKS times more,
        unless `is_once`.
        """
        if self.options.is_once:
            return looks > 1 or not self.checkpoints.unsettled
        return not self.checkpoints.unsettled and (not self.blocked or looks > PATIENCE_LOOKS)

    def summary(self) -> Event:
        """The last event: how many windows were merged, refused and passed over."""
        counts = {name: self.counts[name] for name in ("merged", "refused", "passed_over")}
        text = f"done: {counts['merged']} merged, {counts['refused']} refused, {counts['passed_over']} passed over"
        return Event("done", text, counts)

    def raise_unfinished(self) -> None:
        """Raises the error because of which windows were not merged, if there was one."""
        for pause in self.pauses.values():
            raise pause.error
        if self.blocked:
            raise BrokenCheckpoint(f"windows were not merged: {few(sorted(self.blocked), 2)}")

    def _open_windows(self) -> list[OpenWindow]:
        steps, gone = self.checkpoints.by_step, self._gone()
        return list(open_windows(steps, gone, self.spec.counts, self.spec.ends, self._is_resolved))

    def _gone(self) -> set[int]:
        gone = self.merged_steps | self.checkpoints.seen | deleted_steps(self.spec.run)
        return gone - set(self.checkpoints.by_step)

    def _forget(self) -> None:
        """Forgets the layouts that no open or future window needs."""
        by_step = self.checkpoints.by_step
        needed = needed_steps(by_step, self._gone(), self.spec.counts, self.spec.ends, self._is_resolved)
        self.layouts.forget_all_but([by_step[step].path for step in needed])

    def _is_resolved(self, end: int, name: str) -> bool:
        if (end, name) not in self.resolved and self.spec.is_resolved(end, name):
            self.resolved.add((end, name))
        return (end, name) in self.resolved

    def _look_at(self, end: int, windows: list[OpenWindow]) -> Iterator[Event]:
        """Merges the windows of one end point that are complete."""
        if end in self.pauses and self.pauses[end].until_s > time.monotonic():
            return
        if not self.checkpoints.is_complete(end):
            if end < max(self.checkpoints.by_step):  # the newest one may still be being written: no report
                yield from self._report_of_broken((end,))
            return
        ready = []
        for window in windows:
            if window.gone:
                yield from self._pass_over(window)
            elif hidden := [d for d in self.checkpoints.undated if d.may_lie_in(window.steps[0], end)]:
                yield from self._report_of_hidden(window, hidden)
            elif all(map(self.checkpoints.is_complete, window.steps)):
                ready.append(window)
            else:
                yield from self._report_of_broken(window.steps)
        try:
            if ready:
                yield from self._merge(ready)
            self.pauses.pop(end, None)
        except OSError as error:
            is_final = isinstance(error, OutputExists) and not isinstance(error, OutputLocked)
            if is_final or isinstance(error, Interrupted):
                raise
            yield from self._pause(end, error)

    def _merge(self, windows: Sequence[OpenWindow]) -> Iterator[Event]:
        """Merges windows in one pass. If one of them is refused, each gets a pass of its own."""
        recipes = [self.spec.recipe_at(window.end, window.name) for window in windows]
        began_s = time.monotonic()
        try:
            plan = plan_merge(recipes, read=self.layouts.read, find_problem=self.layouts.problem_of)
            self._require_steps(plan, windows)
            self._run(plan)
        except REFUSALS as error:
            if len(windows) > 1:
                for window in windows:
                    yield from self._merge([window])
                return
            # A prune may have deleted a checkpoint during the merge. That is no property of the window.
            if not all(self.checkpoints.by_step[step].path.is_dir() for step in windows[0].steps):
                raise CheckpointNotFound(
                    str(error)
                ) from error  # the refusal comes from a checkpoint that has just been deleted
            yield self._refuse(windows[0], error)
            return
        for window in windows:
            self._note_merged(window.end, window.name)
        self.counts["merged"] += len(windows)
        yield _merged(windows, recipes, plan, time.monotonic() - began_s)

    def _require_steps(self, plan: Plan, windows: Sequence[OpenWindow]) -> None:
        """Raises CheckpointNotFound if the plan has other steps than the windows: the run has changed."""
        expected = {self.spec.output_folder(window.end, window.name): window.steps for window in windows}
        for output in plan.outputs:
            steps = tuple(source.step for source in output.sources)
            if steps != expected[output.out]:
                raise CheckpointNotFound(
                    f"{output.out} would be merged from steps {few(steps)}, not {few(expected[output.out])}: "
                    "checkpoints have appeared or been deleted meanwhile."
                )

    def _run(self, plan: Plan) -> None:
        with Progress(plan.bytes_to_read + plan.bytes_to_write, self.options.style) as progress:
            try:
                run_plan(plan, progress.add)
            except OutputExists as error:
                if isinstance(error, OutputLocked) or not self.options.restart:
                    raise
                run_plan(plan, progress.add, restart=True)

    def _note_merged(self, end: int, name: str) -> None:
        """Records a finished merge.

        Its sources count as checkpoints of the run even after they are pruned. Its command is queued.
        """
        out = self.spec.output_folder(end, name)
        discard(out)
        self.resolved.add((end, name))
        self.merged_steps |= source_steps(self.spec.run, out)
        self.commands.add(FinishedMerge(self.spec.run, end, name, out))

    def _refuse(self, window: OpenWindow, error: WsmError) -> Event:
        """Records in NAME.refused.json why a window cannot be merged, so that it is not tried again."""
        values: dict[str, Any] = {
            "step": window.end,
            "window": window.name,
            "error": type(error).__name__,
            "message": str(error),
        }
        text = json.dumps(values | {"sources": window.steps, "time": time.time()}, indent=2) + "\n"
        replace_text(self.spec.refusal(window.end, window.name), text)
        self.counts["refused"] += 1
        self.resolved.add((window.end, window.name))
        return Event("refused", f"step {window.end} {window.name} is refused: {error}", values)

    def _pass_over(self, window: OpenWindow) -> Iterator[Event]:
        self.resolved.add((window.end, window.name))
        self.counts["passed_over"] += 1
        text = f"step {window.end} {window.name} is passed over; deleted: step {few(window.gone)}"
        yield Event("passed_over", text, {"step": window.end, "window": window.name, "gone": window.gone})

    def _report_of_broken(self, steps: Sequence[int]) -> Iterator[Event]:
        """Reports, once, the broken checkpoints that a window waits for."""
        for step in steps:
            problem = self.checkpoints.problems.get(step)
            if problem is not None:
                self.blocked.add(problem)
                yield from self._report_once("waiting", f"step {step} is needed and is broken: {problem}", step=step)

    def _report_of_hidden(self, window: OpenWindow, hidden: Sequence[Dated]) -> Iterator[Event]:
        """Reports, once, checkpoints of unknown step that may belong to a window."""
        for dated in hidden:
            problem = str(dated.why_it_counts())
            self.blocked.add(problem)
            text = f"step {window.end} {window.name} waits: {problem}"
            yield from self._report_once("waiting", text, step=window.end, tag=dated.checkpoint.tag)

    def _report_if_empty(self) -> Iterator[Event]:
        if self.checkpoints.dated:
            return
        if self.options.is_once and not self.spec.run.is_dir():
            raise CheckpointNotFound(f"{self.spec.run} is not a folder.")
        yield from self._report_once("waiting", f"{self.spec.run} holds no checkpoint yet")

    def _report_once(self, name: str, text: str, **values: Any) -> Iterator[Event]:
        if text not in self.already_reported:
            self.already_reported.add(text)
            yield Event(name, text, values)

    def _pause(self, end: int, error: Exception) -> Iterator[Event]:
        """Makes an end point wait before its next attempt. The pause doubles with each failure."""
        pause_s = self.options.poll_s if end not in self.pauses else 2 * self.pauses[end].pause_s
        pause_s = min(pause_s, LONGEST_PAUSE_S)
        self.pauses[end] = _Pause(error, pause_s, time.monotonic() + pause_s)
        text = f"step {end} failed and will be tried again in {pause_s:.0f} s: {type(error).__name__}: {error}"
        yield Event("failed", text, {"step": end, "error": type(error).__name__, "message": str(error)})


def _merged(windows: Sequence[OpenWindow], recipes: Sequence[MergeRecipe], plan: Plan, seconds: float) -> Event:
    names = ", ".join(window.name for window in windows)
    text = (
        f"step {windows[0].end} merged: {names}; read {format_size(plan.bytes_to_read)}, "
        f"wrote {format_size(plan.bytes_to_write)} in {seconds:.1f} s"
    )
    values = {
        "step": windows[0].end,
        "outs": [str(recipe.out) for recipe in recipes],
        "bytes_read": plan.bytes_to_read,
        "bytes_written": plan.bytes_to_write,
        "seconds": round(seconds, 3),
    }
    return Event("merged", text, values)
