"""A watch beside a run that saves: every window once, the bytes of a plain merge, and the run untouched."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from dying import dies_at
from lazy import torch
from played_run import PlayedRun, contents, outputs
from processes import is_gone
from watches import PATIENCE_S, POLL_S, named, once, spec_for

from wsm_ds.cli import main
from wsm_ds.errors import BrokenCheckpoint, CheckpointNotFound, OutputExists, OutputLocked, RecipeError
from wsm_ds.merging import merge
from wsm_ds.planning.recipe import load_values, make_recipe
from wsm_ds.publishing.staging_folder import Staging
from wsm_ds.watching import EndPoints, WatchOptions, make_spec, watch, watcher
from wsm_ds.watching.completeness import Checkpoints


def test_windows_appear_as_the_run_saves_and_none_of_a_checkpoint_that_is_not_whole(
    run: PlayedRun, tmp_path: Path, start: Any
) -> None:
    out = tmp_path / "merges"
    beside = start(run.folder, "--last", "1,2", "--curve", "linear,1-sqrt", "--out", out, "--until-step", "4")
    beside.until("waiting")
    run.save(2)
    assert beside.until("merged")["step"] == 2
    model, rank0, rank1 = sorted(run.files(4), key=lambda file: "model" not in file.name)
    for file, nbytes in ((rank0, None), (model, None), (rank1, 0), (rank1, 3000), (rank1, rank1.stat().st_size - 1)):
        run.write(file, nbytes)
        time.sleep(3 * POLL_S)
        assert outputs(out) == ["step2/last1-1-sqrt", "step2/last1-linear"], file.name
    run.write(rank1)
    assert beside.until("merged")["step"] == 4  # `latest` has not moved, but nothing changes any more
    before = run.fingerprint()
    assert beside.end()[0] == 0
    assert [event["event"] for event in beside.events] == ["watching", "waiting", "merged", "merged", "done"]
    assert run.fingerprint() == before
    for last in (1, 2):
        for curve in ("linear", "1-sqrt"):
            plain = tmp_path / f"plain{last}{curve}"
            merge(make_recipe(run=run.folder, last=last, to_step=4, curve=curve, out=plain))
            assert contents(out / f"step4/last{last}-{curve}") == contents(plain)


def test_the_same_merge_typed_by_hand_is_known_to_be_done(
    run: PlayedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once(spec_for(run.save(2, 4), tmp_path / "out", last=2))
    place = tmp_path / "out/step4/last2-linear"
    assert main(["merge", str(run.folder), "--last", "2", "--to", "4", "--out", str(place)]) == 0
    assert "already made by the same merge" in capsys.readouterr().out


def test_a_recipe_names_its_outputs_below_each_end_point(run: PlayedRun, tmp_path: Path) -> None:
    recipe = {
        "run": str(run.save(2, 4, 6).folder),
        "curve": "linear",
        "out": str(tmp_path / "not here"),
        "outputs": [
            {"out": "eval", "last": [1, 2], "format": "safetensors"},
            {"out": "resume", "last": 2},
            {"last": 3, "curve": "1-sqrt"},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["watch", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    assert main([*command, "--once", "--nice", "0"]) == 0
    assert outputs(tmp_path / "out") == [
        "step2/eval/last1",
        "step4/eval/last1", "step4/eval/last2", "step4/resume",
        "step6/eval/last1", "step6/eval/last2", "step6/last3-1-sqrt", "step6/resume",
    ]  # fmt: skip
    assert not (tmp_path / "not here").exists()


def test_windows_end_only_where_they_are_asked_to(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    command = ["watch", str(run.folder), "--last", "1", "--once", "--nice", "0", "--out"]
    assert main([*command, str(tmp_path / "a"), "--every", "4"]) == 0
    assert main([*command, str(tmp_path / "b"), "--since", "3", "--until-step", "5"]) == 0
    assert outputs(tmp_path / "a") == ["step4/last1-linear"]
    assert outputs(tmp_path / "b") == ["step4/last1-linear"]


def test_a_watch_killed_at_any_operation_and_started_again_ends_in_the_same_bytes(
    run: PlayedRun, tmp_path: Path
) -> None:
    run.save(2, 4)
    values: dict[str, Any] = {"last": [1, 2], "threads": 1, "memory_budget": "64MiB"}
    once(spec_for(run, tmp_path / "right", **values))
    right = contents(tmp_path / "right" / "step4")
    count = deaths = 0
    while True:
        count += 31
        out = tmp_path / f"n{count}"
        if not dies_at(count, partial(once, spec_for(run, out, **values))):
            break
        deaths += 1
        made = {path: (out / path).stat().st_mtime_ns for path in outputs(out)}
        once(spec_for(run, out, **values))
        assert outputs(out) == ["step2/last1-linear", "step4/last1-linear", "step4/last2-linear"], count
        assert contents(out / "step4") == right, count
        assert {path: (out / path).stat().st_mtime_ns for path in made} == made, count
        assert [path.name for path in out.rglob("*") if path.name.endswith((".wsm-staging", ".new"))] == [], count
        shutil.rmtree(out)
    assert deaths > 5


SLOW = """
import os, time
from wsm_ds.engine import worker, seals, tasks
from wsm_ds.publishing import manifest
for module in (seals, tasks, manifest):
    module.BLOCK_BYTES = 2048
run = worker.Worker.run
def slow(*arguments):
    run(*arguments)
    time.sleep(0.15)
worker.Worker.run = slow
"""
SMALL_BLOCKS = "\n".join(SLOW.splitlines()[:6])


def test_a_watch_killed_in_a_merge_goes_on_with_it_although_the_run_went_on(
    run: PlayedRun, tmp_path: Path, start: Any
) -> None:
    run.save(2, 4)
    arguments = (run.folder, "--last", "2", "--threads", "1", "--out", tmp_path / "out", "--until-step", "6")
    first = start(*arguments, code=SLOW)
    journal = Staging(tmp_path / "out/step4/last2-linear").folder / "journal.0"
    deadline = time.monotonic() + PATIENCE_S
    while not (journal.exists() and len(journal.read_text().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.process.kill()
    first.end()
    assert outputs(tmp_path / "out") == []
    run.save(6)
    second = start(*arguments, code=SMALL_BLOCKS)
    code, errors = second.end()
    assert code == 0, errors
    assert "step4/last2-linear: continuing the merge that was begun there" in errors
    for step in (4, 6):
        merge(make_recipe(run=run.folder, last=2, to_step=step, curve="linear", out=tmp_path / f"plain{step}"))
        assert contents(tmp_path / f"out/step{step}/last2-linear") == contents(tmp_path / f"plain{step}")


def test_a_second_watch_of_one_folder_says_who_holds_it(run: PlayedRun, tmp_path: Path, start: Any) -> None:
    spec = spec_for(run.save(2), tmp_path / "out", last=1)
    first = start(run.folder, "--last", "1", "--out", tmp_path / "out")
    first.until("merged")
    with pytest.raises(OutputLocked, match=rf"another watch merges into .*process {first.process.pid} on"):
        once(spec)
    first.process.kill()
    first.end()
    assert [event.name for event in once(spec)] == ["watching", "done"]


def test_a_watch_that_would_let_a_prune_delete_what_an_earlier_one_needs_is_refused(
    run: PlayedRun, tmp_path: Path
) -> None:
    run.save(2, 4)
    out = tmp_path / "out"
    once(spec_for(run, out, last=[1, 2]))
    spec = (out / "watch.json").read_text()
    with pytest.raises(RecipeError, match=r"makes last1-linear, which this one does not make.*remove .*watch\.json"):
        once(spec_for(run, out, last=[2]))
    assert (out / "watch.json").read_text() == spec
    once(spec_for(run, out, last=[1, 2, 3]))
    (out / "watch.json").unlink()
    once(spec_for(run, out, last=[2]))


def test_a_folder_that_belongs_to_something_else_is_refused_untouched(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4)
    merge(make_recipe(run=run.folder, last=2, curve="linear", out=tmp_path / "merge"))
    once(spec_for(run, tmp_path / "out", last=[1]))
    other = PlayedRun(run.source, tmp_path / "other").save(2)
    for started, out, words in (
        (run, run.folder, "is the run itself"),
        (run, tmp_path / "merge", "is a finished merge"),
        (other, tmp_path / "out", f"has the merges of {run.folder}, not of {other.folder}"),
    ):
        before = sorted(out.rglob("*"))
        with pytest.raises(RecipeError, match=words):
            once(spec_for(started, out, last=[1]))
        assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_watch_within_seconds_and_keeps_what_it_merged(
    run: PlayedRun, tmp_path: Path, start: Any, number: signal.Signals
) -> None:
    run.save(2)
    command = "sh -c 'echo $$; sleep 100'"
    beside = start(run.folder, "--last", "1", "--out", tmp_path / "out", "--exec", command)
    beside.until("merged")
    printed = tmp_path / "out/step2/last1-linear.exec.out"
    while not (printed.exists() and printed.read_text().endswith("\n")):
        time.sleep(0.02)
    began = time.monotonic()
    beside.process.send_signal(number)
    beside.process.send_signal(number)  # launchers send it twice
    code, errors = beside.end()
    assert code == 130
    assert time.monotonic() - began < 5
    assert f"{number.name}; what was merged stays. Run the same command again to continue." in errors
    assert outputs(tmp_path / "out") == ["step2/last1-linear"]
    assert is_gone(int(printed.read_text()))
    assert not printed.with_suffix(".json").exists()


@pytest.mark.parametrize("place", ["../x", "a/../../x", "/tmp/x"])
def test_outputs_outside_of_the_folder_of_the_watch_are_refused(place: str, run: PlayedRun, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"must be a folder below {tmp_path / 'out'}, found .*/x"):
        spec_for(run, tmp_path / "out", outputs=[{"out": place, "last": 1}])


def test_windows_in_the_warmup_are_refused_once_and_stop_nothing(run: PlayedRun, tmp_path: Path) -> None:
    _set_warmup(run.save(2, 4, 6), 3)
    spec = spec_for(run, tmp_path / "out", last=[1, 2])
    events = once(spec)
    assert [(event.values["step"], event.values["window"]) for event in named("refused", events)] == [
        (4, "last2-linear")
    ]
    assert outputs(spec.out) == ["step2/last1-linear", "step4/last1-linear", "step6/last1-linear", "step6/last2-linear"]
    recorded = json.loads((spec.out / "step4/last2-linear.refused.json").read_text())
    assert recorded["error"] == "WindowError"
    assert "inside the warmup of 3 steps" in recorded["message"]
    assert recorded["sources"] == [2, 4]
    assert [event.name for event in once(spec)] == ["watching", "done"]
    (spec.out / "step4/last2-linear.refused.json").unlink()
    assert [event.name for event in once(spec_for(run, spec.out, last=[1, 2], allow=["warmup"]))] == [
        "watching", "merged", "done"
    ]  # fmt: skip


def _set_warmup(run: PlayedRun, steps: int) -> None:
    for path in run.folder.glob("*/*model_states.pt"):
        model = torch.load(path, weights_only=False)
        model["lr_scheduler"]["warmup_num_steps"] = steps
        torch.save(model, path)


def test_a_nan_is_refused_and_the_windows_without_it_are_merged(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    path = next(run.checkpoint(4).glob("*rank_1*optim_states.pt"))
    optim = torch.load(path, weights_only=False)
    optim["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()[3] = float("nan")
    torch.save(optim, path)
    events = once(spec_for(run, tmp_path / "out", last=[1, 2]))
    assert [event.values["error"] for event in named("refused", events)] == ["NonFiniteValue"] * 3
    assert outputs(tmp_path / "out") == ["step2/last1-linear", "step6/last1-linear"]
    assert named("done", events)[0].values == {"merged": 2, "refused": 3, "passed_over": 0}


def test_a_rank_file_of_another_step_is_refused_and_the_windows_without_it_are_merged(
    run: PlayedRun, tmp_path: Path
) -> None:
    run.save(2, 4, 6)
    path = next(run.checkpoint(4).glob("*rank_1*optim_states.pt"))
    path.write_bytes((run.checkpoint(2) / path.name).read_bytes())
    events = once(spec_for(run, tmp_path / "out", last=[1, 2]))
    assert [event.values["error"] for event in named("refused", events)] == ["ForeignFiles"] * 3
    assert outputs(tmp_path / "out") == ["step2/last1-linear", "step6/last1-linear"]


def test_a_window_waits_for_a_broken_checkpoint_until_it_is_mended(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    victim = next(run.checkpoint(4).glob("*rank_1*"))
    victim.rename(tmp_path / "aside")
    spec = spec_for(run, tmp_path / "out", last=2)
    with pytest.raises(BrokenCheckpoint, match=r"1 of 2 ranks' optimizer files are missing.*rank_1"):
        once(spec)
    assert outputs(spec.out) == []
    (tmp_path / "aside").rename(victim)
    assert len(named("merged", once(spec))) == 2


def test_a_newest_checkpoint_that_is_being_written_is_no_error(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2)
    run.write(run.files(4)[0])
    events = once(spec_for(run, tmp_path / "out", last=1))
    assert [event.name for event in events] == ["watching", "merged", "done"]
    assert outputs(tmp_path / "out") == ["step2/last1-linear"]


def test_the_end_is_not_waited_for_for_ever_if_a_checkpoint_stays_broken(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4, 6)
    next(run.checkpoint(4).glob("*rank_1*")).unlink()
    events = watch(spec_for(run, tmp_path / "out", EndPoints(until=6), last=1), WatchOptions(poll_s=0.05))
    seen = []
    with pytest.raises(BrokenCheckpoint):
        seen += [next(events) for _ in range(100)]
    assert outputs(tmp_path / "out") == ["step2/last1-linear", "step6/last1-linear"]


def test_a_checkpoint_that_latest_has_not_reached_settles_before_it_is_merged(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4)
    run.move_latest(2)
    spec, seen = spec_for(run, tmp_path / "out", EndPoints(until=4), last=1), []
    began = time.monotonic()
    for event in watch(spec, WatchOptions(poll_s=0.5)):
        seen.append((event.name, event.values.get("step")))
    assert seen == [("watching", None), ("merged", 2), ("merged", 4), ("done", None)]
    assert time.monotonic() - began > 0.5


def test_without_latest_an_older_checkpoint_is_complete_and_the_newest_settles(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4)
    (run.folder / "latest").unlink()
    checkpoints = Checkpoints(run.folder, frozenset(), float("inf"))
    checkpoints.look()
    assert [step for step in checkpoints.by_step if checkpoints.is_complete(step)] == [2]
    assert checkpoints.unsettled == {4}


def test_a_window_whose_sources_are_gone_is_passed_over(run: PlayedRun, tmp_path: Path) -> None:
    run.save(2, 4)
    spec = spec_for(run, tmp_path / "out", last=2)
    once(spec)
    shutil.rmtree(run.checkpoint(4))  # whoever did it: the merge's manifest knows that it was there
    run.save(6)
    events = once(spec)
    assert [event.values for event in named("passed_over", events)] == [
        {"step": 6, "window": "last2-linear", "gone": (4,)}
    ]
    assert outputs(spec.out) == ["step4/last2-linear"]


def test_errors_that_may_pass_are_tried_again_and_others_end_the_watch(
    run: PlayedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(2)
    spec = spec_for(run, tmp_path / "out", EndPoints(until=2), last=1)
    run_plan, failures = watcher.run_plan, [2]  # type: ignore[attr-defined]

    def failing(*arguments: Any, **keywords: Any) -> Any:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.EIO, "the network is down")
        return run_plan(*arguments, **keywords)

    monkeypatch.setattr(watcher, "run_plan", failing)
    events = list(watch(spec, WatchOptions(poll_s=0.05)))
    assert [event.name for event in events] == ["watching", "failed", "failed", "merged", "done"]
    failures[0] = 1
    with pytest.raises(OSError, match="the network is down"):
        once(spec_for(run, tmp_path / "other", last=1))
    monkeypatch.undo()
    (tmp_path / "third/step2/last1-linear").mkdir(parents=True)
    with pytest.raises(OutputExists):
        once(spec_for(run, tmp_path / "third", last=1))


def test_a_run_that_is_not_there_is_waited_for_but_not_by_one_look(run: PlayedRun, tmp_path: Path) -> None:
    spec = make_spec({"run": tmp_path / "nowhere", "out": tmp_path / "out", "last": 1, "curve": "linear"}, EndPoints())
    events = watch(spec, WatchOptions(poll_s=0.05))
    assert [next(events).name, next(events).text] == ["watching", f"{tmp_path / 'nowhere'} holds no checkpoint yet"]
    events.close()
    with pytest.raises(CheckpointNotFound):
        once(spec)
    assert [event.name for event in once(spec_for(run, tmp_path / "out", last=1))] == ["watching", "waiting", "done"]


def test_wrong_requests_are_refused_before_anything_is_written(run: PlayedRun, tmp_path: Path) -> None:
    for values, words in (
        ({"last": 1, "to_step": 4}, "chosen by `last`, not by `to_step`"),
        ({"tags": ["global_step2"]}, "chosen by `last`, not by `tags`"),
        ({"last": 2, "curve": None, "coefficients": [1.0]}, "1 coefficients for a window of 2"),
        ({"last": 1, "out": None}, "`out` must be given"),
        ({"outputs": [{"last": 1}, {"last": 1, "format": "safetensors"}]}, "same name"),
    ):
        with pytest.raises(RecipeError, match=words):
            make_spec({"run": run.folder, "out": tmp_path / "out", "curve": "linear"} | values, EndPoints())
    command = ["watch", str(run.folder), "--last", "1", "--out", str(tmp_path / "out"), "--once", "--nice", "0"]
    for wrong in (["--every", "0"], ["--poll-s", "0"], ["--exec", "'"], ["--exec", "no-such-program {}"]):
        assert main([*command, *wrong]) == 2
    assert not (tmp_path / "out").exists()


def test_the_recipes_of_configs_are_recipes_of_a_watch_unless_their_windows_have_a_fixed_end(tmp_path: Path) -> None:
    configs = Path(__file__).parents[2] / "configs"
    names = {
        name: list(make_spec(load_values(configs / f"merge_{name}.yaml", out=tmp_path), EndPoints()).recipes)
        for name in ("mean", "sweep")
    }
    assert names == {
        "mean": ["last8-linear"],
        "sweep": [*(f"eval/last{n}-{curve}" for n in (2, 4, 8) for curve in ("linear", "1-sqrt")), "resume"],
    }
    with pytest.raises(RecipeError, match="chosen by `last`, not by `from_step`, `to_step`"):
        make_spec(load_values(configs / "merge_1sqrt_safetensors.yaml", out=tmp_path), EndPoints())
