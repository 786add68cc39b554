"""Tensor parallel runs at degree 2, with ZeRO 1, 2 and 3 along: every model-parallel rank's files by themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, parameters, partitions

from wsm_ds.cli import main
from wsm_ds.errors import BrokenCheckpoint, LayoutMismatch, UnsupportedLayout
from wsm_ds.inspect import inspect_run
from wsm_ds.layouts import find_checkpoints, read_layout
from wsm_ds.merging import merge, reshard
from wsm_ds.verification import verify

CASES = [(world_size, stage) for world_size in (2, 4) for stage in (1, 2, 3)]
COEFFICIENTS = [0.7, 0.3]


def jobs_at(world_size: int, **values: Any) -> list[dict[str, Any]]:
    base = {"tp": 2, "dtype": "bf16", **values}
    return [base | {"name": f"w{w}_s{stage}", "stage": stage} for w, stage in CASES if w == world_size]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tensor_parallel")
    for world_size in (2, 4):
        jobs = [job | {"run": str(root / job["name"])} for job in jobs_at(world_size, do="train", steps=4, every=2)]
        launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("train"))
    return root


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def merged_masters(sources: list[Path], part: int) -> dict[int, list[torch.Tensor]]:
    """The merged partitions of one model-parallel rank, by data-parallel rank."""
    names = sorted(path.name for path in sources[0].glob(f"*_mp_rank_{part:02d}_optim_states.pt"))
    held = {}
    for rank, name in enumerate(names):
        columns = zip(*(partitions(load(path / name)["optimizer_state_dict"]) for path in sources), strict=True)
        held[rank] = [average([tensor.detach() for tensor in column], COEFFICIENTS) for column in columns]
    return held


@pytest.mark.parametrize(("world_size", "stage"), CASES)
@pytest.mark.parametrize("policy", ["carry", "drop"])
def test_every_model_parallel_rank_is_merged_by_itself(
    written: Path, tmp_path: Path, world_size: int, stage: int, policy: str
) -> None:
    run = written / f"w{world_size}_s{stage}"
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "one")
    for path in (run / "global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "one/global_step4" / path.name).read_bytes(), path.name
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states=policy)
    out = tmp_path / "out/global_step4"
    for part in (0, 1):
        flats = merged_masters(sources, part)
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        model = load(out / f"{prefix}mp_rank_{part:02d}_model_states.pt")
        for rank, wanted in flats.items():
            optim = load(out / f"bf16_zero_pp_rank_{rank}_mp_rank_{part:02d}_optim_states.pt")["optimizer_state_dict"]
            got = parameters({0: model}, {**flats, rank: partitions(optim)}, stage)
            assert all(torch.equal(got[name], value) for name, value in parameters({0: model}, flats, stage).items())
            assert len(wanted) == len(partitions(optim)) == 2
        if stage < 3:
            for name, value in parameters({0: model}, flats, stage).items():
                assert torch.equal(model["module"][name], value.bfloat16()), name
            assert torch.equal(model["module"]["head.weight"], model["module"]["embedding.weight"])
    columns = [load(out / f"{prefix}mp_rank_{part:02d}_model_states.pt")["module"]["columns.weight"] for part in (0, 1)]
    assert stage == 3 or not torch.equal(*columns)
    assert verify(tmp_path / "out", full=True).note == ""


@pytest.mark.parametrize("world_size", [2, 4])
def test_deepspeed_loads_the_merge_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, world_size: int
) -> None:
    jobs = []
    for policy in ("carry", "drop"):
        for job in jobs_at(world_size, do="load", steps=2):
            out = tmp_path / f"{job['name']}{policy}"
            merge(run=written / job["name"], last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            jobs.append(job | {"root": str(out), "dump": str(out / "dump")})
    reports = launch(jobs, world_size=world_size, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            name = f"bf16_zero_pp_rank_{rank // 2}_mp_rank_{rank % 2:02d}_optim_states.pt"
            wanted = partitions(load(Path(job["root"]) / "global_step4" / name)["optimizer_state_dict"])
            for got, partition in zip(torch.load(f"{job['dump']}.rank{rank}")["masters"], wanted, strict=True):
                assert torch.equal(got[: partition.numel()], partition)
            assert all(math.isfinite(loss) for loss in report["losses"])


def test_a_missing_rank_is_named_and_what_cannot_be_is_refused(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing, words in (
        ("bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt", r"missing: zero_pp_rank_1_mp_rank_01_optim_states\.pt"),
        ("mp_rank_00_model_states.pt", "the model file of mp_rank_00 is missing"),
    ):
        run = tmp_path / missing
        (run / "global_step4").mkdir(parents=True)
        for path in (written / "w4_s2/global_step4").iterdir():
            if path.name != missing:
                (run / "global_step4" / path.name).symlink_to(path)
        with pytest.raises(BrokenCheckpoint, match=words):
            read_layout(find_checkpoints(run)[0])
    run = tmp_path / "half"
    (run / "global_step4").mkdir(parents=True)
    for path in (written / "w4_s2/global_step4").glob("*mp_rank_00*"):
        (run / "global_step4" / path.name).symlink_to(path)
    with pytest.raises(BrokenCheckpoint, match="files of 1 model-parallel ranks, but was saved by 2"):
        read_layout(find_checkpoints(run)[0])
    with pytest.raises(UnsupportedLayout, match="how a tensor was split over the 2 ranks"):
        merge(run=written / "w4_s2", last=1, curve="linear", out=tmp_path / "out", format="safetensors")
    with pytest.raises(UnsupportedLayout, match=r"it holds .*mp_rank_01"):
        reshard(written / "w4_s2", None, tmp_path / "out", world_size=1)
    assert not (tmp_path / "out").exists()
    found = inspect_run(written / "w4_s3", "global_step4")[0].layout
    assert found is not None
    assert found.tensors["mp_rank_01/columns.weight"].shape == (6, 8)
    assert main(["inspect", str(written / "w4_s3")]) == 0
    assert "global_step4" in capsys.readouterr().out


def test_another_degree_is_refused_with_the_difference(written: Path, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/global_step2").symlink_to(runs / "w2_s2_bf16/global_step2")
    (tmp_path / "run/global_step4").symlink_to(written / "w2_s2/global_step4")
    with pytest.raises(LayoutMismatch, match=r"embedding\.weight: parameter \[13, 9\] against absent"):
        merge(run=tmp_path / "run", last=2, curve="linear", out=tmp_path / "out")
