"""The order in which the checkpoints of a run were saved: that of the steps inside their files.

If no file of a checkpoint tells its step, its name can say where it belongs, as far as the names of the other
checkpoints agree with their steps. Nothing is placed by its name without a `problem` that callers report.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WindowError, few
from wsm_ds.layouts.frameworks import UNIVERSAL
from wsm_ds.layouts.run import Checkpoint, natural
from wsm_ds.layouts.saved_step import saved_step

UNBOUNDED = 1 << 62
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Dated:
    """A checkpoint, and when it was saved.

    Attributes:
        checkpoint: its folder.
        earliest: the first step that it can be of. -1 if nothing is known.
        latest: the last step that it can be of; equal to `earliest` if the step is known, `UNBOUNDED` if the
            checkpoint may be the newest.
        problem: why its files do not tell the step; None if they do. Then `earliest` and `latest` come from its name.
    """

    checkpoint: Checkpoint
    earliest: int
    latest: int
    problem: BrokenCheckpoint | UnsupportedLayout | None = None

    @property
    def step(self) -> int | None:
        """The step, if it is known: from the files, or else from a name in a run whose names are right."""
        return self.earliest if self.earliest == self.latest else None

    @property
    def is_placed(self) -> bool:
        """Whether anything is known about when it was saved."""
        return self.earliest >= 0

    def may_lie_in(self, low: int, high: int) -> bool:
        """Whether it can be of a step from `low` to `high`. If its step is unknown, it is not one of these two."""
        if self.step is not None:
            return low <= self.step <= high
        return self.earliest < high and self.latest > low

    def why_it_counts(self) -> BrokenCheckpoint | UnsupportedLayout:
        """The error for a window of which it may be a part."""
        error = self.problem or BrokenCheckpoint(f"{self.checkpoint.path} is broken.")
        return type(error)(
            f"{error} So the step of {self.checkpoint.tag} is not known, and it may belong to the window. Repair or "
            "remove it, or choose the window without it by tags (--tags A,B,…)."
        )


def in_order(checkpoints: Iterable[Checkpoint]) -> tuple[Dated, ...]:
    """Dates checkpoints by the steps in their files, oldest first. Names order only those of the same step."""
    known, unknown = [], []
    for checkpoint in checkpoints:
        try:
            step = saved_step(checkpoint.path)
            known.append(Dated(checkpoint, step, step))
        except (BrokenCheckpoint, UnsupportedLayout) as error:
            unknown.append((checkpoint, error))
    dated = known + [_by_name(checkpoint, error, known) for checkpoint, error in unknown]
    return tuple(sorted(dated, key=lambda d: (d.latest, d.step is not None, natural(d.checkpoint.tag))))


def _by_name(checkpoint: Checkpoint, error: BrokenCheckpoint | UnsupportedLayout, known: Sequence[Dated]) -> Dated:
    """Dates a checkpoint whose files tell no step by the checkpoints whose names differ from its name by numbers."""
    numbers, siblings = _numbers(checkpoint), []
    for dated in known:
        if NUMBER.sub("0", dated.checkpoint.tag) == NUMBER.sub("0", checkpoint.tag):
            siblings.append((_numbers(dated.checkpoint), dated.earliest))
    siblings.sort()
    steps = [step for _, step in siblings]
    if not numbers or not siblings or steps != sorted(steps):
        return Dated(checkpoint, -1, UNBOUNDED, error)
    # A number that is the step in every other name.
    told = {
        number for place, number in enumerate(numbers) if all(numbers_[place] == step for numbers_, step in siblings)
    }
    if len(told) == 1:
        (step,) = told
        return Dated(checkpoint, step, step, error)
    earliest = max((step for numbers_, step in siblings if numbers_ < numbers), default=0)
    latest = min((step for numbers_, step in siblings if numbers_ > numbers), default=UNBOUNDED)
    return Dated(checkpoint, earliest, latest, error)


def _numbers(checkpoint: Checkpoint) -> tuple[int, ...]:
    return tuple(map(int, NUMBER.findall(checkpoint.tag)))


def without_universal_copies(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Leaves out universal checkpoints beside the checkpoint that they were converted from: the same step again."""
    tags = {checkpoint.tag for checkpoint in checkpoints}
    return [c for c in checkpoints if not c.is_universal or c.tag.removesuffix(UNIVERSAL) not in tags]


def require_one_series(run: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Checks that the checkpoints are those of one model of one training run, as far as their folders tell.

    Raises:
        WindowError: they lie in several places of the run, or a framework's save holds several models. The message
            names the choices.
    """
    places = sorted({c.save_folder.parent for c in checkpoints if c.save_folder != run})
    if len(places) > 1:
        raise WindowError(
            f"{run} holds the checkpoints of more than one run: they lie in {few(places)}. Give one of these folders, "
            "or choose the checkpoints by tags (--tags A,B,…)."
        )
    by_save: dict[Path, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        if not checkpoint.is_universal and checkpoint.save_folder not in (checkpoint.path, run):
            by_save.setdefault(checkpoint.save_folder, []).append(checkpoint)
    for save, members in by_save.items():
        if len(members) > 1:
            raise WindowError(
                f"{save} holds several checkpoints: {few(c.path.name for c in members)}. Nothing says that they are of "
                f"one model. Choose those of one model by tags (--tags A,B,…), for example {members[0].tag}."
            )
