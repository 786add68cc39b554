"""The heartbeat of a rank: a file on shared storage, which the watchdog reads. Its thread also looks for a stop."""

import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from wsm_ds.filesystem.durable import replace_shared_text
from wsm_ds.training.job import JobFolder, read_attempt, superseded

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
UNCHANGED_S = 2.0
"""How often the file is replaced while the step stays the same."""


class Heartbeat:
    """Replaces RUN/job/heartbeat/rank_NNNNN.json in a thread, so that slow storage does not slow the training.

    The file holds `attempt`, `step` (the last one that ended), `time` (when it ended), `host`, `rank`, `world_size`,
    `pid`, `alive` (when the file was written: a stopped process or a dead host writes no more) and `where` (the line of
    code at which the main thread is: the rank that the others wait for is usually at another line than they are).

    Args:
        job: the run's.
        attempt: the number of this attempt.
        rank: of this process.
        world_size: number of ranks.
        step: the last step that ended before this attempt.

    Attributes:
        stop_is_requested: whether RUN/job/stop existed when the heartbeat was last written.
    """

    def __init__(self, job: JobFolder, *, attempt: int, rank: int, world_size: int, step: int) -> None:
        self.job, self.attempt = job, attempt
        self.path = job.heartbeats / f"rank_{rank:05d}.json"
        self.fixed = {"host": socket.gethostname(), "rank": rank, "world_size": world_size, "pid": os.getpid()}
        self.step, self.time = step, time.time()
        self.newest_attempt, self.stop_is_requested = attempt, False
        self.main_thread = threading.get_ident()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self.thread.start()

    def reached(self, step: int) -> None:
        """Sets the step of the next heartbeat.

        Args:
            step: the step that has just ended.

        Raises:
            Superseded: another attempt was started after this one.
        """
        self.step, self.time = step, time.time()
        if self.newest_attempt != self.attempt:
            raise superseded(self.job, self.attempt, self.newest_attempt)

    def stop(self) -> None:
        """Ends the thread."""
        self.stopped.set()
        self.thread.join()

    def _beat(self) -> None:
        written_step, written_s = -1, 0.0
        while not self.stopped.is_set():
            if self.step != written_step or time.monotonic() - written_s >= UNCHANGED_S:
                written_step, written_s = self.step, time.monotonic()
                try:
                    replace_shared_text(self.path, json.dumps(self._now()))
                    self.newest_attempt, self.stop_is_requested = read_attempt(self.job), self.job.stop.exists()
                except (OSError, ValueError) as error:
                    log.warning("the heartbeat could not be written: %s", error)
            self.stopped.wait(INTERVAL_S)

    def _now(self) -> dict[str, Any]:
        beat = {"attempt": self.attempt, "step": self.step, "time": self.time, "alive": time.time()}
        return beat | self.fixed | {"where": _code_line(self.main_thread)}


def _code_line(thread: int) -> str:
    # The main thread may hang in C code; its Python frame still shows where.
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nowhere"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
