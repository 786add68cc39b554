"""A command for every merge: what it is told, what is kept of it, and when it is run again."""

import fcntl
import json
import sys
from pathlib import Path

import pytest
from played_run import PlayedRun, outputs
from processes import is_gone

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError
from wsm_ds.watching import EndPoints, Event, WatchOptions, WatchSpec, make_spec, watch
from wsm_ds.watching.commands import Commands, FinishedMerge, parse_command

SAY = "import os, sys; print(*sys.argv[1:], sep='\\n'); print(os.environ['WSM_MERGE'], os.environ['WSM_STEP']); "


@pytest.fixture
def spec(runs: Path, tmp_path: Path) -> WatchSpec:
    run = PlayedRun(runs / "w2_s2_bf16", tmp_path / "run").save(2, 4)
    values = {"run": run.folder, "out": tmp_path / "it's a $(touch hacked) folder", "last": 1, "curve": "linear"}
    return make_spec(values, EndPoints())


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def once(spec: WatchSpec, *command: str) -> list[Event]:
    events = watch(spec, WatchOptions(poll_s=0.05, is_once=True, command=command))
    return [event for event in events if event.name == "command"]


def kept(spec: WatchSpec, step: int, suffix: str) -> str:
    return (spec.out / f"step{step}/last1-linear.exec.{suffix}").read_text()


def test_a_command_is_told_the_merge_as_an_argument_and_in_its_environment(spec: WatchSpec) -> None:
    code = SAY + "print('a word', file=sys.stderr); sys.exit(int(os.environ['WSM_STEP']))"
    events = once(spec, *python(code, "{}", "--model={}/x", "$HOME; echo"))
    assert [(event.values["step"], event.values["exit_code"]) for event in events] == [(2, 2), (4, 4)]
    out = spec.out / "step4/last1-linear"
    assert kept(spec, 4, "out").splitlines() == [f"{out}", f"--model={out}/x", "$HOME; echo", f"{out} 4"]
    assert kept(spec, 4, "err") == "a word\n"
    result = json.loads(kept(spec, 4, "json"))
    assert result["exit_code"] == 4
    assert result["command"][3:] == [str(out), f"--model={out}/x", "$HOME; echo"]
    assert outputs(spec.out) == ["step2/last1-linear", "step4/last1-linear"]


def test_a_command_line_is_cut_as_a_shell_would_and_run_by_none(
    spec: WatchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["watch", str(spec.run), "--last", "1", "--out", str(spec.out), "--once", "--nice", "0", "--exec"]
    assert main([*command, "echo 'two  words' {} $HOME `touch hacked`"]) == 0
    merge = spec.out / "step2/last1-linear"
    assert kept(spec, 2, "out") == f"two  words {merge} $HOME `touch hacked`\n"
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("text", ["", "echo 'open", "/no/such/program {}"])
def test_a_command_that_cannot_be_one_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_command(text)


def test_a_command_that_has_ended_is_not_run_again_and_one_that_has_not_is(spec: WatchSpec) -> None:
    code = "import sys; print('ran'); sys.exit(3)"
    assert len(once(spec, *python(code))) == 2
    (spec.out / "step2/last1-linear.exec.json").unlink()  # as after a kill
    assert [event.values["step"] for event in once(spec, *python(code))] == [2]
    assert kept(spec, 2, "out") == "ran\n"


def test_a_command_is_run_on_what_was_merged_before_it_was_asked_for(spec: WatchSpec) -> None:
    assert once(spec) == []
    assert [event.values["step"] for event in once(spec, *python("pass"))] == [2, 4]


def test_a_program_that_does_not_start_is_recorded_like_one_that_fails(spec: WatchSpec) -> None:
    events = once(spec, "{}/eval.sh")
    assert [event.values["exit_code"] for event in events] == [127, 127]
    assert "No such file or directory" in kept(spec, 2, "err")


def test_a_command_killed_by_a_signal_has_its_negative_number(spec: WatchSpec) -> None:
    (first, _) = once(spec, *python("import os; os.kill(os.getpid(), 9)"))
    assert first.values["exit_code"] == -9


def test_a_command_that_a_killed_watch_has_left_is_waited_for_not_doubled(spec: WatchSpec, tmp_path: Path) -> None:
    once(spec)
    merge = FinishedMerge(spec.run, 2, "last1-linear", spec.out / "step2/last1-linear")
    with merge.command_file("out").open("a") as left, Commands(python("print('mine')")) as commands:
        fcntl.flock(left, fcntl.LOCK_EX)  # what the left command's own standard output does
        commands.add(merge)
        assert [*commands.step(), *commands.step()] == []
        assert commands.running is None
        left.close()
        assert list(commands.step()) == []
        commands.pause(60)
        (event,) = commands.step()
    assert event.values["exit_code"] == 0
    assert merge.command_file("out").read_text() == "mine\n"


def test_what_a_command_started_dies_with_the_watch(spec: WatchSpec) -> None:
    once(spec)
    merge = FinishedMerge(spec.run, 2, "last1-linear", spec.out / "step2/last1-linear")
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    with Commands(python(code)) as commands:
        commands.add(merge)
        list(commands.step())
        while not merge.command_file("out").read_text().endswith("\n"):
            commands.pause(0.02)
    grandchild = int(merge.command_file("out").read_text())
    assert is_gone(grandchild)
    assert not merge.command_file("json").exists()
