"""Attempts, the fence, and the marker of success."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wsm_ds.errors import CheckpointNotFound, RecipeError, Superseded
from wsm_ds.layouts import find_checkpoints
from wsm_ds.training.job import (
    JobFolder,
    begin_attempt,
    exported_attempt,
    is_done,
    mark_done,
    read_attempt,
    require_current,
)


def test_attempts_are_counted_from_one(tmp_path: Path) -> None:
    job = JobFolder(tmp_path / "run")
    assert read_attempt(job) == 0
    assert [begin_attempt(job), begin_attempt(job)] == [1, 2]
    assert job.attempt.read_text() == "2\n"


def test_attempts_that_begin_at_once_get_different_numbers(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: begin_attempt(job), range(24)))
    assert len(set(numbers)) == 24


@pytest.mark.parametrize("content", [b"", b"\0\0", b"7a\n", b"\xff", b"1\n", None])
@pytest.mark.parametrize("place", ["attempt-4", "logs/attempt-4"])
def test_after_a_crash_of_the_storage_the_folders_of_attempts_give_the_number(
    tmp_path: Path, content: bytes | None, place: str
) -> None:
    job = JobFolder(tmp_path)
    for folder in (place, "attempt-x", "logs/attempt-3"):
        (job.folder / folder).mkdir(parents=True)
    if content is not None:
        job.attempt.write_bytes(content)
    assert read_attempt(job) == (1 if content == b"1\n" else 4)
    assert begin_attempt(job) == 5
    assert job.attempt.read_text() == "5\n"
    require_current(job, 5)


def test_only_the_newest_attempt_is_current(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    old, new = begin_attempt(job), begin_attempt(job)
    require_current(job, new)
    with pytest.raises(Superseded, match=r"attempt 1 of .* was superseded by attempt 2"):
        require_current(job, old)


def test_a_run_is_done_up_to_the_step_that_it_has_reached(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    assert not is_done(job, 10)
    mark_done(job, 10, attempt=3)
    assert json.loads(job.done.read_text()) == {"step": 10, "attempt": 3}
    assert [is_done(job, 9), is_done(job, 10), is_done(job, 11)] == [True, True, False]
    assert is_done(job, 10, attempt=3)
    assert not is_done(job, 10, attempt=4)
    job.done.write_text("{")
    assert not is_done(job, 10)


def test_the_job_folder_is_no_checkpoint(tmp_path: Path) -> None:
    staged = JobFolder(tmp_path).attempt_folder(1) / "global_step4"
    staged.mkdir(parents=True)
    (staged / "mp_rank_00_model_states.pt").write_bytes(b"half")
    with pytest.raises(CheckpointNotFound):
        find_checkpoints(tmp_path)


def test_an_attempt_that_is_given_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSM_ATTEMPT", raising=False)
    assert exported_attempt() is None
    monkeypatch.setenv("WSM_ATTEMPT", "7")
    assert exported_attempt() == 7
    monkeypatch.setenv("WSM_ATTEMPT", "7a")
    with pytest.raises(RecipeError, match="WSM_ATTEMPT is '7a'"):
        exported_attempt()
