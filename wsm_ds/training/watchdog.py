"""Watches the ranks of a run, and names the slowest one when they make no progress.

    wsm-ds watchdog RUN --timeout-s 600 --start-timeout-s 1800 &

It runs on one node while the ranks train; `python -m wsm_ds.training.watchdog` does the same. Collectives end by their
own timeout. The watchdog is for what hangs outside of them: a data loader, a file system, a stopped process, a start
that never reaches its first step. It ends with exit code 0 on SIGTERM or when the attempt is done. It ends with 3, and
a message that names the slowest rank, when a rank is silent for too long. The job script then ends the ranks and starts
them again.

It measures all ages by its own clock, from the moment at which it saw a heartbeat change. So the clocks of the hosts
may differ.
"""

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import RanksSilent, RecipeError, WsmError, few
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.training.heartbeat import UNCHANGED_S
from wsm_ds.training.job import JobFolder, exported_attempt, is_done, read_attempt, require_current

POLL_S = 1.0
STOPPED_S = 3 * UNCHANGED_S
"""If a rank's file is so much older than the newest one, the rank is stopped or dead, or its host is gone."""


@dataclass
class LastBeat:
    """The newest heartbeat of a rank.

    Attributes:
        beat: the fields of the file; see `Heartbeat`.
        step_s: when the step last changed, in seconds of the monotonic clock.
        alive_s: when the file itself last changed.
    """

    beat: dict[str, Any]
    step_s: float
    alive_s: float


class Watch:
    """The heartbeats of one attempt, and the limits that they must keep.

    Args:
        job: the run's.
        attempt: the one whose ranks are watched.
        timeout_s: longest time between two steps of a rank. A save must be faster.
        start_timeout_s: longest time until all ranks have sent a heartbeat.

    Attributes:
        last_beats: the newest heartbeat of each rank.
    """

    def __init__(self, job: JobFolder, attempt: int, *, timeout_s: float, start_timeout_s: float) -> None:
        self.job, self.attempt = job, attempt
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.began_s = time.monotonic()
        self.last_beats: dict[int, LastBeat] = {}

    def look(self, now_s: float) -> None:
        """Reads the heartbeats once.

        Args:
            now_s: the time, in seconds of the monotonic clock.

        Raises:
            RanksSilent: a rank is silent for too long; the message names the slowest one.
            Superseded: a newer attempt was started.
        """
        require_current(self.job, self.attempt)
        for path in self.job.heartbeats.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._note(json.loads(read_small(path)), now_s)
        self._require_started(now_s)
        if any(now_s - last.step_s > self.timeout_s for last in self.last_beats.values()):
            raise RanksSilent(self._blame(now_s))

    def _note(self, beat: dict[str, Any], now_s: float) -> None:
        if beat["attempt"] != self.attempt:
            return
        last = self.last_beats.get(beat["rank"])
        # By change, not by the time in the file: clocks of hosts differ.
        step_s = last.step_s if last and last.beat["step"] == beat["step"] else now_s
        alive_s = last.alive_s if last and last.beat["alive"] == beat["alive"] else now_s
        self.last_beats[beat["rank"]] = LastBeat(beat, step_s, alive_s)

    def _require_started(self, now_s: float) -> None:
        expected = max((last.beat["world_size"] for last in self.last_beats.values()), default=1)
        missing = [rank for rank in range(expected) if rank not in self.last_beats]
        if missing and now_s - self.began_s > self.start_timeout_s:
            raise RanksSilent(
                f"attempt {self.attempt} of {self.job.run}: after {self.start_timeout_s:g} s "
                + (f"ranks {few(missing)} of {expected} have sent no" if self.last_beats else "no rank has sent a")
                + " heartbeat. Read the ranks' own logs to see how far they came."
            )

    def _blame(self, now_s: float) -> str:
        """Describes the slowest rank: a dead one, else one at the lowest step, else one at another line than most."""
        code_lines = Counter(last.beat["where"] for last in self.last_beats.values())
        newest_sign_s = max(last.alive_s for last in self.last_beats.values())
        slowest = min(
            self.last_beats.values(),
            key=lambda last: (
                last.alive_s > newest_sign_s - STOPPED_S,
                last.beat["step"],
                code_lines[last.beat["where"]],
                last.step_s,
            ),
        )
        beat, others = slowest.beat, [last for last in self.last_beats.values() if last is not slowest]
        stopped = "" if slowest.alive_s > newest_sign_s - STOPPED_S else " (stopped, or its host is gone)"
        text = (
            f"attempt {self.attempt} of {self.job.run} makes no progress: the slowest is rank {beat['rank']} on "
            f"{beat['host']} (process {beat['pid']}), at step {beat['step']} for {now_s - slowest.step_s:.0f} s, in "
            f"{beat['where']}; its last sign of life was {now_s - slowest.alive_s:.0f} s ago{stopped}."
        )
        if others:
            steps = sorted({last.beat["step"] for last in others})
            waiting = few(f"{count} in {code_line}" for code_line, count in _code_lines(others))
            text += f" The others are at step {few(steps)}: {waiting}."
        return text


def _code_lines(beats: list[LastBeat]) -> list[tuple[str, int]]:
    return Counter(last.beat["where"] for last in beats).most_common()


def watch(run: Path, *, timeout_s: float, start_timeout_s: float, stop: threading.Event) -> None:
    """Watches an attempt until it is done, or `stop` is set. The attempt is WSM_ATTEMPT, or the newest one.

    Args:
        run: the run's folder.
        timeout_s: see `Watch`.
        start_timeout_s: see `Watch`.
        stop: ends the watching when another thread, or a signal's handler, sets it.

    Raises:
        RanksSilent: a rank was silent for too long.
        Superseded: a newer attempt was started.
    """
    job = JobFolder(run)
    attempt = exported_attempt() or read_attempt(job)
    watching = Watch(job, attempt, timeout_s=timeout_s, start_timeout_s=start_timeout_s)
    while not (stop.is_set() or is_done(job, 0, attempt=attempt)):
        watching.look(time.monotonic())
        stop.wait(POLL_S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run`, for `wsm-ds watchdog` and for this module as a program."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the training run")
    parser.add_argument(
        "--timeout-s", type=float, required=True, metavar="S", help="longest time between two steps of a rank"
    )
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        default=1800.0,
        metavar="S",
        help="longest time until all ranks have sent a heartbeat (default %(default)g)",
    )


def run(options: argparse.Namespace) -> int:
    """Watches until the attempt is done, or SIGTERM comes, or a rank is silent for too long.

    Args:
        options: the parsed arguments of `add_arguments`.

    Returns:
        The exit code: 0, or that of the error with a message on stderr.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        for name in ("timeout_s", "start_timeout_s"):
            value = getattr(options, name)
            if not value >= 0:  # NaN would never be exceeded
                raise RecipeError(f"--{name.replace('_', '-')} must be at least 0, not {value:g}.")
        watch(options.run, timeout_s=options.timeout_s, start_timeout_s=options.start_timeout_s, stop=stop)
    except WsmError as error:
        print(f"watchdog: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, RecipeError) else 3
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m wsm_ds.training.watchdog`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wsm_ds.training.watchdog", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
