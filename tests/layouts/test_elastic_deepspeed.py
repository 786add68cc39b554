"""`elastic_checkpoint`: lean states, an entry a group, which DeepSpeed loads for optimizers that count steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all, merged_masters, moments, partitions, same_bits, states

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.merging import merge, reshard
from wsm_ds.verification import verify

ELASTIC: dict[str, Any] = {"dtype": "bf16", "optimizer": "fused_adam", "zero": {"elastic_checkpoint": True}}
STAGES = (1, 2)
COEFFICIENTS = [0.7, 0.3]


@pytest.fixture(scope="module")
def written(compiled_ops: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    jobs = [
        ELASTIC | {"do": "train", "stage": stage, "steps": 4, "every": 2, "run": str(root / str(stage))}
        for stage in STAGES
    ]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_masters_and_lean_states_are_merged(written: Path, tmp_path: Path, stage: int) -> None:
    run = written / str(stage)
    sources = [run / "global_step2", run / "global_step4"]
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out", optimizer_states="merge")
    wanted, loaded = merged_masters(sources, COEFFICIENTS), [load_all(path)[1] for path in sources]
    for rank, optim in load_all(tmp_path / "out/global_step4")[1].items():
        assert isinstance(optim["base_optimizer_state"], list)
        assert all(torch.equal(*pair) for pair in zip(partitions(optim), wanted[rank], strict=True))
        for kind in ("exp_avg", "exp_avg_sq"):
            columns = zip(*(moments(source[rank], kind) for source in loaded), strict=True)
            merged = [average(list(column), COEFFICIENTS) for column in columns]
            assert all(torch.equal(*pair) for pair in zip(moments(optim, kind), merged, strict=True)), kind
    assert verify(tmp_path / "out", full=True).note == ""
    with pytest.raises(UnsupportedLayout, match="elastic"):
        reshard(run, out=tmp_path / "wider", world_size=4)


def test_deepspeed_loads_the_merge_and_trains_on(
    written: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = []
    for stage in STAGES:
        for policy in ("carry", "drop"):
            out = tmp_path / f"{stage}{policy}"
            merge(run=written / str(stage), last=2, coefficients=COEFFICIENTS, out=out, optimizer_states=policy)
            held = [states(optim) for optim in load_all(out / "global_step4")[1].values()]
            assert all(bool(entry) == (policy == "carry") for rank in held for entry in rank.values())
            load = {"do": "load", "stage": stage, "root": str(out), "dump": str(out / "dump"), "steps": 2}
            jobs.append(ELASTIC | load)
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"))
    for rank, reported in enumerate(reports):
        for job, report in zip(jobs, reported, strict=True):
            wanted = load_all(Path(job["root"]) / "global_step4")[1][rank]
            held = torch.load(f"{job['dump']}.rank{rank}")["masters"]
            for got, partition in zip(held, partitions(wanted), strict=True):
                assert same_bits(got[: partition.numel()], partition), job["root"]
            assert all(math.isfinite(loss) for loss in report["losses"])
