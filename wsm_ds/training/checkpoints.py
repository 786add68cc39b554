"""Saves checkpoints that appear complete or not at all, and only those of the newest attempt.

Every rank saves into RUN/job/attempt-K. After a barrier, rank 0 checks that K is still the newest attempt, and renames
the folder to RUN/global_stepN. A newer attempt that begins between the check and the rename removes the folders of the
older attempts. So an old attempt publishes a complete checkpoint or none.
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
from wsm_ds.layouts.order import in_order
from wsm_ds.layouts.run import checkpoint_at
from wsm_ds.training.job import JobFolder, require_current
from wsm_ds.training.random_states import save_random_states

log = logging.getLogger(__name__)

RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""DeepSpeed copies these beside the checkpoints (`runtime/engine.py`, `_copy_recovery_script`)."""


def newest_complete(run: Path) -> Layout | None:
    """Reads the newest complete checkpoint: no file is missing or truncated.

    The file `latest` is not used, because it may be old or name a broken checkpoint. Broken checkpoints are named in
    the log.

    Returns:
        Its layout. None if the run has no checkpoint at all.

    Raises:
        BrokenCheckpoint: the run has checkpoints, and all of them are broken.
        UnsupportedLayout, UnsafePickle: see `read_layout`.
    """
    try:
        run_checkpoints = find_checkpoints(run)
    except CheckpointNotFound:
        return None
    for dated in reversed(in_order(run_checkpoints)):
        checkpoint = dated.checkpoint
        try:
            layout = read_layout(checkpoint)
        except BrokenCheckpoint as error:
            log.warning("%s is not used: %s", checkpoint.tag, error)
            continue
        # DeepSpeed loads a universal checkpoint only with `load_universal` in its config.
        if not layout.is_universal:
            return layout
    raise BrokenCheckpoint(
        f"none of the checkpoints of {run} is complete: {few(checkpoint.tag for checkpoint in run_checkpoints)}. "
        "Move them away to begin the run anew."
    )


def save_checkpoint(engine: Any, job: JobFolder, attempt: int, ranks: Ranks, client_state: dict[str, Any]) -> Path:
    """Saves RUN/global_stepN, where N is the engine's number of updates.

    Args:
        engine: DeepSpeed's.
        job: the run's.
        attempt: the number of this attempt.
        ranks: of the job.
        client_state: plain data to save with the checkpoint.

    Returns:
        The checkpoint's folder.

    Ranks: all. It holds two barriers and two decisions of rank 0 beside DeepSpeed's own collectives. Ranks wait in
    them for the slowest one, so a save must be faster than the timeout of the process groups.

    Raises:
        Superseded: on rank 0, another attempt was started after this one (PeerFailed on the other ranks).
        RecipeError: DeepSpeed's config names a decoupled checkpoint writer.
        OSError: the disk is full, or fails.
    """
    import deepspeed.comm as dist

    if engine.checkpoint_engine.is_decoupled():
        raise RecipeError(
            "DeepSpeed's config names a decoupled checkpoint writer, which still writes when save_checkpoint returns. "
            "The checkpoint would be published incomplete; remove checkpoint.writer from the config."
        )
    tag = f"global_step{engine.global_steps}"
    root = job.attempt_folder(attempt)
    ranks.decide(lambda: _make_empty_folder(job, attempt, root / tag))
    save_random_states(root / tag, dist.get_rank())
    # `latest` is written by `publish`: DeepSpeed would write it into the attempt's folder, before the rename.
    engine.save_checkpoint(str(root), tag=tag, client_state=client_state, save_latest=False)
    if int(os.environ["LOCAL_RANK"]) == 0:  # one process per machine: it flushes that machine's page cache
        sync_files(root / tag)
    dist.barrier()
    ranks.decide(lambda: publish(job, attempt, tag))
    return job.run / tag


def _make_empty_folder(job: JobFolder, attempt: int, staged: Path) -> None:
    require_current(job, attempt)
    if staged.exists():  # a launcher has restarted the ranks within this attempt
        shutil.rmtree(staged)
    staged.mkdir(parents=True)


def sync_files(folder: Path) -> None:
    """Waits until all files of a folder are on the disk, those of other processes of this machine too."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)


def publish(job: JobFolder, attempt: int, tag: str) -> None:
    """Moves a saved checkpoint to RUN/TAG, and writes TAG into `latest`.

    A broken checkpoint at RUN/TAG is moved to RUN/job/unusable. A complete one stays, because it is of the same step.

    Ranks: rank 0, when all ranks have saved.

    Raises:
        Superseded: another attempt was started after this one.
    """
    require_current(job, attempt)
    staged, target = job.attempt_folder(attempt) / tag, job.run / tag
    if target.exists() and _is_complete(target):
        log.warning("%s exists already and is complete; it is kept", target)
        shutil.rmtree(staged)
    else:
        if target.exists():
            unusable = job.unusable / f"{tag}-attempt-{attempt}"
            unusable.parent.mkdir(exist_ok=True)
            target.rename(unusable)
            log.warning("%s was broken; it was moved to %s", target, unusable)
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
    """Removes what older attempts have saved and not published.

    Each folder is renamed first. Otherwise an old attempt that wakes up in the middle could publish what is left of it.

    Ranks: rank 0.
    """
    removed = job.folder / "removed"
    removed.mkdir(exist_ok=True)
    for folder in job.folder.glob("attempt-*"):
        number = folder.name.removeprefix("attempt-")
        if number.isdigit() and int(number) < attempt:
            folder.rename(removed / f"{folder.name}-by-{attempt}")
    shutil.rmtree(removed, ignore_errors=True)
