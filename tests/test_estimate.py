"""The estimate made before a run starts agrees with what DeepSpeed then writes and what merges then move."""

import json
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.cli import main
from wsm_ds.estimate import CheckpointSize, Pace, checkpoint_size, estimate, size_of
from wsm_ds.inspection import inspect_run
from wsm_ds.layouts import Layout
from wsm_ds.merge_planning import plan_merge
from wsm_ds.planning.recipe import make_recipe

WIDE = [(2, "bf16"), (2, "fp32"), (3, "bf16")]
WITHIN = 0.02


def layout_of(run: Path) -> Layout:
    (found,) = inspect_run(run)
    assert found.layout is not None
    return found.layout


@pytest.mark.parametrize(("stage", "dtype"), WIDE)
def test_the_size_of_a_checkpoint_is_what_deepspeed_writes(runs: Path, stage: int, dtype: str) -> None:
    layout = layout_of(runs / f"wide_s{stage}_{dtype}")
    real = size_of(layout)
    frozen = sum(info.numel * info.dtype.itemsize for info in layout.tensors.values() if info.role == "frozen")
    guessed = checkpoint_size(real.trained, stage=stage, world_size=2, dtype=dtype)
    assert real.nbytes == layout.nbytes
    assert guessed.nbytes == pytest.approx(real.nbytes - frozen, rel=WITHIN)
    assert guessed.files == real.files == len(layout.files)
    assert real.rest < WITHIN * real.nbytes


@pytest.mark.parametrize(("stage", "dtype"), WIDE)
@pytest.mark.parametrize(
    "values",
    [{}, {"optimizer_states": "drop"}, {"optimizer_states": "merge"}, {"format": "safetensors"},
     {"format": "safetensors", "dtype": "fp32"}, {"format": "universal"}, {"stage": 1}, {"stage": 3}],
    ids=lambda values: "-".join(map(str, values.values())) or "zero",
)  # fmt: skip
def test_the_traffic_of_a_merge_is_what_its_plan_moves(
    runs: Path, tmp_path: Path, stage: int, dtype: str, values: dict[str, Any]
) -> None:
    run = runs / f"wide_s{stage}_{dtype}"
    layout = layout_of(run)
    recipe = make_recipe(run=run, last=1, curve="linear", out=tmp_path / "out", **values)
    plan = plan_merge(recipe)
    found = estimate(size_of(layout), {"it": recipe}, Pace(interval_steps=1, every_steps=1))
    frozen = sum(info.numel * info.dtype.itemsize for info in layout.tensors.values() if info.role == "frozen")
    slack = frozen / layout.nbytes + WITHIN  # a third of this model is frozen or small; of a real one nothing is
    assert found.written_bytes == pytest.approx(plan.bytes_to_write, rel=slack)
    assert found.read_bytes == pytest.approx(plan.bytes_to_read - frozen, rel=WITHIN)


def test_a_recipe_is_counted_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["storage", "--parameters", "1e9", "--interval", "500", "--world-size", "8", "--stage", "2"]
    command += ["--last", "4,8", "--step-time-s", "2", "--tokens-per-step", "1e6", "--write-bandwidth", "1GB"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == {
        "parameters": 10**9, "trained": 10**9, "master": 4 * 10**9, "states": 8 * 10**9, "module": 2 * 10**9,
        "weights": 2 * 10**9, "rest": 0, "files": 9, "bytes": 14 * 10**9,
    }  # fmt: skip
    assert (found["checkpoints_kept"], found["checkpoints_peak"], found["disk_peak_bytes"]) == (7, 9, 126 * 10**9)
    assert found["windows"][1] == {
        "name": "last8-linear", "checkpoints": 8, "steps": 4000, "tokens": 4e9, "output_bytes": 14 * 10**9
    }  # fmt: skip
    assert found["merge"] == {"bytes_read": 40 * 10**9, "bytes_written": 28 * 10**9, "seconds": 68.0}
    assert found["per_day"] == pytest.approx(
        {
            "checkpoints": 86.4,
            "checkpoint_bytes_written": 86.4 * 14e9,
            "merge_bytes_read": 86.4 * 40e9,
            "merge_bytes_written": 86.4 * 28e9,
        }
    )
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "last8-linear" in shown
    assert "4000 steps, 4e+09 tokens" in shown
    assert "13.0 GiB in 9 files" in shown
    assert "takes longer" not in shown
    assert main([*command, "--write-bandwidth", "10MB"]) == 0
    assert "takes longer" in capsys.readouterr().out


def test_the_size_may_be_that_of_a_real_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "wide_s2_bf16"
    command = ["storage", "--like", str(run / "global_step2"), "--interval", "10", "--last", "2", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["bytes"] == layout_of(run).nbytes


def test_a_window_shorter_than_what_a_restart_needs_keeps_two_checkpoints() -> None:
    recipe = make_recipe(run=Path("run"), out=Path("out"), last=1, curve="linear")
    size = CheckpointSize(parameters=1, trained=1, master=4, states=8, module=2, weights=2, rest=0, files=2)
    assert estimate(size, {"it": recipe}, Pace(1, 1)).kept == 2


def test_wrong_requests_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    good = ["storage", "--last", "2", "--interval", "10"]
    for wrong in (
        [],
        ["--parameters", "0"],
        ["--parameters", "1e9", "--every", "15"],
        ["--parameters", "1e9", "--step-time-s", "0"],
        ["--parameters", "1e9", "--like", "x"],
        ["--parameters", "1e9", "--interval", "0"],
    ):
        assert main([*good, *wrong]) == 2, wrong
        assert len(capsys.readouterr().err.splitlines()) == 1
