"""How far a merge is: a bar on a terminal, a line every few seconds in a log."""

import sys
import time

from wsm_ds.sizes import format_size

LOG_EVERY_S = 10.0


class Progress:
    """Counts bytes written to stderr's taste. `quiet` prints nothing."""

    def __init__(self, total_bytes: int, *, quiet: bool = False) -> None:
        self.total_bytes, self.done_bytes, self.quiet = total_bytes, 0, quiet
        self.started_s = self.printed_s = time.monotonic()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, nbytes: int) -> None:
        """Notes `nbytes` more."""
        self.done_bytes += nbytes
        if self.bar is not None:
            self.bar.update(nbytes)
            return
        now = time.monotonic()
        if not self.quiet and now - self.printed_s >= LOG_EVERY_S:
            self.printed_s = now
            rate = self.done_bytes / (now - self.started_s)
            left_s = (self.total_bytes - self.done_bytes) / rate
            print(
                f"wrote {format_size(self.done_bytes)} of {format_size(self.total_bytes)}, "
                f"{format_size(rate)}/s, {left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
