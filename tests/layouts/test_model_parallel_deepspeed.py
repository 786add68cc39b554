"""Tensor parallelism of degree 2: one set of tensors a model-parallel rank, in and out in the same layout."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_masters, moments, parameters, partitions, same_bits, unpadded

from wsm_ds.cli import main
from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, UnsupportedLayout
from wsm_ds.layouts import Layout, find_checkpoints, read_layout
from wsm_ds.merging import export, merge, reshard
from wsm_ds.verification import verify

MP = 2
CASES = [(world_size, stage) for world_size in (2, 4) for stage in (1, 2, 3)]
COEFFICIENTS = [0.7, 0.3]
States = dict[str, dict[str, torch.Tensor]]


def jobs_at(world_size: int, **values: Any) -> list[dict[str, Any]]:
    shape = {"engine": "tensor parallel", "mp": MP, "dtype": "bf16", "batch": "same", **values}
    return [shape | {"stage": stage, "name": f"w{w}_s{stage}"} for w, stage in CASES if w == world_size]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w{world_size}_s{stage}`, global_step2 and 4, of two model-parallel ranks and one or two data-parallel ones."""
    root = tmp_path_factory.mktemp("tensor_parallel")
    for world_size in (2, 4):
        jobs = jobs_at(world_size, do="train", steps=4, every=2)
        jobs = [job | {"run": str(root / job["name"])} for job in jobs]
        launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"), worker="parallel_worker.py")
    return root


def of_mp_rank(held: dict[int, Any], mp: int, files: int) -> dict[int, Any]:
    """By data-parallel rank what `load_all` gives by file: their names sort by data-parallel rank first."""
    return {index // MP: held[index] for index in range(files) if index % MP == mp}


def whole(checkpoint: Path, flats: dict[int, list[torch.Tensor]], stage: int) -> States:
    """Each model-parallel rank's parameters, from the flat tensors of all files."""
    models, _ = load_all(checkpoint)
    return {
        f"mp_rank_{mp:02d}": parameters(of_mp_rank(models, mp, len(models)), of_mp_rank(flats, mp, len(flats)), stage)
        for mp in range(MP)
    }


def same(got: States, wanted: States) -> bool:
    names = {mp: set(tensors) for mp, tensors in wanted.items()}
    assert {mp: set(tensors) for mp, tensors in got.items()} == names
    return all(torch.equal(got[mp][name], value) for mp, held in wanted.items() for name, value in held.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"w{case[0]}_s{case[1]}")
def test_one_checkpoint_reproduces_itself(written: Path, tmp_path: Path, case: tuple[int, int]) -> None:
    run = written / f"w{case[0]}_s{case[1]}"
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    files = sorted(path.name for path in (run / "global_step4").iterdir())
    assert len(files) == case[0] + (case[0] if case[1] == 3 else MP)
    assert files == sorted(path.name for path in (tmp_path / "one/global_step4").iterdir())
    for name in files:
        got, wanted = (root / "global_step4" / name for root in (tmp_path / "one", run))
        assert got.read_bytes() == wanted.read_bytes(), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"w{case[0]}_s{case[1]}")
@pytest.mark.parametrize("policy", ["carry", "merge", "drop"])
def test_every_model_parallel_rank_is_merged(written: Path, tmp_path: Path, case: tuple[int, int], policy: Any) -> None:
    run, stage = written / f"w{case[0]}_s{case[1]}", case[1]
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states=policy)
    out = tmp_path / "out/global_step4"
    (models, optims), loaded = load_all(out), [load_all(path) for path in sources]
    wanted = whole(sources[-1], merged_masters(sources, COEFFICIENTS), stage)
    assert same(whole(out, {rank: partitions(optim) for rank, optim in optims.items()}, stage), wanted)
    column = [held["column.weight"] for held in wanted.values()]
    assert not torch.equal(*column)  # the ranks hold different halves
    for state in ("exp_avg", "exp_avg_sq"):
        columns = {rank: list(zip(*(moments(o[rank], state) for _, o in loaded), strict=True)) for rank in optims}
        got = {rank: moments(optim, state) for rank, optim in optims.items()}
        if policy == "drop":
            assert not any(got.values())
            continue
        chosen = {
            rank: [average(list(c), COEFFICIENTS) if policy == "merge" else c[-1] for c in held]
            for rank, held in columns.items()
        }
        assert same(whole(out, got, stage), whole(out, chosen, stage)), state
    for index, model in models.items():
        old = [m[index]["module"] for m, _ in loaded]
        assert torch.equal(model["module"]["mean"], average([module["mean"] for module in old], COEFFICIENTS))
        if stage < 3:
            module, masters = model["module"], wanted[f"mp_rank_{index:02d}"]
            assert all(torch.equal(module[name], value.bfloat16()) for name, value in masters.items())
            assert torch.equal(module["frozen"], old[-1]["frozen"])
            assert module["head.weight"].data_ptr() == module["embedding.weight"].data_ptr()
    assert verify(tmp_path / "out", full=True).note == ""


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
            jobs.append(job | {"root": str(out), "dump": str(out / "dump"), "policy": policy})
    folder = tmp_path_factory.mktemp("load")
    reports = launch(jobs, world_size=world_size, folder=folder, worker="parallel_worker.py")
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            checkpoint, stage = Path(job["root"]) / "global_step4", job["stage"]
            models, optims = load_all(checkpoint)
            held, mp = torch.load(f"{job['dump']}.rank{rank}"), rank % MP
            own = of_mp_rank(models, mp, len(models))
            for got, wanted in zip(
                unpadded(own, held["masters"], rank // MP, stage),
                unpadded(own, partitions(optims[rank]), rank // MP, stage),
                strict=True,
            ):
                assert same_bits(got[: wanted.numel()], wanted), json.dumps(job)
            masters = whole(checkpoint, {r: partitions(optim) for r, optim in optims.items()}, stage)
            for name, value in masters[f"mp_rank_{mp:02d}"].items():
                assert torch.equal(held["module"][name], value.bfloat16()), name
            if job["policy"] == "carry":
                saved = moments(optims[rank], "exp_avg")
                assert all(same_bits(g["exp_avg"], w) for g, w in zip(held["moments"], saved, strict=True))
            assert report["global_steps"] == 4
            assert all(math.isfinite(loss) for loss in report["losses"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_file_of_any_rank_is_named(written: Path, tmp_path: Path, stage: int) -> None:
    files = sorted((written / f"w4_s{stage}/global_step4").iterdir())
    assert len(files) == (6 if stage == 2 else 8)
    for victim in files:
        folder = tmp_path / victim.name / "global_step4"
        folder.mkdir(parents=True)
        for path in files:
            if path != victim:
                (folder / path.name).symlink_to(path)
        with pytest.raises(BrokenCheckpoint, match=victim.name.removeprefix("bf16_")):
            read_layout(find_checkpoints(folder.parent)[0])


def read(run: Path) -> Layout:
    return read_layout(find_checkpoints(run)[-1])


def test_names_tell_the_rank_and_tied_ones_are_known_of_every_rank(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in (1, 2, 3):
        layout = read(written / f"w4_s{stage}")
        assert (layout.world_size, layout.model_parallel_size) == (2, MP)
        own = ["embedding.weight", "column.weight", "row.weight", "norm.weight", "norm.bias", "column.bias"]
        names = [f"mp_rank_{mp:02d}/{name}" for mp in range(MP) for name in (*own, "frozen", "mean")]
        assert sorted(layout.tensors) == sorted(names)
        ties = {f"mp_rank_{mp:02d}/head.weight": f"mp_rank_{mp:02d}/embedding.weight" for mp in range(MP)}
        assert layout.aliases == ties
        roles = {name.split("/")[1]: info.role for name, info in layout.tensors.items() if "mp_rank_01" in name}
        assert (roles["frozen"], roles["mean"], roles["row.weight"]) == ("frozen", "buffer", "parameter")
    assert main(["inspect", str(written / "w4_s2")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["global_step4", "4", "2", "bf16", "2x2"]


def test_windows_may_mix_data_parallel_degrees_and_stages(written: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sources = [(written / "w4_s3/global_step2", 3), (written / "w2_s1/global_step4", 1)]
    for path, _ in sources:
        (run / path.name).symlink_to(path)
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out")
    held = [whole(p, {r: partitions(o) for r, o in load_all(p)[1].items()}, stage) for p, stage in sources]
    wanted = {mp: {n: average([held[0][mp][n], v], COEFFICIENTS) for n, v in held[1][mp].items()} for mp in held[1]}
    out = tmp_path / "out/global_step4"
    assert same(whole(out, {r: partitions(o) for r, o in load_all(out)[1].items()}, 1), wanted)


def test_what_cannot_be_is_refused_by_name(written: Path, runs: Path, tmp_path: Path) -> None:
    source, out = written / "w4_s2", tmp_path / "out"
    with pytest.raises(UnsupportedLayout, match="do not say how each tensor is split"):
        export(source, out=out)
    with pytest.raises(UnsupportedLayout, match="it holds mp_rank_01_model_states"):
        reshard(source, out=out, world_size=4)
    with pytest.raises(UnsupportedLayout, match="it holds mp_rank_01_model_states"):
        reshard(source, out=out, format="universal")
    run = tmp_path / "run"
    run.mkdir()
    (run / "global_step2").symlink_to(runs / "w2_s2_bf16/global_step2")
    (run / "global_step4").symlink_to(source / "global_step4")
    with pytest.raises(LayoutMismatch, match=r"step2 was saved with 1 model-parallel ranks, .*step4 with 2"):
        merge(run=run, last=2, curve="linear", out=out)
    assert not out.exists()
