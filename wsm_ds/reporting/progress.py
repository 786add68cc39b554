"""How far a merge is: a bar on a terminal, a line every few seconds in a log, JSON lines for machines."""

import json
import sys
import time
from typing import Any, Literal

from wsm_ds.sizes import format_size

LOG_EVERY_S = 10.0
Style = Literal["people", "json", "quiet"]


def event(name: str, **values: Any) -> None:
    """Prints one line of JSON: what happened, when, and its figures."""
    print(json.dumps({"event": name, "time_s": round(time.time(), 3), **values}), flush=True)


class Progress:
    """Counts the bytes that are read and written."""

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
        """Seconds since the start."""
        return round(time.monotonic() - self.started_s, 3)

    def add(self, nbytes: int) -> None:
        """Notes `nbytes` more."""
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
