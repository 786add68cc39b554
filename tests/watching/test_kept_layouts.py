"""A watch reads each checkpoint once: also over windows, in its plans, and when it is started again."""

import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
from played_run import PlayedRun, contents
from watches import named, once, spec_for

from wsm_ds.layouts import Checkpoint, Layout, read_layout
from wsm_ds.layouts.fragments import Fragments
from wsm_ds.planning.one_save import problem_of
from wsm_ds.watching import kept_layouts
from wsm_ds.watching.kept_layouts import KEPT, KeptLayouts

NONE: frozenset[str] = frozenset()


class Counts:
    """How often each checkpoint's metadata were read, and samples of its values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: Counter[str] = Counter()
        self.sampled: Counter[str] = Counter()

        def reading(checkpoint: Checkpoint, allowed: frozenset[str]) -> Layout:
            self.read[checkpoint.tag] += 1
            return read_layout(checkpoint, allowed)

        def sampling(layout: Layout) -> str | None:
            self.sampled[layout.tag] += 1
            return problem_of(layout)

        monkeypatch.setattr(kept_layouts, "read_layout", reading)
        monkeypatch.setattr(kept_layouts, "problem_of", sampling)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def checkpoint_of(run: PlayedRun, step: int) -> Checkpoint:
    return Checkpoint(f"global_step{step}", run.checkpoint(step))


def same(one: Layout, other: Layout) -> bool:
    """Whether two layouts say the same; numpy's tables have no plain equality."""
    plain = [
        {name: value for name, value in vars(layout).items() if name not in ("fragments", "archives")}
        for layout in (one, other)
    ]
    archives = [
        [(a.path, a.nbytes, a.mtime_ns, a.ctime_ns, list(a.records.items())) for a in layout.archives]
        for layout in (one, other)
    ]
    return plain[0] == plain[1] and archives[0] == archives[1] and one.fragments.is_same(other.fragments)


def test_a_new_checkpoint_makes_a_watch_read_one(run: PlayedRun, tmp_path: Path, counts: Counts) -> None:
    spec = spec_for(run.save(2, 4), tmp_path / "out", last=2)
    once(spec)
    assert counts.read == counts.sampled == {"global_step2": 1, "global_step4": 1}
    run.save(6)
    assert named("merged", once(spec))  # a new watch, as cron starts it
    assert counts.read == counts.sampled == {"global_step2": 1, "global_step4": 1, "global_step6": 1}


def test_without_a_folder_of_its_own_a_watch_merges_the_same(run: PlayedRun, tmp_path: Path, counts: Counts) -> None:
    run.save(2, 4)
    once(spec_for(run, tmp_path / "kept", last=2))
    (tmp_path / "not kept").mkdir()
    (tmp_path / "not kept" / KEPT).write_text("no folder")
    once(spec_for(run, tmp_path / "not kept", last=2))
    assert contents(tmp_path / "kept/step4/last2-linear") == contents(tmp_path / "not kept/step4/last2-linear")
    assert counts.read == {"global_step2": 2, "global_step4": 2}


@pytest.mark.parametrize("name", ["w2_s1_fp16", "w2_s2_bf16", "w2_s3_bf16"])
def test_a_layout_comes_back_from_the_disk_as_it_was(name: str, runs: Path, tmp_path: Path, counts: Counts) -> None:
    checkpoint = Checkpoint("global_step4", runs / name / "global_step4")
    before = KeptLayouts(tmp_path / KEPT)
    layout, problem = before.read(checkpoint, NONE), before.problem_of(before.read(checkpoint, NONE))
    after = KeptLayouts(tmp_path / KEPT)
    again = after.read(checkpoint, NONE)
    assert again is not layout
    assert same(again, layout)
    assert after.problem_of(again) == problem
    assert counts.read == counts.sampled == {"global_step4": 1}
    assert isinstance(again.fragments, Fragments)


def test_any_change_of_a_file_counts(run: PlayedRun, tmp_path: Path, counts: Counts) -> None:
    checkpoint = checkpoint_of(run.save(2), 2)
    KeptLayouts(tmp_path / KEPT).read(checkpoint, NONE)
    file = run.files(2)[0]
    run.write(file)  # the same bytes at another time
    KeptLayouts(tmp_path / KEPT).read(checkpoint, NONE)
    assert counts.read["global_step2"] == 2
    shutil.copy2(checkpoint.path / file.name, tmp_path / "copy")
    (tmp_path / "copy").replace(checkpoint.path / file.name)  # the same bytes, size and mtime: another inode
    KeptLayouts(tmp_path / KEPT).read(checkpoint, NONE)
    assert counts.read["global_step2"] == 3
    (checkpoint.path / "notes.txt").write_text("a new file")
    layouts = KeptLayouts(tmp_path / KEPT)
    layouts.problem_of(layouts.read(checkpoint, NONE))
    assert counts.read["global_step2"] == 4
    layouts.problem_of(layouts.read(checkpoint, NONE))
    layouts.read(checkpoint, frozenset({"my.Class"}))
    assert counts.read["global_step2"] == 5
    assert counts.sampled["global_step2"] == 1


def test_a_file_that_cannot_be_read_is_made_again(
    run: PlayedRun, tmp_path: Path, counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = checkpoint_of(run.save(2), 2)
    KeptLayouts(tmp_path / KEPT).read(checkpoint, NONE)
    (file,) = (tmp_path / KEPT).iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.DEBUG, "wsm_ds.watching.kept_layouts"):
        KeptLayouts(tmp_path / KEPT).read(checkpoint, NONE)
    assert "is read again" in caplog.text
    assert "checksum differs" in caplog.text
    KeptLayouts(tmp_path / KEPT).read(checkpoint, NONE)
    assert counts.read["global_step2"] == 2


def test_what_no_window_needs_is_forgotten(run: PlayedRun, tmp_path: Path, counts: Counts) -> None:
    spec = spec_for(run.save(2, 4), tmp_path / "out", last=2)
    once(spec)
    assert len(list((tmp_path / "out" / KEPT).iterdir())) == 1  # of step 4, for the window to come
    (tmp_path / "out" / KEPT / ".left by a kill.new").write_text("")
    run.save(6)
    once(spec)
    assert len(list((tmp_path / "out" / KEPT).iterdir())) == 1
    assert set(counts.read.values()) == {1}


def test_a_watch_that_begins_late_keeps_no_more_than_its_windows_need(
    run: PlayedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    read = KeptLayouts.read

    def counting(self: KeptLayouts, checkpoint: Checkpoint, allowed: frozenset[str]) -> Layout:
        layout = read(self, checkpoint, allowed)
        kept.append(len(self._kept))
        return layout

    monkeypatch.setattr(KeptLayouts, "read", counting)
    assert len(named("merged", once(spec_for(run.save(2, 4, 6), tmp_path / "out", last=1)))) == 3
    assert set(kept) == {1}


def test_what_cannot_be_deleted_stays(run: PlayedRun, tmp_path: Path) -> None:
    layouts = KeptLayouts(tmp_path / KEPT)
    layouts.read(checkpoint_of(run.save(2), 2), NONE)
    (tmp_path / KEPT / "a folder").mkdir()
    layouts.forget_all_but([])
    assert (tmp_path / KEPT / "a folder").is_dir()


def test_a_reader_that_does_not_write_leaves_the_folder_alone(run: PlayedRun, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(run.save(2), 2)
    layouts = KeptLayouts(tmp_path / KEPT, is_written=False)
    layouts.read(checkpoint, NONE)
    layouts.forget_all_but([])
    assert not (tmp_path / KEPT).exists()
