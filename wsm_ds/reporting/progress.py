"""The progress of a merge: a bar on a terminal, a line every few seconds in a log, or JSON lines for programs."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from wsm_ds.sizes import format_size

LOG_EVERY_S = 10.0
"""Seconds between two lines of progress, where no terminal shows a bar."""
BAR_AFTER_S = 2.0
"""Seconds of planning before a terminal shows a bar: most plans take less."""
Style = Literal["people", "json", "quiet"]
"""Who reads the progress: people, a program, or nobody."""


def event(name: str, **values: Any) -> None:
    """Prints one line of JSON on stdout.

    Args:
        name: what happened, the value of "event".
        **values: the other keys of the line; "time_s" (seconds since 1970) is added.
    """
    print(json.dumps({"event": name, "time_s": round(time.time(), 3), **values}), flush=True)


class Progress:
    """Counts the bytes that are read and written, and shows the count. It is a context manager, which closes the bar.

    Args:
        total_bytes: bytes that the merge will read and write.
        style: who reads the progress.
    """

    def __init__(self, total_bytes: int, style: Style) -> None:
        self.total_bytes, self.done_bytes, self.style = total_bytes, 0, style
        self.started_s = self.printed_s = time.monotonic()
        self.bar = None
        if style == "people" and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def wall_s(self) -> float:
        """Seconds since this object was made."""
        return round(time.monotonic() - self.started_s, 3)

    def add(self, nbytes: int) -> None:
        """Counts more bytes, and shows the progress if the last line is old enough.

        Args:
            nbytes: bytes read or written since the last call.
        """
        self.done_bytes += nbytes
        if self.bar is not None:
            self.bar.update(nbytes)
            return
        now = time.monotonic()
        if self.style == "quiet" or now - self.printed_s < LOG_EVERY_S:
            return
        self.printed_s = now
        rate = self.done_bytes / (now - self.started_s)
        left_s = max(self.total_bytes - self.done_bytes, 0) / rate
        if self.style == "json":
            event("progress", bytes=self.done_bytes, total_bytes=self.total_bytes, bytes_per_s=int(rate),
                  left_s=round(left_s, 1))  # fmt: skip
        else:
            print(
                f"{format_size(self.done_bytes)} of {format_size(self.total_bytes)}, {format_size(rate)}/s, "
                f"{left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


class PlanningProgress:
    """Shows how many rank files of a plan were read. It is a context manager, which closes the bar.

    Args:
        style: who reads the progress.
        tell: takes a line for the other ranks.
    """

    def __init__(self, style: Style, tell: Callable[[str], None] = lambda text: None) -> None:
        self.style, self.tell = style, tell
        self.started_s = self.printed_s = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "PlanningProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int, total: int) -> None:
        """Shows the progress if the last line is old enough.

        Args:
            done: files whose metadata was read.
            total: all files, as far as they are known.
        """
        now = time.monotonic()
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)
            return
        passed_s = now - self.printed_s
        # This is called for every file, so the terminal, a system call, is asked last.
        if passed_s < BAR_AFTER_S or (passed_s < LOG_EVERY_S and not self._has_terminal()):
            return
        self.printed_s = now
        left_s = (total - done) * (now - self.started_s) / max(done, 1)
        text = f"read the metadata of {done:,} of {total:,} rank files, {left_s:.0f} s left"
        self.tell(text)
        if self._has_terminal():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="file", desc="planning", leave=False)
        elif self.style == "json":
            event("planning", files=done, total_files=total, left_s=round(left_s, 1))
        elif self.style == "people":
            print(text, file=sys.stderr, flush=True)

    def _has_terminal(self) -> bool:
        return self.style == "people" and sys.stderr.isatty()
