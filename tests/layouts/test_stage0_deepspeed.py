"""Stage 0: one file, an optimizer without names; masters are found, merged, and the module derived from them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, whole
from safetensors.torch import load_file

from wsm_ds.cli import main
from wsm_ds.errors import UnsupportedLayout
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16 unfused": {"dtype": "bf16"},
    "fp16 unfused": {"dtype": "fp16"},
    "bf16 fused": {"dtype": "bf16", "optimizer": "fused_adam"},
    "fp16 fused": {"dtype": "fp16", "optimizer": "fused_adam"},
}
TRAINED = [
    ["embedding.weight", "hidden.weight", "out.weight"],
    ["scale", "hidden.bias", "out.bias"],
]  # what the worker puts into its parameter groups
COEFFICIENTS = [0.6, 0.4]


@pytest.fixture(scope="module")
def written(compiled_ops: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stage0")
    common = {"do": "train", "steps": 4, "every": 2}
    jobs = [common | {"stage": 0, "run": str(root / name)} | case for name, case in CASES.items()]
    jobs.append(common | {"stage": 2, "dtype": "bf16", "run": str(root / "stage 2")})
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The masters by name, taken literally from the groups that the worker made."""
    models, _ = load_all(checkpoint)
    optimizer, module = models[0]["optimizer"], models[0]["module"]
    found = {}
    for group, names in enumerate(TRAINED):
        position = 0
        for index, name in enumerate(names):
            numel = module[name].numel()
            if "fp32_groups_flat" in optimizer:
                found[name] = optimizer["fp32_groups_flat"][group].detach()[position : position + numel]
            elif "fp32_groups" in optimizer:
                found[name] = optimizer["fp32_groups"][group][index].detach()
            else:
                found[name] = module[name]
            found[name] = found[name].view(module[name].shape)
            position += numel
    return found


def wanted_masters(run: Path) -> dict[str, torch.Tensor]:
    sources = [masters(run / f"global_step{step}") for step in (2, 4)]
    return {name: average([source[name] for source in sources], COEFFICIENTS) for name in sources[0]}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["carry", "drop"])
def test_masters_are_merged_and_the_module_is_derived_from_them(
    written: Path, tmp_path: Path, name: str, policy: Any
) -> None:
    run, out = written / name, tmp_path / "out"
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    file = "global_step4/mp_rank_00_model_states.pt"
    assert (tmp_path / "one" / file).read_bytes() == (run / file).read_bytes()
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
    wanted, got = wanted_masters(run), masters(out / "global_step4")
    module = load_all(out / "global_step4")[0][0]["module"]
    for fqn, value in wanted.items():
        assert torch.equal(got[fqn], value), fqn
        assert torch.equal(module[fqn], value.to(module[fqn].dtype)), fqn
    optimizer = load_all(out / "global_step4")[0][0]["optimizer"]
    states = optimizer.get("optimizer_state_dict", optimizer)["state"]
    assert bool(states) == (policy == "carry")
    export(out, out=tmp_path / "model", dtype="fp32")
    tensors = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(tensors[fqn], value) for fqn, value in wanted.items())
    assert "head.weight" not in tensors  # tied
    assert verify(out, full=True).note == ""


@pytest.mark.parametrize("name", [name for name in CASES if name != "fp32"])
def test_states_are_merged_by_name(written: Path, tmp_path: Path, name: str) -> None:
    merge(run=written / name, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    paths = [written / name / "global_step2", written / name / "global_step4", tmp_path / "out/global_step4"]
    held = [load_all(path)[0][0]["optimizer"]["optimizer_state_dict"]["state"] for path in paths]
    for number in held[0]:
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held[2][number][kind], average([h[number][kind] for h in held[:2]], COEFFICIENTS))


def test_deepspeed_loads_the_merge_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs: list[dict[str, Any]] = []
    for number, (name, case) in enumerate(CASES.items()):
        for policy in ("carry", "drop"):
            out = tmp_path / f"{number}{policy}"
            merge(run=written / name, last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            load = {"do": "load", "stage": 0, "root": str(out), "dump": str(out / "dump"), "steps": 2, "name": name}
            jobs.append(load | case)
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"))
    for job, report in zip(jobs, reports[1], strict=True):
        held = torch.load(f"{job['dump']}.rank1")
        wanted = wanted_masters(written / job["name"])
        flat = torch.cat([wanted[fqn].flatten() for names in TRAINED for fqn in names])
        assert torch.equal(torch.cat([tensor.flatten() for tensor in held["masters"]]), flat), job["name"]
        for fqn, value in wanted.items():
            assert torch.equal(held["module"][fqn], value.to(held["module"][fqn].dtype)), fqn
        assert all(math.isfinite(loss) for loss in report["losses"])


@pytest.mark.parametrize("newest", ["bf16 unfused", "bf16 fused", "stage 2"])
def test_a_window_may_mix_stage_0_and_others(written: Path, tmp_path: Path, newest: str) -> None:
    older = "stage 2" if newest != "stage 2" else "bf16 fused"
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step2").symlink_to(written / older / "global_step2")
    (run / "global_step4").symlink_to(written / newest / "global_step4")
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", format="safetensors", dtype="fp32")
    first, second = (
        whole(path, 2)["master"] if path.parent.name == "stage 2" else masters(path)
        for path in (written / older / "global_step2", written / newest / "global_step4")
    )
    tensors = load_file(tmp_path / "out/model.safetensors")
    for fqn, value in first.items():
        assert torch.equal(tensors[fqn], average([value, second[fqn]], COEFFICIENTS)), fqn


def test_what_the_file_does_not_say_is_refused(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedLayout, match="does not say which optimizer state"):
        merge(run=written / "fp32", last=2, curve="linear", out=tmp_path / "out", optimizer_states="merge")
    with pytest.raises(UnsupportedLayout, match="it is stage 0"):
        reshard(written / "bf16 fused", out=tmp_path / "out", world_size=3)
    broken = tmp_path / "run/global_step4"
    broken.mkdir(parents=True)
    state = torch.load(written / "bf16 unfused/global_step4/mp_rank_00_model_states.pt", weights_only=False)
    state["module"]["out.bias"] += 1
    torch.save(state, broken / "mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedLayout, match=r"master 5 of shape \[9\] fits no parameter"):
        merge(run=tmp_path / "run", last=1, curve="linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(written / "fp16 fused")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["global_step4", "4", "0", "fp16"]
