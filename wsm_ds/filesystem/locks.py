"""Locks that end with the process that holds them, however it ends (`flock`)."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsm_ds.errors import OutputLocked

log = logging.getLogger(__name__)


@contextmanager
def hold_lock(path: Path, conflict: str) -> Iterator[None]:
    """Holds the lock file `path` while the context runs. The file names the process that holds it.

    Args:
        path: the lock file; it is made if it is not there, and never removed.
        conflict: what to say if another process holds the lock, such as "another merge is writing OUT".

    Raises:
        OutputLocked: another process holds the lock; the message is `conflict` and that process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if try_lock(descriptor, path.parent):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        else:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise OutputLocked(f"{conflict} ({holder or 'holder unknown'}).")
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
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            log.warning("%s is on a file system without locks: start no second process that writes there", folder)
        elif error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        else:
            raise
    return True
