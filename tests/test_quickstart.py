"""`make quickstart`'s program: trained, merged, verified and compared for real, with fewer updates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ENVIRONMENT, ROOT

pytestmark = [pytest.mark.deepspeed, pytest.mark.torch]


def quickstart(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/quickstart.py"), *arguments]
    variables = os.environ | ENVIRONMENT | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600, check=False)


def test_it_trains_merges_verifies_and_compares(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quickstart("--out", str(out), "--steps", "250")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert " product takes " in lines[0]
    assert lines[0].endswith(("training with configs/zero2_bf16.json", "training with configs/zero2_fp32.json"))
    progress = [line for line in lines if line.startswith("step ")]
    assert progress[0].startswith("step   25 of 250  loss ")
    assert progress[-1].startswith("step  250 of 250  loss ")
    assert progress[-1].endswith(" steps/s  0 min  0 s left")
    assert sum("identical" in line for line in lines) == 1
    losses = json.loads((out / "losses.json").read_text())
    assert list(losses) == [*(f"global_step{step}" for step in range(75, 251, 25)), "merge, linear", "merge, 1-sqrt"]
    assert all(0 < loss < 4 for loss in losses.values()), losses  # ln 256 = 5.5 is what an untrained model has
    result = json.loads((out / "tune/tuning.json").read_text())
    assert result["waiting"] == []
    assert result["recommendation"]["confirmed"]["value"] < 4
    merged = json.loads((out / "best/wsm_merge.json").read_text())
    chosen = next(one for one in result["candidates"] if one["name"] == result["recommendation"]["name"])
    assert [source["step"] for source in merged["sources"]] == chosen["steps"]
    assert "<svg" in (out / "tune/report.html").read_text()


def test_a_stale_lock_is_named_with_the_command_that_removes_it(tmp_path: Path) -> None:
    lock = tmp_path / "extensions/fused_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    done = quickstart("--out", str(tmp_path / "out"), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert done.returncode == 1
    assert f"Remove it (rm '{lock}')" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_number_of_steps_that_makes_no_window_is_refused(tmp_path: Path) -> None:
    done = quickstart("--out", str(tmp_path / "out"), "--steps", "225")
    assert done.returncode == 2
    assert "--steps 225 is not a multiple of 25 that is at least 250" in done.stderr
