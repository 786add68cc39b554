"""A prune deletes what nobody can want any more, shows it first, and leaves no half of anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dying import dies_at
from played_run import PlayedRun, outputs

from wsm_ds.cli import main
from wsm_ds.errors import CheckpointNotFound, OutputLocked, RecipeError, UnsupportedLayout, WindowError
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.inspection import inspect_run
from wsm_ds.merging import merge
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.publishing.staging_folder import Staging
from wsm_ds.watching import EndPoints, WatchOptions, WatchSpec, make_spec, watch
from wsm_ds.watching.prune import Retention, plan_prune, prune, trash_content, trash_of

NEWEST = Retention(keep_window=1, keep_last=1)


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> PlayedRun:
    return PlayedRun(runs / "w2_s2_bf16", tmp_path / "a run")


def spec_for(run: PlayedRun, out: Path, last: Any = 2) -> WatchSpec:
    return make_spec({"curve": "linear", "run": run.folder, "out": out, "last": last}, EndPoints())


def kept(run: PlayedRun, retention: Retention) -> dict[int | None, str]:
    return {verdict.step: verdict.kept_because for verdict in plan_prune(run.folder, retention)}


def watch_once(spec: WatchSpec) -> None:
    for _ in watch(spec, WatchOptions(poll_s=0.05, is_once=True)):
        pass


def test_the_newest_are_kept_and_the_rest_goes(run: PlayedRun) -> None:
    run.save(2, 4, 6)
    assert kept(run, NEWEST) == {2: "", 4: "", 6: "latest names it"}
    assert kept(run, Retention(keep_window=1)) == {2: "", 4: "newest 2 complete", 6: "latest names it"}
    assert kept(run, Retention(keep_window=3))[2] == "window of 3"
    assert kept(run, Retention(keep_window=1, keep_last=1, keep_every=4))[4] == "every 4"


def test_what_latest_names_and_all_that_is_newer_is_kept(run: PlayedRun) -> None:
    run.save(2, 4, 6).move_latest(4)  # gone back to step 4: what is newer may be being written anew
    assert kept(run, NEWEST) == {2: "", 4: "latest names it", 6: "newer than the newest complete one"}


def test_an_incomplete_newest_one_is_kept_and_does_not_count(run: PlayedRun) -> None:
    run.save(2, 4, 6)
    next(run.checkpoint(6).glob("*rank_1*")).unlink()
    assert kept(run, NEWEST) == {2: "", 4: "newest complete", 6: "newer than the newest complete one"}


def test_windows_that_are_not_made_yet_keep_their_checkpoints(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4)
    spec = spec_for(run, tmp_path / "out")
    retention = Retention((spec,), keep_last=1)
    assert kept(run, retention) == {2: "last2-linear of step 4, not merged yet", 4: "latest names it"}
    watch_once(spec)
    assert kept(run, retention) == {2: "", 4: "latest names it"}
    prune(run.folder, retention)
    run.save(6)
    watch_once(spec)
    assert outputs(spec.out) == ["step4/last2-linear", "step6/last2-linear"]


def test_a_watch_after_a_prune_passes_over_what_was_deleted(run: PlayedRun, tmp_path: Path) -> None:
    prune(run.save(2, 4).folder, NEWEST)
    run.save(6)
    spec = spec_for(run, tmp_path / "out", [2, 3])
    watch_once(spec)
    assert outputs(spec.out) == ["step6/last2-linear"]
    run.save(2)
    with pytest.raises(WindowError, match="2 complete checkpoints up to step 2"):
        merge(make_recipe(run=run.folder, last=2, to_step=2, curve="linear", out=tmp_path / "x"))


def test_a_plain_merge_does_not_reach_over_a_hole(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    prune(run.folder, Retention(keep_window=1, keep_last=1))
    run.save(2)
    run.move_latest(6)
    with pytest.raises(WindowError, match=r"not all there any more.*has deleted step 4"):
        merge(make_recipe(run=run.folder, last=2, curve="linear", out=tmp_path / "x"))
    merge(make_recipe(run=run.folder, from_step=2, to_step=6, curve="linear", out=tmp_path / "x"))


def test_what_a_begun_merge_needs_is_kept(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    recipe = make_recipe(run=run.folder, last=2, to_step=4, curve="linear", out=tmp_path / "merges/by hand/x")
    assert dies_at(40, lambda: merge(recipe))
    assert Staging(recipe.out).folder.is_dir()
    retention = Retention(folders=(tmp_path / "merges",), keep_window=1, keep_last=1)
    assert kept(run, retention) == {
        2: "an unfinished merge needs it", 4: "an unfinished merge needs it", 6: "latest names it"
    }  # fmt: skip
    merge(recipe)
    assert kept(run, retention)[2] == ""


def test_a_prune_killed_at_any_operation_leaves_whole_checkpoints_and_the_next_ends_it(
    run: PlayedRun, tmp_path: Path
) -> None:
    count = 0
    while True:
        count += 1
        run.save(2, 4, 6)
        died = dies_at(count, lambda: prune(run.folder, NEWEST))
        assert all(item.layout is not None for item in inspect_run(run.folder)), count
        prune(run.folder, NEWEST)
        assert [item.checkpoint.tag for item in inspect_run(run.folder)] == ["global_step6"]
        assert trash_content(run.folder) == []
        shutil.rmtree(trash_of(run.folder).parent)
        if not died:
            break
    assert count > 10


def test_nothing_is_touched_unless_told_to(run: PlayedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.save(2, 4, 6).fingerprint()
    command = ["prune", str(run.folder), "--keep-window", "1", "--keep-last", "1"]
    assert main(command) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["checkpoint", "step", "size", "complete", "verdict"]
    assert [row[0::4][:2] for row in shown[1:4]] == [
        ["global_step2", "not"], ["global_step4", "not"], ["global_step6", "yes"]
    ]  # fmt: skip
    assert shown[1][-3:] == ["would", "be", "deleted"]
    assert " ".join(shown[4]).startswith("nothing was deleted; --delete would delete 2 of 3 checkpoints")
    assert run.fingerprint() == before
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["is_deleted"]
    assert [(item["step"], item["kept_because"]) for item in found["checkpoints"]] == [
        (2, None), (4, None), (6, "latest names it")
    ]  # fmt: skip
    assert main([*command, "--delete"]) == 0
    assert [path.name for path in run.folder.glob("global_step*")] == ["global_step6"]


def test_the_folder_of_a_watch_says_what_it_wants(
    run: PlayedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(2, 4, 6)
    command = ["prune", str(run.folder), "--out", str(tmp_path / "out"), "--keep-last", "1", "--delete"]
    assert main(command) == 2
    assert "no watch has begun in --out DIR" in capsys.readouterr().err
    assert main([*command, "--last", "2"]) == 0  # a watch to come wants everything
    assert len(list(run.folder.glob("global_step*"))) == 3
    assert main(["watch", str(run.folder), "--last", "3", "--out", str(tmp_path / "out"), "--once", "--nice", "0"]) == 0
    assert main(command) == 0
    assert sorted(path.name for path in run.folder.glob("global_step*")) == ["global_step4", "global_step6"]


def test_what_cannot_be_decided_is_refused(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2)
    with pytest.raises(RecipeError, match="nothing says which checkpoints windows need"):
        plan_prune(run.folder, Retention())
    with pytest.raises(RecipeError, match="not of"):
        plan_prune(run.folder, Retention((spec_for(PlayedRun(run.source, tmp_path / "b"), tmp_path / "out"),)))
    with pytest.raises(CheckpointNotFound):
        prune(tmp_path / "nowhere", NEWEST)
    assert main(["prune", str(run.folder), "--keep-window", "0"]) == 2
    merge(make_recipe(run=run.folder, last=1, curve="linear", out=tmp_path / "merged"))
    with pytest.raises(UnsupportedLayout, match="a merge's output"):
        prune(tmp_path / "merged", NEWEST)


def test_folders_that_are_not_clear_are_kept(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    shutil.copytree(run.checkpoint(2), run.folder / "global_step2_universal")
    shutil.copytree(run.checkpoint(2), run.folder / "best")
    run.checkpoint(4).rename(tmp_path / "elsewhere")
    run.checkpoint(4).symlink_to(tmp_path / "elsewhere")
    verdicts = {verdict.checkpoint.tag: verdict.kept_because for verdict in plan_prune(run.folder, NEWEST)}
    assert verdicts == {
        "best": "its name has no number", "global_step2": "", "global_step2_universal": "a universal copy",
        "global_step4": "a link", "global_step6": "latest names it",
    }  # fmt: skip


def test_two_prunes_do_not_delete_at_once(run: PlayedRun) -> None:
    prune(run.save(2, 4).folder, NEWEST)
    with (
        hold_lock(trash_of(run.folder).parent / "lock", "me"),
        pytest.raises(OutputLocked, match="another prune deletes in"),
    ):
        prune(run.folder, NEWEST)
