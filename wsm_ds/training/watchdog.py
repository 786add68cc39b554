"""Ends a job whose ranks make no progress, and says which of them is to blame.

    python -m wsm_ds.training.watchdog RUN --timeout-s 600 --start-timeout-s 1800 &

It runs beside the ranks, on one node. Collectives end by their own timeout; this is for what hangs outside of them: a
data loader, a file system, a stopped process, a start that never gets to its first step. It ends with 0 on SIGTERM or
when the attempt is done, and with 3 and a message that names the slowest rank when one is silent for too long. The
job script then ends the ranks and starts again.

Ages are measured by this process's clock, from when it saw a heartbeat change: hosts need not agree on the time.
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

from wsm_ds.errors import RanksSilent, WsmError, few
from wsm_ds.training.heartbeat import UNCHANGED_S
from wsm_ds.training.job import JobFolder, given_attempt, is_done, read_attempt, require_current

POLL_S = 1.0
STOPPED_S = 3 * UNCHANGED_S
"""A rank whose file was last replaced so much earlier than another's is stopped or dead, or its host is."""


@dataclass
class LastBeat:
    """A rank's newest heartbeat, and when (monotonic seconds) its step and the file itself last changed."""

    beat: dict[str, Any]
    step_s: float
    alive_s: float


class Watch:
    """What is known of one attempt's ranks.

    Args:
        job: the run's.
        attempt: whose heartbeats count.
        timeout_s: longest time between two steps; longer than a save takes.
        start_timeout_s: longest time until all ranks have sent a heartbeat.
    """

    def __init__(self, job: JobFolder, attempt: int, *, timeout_s: float, start_timeout_s: float) -> None:
        self.job, self.attempt = job, attempt
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.began_s = time.monotonic()
        self.seen: dict[int, LastBeat] = {}

    def look(self, now_s: float) -> None:
        """Reads the heartbeats.

        Raises:
            RanksSilent: one was silent for too long; the slowest is named.
            Superseded: a newer attempt was started.
        """
        require_current(self.job, self.attempt)
        for path in self.job.heartbeats.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._note(json.loads(path.read_text(encoding="utf-8")), now_s)
        self._require_started(now_s)
        if any(now_s - seen.step_s > self.timeout_s for seen in self.seen.values()):
            raise RanksSilent(self._blame(now_s))

    def _note(self, beat: dict[str, Any], now_s: float) -> None:
        if beat["attempt"] != self.attempt:
            return
        last = self.seen.get(beat["rank"])
        step_s = last.step_s if last and last.beat["step"] == beat["step"] else now_s
        alive_s = last.alive_s if last and last.beat["alive"] == beat["alive"] else now_s
        self.seen[beat["rank"]] = LastBeat(beat, step_s, alive_s)

    def _require_started(self, now_s: float) -> None:
        expected = max((seen.beat["world_size"] for seen in self.seen.values()), default=1)
        missing = [rank for rank in range(expected) if rank not in self.seen]
        if missing and now_s - self.began_s > self.start_timeout_s:
            raise RanksSilent(
                f"attempt {self.attempt} of {self.job.run}: after {self.start_timeout_s:g} s "
                + (f"ranks {few(missing)} of {expected} have" if self.seen else "no rank has")
                + " sent no heartbeat. The ranks' own logs say how far they came."
            )

    def _blame(self, now_s: float) -> str:
        """The slowest rank: one that lives no more, else the lowest step, else one that waits elsewhere than most."""
        places = Counter(seen.beat["where"] for seen in self.seen.values())
        newest_sign_s = max(seen.alive_s for seen in self.seen.values())
        slowest = min(
            self.seen.values(),
            key=lambda seen: (
                seen.alive_s > newest_sign_s - STOPPED_S,
                seen.beat["step"],
                places[seen.beat["where"]],
                seen.step_s,
            ),
        )
        beat, others = slowest.beat, [seen for seen in self.seen.values() if seen is not slowest]
        stopped = "" if slowest.alive_s > newest_sign_s - STOPPED_S else " (stopped, or its host is gone)"
        text = (
            f"attempt {self.attempt} of {self.job.run} makes no progress: the slowest is rank {beat['rank']} on "
            f"{beat['host']} (process {beat['pid']}), at step {beat['step']} for {now_s - slowest.step_s:.0f} s, in "
            f"{beat['where']}; its last sign of life was {now_s - slowest.alive_s:.0f} s ago{stopped}."
        )
        if others:
            steps = sorted({seen.beat["step"] for seen in others})
            waiting = few(f"{count} in {place}" for place, count in _places(others))
            text += f" The others are at step {few(steps)}: {waiting}."
        return text


def _places(seen: list[LastBeat]) -> list[tuple[str, int]]:
    return Counter(one.beat["where"] for one in seen).most_common()


def watch(run: Path, *, timeout_s: float, start_timeout_s: float, stop: threading.Event) -> None:
    """Watches the newest attempt until it is done, or `stop` is set.

    Raises:
        RanksSilent: a rank was silent for too long.
        Superseded: a newer attempt was started.
    """
    job = JobFolder(run)
    attempt = given_attempt() or read_attempt(job)
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
        The exit code: 0, or 3 with a message on stderr.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        watch(options.run, timeout_s=options.timeout_s, start_timeout_s=options.start_timeout_s, stop=stop)
    except WsmError as error:
        print(f"watchdog: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 3
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m wsm_ds.training.watchdog`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wsm_ds.training.watchdog", description=__doc__.split("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
