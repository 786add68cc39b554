"""Starts launch/pretrain.py on real processes, one a rank, and lets a test kill them."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import ROOT, as_torchrun, fork, free_port

PRETRAIN = ROOT / "launch/pretrain.py"
PATIENCE_S = 180.0


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


def as_srun(rank: int, world_size: int) -> dict[str, str]:
    """What a Slurm step of one task a rank calls it."""
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(world_size)}


class Launcher:
    """Starts jobs; ends whatever of them is left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[Started]()

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
        log = self.folder / f"job{len(self.started)}.log"
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | (environment or {})
        words = ["--run", str(run), *arguments]
        processes = [
            fork(script, words, common | named(rank, ranks), folder=run.parent, log=log) for rank in range(ranks)
        ]
        started = Started(run, processes, log, len(steps(run)))
        self.started.append(started)
        return started

    def finish(self) -> None:
        """Kills the ranks that still run."""
        for started in self.started:
            for rank in started.ranks:
                rank.kill()
                rank.join()
