"""Wrong and half-right requests: each is refused with what to do, or understood; none is ignored."""

import logging
import shlex
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
