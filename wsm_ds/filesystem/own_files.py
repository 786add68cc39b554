"""Files and folders that only this tool writes. What another user has put in their place is refused, never followed.

In a folder where others may write (/tmp, a shared scratch folder), somebody else can be first to make a name that this
tool is about to use: as a link to one of the user's own files, as a pipe, or as a folder of theirs.
"""

import errno
import logging
import os
import stat
import tempfile
from pathlib import Path

from wsm_ds.errors import UnsafePath

log = logging.getLogger(__name__)

NO_LINKS = os.O_NOFOLLOW | os.O_CLOEXEC
PRIVATE = 0o700
NOT_A_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What opening a link, a folder, and a pipe without a reader gives."""


def open_own(path: Path, flags: int) -> int:
    """Opens a file that only this tool writes. The caller must not pass O_TRUNC: the file is checked after it is open.

    Args:
        path: the file; with O_CREAT it is made with the mode that the umask allows.
        flags: of `os.open`.

    Raises:
        UnsafePath: a link, a pipe, a folder or a file with a second name (a hard link) is there.
        OSError: the file cannot be opened.
    """
    try:
        # Without O_NONBLOCK, to open a pipe waits for another process.
        descriptor = os.open(path, flags | NO_LINKS | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in NOT_A_FILE:
            raise _not_a_file(path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise _not_a_file(path)
    return descriptor


def _not_a_file(path: Path) -> UnsafePath:
    return UnsafePath(
        f"{path} is a link, or no regular file, where a plain file of this tool belongs. Nothing was written through "
        "it. Find out who made it, remove it, and run the same command again."
    )


def create_anew(path: Path) -> int:
    """Makes a file and opens it for writing. What was there under this name is removed, a link and not its target.

    Raises:
        OSError: the file cannot be made, or what is there cannot be removed.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666)


def make_private(folder: Path) -> None:
    """Makes a folder that only this user can enter (mode 0700), or makes sure that an existing one is such a folder.

    Args:
        folder: on the file system of the folder above it.

    Raises:
        UnsafePath: a link is there, or a folder of another user, of another file system, or one that everybody can
            write to.
        OSError: the folder cannot be made.
    """
    is_new = True
    try:
        folder.mkdir(mode=PRIVATE)
    except FileExistsError:
        is_new = False
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | NO_LINKS)
    except OSError as error:
        # Linux gives ENOTDIR for a link.
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise UnsafePath(f"{folder} is a link, or no folder. Remove it, and run the same command again.") from error
        if error.errno == errno.EACCES:
            raise UnsafePath(f"{folder} {_of_another(folder.lstat().st_uid)}") from error
        raise
    try:
        _require_private(folder, descriptor, is_new)
    finally:
        os.close(descriptor)


def _require_private(folder: Path, descriptor: int, is_new: bool) -> None:
    status = os.fstat(descriptor)
    # Root on an NFS export with root_squash owns what it makes under another user's number.
    if not is_new and status.st_uid != os.geteuid() and status.st_uid != _owner_of_new(folder.parent):
        raise UnsafePath(f"{folder} {_of_another(status.st_uid)}")
    if status.st_dev != folder.parent.stat().st_dev:
        raise UnsafePath(
            f"{folder} is on another file system than {folder.parent}, so nothing can be renamed from it into place. "
            "Remove it, and run the same command again."
        )
    if not is_new and status.st_mode & stat.S_IWOTH:
        raise UnsafePath(
            f"{folder} can be written by everybody, so nobody knows whose its content is. Remove it, and run the same "
            "command again."
        )
    if stat.S_IMODE(status.st_mode) & 0o777 != PRIVATE:
        _make_mode_private(folder, descriptor, status.st_mode)


def _of_another(uid: int) -> str:
    return (
        f"belongs to user {uid}, and this process runs as user {os.geteuid()}. Let that user finish or remove it, or "
        "choose another --out."
    )


def _owner_of_new(folder: Path) -> int:
    """The user to whom a folder belongs that this process makes in `folder`."""
    made = Path(tempfile.mkdtemp(prefix=".wsm-owner-", dir=folder))
    try:
        return made.stat().st_uid
    finally:
        made.rmdir()


def _make_mode_private(folder: Path, descriptor: int, mode: int) -> None:
    # The group of a set-group-ID folder goes on to what is made in it, so that bit stays.
    try:
        os.fchmod(descriptor, (mode & 0o7000) | PRIVATE)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EINVAL):
            raise
    if os.fstat(descriptor).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning("%s is on a file system without access modes: others may be able to change what is staged", folder)
