"""Another number of ranks, another ZeRO stage: every element where DeepSpeed looks for it, optimizer states exact."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import load_all, moments, partitions, same_bits, same_tree, whole

from wsm_ds.cli import main
from wsm_ds.errors import LayoutMismatch, RecipeError
from wsm_ds.merging import merge, reshard
from wsm_ds.verification import verify

WORLD_SIZES = (1, 2, 3, 4)
STAGES = (1, 2, 3)
Find = Callable[[int, int], Path]


@pytest.fixture(scope="module")
def run_of(runs: Path, other_world_sizes: Path) -> Find:
    def find(world_size: int, stage: int) -> Path:
        return runs / f"w2_s{stage}_bf16" if world_size == 2 else other_world_sizes / f"w{world_size}_s{stage}"

    return find


def base_state(optim: Any) -> Any:
    return optim["optimizer_state_dict" if "fp32_flat_groups" in optim else "base_optimizer_state"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("before", WORLD_SIZES)
@pytest.mark.parametrize("after", WORLD_SIZES)
@pytest.mark.parametrize("new_stage", STAGES)
def test_every_element_and_every_hyperparameter_is_kept(
    run_of: Find, tmp_path: Path, stage: int, before: int, after: int, new_stage: int
) -> None:
    run, out = run_of(before, stage), tmp_path / "out"
    reshard(
        run,
        tag="global_step4",
        out=out,
        world_size=after,
        stage=new_stage,
        sub_group_size=50 if new_stage == 3 else None,
    )
    expected, got = whole(run / "global_step4", stage), whole(out / "global_step4", new_stage)
    (old_models, old_optims), (new_models, new_optims) = (load_all(r / "global_step4") for r in (run, out))
    assert len(new_optims) == after
    assert len(new_models) == (after if new_stage == 3 else 1)
    for kind, tensors in expected.items():
        assert set(tensors) == set(got[kind])
        assert all(torch.equal(got[kind][name], tensor) for name, tensor in tensors.items()), kind
    for optim in new_optims.values():
        for old, new in zip(base_state(old_optims[0])["param_groups"], base_state(optim)["param_groups"], strict=True):
            assert {**old, "params": 0} == {**new, "params": 0}
        assert {float(state["step"]) for state in base_state(optim)["state"].values()} == {4.0}
    for name, buffer in old_models[0]["module"].items():
        if name in old_models[0]["buffer_names"]:
            assert torch.equal(new_models[0]["module"][name], buffer), name
    if new_stage < 3:
        module = new_models[0]["module"]
        assert list(module) == list(old_models[0]["module"])
        assert all(torch.equal(module[name], tensor.bfloat16()) for name, tensor in expected["master"].items())
        assert module["head.weight"].data_ptr() == module["embedding.weight"].data_ptr()
    else:
        fragments = [new_models[rank]["frozen_param_fragments"]["frozen.weight"] for rank in range(after)]
        frozen = torch.cat(fragments)[:81].view(9, 9)
        assert torch.equal(frozen, whole_frozen(old_models))
    assert verify(out, full=True).note == ""


def whole_frozen(models: dict[int, Any]) -> torch.Tensor:
    if models[0]["module"]["frozen.weight"].numel():
        return models[0]["module"]["frozen.weight"]
    return torch.cat([m["frozen_param_fragments"]["frozen.weight"] for m in models.values()])[:81].view(9, 9)


@pytest.fixture(scope="module")
def even_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/{batch}_w{world_size}_s{stage}`: global_step2, and the losses of 7 updates of ranks that share a batch.

    "split": 12 sequences in fp32 are split over the ranks; "same": in bf16 every rank has the same two, so
    that the mean gradient of 1, 2 or 4 ranks is the same number.
    """
    root = tmp_path_factory.mktemp("even")
    for world_size in WORLD_SIZES:
        jobs = [even(stage, kind) for stage in STAGES for kind in kinds(world_size)]
        for job in jobs:
            run = root / f"{job['batch']}_w{world_size}_s{job['stage']}"
            job |= {"do": "train", "steps": 7, "every": 2, "run": str(run)}
        reports = launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"))
        for job, losses in zip(jobs, mean_losses(reports), strict=True):
            Path(job["run"], "losses.json").write_text(json.dumps(losses))
    return root


def kinds(world_size: int) -> tuple[str, ...]:
    return ("split",) if world_size == 3 else ("split", "same")


def even(stage: int, kind: str) -> dict[str, Any]:
    return {"stage": stage, "dtype": "fp32" if kind == "split" else "bf16", "batch": kind}


def mean_losses(reports: list[list[dict[str, Any]]]) -> list[list[float]]:
    """For each job the losses, each the mean over the ranks."""
    return [
        [sum(column) / len(column) for column in zip(*(report["losses"] for report in job), strict=True)]
        for job in zip(*reports, strict=True)
    ]


@pytest.mark.parametrize("after", WORLD_SIZES)
def test_the_next_five_losses_are_those_of_the_run_that_did_not_change(
    even_runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, after: int
) -> None:
    jobs, runs = [], []
    for run in sorted(even_runs.iterdir(), key=lambda run: run.name[-1]):  # stage 3 replaces F.linear for good
        kind, before, stage = run.name.split("_")[0], int(run.name.split("_")[1][1:]), int(run.name[-1])
        if before == after or kind not in kinds(after):
            continue
        out = tmp_path / run.name
        reshard(run, tag="global_step2", out=out, world_size=after)
        dump = {"root": str(out), "dump": str(out / "dump"), "steps": 5}
        jobs.append(even(stage, kind) | {"do": "load"} | dump)
        runs.append(run)
    assert len(jobs) >= 9
    reports = launch(jobs, world_size=after, folder=tmp_path_factory.mktemp("load"))
    for run, job, losses in zip(runs, jobs, mean_losses(reports), strict=True):
        unchanged = json.loads((run / "losses.json").read_text())[2:7]
        if job["batch"] == "same":
            assert losses == unchanged, run.name
        else:  # sums over ranks are taken in another order
            assert [f"{loss:.5f}" for loss in losses] == [f"{loss:.5f}" for loss in unchanged], run.name


@pytest.mark.parametrize("after", [1, 2, 3])
def test_deepspeed_loads_another_stage_with_default_arguments(
    runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, after: int
) -> None:
    """The files are those that DeepSpeed itself would have read back: states and all, in bf16 and fp16."""
    jobs: list[dict[str, Any]] = []
    for dtype in ("bf16", "fp16"):
        for stage in STAGES:
            for new_stage in STAGES:
                out = tmp_path / f"{dtype}{stage}{new_stage}"
                run = runs / f"w2_s{stage}_{dtype}"
                size = 200 if new_stage == 3 else None
                merge(run=run, last=3, curve="linear", out=out, world_size=after, stage=new_stage, sub_group_size=size)
                dump = {"root": str(out), "dump": str(out / "dump"), "steps": 2}
                jobs.append({"do": "load", "stage": new_stage, "dtype": dtype} | dump)
    reports = launch(jobs, world_size=after, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            assert report["global_steps"] == 6
            assert all(math.isfinite(loss) for loss in report["losses"])
            loaded = torch.load(f"{job['dump']}.rank{rank}")
            optim = load_all(Path(job["root"]) / "global_step6")[1][rank]
            for got, partition in zip(loaded["masters"], partitions(optim), strict=True):
                assert same_bits(got[: partition.numel()], partition), json.dumps(job)
            for got_moments, expected in zip(loaded["moments"], moments(optim, "exp_avg"), strict=True):
                assert same_bits(got_moments["exp_avg"], expected)


@pytest.mark.parametrize("policy", ["carry", "merge", "drop"])
def test_a_merge_in_another_form_is_the_merge_put_into_that_form(runs: Path, tmp_path: Path, policy: Any) -> None:
    """One pass equals two: merge, then reshard."""
    run, form = runs / "w2_s2_bf16", dict[str, Any]({"world_size": 3, "stage": 3, "sub_group_size": 100})
    merge(run=run, last=3, curve="1-sqrt", out=tmp_path / "one", optimizer_states=policy, **form)
    merge(run=run, last=3, curve="1-sqrt", out=tmp_path / "two", optimizer_states=policy)
    reshard(tmp_path / "two", out=tmp_path / "three", **form)
    for path in (tmp_path / "three/global_step6").iterdir():
        one = torch.load(tmp_path / "one/global_step6" / path.name, weights_only=False)
        assert same_tree(one, torch.load(path, weights_only=False)), path.name


def test_like_takes_the_form_of_another_checkpoint(run_of: Find, runs: Path, tmp_path: Path) -> None:
    like = run_of(3, 3) / "global_step2"
    reshard(run_of(2, 1), tag="global_step4", out=tmp_path / "out", like=like)
    names = sorted(path.name for path in (tmp_path / "out/global_step4").iterdir())
    assert names == sorted(path.name for path in like.iterdir())
    shapes = [load_all(path)[0][0]["param_shapes"] for path in (tmp_path / "out/global_step4", like)]
    assert shapes[0] == shapes[1]
    with pytest.raises(LayoutMismatch, match="dtypes differ, bf16 against fp16"):
        reshard(run_of(2, 1), out=tmp_path / "no", like=runs / "w2_s1_fp16/global_step2")
    with pytest.raises(RecipeError, match="give one or the other"):
        reshard(run_of(2, 1), out=tmp_path / "no", like=like, world_size=2)
    assert not (tmp_path / "no").exists()


def test_the_reshard_command_says_what_it_makes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(runs / "w2_s1_fp16"), tmp_path / "out"
    options = ["--tag", "global_step2", "--world-size", "3", "--stage", "3", "--out", str(out)]
    assert main(["reshard", run, *options]) == 0
    assert main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["global_step2", "2", "3", "fp16", "3"]
    assert main(["reshard", run, "--out", str(tmp_path / "no")]) == 2
    assert "one of --world-size" in capsys.readouterr().err


def test_forms_that_contradict_themselves_are_refused(runs: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"last": 1, "curve": "linear", "out": tmp_path / "out", "run": runs / "w2_s2_bf16"}
    with pytest.raises(RecipeError, match="sub_group_size belongs to stage 3"):
        merge(**common, sub_group_size=100)
    with pytest.raises(RecipeError, match="for zero outputs"):
        merge(**common, format="safetensors", world_size=2)
    assert list(tmp_path.iterdir()) == []
