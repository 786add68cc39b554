"""Runs of launch/pretrain.py that are interrupted in every way, against ones that are not."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import ROOT
from training.conftest import config
from training.rank_processes import PRETRAIN, Launcher, as_srun, losses, steps

import wsm_ds.training
from wsm_ds.training.job import JobFolder, begin_attempt, read_attempt

Arguments = tuple[str, ...]


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("global_step*")}


def copy_until(run: Path, copy: Path, step: int) -> Path:
    """The run as it was when it had reached a step."""
    shutil.copytree(run, copy)
    for name in checkpoints(copy):
        if int(name.removeprefix("global_step")) > step:
            shutil.rmtree(copy / name)
    (copy / "job/done").unlink()
    kept = [json.dumps(line) for line in steps(run) if line["step"] <= step]
    (copy / "job/steps.jsonl").write_text("\n".join(kept) + "\n")
    return copy


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_of_an_interrupted_run_are_those_of_an_uninterrupted_one(
    stage: int, launcher: Launcher, arguments: Arguments, whole_runs: dict[int, Path], tmp_path: Path
) -> None:
    run, common = tmp_path / "broken 'run'", ("--config", config(stage), *arguments)
    asked = launcher.start(run, *common).until_step(2)
    asked.send(signal.SIGTERM, 1)
    asked.send(signal.SIGTERM, 1)
    assert asked.wait() == [75, 75], asked.output
    (saved,) = checkpoints(run)
    assert not (run / "job/done").exists()

    killed = launcher.start(run, *common).until_step(14)
    killed.send(signal.SIGKILL)
    assert killed.wait() == [-9, -9]
    assert f"resuming from {run / saved}" in killed.output

    last = launcher.start(run, *common)
    assert last.wait() == [0, 0], last.output
    assert f"resuming from {run / 'global_step12'}" in last.output or "global_step18" in last.output
    assert {line["attempt"] for line in steps(run)} == {1, 2, 3}
    assert list(losses(run)) == list(range(1, 25))
    assert losses(run) == losses(whole_runs[stage])
    assert json.loads((run / "job/done").read_text()) == {"step": 24, "attempt": 3}


def test_a_half_written_newest_checkpoint_is_named_and_passed_over_and_the_run_extended(
    launcher: Launcher, arguments: Arguments, whole_runs: dict[int, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(whole_runs[2], tmp_path / "run")
    cut = next((run / "global_step24").glob("*rank_1*optim_states.pt"))
    cut.write_bytes(cut.read_bytes()[:1000])
    extended = ("--config", config(2), *arguments, "--until-step", "26")
    started = launcher.start(run, *extended)
    assert started.wait() == [0, 0], started.output
    assert "global_step24 is not used" in started.output
    assert cut.name in started.output
    assert f"resuming from {run / 'global_step18'}" in started.output
    assert {step: loss for step, loss in losses(run).items() if step <= 24} == losses(whole_runs[2])
    assert (run / "latest").read_text() == "global_step26"
    assert (run / "job/unusable/global_step24-attempt-2" / cut.name).stat().st_size == 1000
    assert (run / "global_step24" / cut.name).stat().st_size > 1000
    assert json.loads((run / "job/done").read_text()) == {"step": 26, "attempt": 2}

    lines = len(steps(run))
    assert launcher.start(run, *extended).wait() == [0, 0]
    refused = launcher.start(run, *extended, "--until-step", "28", "--seed", "1")
    assert refused.wait() == [1, 1]
    assert "was saved with seed 0, now 1; these must not change in a run" in refused.output
    assert len(steps(run)) == lines


def test_a_run_goes_on_with_the_same_batches_at_other_stages_and_numbers_of_ranks(
    launcher: Launcher, arguments: Arguments, tmp_path: Path
) -> None:
    common = (*arguments, "--dropout", "0")
    whole = launcher.start(tmp_path / "whole", "--config", config(2), *common, named=as_srun)
    assert whole.wait() == [0, 0], whole.output
    run = copy_until(whole.run, tmp_path / "changed", 12)
    for ranks, stage, until in ((1, 3, 18), (2, 3, 20), (4, 1, 24)):
        changed = ("--config", config(stage), *common, "--until-step", str(until))
        started = launcher.start(run, *changed, ranks=ranks)
        assert started.wait() == [0] * ranks, started.output
        assert f"as ZeRO-{stage} on {ranks} ranks" in started.output
    assert {line["world_size"] for line in steps(run)} == {1, 2, 4}
    assert losses(run) == pytest.approx(losses(whole.run), abs=2e-3)
    assert not [path for path in (run / "job").iterdir() if "resharded" in path.name]


def test_a_stopped_rank_is_named_and_the_others_end_in_time(
    launcher: Launcher, arguments: Arguments, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = launcher.start(run, "--config", config(2), *arguments, "--collective-timeout-s", "15").until_step(2)
    watchdog = subprocess.Popen(
        [sys.executable, "-m", "wsm_ds.training.watchdog", str(run), "--timeout-s", "9"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.send(signal.SIGSTOP, 1)
    stopped_s = time.monotonic()
    _, said = watchdog.communicate(timeout=60)
    assert watchdog.returncode == 3
    assert f"the slowest is rank 1 on {socket.gethostname()}" in said
    assert "stopped, or its host is gone" in said
    started.ranks[0].join(60)
    assert time.monotonic() - stopped_s < 30
    assert started.ranks[0].exitcode == 1
    started.send(signal.SIGKILL, 1)


def test_an_attempt_that_comes_back_after_another_was_started_publishes_nothing(
    launcher: Launcher, arguments: Arguments, whole_runs: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = ("--config", config(2), *arguments)
    stale = launcher.start(run, *common).until_step(2)
    stale.send(signal.SIGSTOP)
    attempt = begin_attempt(JobFolder(run))
    newer = launcher.start(run, *common, environment={"WSM_ATTEMPT": str(attempt)})
    assert newer.wait() == [0, 0], newer.output
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "attempt-1"}
    stale.send(signal.SIGCONT)
    assert stale.wait() == [1, 1]
    assert "attempt 1 of" in stale.output
    assert "was superseded by attempt 2" in stale.output
    published = {path for path in before if "global_step" in str(path) or path.name in ("latest", "done")}
    assert {path: path.stat().st_mtime_ns for path in published} == {path: before[path] for path in published}
    assert checkpoints(run) == checkpoints(whole_runs[2])
    assert losses(run) == losses(whole_runs[2])


def test_a_file_makes_the_ranks_save_and_leave_and_none_begins_while_it_is_there(
    launcher: Launcher, arguments: Arguments, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = ("--config", config(2), *arguments, "--until-step", "100000")
    started, stop = launcher.start(run, *common).until_step(2), JobFolder(run).stop
    stop.touch()
    assert started.wait() == [75, 75], started.output
    newest = steps(run)[-1]["step"]
    assert f"saved at step {newest} and stopping: {stop} exists" in started.output
    assert (run / "latest").read_text() == f"global_step{newest}"
    again = launcher.start(run, *common)
    assert again.wait() == [1, 1]
    assert f"{stop} exists; remove it to continue" in again.output
    assert steps(run)[-1]["step"] == newest
    assert read_attempt(JobFolder(run)) == 1  # nothing was superseded


def test_the_example_of_the_package_runs(launcher: Launcher, tmp_path: Path) -> None:
    lines = [line[4:] for line in (wsm_ds.training.__doc__ or "").splitlines() if line.startswith("    ")]
    (tmp_path / "train.py").write_text("\n".join(lines) + "\n")
    started = launcher.start(tmp_path / "run", script=tmp_path / "train.py")
    assert started.wait() == [0, 0], started.output
    assert checkpoints(tmp_path / "run") == {"global_step5", "global_step10", "global_step15", "global_step20"}
    assert list(losses(tmp_path / "run")) == list(range(1, 21))


def test_torchrun_passes_a_signal_on_and_the_ranks_save(arguments: Arguments, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    agent = subprocess.Popen(
        [*command, str(PRETRAIN), "--run", str(run), "--config", config(1), *arguments, "--until-step", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline_s = time.monotonic() + 120
        while not steps(run) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        said, _ = agent.communicate(timeout=120)
    finally:
        agent.kill()
    newest = max(int(name.removeprefix("global_step")) for name in checkpoints(run))
    assert f"saved at step {newest} and stopping: SIGTERM" in said
    assert (run / "latest").read_text() == f"global_step{newest}"
    assert steps(run)[-1]["step"] == newest
