"""`inspect` keeps what it prints, and no layout longer than its row."""

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from wsm_ds import inspection
from wsm_ds.cli import main
from wsm_ds.inspection import checkpoints_of, inspect_checkpoints, inspect_run
from wsm_ds.layouts import Checkpoint, Layout, read_layout

NONE: frozenset[str] = frozenset()


@pytest.fixture
def alive_at_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows, at each reading of a checkpoint, by the number of layouts that are still in use."""
    layouts: list[Callable[[], Layout | None]] = []
    counts: list[int] = []

    def reading(checkpoint: Checkpoint, allowed: frozenset[str]) -> Layout:
        counts.append(sum(layout() is not None for layout in layouts))
        layout = read_layout(checkpoint, allowed)
        layouts.append(weakref.ref(layout))
        return layout

    monkeypatch.setattr(inspection, "read_layout", reading)
    return counts


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_command_keeps_one_layout_at_a_time(runs: Path, alive_at_read: list[int], flags: tuple[str, ...]) -> None:
    assert main(["inspect", str(runs / "w2_s3_bf16"), *flags]) == 0
    assert len(alive_at_read) == 3
    assert max(alive_at_read) <= 1


def test_the_list_holds_all_and_the_generator_gives_the_same(runs: Path, alive_at_read: list[int]) -> None:
    run = str(runs / "w2_s3_bf16")
    found = inspect_run(run)
    assert alive_at_read == [0, 1, 2]
    one_by_one = inspect_checkpoints(checkpoints_of(run), NONE)
    assert [json.dumps(item.details()) for item in one_by_one] == [json.dumps(item.details()) for item in found]


def test_nothing_is_read_before_it_is_asked_for(runs: Path, alive_at_read: list[int]) -> None:
    items = inspect_checkpoints(checkpoints_of(runs / "w2_s3_bf16"), NONE)
    assert alive_at_read == []
    next(items)
    assert alive_at_read == [0]


def test_a_terminal_sees_how_many_were_read_and_a_pipe_does_not(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["inspect", str(runs / "w2_s3_bf16")]) == 0
    plain = capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["inspect", str(runs / "w2_s3_bf16")]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain.out
    assert "/3 [" in shown.err
    assert plain.err == ""
