"""Programs measure a model: their JSON is found, and what goes wrong costs that model alone."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import is_gone

from wsm_ds.errors import EvaluationError, RecipeError
from wsm_ds.evaluation.commands import CommandEvaluator
from wsm_ds.evaluation.evaluation import Evaluation, Metric, Subject


def subject_of(folder: Path) -> Subject:
    return Subject(name=folder.name, kind="folder", identity=folder.name * 2, path=str(folder))


def measured(folder: Path, code: str, **options: Any) -> Evaluation:
    """What a Python program says of a folder."""
    script = folder / "measure.py"
    script.write_text(code)
    evaluator = CommandEvaluator(command=f"{sys.executable} {shlex.quote(str(script))} {{}} {{out}}", **options)
    return evaluator.measure_folder(folder, subject_of(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a 'model'"
    folder.mkdir()
    return folder


def test_the_last_line_is_a_number_or_json(folder: Path) -> None:
    made = measured(folder, "import sys; print('loading'); print(len(sys.argv[1]))\nprint()", maximize=True)
    assert made.metrics == {"value": Metric(value=float(len(str(folder))), maximize=True)}
    assert made.failure is None
    line = json.dumps({"a": {"b": [1, {"c.d": 0.5}], "err": 0.1}})
    made = measured(folder, f"print({line!r})", metrics=("a.b.1.c.d", "a.b.0"), errors=("a.err", "a.err"))
    assert made.metrics == {"a.b.1.c.d": Metric(value=0.5, error=0.1), "a.b.0": Metric(value=1.0, error=0.1)}


def test_a_file_that_it_writes_and_the_variables_that_it_gets(folder: Path) -> None:
    code = (
        "import json, os, sys, pathlib\nassert 'RANK' not in os.environ\n"
        "model = os.environ['WSM_MODEL']; assert model == sys.argv[1]\n"
        "pathlib.Path(sys.argv[2], 'scores.json').write_text(json.dumps({'name': 7, 'length': len(model)}))"
    )
    made = measured(folder, code, metrics=("length",), result="{out}/scores.json")
    assert made.metrics["length"].value == len(str(folder))


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        ("import sys; sys.exit('no space\\nleft')", {}, r"ended with exit code 1: no space \| left"),
        ("import os; os.kill(os.getpid(), 9)", {}, "ended with signal SIGKILL"),
        ("pass", {}, "the program printed nothing"),
        ("print('score: high')", {}, "neither a number nor JSON: score: high"),
        ("print('NaN')", {}, "value in the last line that it printed is nan"),
        ("print('true')", {}, "value in the last line that it printed is not a number but true"),
        ('print(\'{"acc": 1, "sub": {"f1": 2}}\')', {"metrics": ("accuracy",)}, "accuracy is not in .* acc, sub.f1"),
        ("pass", {"metrics": ("a",), "result": "{out}/absent.json"}, "did not write .*absent.json"),
        ("import time; time.sleep(600)", {"timeout_s": 0.3}, "took more than 0.3 s and was ended"),
    ],
)
def test_what_goes_wrong_is_the_failure_of_that_model(
    folder: Path, code: str, options: dict[str, Any], words: str
) -> None:
    made = measured(folder, code, **options)
    assert made.metrics == {}
    assert made.failure is not None
    assert re.search(words, made.failure), made.failure


def test_an_end_by_the_time_limit_takes_its_children_with_it(folder: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.argv[1], 'child').write_text(str(child.pid)); time.sleep(600)"
    )
    assert measured(folder, code, timeout_s=5).failure is not None
    assert is_gone(int((folder / "child").read_text()))


def test_attempts_are_repeated_and_their_output_is_kept(folder: Path) -> None:
    code = (
        "import pathlib, sys\ntries = pathlib.Path(sys.argv[1], 'tries'); done = tries.exists()\n"
        "tries.touch(); print('3.5' if done else 'broken')"
    )
    keep = folder / "kept"
    made = measured(folder, code, retries=2, keep=keep)
    assert made.metrics["value"].value == 3.5
    assert made.evaluator["attempts"] == 2
    (place,) = keep.iterdir()
    assert [path.name for path in sorted(place.iterdir())] == ["attempt1", "attempt2"]
    assert (place / "attempt1/stdout").read_text() == "broken\n"
    (folder / "tries").unlink()
    assert measured(folder, code, keep=keep).failure is not None  # a single attempt


def test_a_wrong_request_is_refused_before_anything_runs(tmp_path: Path) -> None:
    def refused(**values: Any) -> None:
        CommandEvaluator(**values).require_ready()

    with pytest.raises(EvaluationError, match="the program no-such-program is not found"):
        refused(command="no-such-program {}")
    with pytest.raises(EvaluationError, match="cannot be split into words"):
        refused(command="echo 'open")
    with pytest.raises(RecipeError, match="`errors` has 1 paths for 2 metrics"):
        refused(command="echo", metrics=("a", "b"), errors=("c",))
    with pytest.raises(RecipeError, match=r"which values of x.json are the metrics"):
        refused(command="echo", result="x.json")


def test_the_identity_tells_a_changed_script_and_not_where_output_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "measure.sh"
    script.write_text("echo 1")

    def identity(**values: Any) -> str:
        return CommandEvaluator(**({"command": f"sh {script} {{}}"} | values)).identity()

    first = identity()
    assert identity(keep=tmp_path, timeout_s=3, retries=1) == first
    assert len({first, identity(metrics=("a",)), identity(maximize=True), identity(version="2")}) == 4
    script.write_text("echo 2")
    assert identity() != first
