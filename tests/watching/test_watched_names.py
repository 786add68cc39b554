"""A run whose checkpoints have any names, in any framework's folders, is watched and pruned by its files' steps."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from played_run import outputs
from saved_names import SERIES, Series, saved
from watches import named as events_named

from wsm_ds.errors import BrokenCheckpoint, RecipeError, WindowError
from wsm_ds.layouts.run import find_checkpoints
from wsm_ds.layouts.saved_step import _counts_in
from wsm_ds.merging import merge
from wsm_ds.publishing.manifest import read_manifest
from wsm_ds.watching import EndPoints, Event, WatchOptions, WatchSpec, make_spec, watch
from wsm_ds.watching.prune import Retention, plan_prune, prune

NEWEST = Retention(keep_window=1, keep_last=1)


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory)


def copy_of(named: Path, series: Series, tmp_path: Path) -> Path:
    """A copy of a series, without the second save of step 4."""
    ignored = shutil.ignore_patterns("last.ckpt")
    return Path(shutil.copytree(named / series.run, tmp_path / series.run, ignore=ignored))


def spec_of(run: Path, out: Path, last: int = 2) -> WatchSpec:
    values = {"curve": "linear", "run": run, "out": out, "last": last, "allow": ("warmup",), "format": "safetensors"}
    return make_spec(values, EndPoints())


def once(spec: WatchSpec) -> list[Event]:
    return list(watch(spec, WatchOptions(poll_s=0.05, is_once=True)))


def kept(run: Path, retention: Retention = NEWEST) -> dict[str, str]:
    return {verdict.checkpoint.tag: verdict.kept_because for verdict in plan_prune(run, retention)}


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES)
def test_a_watch_merges_the_windows_of_the_steps(named: Path, tmp_path: Path, series: Series) -> None:
    run, spec = copy_of(named, series, tmp_path), spec_of(named / series.run, tmp_path / "out")
    once(spec)
    assert outputs(spec.out) == [f"step{end}/last2-linear" for end in (2, 3, 4)]
    for end in (2, 3, 4):
        sources = read_manifest(spec.output_folder(end, "last2-linear"))["sources"]
        assert [source["tag"] for source in sources] == list(series.tags[end - 2 : end])
    merge(run=run, tags=series.tags[2:], curve="linear", format="safetensors", out=tmp_path / "merged")
    same = [folder / "model.safetensors" for folder in (tmp_path / "merged", spec.output_folder(4, "last2-linear"))]
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize("name", ["plain", "losses", "diffusers", "accelerate", "lightning", "trainer", "folders"])
def test_a_prune_deletes_whole_saves_of_the_oldest_steps(named: Path, tmp_path: Path, name: str) -> None:
    series = SERIES[name]
    run = copy_of(named, series, tmp_path)
    for tag in series.tags:
        (run / tag).parent.joinpath("random_states_0.pkl").touch()
    verdicts = kept(run)
    assert list(verdicts) == list(series.tags)
    # The framework may still be writing its files beside the newest one, so the one before it is kept, too.
    first_kept = 3 if name in ("plain", "losses") else 2
    assert [tag for tag, reason in verdicts.items() if reason] == list(series.tags[first_kept:])
    prune(run, NEWEST)
    assert [checkpoint.tag for checkpoint in find_checkpoints(run)] == list(series.tags[first_kept:])
    for tag in series.tags[:first_kept]:
        assert not (run / tag.removesuffix("/pytorch_model")).exists()
    with pytest.raises(WindowError, match=r"has 4|has 2|has 1"):
        merge(run=run, last=4, curve="linear", out=tmp_path / "out")


def test_a_watch_and_a_prune_agree_on_what_is_needed(named: Path, tmp_path: Path) -> None:
    run = copy_of(named, SERIES["diffusers"], tmp_path)
    spec = spec_of(run, tmp_path / "out", last=3)
    names = list(SERIES["diffusers"].tags)
    assert kept(run, Retention((spec,), keep_last=1))[names[0]] == "last3-linear of step 3, not merged yet"
    once(spec)
    assert kept(run, Retention((spec,), keep_last=1))[names[0]] == ""
    prune(run, Retention((spec,), keep_last=1))
    assert [c.tag for c in find_checkpoints(run)] == names[2:]


def test_what_is_no_plain_member_of_the_series_is_kept(named: Path, tmp_path: Path) -> None:
    run = copy_of(named, SERIES["trainer"], tmp_path)
    (run / "best").symlink_to("checkpoint-1")
    state = {"best_model_checkpoint": "/elsewhere/output_dir/checkpoint-2"}
    (run / "checkpoint-4/trainer_state.json").write_text(json.dumps(state))
    assert kept(run) == {
        "checkpoint-1/global_step1": "best/global_step1 is a link to it",
        "checkpoint-2/global_step2": "HF Trainer's best model",
        "checkpoint-3/global_step3": "newest complete",
        "checkpoint-4/global_step4": "newer than the newest complete one",
    }
    words = copy_of(named, SERIES["words"], tmp_path)
    assert set(kept(words).values()) == {"its name has no number"}
    lightning = Path(shutil.copytree(named / "lightning", tmp_path / "l"))
    shutil.copytree(lightning / "epoch=0-step=2.ckpt", lightning / "epoch=0-step=2-v1.ckpt")
    reasons = kept(lightning)
    twins = ("epoch=0-step=2.ckpt/checkpoint", "epoch=0-step=2-v1.ckpt/checkpoint")
    assert [reasons[tag] for tag in twins] == [f"{tag} is of the same step" for tag in reversed(twins)]
    assert reasons["last.ckpt/checkpoint"] == "its name has no number"


def test_a_window_waits_for_a_checkpoint_of_unknown_step(named: Path, tmp_path: Path) -> None:
    run = copy_of(named, SERIES["words"], tmp_path)
    file = run / "a" / "mp_rank_00_model_states.pt"  # of step 3
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    spec = spec_of(run, tmp_path / "out")
    with pytest.raises(BrokenCheckpoint, match=r"windows were not merged: .*the step of a is not known"):
        once(spec)
    assert outputs(spec.out) == []
    assert kept(run)["a"] == "its step is not known"
    file.write_bytes(whole)
    once(spec)
    assert outputs(spec.out) == [f"step{end}/last2-linear" for end in (2, 3, 4)]


def test_a_save_in_progress_does_not_hold_up_older_windows(named: Path, tmp_path: Path) -> None:
    run = copy_of(named, SERIES["accelerate"], tmp_path)
    newest = run / SERIES["accelerate"].tags[3] / "mp_rank_00_model_states.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    spec = spec_of(run, tmp_path / "out")
    events = once(spec)
    assert outputs(spec.out) == ["step2/last2-linear", "step3/last2-linear"]
    assert events_named("waiting", events) == []


def test_a_watch_reads_the_step_of_a_checkpoint_once(named: Path, tmp_path: Path) -> None:
    run = copy_of(named, SERIES["losses"], tmp_path)
    before = _counts_in.cache_info().misses
    once(spec_of(run, tmp_path / "out"))
    assert _counts_in.cache_info().misses - before == 4


def test_a_run_with_two_models_in_a_save_is_refused(named: Path, tmp_path: Path) -> None:
    with pytest.raises(WindowError, match="holds several checkpoints"):
        once(spec_of(named / "two", tmp_path / "out"))
    with pytest.raises(WindowError, match="holds several checkpoints"):
        plan_prune(named / "two", NEWEST)


def test_the_watch_of_a_run_that_was_moved_goes_on_when_its_new_place_is_written_down(
    named: Path, tmp_path: Path
) -> None:
    run = copy_of(named, SERIES["accelerate"], tmp_path)
    newest = (run / SERIES["accelerate"].tags[3]).parent
    newest.rename(tmp_path / "later")
    once(spec_of(run, tmp_path / "out"))
    moved = run.rename(tmp_path / "moved")
    spec = spec_of(moved, tmp_path / "out")
    for refused in (partial(once, spec), partial(plan_prune, moved, Retention((spec_of(run, tmp_path / "out"),)))):
        with pytest.raises(RecipeError, match="if it was moved, write its new place into `run` of"):
            refused()
    file = tmp_path / "out/watch.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run": str(moved)}))
    (tmp_path / "later").rename(moved / "checkpoints/checkpoint_11")
    once(spec)
    assert outputs(spec.out) == [f"step{end}/last2-linear" for end in (2, 3, 4)]
