"""Buffers and frozen parameters that share storages, in checkpoints that DeepSpeed wrote."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import average, load_all
from safetensors.torch import load_file

from wsm_ds.errors import LayoutMismatch
from wsm_ds.merging import merge
from wsm_ds.verification import verify

CASES = [(0, "fp32"), (2, "bf16"), (3, "bf16")]
COEFFICIENTS = (0.75, 0.25)
FLOATING = ("first.inv_freq", "second.inv_freq", "low", "high")
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/s{stage}_{dtype}` with global_step2 and 4 of a model whose layers share buffers."""
    root = tmp_path_factory.mktemp("sharing")
    jobs = [job(stage, dtype) | {"do": "train", "steps": 4, "every": 2, "run": str(root / f"s{stage}_{dtype}")}
            for stage, dtype in CASES]  # fmt: skip
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


def job(stage: int, dtype: str) -> dict[str, Any]:
    return {"stage": stage, "dtype": dtype, "sharing": True}


def expected(run: Path, rank: int) -> dict[str, torch.Tensor]:
    sources = [load_all(run / f"global_step{step}")[0][rank]["module"] for step in (2, 4)]
    assert not torch.equal(sources[0]["high"], sources[1]["high"])
    return {name: average([source[name] for source in sources], list(COEFFICIENTS)) for name in FLOATING}


def merged(run: Path, out: Path, **values: Any) -> Path:
    merge(run=run, last=2, coefficients=COEFFICIENTS, out=out, **values)
    assert verify(out, full=True).note == ""
    return out


def storages(module: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names of one storage, in the order of the first."""
    found: dict[int, list[str]] = {}
    for name, tensor in module.items():
        if tensor.numel():
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return list(found.values())


@pytest.mark.parametrize(("stage", "dtype"), CASES)
@pytest.mark.parametrize("policy", ["carry", "drop"])
def test_a_shared_buffer_is_averaged_once_and_stays_shared(
    sharing: Path, tmp_path: Path, stage: int, dtype: str, policy: str
) -> None:
    run = sharing / f"s{stage}_{dtype}"
    out = merged(run, tmp_path / "out", optimizer_states=policy)
    models, _ = load_all(out / "global_step4")
    newest, _ = load_all(run / "global_step4")
    for rank, model in models.items():
        module = model["module"]
        for name, tensor in expected(run, rank).items():
            assert torch.equal(module[name], tensor), (rank, name)
        assert ["low", "high"] in storages(module)
        assert ["first.inv_freq", "second.inv_freq"] in storages(module)
        assert storages(module) == storages(newest[rank]["module"])
        for name in ("first.positions", "second.positions", "fixed", "fixed_rows"):
            assert torch.equal(module[name], newest[rank]["module"][name])


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_one_checkpoint_is_reproduced_byte_for_byte(sharing: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    run = sharing / f"s{stage}_{dtype}"
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "out")
    for path in (run / "global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "out/global_step4" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_safetensors_hold_every_name_by_itself(sharing: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    run = sharing / f"s{stage}_{dtype}"
    tensors = load_file(merged(run, tmp_path / "out", format="safetensors") / "model.safetensors")
    for name, tensor in expected(run, 0).items():
        assert torch.equal(tensors[name], tensor), name
    assert torch.equal(tensors["first.positions"], torch.arange(6))
    assert torch.equal(tensors["second.positions"], torch.arange(6))
    assert torch.equal(tensors["fixed"], torch.ones(8, 8, dtype=TORCH[dtype]))
    assert torch.equal(tensors["fixed_rows"], torch.ones(2, 8, dtype=TORCH[dtype]))


def test_deepspeed_loads_merges_in_the_same_and_in_other_forms(
    sharing: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs, runs = [], []
    for number, (source, dtype, stage, form) in enumerate(
        [(0, "fp32", 0, {}), (2, "bf16", 2, {}), (3, "bf16", 3, {}), (2, "bf16", 3, {"stage": 3}),
         (3, "bf16", 2, {"stage": 2})]
    ):  # fmt: skip
        run = sharing / f"s{source}_{dtype}"
        out = merged(run, tmp_path / str(number), **form)
        jobs.append(job(stage, dtype) | {"do": "load", "root": str(out), "dump": str(out / "dump"), "steps": 0})
        runs.append((run, source == stage))
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"))
    for loading, (run, is_same) in zip(jobs, runs, strict=True):
        for rank in (0, 1) if is_same and loading["stage"] == 3 else (0,):  # else rank 0's buffers, or one file's
            loaded = torch.load(f"{loading['dump']}.rank{rank}")["buffers"]
            for name, tensor in expected(run, rank).items():
                assert torch.equal(loaded[name], tensor), (loading["root"], name)


def changed(run: Path, target: Path, step: int, change: Any) -> Path:
    """A copy of a stage 2 run, in whose file of a step a buffer was changed."""
    shutil.copytree(run, target)
    path = target / f"global_step{step}/mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    change(content["module"])
    torch.save(content, path)
    return target


def test_buffers_that_an_older_checkpoint_holds_apart_are_refused_by_name(sharing: Path, tmp_path: Path) -> None:
    def part(module: dict[str, torch.Tensor]) -> None:
        module["second.inv_freq"] = module["second.inv_freq"].clone() + 1

    run = changed(sharing / "s2_bf16", tmp_path / "run", 2, part)
    with pytest.raises(LayoutMismatch, match=r"holds second\.inv_freq in the same bytes.*global_step2 does not"):
        merge(run=run, last=2, coefficients=COEFFICIENTS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tensors = load_file(merged(run, tmp_path / "out", format="safetensors") / "model.safetensors")
    assert torch.equal(tensors["second.inv_freq"], expected(run, 0)["second.inv_freq"])
    assert not torch.equal(tensors["second.inv_freq"], tensors["first.inv_freq"])
