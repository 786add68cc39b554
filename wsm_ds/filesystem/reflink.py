"""Carried bytes without copying: on file systems that share extents (XFS, Btrfs, …) files may have blocks in common."""

import errno
import fcntl
import os
import struct

FICLONERANGE = 0x4020940D
"""_IOW(0x94, 13, struct file_clone_range), `linux/fs.h`."""
NOT_HERE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)


def clone_range(source: int, source_offset: int, target: int, offset: int, nbytes: int) -> tuple[int, int] | None:
    """Makes bytes of the open file `target` those of `source`, sharing their blocks on the disk.

    Returns:
        [begin, end) in `target` of what is shared: whole blocks of the file system inside the range. None if the file
        system cannot do it, or no whole block lies in the range at the same place within a block on both sides.
    """
    block = os.fstat(target).st_blksize
    begin, end = -(-offset // block) * block, (offset + nbytes) // block * block
    if begin >= end or (source_offset - offset) % block:
        return None
    request = struct.pack("=qQQQ", source, source_offset + begin - offset, end - begin, begin)
    try:
        fcntl.ioctl(target, FICLONERANGE, request)
    except OSError as error:
        if error.errno in NOT_HERE:
            return None
        raise
    return begin, end
