"""Who is blamed, and when: real heartbeat files, time told by the test."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.errors import RanksSilent, Superseded
from wsm_ds.filesystem.durable import replace_shared_text
from wsm_ds.training.job import JobFolder, begin_attempt, mark_done
from wsm_ds.training.watchdog import Watch, main


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    begin_attempt(JobFolder(tmp_path))
    return JobFolder(tmp_path)


def beat(job: JobFolder, rank: int, **values: Any) -> None:
    """Replaces a rank's heartbeat."""
    common = {"attempt": 1, "step": 7, "time": 0.0, "alive": 0.0, "host": f"node{rank // 2}", "rank": rank}
    common |= {"world_size": 4, "pid": 100 + rank, "where": "comm.py:1 all_reduce"}
    replace_shared_text(job.heartbeats / f"rank_{rank:05d}.json", json.dumps(common | values))


def watch(job: JobFolder) -> Watch:
    """Seconds are counted from its beginning."""
    watching = Watch(job, 1, timeout_s=60, start_timeout_s=300)
    watching.began_s = 0.0
    return watching


def test_nobody_is_blamed_while_steps_are_made(job: JobFolder) -> None:
    watching = watch(job)
    for step in range(20):
        for rank in range(4):
            beat(job, rank, step=step, alive=float(step))
        watching.look(50.0 * step)


def test_a_dead_rank_is_blamed_whatever_the_hosts_clocks_say(job: JobFolder) -> None:
    watching = watch(job)
    for now_s in range(0, 61, 10):
        for rank in range(4):
            beat(job, rank, alive=0.0 if rank == 3 else 1e6 - now_s)
        watching.look(now_s)
    with pytest.raises(RanksSilent, match=r"slowest is rank 3 on node1 \(process 103\), at step 7 for 61 s.*stopped"):
        watching.look(61.0)


@pytest.mark.parametrize(
    ("rank", "unlike", "blame"),
    [
        (1, {"step": 6}, r"rank 1 on node0 .* at step 6.*The others are at step 7"),
        (2, {"where": "data.py:9 read"}, r"rank 2 on node1 .* in data.py:9 read;.*: 3 in comm.py:1 all_reduce"),
    ],
    ids=["lowest step", "elsewhere"],
)
def test_the_rank_that_the_others_wait_for_is_blamed_while_all_live(
    rank: int, unlike: dict[str, Any], blame: str, job: JobFolder
) -> None:
    watching = watch(job)
    for now_s in (0.0, 30.0, 60.0):
        for other in range(4):
            beat(job, other, **{"alive": now_s} | (unlike if other == rank else {}))
        watching.look(now_s)
    with pytest.raises(RanksSilent, match=blame):
        watching.look(61.0)


def test_ranks_that_never_began_are_named(job: JobFolder) -> None:
    watching = watch(job)
    watching.look(299.0)
    with pytest.raises(RanksSilent, match="after 300 s no rank has sent a heartbeat"):
        watching.look(301.0)
    beat(job, 0)
    beat(job, 2)
    with pytest.raises(RanksSilent, match="ranks 1, 3 of 4 have sent no heartbeat"):
        watching.look(302.0)


@pytest.mark.parametrize("flag", ["--timeout-s", "--start-timeout-s"])
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_a_limit_that_is_never_or_always_exceeded_is_a_wrong_request(
    flag: str, value: str, job: JobFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    mark_done(job, 7, attempt=1)
    assert main([str(job.run), "--timeout-s", "60", f"{flag}={value}"]) == 2
    assert f"{flag} must be at least 0, not {value}" in capsys.readouterr().err


def test_heartbeats_of_older_attempts_do_not_count(job: JobFolder) -> None:
    begin_attempt(job)
    beat(job, 0)
    watching = Watch(job, 2, timeout_s=60, start_timeout_s=300)
    watching.look(0.0)
    assert not watching.last_beats
    begin_attempt(job)
    with pytest.raises(Superseded):
        watching.look(1.0)


def test_the_command_ends_when_it_is_told_to_and_when_the_attempt_is_done(job: JobFolder) -> None:
    command = [sys.executable, "-m", "wsm_ds.training.watchdog", str(job.run), "--timeout-s", "60"]
    for rank in range(4):
        beat(job, rank)
    with subprocess.Popen(command) as told:
        with pytest.raises(subprocess.TimeoutExpired):
            told.wait(4)
        told.send_signal(signal.SIGTERM)
        assert told.wait(10) == 0
    mark_done(job, 7, attempt=1)
    assert subprocess.run(command, timeout=30, check=False).returncode == 0
