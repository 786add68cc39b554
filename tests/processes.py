"""Processes that a test expects to end."""

import os
import time
from pathlib import Path

PATIENCE_S = 30.0


def is_gone(pid: int) -> bool:
    """Whether a process ends within PATIENCE_S. As an orphan it may wait to be reaped by whoever adopts it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False
