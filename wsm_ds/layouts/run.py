"""What checkpoints a run's folder holds: DeepSpeed's `RUN/TAG` and HF Trainer's `RUN/checkpoint-N/TAG`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import CheckpointNotFound, few

STEP_IN_NAME = re.compile(r"(\d+)(?:_universal)?$")
JOB = "job"
"""What the jobs of a run keep in its folder: heartbeats, attempts, saves that are not published yet."""
DELETED = ".wsm-prune/deleted.jsonl"
"""What `wsm-ds prune` has deleted of a run, a line a checkpoint."""


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """A checkpoint's folder. `named_step` comes from its name; its files know the truth."""

    named_step: int
    tag: str
    path: Path


def find_checkpoints(run: Path) -> list[Checkpoint]:
    """Every folder of `run` that holds DeepSpeed's model files, in the order of the steps in their names.

    Raises:
        CheckpointNotFound: `run` is no folder, or holds none.
    """
    if not run.is_dir():
        raise CheckpointNotFound(f"{run} is not a folder.")
    folders = [path for path in run.iterdir() if path.is_dir() and path.name != JOB and not path.name.startswith(".")]
    for trainer in [path for path in folders if path.name.startswith("checkpoint-")]:
        folders += [path for path in trainer.iterdir() if path.is_dir()]
    found = [_checkpoint(run, path) for path in folders if _is_checkpoint(path)]
    if not found:
        raise CheckpointNotFound(
            f"{run} holds no DeepSpeed checkpoint: no folder in it, or in its checkpoint-*, has *_model_states.pt. "
            "Give the folder that was passed to save_checkpoint (or HF Trainer's output_dir)."
        )
    return sorted(found)


def _is_checkpoint(path: Path) -> bool:
    """Whether files that DeepSpeed names so, or the fast writer's pieces of them, are in a folder."""
    return any(path.glob("*_states.pt")) or any(path.glob("*_states.pt-*"))


def _checkpoint(run: Path, path: Path) -> Checkpoint:
    match = STEP_IN_NAME.search(path.name)
    return Checkpoint(int(match.group(1)) if match else -1, path.relative_to(run).as_posix(), path)


def deleted_steps(run: Path) -> set[int]:
    """The steps of the checkpoints that `wsm-ds prune` has deleted of a run."""
    try:
        lines = (run / DELETED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    steps = set()
    for line in lines:
        try:
            steps.add(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a kill, before anything was deleted
    return steps


def latest_step(folder: Path) -> int | None:
    """The step in the tag that the `latest` of a folder names; None if there is none."""
    try:
        match = STEP_IN_NAME.search((folder / "latest").read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match.group(1)) if match else None


def find_tag(run: Path, tag: str) -> Checkpoint:
    """The checkpoint called `tag` (`global_step8`, `checkpoint-8/global_step8`, or `checkpoint-8`)."""
    checkpoints = find_checkpoints(run)
    for checkpoint in checkpoints:
        parts = checkpoint.tag.split("/")
        if tag in (checkpoint.tag, parts[0], parts[-1]):
            return checkpoint
    raise CheckpointNotFound(f"{run} holds no checkpoint {tag}; it holds {few(c.tag for c in checkpoints)}.")


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint whose folder is `path`, RUN/TAG.

    Raises:
        CheckpointNotFound: it holds no model file.
    """
    if not _is_checkpoint(path):
        raise CheckpointNotFound(f"{path} is no checkpoint's folder: no *_model_states.pt is in it.")
    return _checkpoint(path.parent, path)
