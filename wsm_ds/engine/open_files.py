"""Descriptors of the files that one thread reads or writes again and again."""

import os
import resource
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

FEWEST_OPEN = 2
KEPT_FREE = 16
"""Descriptors that are left for journals, for blocks that are read again, and for what the process opens besides."""


class OpenFiles:
    """Opens files when they are first used and keeps at most `limit` of them open.

    A merge may read thousands of rank files, and a process may often have only 1024 open ones (`ulimit -n`). So the
    least recently used file is closed first. One thread uses an object; it is a context manager that closes all.

    Args:
        path_of: gives the path of a file from its number.
        flags: of `os.open`.
        limit: number of files that may be open at the same time.
    """

    def __init__(self, path_of: Callable[[int], Path], flags: int, limit: int) -> None:
        self.path_of, self.flags, self.limit = path_of, flags, limit
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_all()

    def descriptor(self, file: int) -> int:
        """The open descriptor of a file. It stays valid until `limit` other files have been used.

        Raises:
            OSError: the file cannot be opened.
        """
        if file in self._descriptors:
            self._descriptors.move_to_end(file)
            return self._descriptors[file]
        if len(self._descriptors) >= self.limit:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[file] = os.open(self.path_of(file), self.flags)
        return self._descriptors[file]

    def close(self, file: int) -> None:
        """Closes a file if it is open. The next `descriptor` opens it again."""
        descriptor = self._descriptors.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def close_all(self) -> None:
        """Closes all files."""
        for file in list(self._descriptors):
            self.close(file)


def free_descriptors() -> int:
    """Number of files that this process may still open (`ulimit -n`), without KEPT_FREE."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return int(limit) - len(list(Path("/proc/self/fd").iterdir())) - KEPT_FREE


def most_open(wanted: int, sharers: int) -> int:
    """How many files an `OpenFiles` may keep open.

    Args:
        wanted: the most that it can use.
        sharers: number of them that the process has at the same time.
    """
    return min(wanted, max(FEWEST_OPEN, free_descriptors() // sharers))
