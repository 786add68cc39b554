"""Files of another step, of another rank and of another run are noticed, in real checkpoints; and nothing else is."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from deepspeed_runs import DTYPES, STAGES, launch

from wsm_ds.cli import main
from wsm_ds.errors import ForeignFiles, VerificationFailed
from wsm_ds.inspection import inspect_run
from wsm_ds.layouts import Checkpoint, read_layout
from wsm_ds.merging import export, merge, reshard
from wsm_ds.planning.one_save import samples, signs_of_another_save
from wsm_ds.verification import verify

every_stage = pytest.mark.parametrize("stage", STAGES)
RANK_1 = "*zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUNS/s{stage}`: runs like those of the fixture `runs` in bf16, with another rate."""
    root = tmp_path_factory.mktemp("others")
    job = {"do": "train", "dtype": "bf16", "steps": 4, "every": 2, "lr": 2e-3}
    jobs = [job | {"stage": stage, "run": str(root / f"s{stage}")} for stage in STAGES]
    launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"))
    return root


@pytest.fixture
def run(runs: Path, tmp_path: Path, stage: int) -> Path:
    return Path(shutil.copytree(runs / f"w2_s{stage}_bf16", tmp_path / "run"))


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def replace(run: Path, pattern: str, *, by: Path) -> None:
    """Puts files over those of global_step4."""
    for path in (run / "global_step4").glob(pattern):
        shutil.copyfile(one(by, path.name), path)


def signs(run: Path) -> str:
    return "; ".join(signs_of_another_save(read_layout(Checkpoint("global_step4", run / "global_step4"))))


def require_refused_everywhere(run: Path, words: str) -> None:
    """merge, export, reshard, inspect and verify say so; nothing is written; by hand it goes."""
    out = run.parent / "out"
    for call in (
        partial(merge, run=run, last=2, out=out),
        partial(export, run, tag="global_step4", out=out),
        partial(reshard, run, tag="global_step4", world_size=1, out=out),
    ):
        with pytest.raises(ForeignFiles, match=words):
            call()
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    inspected = {item.checkpoint.tag: item for item in inspect_run(run)}
    assert [tag for tag, item in inspected.items() if not item.is_complete] == ["global_step4"]
    assert main(["inspect", str(run)]) == 3
    assert main(["merge", str(run), "--last", "2", "--out", str(out), "--allow", "foreign-files"]) == 0
    assert verify(out, full=True).recomputed_bytes > 0


@every_stage
def test_a_rank_file_of_another_step_is_noticed(run: Path, stage: int) -> None:
    replace(run, RANK_1, by=run / "global_step2")
    said = signs(run)
    assert "the optimizer's step: ((0, 4.0), (1, 4.0)) in " in said
    assert ("compared elements differ" in said) is (stage < 3)
    require_refused_everywhere(run, "the optimizer's step")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_file_of_another_step_is_noticed_by_its_values_alone(run: Path, stage: int) -> None:
    out = run.parent / "bare"
    merge(run=run, tags=["global_step2", "global_step4"], coefficients=[1.0, 0.0], optimizer_states="drop", out=out)
    replace(run, RANK_1, by=out / "global_step4")  # no states, no step: only the masters tell
    assert "zero_pp_rank_1" in signs(run)
    assert "hold" in signs(run)
    assert "compared elements differ" in signs(run)


def swapped(run: Path) -> Path:
    """A run whose ranks 0 and 1 have each other's files in global_step4."""
    first, second = (one(run / "global_step4", RANK_1.replace("rank_1", f"rank_{rank}", 1)) for rank in (0, 1))
    kept = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(kept)
    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_the_files_of_two_ranks_that_are_swapped_are_noticed(
    other_world_sizes: Path, tmp_path: Path, stage: int
) -> None:
    run = swapped(Path(shutil.copytree(other_world_sizes / f"w3_s{stage}", tmp_path / "run")))
    assert signs(run).count("compared elements differ") == 2
    require_refused_everywhere(run, "compared elements differ")


def test_in_stage_3_swapped_files_cannot_be_told(other_world_sizes: Path, tmp_path: Path) -> None:
    """docs/guarantees.md says so: neither values nor metadata of stage 3 name their rank."""
    assert signs(swapped(Path(shutil.copytree(other_world_sizes / "w3_s3", tmp_path / "run")))) == ""


@every_stage
def test_a_rank_file_of_another_run_is_noticed(run: Path, trained: Path, stage: int) -> None:
    replace(run, RANK_1, by=trained / f"s{stage}/global_step4")
    assert "lr of the parameter groups" in signs(run)
    assert "ds_config scheduler" in signs(run)
    assert ("compared elements differ" in signs(run)) is (stage < 3)
    require_refused_everywhere(run, "ds_config scheduler")


@every_stage
def test_model_files_of_another_step_are_noticed(run: Path, stage: int) -> None:
    replace(run, "*_model_states.pt", by=run / "global_step2")
    assert "the optimizer's step is 4 in " in signs(run)
    shutil.copyfile(
        one(run / "global_step6", "*rank_00_model_states.pt" if stage < 3 else "*rank_1_*model_states.pt"),
        one(run / "global_step4", "*rank_00_model_states.pt" if stage < 3 else "*rank_1_*model_states.pt"),
    )
    words = "compared elements differ" if stage < 3 else "global_steps: "
    assert words in signs(run)


@pytest.mark.parametrize("stage", [2])
def test_verify_says_that_a_source_is_in_doubt(run: Path, stage: int) -> None:
    out = run.parent / "out"
    merge(run=run, last=2, out=out)
    replace(run, "mp_rank_00_model_states.pt", by=run / "global_step2")
    with pytest.raises(VerificationFailed):
        verify(out)


def test_files_of_one_save_are_never_taken_for_others(runs: Path, other_world_sizes: Path, tmp_path: Path) -> None:
    folders = [runs / f"w2_s{stage}_{dtype}" for stage in STAGES for dtype in DTYPES]
    folders += [runs / "hf/checkpoint-4", runs / "wide_s2_bf16"]
    folders += [other_world_sizes / f"w{size}_s{stage}" for size in (1, 3, 4) for stage in STAGES]
    merge(run=runs / "w2_s2_bf16", last=3, out=tmp_path / "carried")
    merge(run=runs / "w2_s2_bf16", last=3, optimizer_states="drop", out=tmp_path / "dropped")
    merge(run=runs / "w2_s2_fp16", last=3, world_size=3, out=tmp_path / "reshaped")
    for folder in [*folders, *tmp_path.iterdir()]:
        for item in inspect_run(folder):
            assert item.problem is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_masters_of_every_file_are_sampled(runs: Path, dtype: str) -> None:
    layout = read_layout(Checkpoint("global_step4", runs / f"w2_s1_{dtype}" / "global_step4"))
    found = list(samples(layout))
    assert sorted(sample.holds for sample in found) == ["masters", "masters", "weights"]
    assert len({sample.file for sample in found}) == 3
    assert all(sample.equal == sample.numel > 20 for sample in found)
