"""A merge on several processes: the same bytes as one, all stop when one fails, and nothing is published then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import free_port

from wsm_ds.distributed.launcher import launched_ranks
from wsm_ds.distributed.ranks import Ranks, StoreRanks
from wsm_ds.engine.tasks import share, tasks_of
from wsm_ds.errors import PeerFailed, RecipeError
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.verification import verify

CLI = "import sys; from wsm_ds.cli import main; sys.exit(main(sys.argv[1:]))"
SLOW = (
    "import os, sys, time; from wsm_ds import cli; from wsm_ds.publishing import manifest\n"
    "from wsm_ds.engine import seals, tasks, worker\n"
    "for module in (seals, tasks, manifest): module.BLOCK_BYTES = 1024\n"
    "run = worker.Worker.run\n"
    "def slow(*a):\n    run(*a); print('did one', flush=True); {then}\n"
    "worker.Worker.run = slow\n"
    "sys.exit(cli.main(sys.argv[1:]))"
)


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def started(code: str, rank: int, world_size: int, port: str, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def merged(code: str, world_size: int, arguments: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank."""
    port = free_port()
    processes = [started(code, rank, world_size, port, arguments) for rank in range(world_size)]
    done = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        done.append((process.returncode, out, error))
    return done


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(runs: Path, tmp_path: Path, world_size: int) -> None:
    run = runs / "w2_s3_bf16"
    arguments = ["merge", str(run), "--last", "2,3", "--format", "zero,safetensors", "--out", str(tmp_path / "out")]
    code = SLOW.format(then="pass")
    done = merged(code, world_size, [*arguments, "--json"])
    assert [code for code, _, _ in done] == [0] * world_size, done
    for name in ("last2-zero", "last3-zero", "last2-safetensors", "last3-safetensors"):
        last, form = name.split("-")
        alone: dict[str, Any] = {"last": int(last.removeprefix("last")), "format": form}
        merge(run=run, curve="linear", out=tmp_path / name, **alone)
        assert contents(tmp_path / "out" / name) == contents(tmp_path / name)
        assert verify(tmp_path / "out" / name, full=True).recomputed_bytes > 0
    assert all("did one" in out for _, out, _ in done)
    assert not any("event" in out for _, out, _ in done[1:])
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_torchrun_and_the_deepspeed_launcher_start_it(runs: Path, tmp_path: Path) -> None:
    run, scripts = str(runs / "w2_s2_bf16"), Path(sys.executable).parent
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    torchrun = [str(scripts / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port(), "-m", "wsm_ds"]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port",
                 free_port(), "--module", "wsm_ds"]  # fmt: skip
    for name, launcher in (("torchrun", torchrun), ("deepspeed", deepspeed)):
        command = [*launcher, "merge", run, "--last", "3", "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done ") == 1
    merge(run=Path(run), last=3, curve="linear", out=tmp_path / "alone")
    assert contents(tmp_path / "torchrun") == contents(tmp_path / "deepspeed") == contents(tmp_path / "alone")


def test_one_rank_that_fails_stops_all_with_its_error(runs: Path, tmp_path: Path) -> None:
    code = SLOW.format(then="os.environ['RANK'] == '1' and worker._no_such_thing()")
    done = merged(code, 3, ["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--out", str(tmp_path / "out")])
    assert all(code != 0 for code, _, _ in done)
    for rank in (0, 2):
        assert "rank 1 (" in done[rank][2]
        assert "_no_such_thing" in done[rank][2]
    assert not (tmp_path / "out").exists()


def test_one_rank_that_is_killed_stops_the_others_and_the_same_command_goes_on(runs: Path, tmp_path: Path) -> None:
    arguments = ["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--out", str(tmp_path / "out"), "--threads", "1"]
    impatient = "from wsm_ds.distributed import ranks; ranks.BEAT_S, ranks.SILENT_S = 0.2, 3.0\n"
    code = impatient + SLOW.format(then="time.sleep(0.4)")
    port = free_port()
    processes = [started(code, rank, 2, port, arguments) for rank in range(2)]
    assert processes[1].stdout is not None
    assert processes[1].stdout.readline() == "did one\n"
    processes[1].send_signal(signal.SIGKILL)
    _, error = processes[0].communicate(timeout=120)
    processes[1].communicate(timeout=10)
    assert processes[0].returncode == 3
    assert "rank 1 (" in error
    assert "has not answered for 3 s" in error
    assert [path.name for path in tmp_path.iterdir()] == [".out.wsm-staging"]
    done = merged(SLOW.format(then="pass"), 2, arguments)
    assert [code for code, _, _ in done] == [0, 0], done
    merge(run=runs / "w2_s2_bf16", last=3, curve="linear", out=tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_two_processes_and_one_each_killed_once_end_in_identical_folders(runs: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return ["merge", str(runs / "w2_s3_bf16"), "--last", "3", "--curve", "1-sqrt", "--threads", "1",
                "--out", str(tmp_path / name / "out")]  # fmt: skip

    for name, world_size in (("one", 1), ("two", 2)):
        port = free_port()
        code = SLOW.format(then="time.sleep(0.3)")
        processes = [started(code, rank, world_size, port, arguments(name)) for rank in range(world_size)]
        for process in processes:
            assert process.stdout is not None
            while process.stdout.readline() != "did one\n":
                assert process.poll() is None
        time.sleep(0.5)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=10)
        assert [path.name for path in (tmp_path / name).iterdir()] == [".out.wsm-staging"]
        done = merged(SLOW.format(then="pass"), world_size, arguments(name))
        assert [code for code, _, _ in done] == [0] * world_size, done
        assert [path.name for path in (tmp_path / name).iterdir()] == ["out"]
    assert contents(tmp_path / "one/out") == contents(tmp_path / "two/out")
    manifests = [json.loads((tmp_path / name / "out" / MANIFEST).read_text()) for name in ("one", "two")]
    assert manifests[0]["files"] == manifests[1]["files"]


def test_shares_hold_every_task_once_and_about_as_many_bytes(runs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from wsm_ds.engine import tasks

    monkeypatch.setattr(tasks, "BLOCK_BYTES", 64)
    plan = plan_merge(make_recipe(run=runs / "w2_s3_bf16", last=3, curve="linear", out=tmp_path / "out"))
    everything = tasks_of(plan)
    for world_size in (1, 2, 5):
        shares = [share(everything, rank, world_size) for rank in range(world_size)]
        assert [task for own in shares for task in own] == everything
        sizes = [sum(task.nbytes for task in own) for own in shares]
        assert max(sizes) - min(sizes) <= 2 * max(task.nbytes for task in everything)


def test_what_a_launcher_has_not_set_is_named() -> None:
    assert type(launched_ranks({})) is Ranks
    assert type(launched_ranks({"WORLD_SIZE": "1"})) is Ranks
    assert type(launched_ranks({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})) is Ranks  # a batch script, not a step
    with pytest.raises(RecipeError, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT are not set"):
        launched_ranks({"WORLD_SIZE": "2", "RANK": "0"})


def test_rank_0_alone_plans_and_no_rank_imports_torch(runs: Path, tmp_path: Path) -> None:
    code = "from wsm_ds import merge_planning; import atexit, os, sys, time; plan_merge = merge_planning.plan_merge\n"
    code += "def late(recipes, **options):\n    assert os.environ['RANK'] == '0'\n    time.sleep(3)\n"
    code += "    return plan_merge(recipes, **options)\nmerge_planning.plan_merge = late\n"
    code += "atexit.register(lambda: print('torch' if 'torch' in sys.modules else 'no torch'))\n" + CLI
    (tmp_path / "link").symlink_to(runs / "w2_s2_bf16")
    arguments = ["merge", str(tmp_path / "link"), "--last", "2,3", "--out", str(tmp_path / "out")]
    done = merged(code, 2, arguments)
    assert [code for code, _, _ in done] == [0, 0], done
    assert [output.splitlines()[-1] for _, output, _ in done] == ["no torch", "no torch"]


def test_ranks_that_were_asked_for_different_merges_stop(runs: Path, tmp_path: Path) -> None:
    port, out = free_port(), str(tmp_path / "out")
    processes = [
        started(CLI, rank, 2, port, ["merge", str(runs / "w2_s2_bf16"), "--last", str(2 + rank), "--out", out])
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("the ranks were asked for different merges" in error for error in errors)
    assert not (tmp_path / "out").exists()


def test_what_keeps_rank_0_from_planning_reaches_the_others_at_once(runs: Path, tmp_path: Path) -> None:
    port, out = free_port(), str(tmp_path / "out")
    arguments = ["merge", str(runs / "no such run"), "--last", "2", "--out", out]
    processes = [started(CLI, rank, 2, port, arguments) for rank in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 0 (" in errors[1]
    assert "no such run" in errors[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_an_error_reaches_the_other_ranks_although_a_path_in_it_is_not_text() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    ranks = [StoreRanks(store, rank, 2) for rank in range(2)]
    with pytest.raises(OSError, match="full"), ranks[1].together():
        raise OSError("\udcff is full")
    with pytest.raises(PeerFailed, match=r"rank 1 .*: OSError: \\udcff is full"):
        ranks[0].barrier("end")
