"""Writes staged files."""

import os
import time
from collections import OrderedDict

from wsm_ds.engine.staged_files import OPEN_FILES, StagedFiles, write_all
from wsm_ds.engine.timings import Timings
from wsm_ds.filesystem.reflink import clone_range


class Writer:
    """Open staged files of one thread, the least recently used closed first."""

    def __init__(self, files: StagedFiles, timings: Timings) -> None:
        self.files, self.timings = files, timings
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Writes bytes of an output file, hashes them on the way, and seals the blocks that they complete."""
        self._put(number, offset, data, (offset, offset))

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """The same; blocks of the file system that can be shared with the open `source` are, instead of written."""
        begun = time.perf_counter()
        shared = clone_range(source, source_offset, self._descriptor(number), offset, len(data))
        self.timings.write_s += time.perf_counter() - begun
        self._put(number, offset, data, shared or (offset, offset))

    def _put(self, number: int, offset: int, data: memoryview, there: tuple[int, int]) -> None:
        """Writes what of `data` is not in the range `there`, and counts all of it."""
        descriptor = self._descriptor(number)
        blocks = list(self.files.note(number, offset, data, self.timings))
        begun = time.perf_counter()
        write_all(descriptor, data[: there[0] - offset], offset)
        write_all(descriptor, data[there[1] - offset :], there[1])
        self.timings.write_s += time.perf_counter() - begun
        for index, nbytes in blocks:
            self.files.wrote(number, index, nbytes, self.timings)

    def _descriptor(self, number: int) -> int:
        if number in self.descriptors:
            self.descriptors.move_to_end(number)
            return self.descriptors[number]
        if len(self.descriptors) >= OPEN_FILES:
            os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors[number] = os.open(self.files.paths[number], os.O_RDWR)
        return self.descriptors[number]
