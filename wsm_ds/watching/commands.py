"""Runs a user's command for every merge (an evaluation, for example), one at a time, while the watch merges further.

The command of the merge NAME writes, in the same folder,

    NAME.exec.out, NAME.exec.err    what it printed
    NAME.exec.json                  how it ended; without this file, the command is run again
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import Interrupted, RecipeError
from wsm_ds.evaluation.evaluators import load_evaluators
from wsm_ds.evaluation.records import NAME as RECORDS
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.locks import try_lock
from wsm_ds.watching.events import Event

FOLDER_WORD = "{}"
"""Stands for the folder of the merge in the words of a command."""
STOP_S = 5.0
"""Seconds that a command has to end after SIGTERM, before SIGKILL."""
NOT_STARTED = 127
"""The exit code of a shell for a command that cannot be started."""


@dataclass(frozen=True)
class FinishedMerge:
    """A finished merge, for which the command is run.

    Attributes:
        run: the run's folder.
        step: the end point of the merge's window.
        window: the window's name.
        out: the folder of the merge.
    """

    run: Path
    step: int
    window: str
    out: Path

    def command_file(self, suffix: str) -> Path:
        """The file NAME.exec.SUFFIX next to the folder of the merge.

        Args:
            suffix: "out", "err" or "json"; see the module.
        """
        return self.out.with_name(f"{self.out.name}.exec.{suffix}")

    def environment(self) -> dict[str, str]:
        """Variables that are added to the command's environment."""
        return {
            "WSM_RUN": str(self.run),
            "WSM_STEP": str(self.step),
            "WSM_WINDOW": self.window,
            "WSM_MERGE": str(self.out),
        }


def parse_command(text: str) -> tuple[str, ...]:
    """The words of a command line, split as a shell splits them. No shell runs the command.

    Args:
        text: the command line; `{}` in it stands for the folder of a merge.

    Raises:
        RecipeError: a quote is not closed, or the program is not found.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise RecipeError(f"the command {text!r} cannot be split into words: {error}.") from error
    if not words or (FOLDER_WORD not in words[0] and shutil.which(words[0]) is None):
        raise RecipeError(f"the command {text!r} names a program that is not found; give its path, or set PATH.")
    return words


def evaluation_command(file: Path, out: Path) -> tuple[str, ...]:
    """The words of the command that measures a merge, and the newest checkpoint in it.

    Args:
        file: the YAML file of evaluators. They are checked here, once, before anything is merged.
        out: the folder of the watch, where the records are kept.

    Raises:
        RecipeError, EvaluationError: the file, or what it names, cannot be used.
    """
    for evaluator in load_evaluators(file):
        evaluator.require_ready()
    records = str(out / RECORDS)
    return (
        sys.executable, "-m", "wsm_ds", "evaluate", FOLDER_WORD, "--raw", "--evaluator", str(file), "--out", records
    )  # fmt: skip


class Commands:
    """Runs the command for one merge after the other. A context manager that stops a running command at its end.

    Args:
        words: of the command; `{}` in them stands for the merge's folder. Empty: there is no command.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.waiting: deque[FinishedMerge] = deque()
        self.running: tuple[FinishedMerge, subprocess.Popen[bytes], float] | None = None

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, merge: FinishedMerge) -> None:
        """Queues a merge, unless its command has already ended."""
        if self.words and not merge.command_file("json").is_file():
            self.waiting.append(merge)

    @property
    def is_idle(self) -> bool:
        """Whether every command has ended."""
        return self.running is None and not self.waiting

    def step(self) -> Iterator[Event]:
        """Reports the command if it has ended, and starts the next one."""
        if self.running is not None:
            merge, process, began_s = self.running
            if process.poll() is None:
                return
            self.running = None
            yield self._ended(merge, process.returncode, began_s)
        while self.waiting and not self.waiting[0].out.is_dir():
            self.waiting.popleft()  # somebody has deleted the merge while it waited
        if self.waiting:
            yield from self._start(self.waiting[0])

    def pause(self, seconds: float) -> None:
        """Sleeps; returns early when the running command ends.

        Args:
            seconds: the longest sleep.
        """
        if self.running is None:
            time.sleep(seconds)
        else:
            with suppress(subprocess.TimeoutExpired):
                self.running[1].wait(seconds)

    def stop(self) -> None:
        """Ends the running command and all its processes. The next watch runs it again."""
        if self.running is None:
            return
        _, process, _ = self.running
        self.running = None
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(STOP_S)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        with contextlib.suppress(ProcessLookupError):  # children of the command may ignore SIGTERM and outlive it
            os.killpg(process.pid, signal.SIGKILL)

    def _start(self, merge: FinishedMerge) -> Iterator[Event]:
        """Starts the command, unless one that a killed watch started for the same merge still runs."""
        began_s = time.time()
        out = os.open(merge.command_file("out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not try_lock(out, merge.out.parent):  # the command inherits the file, so the lock lives as long as it
                return
            self.waiting.popleft()
            os.ftruncate(out, 0)
            with merge.command_file("err").open("wb") as err:
                process = subprocess.Popen(
                    self._words_for(merge),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=os.environ | merge.environment(),
                    start_new_session=True,
                )
            self.running = (merge, process, began_s)
        except Interrupted:
            raise
        except OSError as error:
            merge.command_file("err").write_text(f"{error}\n")
            yield self._ended(merge, NOT_STARTED, began_s)
        finally:
            os.close(out)

    def _words_for(self, merge: FinishedMerge) -> list[str]:
        return [word.replace(FOLDER_WORD, str(merge.out)) for word in self.words]

    def _ended(self, merge: FinishedMerge, code: int, began_s: float) -> Event:
        seconds = round(time.time() - began_s, 3)
        result: dict[str, Any] = {
            "command": self._words_for(merge),
            "exit_code": code,
            "started": began_s,
            "seconds": seconds,
        }
        replace_text(merge.command_file("json"), json.dumps(result, indent=2) + "\n")
        text = f"step {merge.step} {merge.window}: the command ended with code {code} after {seconds:.1f} s"
        values = {"step": merge.step, "window": merge.window, "out": str(merge.out)}
        return Event("command", text, values | result)
