"""Merges of runs that DeepSpeed wrote, against the literal reference and against DeepSpeed's own loader."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import DTYPES, STAGES, launch
from reference import average, load_all, merged_masters, merged_parameters, moments, partitions, same_bits, unpadded
from safetensors.torch import load_file

from wsm_ds.inspection import inspect_run
from wsm_ds.merging import export, merge
from wsm_ds.verification import verify

CASES = [(stage, dtype) for stage in STAGES for dtype in DTYPES]
COEFFICIENTS = (0.5, 0.3, 0.2)
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def checkpoints(run: Path) -> list[Path]:
    return [run / f"global_step{step}" for step in (2, 4, 6)]


def merge_three(run: Path, out: Path, **values: Any) -> Path:
    merge(run=run, last=3, coefficients=COEFFICIENTS, out=out, **values)
    return out


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_one_checkpoint_with_coefficient_one_is_reproduced_byte_for_byte(
    runs: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    run = runs / f"w2_s{stage}_{dtype}"
    merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / "out")
    sources = sorted((run / "global_step6").iterdir())
    assert [path.name for path in sources] == sorted(p.name for p in (tmp_path / "out/global_step6").iterdir())
    for path in sources:
        assert path.read_bytes() == (tmp_path / "out/global_step6" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("stage", "dtype"), CASES)
@pytest.mark.parametrize("policy", ["carry", "merge", "drop"])
def test_masters_module_and_moments_equal_the_reference_bit_for_bit(
    runs: Path, tmp_path: Path, stage: int, dtype: str, policy: Any
) -> None:
    run = runs / f"w2_s{stage}_{dtype}"
    out = merge_three(run, tmp_path / "out", optimizer_states=policy)
    models, optims = load_all(out / "global_step6")
    expected = merged_masters(checkpoints(run), list(COEFFICIENTS))
    for rank, optim in optims.items():
        got_masters = unpadded(models, partitions(optim), rank, stage)
        for got, wanted in zip(got_masters, unpadded(models, expected[rank], rank, stage), strict=True):
            assert torch.equal(got, wanted)
    sources = [load_all(path)[1] for path in checkpoints(run)]
    for rank, optim in optims.items():
        for name in ("exp_avg", "exp_avg_sq"):
            columns = list(zip(*(moments(source[rank], name) for source in sources), strict=True))
            wanted_moments = {
                "carry": [column[-1] for column in columns],
                "merge": [average(list(column), list(COEFFICIENTS)) for column in columns],
                "drop": [],
            }[policy]
            got_moments = moments(optim, name)
            assert len(got_moments) == len(wanted_moments)
            if wanted_moments:
                got_moments = unpadded(models, got_moments, rank, stage)
                wanted_moments = unpadded(models, wanted_moments, rank, stage)
            assert all(torch.equal(g, w) for g, w in zip(got_moments, wanted_moments, strict=True))
    if stage < 3:
        for name, wanted in merged_parameters(checkpoints(run), list(COEFFICIENTS), stage).items():
            assert torch.equal(models[0]["module"][name], wanted.to(TORCH[dtype])), name
        assert torch.equal(models[0]["module"]["head.weight"], models[0]["module"]["embedding.weight"])


def test_floating_buffers_are_merged_and_integer_ones_are_the_newest(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs / "w2_s3_bf16"
    out = merge_three(run, tmp_path / "out")
    sources = [load_all(path)[0] for path in checkpoints(run)]
    merged, _ = load_all(out / "global_step6")
    for rank in (0, 1):  # each rank keeps buffers of its own
        wanted = average([source[rank]["module"]["running_mean"] for source in sources], list(COEFFICIENTS))
        assert torch.equal(merged[rank]["module"]["running_mean"], wanted)
        assert merged[rank]["module"]["num_batches"] == 6
    assert [record.message for record in caplog.records if "num_batches" in record.message] == [
        "num_batches differs between global_step2 and global_step6; it cannot be averaged, the newest is kept"
    ]


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp16"), (2, "bf16"), (3, "bf16"), (3, "fp32")])
def test_safetensors_hold_the_rounded_merge_in_shards_with_an_index(
    runs: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    run = runs / f"w2_s{stage}_{dtype}"
    out = merge_three(run, tmp_path / "out", format="safetensors", max_shard_size=800)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tensors = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    for name, wanted in merged_parameters(checkpoints(run), list(COEFFICIENTS), stage).items():
        assert torch.equal(tensors.pop(name), wanted.to(TORCH[dtype])), name
    assert sorted(tensors) == ["frozen.weight", "num_batches", "running_mean"]  # tied head.weight is there once
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in set(index["weight_map"].values()) for t in load_file(out / file).values()
    )


def test_export_writes_one_file_of_the_chosen_dtype(runs: Path, tmp_path: Path) -> None:
    run = runs / "w2_s3_bf16"
    export(run, tag="global_step4", out=tmp_path / "out", dtype="fp32")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name, wanted in merged_parameters([run / "global_step4"], [1.0], 3).items():
        assert torch.equal(tensors[name], wanted), name
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_any_world_size_is_read(other_world_sizes: Path, tmp_path: Path) -> None:
    for run in sorted(other_world_sizes.iterdir()):
        stage, steps = int(run.name[-1]), [run / "global_step2", run / "global_step4"]
        merge(run=run, last=2, curve="linear", out=tmp_path / run.name, format="safetensors", dtype="fp32")
        tensors = load_file(tmp_path / run.name / "model.safetensors")
        for name, wanted in merged_parameters(steps, [0.5, 0.5], stage).items():
            assert torch.equal(tensors[name], wanted), (run.name, name)
        merge(run=run, last=1, coefficients=(1.0,), out=tmp_path / f"{run.name}-one")
        for path in (run / "global_step4").iterdir():
            assert path.read_bytes() == (tmp_path / f"{run.name}-one/global_step4" / path.name).read_bytes()


def test_a_trainer_run_is_found_and_merged_into_a_folder_that_trainer_resumes_from(runs: Path, tmp_path: Path) -> None:
    assert [i.checkpoint.tag for i in inspect_run(runs / "hf")] == [
        "checkpoint-2/global_step2",
        "checkpoint-4/global_step4",
    ]
    merge(run=runs / "hf", tags=("checkpoint-2", "checkpoint-4"), curve="linear", out=tmp_path / "out")
    assert list((tmp_path / "out").glob("global_step*")) == [tmp_path / "out/global_step4"]  # what Trainer looks for
    assert (tmp_path / "out/latest").read_text() == "global_step4"


def test_deepspeed_loads_every_merge_trains_on_and_the_raw_run_is_untouched(
    runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs, cases = [], []
    for stage, dtype in CASES:
        run = runs / f"w2_s{stage}_{dtype}"
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for policy in ("carry", "drop"):
            out = merge_three(run, tmp_path / f"{stage}{dtype}{policy}", optimizer_states=policy)
            jobs.append({"do": "load", "stage": stage, "dtype": dtype, "root": str(out), "dump": str(out / "dump")})
            cases.append((stage, dtype, run))
        raw = {"root": str(run), "tag": "global_step4", "steps": 2, "dump": str(tmp_path / "raw")}
        jobs.append({"do": "load", "stage": stage, "dtype": dtype} | raw)
        cases.append((stage, dtype, run))
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("load"))
    for number, (job, (stage, dtype, run)) in enumerate(zip(jobs, cases, strict=True)):
        for rank in (0, 1):
            report = reports[rank][number]
            assert report["lr"] == [0.01, 0.01]
            if "tag" in job:  # the raw run goes on exactly as it did
                assert report["global_steps"] == 4
                assert report["losses"] == json.loads((run / f"losses.rank{rank}.json").read_text())[4:]
                continue
            assert report["global_steps"] == 6
            assert all(math.isfinite(loss) for loss in report["losses"])
            check_loaded(Path(f"{job['dump']}.rank{rank}"), run, stage, dtype, rank)


def check_loaded(dump: Path, run: Path, stage: int, dtype: str, rank: int) -> None:
    """The engine's partition of this rank, and its module, are the merged ones."""
    held = torch.load(dump)
    models, _ = load_all(run / "global_step6")
    wanted = unpadded(models, merged_masters(checkpoints(run), list(COEFFICIENTS))[rank], rank, stage)
    for got, partition in zip(unpadded(models, held["masters"], rank, stage), wanted, strict=True):
        assert same_bits(got[: partition.numel()], partition)
    for name, parameter in merged_parameters(checkpoints(run), list(COEFFICIENTS), stage).items():
        assert torch.equal(held["module"][name].float(), parameter.to(TORCH[dtype]).float()), name


def test_verify_proves_every_output_from_its_sources(runs: Path, tmp_path: Path) -> None:
    for number, values in enumerate(({}, {"optimizer_states": "drop"}, {"format": "safetensors", "dtype": "bf16"})):
        out = merge_three(runs / "w2_s2_bf16", tmp_path / str(number), **values)
        proof = verify(out, full=True)
        assert proof.recomputed_bytes > 0
        assert proof.note == ""
