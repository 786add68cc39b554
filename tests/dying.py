"""A process that dies in the middle of its work, for real."""

import os
import signal
from collections.abc import Callable
from typing import Any

OPERATIONS = ("pwrite", "write", "fsync", "rename", "replace", "ftruncate", "mkdir", "unlink", "rmdir")


def dies_at(count: int, action: Callable[[], Any]) -> bool:
    """Does `action` in a process that kills itself in the middle of its operation number `count`; whether it came so
    far. Half of a write is then done, and nothing of the others."""
    pid = os.fork()
    if pid == 0:
        left = [count]
        for name in OPERATIONS:
            setattr(os, name, _dying(getattr(os, name), name, left))
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _dying(operation: Any, name: str, left: list[int]) -> Any:
    def perform(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if name in ("pwrite", "write"):
                half = memoryview(arguments[1])[: len(arguments[1]) // 2]
                operation(arguments[0], half, *arguments[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **keywords)

    return perform
