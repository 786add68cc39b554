"""One pool of open files for the whole process, whatever the number of its threads is.

A merge may read tens of thousands of rank files, and a process may often have only 1024 open ones (`ulimit -n`).
"""

import os
import resource
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from wsm_ds.filesystem.read_ahead import read_ahead, reading_threads

KEPT_FREE = 16
"""Descriptors that are left for journals and for what the process opens besides."""
MOST_OPEN = 4096
"""Files that one pool keeps open at most. A server of a file system remembers every open file."""
FEWEST_OPEN = 4
"""Descriptors that a thread needs: an input, an output, a block that is read again, and one to spare."""


class File(NamedTuple):
    """A file of a plan: an input or an output, by its number."""

    use: Literal["input", "output"]
    number: int


class OpenFiles:
    """Opens files when they are first used, and keeps at most `limit` of them open for all threads.

    The file that was used least recently is closed first. A file that a thread uses is never closed.

    Args:
        open_file: opens a file and returns its descriptor.
        limit: number of files that may be open at the same time.

    Attributes:
        limit: as above.
        reading_threads: threads that read many ranges at once, for all users of the pool.
    """

    def __init__(self, open_file: Callable[[File], int], limit: int) -> None:
        self.open_file, self.limit = open_file, max(1, limit)
        self._descriptors: OrderedDict[File, int] = OrderedDict()
        self._users: Counter[File] = Counter()
        self._opening: set[File] = set()
        self._changed = threading.Condition()
        self._opening_threads, self.reading_threads = reading_threads(), reading_threads()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for threads in (self.reading_threads, self._opening_threads):
            threads.shutdown()
        with self._changed:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    @contextmanager
    def use(self, *files: File) -> Iterator[list[int]]:
        """Gives the open descriptors of files, which stay open while the context runs.

        A thread gets all of them or waits for all of them, so threads do not wait for each other in a circle.

        Args:
            files: at most `limit` ones; a file may occur twice.

        Raises:
            OSError: a file cannot be opened.
        """
        distinct = list(dict.fromkeys(files))
        with self._changed:
            while not self._has_room(distinct):
                self._changed.wait()
            missing = [file for file in distinct if file not in self._descriptors]
            self._users.update(distinct)
            self._close_unused(len(missing))
            self._opening.update(missing)
        try:
            self._open(missing)
            with self._changed:
                for file in distinct:
                    self._descriptors.move_to_end(file)
                descriptors = [self._descriptors[file] for file in files]
            yield descriptors
        finally:
            with self._changed:
                for file in distinct:
                    self._users[file] -= 1
                    if not self._users[file]:
                        del self._users[file]
                self._changed.notify_all()

    def renew(self, file: File) -> None:
        """Opens a file in use again, under the same descriptor: after ESTALE the old one never works again.

        Raises:
            OSError: the file cannot be opened.
        """
        descriptor = self.open_file(file)
        try:
            os.dup2(descriptor, self._descriptors[file], inheritable=False)
        finally:
            os.close(descriptor)

    def _has_room(self, files: Sequence[File]) -> bool:
        """Whether these files can be open together. Not while another thread opens one of them."""
        if self._opening.intersection(files):
            return False
        missing = sum(file not in self._descriptors for file in files)
        in_use = sum(file not in files for file in self._users)
        return not missing or in_use + len(files) <= self.limit

    def _close_unused(self, count: int) -> None:
        """Closes files that nobody uses until `count` more can be opened."""
        excess = len(self._descriptors) + len(self._opening) + count - self.limit
        if excess > 0:
            unused = [file for file in self._descriptors if not self._users[file]][:excess]
            for file in unused:
                os.close(self._descriptors.pop(file))

    def _open(self, files: Sequence[File]) -> None:
        try:
            # Many at once: each may take milliseconds.
            deque(read_ahead(self._open_one, files, self._opening_threads), maxlen=0)
        finally:
            with self._changed:
                self._opening.difference_update(files)
                self._changed.notify_all()

    def _open_one(self, file: File) -> None:
        descriptor = self.open_file(file)
        with self._changed:
            self._descriptors[file] = descriptor
            self._opening.discard(file)  # or `_close_unused` would count it twice


def raise_limit() -> None:
    """Raises the soft limit on open files as far as the hard limit allows, and no further than a pool needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN + 1024
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def free_descriptors() -> int:
    """Number of files that this process may still open (`ulimit -n`), without KEPT_FREE."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_OPEN
    return int(limit) - len(list(Path("/proc/self/fd").iterdir())) - KEPT_FREE


def most_open(threads: int) -> int:
    """How many files a pool may keep open; each thread may open one more, to read a block again.

    Args:
        threads: that use the pool.
    """
    return max(FEWEST_OPEN, min(MOST_OPEN, free_descriptors() - threads))
