"""The checkpoints in a run's folder: DeepSpeed's `RUN/TAG` and HF Trainer's `RUN/checkpoint-N/TAG`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import CheckpointNotFound, did_you_mean, few
from wsm_ds.layouts.frameworks import Framework, save_of

STEP_IN_NAME = re.compile(r"(\d+)(?:_universal)?$")
JOB = "job"
"""The folder in a run where training jobs keep heartbeats, attempts and saves that are not published yet."""
DELETED = ".wsm-prune/deleted.jsonl"
"""The file in a run that lists the checkpoints which `wsm-ds prune` has deleted, one JSON object a line."""


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """A checkpoint's folder.

    Attributes:
        named_step: the step in its name; -1 if the name has none. The true step is in its files (`Layout.step`).
        tag: its path within the run.
        path: the folder.
    """

    named_step: int
    tag: str
    path: Path

    @property
    def saved_by(self) -> Framework:
        """The framework that wrote it, as its folder tells."""
        return save_of(self.path).framework

    @property
    def save_folder(self) -> Path:
        """The folder that the framework writes for one save; see `Save.folder`."""
        return save_of(self.path).folder


def find_checkpoints(run: Path) -> list[Checkpoint]:
    """Lists every folder of `run` that holds DeepSpeed's files, in the order of the steps in their names.

    Raises:
        CheckpointNotFound: `run` is not a folder, or holds no checkpoint.
    """
    if not run.is_dir():
        raise CheckpointNotFound(f"{run} is not a folder. Give the folder that was passed to save_checkpoint.")
    folders = [path for path in run.iterdir() if path.is_dir() and path.name != JOB and not path.name.startswith(".")]
    # HF Trainer saves into RUN/checkpoint-N (transformers/trainer_utils.py, PREFIX_CHECKPOINT_DIR).
    for trainer in [path for path in folders if path.name.startswith("checkpoint-")]:
        folders += [path for path in trainer.iterdir() if path.is_dir()]
    checkpoints = [_checkpoint(run, path) for path in folders if _is_checkpoint(path)]
    if not checkpoints:
        raise CheckpointNotFound(
            f"{run} holds no DeepSpeed checkpoint: no folder in it, or in its checkpoint-*, has *_model_states.pt. "
            "Give the folder that was passed to save_checkpoint (or HF Trainer's output_dir)."
        )
    return sorted(checkpoints)


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder holds model or optimizer files, or the pieces of them that DeepSpeed's fast writer writes."""
    return any(path.glob("*_states.pt")) or any(path.glob("*_states.pt-*"))


def _checkpoint(run: Path, path: Path) -> Checkpoint:
    match = STEP_IN_NAME.search(path.name)
    return Checkpoint(int(match.group(1)) if match else -1, path.relative_to(run).as_posix(), path)


def deleted_steps(run: Path) -> set[int]:
    """Returns the steps of the checkpoints of a run that `wsm-ds prune` has deleted."""
    try:
        lines = (run / DELETED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    steps = set()
    for line in lines:
        try:
            steps.add(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # a kill cut the line short; its checkpoint still exists, because the line is written first
    return steps


def latest_step(folder: Path) -> int | None:
    """Returns the step in the tag that a folder's `latest` file names; None without a file or a step."""
    try:
        match = STEP_IN_NAME.search((folder / "latest").read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match.group(1)) if match else None


def find_tag(run: Path, tag: str) -> Checkpoint:
    """Returns the checkpoint of a run that is called `tag`.

    Args:
        run: the run's folder.
        tag: `global_step8`, `checkpoint-8/global_step8` or `checkpoint-8`.

    Raises:
        CheckpointNotFound: no checkpoint has this name; the message lists the existing names.
    """
    checkpoints = find_checkpoints(run)
    for checkpoint in checkpoints:
        parts = checkpoint.tag.split("/")
        if tag in (checkpoint.tag, parts[0], parts[-1]):
            return checkpoint
    step = latest_step(run) if tag == "latest" else int(tag) if tag.isdecimal() else None
    tags = [checkpoint.tag for checkpoint in reversed(checkpoints)]
    of_step = [checkpoint.tag for checkpoint in checkpoints if checkpoint.named_step == step]
    suggestion = f" (did you mean {of_step[0]!r}?)" if of_step else did_you_mean(tag, tags)
    raise CheckpointNotFound(f"{run} holds no checkpoint {tag}{suggestion}; it holds, the newest first, {few(tags)}.")


def checkpoint_at(path: Path) -> Checkpoint:
    """Returns the checkpoint whose folder is `path`, RUN/TAG.

    Raises:
        CheckpointNotFound: the folder holds no model file.
    """
    if not _is_checkpoint(path):
        raise CheckpointNotFound(f"{path} is not a checkpoint's folder: it holds no *_model_states.pt. Give RUN/TAG.")
    return _checkpoint(path.parent, path)
