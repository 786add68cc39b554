"""What is published, by whom, and which checkpoint a run goes on from."""

import logging
import shutil
from pathlib import Path

import pytest

from wsm_ds.errors import BrokenCheckpoint, Superseded
from wsm_ds.training.checkpoints import newest_complete, publish, remove_older_attempts
from wsm_ds.training.job import JobFolder, begin_attempt


def staged(job: JobFolder, attempt: int, checkpoint: Path) -> str:
    """A copy of a checkpoint, as DeepSpeed saves it for an attempt."""
    shutil.copytree(checkpoint, job.attempt_folder(attempt) / checkpoint.name)
    return checkpoint.name


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "run")


def test_a_checkpoint_appears_by_its_name_and_latest_follows(job: JobFolder, whole_runs: dict[int, Path]) -> None:
    attempt = begin_attempt(job)
    tag = staged(job, attempt, whole_runs[3] / "global_step12")
    (job.attempt_folder(attempt) / "zero_to_fp32.py").touch()
    publish(job, attempt, tag)
    assert (job.run / "latest").read_text() == "global_step12"
    assert {path.name for path in job.run.iterdir()} == {"global_step12", "job", "latest", "zero_to_fp32.py"}
    assert newest_complete(job.run).step == 12  # type: ignore[union-attr]
    assert not list(job.attempt_folder(attempt).iterdir())


def test_a_superseded_attempt_cannot_publish(job: JobFolder, whole_runs: dict[int, Path]) -> None:
    stale = begin_attempt(job)
    tag = staged(job, stale, whole_runs[2] / "global_step12")
    newer = begin_attempt(job)
    with pytest.raises(Superseded):
        publish(job, stale, tag)
    assert not (job.run / tag).exists()
    assert not (job.run / "latest").exists()
    remove_older_attempts(job, newer)
    assert [path.name for path in job.folder.glob("attempt-*")] == [f"attempt-{newer}"]


def test_a_complete_checkpoint_is_never_replaced_and_a_broken_one_is_kept_aside(
    job: JobFolder, whole_runs: dict[int, Path]
) -> None:
    attempt = begin_attempt(job)
    tag = staged(job, attempt, whole_runs[2] / "global_step12")
    publish(job, attempt, tag)
    before = (job.run / tag).stat().st_ino
    publish(job, attempt, staged(job, attempt, whole_runs[2] / tag))
    assert (job.run / tag).stat().st_ino == before
    next((job.run / tag).glob("*optim_states.pt")).unlink()
    publish(job, attempt, staged(job, attempt, whole_runs[2] / tag))
    assert newest_complete(job.run).step == 12  # type: ignore[union-attr]
    assert (job.unusable / f"{tag}-attempt-1").stat().st_ino == before


def test_latest_is_not_believed_and_broken_checkpoints_are_named(
    tmp_path: Path, whole_runs: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(whole_runs[3], tmp_path / "run")
    next((run / "global_step24").glob("*rank_1*model_states.pt")).unlink()
    (run / "latest").write_text("global_step6")
    with caplog.at_level(logging.WARNING):
        assert newest_complete(run).tag == "global_step18"  # type: ignore[union-attr]
    assert "global_step24 is not used" in caplog.text
    assert "rank_1" in caplog.text


def test_a_run_whose_every_checkpoint_is_broken_is_not_begun_anew(tmp_path: Path, whole_runs: dict[int, Path]) -> None:
    run = shutil.copytree(whole_runs[2], tmp_path / "run")
    for path in run.glob("*/*optim_states.pt"):
        path.write_bytes(b"")
    with pytest.raises(BrokenCheckpoint, match=r"none of the checkpoints of .* is complete: global_step6"):
        newest_complete(run)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "absent") is None
