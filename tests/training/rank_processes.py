"""Starts launch/pretrain.py on real processes, one a rank, and lets a test kill them.

torch and DeepSpeed take seconds to import, so a server of multiprocessing's imports them once, and each rank is forked
from it: a process of its own with a pid, signals and an exit code, started in a tenth of a second.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "launch", Path(__file__).parent))),
}
PRETRAIN = ROOT / "launch/pretrain.py"
PATIENCE_S = 180.0


def run_rank(folder: Path, script: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """A rank: what `python SCRIPT ARGUMENTS` does in a folder, with its output in a file."""
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/job/steps.jsonl; one that is being written is left out."""
    path = run / "job/steps.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path) -> dict[int, float]:
    """The newest loss of each step. A step that was made twice, before and after a kill, has the same loss twice."""
    found: dict[int, set[float]] = {}
    for line in steps(run):
        found.setdefault(line["step"], set()).add(line["loss"])
    assert all(len(values) == 1 for values in found.values()), found
    return {step: values.pop() for step, values in found.items()}


@dataclass(frozen=True)
class Started:
    """A job's ranks. `lines_before`: of steps.jsonl, by earlier jobs."""

    run: Path
    ranks: list[BaseProcess]
    log: Path
    lines_before: int

    @property
    def output(self) -> str:
        """What all ranks have said."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout_s: float = PATIENCE_S) -> list[int | None]:
        """The ranks' exit codes; negative: a signal. None: it still runs."""
        deadline_s = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(max(0.0, deadline_s - time.monotonic()))
        return [rank.exitcode for rank in self.ranks]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Sends a signal to ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            os.kill(self.ranks[rank].pid or 0, number)

    def until_step(self, step: int) -> "Started":
        """Returns when a step of this job has ended."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not any(line["step"] >= step for line in steps(self.run)[self.lines_before :]):
            assert time.monotonic() < deadline_s, self.output
            assert any(rank.exitcode is None for rank in self.ranks), self.output
            time.sleep(0.005)
        return self


Naming = Callable[[int, int], dict[str, str]]


def as_torchrun(rank: int, world_size: int) -> dict[str, str]:
    """What torchrun and deepspeed call a rank of one machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def as_srun(rank: int, world_size: int) -> dict[str, str]:
    """What a Slurm step of one task a rank calls it."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(world_size)}


class Launcher:
    """Starts jobs; ends whatever of them is left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[Started]()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pretrain", "torch._dynamo"])

    def start(
        self,
        run: Path,
        *arguments: str,
        ranks: int = 2,
        environment: dict[str, str] | None = None,
        named: Naming = as_torchrun,
        script: Path = PRETRAIN,
    ) -> Started:
        """Starts `SCRIPT --run RUN ARGUMENTS` on so many ranks; `named` tells a rank by a launcher's variables."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        log = self.folder / f"job{len(self.started)}.log"
        common = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | (environment or {})
        words = ["--run", str(run), *arguments]
        processes = [
            self.context.Process(
                target=run_rank, args=(run.parent, str(script), words, common | named(rank, ranks), log)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        started = Started(run, processes, log, len(steps(run)))
        self.started.append(started)
        return started

    def finish(self) -> None:
        """Kills the ranks that still run."""
        for started in self.started:
            for rank in started.ranks:
                rank.kill()
                rank.join()
