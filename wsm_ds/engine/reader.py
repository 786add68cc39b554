"""Reads whole ranges of input files, and tries again when a network file system fails for a moment."""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress

from wsm_ds.engine.open_files import File, OpenFiles
from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.filesystem.read_ahead import read_ahead
from wsm_ds.planning.plan import InputFile

log = logging.getLogger(__name__)

TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""Errors that NFS, Lustre and GPFS give while a server fails over."""
PAUSES_S = (0.1, 0.5, 2.0, 8.0)
"""Pauses before the second, third, ... attempt to read a range after such an error."""


class Reader:
    """Reads the inputs of a plan. Several threads share it.

    Args:
        inputs: the plan's inputs. A file is named by its number in them.
        files: the pool of open files, which opens inputs by `open_input`.
    """

    def __init__(self, inputs: Sequence[InputFile], files: OpenFiles) -> None:
        self.inputs, self.files = inputs, files

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes at `offset` of an input.

        Errors in TRANSIENT are logged, and the range is read again after each of PAUSES_S.

        Args:
            file: number of the input.
            offset: in bytes.
            into: writable memory; its length is the number of bytes to read.

        Raises:
            BrokenCheckpoint: the file is gone, or it ends too early; the message names the file.
            OSError: the file cannot be read, and the pauses did not help.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return self._read(file, offset, into)
            except FileNotFoundError as error:
                raise BrokenCheckpoint(
                    f"{self.inputs[file].path} vanished while it was read. Does a clean-up of old checkpoints run?"
                ) from error
            except OSError as error:
                if error.errno not in TRANSIENT or pause_s is None:
                    raise
                log.warning("%s: %s; reading it again in %g s", self.inputs[file].path, error.strerror, pause_s)
                time.sleep(pause_s)
                self._renew(file)
        raise AssertionError

    def read_all(self, ranges: Sequence[tuple[int, int, memoryview]]) -> None:
        """Fills memory with several ranges. Many of them are read at once, and their files are opened at once.

        Args:
            ranges: number of the input, byte offset, and the memory to fill.

        Raises:
            BrokenCheckpoint, OSError: see `read`.
        """
        files = list(dict.fromkeys(file for file, _, _ in ranges))
        for first in range(0, len(files), self.most_open_files):
            with suppress(OSError), self.descriptors(files[first : first + self.most_open_files]):
                pass  # an error comes again where the file is read, and is handled there
        deque(read_ahead(lambda wanted: self.read(*wanted), ranges, self.files.reading_threads), maxlen=0)

    @property
    def most_open_files(self) -> int:
        """Number of inputs that may be open at the same time."""
        return self.files.limit

    def descriptors(self, files: Sequence[int]) -> AbstractContextManager[list[int]]:
        """The open descriptors of inputs, for the compiled kernel and for sharing blocks on the disk.

        They stay valid while the context runs. It raises OSError if a file cannot be opened.

        Args:
            files: numbers of at most `most_open_files` inputs.
        """
        return self.files.use(*(File("input", file) for file in files))

    def will_read(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Tells the operating system to fetch ranges of inputs into the page cache in the background.

        The files are opened together. If there are more of them than may be open, the last ones are left out.

        Args:
            ranges: number of the input, byte offset, length in bytes.

        Raises:
            OSError: a file cannot be opened.
        """
        files = list(dict.fromkeys(file for file, _, _ in ranges))[: self.most_open_files]
        with self.descriptors(files) as opened:
            descriptors = dict(zip(files, opened, strict=True))
            for file, offset, nbytes in ranges:
                if file in descriptors:
                    os.posix_fadvise(descriptors[file], offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _renew(self, file: int) -> None:
        """Opens an input again: after ESTALE the old descriptor never works again."""
        # If that fails, the next attempt to read says why.
        with suppress(OSError), self.descriptors([file]):
            self.files.renew(File("input", file))

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        with self.descriptors([file]) as (descriptor,):
            done = 0
            while done < len(into):
                # One call returns at most 2 GiB (man 2 read), and less on some network file systems.
                count = os.preadv(descriptor, [into[done:]], offset + done)
                if count == 0:
                    raise BrokenCheckpoint(
                        f"{self.inputs[file].path} ends at byte {offset + done}, expected {offset + len(into)} bytes "
                        "or more: it was truncated while it was read."
                    )
                done += count


def open_input(inputs: Sequence[InputFile], file: File) -> int:
    """Opens an input of a plan to read it, and returns its descriptor."""
    return os.open(inputs[file.number].path, os.O_RDONLY | os.O_CLOEXEC)


def check_unchanged(inputs: Sequence[InputFile]) -> None:
    """Checks that no input has changed since the plan was made.

    Raises:
        BrokenCheckpoint: the size or a time of an input differs, or the input is gone; the message names the file.
    """
    for source, found in zip(inputs, read_ahead(_state, inputs), strict=True):
        if found is None:
            raise BrokenCheckpoint(f"{source.path} vanished while it was read; nothing was published.")
        if found != (source.nbytes, source.mtime_ns, source.ctime_ns):
            raise BrokenCheckpoint(
                f"{source.path} changed while it was read; nothing was published. It was written to or replaced, or "
                "its mode, owner or number of names changed. Merge again when no process changes it."
            )


def _state(source: InputFile) -> tuple[int, int, int] | None:
    """Size and times of an input as they are now; None if it is gone."""
    try:
        status = source.path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
