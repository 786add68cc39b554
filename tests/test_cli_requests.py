"""Wrong and half-right requests: each is refused with what to do, or understood; none is ignored."""

import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError
from wsm_ds.planning.recipe import load_recipes, make_recipe


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The line that a command prints when it is refused."""
    assert main([str(argument) for argument in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("rename", ["x", "=x"])
def test_a_rename_without_a_pattern_is_refused(rename: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "export", "RUN", "--rename", rename, "--out", "NEW")
    assert "--rename must be PATTERN=NEW, with a pattern before the last '=', not 'x'" in line
    with pytest.raises(RecipeError, match=r"`rename`: the pattern of 'x' is empty"):
        make_recipe(run="RUN", out="NEW", last=2, rename={"": "x"})


def test_a_flag_that_an_entry_of_outputs_also_sets_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    entries = [{"curve": "1-sqrt", "last": 2, "out": "sqrt"}, {"last": [4, 8], "out": "mean"}]
    recipe.write_text(yaml.safe_dump({"run": "RUN", "out": "NEW", "outputs": entries}))
    line = error_of(capsys, "merge", "--recipe", recipe, "--last", "3")
    assert f"--last is set here (3), and by outputs[0] of the recipe {recipe} (2); remove one" in line
    assert "--last is set here" in error_of(capsys, "watch", "--recipe", recipe, "--last", "3")
    outs = [str(recipe.out) for recipe in load_recipes(recipe, out="ELSE", floor=0.5)]
    assert outs == ["ELSE/sqrt", "ELSE/mean/last4", "ELSE/mean/last8"]


@pytest.mark.parametrize(("flags", "level"), [("-q", logging.ERROR), ("-v", logging.INFO), ("-vv", logging.DEBUG)])
def test_the_level_of_logging_may_stand_before_the_command(
    flags: str, level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flags, "coefficients", "--curve", "linear", "-n", "2"]) == 0
    assert logging.getLogger("wsm_ds").level == level
    for arguments, words in (("-q inspect RUN -v", "cannot be given together"), ("--json inspect RUN", "after the c")):
        with pytest.raises(SystemExit):
            main(arguments.split())
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("checkpoints", [2, 99999])  # less and more than a pipe holds
def test_a_pipe_that_is_closed_early_ends_a_command_with_one_line(checkpoints: int) -> None:
    command = f"{shlex.quote(sys.executable)} -m wsm_ds coefficients --curve linear -n {checkpoints}"
    done = subprocess.run(["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "wsm-ds: stdout was closed before everything was printed\n")


MESSAGES = {
    "coefficients --curve linear -n 4 --steps 1,2,3,4": "--checkpoints and --steps cannot be given together",
    "merge RUN --from 50 --out NEW": "--from needs --to, the last step of the window",
    "merge RUN --to 50 --out NEW": "--to needs --from, the first step of the window, or --last",
    "merge RUN --from 9 --to 5 --out NEW": "--from (9) is greater than --to (5)",
    "storage --parameters 1e9 --interval 100": "--last N must be given, the number of checkpoints of a window",
    "watch RUN --out NEW": "--last N must be given, the number of checkpoints of a window",
    "merge --recipe lines.yaml": "the recipe lines.yaml cannot be read: while parsing a flow sequence in ",
    "merge --recipe tuned": "the recipe tuned cannot be read: it is a folder; give tuned/best.yaml",
    "merge --recipe absent.yaml": "the recipe absent.yaml cannot be read: there is no such file",
    "merge --recipe twice.yaml": "the recipe twice.yaml: line 2 gives 'last' a second time; remove one",
    "merge --recipe entry.yaml": "outputs[0]: 'dtyp' is not a key of a recipe (did you mean 'dtype'?)",
    "verify nowhere": "nowhere is not a folder",
}


@pytest.mark.parametrize("arguments", MESSAGES)
def test_a_refusal_says_what_to_do(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines.yaml").write_text("last: [2,\n3")
    Path("tuned").mkdir()
    Path("tuned/best.yaml").touch()
    Path("twice.yaml").write_text("last: 2\nlast: 3")
    Path("entry.yaml").write_text("{run: RUN, out: NEW, outputs: [{last: 2, dtyp: bf16}]}")
    line = error_of(capsys, *arguments.split())
    assert MESSAGES[arguments] in line
    assert "\\n" not in line


def test_verify_full_needs_the_sources(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run")
    sweep = ["merge", str(run), "--last", "2,3", "--out", str(tmp_path / "out")]
    assert main(sweep) == 0
    capsys.readouterr()
    assert main([*sweep, "--dry-run"]) == 0
    outs = [tmp_path / "out/last2", tmp_path / "out/last3"]
    assert capsys.readouterr().out.splitlines() == [f"done {out} (already made by the same merge)" for out in outs]
    shutil.rmtree(run)
    assert "the sources cannot be read" in error_of(capsys, "verify", outs[0], "--full", code=3)
    assert main(["verify", str(outs[0])]) == 0


def test_a_broken_checkpoint_is_reported_once_and_how_to_pass_it_over(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run")
    (run / "global_step6/mp_rank_00_model_states.pt").unlink()
    assert main(["merge", str(run), "--last", "1,2", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert len([record for record in caplog.records if "is skipped" in record.message]) == 1
    run = shutil.copytree(runs / "w2_s2_bf16", tmp_path / "other")
    (run / "global_step4/mp_rank_00_model_states.pt").unlink()
    line = error_of(capsys, "merge", run, "--last", "2", "--out", tmp_path / "new", code=3)
    assert "choose the window without it by tags (--tags A,B,…)" in line


@pytest.mark.parametrize("tag", ["4", "latest", "globalstep4"])
def test_a_wrong_tag_is_corrected(tag: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(runs / "w2_s2_bf16", tmp_path / "run")
    (run / "latest").write_text("global_step4")
    line = error_of(capsys, "inspect", run, "--tag", tag)
    assert "(did you mean 'global_step4'?); it holds global_step6, global_step4" in line
