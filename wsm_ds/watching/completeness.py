"""Decides which checkpoints of a run are complete. The run is only read: nothing in it is locked or changed.

A checkpoint is written by many ranks, one file after another, on a file system that shows another machine's files
late and in any order. It is complete when all of this holds:

- its layout can be read: no rank's file is missing, and each is a whole zip. torch writes the zip's directory last;
- it has settled: `latest`, which DeepSpeed's rank 0 writes after its own files, names it or a newer one; or there is
  no `latest`, and a newer checkpoint exists; or its files have not changed for some time.
"""

import time
from pathlib import Path

from wsm_ds.errors import BrokenCheckpoint, CheckpointNotFound, Interrupted, UnsupportedLayout
from wsm_ds.layouts import Checkpoint, find_checkpoints, read_layout
from wsm_ds.layouts.run import latest_step

Fingerprint = tuple[tuple[str, int, int], ...]


def fingerprint(folder: Path) -> Fingerprint:
    """Name, size in bytes and time of change (ns) of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in files]
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in states)


class Checkpoints:
    """The checkpoints of a run, which is listed again at every look. A complete checkpoint is read once.

    Args:
        run: the run's folder; it may be empty, or missing.
        allowed_globals: see `read_layout`.
        settle_s: seconds for which files must not have changed.

    Attributes:
        by_step: checkpoints of the last look, complete or not, by the step in their names.
        seen: steps that were complete in some look.
        unsettled: steps that may become complete if they are looked at again.
        problems: by step, why a checkpoint is broken.
    """

    def __init__(self, run: Path, allowed_globals: frozenset[str], settle_s: float) -> None:
        self.run, self.allowed_globals, self.settle_s = run, allowed_globals, settle_s
        self.by_step: dict[int, Checkpoint] = {}
        self.seen: set[int] = set()
        self.unsettled: set[int] = set()
        self.problems: dict[int, str] = {}
        self._complete: set[str] = set()
        self._since: dict[str, tuple[Fingerprint, float]] = {}
        self._broken: dict[str, tuple[Fingerprint, str]] = {}

    def look(self) -> None:
        """Lists the run again. If a checkpoint has a universal copy, the copy is left out."""
        try:
            run_checkpoints = find_checkpoints(self.run)
        except CheckpointNotFound:
            run_checkpoints = []
        named = [checkpoint for checkpoint in run_checkpoints if checkpoint.named_step >= 0]
        self.by_step = {}
        for checkpoint in sorted(named, key=lambda c: c.tag.endswith("_universal")):
            self.by_step.setdefault(checkpoint.named_step, checkpoint)
        self._complete &= {checkpoint.tag for checkpoint in self.by_step.values()}
        self.unsettled, self.problems = set(), {}

    def is_complete(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete; if not, the step is in `unsettled` or in `problems`.

        Args:
            step: a key of `by_step`.

        Raises:
            UnsupportedLayout, UnsafePickle: see `read_layout`.
        """
        checkpoint = self.by_step[step]
        if checkpoint.tag in self._complete:
            return True
        try:
            if not self._is_whole(checkpoint):
                return False
            if not self._has_settled(checkpoint):
                self.unsettled.add(step)
                return False
        except Interrupted:
            raise
        except OSError as error:  # another process renames or deletes it now, or the file system fails
            self.problems[step] = str(error)
            return False
        # Never read again: reading the metadata of thousands of rank files at every look would load the storage.
        self._complete.add(checkpoint.tag)
        self.seen.add(step)
        return True

    def _is_whole(self, checkpoint: Checkpoint) -> bool:
        """Whether the layout can be read. A broken checkpoint is read again only when one of its files has changed."""
        before = fingerprint(checkpoint.path)
        earlier = self._broken.get(checkpoint.tag)
        problem = earlier[1] if earlier is not None and earlier[0] == before else self._problem(checkpoint)
        if problem:
            self._broken[checkpoint.tag] = (before, problem)
            self.problems[checkpoint.named_step] = problem
        return not problem

    def _problem(self, checkpoint: Checkpoint) -> str:
        try:
            layout = read_layout(checkpoint, self.allowed_globals)
        except BrokenCheckpoint as error:
            return str(error)
        if layout.step != checkpoint.named_step:
            raise UnsupportedLayout(
                f"{checkpoint.path} was saved at step {layout.step}, its name says {checkpoint.named_step}; watch "
                "and prune need names that end with the step."
            )
        return ""

    def _has_settled(self, checkpoint: Checkpoint) -> bool:
        # `latest` alone does not suffice: rank 0 writes it after its own files, before the barrier at the end of
        # `save_checkpoint` (runtime/engine.py:4961). So `_is_whole` has read every rank's file before.
        latest = latest_step(checkpoint.path.parent)
        if latest is not None and latest >= checkpoint.named_step:
            return True
        if latest is None and checkpoint.named_step < max(self.by_step):
            return True
        now, current = time.monotonic(), fingerprint(checkpoint.path)
        before, since = self._since.setdefault(checkpoint.tag, (current, now))
        if before != current:
            self._since[checkpoint.tag] = (current, now)
            return False
        return now - since >= self.settle_s
