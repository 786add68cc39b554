"""Runs a user's command for every merge (an evaluation, for example), one at a time, while the watch goes on merging.

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
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import Interrupted, RecipeError
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.locks import try_lock
from wsm_ds.watching.events import Event

PLACE = "{}"
STOP_S = 5.0
NOT_STARTED = 127
"""The exit code of a shell for a command that cannot be started."""


@dataclass(frozen=True)
class Merged:
    """A merge that the command is for."""

    run: Path
    step: int
    window: str
    out: Path

    def beside(self, suffix: str) -> Path:
        """A file of the command, in the folder that holds the merge."""
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
    """The words of a command line, split as a shell would; no shell runs it.

    Raises:
        RecipeError: a quote is not closed, or the program is not found.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise RecipeError(f"the command {text!r} cannot be split into words: {error}.") from error
    if not words or (PLACE not in words[0] and shutil.which(words[0]) is None):
        raise RecipeError(f"the command {text!r} names a program that is not found; give its path, or set PATH.")
    return words


class Commands:
    """Runs the command for one merge after the other. A context manager: at its end, a running command is stopped.

    Args:
        words: of the command; `{}` in them stands for the merge's folder. Empty: there is no command.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        self.waiting: deque[Merged] = deque()
        self.running: tuple[Merged, subprocess.Popen[bytes], float] | None = None

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, merged: Merged) -> None:
        """Queues a merge, unless its command has already ended."""
        if self.words and not merged.beside("json").is_file():
            self.waiting.append(merged)

    @property
    def is_idle(self) -> bool:
        """Whether every command has ended."""
        return self.running is None and not self.waiting

    def step(self) -> Iterator[Event]:
        """Reports the command that has ended, and starts the next one."""
        if self.running is not None:
            merged, process, begun = self.running
            if process.poll() is None:
                return
            self.running = None
            yield self._ended(merged, process.returncode, begun)
        while self.waiting and not self.waiting[0].out.is_dir():
            self.waiting.popleft()  # the merge was deleted before its turn came
        if self.waiting:
            yield from self._start(self.waiting[0])

    def pause(self, seconds: float) -> None:
        """Sleeps, at most until the running command ends."""
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
        with contextlib.suppress(ProcessLookupError):  # its children may ignore SIGTERM, and outlive it
            os.killpg(process.pid, signal.SIGKILL)

    def _start(self, merged: Merged) -> Iterator[Event]:
        """Starts the command, unless one that a killed watch started for the same merge still runs."""
        begun = time.time()
        out = os.open(merged.beside("out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not try_lock(out, merged.out.parent):  # the lock lives as long as anybody has this file open
                return
            self.waiting.popleft()
            os.ftruncate(out, 0)
            with merged.beside("err").open("wb") as err:
                process = subprocess.Popen(
                    self._words_for(merged),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=os.environ | merged.environment(),
                    start_new_session=True,
                )
            self.running = (merged, process, begun)
        except Interrupted:
            raise
        except OSError as error:
            merged.beside("err").write_text(f"{error}\n")
            yield self._ended(merged, NOT_STARTED, begun)
        finally:
            os.close(out)

    def _words_for(self, merged: Merged) -> list[str]:
        return [word.replace(PLACE, str(merged.out)) for word in self.words]

    def _ended(self, merged: Merged, code: int, begun: float) -> Event:
        seconds = round(time.time() - begun, 3)
        result: dict[str, Any] = {
            "command": self._words_for(merged),
            "exit_code": code,
            "started": begun,
            "seconds": seconds,
        }
        replace_text(merged.beside("json"), json.dumps(result, indent=2) + "\n")
        text = f"step {merged.step} {merged.window}: the command ended with code {code} after {seconds:.1f} s"
        values = {"step": merged.step, "window": merged.window, "out": str(merged.out)}
        return Event("command", text, values | result)
