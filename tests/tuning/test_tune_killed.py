"""Tunings that are killed at random moments end in the result of one that was not."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import ROOT, fork
from tuned import LENGTH, write_tokens

from wsm_ds.cli import main
from wsm_ds.evaluation.records import Records

KILLS = 10
FINAL = """
import hashlib, pathlib, sys
print(int(hashlib.sha256(pathlib.Path(sys.argv[1], "model.safetensors").read_bytes()).hexdigest()[:6], 16))
"""
"""A measurement that tells other weights from those that were meant."""


def result_in(out: Path) -> dict[str, Any]:
    """What does not depend on the time that was taken."""
    result = json.loads((out / "tuning.json").read_text())
    for one in result["candidates"]:
        del one["seconds"]
    return {key: result[key] for key in ("candidates", "recommendation", "waiting", "metric")}


def lines_in(records: Path) -> int:
    return records.read_bytes().count(b"\n") if records.exists() else 0


def test_killed_ten_times_at_random_it_ends_in_the_same_result(
    request_of: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script, random_moment = tmp_path / "hash.py", random.Random(18)
    script.write_text(FINAL)
    words = ["tune", str(request_of().run), "--windows", "2,4,8", "--model", "ds_models:TinyModel"]
    words += ["--data", str(write_tokens(tmp_path / "held_out.npy")), "--sequence-length", str(LENGTH)]
    words += ["--vocabulary", "13", "--final", f"python {script} {{}}", "--keep", "finalists", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0

    def start() -> Any:
        arguments = [*words, str(tmp_path / "killed")]
        return fork(ROOT / "wsm_ds/__main__.py", arguments, dict(os.environ), folder=tmp_path, log=tmp_path / "log")

    kills, records = 0, tmp_path / "killed/evaluations.jsonl"
    for _ in range(KILLS):
        process, wanted = start(), lines_in(records) + random_moment.randint(0, 1)
        while process.exitcode is None and (not records.exists() or lines_in(records) < wanted):
            time.sleep(0.01)
        process.join(random_moment.uniform(0.0, 0.2))
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert kills == KILLS
    process = start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    assert result_in(tmp_path / "killed") == result_in(tmp_path / "whole")
    assert (tmp_path / "killed/best.yaml").read_text() == (tmp_path / "whole/best.yaml").read_text()
    models = [sorted(path.name for path in (tmp_path / out / "models").iterdir()) for out in ("killed", "whole")]
    assert models[0] == models[1]
    made = [(one.subject.name, one.evaluator["kind"]) for one in Records(tmp_path / "killed/evaluations.jsonl").all()]
    assert len(made) == len(set(made))
