"""Experts with frozen parameters and buffers, in layers of several degrees, groups and orders of ranks."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_masters, moments, partitions, same_bits
from safetensors.torch import load_file

from wsm_ds.errors import BrokenCheckpoint, ForeignFiles, LayoutMismatch, UnsupportedLayout
from wsm_ds.inspection import inspect_run
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

DATA_FIRST = {"config": {"use_data_before_expert_parallelism": True}}
GRAD_FP32 = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 1, stage 2": {"ranks": 2, "stage": 2, "dtype": "bf16", "ep_sizes": [1, 1]},
    "ep 2, groups cut by size": {"ranks": 2, "stage": 2, "dtype": "bf16", "ep_sizes": [2, 2], "max_group_size": 100},
    "ep 2, stage 1, fp32": {"ranks": 2, "stage": 1, "dtype": "fp32", "ep_sizes": [2, 2]},
    "ep 2, stage 2": {"ranks": 4, "stage": 2, "dtype": "bf16", "ep_sizes": [2, 2]},
    "ep 4 and 1, stage 1": {"ranks": 4, "stage": 1, "dtype": "bf16", "ep_sizes": [4, 1]},
    "ep 2, data first": {"ranks": 4, "stage": 2, "dtype": "bf16", "ep_sizes": [2, 2], **DATA_FIRST},
    "ep 2, BF16_Optimizer": {"ranks": 4, "stage": 1, "dtype": "bf16", "ep_sizes": [2, 2], **GRAD_FP32},
}
COEFFICIENTS = [0.7, 0.3]
EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Reports of each job, by rank."""
    reports: dict[int, list[dict[str, Any]]] = {}
    for ranks in (2, 4):
        chosen = [number for number, job in enumerate(jobs) if job["ranks"] == ranks]
        (folder / str(ranks)).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", "0")  # or each rank orders groups of several ep_size its own way
            by_rank = launch(
                [jobs[number] for number in chosen],
                world_size=ranks,
                folder=folder / str(ranks),
                worker="parallel_worker.py",
            )
        for place, number in enumerate(chosen):
            reports[number] = [reported[place] for reported in by_rank]
    return [reports[number] for number in range(len(jobs))]


def job(layout: str, **values: Any) -> dict[str, Any]:
    return {"engine": "moe", "experts": [4, 2], **LAYOUTS[layout], **values}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each layout, global_step2 and 4."""
    root = tmp_path_factory.mktemp("moe")
    jobs = [job(name, do="train", steps=4, every=2, run=str(root / name)) for name in LAYOUTS]
    run_jobs(jobs, tmp_path_factory.mktemp("train"))
    return root


def modules(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in the model file and in all expert files."""
    found = dict(torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"])
    for path in checkpoint.glob("layer_*_expert_*"):
        held = torch.load(path, weights_only=False)
        assert not set(held) & set(found)
        found |= held
    return found


def whole_parameters(
    shapes: list[dict[str, Any]], held: dict[int, list[torch.Tensor]], name: str
) -> dict[str, torch.Tensor]:
    """Every parameter from all ranks' flat tensors, experts under their global names."""
    layout, found = LAYOUTS[name], {}
    world_size = layout["ranks"]
    for group, named in enumerate(shapes):
        sizes = {layout["ep_sizes"][int(n.split(".")[1])] for n in named if EXPERTS in n} or {1}
        (ep,) = sizes
        for ep_rank in range(ep):
            ranks = [r for r in range(world_size) if r % ep == ep_rank]
            if "config" in layout and layout["config"].get("use_data_before_expert_parallelism"):
                ranks = [r for r in range(world_size) if r // (world_size // ep) == ep_rank]
            flat = torch.cat([held[rank][group] for rank in ranks])
            for local, shape in named.items():
                numel = math.prod(shape)
                found[global_name(local, ep_rank, ep)] = flat[:numel].view(tuple(shape))
                flat = flat[numel:]
    return found


def global_name(local: str, ep_rank: int, ep: int) -> str:
    if EXPERTS not in local:
        return local
    layer, rest = local.split(EXPERTS)
    number, tail = rest.split(".", 1)
    experts = {"moe.0": 4, "moe.1": 2}[layer]
    return f"{layer}{EXPERTS}{ep_rank * (experts // ep) + int(number)}.{tail}"


def test_an_expert_file_of_another_step_is_noticed_however_many_experts_there_are(
    written: Path, tmp_path: Path
) -> None:
    run, noticed = Path(shutil.copytree(written / "ep 1, stage 2", tmp_path / "run")), 0
    for path in (run / "global_step4").glob("layer_*_expert_*"):
        right, old = path.read_bytes(), run / "global_step2" / path.name
        ours, others = torch.load(path), torch.load(old)
        shutil.copyfile(old, path)
        if all(torch.equal(ours[name], others[name]) for name in ours if name.endswith(("weight", "bias"))):
            merge(run=run, last=2, out=tmp_path / f"same-{path.name}")  # an expert that no token has reached
        else:
            with pytest.raises(ForeignFiles, match=path.name.removesuffix(".pt")):
                merge(run=run, last=2, out=tmp_path / "out")
            noticed += 1
        path.write_bytes(right)
    assert noticed >= 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_expert_is_a_tensor_under_its_global_name(written: Path, tmp_path: Path, name: str) -> None:
    """An export of the masters is compared with the module weights that DeepSpeed put beside them."""
    (found,) = inspect_run(written / name, "global_step4")
    assert found.layout is not None, found.problem
    export(written / name, tag="global_step4", out=tmp_path / "out", dtype="fp32")
    tensors, said = load_file(tmp_path / "out/model.safetensors"), modules(written / name / "global_step4")
    assert set(tensors) == set(said)
    for fqn, value in said.items():
        assert torch.equal(tensors[fqn].to(value.dtype), value), fqn
    inner = [tensors[f"moe.0{EXPERTS}{expert}.inner.weight"] for expert in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(inner) for b in inner[:i])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_merge_equals_the_reference_and_one_checkpoint_reproduces_itself(
    written: Path, tmp_path: Path, name: str
) -> None:
    run = written / name
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    for path in (run / "global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "one/global_step4" / path.name).read_bytes(), path.name
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    out = tmp_path / "out/global_step4"
    optims, loaded = load_all(out)[1], [load_all(path)[1] for path in sources]
    wanted = merged_masters(sources, COEFFICIENTS)
    assert sorted(optims) == list(range(LAYOUTS[name]["ranks"]))
    for rank, optim in optims.items():
        assert all(map(torch.equal, partitions(optim), wanted[rank]))
        for state in ("exp_avg", "exp_avg_sq"):
            columns = zip(*(moments(source[rank], state) for source in loaded), strict=True)
            merged = [average(list(column), COEFFICIENTS) for column in columns]
            assert len(merged) >= 2
            assert all(torch.equal(g, w) for g, w in zip(moments(optim, state), merged, strict=True)), state
    shapes = torch.load(out / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    whole, got, old = whole_parameters(shapes, wanted, name), modules(out), [modules(path) for path in sources]
    assert len([fqn for fqn in whole if EXPERTS in fqn]) == 3 * (4 + 2)
    for fqn, value in got.items():
        if fqn in whole:
            assert torch.equal(value, whole[fqn].to(value.dtype)), fqn
        else:  # a frozen parameter or a buffer
            assert torch.equal(value, average([tensors[fqn] for tensors in old], COEFFICIENTS)), fqn
    assert verify(tmp_path / "out", full=True).note == ""


def test_deepspeed_loads_every_merge_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = []
    for number, name in enumerate(LAYOUTS):
        for policy in ("carry", "drop"):
            out = tmp_path / f"{number}{policy}"
            merge(run=written / name, last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            jobs.append(job(name, do="load", root=str(out), dump=str(out / "dump"), steps=2, name=name, policy=policy))
    for loading, reports in zip(jobs, run_jobs(jobs, tmp_path_factory.mktemp("load")), strict=True):
        sources = [written / loading["name"] / f"global_step{step}" for step in (2, 4)]
        wanted, module = merged_masters(sources, COEFFICIENTS), modules(Path(loading["root"], "global_step4"))
        newest, ep_sizes = load_all(sources[-1])[1], loading["ep_sizes"]
        for rank, report in enumerate(reports):
            dump = torch.load(f"{loading['dump']}.rank{rank}")
            for got, partition in zip(dump["masters"], wanted[rank], strict=True):
                assert same_bits(got[: partition.numel()], partition), loading
            ep_rank = rank % ep_sizes[0] if loading.get("config") != DATA_FIRST["config"] else rank // 2
            for local, value in dump["module"].items():
                layer_ep = ep_sizes[int(local.split(".")[1])] if EXPERTS in local else 1
                assert torch.equal(value, module[global_name(local, ep_rank if layer_ep > 1 else 0, layer_ep)]), local
            carried = [state["exp_avg"] for state in dump["moments"]]
            kept = moments(newest[rank], "exp_avg") if loading["policy"] == "carry" else []
            assert len(carried) == len(kept)
            assert all(map(same_bits, carried, kept))
            assert all(math.isfinite(loss) for loss in report["losses"])


def test_checkpoints_of_different_expert_parallel_degrees_are_merged_by_names(written: Path, tmp_path: Path) -> None:
    older, newer = "ep 1, stage 2", "ep 2, stage 2"
    shutil.copytree(written / older / "global_step2", tmp_path / "run/global_step2")
    shutil.copytree(written / newer / "global_step4", tmp_path / "run/global_step4")
    merge(run=tmp_path / "run", last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    wanted = []
    for name, step in ((older, 2), (newer, 4)):
        optims = load_all(written / name / f"global_step{step}")[1]
        held = {rank: partitions(optim) for rank, optim in optims.items()}
        path = written / name / f"global_step{step}" / "mp_rank_00_model_states.pt"
        wanted.append(whole_parameters(torch.load(path, weights_only=False)["param_shapes"], held, name))
    got = modules(tmp_path / "out/global_step4")
    assert set(wanted[0]) == set(wanted[1])
    for fqn, value in wanted[1].items():
        merged = average([wanted[0][fqn], value], COEFFICIENTS)
        assert torch.equal(got[fqn], merged.to(got[fqn].dtype)), fqn


def test_other_numbers_of_experts_missing_files_and_other_forms_are_refused_by_name(
    written: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written / "ep 2, stage 2", run)
    missing = run / "global_step2/layer_0_expert_3_mp_rank_00_model_states.pt"
    content = torch.load(missing, weights_only=False)
    missing.unlink()
    values: dict[str, Any] = {"run": run, "last": 2, "curve": "linear", "out": tmp_path / "out"}
    with pytest.raises(BrokenCheckpoint, match=r"experts' files are missing: layer_0_expert_3_mp_rank_00_model_states"):
        merge(**values)
    torch.save({name.replace("experts.3", "experts.4"): value for name, value in content.items()}, missing)
    with pytest.raises(BrokenCheckpoint, match=r"hold numbers \[0, 1, 2, 4\] of moe\.0"):
        merge(**values)
    shutil.rmtree(run)
    shutil.copytree(written / "ep 2, stage 2" / "global_step4", run / "global_step4")
    model = run / "global_step4/mp_rank_00_model_states.pt"
    content = torch.load(model, weights_only=False)
    torch.save(content | {"ds_autoep_layers": [{"moe_layer_id": 0}]}, model)
    with pytest.raises(UnsupportedLayout, match="AutoEP"):
        merge(**values | {"last": 1})
    shutil.rmtree(run)
    shutil.copytree(written / "ep 4 and 1, stage 1" / "global_step4", run / "global_step4")
    optim = run / "global_step4/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    content = torch.load(optim, weights_only=False)
    content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1:] = reversed(
        content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1:]
    )
    torch.save(content, optim)
    with pytest.raises(UnsupportedLayout, match=r"rank_2_mp_rank_00\S* has the parameter groups .* PYTHONHASHSEED"):
        merge(**values | {"last": 1})
    with pytest.raises(UnsupportedLayout, match=r"not written in another form: it holds layer_0_expert_0_mp_rank_00"):
        reshard(written / "ep 2, stage 2", tag="global_step4", out=tmp_path / "out", world_size=2)
    assert not (tmp_path / "out").exists()


def test_a_window_with_another_number_of_experts_names_the_missing_ones(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path / "run"
    more = {"experts": [4, 4], "do": "train", "steps": 6, "every": 6, "run": str(run)}
    launch(
        [job("ep 1, stage 2") | more],
        world_size=2,
        folder=tmp_path_factory.mktemp("more"),
        worker="parallel_worker.py",
    )
    shutil.copytree(written / "ep 1, stage 2" / "global_step4", run / "global_step4")
    with pytest.raises(
        LayoutMismatch,
        match=r"wg\.weight: parameter \[2, 8\] against parameter \[4, 8\], moe\.1\S*experts\.2\.\S+: absent",
    ):
        merge(run=run, last=2, curve="linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
