"""A run of `launch/pretrain.py` on the cluster: how it is asked for, and what its folder says."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cluster import REPOSITORY, Cluster, wait_for

MODEL = ("--layers", "2", "--width", "32", "--heads", "2", "--context", "32")
SECRET = "hf_a-secret-of-the-site"
"""The first line of a value in the site's file that must reach the ranks, but no command line and no log."""
UNTIL = 80
"""Where the uninterrupted runs end: four checkpoints after the warmup."""
SMALL_JOB = ("--gpus-per-node=2", "--cpus-per-task=2", "--mem=2000", "--oversubscribe", "--time=30")
"""In place of what the templates ask of a production cluster; two runs fit on a node."""


@dataclass(frozen=True)
class Run:
    """RUN, and what is asked of it."""

    folder: Path
    data: Path
    stage: int = 2

    def arguments(self, until_step: int, save_every: int = 10) -> list[str]:
        """Of `launch/pretrain.py`."""
        target = ["--until-step", str(until_step)]
        return ["--run", str(self.folder), "--config", str(REPOSITORY / f"configs/zero{self.stage}_bf16.json"),
                "--data", str(self.data), "--save-every", str(save_every), *target, *MODEL]  # fmt: skip

    @property
    def lines(self) -> list[dict[str, Any]]:
        """RUN/job/steps.jsonl, as far as it is written."""
        path = self.folder / "job/steps.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    @property
    def losses(self) -> dict[int, float]:
        """Of each step, the one that counts: the last."""
        return {line["step"]: line["loss"] for line in self.lines}

    @property
    def attempt(self) -> int:
        """The newest."""
        path = self.folder / "job/attempt"
        return int(path.read_text()) if path.exists() else 0

    @property
    def done(self) -> int | None:
        """The step of RUN/job/done."""
        path = self.folder / "job/done"
        return int(json.loads(path.read_text())["step"]) if path.exists() else None

    @property
    def newest_step(self) -> int:
        """Of the checkpoint that RUN/latest names."""
        return int((self.folder / "latest").read_text().removeprefix("global_step"))

    def has_reached(self, step: int, *, attempt: int) -> bool:
        """Whether this attempt, or a later one, has made a step."""
        return any(line["step"] >= step and line["attempt"] >= attempt for line in self.lines[-1:])

    def wait_for_step(self, step: int, *, attempt: int, timeout_s: float = 120) -> None:
        """Returns when `has_reached`."""
        what = f"{self.folder.name}: attempt {attempt} reaches step {step}"
        wait_for(what, lambda: self.has_reached(step, attempt=attempt), timeout_s, poll_s=0.1)

    def beat(self, rank: int) -> dict[str, Any]:
        """A rank's heartbeat."""
        return dict(json.loads((self.folder / f"job/heartbeat/rank_{rank:05d}.json").read_text()))

    def pause(self, cluster: Cluster, step: int, *, attempt: int) -> None:
        """Stops rank 0, and so all, at `step` or soon after: what happens next happens in the middle of a run."""
        self.wait_for_step(step, attempt=attempt)
        self._signal_rank_0(cluster, "STOP")
        assert self.beat(0)["attempt"] == attempt

    def go_on(self, cluster: Cluster) -> None:
        """Undoes `pause`."""
        self._signal_rank_0(cluster, "CONT")

    def _signal_rank_0(self, cluster: Cluster, signal: str) -> None:
        beat = self.beat(0)
        cluster.run(beat["host"], "kill", "-s", signal, str(beat["pid"]))

    def log(self, attempt: int, name: str) -> str:
        """A file of an attempt's logs."""
        return (self.folder / f"job/logs/attempt-{attempt}" / name).read_text(errors="replace")

    def what_happened(self) -> str:
        """For the message of a failed test: the ends of all logs."""
        logs = sorted(self.folder.glob("job/logs/attempt-*/*[!e]"), key=lambda path: path.stat().st_mtime)
        outputs = sorted(self.folder.parent.glob("*.out"))
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in [*logs, *outputs])


def pause_each(cluster: Cluster, runs: Iterable[Run], step: int, *, attempt: int) -> None:
    """`Run.pause` of several, in the order in which they get there."""
    left = list(runs)

    def are_paused() -> bool:
        for run in [run for run in left if run.has_reached(step, attempt=attempt)]:
            run.pause(cluster, step, attempt=attempt)
            left.remove(run)
        return not left

    wait_for(f"attempt {attempt} of each run reaches step {step}", are_paused, 120, poll_s=0.1)


def site_with(site: dict[str, str], folder: Path, **changes: str) -> dict[str, str]:
    """The site's file with other values."""
    path = folder / f"{'-'.join(changes)}.env"
    path.write_text(Path(site["WSM_SITE"]).read_text() + "".join(f"{name}={changes[name]}\n" for name in changes))
    return {"WSM_SITE": str(path)}


def processes(cluster: Cluster, *nodes: str) -> list[str]:
    """The ranks and their agents on these hosts, or on all; not srun, which waits until a host is no longer cut off."""
    up = nodes or [node for node in cluster.nodes if node in cluster.hosts]
    found = [cluster.run(node, "pgrep", "-af", "launch/pretrain.py", check=False).stdout for node in up]
    return [line for line in "".join(found).splitlines() if " srun " not in line]
