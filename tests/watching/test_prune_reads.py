"""A prune reads those checkpoints only whose completeness decides something, and decides as if it had read all."""

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
from played_run import PlayedRun
from watches import once, spec_for

from wsm_ds.layouts import Checkpoint, Layout, read_layout
from wsm_ds.layouts.run import DELETED
from wsm_ds.watching import EndPoints, WatchSpec, kept_layouts, make_spec
from wsm_ds.watching.completeness import Checkpoints
from wsm_ds.watching.prune import Retention, _find_what_decides, _Found, _gone, _reasons, plan_prune


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the tag of each checkpoint whose metadata are read."""
    tags: list[str] = []

    def reading(checkpoint: Checkpoint, allowed: frozenset[str]) -> Layout:
        tags.append(checkpoint.tag)
        return read_layout(checkpoint, allowed)

    monkeypatch.setattr(kept_layouts, "read_layout", reading)
    return tags


def test_only_what_decides_is_read(run: PlayedRun, read: list[str]) -> None:
    run.save(2, 4, 6)
    found = {v.step: v.is_complete for v in plan_prune(run.folder, Retention(keep_window=1, keep_last=1))}
    assert read == ["global_step6"]
    assert found == {2: None, 4: None, 6: True}
    next(run.checkpoint(6).glob("*rank_1*")).unlink()
    found = {v.step: v.is_complete for v in plan_prune(run.folder, Retention(keep_window=1, keep_last=1))}
    assert read[1:] == ["global_step6", "global_step4"]
    assert found == {2: None, 4: True, 6: False}


def test_windows_that_are_not_made_are_read_and_made_ones_are_not(
    run: PlayedRun, tmp_path: Path, read: list[str]
) -> None:
    spec = spec_for(run.save(2, 4, 6), tmp_path / "out", last=2, ends=EndPoints(until=4))
    retention = Retention((spec,), keep_last=1)
    assert {v.step: v.kept_because for v in plan_prune(run.folder, retention)}[2] != ""
    assert read == ["global_step6", "global_step4", "global_step2"]
    once(spec)
    read.clear()
    assert {v.step: v.kept_because for v in plan_prune(run.folder, retention)}[2] == ""
    assert read == ["global_step6", "global_step4"]


def test_what_a_watch_has_kept_is_not_read_again(run: PlayedRun, tmp_path: Path, read: list[str]) -> None:
    spec = spec_for(run.save(2, 4), tmp_path / "out", last=2)
    once(spec)
    read.clear()
    before = sorted((tmp_path / "out").rglob("*"))
    plan_prune(run.folder, Retention((spec,), keep_last=1))
    assert read == ["global_step2"]  # step 4 is kept for the window to come
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_sizes_count_every_file_and_a_link_to_nothing_is_no_file(run: PlayedRun) -> None:
    run.save(2, 4)
    nbytes = sum(file.stat().st_size for file in run.files(2))
    (run.checkpoint(2) / "deeper").mkdir()
    (run.checkpoint(2) / "deeper" / "notes").write_text("12345")
    (run.checkpoint(2) / "link").symlink_to("nothing")
    assert plan_prune(run.folder, Retention(keep_window=1))[0].nbytes == nbytes + 5


class PlayedCheckpoints:
    """Stands for `Checkpoints`: steps, and which of them are complete."""

    def __init__(self, run: Path, steps: dict[int, bool]) -> None:
        self.run, self.steps = run, steps
        self.by_step = {step: Checkpoint(f"global_step{step}", run / f"global_step{step}") for step in steps}

    def is_complete(self, step: int) -> bool:
        return self.steps[step]

    def step_of_latest(self) -> int | None:
        return None


def random_case(rng: random.Random, folder: Path) -> tuple[PlayedCheckpoints, Retention]:
    """A run of up to 14 steps with holes, broken checkpoints, and up to two watches that have made some windows."""
    run = folder / "run"
    steps = rng.sample(range(1, 15), rng.randint(1, 12))
    present = {step: rng.random() < 0.7 for step in steps if rng.random() < 0.8}
    (run / DELETED).parent.mkdir(parents=True)
    (run / DELETED).write_text("".join(json.dumps({"step": step}) + "\n" for step in set(steps) - set(present)))
    specs: list[WatchSpec] = []
    for number in range(rng.randint(0, 2)):
        values: dict[str, Any] = {"run": run, "out": folder / f"out{number}", "curve": "linear"}
        ends = EndPoints(rng.randint(1, 2), rng.randint(0, 8), rng.choice([None, rng.randint(8, 14)]))
        spec = make_spec(values | {"last": rng.sample(range(1, 6), 2)}, ends)
        for end, name in [(end, name) for end in present for name in spec.recipes if rng.random() < 0.5]:
            spec.refusal(end, name).parent.mkdir(parents=True, exist_ok=True)
            spec.refusal(end, name).write_text("{}")
        specs.append(spec)
    retention = Retention(tuple(specs), (), rng.choice([None, 1, 3]), rng.choice([None, 3]), rng.randint(0, 3))
    return PlayedCheckpoints(run, present), retention


def test_the_reasons_are_those_of_a_prune_that_reads_everything(tmp_path: Path) -> None:
    unread = 0
    for seed in range(150):
        played, retention = random_case(random.Random(seed), tmp_path / str(seed))
        checkpoints = cast(Checkpoints, played)
        found = _Found(checkpoints)
        gone = [_gone(spec) for spec in retention.specs]
        _find_what_decides(found, retention, gone)
        unread += len(played.steps) - len(found.known)
        everything = {step for step, is_complete in played.steps.items() if is_complete}
        expected = _reasons(checkpoints, retention, everything, gone)
        assert _reasons(checkpoints, retention, found.complete, gone) == expected, seed
    assert unread > 100
