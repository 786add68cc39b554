"""The checkpoints in a run's folder, however a framework nests them: see `frameworks`."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import BrokenCheckpoint, CheckpointNotFound, UnsupportedLayout, did_you_mean, few
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import MANIFEST, SAVE_FOLDER, UNIVERSAL, Framework, save_of
from wsm_ds.layouts.saved_step import saved_step

JOB = "job"
"""The folder in a run where training jobs keep heartbeats, attempts and saves that are not published yet."""
MOST_TAG_BYTES = 4096
"""`latest` holds the name of a folder, which has at most 255 bytes on Linux, or a path of at most 4096."""
MOST_DIGITS = 18
"""Python refuses to read a number of more than 4300 digits. No run has a step of more than 18."""
DELETED = ".wsm-prune/deleted.jsonl"
"""The file in a run that lists the checkpoints which `wsm-ds prune` has deleted, one JSON object a line."""
CHECKPOINTS = "checkpoints"
"""The folder in a run where Accelerate and Lightning save (`accelerate/accelerator.py:3664`)."""

RANK_FILE = re.compile(r"(model|optim)_states\.pt(-|$)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's folder. Its step is in its files: `saved_step`.

    Attributes:
        tag: its path within the run.
        path: the folder.
        links: other names of it: paths of links within the run.
    """

    tag: str
    path: Path
    links: tuple[str, ...] = ()

    @property
    def saved_by(self) -> Framework:
        """The framework that wrote it, as its folder tells."""
        return save_of(self.path).framework

    @property
    def save_folder(self) -> Path:
        """The folder that the framework writes for one save; see `Save.folder`."""
        return save_of(self.path).folder

    @property
    def is_universal(self) -> bool:
        """Whether its name is that of a universal checkpoint."""
        return self.tag.endswith(UNIVERSAL)


def natural(tag: str) -> list[str | int]:
    """A sort key that compares numbers in names as numbers.

    >>> sorted(["step_10", "step_9"], key=natural)
    ['step_9', 'step_10']
    """
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", tag))]


def find_checkpoints(run: Path) -> list[Checkpoint]:
    """Lists the folders of a run that hold DeepSpeed's files, sorted by name. `order.in_order` sorts them by step.

    A link to a checkpoint of the run is another name of it, and no checkpoint of its own.

    Raises:
        CheckpointNotFound: `run` is not a folder, or holds no checkpoint.
    """
    if not run.is_dir():
        raise CheckpointNotFound(f"{run} is not a folder. Give the folder that was passed to save_checkpoint.")
    found = [item for folder in (run, run / CHECKPOINTS) for item in _checkpoint_folders(folder)]
    if not found:
        raise CheckpointNotFound(
            f"{run} holds no DeepSpeed checkpoint: no folder in it, or in a framework's folder for one save, has "
            f"*_model_states.pt. {_hint(run)}"
        )
    real_run, tags = run.resolve(), dict[Path, list[str]]()
    # Links last, so that a checkpoint has its own name if it lies in the run.
    for path, is_link in sorted(found, key=_is_second_name):
        relative = path.relative_to(run)
        tags.setdefault(path.resolve() if is_link else real_run / relative, []).append(relative.as_posix())
    checkpoints = [Checkpoint(names[0], run / names[0], tuple(names[1:])) for names in tags.values()]
    return sorted(checkpoints, key=lambda checkpoint: natural(checkpoint.tag))


def _is_second_name(item: tuple[Path, bool]) -> tuple[bool, bool, list[str | int]]:
    """A sort key of paths to one checkpoint: links, and names without a number, come last."""
    path, is_link = item
    return is_link, not any(map(str.isdigit, path.name + path.parent.name)), natural(path.as_posix())


def _hint(run: Path) -> str:
    """What to do about a run without checkpoints: names folders in it that hold some."""
    if is_checkpoint_folder(run):
        return f"It is itself a checkpoint: give {run.absolute().parent}, and its name {run.absolute().name} as tag."
    runs = [path for path, _ in _folders(run) if any(_checkpoint_folders(path))]
    if runs:
        return f"Give one of the runs in it: {few(sorted(runs))}."
    return (
        "Give the folder that was passed to save_checkpoint, or a framework's: HF Trainer's output_dir, Accelerate's "
        "project_dir, the dirpath of Lightning's ModelCheckpoint. Unpack checkpoints that are tar files (Composer)."
    )


def _checkpoint_folders(folder: Path) -> Iterator[tuple[Path, bool]]:
    """The checkpoints in a folder, and in saves of a framework in it; and whether each is reached by a link."""
    for path, is_link in _folders(folder):
        if is_checkpoint_folder(path):
            yield path, is_link
        elif path.name != CHECKPOINTS and not (path / MANIFEST).exists():
            save = path.resolve() if is_link else path  # the name of a link tells nothing of a framework
            for inner, is_inner_link in _folders(path):
                if save_of(save / inner.name).folder == save and is_checkpoint_folder(inner):
                    yield inner, is_link or is_inner_link


def _folders(folder: Path) -> Iterator[tuple[Path, bool]]:
    """The folders in a folder, and whether each is a link; none if it is not a folder, or cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == JOB or entry.name.startswith("."):
                    continue
                # A link to itself is no folder for a Path, and an error for `entry`.
                if Path(entry).is_dir() if entry.is_symlink() else entry.is_dir():
                    yield folder / entry.name, entry.is_symlink()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder holds model or optimizer files, or the pieces of them that DeepSpeed's fast writer writes."""
    try:
        with os.scandir(path) as entries:
            return any(RANK_FILE.search(entry.name) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:  # it counts, so that its windows fail, and are not merged without it
        return SAVE_FOLDER.fullmatch(path.name) is not None


def deleted_steps(run: Path) -> set[int]:
    """Returns the steps of the checkpoints of a run that `wsm-ds prune` has deleted.

    Raises:
        BrokenCheckpoint: the list is not a text file, or is larger than any list; the message names it.
    """
    try:
        lines = read_small(run / DELETED).splitlines()
    except FileNotFoundError:
        return set()
    except ValueError as error:
        raise BrokenCheckpoint(f"the list of deleted checkpoints cannot be read: {error}. Move it away.") from error
    steps = set()
    for line in lines:
        try:
            steps.add(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # a kill cut the line short; its checkpoint still exists, because the line is written first
    return steps


def latest_tag(folder: Path) -> str | None:
    """Returns the name in a folder's `latest` file; None without a file."""
    try:
        return read_small(folder / "latest", most_bytes=MOST_TAG_BYTES).strip() or None
    except (OSError, ValueError):
        return None


def find_tag(run: Path, tag: str) -> Checkpoint:
    """Returns the checkpoint of a run that is called `tag`.

    Args:
        run: the run's folder.
        tag: its path within the run or that of a link, or a part of it that no other checkpoint has: for
            `checkpoint-8/global_step8` also `checkpoint-8` and `global_step8`.

    Raises:
        CheckpointNotFound: no checkpoint has this name, or several have; the message lists the existing names.
    """
    checkpoints = find_checkpoints(run)
    matches = [c for c in checkpoints if tag in (c.tag, *c.links)]
    matches = matches or [c for c in checkpoints if any(tag in _parts(name) for name in (c.tag, *c.links))]
    if len(matches) > 1:  # `checkpoint-8` is the folder of a checkpoint and of its universal copy
        matches = [c for c in matches if not c.is_universal] or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise CheckpointNotFound(
            f"{run} holds {len(matches)} checkpoints {tag}: {few(c.tag for c in matches)}. Give one of these names."
        )
    tags = [checkpoint.tag for checkpoint in reversed(checkpoints)]
    suggestion = _of_step(run, tag, checkpoints) or did_you_mean(tag, tags)
    raise CheckpointNotFound(f"{run} holds no checkpoint {tag}{suggestion}; it holds {few(tags)}.")


def _parts(name: str) -> set[str]:
    """The parts of a tag, and its beginnings (`checkpoints/checkpoint_3`)."""
    parts = name.split("/")
    return {*parts, *("/".join(parts[:count]) for count in range(1, len(parts)))} - {CHECKPOINTS}


def _of_step(run: Path, tag: str, checkpoints: list[Checkpoint]) -> str:
    """Suggests the checkpoint of a step, for a tag that is a number or `latest`."""
    if tag == "latest":
        names = [checkpoint.tag for checkpoint in checkpoints if checkpoint.tag == latest_tag(run)]
    elif tag.isdecimal() and len(tag) <= MOST_DIGITS:
        names = [checkpoint.tag for checkpoint in checkpoints if _step_or_none(checkpoint) == int(tag)]
    else:
        names = []
    return f" (did you mean {names[0]!r}?)" if names else ""


def _step_or_none(checkpoint: Checkpoint) -> int | None:
    try:
        return saved_step(checkpoint.path)
    except (BrokenCheckpoint, UnsupportedLayout):
        return None


def checkpoint_at(path: Path) -> Checkpoint:
    """Returns the checkpoint whose folder is `path`, RUN/TAG, or the only one in the save of a framework at `path`.

    Raises:
        CheckpointNotFound: the folder holds no model file, or the save holds several checkpoints.
    """
    if is_checkpoint_folder(path):
        return Checkpoint(path.name, path)
    inner = [checkpoint for checkpoint, _ in _checkpoint_folders(path) if not checkpoint.name.endswith(UNIVERSAL)]
    if len(inner) == 1 and save_of(inner[0]).folder == path:
        return Checkpoint(inner[0].name, inner[0])
    raise CheckpointNotFound(f"{path} is not a checkpoint's folder: it holds no *_model_states.pt. Give RUN/TAG.")
