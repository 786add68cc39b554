"""Accelerate and Lightning for real: runs that they write, and merges that they themselves resume from."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import launch
from reference import load_all, merged_masters, merged_parameters, same_bits, unpadded

from wsm_ds.inspection import inspect_run
from wsm_ds.merging import merge
from wsm_ds.verification import verify

STAGES = (2, 3)
COEFFICIENTS = [0.25, 0.75]
RATE = 1e-2
"""Accelerate's, in `frameworks_worker.py`; its schedule halves it for the sixth update alone."""
NAMES = {
    "accelerate": [f"checkpoints/checkpoint_{number}/pytorch_model" for number in range(3)],
    "lightning": [f"epoch=0-step={step}.ckpt/checkpoint" for step in (2, 4, 6)],
}
OWN_FILES = {
    "accelerate": {"custom_checkpoint_0.pkl", "random_states_0.pkl", "random_states_1.pkl", "scheduler.bin"},
    "lightning": set[str](),
}
FIRST_BATCH = {"accelerate": 4, "lightning": 0}
"""Of a training that resumes after four updates. The script skips Accelerate's batches by its own counter. Lightning
begins those of the epoch anew, and does so from its own saves, too."""
Written = dict[str, tuple[Path, list[list[dict[str, Any]]]]]


def ranks(jobs: list[dict[str, Any]], folder: Path, world_size: int = 2) -> list[list[dict[str, Any]]]:
    return launch(jobs, world_size=world_size, folder=folder, worker="frameworks_worker.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """By framework, RUNS/s{stage} with a checkpoint at steps 2, 4 and 6, and each rank's reports."""
    found = {}
    for name in NAMES:
        root = tmp_path_factory.mktemp(name)
        jobs = [{"do": name, "stage": stage, "steps": 6, "run": str(root / f"s{stage}")} for stage in STAGES]
        found[name] = (root, ranks(jobs, tmp_path_factory.mktemp("train")))
    return found


def merge_two(run: Path, out: Path, name: str, **values: Any) -> Path:
    """The checkpoints of steps 2 and 4."""
    merge(run=run, tags=NAMES[name][:2], coefficients=COEFFICIENTS, out=out, **values)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_found_and_merged_as_a_window(written: Written, tmp_path: Path, name: str) -> None:
    run = written[name][0] / "s2"
    found = inspect_run(run)
    assert [item.checkpoint.tag for item in found] == NAMES[name]
    assert {item.checkpoint.saved_by for item in found} == {name.capitalize()}
    manifest = merge(run=run, last=2, out=tmp_path / "out").manifest
    assert [source["step"] for source in manifest["sources"]] == [4, 6]
    assert verify(tmp_path / "out", full=True).note == ""
    (item,) = inspect_run(tmp_path / "out")
    assert (item.checkpoint.saved_by, item.problem) == (name.capitalize(), None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [{}, {"optimizer_states": "drop"}, {"format": "universal"}], ids=str)
def test_the_framework_resumes_from_a_merge_where_the_run_stood(
    written: Written, tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    root, before = written[name]
    jobs: list[dict[str, Any]] = []
    for stage in STAGES:
        out = merge_two(root / f"s{stage}", tmp_path / f"out{stage}", name, **values)
        resumed: dict[str, Any] = {"resume": str(out), "dump": f"{out}.dump", "run": f"{out}.run"}
        resumed["universal"] = "format" in values
        jobs.append({"do": name, "stage": stage, "steps": 2 if name == "accelerate" else 6} | resumed)
    (tmp_path / "ranks").mkdir()
    for rank, reported in enumerate(ranks(jobs, tmp_path / "ranks")):
        for number, (stage, report) in enumerate(zip(STAGES, reported, strict=True)):
            run, earlier = root / f"s{stage}", before[rank][number]
            check_loaded(Path(f"{jobs[number]['dump']}.rank{rank}"), run, name, stage, rank)
            check_first_loss(report, run, name, stage)
            assert report["batches"] == earlier["batches"][FIRST_BATCH[name] :][:2]
            assert len(report["losses"]) == 2
            assert all(math.isfinite(loss) for loss in report["losses"])
            if name == "lightning":
                assert report["first_step"] == [4, 4]
                assert report["global_step"] == 6
            else:
                assert (report["first_count"], report["global_steps"]) == (4, 6)
                assert report["generators"] == earlier["generators"][4:]
                assert report["rates"] == earlier["rates"][4:] == [RATE, RATE / 2]


@pytest.mark.parametrize("name", NAMES)
def test_the_framework_resumes_on_three_ranks_from_a_merge_of_two_ranks_saves(
    written: Written, tmp_path: Path, name: str
) -> None:
    jobs: list[dict[str, Any]] = []
    for stage in STAGES:
        out = merge_two(written[name][0] / f"s{stage}", tmp_path / f"out{stage}", name, world_size=3)
        resumed = {"resume": str(out), "dump": f"{out}.dump", "run": f"{out}.run"}
        jobs.append({"do": name, "stage": stage, "steps": 2 if name == "accelerate" else 6} | resumed)
    (tmp_path / "ranks").mkdir()
    reports = ranks(jobs, tmp_path / "ranks", world_size=3)
    for reported in reports:  # the third rank has no random states in the sources
        for stage, report in zip(STAGES, reported, strict=True):
            check_first_loss(report, written[name][0] / f"s{stage}", name, stage)
            assert len(report["losses"]) == 2
            if name == "lightning":
                assert (report["first_step"], report["global_step"]) == ([4, 4], 6)
            else:
                assert (report["first_count"], report["global_steps"]) == (4, 6)
                assert report["rates"] == [RATE, RATE / 2]


def check_loaded(dump: Path, run: Path, name: str, stage: int, rank: int) -> None:
    """The engine holds the merged masters, and the module cast from them."""
    sources = [run / tag for tag in NAMES[name][:2]]
    held, (models, _) = torch.load(dump), load_all(sources[-1])
    wanted = unpadded(models, merged_masters(sources, COEFFICIENTS)[rank], rank, stage)
    for got, partition in zip(unpadded(models, held["masters"], rank, stage), wanted, strict=True):
        assert same_bits(got[: partition.numel()], partition)
    merged = merged_parameters(sources, COEFFICIENTS, stage)
    assert merged
    for full_name, parameter in merged.items():
        (weight,) = (held["module"][key] for key in held["module"] if key.endswith(full_name))
        assert torch.equal(weight, parameter.bfloat16()), full_name


def check_first_loss(report: dict[str, Any], run: Path, name: str, stage: int) -> None:
    """The first loss is that of the merged weights, and not that of the newest checkpoint's."""
    sources = [run / tag for tag in NAMES[name][:2]]
    inputs, targets = map(torch.tensor, report["batches"][0])

    def loss(checkpoints: list[Path], coefficients: list[float]) -> float:
        merged = merged_parameters(checkpoints, coefficients, stage)
        first, second = ([merged[f"{prefix}{n}.{w}"].bfloat16() for w in ("weight", "bias")] for n in (0, 2))
        hidden = torch.relu(torch.nn.functional.linear(inputs.bfloat16(), *first))
        return (torch.nn.functional.linear(hidden, *second).float() - targets).pow(2).mean().item()

    prefix = "network." if name == "lightning" else ""
    assert report["losses"][0] == pytest.approx(loss(sources, COEFFICIENTS), rel=1e-5)
    assert report["losses"][0] != pytest.approx(loss(sources[-1:], [1.0]), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["zero", "universal"])
def test_the_frameworks_own_files_come_along_byte_for_byte(
    written: Written, tmp_path: Path, name: str, form: str
) -> None:
    run = written[name][0] / "s2"
    out = merge_two(run, tmp_path / "out", name, format=form)
    pointer = "latest_universal" if form == "universal" else "latest"
    newest = (run / NAMES[name][1]).parent
    files = {path.name for path in out.iterdir() if path.is_file()} - {pointer, "wsm_merge.json"}
    assert files == OWN_FILES[name] | {"zero_to_fp32.py", "zero_to_torch.py"}
    for file in files:
        assert (out / file).read_bytes() == (newest / file).read_bytes(), file
    tag = NAMES[name][1].split("/")[-1]  # in both formats, because the framework loads no other name
    assert (out / pointer).read_text() == tag
    assert [path.name for path in out.iterdir() if path.is_dir()] == [tag]
    (item,) = inspect_run(out)
    assert (item.checkpoint.saved_by, item.problem) == (name.capitalize(), None)


@pytest.mark.parametrize("name", NAMES)
def test_an_export_holds_none_of_the_frameworks_states(written: Written, tmp_path: Path, name: str) -> None:
    exported = merge_two(written[name][0] / "s2", tmp_path / "weights", name, format="safetensors")
    assert {path.name for path in exported.iterdir()} == {"model.safetensors", "wsm_merge.json"}
