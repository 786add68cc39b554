"""The parts of a torch file that say what is in it: its directory at the end, and its pickle at the beginning.

torch writes `data.pkl` first and the zip's directory last. So two or three reads give both, of a file of any size.
"""

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import BrokenCheckpoint

CENTRAL_ENTRY = struct.Struct("<4s6H3I5H2I")
END, END64, LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
SMALL_FILE_BYTES = 1 << 19
"""A file of at most this size is read whole, in one read. So are most model files of ZeRO stage 3."""
TAIL_BYTES = 1 << 15
"""Bytes that are read first from the end of a larger file. An entry of the directory has about 80."""
HEAD_BYTES = 1 << 12
"""Bytes of the small records that follow `data.pkl`, and of their headers."""
MOST_DIRECTORY_BYTES = 1 << 28
"""256 MiB. A checkpoint's file has about as many entries as tensors."""
MOST_PICKLE_BYTES = 1 << 27


@dataclass(frozen=True)
class RawFile:
    """Bytes of a torch file, as few as its metadata needs.

    Attributes:
        path: of the file.
        nbytes: its size.
        mtime_ns, ctime_ns: its times before anything was read from it.
        head: its first bytes.
        tail: its last bytes; the same object as `head` if that is the whole file.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    head: bytes
    tail: bytes

    @property
    def tail_begin(self) -> int:
        """Offset of the first byte of `tail`."""
        return self.nbytes - len(self.tail)

    @property
    def first_record_bytes(self) -> int:
        """Length of the record that is first in the directory, which is `data.pkl`; 0 if nothing says it."""
        if self.nbytes < END.size:
            return 0
        return _first_record_bytes(self.tail, self.nbytes, _directory_begin(self.tail, self.nbytes))

    def has(self, begin: int, end: int) -> bool:
        """Whether the bytes [begin, end) were read."""
        return 0 <= begin <= end and (end <= len(self.head) or (self.tail_begin <= begin and end <= self.nbytes))

    def between(self, begin: int, end: int) -> bytes:
        """Returns the bytes [begin, end). Those that were not read yet are read now.

        Raises:
            BrokenCheckpoint: the file ends before `end`.
        """
        if end <= len(self.head):
            return self.head[begin:end]
        if begin >= self.tail_begin:
            return self.tail[begin - self.tail_begin : end - self.tail_begin]
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(self.path, descriptor, begin, end)
        finally:
            os.close(descriptor)


def read_raw(path: Path) -> RawFile:
    """Reads the beginning and the end of a torch file: its pickle and its zip directory, if it has them there.

    Raises:
        BrokenCheckpoint: it is not a regular file, or it becomes shorter while it is read.
        OSError: it cannot be read.
    """
    # A pipe would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenCheckpoint(f"{path} is not a regular file but a folder, a pipe or a device.")
        nbytes = status.st_size
        tail = _read(path, descriptor, 0 if nbytes <= SMALL_FILE_BYTES else nbytes - TAIL_BYTES, nbytes)
        head = tail
        if nbytes > SMALL_FILE_BYTES:
            begin = _directory_begin(tail, nbytes)
            if max(0, nbytes - MOST_DIRECTORY_BYTES) <= begin < nbytes - len(tail):
                tail = _read(path, descriptor, begin, nbytes)
            head = _read(path, descriptor, 0, min(_head_end(tail, nbytes, begin), nbytes))
        return RawFile(path, nbytes, status.st_mtime_ns, status.st_ctime_ns, head, tail)
    finally:
        os.close(descriptor)


def _directory_begin(tail: bytes, nbytes: int) -> int:
    """Where the directory seems to begin; `nbytes` if nothing says it. `archive` checks what it says."""
    *_, begin, _ = END.unpack(tail[-END.size :])
    end64 = len(tail) - END.size - LOCATOR64.size - END64.size
    if begin == 0xFFFFFFFF and tail[end64 : end64 + 4] == b"PK\x06\x06":
        begin = END64.unpack_from(tail, end64)[-1]
    return int(begin) if begin < nbytes else nbytes


def _head_end(tail: bytes, nbytes: int, begin: int) -> int:
    """Where the first record ends, which is `data.pkl`, and the small records that follow it."""
    size = _first_record_bytes(tail, nbytes, begin)
    return HEAD_BYTES + (size if size <= MOST_PICKLE_BYTES else 0)


def _first_record_bytes(tail: bytes, nbytes: int, begin: int) -> int:
    """Length of the record that is first in a directory; 0 if nothing says it."""
    entry = begin - (nbytes - len(tail))
    if 0 <= entry <= len(tail) - CENTRAL_ENTRY.size and tail[entry : entry + 4] == b"PK\x01\x02":
        size: int = CENTRAL_ENTRY.unpack_from(tail, entry)[9]
        return size
    return 0


def _read(path: Path, descriptor: int, begin: int, end: int) -> bytes:
    data = os.pread(descriptor, end - begin, begin)
    while len(data) < end - begin:  # a network file system may give less at a time
        more = os.pread(descriptor, end - begin - len(data), begin + len(data))
        if not more:
            raise BrokenCheckpoint(f"{path} ends at byte {begin + len(data)}, expected {end}: it changes now.")
        data += more
    return data
