"""The command that the job scripts call: the facts that it reads, what it prints, and what it leaves in RUN/job."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from wsm_ds.training.decide import main
from wsm_ds.training.job import JobFolder, begin_attempt, is_done, mark_done

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    """Of a run in its third attempt, which began at step 50."""
    job = JobFolder(tmp_path / "it's a run")
    for _ in range(3):
        begin_attempt(job)
    (job.run / "latest").write_text("global_step50")
    job.logs(3).mkdir(parents=True)
    return job


@pytest.fixture
def decide(capsys: pytest.CaptureFixture[str]) -> "Decide":
    return Decide(capsys)


class Decide:
    """Calls the command and returns its lines."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> list[str]:
        assert main([str(argument) for argument in arguments]) == 0
        return self.capsys.readouterr().out.splitlines()

    def of_attempt(self, command: str, job: JobFolder, *arguments: str) -> list[str]:
        options = ("--until-step=100", "--attempt=3", "--latest-before=global_step50", "--max-crashes=2")
        return self(command, job.run, *options, *arguments)


def test_start(decide: Decide, job: JobFolder) -> None:
    start = ("start", job.run, "--until-step=100")
    assert decide(*start) == ["start"]
    job.stop.touch()
    assert decide(*start) == [f"fail stopped by {job.stop}; remove it to continue"]
    job.failed.write_text("3 attempts in a row …\nand more\n")
    assert decide(*start)[0].startswith("fail gave up before: 3 attempts in a row …. ")
    mark_done(job, 100, attempt=3)
    assert decide(*start) == ["log done: step 100 was reached", "done"]


def test_begin_prints_the_number_and_the_checkpoint_and_makes_the_folder_of_logs(
    decide: Decide, job: JobFolder
) -> None:
    assert decide("begin", job.run) == ["start 4 global_step50"]
    assert job.logs(4).is_dir()
    assert decide("begin", job.run.parent / "a new run") == ["start 1"]


def test_a_folder_that_cannot_be_written_fails_with_its_name(decide: Decide, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = decide("begin", tmp_path / "file/run")
    assert line.startswith("fail ")
    assert str(tmp_path / "file/run") in line


def test_crashes_are_counted_over_attempts_until_the_script_gives_up(decide: Decide, job: JobFolder) -> None:
    assert decide.of_attempt("end", job, "--exit-code=1") == [
        "log no new checkpoint since global_step50 (1 of 2 attempts)",
        "again",
    ]
    assert not job.failed.exists()
    (line,) = decide.of_attempt("end", job, "--hang=the slowest is rank 1", "--exit-code=143")
    why = "2 attempts in a row ended without a new checkpoint, the last: the slowest is rank 1"
    assert line == f"fail GIVING UP: {why}. See {job.logs(3)}; remove {job.failed} to try again"
    assert job.failed.read_text() == f"{why} (logs: {job.logs(3)})\n"
    assert job.crashes.read_text().splitlines() == [
        "global_step50 attempt 3: the ranks ended with code 1",
        "global_step50 attempt 3: the slowest is rank 1",
        "- gave up",
    ]


def test_end_after_a_signal_and_of_a_superseded_attempt(decide: Decide, job: JobFolder) -> None:
    assert decide.of_attempt("end", job, "--signal=USR1", "--hang=", "--exit-code=75") == ["saved"]
    begin_attempt(job)
    assert decide.of_attempt("end", job, "--signal=", "--exit-code=1") == ["fail superseded by attempt 4"]
    assert not job.crashes.exists()


def test_unfit_nodes_of_a_slurm_job_are_recorded(decide: Decide, job: JobFolder) -> None:
    nodes = ("--launcher=srun", "--hosts=n1 n2", "--timeout-s=60", "--job-id=7")
    check = job.logs(3) / "check"
    check.write_text("0: n1: fit: folder writable\n1: n2: fit: folder writable\n")
    assert decide.of_attempt("nodes", job, *nodes) == ["start"]
    assert not job.bad_nodes.exists()
    check.write_bytes(b"0: n1: fit: folder writable\n1: broken \xff text\n1: n2: unfit: scratch\n")
    assert decide.of_attempt("nodes", job, *nodes) == [
        "log n2 is left out: broken \ufffd text",
        "log n2: unfit: scratch",
        "requeue n2",
    ]
    (line,) = job.bad_nodes.read_text().splitlines()
    assert line.endswith(" job 7, n2: n2: unfit: scratch")


def test_a_check_without_output_is_a_crash(decide: Decide, job: JobFolder) -> None:
    lines = decide.of_attempt("nodes", job, "--launcher=srun", "--hosts=n1", "--timeout-s=60")
    assert lines == ["log no new checkpoint since global_step50 (1 of 2 attempts)", "requeue"]


def test_fit_hosts_of_a_host_file(decide: Decide, job: JobFolder) -> None:
    (job.logs(3) / "check").write_text("n2: n2: fit: folder writable\n")
    lines = decide.of_attempt("nodes", job, "--launcher=pdsh", "--hosts=n1 n2", "--timeout-s=60")
    assert lines == ["log n1 is left out: no answer within 60 s", "start n2 n1"]


def test_requeue_reads_what_slurm_says(decide: Decide, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, line in (
        (b"JobId=7 JobName=\xff JobState=RUNNING Reason=None ExcNodeList=n9\n", "requeue n1,n9"),
        (b"", "fail Slurm is ending this job; not requeued by this script"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        assert decide("requeue", "--unfit-nodes=n1") == [line]


def test_processes_are_those_of_the_attempt(decide: Decide, job: JobFolder) -> None:
    job.heartbeats.mkdir()
    for rank, attempt in enumerate((3, 3, 3, 2)):
        beat = {"attempt": attempt, "host": f"n{rank // 2}", "pid": 10 + rank}
        (job.heartbeats / f"rank_{rank:05d}.json").write_text(json.dumps(beat))
    (job.heartbeats / "rank_00004.json").write_text("{")
    assert decide("processes", job.run, "--attempt=3") == ["n0 10 11", "n1 12"]


def test_the_command_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, wsm_ds.training.decide; sys.exit(bool({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("text", ['{"step": 100, "attempt": 3}', '{"step": 99, "attempt": 3}', "{}", "", None])
def test_the_scripts_and_python_agree_on_what_is_done(text: str | None, job: JobFolder) -> None:
    if text is not None:
        job.done.write_text(text)
    script = f'source launch/attempt.sh; JOB="{job.folder}" UNTIL_STEP=100; is_done'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, check=False)
    assert (done.returncode == 0) == is_done(job, 100)
