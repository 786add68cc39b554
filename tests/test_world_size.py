"""Stages 1 and 2 at another number of ranks: every element where DeepSpeed looks for it, optimizer states exact."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import load_all, moments, parameters, partitions

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError, UnsupportedLayout
from wsm_ds.merging import merge
from wsm_ds.verification import verify

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def run_of(runs: Path, other_world_sizes: Path) -> Any:
    def find(world_size: int, stage: int) -> Path:
        return runs / f"w2_s{stage}_bf16" if world_size == 2 else other_world_sizes / f"w{world_size}_s{stage}"

    return find


def whole(checkpoint: Path, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    """Masters and moments as whole parameters."""
    models, optims = load_all(checkpoint)
    held = {"master": {rank: partitions(optim) for rank, optim in optims.items()}}
    held |= {name: {rank: moments(o, name) for rank, o in optims.items()} for name in ("exp_avg", "exp_avg_sq")}
    return {kind: parameters(models, flats, stage) for kind, flats in held.items()}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("before", WORLD_SIZES)
@pytest.mark.parametrize("after", WORLD_SIZES)
def test_masters_and_moments_are_equal_element_by_element(
    run_of: Any, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    run, out = run_of(before, stage), tmp_path / "out"
    merge(run=run, tags=("global_step4",), coefficients=(1.0,), out=out, world_size=after)
    wanted, got = whole(run / "global_step4", stage), whole(out / "global_step4", stage)
    assert len(list((out / "global_step4").glob("*_optim_states.pt"))) == after
    for kind, tensors in wanted.items():
        assert list(tensors) == list(got[kind])
        assert all(torch.equal(got[kind][name], tensor) for name, tensor in tensors.items()), kind
    old, new = (load_all(root)[0][0]["module"] for root in (run / "global_step4", out / "global_step4"))
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    groups = [
        load_all(root)[1][0]["base_optimizer_state"]["param_groups"]
        for root in (run / "global_step4", out / "global_step4")
    ]
    assert groups[0] == groups[1]
    assert verify(out, full=True).note == ""


@pytest.mark.parametrize("after", [1, 3, 4])
def test_deepspeed_goes_on_natively_with_another_number_of_ranks(
    runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, after: int
) -> None:
    """The files are those that DeepSpeed itself would have read back: default arguments, states and all."""
    jobs = []
    for stage in (1, 2):
        out = tmp_path / str(stage)
        merge(run=runs / f"w2_s{stage}_bf16", last=3, curve="linear", out=out, world_size=after)
        jobs.append(
            {"do": "load", "stage": stage, "dtype": "bf16", "root": str(out), "dump": str(out / "dump"), "steps": 2}
        )
    reports = launch(jobs, world_size=after, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            assert report["global_steps"] == 6
            assert all(math.isfinite(loss) for loss in report["losses"])
            held = torch.load(f"{job['dump']}.rank{rank}")
            optim = load_all(Path(job["root"]) / "global_step6")[1][rank]
            for got, partition in zip(held["masters"], partitions(optim), strict=True):
                assert torch.equal(got[: partition.numel()], partition), json.dumps(job)
            for got_moments, wanted in zip(held["moments"], moments(optim, "exp_avg"), strict=True):
                assert torch.equal(got_moments["exp_avg"], wanted)


def test_the_reshard_command_says_what_it_makes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(runs / "w2_s1_fp16"), tmp_path / "out"
    assert main(["reshard", run, "--tag", "global_step2", "--world-size", "3", "--out", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["global_step2", "2", "1", "fp16", "3"]


def test_what_is_not_written_at_another_world_size_is_refused(runs: Path, tmp_path: Path) -> None:
    common = {"last": 1, "curve": "linear", "out": tmp_path / "out", "world_size": 3}
    with pytest.raises(UnsupportedLayout, match="stages 1 and 2 only"):
        merge(run=runs / "w2_s3_bf16", **common)
    with pytest.raises(RecipeError, match="keep their optimizer states"):
        merge(run=runs / "w2_s2_bf16", **common, optimizer_states="drop")
    assert list(tmp_path.iterdir()) == []
