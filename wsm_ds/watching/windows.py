"""Which windows end at a checkpoint, and which checkpoints are still needed: pure functions of steps.

A watch and a prune must agree on every step, so both use these functions.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EndPoints:
    """The steps at which windows end.

    Attributes:
        every: windows end at multiples of this number of steps.
        since: the first step at which a window may end.
        until: the last one; None for a run without an end.
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
    """A window that is not merged yet.

    Attributes:
        end: its end point.
        name: its name, see `WatchSpec.recipes`.
        steps: of its checkpoints, rising.
        gone: those of `steps` whose checkpoints were deleted.
    """

    end: int
    name: str
    steps: tuple[int, ...]
    gone: tuple[int, ...]


def window_steps(steps: Sequence[int], end: int, count: int) -> tuple[int, ...] | None:
    """The newest `count` steps up to `end`; None if there are fewer.

    >>> window_steps([100, 200, 300, 400], end=300, count=2)
    (200, 300)

    Args:
        steps: rising.
        end: the last step that may be chosen.
        count: number of checkpoints of the window.
    """
    stop = bisect_right(steps, end)
    return tuple(steps[stop - count : stop]) if stop >= count else None


def open_windows(
    present: Collection[int],
    gone: Collection[int],
    counts: Mapping[str, int],
    ends: EndPoints,
    is_resolved: Callable[[int, str], bool],
) -> Iterator[OpenWindow]:
    """The windows that end at an existing checkpoint and are not resolved, by rising end point.

    Args:
        present: steps of the existing checkpoints, complete or not.
        gone: steps of complete checkpoints that were deleted. They stay members of their windows: otherwise a window
            would take older checkpoints in their place.
        counts: checkpoints of a window, by the window's name.
        ends: where windows end.
        is_resolved: whether the window of an end point and name is merged or refused.
    """
    steps = sorted({*present, *gone})
    for end in sorted(present):
        for name, count in counts.items() if ends.holds(end) else ():
            window = window_steps(steps, end, count)
            if window is not None and not is_resolved(end, name):
                yield OpenWindow(end, name, window, tuple(step for step in window if step not in present))


def needed_steps(
    present: Collection[int],
    gone: Collection[int],
    counts: Mapping[str, int],
    ends: EndPoints,
    is_resolved: Callable[[int, str], bool],
) -> dict[int, str]:
    """The steps that open and future windows need, each with the reason.

    The arguments are those of `open_windows`, but `present` may leave out a checkpoint that is still being written.
    """
    needed: dict[int, str] = {}
    steps = sorted({*present, *gone})
    if steps and ends.may_follow(steps[-1]):
        for name, count in counts.items():
            for step in steps[len(steps) - min(count - 1, len(steps)) :]:
                needed.setdefault(step, f"{name} to come")
    for window in open_windows(present, gone, counts, ends, is_resolved):
        if not window.gone:
            needed |= dict.fromkeys(window.steps, f"{window.name} of step {window.end}, not merged yet")
    return {step: needed[step] for step in sorted(needed) if step in present}
