"""One row a layout: written by DeepSpeed, names checked, merged, compared with the reference, loaded, trained on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_masters, moments, partitions, same_bits, states, unpadded
from safetensors.torch import load_file

from wsm_ds.inspection import inspect_run
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "config": {"zero_force_ds_cpu_optimizer": False}}
BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
# With fp32 states beside narrow masters DeepSpeed insists on offload and CPUAdam (`base_optimizer.py:484-520`).
BF16_FP32 = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
FP16_FP32 = {"fp16": {"enabled": True, "initial_scale_power": 4, "fp16_master_weights_and_grads": True}}
OFFLOADED_ADAM = {"optimizer": "cpu_adam", "zero": OFFLOAD["zero"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "BF16_Optimizer": {"stage": 1, "dtype": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "round_robin_gradients": {"stage": 2, "dtype": "bf16", "zero": {"round_robin_gradients": True}},
    "parameter_alignment, stage 1": {"stage": 1, "dtype": "bf16", "zero": {"parameter_alignment": True}},
    "parameter_alignment, stage 2 fp16": {"stage": 2, "dtype": "fp16", "zero": {"parameter_alignment": True}},
    "cpu offload, stage 2": {"stage": 2, "dtype": "bf16", **OFFLOAD},
    "cpu offload, stage 3": {"stage": 3, "dtype": "bf16", **OFFLOAD},
    "several sub-groups": {"stage": 3, "dtype": "bf16", "zero": {"sub_group_size": 50}},
    "hpZ": {"stage": 3, "dtype": "bf16", "zero": {"zero_hpz_partition_size": 2}},
    "SGD without states": {"stage": 2, "dtype": "bf16", "optimizer": "sgd"},
    "SGD with momentum": {"stage": 3, "dtype": "bf16", "optimizer": "momentum"},
    "FusedAdam, stage 2": {"stage": 2, "dtype": "bf16", "optimizer": "fused_adam"},
    "FusedAdam, stage 3": {"stage": 3, "dtype": "fp16", "optimizer": "fused_adam"},
    "CPUAdam, offload, stage 1": {"stage": 1, "dtype": "bf16", "optimizer": "cpu_adam", **OFFLOAD},
    "CPUAdam, offload, stage 3": {"stage": 3, "dtype": "bf16", "optimizer": "cpu_adam", **OFFLOAD},
    "CPULion, offload, stage 2": {"stage": 2, "dtype": "bf16", "optimizer": "cpu_lion", **OFFLOAD},
    "Muon, stage 2": {"stage": 2, "dtype": "bf16", "optimizer": "muon"},
    "Muon, stage 3": {"stage": 3, "dtype": "bf16", "optimizer": "muon", "zero": {"reduce_scatter": False}},
    "bf16 masters, stage 1": {"stage": 1, "dtype": "bf16", "config": BF16_MASTERS},
    "bf16 masters, stage 3": {"stage": 3, "dtype": "bf16", "config": BF16_MASTERS},
    "bf16 masters, fp32 states, stage 3": {"stage": 3, "dtype": "bf16", "config": BF16_FP32, **OFFLOADED_ADAM},
    "fp16 masters, fp32 states, stage 2": {"stage": 2, "dtype": "fp16", "config": FP16_FP32, **OFFLOADED_ADAM},
    "fp16 masters, fp32 states, stage 3": {"stage": 3, "dtype": "fp16", "config": FP16_FP32, **OFFLOADED_ADAM},
}
STATES = {
    "SGD without states": (),
    "SGD with momentum": ("momentum_buffer",),
    "Muon, stage 2": ("momentum_buffer", "exp_avg", "exp_avg_sq"),
    "Muon, stage 3": ("momentum_buffer", "exp_avg", "exp_avg_sq"),
}
COEFFICIENTS = [0.7, 0.3]


@pytest.fixture(scope="module")
def written(compiled_ops: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each layout, global_step2 and 4, from two ranks."""
    root = tmp_path_factory.mktemp("layouts")
    jobs = [
        layout | {"do": "train", "steps": 4, "every": 2, "run": str(root / name)} for name, layout in LAYOUTS.items()
    ]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_name_leads_to_its_own_elements(written: Path, tmp_path: Path, name: str) -> None:
    """An export is compared with what DeepSpeed itself says: its module copy, or in stage 3 its zero_to_fp32."""
    export(written / name, tag="global_step4", out=tmp_path / "out", dtype="fp32")
    tensors = load_file(tmp_path / "out/model.safetensors")
    if LAYOUTS[name]["stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        said = get_fp32_state_dict_from_zero_checkpoint(str(written / name), tag="global_step4")
    else:
        said = load_all(written / name / "global_step4")[0][0]["module"]
    for fqn in ("embedding.weight", "hidden.weight", "hidden.bias", "out.weight", "out.bias", "scale"):
        assert torch.equal(tensors[fqn].to(said[fqn].dtype), said[fqn]), fqn


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_merge_equals_the_reference_and_one_checkpoint_reproduces_itself(
    written: Path, tmp_path: Path, name: str
) -> None:
    run, stage = written / name, LAYOUTS[name]["stage"]
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    for path in (run / "global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "one/global_step4" / path.name).read_bytes(), path.name
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    models, optims = load_all(tmp_path / "out/global_step4")
    wanted, loaded = merged_masters(sources, COEFFICIENTS), [load_all(path)[1] for path in sources]
    kinds = STATES.get(name, ("exp_avg", "exp_avg_sq"))
    (found,) = inspect_run(run, "global_step4")
    assert found.layout is not None
    assert sorted(found.layout.state_names) == sorted(kinds)
    for rank, optim in optims.items():
        assert same(unpadded(models, partitions(optim), rank, stage), unpadded(models, wanted[rank], rank, stage))
        for kind in kinds:
            columns = zip(*(moments(source[rank], kind) for source in loaded), strict=True)
            merged = [average(list(column), COEFFICIENTS) for column in columns]
            groups = [number for number, held in states(optim).items() if kind in held]
            got = unpadded(models, moments(optim, kind), rank, stage, groups)
            assert same(got, unpadded(models, merged, rank, stage, groups)), kind
    assert verify(tmp_path / "out", full=True).note == ""


def test_every_layout_goes_on_with_another_number_of_ranks(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same parameters by name, in files that DeepSpeed loads under the same ds_config."""
    jobs = []
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        out = tmp_path / str(number)
        reshard(written / name, out=out, world_size=4)
        for run, folder in ((written / name, "before"), (out, "after")):
            export(run, out=tmp_path / f"{number}-{folder}", dtype="fp32")
        before, after = (load_file(tmp_path / f"{number}-{when}/model.safetensors") for when in ("before", "after"))
        assert all(torch.equal(after[fqn], value) for fqn, value in before.items()), name
        jobs.append(layout | {"do": "load", "root": str(out), "dump": str(out / "dump"), "steps": 2})
    reports = launch(jobs, world_size=4, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            optim = load_all(Path(job["root"]) / "global_step4")[1][rank]
            held = torch.load(f"{job['dump']}.rank{rank}")
            for got, partition in zip(held["masters"], partitions(optim), strict=True):
                assert same_bits(got[: partition.numel()], partition), json.dumps(job)
            assert all(math.isfinite(loss) for loss in report["losses"])


def same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_deepspeed_loads_the_merge_of_every_layout_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = []
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        for policy in ("carry", "drop"):
            out = tmp_path / f"{number}{policy}"
            merge(run=written / name, last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            jobs.append(layout | {"do": "load", "root": str(out), "dump": str(out / "dump"), "steps": 2, "name": name})
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            sources = [written / job["name"] / f"global_step{step}" for step in (2, 4)]
            models, _ = load_all(sources[-1])
            held = torch.load(f"{job['dump']}.rank{rank}")["masters"]
            wanted = merged_masters(sources, COEFFICIENTS)[rank]
            for got, partition in zip(
                unpadded(models, held, rank, job["stage"]), unpadded(models, wanted, rank, job["stage"]), strict=True
            ):
                assert same_bits(got[: partition.numel()], partition), json.dumps(job)
            assert all(math.isfinite(loss) for loss in report["losses"])
