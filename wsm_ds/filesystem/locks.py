"""Locks that end with the process that holds them, however it ends (`flock`)."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsm_ds.errors import BrokenCheckpoint, OutputLocked
from wsm_ds.filesystem.own_files import open_own

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system without locks."""
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
SHARED_WITHIN_S, POLL_S = 5.0, 0.05
"""Seconds that `hold_shared` waits for an `is_held` of another process, which lasts for one system call."""


@contextmanager
def hold_lock(path: Path, conflict: str) -> Iterator[None]:
    """Holds the lock file `path` while the context runs. The file names the process that holds it.

    Args:
        path: the lock file; it is made if it is not there, and never removed.
        conflict: what to say if another process holds the lock, such as "another merge is writing OUT".

    Raises:
        OutputLocked: another process holds the lock; the message is `conflict` and that process.
        UnsafePath: the lock file is a link, or no regular file.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        if not try_lock(descriptor, path.parent) or not _is_at(descriptor, path):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise OutputLocked(f"{conflict} ({holder or 'holder unknown'}).")
        with suppress(OSError):  # the name is only for messages: a full disk has no room for it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, folder: Path) -> bool:
    """Tries to lock an open file, without waiting.

    On a file system without locks every process gets the lock, and a warning is logged.

    Args:
        descriptor: of the file. The lock lives until the last copy of the descriptor is closed.
        folder: where the file is, for the warning.

    Returns:
        Whether this process now holds the lock; False if another process does.
    """
    try:
        # flock, not lockf: a POSIX lock ends when the process closes any descriptor of the file.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            log.warning("%s is on a file system without locks: start no second process that writes there", folder)
        elif error.errno in TAKEN:
            return False
        else:
            raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: its holder may have removed it just before it let the lock go."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def hold_shared(paths: Iterable[Path]) -> Iterator[None]:
    """Marks files as being read while the context runs: `is_held` of any process then says so.

    Shared locks on files that are open for reading only change nothing and need no right to write. They end with the
    process. On a file system without locks, or with locks that other machines do not see, the mark is not seen.

    Args:
        paths: the files; they stay open, one descriptor for each.

    Raises:
        BrokenCheckpoint: a file has vanished.
        OSError: a file cannot be opened; a lower limit of open files (`ulimit -n`) than there are paths is one reason.
    """
    descriptors: list[int] = []
    try:
        for path in paths:
            try:
                descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError as error:
                raise BrokenCheckpoint(f"{path} has vanished. Does a clean-up of old checkpoints run?") from error
            _share(descriptors[-1], path)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _share(descriptor: int, path: Path) -> None:
    deadline_s = time.monotonic() + SHARED_WITHIN_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
                continue
            if error.errno not in (*TAKEN, *NO_LOCKS):
                raise
            log.warning("%s cannot be marked as being read (%s): prune nothing meanwhile", path, error.strerror)
            return None


def is_held(path: Path) -> bool:
    """Whether a process has marked a file by `hold_shared`. False on a file system without locks."""
    try:
        # NFS grants an exclusive lock only to a descriptor that is open for writing.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return True
        if error.errno not in (*NO_LOCKS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
    return False
