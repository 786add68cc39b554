"""Copies that take no disk space: on XFS, Btrfs and others, two files can share blocks (reflinks)."""

import errno
import fcntl
import os
import struct

FICLONERANGE = 0x4020940D
"""_IOW(0x94, 13, struct file_clone_range), `linux/fs.h`."""
NOT_POSSIBLE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
"""Errors that mean: copy the bytes instead."""


def clone_range(source: int, source_offset: int, target: int, offset: int, nbytes: int) -> tuple[int, int] | None:
    """Lets a range of the open file `target` share the disk blocks of a range of `source`.

    Only whole blocks of the file system can be shared. The caller copies the bytes before and after them.

    Args:
        source: descriptor of the file to read.
        source_offset: where the range begins in `source`, in bytes.
        target: descriptor of the file to change.
        offset: where the range begins in `target`, in bytes.
        nbytes: length of the range.

    Returns:
        [begin, end) in `target` of the bytes that are shared now. None if the file system cannot share them, if the
        two ranges do not begin at the same offset within a block, or if no whole block lies in them.

    Raises:
        OSError: an error of the disk.
    """
    # The ioctl refuses ranges that do not begin and end at block borders (man 2 ioctl_ficlonerange).
    block = os.fstat(target).st_blksize
    begin, end = -(-offset // block) * block, (offset + nbytes) // block * block
    if begin >= end or (source_offset - offset) % block:
        return None
    request = struct.pack("=qQQQ", source, source_offset + begin - offset, end - begin, begin)
    try:
        fcntl.ioctl(target, FICLONERANGE, request)
    except OSError as error:
        if error.errno in NOT_POSSIBLE:
            return None
        raise
    return begin, end
