"""PipelineModule: two stages that share an embedding, with data or tensor parallelism beside; layers' files derived."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_masters, moments, parameters, partitions, same_bits

from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, UnsupportedLayout, WindowError
from wsm_ds.inspection import inspect_run
from wsm_ds.layouts import Checkpoint, find_checkpoints, read_layout
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

FP32_GRADIENTS = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}
CASES: dict[str, dict[str, Any]] = {
    "2 stages": {"ranks": 2, "mp": 2, "stage": 1},
    "2 stages, BF16_Optimizer": {"ranks": 2, "mp": 2, "stage": 1, **FP32_GRADIENTS},
    "2 stages, 2 data-parallel ranks": {"ranks": 4, "mp": 2, "stage": 1},
    "2 stages, 2 tensor-parallel ranks": {"ranks": 4, "mp": 4, "stage": 1},
}
TIED = "tied_modules.embed."
COEFFICIENTS = [0.7, 0.3]


def jobs_at(ranks: int, **values: Any) -> list[dict[str, Any]]:
    shape = {"engine": "pipeline", "dtype": "bf16", "batch": "same", **values}
    return [shape | case | {"name": name} for name, case in CASES.items() if case["ranks"] == ranks]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each case, global_step2 and 4."""
    root = tmp_path_factory.mktemp("pipeline")
    for ranks in (2, 4):
        jobs = [job | {"run": str(root / job["name"])} for job in jobs_at(ranks, do="train", steps=4, every=2)]
        launch(jobs, world_size=ranks, folder=tmp_path_factory.mktemp("train"), worker="parallel_worker.py")
    return root


def masters_by_mp(checkpoint: Path, flats: dict[int, list[torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Each model-parallel rank's parameters from the flat tensors of all files (data-parallel ranks sort first)."""
    models, _ = load_all(checkpoint)
    return [
        parameters({0: model}, {i: flat for i, flat in flats.items() if i % len(models) == mp}, 1)
        for mp, model in models.items()
    ]


def layer_files(checkpoint: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Weights by layer and tensor-parallel rank."""
    found = {}
    for path in sorted(checkpoint.glob("layer_*")):
        match = re.fullmatch(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt", path.name)
        assert match
        found[int(match[1]), int(match[2] or 0)] = torch.load(path)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["carry", "merge", "drop"])
def test_stages_are_merged_and_their_layers_files_derived(
    written: Path, tmp_path: Path, name: str, policy: Any
) -> None:
    run, degree = written / name, CASES[name]["mp"] // 2
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    for path in (run / "global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "one/global_step4" / path.name).read_bytes(), path.name
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states=policy)
    out = tmp_path / "out/global_step4"
    optims, merged = load_all(out)[1], merged_masters(sources, COEFFICIENTS)
    loaded = [load_all(path)[1] for path in sources]
    for rank, optim in optims.items():
        assert all(torch.equal(g, w) for g, w in zip(partitions(optim), merged[rank], strict=True))
        columns = list(zip(*(moments(source[rank], "exp_avg_sq") for source in loaded), strict=True))
        wanted = {"carry": [column[-1] for column in columns], "drop": []}.get(policy)
        if wanted is None:
            wanted = [average(list(column), COEFFICIENTS) for column in columns]
        assert all(torch.equal(g, w) for g, w in zip(moments(optim, "exp_avg_sq"), wanted, strict=True))
    masters, layers, old = masters_by_mp(sources[-1], merged), layer_files(out), [layer_files(s) for s in sources]
    assert sorted(layers) == [(layer, tp) for layer in (0, 2, 3, 4) for tp in range(degree)]
    for (layer, tp), weights in layers.items():
        front = TIED if layer == 0 else f"{layer}."
        held = masters[tp if layer < 3 else degree + tp]
        trained = [key for key in weights if key.split(".")[-1] in ("weight", "bias")]
        assert len(trained) == (1 if layer == 0 else 2)
        assert all(torch.equal(weights[key], held[front + key].bfloat16()) for key in trained)
        if layer:
            assert torch.equal(weights["frozen"], old[-1][layer, tp]["frozen"])
            means = [files[layer, tp]["mean"] for files in old]
            assert torch.equal(weights["mean"], average(means, COEFFICIENTS))
    assert all(torch.equal(masters[tp][f"{TIED}embedding.weight"], masters[degree + tp][f"{TIED}embedding.weight"])
               for tp in range(degree))  # fmt: skip
    assert verify(tmp_path / "out", full=True).note == ""


@pytest.mark.parametrize("ranks", [2, 4])
def test_deepspeed_loads_the_merge_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int
) -> None:
    jobs = []
    for policy in ("carry", "drop"):
        for job in jobs_at(ranks, do="load", steps=2):
            out = tmp_path / f"{job['name']}{policy}"
            merge(run=written / job["name"], last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            jobs.append(job | {"root": str(out), "dump": str(out / "dump")})
    reports = launch(jobs, world_size=ranks, folder=tmp_path_factory.mktemp("load"), worker="parallel_worker.py")
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            checkpoint = Path(job["root"]) / "global_step4"
            optims, held = load_all(checkpoint)[1], torch.load(f"{job['dump']}.rank{rank}")
            data_ranks = ranks // job["mp"]
            mp, dp = divmod(rank, data_ranks)
            saved = partitions(optims[dp * job["mp"] + mp])
            assert all(same_bits(g[: w.numel()], w) for g, w in zip(held["masters"], saved, strict=True))
            masters = masters_by_mp(checkpoint, {index: partitions(optim) for index, optim in optims.items()})
            assert all(torch.equal(held["module"][name], v.bfloat16()) for name, v in masters[mp].items())
            assert report["global_steps"] == 4
            assert all(math.isfinite(loss) for loss in report["losses"])


def without(victim: Path, folder: Path) -> Checkpoint:
    """The checkpoint that `victim` is a file of, without it."""
    (folder / "global_step4").mkdir(parents=True)
    for path in victim.parent.iterdir():
        if path != victim:
            (folder / "global_step4" / path.name).symlink_to(path)
    return find_checkpoints(folder)[0]


def test_every_missing_file_is_named(written: Path, tmp_path: Path) -> None:
    files = sorted((written / "2 stages, 2 tensor-parallel ranks/global_step4").iterdir())
    assert len(files) == 4 + 4 + 8
    for victim in files:
        with pytest.raises(BrokenCheckpoint, match=victim.name.removeprefix("bf16_")):
            read_layout(without(victim, tmp_path / victim.name))
    tied = written / "2 stages/global_step4/layer_00-model_states.pt"  # no file says which layers use a tied module
    with pytest.raises(BrokenCheckpoint, match=r"names the parameter tied_modules\.embed\..*, but no file holds"):
        read_layout(without(tied, tmp_path / "tied"))


def test_a_rate_that_changes_in_one_stage_alone_is_noticed(written: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(written / "2 stages", tmp_path / "run"))
    (path,) = (run / "global_step4").glob("*mp_rank_01_optim_states.pt")
    file = torch.load(path, weights_only=False)
    for group in file["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
        group["lr"] /= 2
    torch.save(file, path)
    with pytest.raises(WindowError, match="the learning rate changes inside the window"):
        merge(run=run, last=2, out=tmp_path / "out")


def test_what_cannot_be_is_refused_and_inspect_shows_the_rest(written: Path, tmp_path: Path) -> None:
    source, out = written / "2 stages, 2 data-parallel ranks", tmp_path / "out"
    with pytest.raises(UnsupportedLayout, match="checkpoint of 2 model-parallel ranks"):
        export(source, out=out)
    with pytest.raises(UnsupportedLayout, match="it holds layer_00-model_states"):
        reshard(source, out=out, world_size=4)
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step2").symlink_to(written / "2 stages, 2 tensor-parallel ranks/global_step2")
    (run / "global_step4").symlink_to(source / "global_step4")
    with pytest.raises(LayoutMismatch, match=r"step2 was saved with 4 model-parallel ranks, .*step4 with 2"):
        merge(run=run, last=2, curve="linear", out=out)
    assert not out.exists()
    (found,) = inspect_run(source, "global_step4")
    assert found.layout is not None
    shown = found.details()
    assert (shown["world_size"], shown["model_parallel_size"], shown["is_complete"]) == (2, 2, True)
    assert {"mp_rank_00/2.linear.weight", f"mp_rank_01/{TIED}embedding.weight"} <= set(shown["tensors"])
