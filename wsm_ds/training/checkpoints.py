"""Checkpoints that appear whole, and only those of the newest attempt.

Every rank saves into RUN/job/attempt-K; when all are through a barrier, rank 0 checks that K is still the newest
attempt and renames the folder to its place. Between the check and the rename no attempt can publish half a checkpoint
either: a newer attempt has removed the older ones' folders.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import BrokenCheckpoint, CheckpointNotFound, RecipeError, few
from wsm_ds.filesystem.durable import move_into_place, replace_shared_text, sync_file
from wsm_ds.layouts import Layout, find_checkpoints, read_layout
from wsm_ds.layouts.run import checkpoint_at
from wsm_ds.training.job import JobFolder, require_current
from wsm_ds.training.random_states import save_random_states

log = logging.getLogger(__name__)

RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def newest_complete(run: Path) -> Layout | None:
    """The newest checkpoint whose every file is there and whole; None if the run has no checkpoint at all.

    `latest` is not asked: it may be stale, or name a broken one. Broken ones are named in the log.

    Raises:
        BrokenCheckpoint: there are checkpoints, and all are broken.
        UnsupportedLayout, UnsafePickle: see `read_layout`.
    """
    try:
        found = find_checkpoints(run)
    except CheckpointNotFound:
        return None
    for checkpoint in reversed(found):
        try:
            layout = read_layout(checkpoint)
        except BrokenCheckpoint as error:
            log.warning("%s is passed over: %s", checkpoint.tag, error)
            continue
        if not layout.is_universal:
            return layout
    raise BrokenCheckpoint(
        f"none of the checkpoints of {run} is complete: {few(checkpoint.tag for checkpoint in found)}. "
        "Move them away to begin the run anew."
    )


def save_checkpoint(engine: Any, job: JobFolder, attempt: int, ranks: Ranks, client_state: dict[str, Any]) -> Path:
    """Saves RUN/global_stepN, N being the engine's updates.

    Ranks: all. It takes two barriers beside DeepSpeed's own, so a save must not take longer than the process groups'
    timeout.

    Raises:
        Superseded: on rank 0, another attempt has been started since (PeerFailed on the others).
        OSError: the disk is full, or fails.
    """
    import deepspeed.comm as dist

    if engine.checkpoint_engine.is_decoupled():
        raise RecipeError("a decoupled checkpoint writer saves later than it says; unset checkpoint.writer.")
    tag = f"global_step{engine.global_steps}"
    root = job.attempt_folder(attempt)
    ranks.decide(lambda: _make_room(job, attempt, root / tag))
    save_random_states(root / tag, dist.get_rank())
    engine.save_checkpoint(str(root), tag=tag, client_state=client_state, save_latest=False)
    if int(os.environ["LOCAL_RANK"]) == 0:
        sync_files(root / tag)  # one process of each machine: what its kernel has not written yet
    dist.barrier()
    ranks.decide(lambda: publish(job, attempt, tag))
    return job.run / tag


def _make_room(job: JobFolder, attempt: int, staged: Path) -> None:
    require_current(job, attempt)
    if staged.exists():  # of a launcher that has restarted the ranks within this attempt
        shutil.rmtree(staged)
    staged.mkdir(parents=True)


def sync_files(folder: Path) -> None:
    """Waits until the files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)


def publish(job: JobFolder, attempt: int, tag: str) -> None:
    """Lets a saved checkpoint appear as RUN/TAG, and `latest` name it.

    A broken checkpoint of that name is moved to RUN/job/unusable; a complete one stays, as it is of the same step.

    Ranks: rank 0, when all have saved.

    Raises:
        Superseded: another attempt has been started since.
    """
    require_current(job, attempt)
    staged, target = job.attempt_folder(attempt) / tag, job.run / tag
    if target.exists() and _is_complete(target):
        log.warning("%s is there already, and complete; it is kept", target)
        shutil.rmtree(staged)
    else:
        if target.exists():
            aside = job.unusable / f"{tag}-attempt-{attempt}"
            aside.parent.mkdir(exist_ok=True)
            target.rename(aside)
            log.warning("%s was broken and lies in %s now", target, aside)
        move_into_place(staged, target)
    replace_shared_text(job.run / "latest", tag)
    for name in RECOVERY_SCRIPTS:
        script = job.attempt_folder(attempt) / name
        if script.exists():
            script.replace(job.run / name)


def _is_complete(path: Path) -> bool:
    try:
        read_layout(checkpoint_at(path))
    except (BrokenCheckpoint, CheckpointNotFound):
        return False
    return True


def remove_older_attempts(job: JobFolder, attempt: int) -> None:
    """Removes what older attempts had not published. Ranks: rank 0."""
    for folder in job.folder.glob("attempt-*"):
        number = folder.name.removeprefix("attempt-")
        if number.isdigit() and int(number) < attempt:
            shutil.rmtree(folder, ignore_errors=True)
