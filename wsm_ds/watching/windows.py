"""Which windows end at a checkpoint, and which checkpoints are still needed: pure functions of steps.

A watch and a prune must agree on this to the last step, so both ask here.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EndPoints:
    """The steps at which windows end.

    Attributes:
        every: only multiples of so many steps.
        since: the first one.
        until: the last one; None for a run that goes on.
    """

    every: int = 1
    since: int = 0
    until: int | None = None

    def holds(self, step: int) -> bool:
        """Whether windows end at `step`."""
        return step % self.every == 0 and self.since <= step and (self.until is None or step <= self.until)

    def may_follow(self, step: int) -> bool:
        """Whether a later step can be an end point."""
        return self.until is None or step // self.every * self.every + self.every <= self.until


@dataclass(frozen=True)
class OpenWindow:
    """A window that is not made yet: its name, the steps of its checkpoints, and those of them that are gone."""

    end: int
    name: str
    steps: tuple[int, ...]
    gone: tuple[int, ...]


def window_steps(steps: Sequence[int], end: int, count: int) -> tuple[int, ...] | None:
    """The newest `count` of rising `steps` up to `end`; None if there are fewer."""
    stop = bisect_right(steps, end)
    return tuple(steps[stop - count : stop]) if stop >= count else None


def open_windows(
    held: Collection[int],
    gone: Collection[int],
    counts: Mapping[str, int],
    ends: EndPoints,
    is_resolved: Callable[[int, str], bool],
) -> Iterator[OpenWindow]:
    """The windows that end at a checkpoint that is there and are not resolved, by rising end point.

    Args:
        held: steps of the checkpoints that are there, complete or not.
        gone: steps of complete checkpoints that were there once. A window is over what was saved, not over what is
            left, so that it does not grow backwards over a hole.
        counts: checkpoints of a window, by the window's name.
        ends: where windows end.
        is_resolved: whether the window of this end and name is merged, or refused for good.
    """
    steps = sorted({*held, *gone})
    for end in sorted(held):
        for name, count in counts.items() if ends.holds(end) else ():
            own = window_steps(steps, end, count)
            if own is not None and not is_resolved(end, name):
                yield OpenWindow(end, name, own, tuple(step for step in own if step not in held))


def needed_steps(
    held: Collection[int],
    gone: Collection[int],
    counts: Mapping[str, int],
    ends: EndPoints,
    is_resolved: Callable[[int, str], bool],
) -> dict[int, str]:
    """The steps that windows still need, and for which window: of those that are open, and of those to come.

    The arguments are those of `open_windows`, but `held` may leave out a checkpoint that is still being written.
    """
    needed: dict[int, str] = {}
    steps = sorted({*held, *gone})
    if steps and ends.may_follow(steps[-1]):
        for name, count in counts.items():
            for step in steps[len(steps) - min(count - 1, len(steps)) :]:
                needed.setdefault(step, f"{name} to come")
    for window in open_windows(held, gone, counts, ends, is_resolved):
        if not window.gone:
            needed |= dict.fromkeys(window.steps, f"{window.name} of step {window.end}, not made yet")
    return {step: needed[step] for step in sorted(needed) if step in held}
