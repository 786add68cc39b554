"""Native mixture of experts at expert-parallel degrees 1 and 2: experts by their global names, their files derived."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_masters, moments, partitions, same_bits
from safetensors.torch import load_file

from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, UnsupportedLayout
from wsm_ds.layouts import find_checkpoints, read_layout
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

CASES = [
    (world_size, ep, stage, dtype)
    for world_size, ep in ((2, 1), (2, 2), (4, 2))
    for stage in (1, 2)
    for dtype in ("bf16", "fp32")
]
COEFFICIENTS = [0.7, 0.3]
PREFIX = "deepspeed_moe.experts.deepspeed_experts"


def run_name(world_size: int, ep: int, stage: int, dtype: str) -> str:
    return f"w{world_size}_ep{ep}_s{stage}_{dtype}"


def jobs_at(world_size: int, **values: Any) -> list[dict[str, Any]]:
    cases = [case for case in CASES if case[0] == world_size]
    return [{"name": run_name(*c), "ep": c[1], "stage": c[2], "dtype": c[3], **values} for c in cases]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moe")
    for world_size in (2, 4):
        jobs = [job | {"run": str(root / job["name"])} for job in jobs_at(world_size, do="train", steps=4, every=2)]
        launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"))
    return root


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The 16-bit weights under global names: those of the model file and of every expert's file."""
    found = dict(torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"])
    for path in sorted(checkpoint.glob("layer_*_expert_*")):
        found |= torch.load(path, weights_only=False)
    return found


def masters(checkpoint: Path, flats: dict[int, list[torch.Tensor]], ep: int) -> dict[str, torch.Tensor]:
    """Whole masters under global names: ranks that hold the same experts make one flat group."""
    shapes = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    found = {}
    for group, degree in enumerate((1, ep)):
        for expert_rank in range(degree):
            flat = torch.cat([flats[rank][group] for rank in range(expert_rank, len(flats), degree)])
            position = 0
            for local, shape in shapes[group].items():
                name, numel = local, math.prod(shape)
                if PREFIX in local:
                    layer, rest = local.split(f"{PREFIX}.")
                    number, rest = rest.split(".", 1)
                    name = f"{layer}{PREFIX}.{expert_rank * 4 // degree + int(number)}.{rest}"
                found[name] = flat[position : position + numel].view(shape)
                position += numel
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: run_name(*case))
@pytest.mark.parametrize("policy", ["carry", "merge", "drop"])
def test_experts_are_merged_and_their_files_derived(
    written: Path, tmp_path: Path, case: tuple[int, int, int, str], policy: Any
) -> None:
    run, ep = written / run_name(*case), case[1]
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    for path in (run / "global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "one/global_step4" / path.name).read_bytes(), path.name
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states=policy)
    out = tmp_path / "out/global_step4"
    optims, merged = load_all(out)[1], merged_masters(sources, COEFFICIENTS)
    for rank, optim in optims.items():
        assert all(torch.equal(g, w) for g, w in zip(partitions(optim), merged[rank], strict=True))
        columns = list(zip(*(moments(load_all(path)[1][rank], "exp_avg") for path in sources), strict=True))
        wanted_moments = {"carry": [c[-1] for c in columns], "drop": []}.get(policy)
        if wanted_moments is None:
            wanted_moments = [average(list(column), COEFFICIENTS) for column in columns]
        assert all(torch.equal(g, w) for g, w in zip(moments(optim, "exp_avg"), wanted_moments, strict=True))
    wanted, module = masters(run / "global_step4", merged, ep), weights(out)
    assert set(wanted) == set(module)
    assert len([name for name in wanted if ".3.2.bias" in name]) == 2  # the last of four experts, in both layers
    for name, value in wanted.items():
        assert torch.equal(module[name], value.to(module[name].dtype)), name
    assert verify(tmp_path / "out", full=True).note == ""
    export(tmp_path / "out", out=tmp_path / "model", dtype="fp32")
    tensors = load_file(tmp_path / "model/model.safetensors")
    assert set(tensors) == set(wanted)
    assert all(torch.equal(tensors[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("world_size", [2, 4])
def test_deepspeed_loads_the_merge_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, world_size: int
) -> None:
    jobs = []
    for policy in ("carry", "drop"):
        for job in jobs_at(world_size, do="load", steps=2):
            out = tmp_path / f"{job['name']}{policy}"
            run = written / job["name"]
            merge(run=run, last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            jobs.append(job | {"root": str(out), "dump": str(out / "dump")})
    reports = launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            checkpoint = Path(job["root"]) / "global_step4"
            held, module = torch.load(f"{job['dump']}.rank{rank}"), weights(checkpoint)
            for got, wanted in zip(held["masters"], partitions(load_all(checkpoint)[1][rank]), strict=True):
                assert same_bits(got[: wanted.numel()], wanted)
            first = (rank % job["ep"]) * 4 // job["ep"]  # the rank's first expert
            for number in range(4 // job["ep"]):
                got = held["module"][f"second.{PREFIX}.{number}.0.weight"]
                assert torch.equal(got, module[f"second.{PREFIX}.{first + number}.0.weight"])
            assert all(math.isfinite(loss) for loss in report["losses"])


def test_what_cannot_be_is_refused_or_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayout, match="it holds layer_0_expert_0"):
        reshard(written / "w2_ep2_s1_bf16", out=tmp_path / "out", world_size=4)
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step4").mkdir()
    for path in (written / "w4_ep2_s2_bf16/global_step4").iterdir():
        if path.name != "layer_1_expert_2_mp_rank_00_model_states.pt":
            (run / "global_step4" / path.name).symlink_to(path)
    with pytest.raises(BrokenCheckpoint, match="experts' files are missing: layer_1_expert_2_mp_rank_00_model"):
        read_layout(find_checkpoints(run)[0])


def test_windows_may_mix_expert_parallel_degrees_but_not_models(written: Path, runs: Path, tmp_path: Path) -> None:
    """By element, degrees and world sizes are only cuts; another model is refused with what differs."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step2").symlink_to(written / "w4_ep2_s2_bf16/global_step2")
    (run / "global_step4").symlink_to(written / "w2_ep1_s1_bf16/global_step4")
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", format="safetensors", dtype="fp32")
    held = []
    for name, ep, tag in (("w4_ep2_s2_bf16", 2, "global_step2"), ("w2_ep1_s1_bf16", 1, "global_step4")):
        optims = load_all(written / name / tag)[1]
        held.append(masters(written / name / tag, {r: partitions(o) for r, o in optims.items()}, ep))
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert set(tensors) == set(held[0])
    for name, value in held[0].items():
        assert torch.equal(tensors[name], average([value, held[1][name]], COEFFICIENTS)), name
    (run / "global_step6").symlink_to(runs / "w2_s2_bf16/global_step6")
    with pytest.raises(LayoutMismatch, match="do not hold the same model"):
        merge(run=run, last=2, curve="linear", out=tmp_path / "no")
