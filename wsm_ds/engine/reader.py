"""Reads input files: whole ranges, never less than asked, and again after passing faults of network file systems."""

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.planning.plan import InputFile

log = logging.getLogger(__name__)

OPEN_FILES = 64
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""What NFS, Lustre and GPFS answer while a server fails over."""
PAUSES_S = (0.1, 0.5, 2.0, 8.0)


class Reader:
    """Open input files of one thread, the least recently used closed first."""

    def __init__(self, inputs: Sequence[InputFile]) -> None:
        self.inputs = inputs
        self.nbytes = 0
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes at `offset` of an input.

        Raises:
            BrokenCheckpoint: the file is gone, or ends before.
            OSError: it cannot be read, again and again.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                self._read(file, offset, into)
                return self.note(file, offset, len(into))
            except FileNotFoundError as error:
                raise BrokenCheckpoint(f"{self.inputs[file].path} vanished while it was read.") from error
            except OSError as error:
                if error.errno not in TRANSIENT or pause_s is None:
                    raise
                log.warning("%s: %s; reading it again in %g s", self.inputs[file].path, error.strerror, pause_s)
                self._close(file)
                time.sleep(pause_s)
        raise AssertionError

    def descriptor(self, file: int) -> int:
        """The open file, for others to read from; valid until so many other files were opened."""
        return self._descriptor(file)

    def note(self, file: int, offset: int, nbytes: int) -> None:
        """Counts bytes at `offset` of an input that were read, here or through `descriptor`."""
        self.nbytes += nbytes

    def will_read(self, file: int, offset: int, nbytes: int) -> None:
        """Tells the kernel to fetch a range ahead."""
        os.posix_fadvise(self._descriptor(file), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        descriptor = self._descriptor(file)
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if count == 0:
                raise BrokenCheckpoint(f"{self.inputs[file].path} ends at byte {offset + done}; it was cut off.")
            done += count

    def _descriptor(self, file: int) -> int:
        if file in self.descriptors:
            self.descriptors.move_to_end(file)
            return self.descriptors[file]
        if len(self.descriptors) >= OPEN_FILES:
            self._close(next(iter(self.descriptors)))
        self.descriptors[file] = os.open(self.inputs[file].path, os.O_RDONLY)
        return self.descriptors[file]

    def _close(self, file: int) -> None:
        descriptor = self.descriptors.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)


def check_unchanged(inputs: Sequence[InputFile]) -> None:
    """Raises BrokenCheckpoint if an input's size or time of change is no longer what the plan saw."""
    for source in inputs:
        try:
            now = source.path.stat()
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{source.path} vanished while it was read; nothing was published.") from error
        if (now.st_size, now.st_mtime_ns) != (source.nbytes, source.mtime_ns):
            raise BrokenCheckpoint(f"{source.path} changed while it was read; nothing was published.")
