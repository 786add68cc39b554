"""Files and folders that survive a crash of the machine: data are synced before a rename makes them visible.

A rename within one file system is atomic, but a file system may put the rename on the disk before the data. So
everything here syncs first and renames second. A reader sees the old state or the new one, never a part of either.
"""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsm_ds.errors import OutputExists
from wsm_ds.filesystem.own_files import create_anew, open_own


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Makes the OSErrors of the context name a file: those of a full disk name none by themselves.

    Args:
        path: the file that is written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data`; `os.pwrite` alone may write less.

    Args:
        descriptor: of a file that is open for writing.
        data: the bytes.
        offset: where they go in the file, in bytes.

    Raises:
        OSError: the disk is full, or fails.
    """
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def sync_file(path: Path) -> None:
    """Waits until a file's data are on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems refuse to sync a folder; they do it by themselves
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Makes a small file anew and syncs it. A reader may see no file, or a part of the text, meanwhile.

    If a link is there, it is replaced, and its target is left alone.

    Args:
        path: the file; folders above it are made.
        text: the content.

    Raises:
        OSError: the disk is full, or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors_name(path), os.fdopen(create_anew(path), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file in one write, and syncs it.

    Args:
        path: the file; it is made if it is missing.
        line: without a line break at its end.
    """
    descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, f"{line}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replaces a small file: a reader sees the old text or the new text, also after a crash.

    Only one process may replace the file at a time (the caller holds a lock). The new text is first written to
    `.NAME.new` in the same folder. The next call overwrites what a killed process has left there.

    Args:
        path: the file; folders above it are made.
        text: the new content.

    Raises:
        OSError: the disk is full, or fails.
    """
    new = path.with_name(f".{path.name}.new")
    write_text(new, text)
    new.replace(path)


def replace_shared_text(path: Path, text: str) -> None:
    """Replaces a small file that several processes may replace at once: a reader sees one of the texts, whole.

    The text is not synced: a rank replaces its heartbeat every second, and a sync on shared storage may take longer
    than that. After a crash of the storage the file may be empty.

    Args:
        path: the file; folders above it are made.
        text: the new content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        with errors_name(path), os.fdopen(create_anew(new), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)


def require_absent(out: Path) -> None:
    """Raises OutputExists if there is anything at `out`, a broken link included."""
    if out.exists() or out.is_symlink():
        raise OutputExists(f"{out} exists; nothing is ever overwritten. Remove it or choose another --out.")


def move_into_place(content: Path, out: Path) -> None:
    """Renames a folder to its final place, after its folders are synced. Its files must be synced already.

    Args:
        content: the folder to rename.
        out: the final place, on the same file system.

    Raises:
        OutputExists: something is at `out`.
    """
    # A sync of a file does not sync its name: the folder must be synced, too (man 2 fsync).
    for folder in [path for path in content.rglob("*") if path.is_dir()] + [content]:
        sync_folder(folder)
    require_absent(out)
    content.rename(out)
    sync_folder(out.parent)
