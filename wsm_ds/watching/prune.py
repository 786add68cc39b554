"""Deletes the checkpoints that no window can need any more. If it is not sure, it keeps a checkpoint.

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
from pathlib import Path
from typing import Any

from wsm_ds.errors import RecipeError, UnsupportedLayout, few
from wsm_ds.filesystem.durable import append_line
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.layouts import Checkpoint, find_checkpoints
from wsm_ds.layouts.run import DELETED, deleted_steps, latest_step
from wsm_ds.publishing.staging_folder import MANIFEST, unfinished_merges
from wsm_ds.reporting.tables import table
from wsm_ds.sizes import format_size
from wsm_ds.watching.completeness import Checkpoints
from wsm_ds.watching.spec import WatchSpec, merged_outputs, source_steps
from wsm_ds.watching.windows import needed_steps

NEVER_SETTLES_S = float("inf")


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
        nbytes: bytes of all its files.
        is_complete: see `completeness`.
        kept_because: the reason; empty if it can be deleted.
    """

    checkpoint: Checkpoint
    nbytes: int
    is_complete: bool
    kept_because: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tag": self.checkpoint.tag,
            "step": self.checkpoint.named_step,
            "bytes": self.nbytes,
            "is_complete": self.is_complete,
            "kept_because": self.kept_because or None,
        }


def plan_prune(run: Path, retention: Retention, allowed_globals: frozenset[str] = frozenset()) -> tuple[Verdict, ...]:
    """Decides which checkpoints of a run can be deleted, oldest first. Deletes nothing.

    Always kept: the newest complete checkpoint and all newer ones, the one that `latest` names, universal copies,
    links, and folders whose names do not end with a step.

    Args:
        run: the run's folder.
        retention: what else is kept.
        allowed_globals: see `read_layout`.

    Raises:
        CheckpointNotFound: the run has no checkpoint.
        RecipeError: `retention` does not say what windows need, or a watch is of another run.
        UnsupportedLayout: the folder is HF Trainer's, or a merge's output.
    """
    run_checkpoints = _checkpoints_of(run, retention)
    checkpoints = Checkpoints(run.absolute(), allowed_globals, NEVER_SETTLES_S)
    checkpoints.look()
    complete = {step for step in checkpoints.by_step if checkpoints.is_complete(step)}
    reasons = _reasons(run, retention, set(checkpoints.by_step), complete)
    return tuple(_verdict(checkpoint, complete, reasons) for checkpoint in run_checkpoints)


def _checkpoints_of(run: Path, retention: Retention) -> list[Checkpoint]:
    """The checkpoints of a run; raises if the run cannot be pruned with this retention."""
    if not retention.specs and retention.keep_window is None:
        raise RecipeError(
            "nothing says which checkpoints windows need: give --keep-window N, or the --out DIR of a watch."
        )
    for spec in retention.specs:
        if spec.run.resolve() != run.resolve():
            raise RecipeError(f"{spec.out} has the merges of {spec.run}, not of {run}.")
    if (run / MANIFEST).is_file():
        raise UnsupportedLayout(f"{run} is a merge's output, not a run.")
    run_checkpoints = find_checkpoints(run)
    if any("/" in checkpoint.tag for checkpoint in run_checkpoints):
        raise UnsupportedLayout(f"{run} is HF Trainer's folder; let Trainer delete, by its save_total_limit.")
    return run_checkpoints


def _reasons(run: Path, retention: Retention, steps: set[int], complete: set[int]) -> dict[int, str]:
    """Why each step is kept. If there are several reasons, the first one is given."""
    newest = max(complete, default=-1)
    ordered = sorted(complete)
    reasons = {step: "newer than the newest complete one" for step in steps if step > newest}
    latest = latest_step(run)
    steps_by_reason = [
        ("latest names it", {latest} if latest is not None else set()),
        ("newest complete", {newest}),
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
    for spec in retention.specs:
        for step, reason in _of_spec(spec, {step for step in steps if step <= newest}, complete).items():
            reasons.setdefault(step, reason)
    for step in _of_unfinished_merges(run, retention.folders):
        reasons.setdefault(step, "an unfinished merge needs it")
    return reasons


def _from(complete: Sequence[int], count: int, steps: set[int]) -> set[int]:
    """The newest `count` complete steps, and all steps after the oldest of them."""
    oldest = complete[-count:][:1]
    return {step for step in steps if oldest and step >= oldest[0]} if count else set()


def _of_spec(spec: WatchSpec, steps: set[int], complete: set[int]) -> dict[int, str]:
    """Steps that a watch's open windows need.

    A broken checkpoint may later be repaired or deleted. Its windows differ in the two cases, and both count.
    """
    gone = deleted_steps(spec.run)
    for end, name in merged_outputs(spec):
        gone |= source_steps(spec.run, spec.output_folder(end, name))
    needed = partial(needed_steps, counts=spec.counts, ends=spec.ends, is_resolved=spec.is_resolved)
    return needed(steps & complete, gone - steps) | needed(steps, gone - steps)


def _of_unfinished_merges(run: Path, folders: Iterable[Path]) -> set[int]:
    """Steps of the run's checkpoints that unfinished merges need."""
    sources = [source for folder in folders for merge in unfinished_merges(folder) for source in merge["sources"]]
    return {int(source["step"]) for source in sources if Path(source["path"]).is_relative_to(run.resolve())}


def _verdict(checkpoint: Checkpoint, complete: set[int], reasons: dict[int, str]) -> Verdict:
    nbytes = sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    step = checkpoint.named_step
    reason = reasons.get(step, "")
    if step < 0:
        reason = "its name has no step"
    elif checkpoint.tag.endswith("_universal"):
        reason = "a universal copy"
    elif checkpoint.path.is_symlink():
        reason = "a link"
    return Verdict(checkpoint, nbytes, step in complete, reason)


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
        CheckpointNotFound, RecipeError, UnsupportedLayout: see `plan_prune`.
        OutputLocked: another prune deletes in the run now.
        OSError: a file cannot be removed; the next prune tries again.
    """
    _checkpoints_of(run, retention)
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
            verdict.checkpoint.path.rename(trash / verdict.checkpoint.tag)
        for verdict in deletions:
            shutil.rmtree(trash / verdict.checkpoint.tag)
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
        [verdict.checkpoint.tag, str(verdict.checkpoint.named_step), format_size(verdict.nbytes),
         "yes" if verdict.is_complete else "no", f"kept: {verdict.kept_because}" if verdict.kept_because else fate]
        for verdict in verdicts
    ]  # fmt: skip
    deletions = [verdict for verdict in verdicts if not verdict.kept_because]
    freed = format_size(sum(verdict.nbytes for verdict in deletions))
    text = f"{len(deletions)} of {len(verdicts)} checkpoints, {freed}"
    lines = [table(["checkpoint", "step", "size", "complete", "verdict"], rows)]
    lines += [f"left by a killed prune, and deleted with --delete: {few(path.name for path in trash)}"] if trash else []
    lines.append(f"deleting {text}" if is_deleting else f"nothing was deleted; --delete would delete {text}")
    return "\n".join(lines)
