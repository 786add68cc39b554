"""Writes bytes of staged files and has them hashed on the way."""

import os
import time

from wsm_ds.engine.open_files import File, OpenFiles
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.engine.timings import Timings
from wsm_ds.filesystem.durable import write_all
from wsm_ds.filesystem.own_files import NO_LINKS
from wsm_ds.filesystem.reflink import clone_range


class Writer:
    """The sink of a worker of a merge: writes to staged files for one thread.

    Args:
        files: the staged files, which all threads share.
        open_files: the pool of open files, which opens outputs by `open_output`.
        timings: of this thread; the seconds of hashing and writing are added to them.
    """

    def __init__(self, files: StagedFiles, open_files: OpenFiles, timings: Timings) -> None:
        self.files, self.open_files, self.timings = files, open_files, timings

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Writes bytes of an output file, and seals the blocks that they complete.

        Args:
            number: of the output file in the plan.
            offset: of `data` in that file, in bytes.
            data: the bytes.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        self._write(number, offset, data, (offset, offset))

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """Writes bytes that are copied from an input. Where the file system can, both files share its blocks.

        Args:
            number: of the output file in the plan.
            offset: of `data` in that file, in bytes.
            data: the bytes.
            source: open descriptor of the input.
            source_offset: of the same bytes in the input.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        began_s = time.perf_counter()
        with self.open_files.use(File("output", number)) as (descriptor,):
            shared = clone_range(source, source_offset, descriptor, offset, len(data))
        self.timings.write_s += time.perf_counter() - began_s
        self._write(number, offset, data, shared or (offset, offset))

    def _write(self, number: int, offset: int, data: memoryview, shared: tuple[int, int]) -> None:
        """Hashes all of `data`, and writes it except for the range `shared`, whose bytes the file already has."""
        blocks = list(self.files.hash_data(number, offset, data, self.timings))
        began_s = time.perf_counter()
        with self.open_files.use(File("output", number)) as (descriptor,):
            write_all(descriptor, data[: shared[0] - offset], offset)
            write_all(descriptor, data[shared[1] - offset :], shared[1])
        self.timings.write_s += time.perf_counter() - began_s
        for block, nbytes in blocks:
            self.files.mark_written(number, block, nbytes, self.timings)


def open_output(files: StagedFiles, file: File) -> int:
    """Opens an output of a plan to write it, and returns its descriptor."""
    return os.open(files.paths[file.number], os.O_RDWR | os.O_CLOEXEC | NO_LINKS)
