"""Universal checkpoints: ours as DeepSpeed loads them, DeepSpeed's as we read them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, whole
from safetensors.torch import load_file

from wsm_ds.cli import main
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout
from wsm_ds.inspection import inspect_run
from wsm_ds.layouts import find_checkpoints, read_layout
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

STAGES = (1, 2, 3)
COEFFICIENTS = [0.5, 0.3, 0.2]
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def equal(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    return set(got) == set(expected) and all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("after", [1, 3])
def test_deepspeed_loads_a_universal_merge_at_any_stage_and_world_size(
    runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, after: int
) -> None:
    """What DeepSpeed then saves holds the merged masters and the newest's moments, element by element."""
    jobs = []
    for before in STAGES:
        out = tmp_path / f"from{before}"
        merge(run=runs / f"w2_s{before}_bf16", last=3, coefficients=COEFFICIENTS, out=out, format="universal")
        assert (out / "latest_universal").read_text() == "global_step6_universal"
        assert verify(out, full=True).note == ""
        for stage in STAGES:
            resave = str(tmp_path / f"{before}to{stage}")
            job = {"do": "load", "stage": stage, "dtype": "bf16", "root": str(out), "dump": str(out / "dump")}
            jobs.append(job | {"steps": 2, "resave": resave, "config": UNIVERSAL, "before": before})
    reports = launch(jobs, world_size=after, folder=tmp_path_factory.mktemp("load"))
    for job, report in zip(jobs, reports[0], strict=True):
        assert report["global_steps"] == 6
        assert all(math.isfinite(loss) for loss in report["losses"])
        run = runs / f"w2_s{job['before']}_bf16"
        sources = [whole(run / f"global_step{step}", job["before"]) for step in (2, 4, 6)]
        got = whole(Path(job["resave"]) / "resaved", job["stage"])
        for name, value in got["master"].items():
            assert torch.equal(value, average([source["master"][name] for source in sources], COEFFICIENTS)), name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert equal(got[kind], sources[-1][kind]), kind


@pytest.fixture(scope="module")
def converted(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ROOT/s{stage}/global_step{2,4,6}_universal`, made by DeepSpeed's converter."""
    root = tmp_path_factory.mktemp("universal")
    jobs = []
    for stage in STAGES:
        for step in (2, 4, 6):
            out = str(root / f"s{stage}" / f"global_step{step}_universal")
            jobs.append({"do": "convert", "root": str(runs / f"w2_s{stage}_bf16/global_step{step}"), "out": out})
    launch(jobs, world_size=1, folder=tmp_path_factory.mktemp("convert"))
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_universal_checkpoints_of_deepspeed_merge_like_the_ones_they_were_made_of(
    runs: Path, converted: Path, tmp_path: Path, stage: int
) -> None:
    run = runs / f"w2_s{stage}_bf16"
    common = {"last": 3, "coefficients": COEFFICIENTS, "optimizer_states": "merge"}
    size = {"sub_group_size": 200} if stage == 3 else {}
    merge(run=run, out=tmp_path / "direct", **common)
    merge(run=converted / f"s{stage}", out=tmp_path / "through", **common, world_size=3, stage=stage, **size)
    direct, through = (whole(tmp_path / name / "global_step6", stage) for name in ("direct", "through"))
    for kind, expected in direct.items():
        assert equal(through[kind], expected), kind
    assert [i.layout.world_size for i in inspect_run(tmp_path / "through") if i.layout] == [3]
    merge(run=converted / f"s{stage}", last=3, coefficients=COEFFICIENTS, out=tmp_path / "again", format="universal")
    for name, folder in (("again", "again"), ("direct", "direct")):
        export(tmp_path / folder, None, tmp_path / f"{name}-model", dtype="fp32")
    expected = load_file(tmp_path / "direct-model/model.safetensors")
    assert equal(load_file(tmp_path / "again-model/model.safetensors"), expected)
    assert verify(tmp_path / "again", full=True).note == ""


def test_deepspeed_goes_on_natively_from_a_universal_source(
    converted: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = []
    for stage in STAGES:
        out, size = tmp_path / str(stage), {"sub_group_size": 200} if stage == 3 else {}
        reshard(converted / f"s{stage}", "global_step4_universal", out, world_size=3, stage=stage, **size)
        jobs.append({"do": "load", "stage": stage, "dtype": "bf16", "root": str(out), "dump": str(out / "dump")})
    for report in launch(jobs, world_size=3, folder=tmp_path_factory.mktemp("load"))[0]:
        assert report["global_steps"] == 4
        assert all(math.isfinite(loss) for loss in report["losses"])


def test_what_deepspeed_will_not_restore_is_warned_of(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge(run=runs / "w2_s2_bf16", last=1, curve="linear", out=tmp_path / "out", format="universal")
    (warning,) = [record.message for record in caplog.records if "does not restore" in record.message]
    assert set(warning.split(": ")[1].split(", ")) == {"frozen.weight", "running_mean", "num_batches"}


def test_a_window_may_mix_universal_and_native_checkpoints(runs: Path, converted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step2_universal").symlink_to(converted / "s3/global_step2_universal")
    (run / "global_step4").symlink_to(runs / "w2_s3_bf16/global_step4")
    merge(run=run, last=2, coefficients=(0.7, 0.3), out=tmp_path / "out")
    merge(run=runs / "w2_s3_bf16", from_step=2, to_step=4, coefficients=(0.7, 0.3), out=tmp_path / "direct")
    got, expected = (whole(tmp_path / name / "global_step4", 3) for name in ("out", "direct"))
    assert equal(got["master"], expected["master"])


def test_a_universal_checkpoint_is_listed_and_its_faults_are_named(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(converted / "s2")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["global_step6_universal", "6", "univ", "bf16"]
    assert main(["merge", str(converted / "s2"), "--last", "1", "--format", "universal", "--optimizer-states", "drop",
                 "--out", str(tmp_path / "out")]) == 2  # fmt: skip
    copy = tmp_path / "run/global_step6_universal"
    copy.mkdir(parents=True)
    for path in sorted((converted / "s2/global_step6_universal").rglob("*.pt")):
        target = copy / path.relative_to(converted / "s2/global_step6_universal")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (copy / "zero/hidden.bias/fp32.pt").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"zero/hidden\.bias/fp32\.pt is missing"):
        read_layout(find_checkpoints(tmp_path / "run")[0])


def test_round_robin_is_refused_because_deepspeed_would_misplace_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = {"stage": 2, "dtype": "bf16", "zero": {"round_robin_gradients": True}}
    jobs = [
        base | {"do": "train", "steps": 2, "every": 2, "run": str(tmp_path / "run")},
        {
            "do": "convert",
            "root": str(tmp_path / "run/global_step2"),
            "out": str(tmp_path / "u/global_step2_universal"),
        },
    ]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    with pytest.raises(UnsupportedLayout, match="wrong places"):
        merge(run=tmp_path / "run", last=1, curve="linear", out=tmp_path / "out", format="universal")
    with pytest.raises(UnsupportedLayout, match="wrong places"):
        read_layout(find_checkpoints(tmp_path / "u")[0])
    assert not (tmp_path / "out").exists()
