"""Small text files that are read whole: recipes, manifests, plans, `latest`."""

import os
import stat
from pathlib import Path

MOST_BYTES = 1 << 28
"""256 MiB. A manifest takes about 180 bytes for each output file, a merge's plan about 220 bytes for each source
file; so the plan of 64 checkpoints of 9 000 ranks is smaller."""


def read_small(path: Path, *, most_bytes: int | None = None, errors: str = "strict") -> str:
    """Reads a UTF-8 file, but not a huge one, and nothing that is not a file.

    A wrong path must not fill the memory, and a named pipe must not make the command wait for a writer.

    Args:
        path: the file.
        most_bytes: the most bytes that it may have; MOST_BYTES if None.
        errors: what to do with bytes that are not UTF-8, as in `bytes.decode`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, is larger than `most_bytes`, or is not UTF-8.
    """
    limit = MOST_BYTES if most_bytes is None else most_bytes
    # Without O_NONBLOCK, to open a named pipe waits until another process writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file but a folder, a pipe or a device")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit} bytes"
        raise ValueError(f"{path} is larger than {size}")
    return data.decode(errors=errors)
