"""Decides which checkpoints of a run are complete. The run is only read: nothing in it is locked or changed.

A checkpoint is written by many ranks, one file after another, on a file system that shows another machine's files
late and in any order. It is complete when all of this holds:

- its layout can be read: no rank's file is missing, and each is a whole zip. torch writes the zip's directory last;
- it has settled: `latest`, which DeepSpeed's rank 0 writes after its own files, names it or a newer one; or there is
  no `latest`, and a newer checkpoint exists; or its files have not changed for some time. In a framework's folder for
  one save, `latest` tells nothing about the framework's own files, so there it does not count.
"""

import time
from pathlib import Path

from wsm_ds.errors import BrokenCheckpoint, CheckpointNotFound, Interrupted
from wsm_ds.layouts import Checkpoint, find_checkpoints, read_layout
from wsm_ds.layouts.order import Dated, in_order, require_one_series
from wsm_ds.layouts.run import latest_tag
from wsm_ds.planning.window import ReadLayout
from wsm_ds.watching.kept_layouts import Fingerprint, fingerprint


class Checkpoints:
    """The checkpoints of a run, which is listed again at every look. A complete checkpoint is read once.

    Args:
        run: the run's folder; it may be empty, or missing.
        allowed_globals: see `read_layout`.
        settle_s: seconds for which files must not have changed.
        read: `read_layout`, or a function that keeps its results.

    Attributes:
        dated: checkpoints of the last look, complete or not, in the order of their steps.
        by_step: those whose step is known, one for each step.
        undated: those whose step is not known, because none of their files can be read.
        seen: steps that were complete in some look.
        unsettled: steps that may become complete if they are looked at again.
        problems: by step, why a checkpoint is broken.
    """

    def __init__(
        self, run: Path, allowed_globals: frozenset[str], settle_s: float, read: ReadLayout = read_layout
    ) -> None:
        self.run, self.allowed_globals, self.settle_s, self.read = run, allowed_globals, settle_s, read
        self.dated: tuple[Dated, ...] = ()
        self.by_step: dict[int, Checkpoint] = {}
        self.undated: tuple[Dated, ...] = ()
        self.seen: set[int] = set()
        self.unsettled: set[int] = set()
        self.problems: dict[int, str] = {}
        self._complete: set[tuple[str, int]] = set()
        self._since: dict[str, tuple[Fingerprint, float]] = {}
        self._broken: dict[str, tuple[Fingerprint, str]] = {}

    def look(self) -> None:
        """Lists the run again. Of several checkpoints of a step, one is taken: no universal copy, if there is another.

        Raises:
            WindowError: the run holds the checkpoints of several runs or models.
        """
        try:
            run_checkpoints = find_checkpoints(self.run)
        except CheckpointNotFound:
            run_checkpoints = []
        require_one_series(self.run, run_checkpoints)
        self.dated = in_order(run_checkpoints)
        self.by_step = {}
        for dated in sorted(self.dated, key=_is_second_choice):
            if dated.step is not None:
                self.by_step.setdefault(dated.step, dated.checkpoint)
        self.undated = tuple(dated for dated in self.dated if dated.step is None)
        # A tag can be used again (`last.ckpt`), then for another step.
        self._complete &= {(checkpoint.tag, step) for step, checkpoint in self.by_step.items()}
        self.unsettled, self.problems = set(), {}

    def is_complete(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete; if not, the step is in `unsettled` or in `problems`.

        Args:
            step: a key of `by_step`.

        Raises:
            UnsupportedLayout, UnsafePickle: see `read_layout`.
        """
        checkpoint = self.by_step[step]
        if (checkpoint.tag, step) in self._complete:
            return True
        try:
            if not self._is_whole(checkpoint, step):
                return False
            if not self._has_settled(checkpoint, step):
                self.unsettled.add(step)
                return False
        except Interrupted:
            raise
        except OSError as error:  # another process renames or deletes it now, or the file system fails
            self.problems[step] = str(error)
            return False
        # Never read again: reading the metadata of thousands of rank files at every look would load the storage.
        self._complete.add((checkpoint.tag, step))
        self.seen.add(step)
        return True

    def _is_whole(self, checkpoint: Checkpoint, step: int) -> bool:
        """Whether the layout can be read. A broken checkpoint is read again only when one of its files has changed."""
        before = fingerprint(checkpoint.path)
        earlier = self._broken.get(checkpoint.tag)
        problem = earlier[1] if earlier is not None and earlier[0] == before else self._problem(checkpoint, step)
        if problem:
            self._broken[checkpoint.tag] = (before, problem)
            self.problems[step] = problem
        return not problem

    def _problem(self, checkpoint: Checkpoint, step: int) -> str:
        try:
            layout = self.read(checkpoint, self.allowed_globals)
        except BrokenCheckpoint as error:
            return str(error)
        if layout.step != step:
            return f"{checkpoint.path} has files of step {step} and of step {layout.step}: it is being written anew."
        return ""

    def _has_settled(self, checkpoint: Checkpoint, step: int) -> bool:
        if step < max(self.by_step) and (self._is_nested(checkpoint) or latest_tag(self.run) is None):
            return True
        # `latest` alone does not suffice: rank 0 writes it after its own files, before the barrier at the end of
        # `save_checkpoint` (runtime/engine.py:4961). So `_is_whole` has read every rank's file before.
        if not self._is_nested(checkpoint):
            latest = self.step_of_latest()
            if latest is not None and latest >= step:
                return True
        # A framework writes its own files, which are merged along, after DeepSpeed has written `latest` beside them.
        folder = checkpoint.save_folder if self._is_nested(checkpoint) else checkpoint.path
        now, current = time.monotonic(), fingerprint(folder)
        before, since = self._since.setdefault(checkpoint.tag, (current, now))
        if before != current:
            self._since[checkpoint.tag] = (current, now)
            return False
        return now - since >= self.settle_s

    def step_of_latest(self) -> int | None:
        """The step of the checkpoint that the run's `latest` file names; None if there is none."""
        latest = latest_tag(self.run)
        steps = (dated.step for dated in self.dated if dated.checkpoint.tag == latest)
        return next(steps, None)

    def _is_nested(self, checkpoint: Checkpoint) -> bool:
        """Whether it lies in a folder that a framework writes for one save."""
        return checkpoint.save_folder not in (checkpoint.path, self.run)


def _is_second_choice(dated: Dated) -> tuple[bool, bool, bool]:
    """A sort key: a checkpoint whose name alone tells its step, a universal one, and one without a number come last."""
    tag = dated.checkpoint.tag
    return dated.problem is not None, dated.checkpoint.is_universal, not any(map(str.isdigit, tag))
