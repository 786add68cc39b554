"""Ranks that do not belong together do not take part together: at a store, and after a launcher was killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from forked import free_port
from lazy import torch

from wsm_ds.distributed import meeting
from wsm_ds.distributed.launcher import Launch, launched_ranks, read_launch
from wsm_ds.distributed.meeting import CONNECT_S, NOTICE_S, SKEW_S, Patience, roll_call
from wsm_ds.distributed.ranks import StoreRanks
from wsm_ds.errors import PeerFailed, RecipeError
from wsm_ds.publishing.staging_folder import Staging
from wsm_ds.verification import verify

RUN = Path(__file__).parents[1] / "golden" / "zero2_bf16"
SLOW = """\
import os, sys, time
from wsm_ds import cli
from wsm_ds.engine import seals, tasks, worker
from wsm_ds.publishing import manifest
for module in (seals, tasks, manifest): module.BLOCK_BYTES = 1024
run = worker.Worker.run
def slow(*a): time.sleep(0.1 if os.environ["RANK"] == "0" else 0.02); run(*a)
worker.Worker.run = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def patience(who: str = "a rank") -> Patience:
    return Patience(who, "It is a test.", None)


def together(works: list[Callable[[Any], Any]], port: int) -> list[Any]:
    """What each work returns or raises. Each has a thread, and a connection of its own to the store."""

    def one(work: Callable[[Any], Any]) -> Any:
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
        try:
            return work(store)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, works))


@pytest.fixture
def port() -> Any:
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield server.port
    del server


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_barrier_waits_for_every_rank_and_not_for_as_many_arrivals(port: int, world_size: int) -> None:
    open_barriers: list[int] = []
    late = threading.Event()

    def arrive(rank: int) -> Callable[[Any], None]:
        def work(store: Any) -> None:
            if rank == 0:
                late.wait(30)
            StoreRanks(store, rank, world_size).barrier("written")
            open_barriers.append(rank)

        return work

    def release(_: Any) -> None:
        time.sleep(1)
        assert open_barriers == []
        late.set()

    twice = [arrive(rank) for rank in range(world_size)] + [arrive(world_size - 1)]
    assert together([*twice, release], port) == [None] * (world_size + 2)
    assert sorted(open_barriers) == [*range(world_size), world_size - 1]


def test_several_operations_at_one_store_see_nothing_of_each_other(port: int) -> None:
    def work(rank: int) -> Callable[[Any], list[str]]:
        def run(store: Any) -> list[str]:
            prefixes = []
            for _ in range(3):
                part = roll_call(store, rank, 2, patience())
                member = StoreRanks(part, rank, 2)
                with member.together():
                    member.barrier("the same name")
                    prefixes.append(member.decide(lambda: os.urandom(8).hex()))
            return prefixes

        return run

    first, second = together([work(0), work(1)], port)
    assert first == second
    assert len(set(first)) == 3


def test_a_process_of_an_earlier_start_is_refused_when_a_later_one_takes_its_rank(port: int) -> None:
    earlier, later = threading.Event(), threading.Event()

    class Said(Patience):
        def wait(self, lacking: str) -> None:
            said.append(lacking)
            earlier.set()
            super().wait(lacking)

    said: list[str] = []

    def orphan(store: Any) -> Any:
        return roll_call(store, 1, 3, Said("rank 1 of 3", "", None))

    def rank_1(store: Any) -> Any:
        earlier.wait(30)
        while not any("has called" in lacking for lacking in said):
            time.sleep(0.02)
        threading.Timer(0.5, later.set).start()
        return roll_call(store, 1, 3, patience())

    def rank_2(store: Any) -> Any:
        later.wait(30)
        return roll_call(store, 2, 3, patience())

    refused, *members = together([orphan, lambda store: roll_call(store, 0, 3, patience()), rank_1, rank_2], port)
    assert type(refused) is PeerFailed
    assert f"process {os.getpid()} on {os.uname().nodename}" in str(refused)
    assert "both take part as rank 1" in str(refused)
    assert not any(isinstance(member, Exception) for member in members)


def test_of_two_processes_that_are_both_rank_0_one_at_most_goes_on(port: int) -> None:
    def rank_0(store: Any) -> Any:
        return roll_call(store, 0, 2, patience())

    def rank_1(store: Any) -> Any:
        time.sleep(1)
        return roll_call(store, 1, 2, patience())

    *firsts, second = together([rank_0, rank_0, rank_1], port)
    refused = [error for error in firsts if isinstance(error, PeerFailed)]
    assert len(refused) == 1
    assert "both take part as rank 0" in str(refused[0])
    assert not isinstance(second, Exception)


def test_a_rank_that_never_comes_is_named_and_so_is_a_start_for_another_number(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "JOIN_S", 1.0)

    def rank(number: int, world_size: int) -> Callable[[Any], Any]:
        return lambda store: roll_call(store, number, world_size, patience(f"rank {number} of {world_size}"))

    first, second, other = together([rank(0, 4), rank(1, 4), rank(1, 2)], port)
    assert str(first) == "rank 0 of 4 has waited 1 s for ranks 2, 3. It is a test."
    assert str(second).startswith("rank 1 of 4 has waited 1 s for the other ranks that rank 0 (process ")
    assert "was started for 4 ranks" in str(other)


def test_a_process_that_comes_after_another_has_taken_its_rank_is_refused(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "TAKEN_S", 0.3)
    begun = threading.Event()

    def member(rank: int) -> Callable[[Any], None]:
        def work(store: Any) -> None:
            roll_call(store, rank, 2, patience())
            begun.set()

        return work

    def late(store: Any) -> Any:
        begun.wait(30)
        return roll_call(store, 1, 2, patience())

    _, _, refused = together([member(0), member(1), late], port)
    assert type(refused) is PeerFailed
    assert "has begun with another process in place of" in str(refused)


def torchrun(world_size: int, port: str, arguments: list[str], folder: Path) -> "subprocess.Popen[str]":
    (folder / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-addr",
               "127.0.0.1", "--master-port", port, str(folder / "slow.py"), *arguments]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("world_size", "seconds"), [(2, 1.0), (3, 0.4)])
def test_ranks_whose_torchrun_is_killed_end_and_the_same_command_makes_the_right_output(
    tmp_path: Path, world_size: int, seconds: float
) -> None:
    port, out = free_port(), tmp_path / "out"
    arguments = ["merge", str(RUN), "--last", "2", "--out", str(out), "--threads", "1"]
    agent = torchrun(world_size, port, arguments, tmp_path)
    while len(orphans := children(agent.pid)) < world_size:
        assert agent.poll() is None
        time.sleep(0.02)
    time.sleep(seconds)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    for attempt in range(3):  # a rank that had not yet begun does not know its launcher, and may be in the way once
        output, _ = (again := torchrun(world_size, port, arguments, tmp_path)).communicate(timeout=200)
        if again.returncode == 0:
            break
        assert attempt < 2, output
    assert verify(out, full=True).recomputed_bytes > 0
    assert not Staging(out).folder.exists()
    assert not any(map(is_alive, orphans))


def started(environment: dict[str, str]) -> "subprocess.Popen[str]":
    code = "from wsm_ds.distributed.launcher import launched_ranks; launched_ranks()"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("rank", ["0", "5"])
def test_a_process_in_the_environment_of_a_rank_says_for_whom_it_waits_and_how_to_run_alone(rank: str) -> None:
    port = free_port()
    process = started({"WORLD_SIZE": "8", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    assert process.stderr is not None
    began_s = time.monotonic()
    line = process.stderr.readline()
    seconds = time.monotonic() - began_s
    process.kill()
    process.communicate()
    assert max(NOTICE_S, SKEW_S) + CONNECT_S < 5
    if rank == "5":  # rank 0 must import torch first
        assert seconds < 15
    waits_for = "ranks 1, 2, 3, 4, 5, … (7 in all)" if rank == "0" else "rank 0, because nothing answers at 127.0.0.1"
    assert f"rank {rank} of 8 waits for {waits_for}" in line
    assert f"because of RANK={rank}, WORLD_SIZE=8, MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in line
    assert "To run this process alone, set WORLD_SIZE=1" in line


def test_a_port_that_a_training_run_uses_is_an_error_at_once(port: int) -> None:
    process = started({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "A training run, or an earlier start of this command, may use the port" in error
    assert "WORLD_SIZE=1" in error


def test_a_rank_ends_with_its_launcher() -> None:
    from torch.distributed import HashStore

    from wsm_ds.distributed.parent import Parent

    parent = Parent()
    member = StoreRanks(HashStore(), 0, 2, parent=parent)
    member.check()
    parent.pid += 1
    with pytest.raises(PeerFailed, match=r"the launcher of this rank \(process \d+ on .*\) has ended"):
        member.barrier("x")


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number, 1 or more, but it is 'abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number, 1 or more, but it is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number, 1 or more, but it is '0'"),
        ({"WORLD_SIZE": "-2"}, "but it is '-2'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a whole number"),
        ({"RANK": "2"}, "RANK must be a whole number, 0 to 1, but it is '2'"),
        ({"RANK": "-1"}, "RANK must be a whole number, 0 to 1, but it is '-1'"),
        ({"RANK": "1.0"}, "RANK must be a whole number, 0 to 1, but it is '1.0'"),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT are not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number, 1 to 65535, but it is 'abc'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be a whole number, 1 to 65535, but it is '65536'"),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS must be a whole number"),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID must be a whole number, 0 to 1, but it is "
         "not set"),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "2"}, "SLURM_PROCID must be a whole number"),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "MASTER_PORT": None,
          "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID must be a whole number, 0 or more, but it is 'x'"),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "MASTER_ADDR": None},
         "scontrol does not say which hosts"),
    ],
)  # fmt: skip
def test_a_wrong_variable_of_a_launcher_is_named_with_its_value(
    changes: dict[str, str | None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    variables = {name: value for name, value in (LAUNCHED | changes).items() if value is not None}
    with pytest.raises(RecipeError) as error:
        launched_ranks(variables)
    assert words in str(error.value)
    assert "WORLD_SIZE=1" in str(error.value)


def test_the_variables_of_launchers_are_understood() -> None:
    words = "RANK=1, WORLD_SIZE=2, MASTER_ADDR=host, MASTER_PORT=29500"
    name = "MASTER_PORT={} TORCHELASTIC_RUN_ID={} TORCHELASTIC_RESTART_COUNT="
    assert read_launch(LAUNCHED) == Launch(1, 2, "host", 29500, False, False, words, name.format(29500, ""))
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_launch(LAUNCHED | elastic) == Launch(1, 2, "host", 29500, True, True, words, name.format(29500, "none"))
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "MASTER_ADDR": "host", "SLURM_JOB_ID": "7"}
    shown = "SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=4, MASTER_ADDR=host, MASTER_PORT=20679"
    assert read_launch(step) == Launch(3, 4, "host", 20679, False, True, shown, name.format(20679, ""))
    assert read_launch(step | {"WORLD_SIZE": "1"}) is None
