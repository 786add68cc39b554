"""Checks of a run: the steps of its checkpoints, their rates, how long a save took, and the room on the disk."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from wsm_ds.doctor.deepspeed_facts import KEEPS_FROZEN_GATHERED, timeout_minutes
from wsm_ds.doctor.findings import Finding
from wsm_ds.errors import few
from wsm_ds.layouts import Layout
from wsm_ds.planning.constant_rate import rate_words, same_rates
from wsm_ds.reporting.tables import counted
from wsm_ds.sizes import format_size

FEWEST_INTERVALS = 2
"""Intervals between checkpoints from which an interval of the run can be told."""
SHARE_OF_TIMEOUT = 0.5
"""A save that takes this share of the timeout is reported: the next one may meet a busier storage."""
DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Save:
    """What is known of one checkpoint without its tensors.

    Attributes:
        tag: its path within the run.
        step: the optimizer step in its files.
        nbytes: bytes of its files.
        begun_s: when the first of its files was complete, seconds since 1970.
        ended_s: when the last one was.
    """

    tag: str
    step: int
    nbytes: int
    begun_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Intent:
    """What the user plans. None: not said.

    Attributes:
        interval_steps: steps between two checkpoints.
        every_steps: steps between two end points at which windows are merged.
        last: checkpoints of the longest window.
        steps: the step at which training is planned to end.
    """

    interval_steps: int | None = None
    every_steps: int | None = None
    last: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the checks of a run look at.

    Attributes:
        run: the run's folder.
        saves: its checkpoints by rising step.
        window: the layouts of the newest checkpoints, oldest first; the last one is the newest.
        free_bytes: free bytes on the disk of the run.
    """

    run: Path
    saves: tuple[Save, ...]
    window: tuple[Layout, ...]
    free_bytes: int

    @property
    def interval_steps(self) -> int | None:
        """The usual number of steps between two checkpoints; None if there are too few to tell."""
        intervals = [later.step - earlier.step for earlier, later in zip(self.saves, self.saves[1:], strict=False)]
        return statistics.mode(intervals) if len(intervals) >= FEWEST_INTERVALS else None


def check_run(facts: RunFacts, intent: Intent, version: Version, timeout_s: float | None) -> list[Finding]:
    """Checks a run.

    Args:
        facts: of the run.
        intent: what the user plans.
        version: of the DeepSpeed that trains on.
        timeout_s: the process groups' timeout, if `DEEPSPEED_TIMEOUT` is set.
    """
    seconds = timeout_s if timeout_s is not None else timeout_minutes(version) * 60.0
    return [
        *_grid(facts),
        *check_intent(intent, facts.interval_steps),
        *_window(facts, intent),
        *_rates(facts),
        *_save_time(facts.saves, seconds),
        *_frozen(facts, version),
        *_disk(facts, intent),
    ]


def check_intent(intent: Intent, measured_steps: int | None = None) -> Iterator[Finding]:
    """Checks that the planned intervals fit each other, and the run.

    Args:
        intent: what the user plans.
        measured_steps: the usual interval between the run's checkpoints; None if there is none yet.
    """
    interval = intent.interval_steps or measured_steps
    if intent.interval_steps and measured_steps and intent.interval_steps != measured_steps:
        yield Finding(
            name="other-interval",
            level="warning",
            found=f"the run saves every {measured_steps} steps, not every {intent.interval_steps} (--interval)",
            effect="a window of the same number of checkpoints lasts longer or shorter than planned",
            cure="save at the planned interval, or plan with the run's",
            source="the steps in the checkpoints' files",
        )
    if interval and intent.every_steps and intent.every_steps % interval:
        yield Finding(
            name="interval-does-not-fit",
            level="error",
            found=f"checkpoints are {interval} steps apart, and windows are to end every {intent.every_steps} steps "
            "(--every)",
            effect="most windows would end where there is no checkpoint",
            cure=f"make --every a multiple of {interval}, or save every divisor of {intent.every_steps}",
            source="wsm_ds/watching/windows.py",
        )


def _grid(facts: RunFacts) -> Iterator[Finding]:
    interval = facts.interval_steps
    off_grid = [save for save in facts.saves if interval and (save.step - facts.saves[-1].step) % interval]
    if len(off_grid) > len(facts.saves) // 2:
        off_grid = [save for save in facts.saves if interval and save.step % interval]
    if off_grid:
        names = few(f"{save.tag} (step {save.step})" for save in off_grid)
        yield Finding(
            name="off-grid-saves",
            level="warning",
            found=f"the run saves every {interval} steps, but not these: {names}",
            effect="a save at an interruption or by hand lies between the others. A merge gives it the coefficient of "
            "its own step, so the result is right; a window of the newest N checkpoints lasts fewer steps than planned",
            cure="choose the window by --from and --to, or leave these out by --tags",
            source="the steps in the checkpoints' files",
        )


def _window(facts: RunFacts, intent: Intent) -> Iterator[Finding]:
    if intent.last and len(facts.saves) < intent.last:
        yield Finding(
            name="window-not-full",
            level="note",
            found=f"the run has {len(facts.saves)} checkpoints, the window {intent.last} (--last)",
            effect="the window cannot be merged yet",
            cure="train on, or choose a shorter window",
            source="the run's folder",
        )
    warmup = facts.window[-1].warmup_num_steps if facts.window else None
    inside = [layout for layout in facts.window if warmup is not None and layout.step < warmup]
    if inside and len(facts.window) > 1:
        yield Finding(
            name="warmup-in-window",
            level="error",
            found=f"the warmup has {warmup} steps; of the newest {len(facts.window)} checkpoints these lie in it: "
            f"{few(layout.tag for layout in inside)}",
            effect="a merge emulates a decay from a constant rate; this window is refused",
            cure="choose a shorter window, or wait until it begins after the warmup",
            source="the scheduler's state in the checkpoint",
        )


def _rates(facts: RunFacts) -> Iterator[Finding]:
    for older, newer in zip(facts.window, facts.window[1:], strict=False):
        if not same_rates(older.learning_rates, newer.learning_rates):
            yield Finding(
                name="rate-changes",
                level="error",
                found=f"the learning rate is {rate_words(older.learning_rates)} at step {older.step} and "
                f"{rate_words(newer.learning_rates)} at step {newer.step}",
                effect="a merge emulates a decay from a constant rate; a window across this change is refused",
                cure="train on at one rate and choose a window after the change; or merge with --allow lr-change",
                source="the optimizer's param_groups in the checkpoints",
            )


def _save_time(saves: Sequence[Save], timeout_s: float) -> Iterator[Finding]:
    slowest = max(saves, key=lambda save: save.ended_s - save.begun_s)
    seconds = slowest.ended_s - slowest.begun_s
    if seconds < SHARE_OF_TIMEOUT * timeout_s:
        return
    yield Finding(
        name="save-near-timeout",
        level="error" if seconds >= timeout_s else "warning",
        found=f"{slowest.tag}: its last file was complete {seconds:.0f} s after its first; the process groups' "
        f"timeout is {timeout_s:.0f} s",
        effect="the ranks that are done wait for the slowest one in a collective; past the timeout the job ends, and "
        "the save is incomplete. (If the run was copied, these times are those of the copy.)",
        cure="set DEEPSPEED_TIMEOUT (minutes) above the longest save, or save to faster storage",
        source="modification times of the files; deepspeed/constants.py, default_pg_timeout",
    )


def _frozen(facts: RunFacts, version: Version) -> Iterator[Finding]:
    newest = facts.window[-1] if facts.window else None
    if newest is None or newest.stage != 3 or version < KEEPS_FROZEN_GATHERED:
        return
    frozen = [name for name, info in newest.tensors.items() if info.role == "frozen"]
    if frozen:
        yield Finding(
            name="frozen-kept-gathered",
            level="note",
            found=f"{newest.tag} is of ZeRO-3 and has {counted(len(frozen), 'frozen parameter')}: {few(frozen)}",
            effect="in a block with activation checkpointing that is not reentrant, a frozen parameter stays gathered "
            "on every rank until the block's backward pass has ended: it takes memory. A save partitions all "
            "parameters first, so the files are right",
            cure="nothing, unless memory is short: then use reentrant checkpointing for these blocks",
            source="deepspeed/runtime/zero/partitioned_param_coordinator.py, ds_recompute_parameters (since 0.19.3); "
            "runtime/zero/stage3.py, checkpoint_event_prologue",
        )


def _disk(facts: RunFacts, intent: Intent) -> Iterator[Finding]:
    newest, interval = facts.saves[-1], facts.interval_steps or intent.interval_steps
    room = facts.free_bytes // max(newest.nbytes, 1)
    figures = f"{format_size(facts.free_bytes)} free: room for {room} more checkpoints of {format_size(newest.nbytes)}"
    if not interval:
        interval_words, needed = "", intent.last or 1
    else:
        interval_words = f", {room * interval} steps"
        needed = -(-max(intent.steps - newest.step, 0) // interval) if intent.steps else intent.last or 1
    days = _days(facts.saves, room)
    figures += interval_words + (f", about {days:.1f} days at the pace so far" if days is not None else "")
    too_small = room < needed
    plan = f"step {intent.steps} (--steps)" if intent.steps and interval else f"a window of {needed} checkpoints"
    yield Finding(
        name="disk-forecast",
        level="error" if room < 1 else "warning" if too_small else "note",
        found=figures,
        effect=f"{plan} needs {needed} more" + (", which do not fit" if too_small else ""),
        cure="delete what no window needs with `wsm-ds prune`, or plan the windows with `wsm-ds storage`",
        source="free bytes of the file system; files of the newest checkpoint",
    )


def _days(saves: Sequence[Save], room: int) -> float | None:
    """Days in which the room is used up at the pace of the saves so far; None if the pace is unknown."""
    seconds = saves[-1].ended_s - saves[0].ended_s
    return room * seconds / (len(saves) - 1) / DAY_S if len(saves) > FEWEST_INTERVALS and seconds > 0 else None
