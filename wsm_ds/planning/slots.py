"""Windows of snapshots: which ones may be merged together, and how much of the training each stands for.

A slot mean is the mean of the masters over its own steps, so it is older than its end, and as long as it is whatever
lies before it. Its weight, its age and its share of the noise follow from that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from wsm_ds.errors import WindowError, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.snapshot import Snapshot


@dataclass(frozen=True)
class Span:
    """What a checkpoint of a window is the mean of: `count` samples, evenly spaced over `length` steps.

    Attributes:
        length: steps; a point has 1.
        count: samples; a point has 1.
    """

    length: int = 1
    count: int = 1

    @property
    def is_mean(self) -> bool:
        """Whether it is a mean of several samples."""
        return self.count > 1

    @property
    def age(self) -> float:
        """Mean age of the samples at the slot's end, in steps."""
        return (self.count - 1) / 2 * self.length / self.count

    @property
    def variance(self) -> float:
        """Variance of the samples' ages, in steps squared."""
        return (self.count**2 - 1) / 12 * (self.length / self.count) ** 2


def span_of(snapshot: Snapshot | None) -> Span:
    """What a checkpoint is the mean of; a full checkpoint is a point."""
    if snapshot is None or snapshot.kind == "point":
        return Span()
    return Span(snapshot.length, snapshot.count)


def is_of_means(layouts: Sequence[Layout]) -> bool:
    """Whether a window holds slot means. If it holds one, it holds nothing else: see `check_slots`."""
    return any(layout.snapshot is not None and layout.snapshot.kind == "mean" for layout in layouts)


def check_slots(layouts: Sequence[Layout], allow: Sequence[str]) -> None:
    """Checks that the snapshots of a window may be merged together.

    Args:
        layouts: the window, by rising step.
        allow: checks to skip: "missing-slots".

    Raises:
        WindowError: slot means lie beside points or full checkpoints, or beside means with another distance of samples;
            slots overlap, or one is missing between them. The checkpoints are named.
    """
    if not is_of_means(layouts):
        return
    others = [x.tag for x in layouts if x.snapshot is None or x.snapshot.kind != "mean"]
    if others:
        means = [layout.tag for layout in layouts if layout.tag not in others]
        raise WindowError(
            f"{few(means)} {'is a mean' if len(means) == 1 else 'are means'} over the steps of a slot, and "
            f"{few(others)} the weights at one step. In one merge they would have wrong weights; choose one kind "
            "(--tags A,B,…)."
        )
    slots = [(layout.tag, layout.snapshot) for layout in layouts if layout.snapshot is not None]
    samples = {slot.sample: tag for tag, slot in slots}
    if len(samples) > 1:
        told = few(f"{tag} every {sample} updates" for sample, tag in samples.items())
        raise WindowError(f"the slots of the window were sampled unlike each other: {told}. Choose slots of one kind.")
    for (older, before), (newer, after) in pairwise(slots):
        if after.first <= before.last:
            raise WindowError(
                f"{newer} is the mean of steps {after.first} to {after.last}, which overlap those of {older} "
                f"({before.first} to {before.last}). Choose slots of one training."
            )
        if after.first > before.last + 1 and "missing-slots" not in allow:
            raise WindowError(
                f"no slot of the window holds steps {before.last + 1} to {after.first - 1}, between {older} and "
                f"{newer}: it was not written, or not chosen. Choose slots that follow each other, or pass --allow "
                f"missing-slots, and {newer} stands for these steps, too."
            )
