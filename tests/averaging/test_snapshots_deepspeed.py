"""Snapshots that engines write while they train: every tool reads them, and their merges are means of every update."""

from pathlib import Path
from typing import Any

import pytest
import torch
from averaging.engines import TWO_RANKS
from deepspeed_runs import launch
from safetensors.torch import load_file

import wsm_ds
from wsm_ds.errors import CheckpointNotFound, RecipeError

WRITTEN = {name: job for name, job in TWO_RANKS.items() if job["stage"] and "overflows" not in name}
STEPS, EVERY, LAST = 14, 4, 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS/NAME for each engine, with snapshots of steps 1-4, 5-8, 9-12 and 13-14."""
    root = tmp_path_factory.mktemp("slots")
    common = {"do": "slots", "steps": STEPS, "every": EVERY, "last": LAST}
    jobs = [common | {"run": str(root / name), "dump": str(root / f"{name}.pt")} | job for name, job in WRITTEN.items()]
    launch(jobs, world_size=2, folder=root, worker="averaging_worker.py")
    return root


def dumped(runs: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(runs / f"{name}.pt.rank{rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name, job in WRITTEN.items() if "mp" not in job])
def test_the_linear_merge_of_slots_is_the_mean_of_every_update(name: str, runs: Path, tmp_path: Path) -> None:
    inspected = wsm_ds.inspect_run(runs / name / "snapshots")
    assert [item.problem for item in inspected] == [None] * 4
    assert [item.checkpoint.tag for item in inspected] == [
        "global_step4",
        "global_step8",
        "global_step12",
        "global_step14",
    ]
    out = tmp_path / "merged"
    wsm_ds.merge(run=runs / name / "snapshots", last=LAST, out=out, format="safetensors", dtype="fp32")
    wsm_ds.verify(out, full=True)
    merged = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    compared = 0
    for rank in dumped(runs, name):
        for parameter in rank["steps"][0]:
            if "deepspeed_experts" in parameter:
                continue
            samples = torch.stack([step[parameter] for step in rank["steps"][EVERY:]])
            ulp = torch.nextafter(samples.abs().amax(0).float(), torch.tensor(float("inf"))) - samples.abs().amax(0)
            error = (merged[parameter].double() - samples.mean(0)).abs()
            # DeepSpeed's own function finds wrong elements where gradients go round robin; the weights below are right.
            assert (error <= ulp.double()).all() or "round robin" in name, (parameter, (error / ulp).max())
            dtype = DTYPES[TWO_RANKS[name]["dtype"]]
            assert torch.equal(rank["swapped"][parameter], merged[parameter].to(dtype)), parameter
            compared += 1
    assert compared > 6


@pytest.mark.parametrize("name", WRITTEN)
def test_snapshots_hold_four_bytes_a_parameter_and_no_weights(name: str, runs: Path) -> None:
    files = list((runs / name / "snapshots" / "global_step8").iterdir())
    stored = sum(tensor_bytes(torch.load(file, weights_only=False, map_location="cpu")) for file in files)
    masters = sum(master.numel() for rank in dumped(runs, name) for master in rank["partitions"][0])
    assert stored <= 4 * masters + 1500  # buffers and frozen weights


@pytest.fixture(scope="module")
def loaded(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LOADED/NAME.pt.rank{r}: what DeepSpeed holds after it has loaded the merge of slots, carried from the run."""
    root = tmp_path_factory.mktemp("loaded")
    jobs = []
    for name, job in WRITTEN.items():
        merged = root / name
        run = runs / name
        wsm_ds.merge(run=run / "snapshots", last=LAST, carry_from=run, out=merged)
        wsm_ds.verify(merged, full=True)
        jobs.append({"do": "load", "root": str(merged), "dump": str(root / f"{name}.pt"), "steps": 1} | job)
    launch(jobs, world_size=2, folder=root, worker="averaging_worker.py")
    return root


@pytest.mark.parametrize("name", WRITTEN)
def test_deepspeed_loads_a_merge_of_slots_that_is_carried_from_a_full_checkpoint(
    name: str, runs: Path, loaded: Path
) -> None:
    for rank, trained in enumerate(dumped(runs, name)):
        state = torch.load(loaded / f"{name}.pt.rank{rank}", weights_only=False)
        for parameter, value in trained["swapped"].items():
            assert torch.equal(state["module"][parameter], value), parameter
        assert state["moments"]
        if WRITTEN[name]["stage"] == 3:
            continue  # what lies in the padding of its partitions is nobody's
        for number, master in enumerate(state["masters"]):
            samples = torch.stack([step[number] for step in trained["partitions"][EVERY:]])
            largest = samples.abs().amax(0).float()
            ulp = torch.nextafter(largest, torch.tensor(float("inf"))) - largest
            assert ((master.double() - samples.mean(0)).abs() <= ulp.double()).all()


def test_deepspeed_refuses_to_resume_from_a_snapshot(runs: Path, tmp_path: Path) -> None:
    for number, stage in enumerate((1, 2, 3)):
        name = next(name for name, job in WRITTEN.items() if job["stage"] == stage)
        job = {"do": "load", "root": str(runs / name / "snapshots"), "tag": "global_step8", "dump": "none"}
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(AssertionError, match=r"loss_scaler|size mismatch"):
            launch([job | WRITTEN[name]], world_size=2, folder=folder, worker="averaging_worker.py")


def test_what_is_carried_must_be_a_full_checkpoint_of_the_last_step(runs: Path, tmp_path: Path) -> None:
    run = runs / "ZeRO-1 bf16"

    def plan(**options: Any) -> None:
        wsm_ds.plan_merge(run=run / "snapshots", out=tmp_path / "out", **options)

    with pytest.raises(
        CheckpointNotFound, match=r"holds no checkpoint of step 12, .* it holds those of steps 14\. End"
    ):
        plan(last=2, to_step=12, carry_from=run)
    plan(last=2, to_step=12, carry_from=run / "global_step14")
    with pytest.raises(RecipeError, match="is a snapshot itself"):
        plan(last=2, carry_from=run / "snapshots")
    with pytest.raises(RecipeError, match="carry_from"):
        plan(last=2, carry_from=run, format="safetensors")


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0
