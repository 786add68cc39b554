"""Deletes the checkpoints that no window can need any more. If it is not sure, it keeps a checkpoint.

Whether a checkpoint is complete is known only after all its metadata are read, so it is found out only where something
depends on it. These are read:

- from the newest one backwards, until the newest `keep_last` complete ones are found, those of `keep_window` and of
  each window to come;
- for each end point with a window that is not made yet, the checkpoint of the end point, and from there backwards,
  until the members of the window are found.

Of every other checkpoint, only its step is read (one file) and its files are listed with their sizes. It is older than
the newest complete ones and in no window, so it can be deleted whether it is complete or not. What a watch has kept of
a checkpoint (`kept_layouts`) counts as read, if none of its files has changed.

RUN/.wsm-prune holds, for all prunes of a run,

    deleted.jsonl   one line per deleted checkpoint, so that no window takes an older checkpoint in its place
    trash/          checkpoints that are being deleted; each leaves the run by one rename, so it is never seen in part
    lock            locked by the prune that deletes
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from wsm_ds.errors import RecipeError, UnsupportedLayout, few
from wsm_ds.filesystem.durable import append_line
from wsm_ds.filesystem.locks import hold_lock, is_held
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts import Checkpoint, find_checkpoints
from wsm_ds.layouts.frameworks import MANIFEST, TRAINER_STATE
from wsm_ds.layouts.order import Dated
from wsm_ds.layouts.run import DELETED, deleted_steps
from wsm_ds.publishing.staging_folder import unfinished_merges
from wsm_ds.reporting.tables import table
from wsm_ds.sizes import format_size
from wsm_ds.watching.completeness import Checkpoints
from wsm_ds.watching.kept_layouts import KEPT, Fingerprint, KeptLayouts, fingerprint
from wsm_ds.watching.spec import WatchSpec, merged_outputs, require_run, source_steps
from wsm_ds.watching.windows import needed_steps, window_steps

NEVER_SETTLES_S = float("inf")
COMPLETE = {True: "yes", False: "no", None: "not read"}
"""How the table says whether a checkpoint is complete."""


@dataclass(frozen=True)
class Retention:
    """What is kept, in addition to what `plan_prune` always keeps.

    Attributes:
        specs: watches whose open and future windows must keep their checkpoints.
        folders: where merges of the run are written; the sources of unfinished ones are kept.
        keep_window: number of the newest complete checkpoints that future windows need.
        keep_every: checkpoints at multiples of this number of steps are kept.
        keep_last: number of the newest complete checkpoints that are kept for restarting the training.
    """

    specs: tuple[WatchSpec, ...] = ()
    folders: tuple[Path, ...] = ()
    keep_window: int | None = None
    keep_every: int | None = None
    keep_last: int = 2


@dataclass(frozen=True)
class Verdict:
    """Whether one checkpoint is kept.

    Attributes:
        checkpoint: its tag and folder.
        step: its step; None if it is not known.
        folder: what is deleted: the checkpoint's folder, or the one that a framework wrote for this save.
        nbytes: bytes of all files in `folder`.
        is_complete: see `completeness`; None if nothing depends on it, so that it was not found out.
        kept_because: the reason; empty if it can be deleted.
    """

    checkpoint: Checkpoint
    step: int | None
    folder: Path
    nbytes: int
    is_complete: bool | None
    kept_because: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tag": self.checkpoint.tag,
            "step": self.step,
            "bytes": self.nbytes,
            "is_complete": self.is_complete,
            "kept_because": self.kept_because or None,
        }


def plan_prune(run: Path, retention: Retention, allowed_globals: frozenset[str] = frozenset()) -> tuple[Verdict, ...]:
    """Decides which checkpoints of a run can be deleted, oldest first. Deletes nothing.

    It reads the metadata of those checkpoints only whose completeness decides something; the module says which.

    Always kept: the newest complete checkpoint and all newer ones, the one that `latest` names, the best model of HF
    Trainer, universal copies, links and what they name, checkpoints of unknown step, several checkpoints of one
    step, and checkpoints whose names have no number.

    Args:
        run: the run's folder.
        retention: what else is kept.
        allowed_globals: see `read_layout`.

    Raises:
        CheckpointNotFound: the run has no checkpoint.
        RecipeError: `retention` does not say what windows need, or a watch is of another run.
        UnsupportedLayout: the folder is a merge's output.
        WindowError: it holds the checkpoints of several runs or models.
    """
    _require_prunable(run, retention)
    run = run.absolute()
    kept = KeptLayouts(retention.specs[0].out / KEPT if retention.specs else None, is_written=False)
    checkpoints = Checkpoints(run, allowed_globals, NEVER_SETTLES_S, kept.read_and_forget)
    checkpoints.look()
    found = _Found(checkpoints)
    gone = [_gone(spec) for spec in retention.specs]
    _find_what_decides(found, retention, gone)
    reasons = _reasons(checkpoints, retention, found.complete, gone)
    return tuple(_verdict(dated, checkpoints, found, reasons) for dated in checkpoints.dated)


class _Found:
    """Which checkpoints are complete, found out one by one.

    Attributes:
        known: by step, whether the checkpoint is complete, as far as that was asked.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.known: dict[int, bool] = {}
        self._falling = sorted(checkpoints.by_step, reverse=True)

    @property
    def complete(self) -> set[int]:
        """The steps of the checkpoints that are known to be complete."""
        return {step for step, is_complete in self.known.items() if is_complete}

    def is_complete(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete."""
        if step not in self.known:
            self.known[step] = self.checkpoints.is_complete(step)
        return self.known[step]

    def newest(self, count: int, until: int | None = None) -> list[int]:
        """The newest `count` complete steps, falling; all older checkpoints stay unread.

        Args:
            count: how many.
            until: the last step that counts; None: any.
        """
        candidates = (step for step in self._falling if until is None or step <= until)
        return list(islice(filter(self.is_complete, candidates), count))


def _find_what_decides(found: _Found, retention: Retention, gone: Sequence[set[int]]) -> None:
    """Finds out whether the checkpoints are complete on which a verdict depends; `gone` is `_gone` of each spec."""
    counts = [count for spec in retention.specs for count in spec.counts.values()]
    newest = found.newest(max(1, retention.keep_last, retention.keep_window or 0, *counts))
    steps = set(found.checkpoints.by_step)
    for spec, gone_of_spec in zip(retention.specs, gone, strict=True):
        line = sorted(steps | gone_of_spec)
        for end in (step for step in steps if newest and step <= newest[0] and spec.ends.holds(step)):
            counts = [
                count
                for name, count in spec.counts.items()
                if window_steps(line, end, count) is not None and not spec.is_resolved(end, name)
            ]
            if counts and found.is_complete(end):
                found.newest(max(counts), end)


def _require_prunable(run: Path, retention: Retention) -> None:
    """Raises an error if the run cannot be pruned with this retention."""
    if not retention.specs and retention.keep_window is None:
        raise RecipeError(
            "nothing says which checkpoints windows need: give --keep-window N, or the --out DIR of a watch."
        )
    for spec in retention.specs:
        require_run(spec, run)
    if (run / MANIFEST).is_file():
        raise UnsupportedLayout(f"{run} is a merge's output, not a run.")
    find_checkpoints(run)  # raises CheckpointNotFound


def _reasons(
    checkpoints: Checkpoints, retention: Retention, complete: set[int], gone: Sequence[set[int]]
) -> dict[int, str]:
    """Why each step is kept. If there are several reasons, the first one is given."""
    run, steps = checkpoints.run, set(checkpoints.by_step)
    newest = max(complete, default=-1)
    ordered = sorted(complete)
    reasons = {step: "newer than the newest complete one" for step in steps if step > newest}
    latest = checkpoints.step_of_latest()
    steps_by_reason = [
        ("latest names it", {latest} if latest is not None else set()),
        ("newest complete", {newest}),
        ("HF Trainer's best model", _best_of_trainer(checkpoints)),
        (f"newest {retention.keep_last} complete", _from(ordered, retention.keep_last, steps)),
    ]
    if retention.keep_window:
        steps_by_reason.append((f"window of {retention.keep_window}", _from(ordered, retention.keep_window, steps)))
    if retention.keep_every:
        steps_by_reason.append(
            (f"every {retention.keep_every}", {step for step in steps if step % retention.keep_every == 0})
        )
    for reason, kept in steps_by_reason:
        for step in kept:
            reasons.setdefault(step, reason)
    for spec, gone_of_spec in zip(retention.specs, gone, strict=True):
        for step, reason in _of_spec(spec, {step for step in steps if step <= newest}, complete, gone_of_spec).items():
            reasons.setdefault(step, reason)
    for step in _of_unfinished_merges(run, retention.folders):
        reasons.setdefault(step, "an unfinished merge needs it")
    return reasons


def _best_of_trainer(checkpoints: Checkpoints) -> set[int]:
    """The step of the checkpoint that HF Trainer loads at the end as the best one, as its newest state says."""
    steps = {checkpoint.save_folder.name: step for step, checkpoint in checkpoints.by_step.items()}
    for _, checkpoint in sorted(checkpoints.by_step.items(), reverse=True):
        try:
            state = json.loads(read_small(checkpoint.save_folder / TRAINER_STATE))
            best = steps.get(Path(state["best_model_checkpoint"]).name)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # not HF Trainer's, not written to its end yet, or without a best model
        return set() if best is None else {best}
    return set()


def _from(complete: Sequence[int], count: int, steps: set[int]) -> set[int]:
    """The newest `count` complete steps, and all steps after the oldest of them."""
    oldest = complete[-count:][:1]
    return {step for step in steps if oldest and step >= oldest[0]} if count else set()


def _gone(spec: WatchSpec) -> set[int]:
    """Steps that were checkpoints of the run once, as prunes and finished merges have recorded. Some may exist."""
    gone = deleted_steps(spec.run)
    for end, name in merged_outputs(spec):
        gone |= source_steps(spec.run, spec.output_folder(end, name))
    return gone


def _of_spec(spec: WatchSpec, steps: set[int], complete: set[int], gone: set[int]) -> dict[int, str]:
    """Steps that a watch's open windows need.

    A broken checkpoint may later be repaired or deleted. Its windows differ in the two cases, and both count.
    """
    needed = partial(needed_steps, counts=spec.counts, ends=spec.ends, is_resolved=spec.is_resolved)
    return needed(steps & complete, gone - steps) | needed(steps, gone - steps)


def _of_unfinished_merges(run: Path, folders: Iterable[Path]) -> set[int]:
    """Steps of the run's checkpoints that unfinished merges need."""
    sources = [source for folder in folders for merge in unfinished_merges(folder) for source in merge["sources"]]
    return {int(source["step"]) for source in sources if Path(source["path"]).is_relative_to(run.resolve())}


def _verdict(dated: Dated, checkpoints: Checkpoints, found: _Found, reasons: dict[int, str]) -> Verdict:
    checkpoint, step = dated.checkpoint, dated.step
    folder = _deleted_folder(checkpoints.run, checkpoint)
    files = fingerprint(folder)
    is_chosen = step is not None and checkpoints.by_step[step] is checkpoint
    reason = _kept_for_itself(folder, dated, checkpoints) or ("" if step is None else reasons.get(step, ""))
    reason = reason or ("a merge reads it now" if _is_read(files) else "")
    is_complete = found.known.get(step) if is_chosen and step is not None else False
    return Verdict(checkpoint, step, folder, sum(nbytes for _, nbytes, *_ in files), is_complete, reason)


def _is_read(files: Fingerprint) -> bool:
    """Whether a merge on this machine, or on another one if the file system's locks are seen there, reads a file."""
    return any(is_held(Path(name)) for name, *_ in files if name.endswith(".pt"))


def _deleted_folder(run: Path, checkpoint: Checkpoint) -> Path:
    """The folder of a whole save, unless that is the run itself."""
    return checkpoint.path if checkpoint.save_folder == run else checkpoint.save_folder


def _kept_for_itself(folder: Path, dated: Dated, checkpoints: Checkpoints) -> str:
    """Why a checkpoint is kept whatever its step is; empty if it is not."""
    checkpoint = dated.checkpoint
    beside = [d for d in checkpoints.dated if d is not dated and d.checkpoint.path.is_relative_to(folder)]
    if dated.step is None:
        return "its step is not known"
    if checkpoint.is_universal:
        return "a universal copy"
    if checkpoint.path.is_symlink() or folder.is_symlink():
        return "a link"
    if checkpoint.links:
        return f"{checkpoint.links[0]} is a link to it"
    if not _has_number(folder.name):
        return "its name has no number"
    # A copy whose name has no number stays itself, so the other one need not.
    twins = [d.checkpoint for d in checkpoints.dated if d.step == dated.step and d is not dated]
    twins = [
        twin for twin in twins if not twin.is_universal and _has_number(_deleted_folder(checkpoints.run, twin).name)
    ]
    if twins:
        return f"{twins[0].tag} is of the same step"
    return f"{beside[0].checkpoint.tag} lies in its folder" if beside else ""


def _has_number(name: str) -> bool:
    return any(map(str.isdigit, name))


def trash_of(run: Path) -> Path:
    """The folder of checkpoints that are being deleted."""
    return (run / DELETED).parent / "trash"


def trash_content(run: Path) -> list[Path]:
    """Checkpoints that a killed prune has moved to the trash and not deleted."""
    return sorted(trash_of(run).iterdir()) if trash_of(run).is_dir() else []


def prune(
    run: Path,
    retention: Retention,
    allowed_globals: frozenset[str] = frozenset(),
    on_plan: Callable[[tuple[Verdict, ...]], None] = lambda verdicts: None,
) -> tuple[Verdict, ...]:
    """Deletes what `plan_prune` does not keep, and what a killed prune has left in the trash.

    Args:
        run: the run's folder.
        retention: what is kept besides.
        allowed_globals: see `read_layout`.
        on_plan: called with the verdicts before anything is deleted.

    Returns:
        One verdict for each checkpoint, oldest first.

    Raises:
        CheckpointNotFound, RecipeError, UnsupportedLayout, WindowError: see `plan_prune`.
        OutputLocked: another prune deletes in the run now.
        OSError: a file cannot be removed; the next prune tries again.
    """
    _require_prunable(run, retention)
    trash = trash_of(run)
    trash.mkdir(parents=True, exist_ok=True)
    with hold_lock(trash.parent / "lock", f"another prune deletes in {run}"):
        for path in trash_content(run):
            shutil.rmtree(path)
        verdicts = plan_prune(run, retention, allowed_globals)
        on_plan(verdicts)
        deletions = [verdict for verdict in verdicts if not verdict.kept_because]
        for verdict in deletions:
            _record(run / DELETED, verdict)
            verdict.folder.rename(trash / verdict.folder.name)
        for verdict in deletions:
            shutil.rmtree(trash / verdict.folder.name)
    return verdicts


def _record(path: Path, verdict: Verdict) -> None:
    """Records that a checkpoint is deleted, before it is deleted."""
    append_line(path, json.dumps(verdict.to_json() | {"time": time.time()}))


def prune_report(verdicts: Sequence[Verdict], trash: Sequence[Path], *, is_deleting: bool) -> str:
    """The table that `wsm-ds prune` prints: one line per checkpoint, and the bytes that are freed.

    Args:
        verdicts: as `plan_prune` returns them.
        trash: as `trash_content` returns it.
        is_deleting: whether the checkpoints are deleted, or only shown.
    """
    fate = "deleted" if is_deleting else "would be deleted"
    rows = [
        [verdict.checkpoint.tag, "-" if verdict.step is None else str(verdict.step), format_size(verdict.nbytes),
         COMPLETE[verdict.is_complete], f"kept: {verdict.kept_because}" if verdict.kept_because else fate]
        for verdict in verdicts
    ]  # fmt: skip
    deletions = [verdict for verdict in verdicts if not verdict.kept_because]
    freed = format_size(sum(verdict.nbytes for verdict in deletions))
    text = f"{len(deletions)} of {len(verdicts)} checkpoints, {freed}"
    lines = [table(["checkpoint", "step", "size", "complete", "verdict"], rows)]
    lines += [f"left by a killed prune, and deleted with --delete: {few(path.name for path in trash)}"] if trash else []
    lines.append(f"deleting {text}" if is_deleting else f"nothing was deleted; --delete would delete {text}")
    return "\n".join(lines)
