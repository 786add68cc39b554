"""Which windows end where, and that a prune keeps what a watch still wants, whatever the order of things."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.watching.windows import EndPoints, OpenWindow, needed_steps, open_windows, window_steps

Windows = dict[tuple[int, str], tuple[int, ...]]


def nothing_resolved(end: int, name: str) -> bool:
    return False


def test_a_window_is_the_newest_checkpoints_up_to_its_end() -> None:
    steps = [100, 200, 300, 400]
    assert window_steps(steps, 300, 2) == (200, 300)
    assert window_steps(steps, 350, 3) == (100, 200, 300)
    assert window_steps(steps, 300, 4) is None
    assert window_steps([], 300, 1) is None


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        (EndPoints(), [100, 150, 200, 300]),
        (EndPoints(every=100), [100, 200, 300]),
        (EndPoints(since=200), [200, 300]),
        (EndPoints(every=100, since=101, until=299), [200]),
    ],
)
def test_windows_end_on_the_grid_between_since_and_until(ends: EndPoints, wanted: list[int]) -> None:
    assert [step for step in (100, 150, 200, 300) if ends.holds(step)] == wanted


def test_no_end_point_may_follow_the_last_one_of_the_grid() -> None:
    ends = EndPoints(every=100, until=250)
    assert ends.may_follow(199)
    assert not ends.may_follow(200)
    assert EndPoints(every=100).may_follow(10**9)


def test_a_window_over_a_deleted_checkpoint_is_not_made_of_older_ones_instead() -> None:
    (window,) = open_windows({100, 300}, {200}, {"last2": 2}, EndPoints(since=300), nothing_resolved)
    assert window == OpenWindow(300, "last2", (200, 300), (200,))


def test_what_windows_need_is_said_with_the_reason() -> None:
    resolved = {(300, "last2"), (400, "last2")}
    needed = needed_steps(
        {100, 200, 300, 400}, set(), {"last2": 2}, EndPoints(), lambda end, name: (end, name) in resolved
    )
    assert needed == {
        100: "last2 of step 200, not merged yet",
        200: "last2 of step 200, not merged yet",
        400: "last2 to come",
    }


@dataclass
class Simulated:
    """A run, its watch and its prune, as nothing but steps."""

    counts: dict[str, int]
    ends: EndPoints
    saved: list[int] = field(default_factory=list)
    present: set[int] = field(default_factory=set)
    made: Windows = field(default_factory=dict)

    def is_resolved(self, end: int, name: str) -> bool:
        return (end, name) in self.made

    def watch(self, most: int) -> None:
        """Makes at most so many windows, then is killed."""
        for window in list(open_windows(self.present, self.gone, self.counts, self.ends, self.is_resolved))[:most]:
            if not window.gone:
                self.made[window.end, window.name] = window.steps

    def prune(self) -> None:
        needed = needed_steps(self.present, self.gone, self.counts, self.ends, self.is_resolved)
        self.present = set(needed) | set(self.saved[-1:])

    @property
    def gone(self) -> set[int]:
        return set(self.saved) - self.present


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    ends=st.builds(EndPoints, every=st.integers(1, 4), since=st.integers(0, 12), until=st.none() | st.integers(5, 60)),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("save"), st.integers(1, 5)),
            st.tuples(st.just("watch"), st.integers(0, 4)),
            st.tuples(st.just("prune"), st.just(0)),
        ),
        max_size=60,
    ),
)
def test_every_window_of_a_watch_without_prunes_is_made_with_them_too(
    counts: list[int], ends: EndPoints, actions: list[tuple[str, int]]
) -> None:
    run = Simulated({f"last{count}-{n}": count for n, count in enumerate(counts)}, ends)
    for action, number in actions:
        if action == "save":
            run.saved.append((run.saved[-1] if run.saved else 0) + number)
            run.present.add(run.saved[-1])
        elif action == "watch":
            run.watch(number)
        else:
            run.prune()
    run.watch(10**9)
    everything = open_windows(run.saved, (), run.counts, ends, nothing_resolved)
    assert run.made == {(window.end, window.name): window.steps for window in everything}
    run.prune()
    assert len(run.present) <= max(1, max(counts) - 1)
