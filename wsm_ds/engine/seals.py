"""Checksums of the blocks of output files."""

import zlib
from bisect import bisect_left, bisect_right

import numpy as np

from wsm_ds.engine.journal import Seal
from wsm_ds.engine.tasks import BLOCK_BYTES
from wsm_ds.filesystem import checksum
from wsm_ds.planning.intersect import Ints
from wsm_ds.planning.plan import OutputFile


def block_count(output: OutputFile) -> int:
    """Blocks of a file; an empty one has none."""
    return -(-output.nbytes // BLOCK_BYTES)


def block_range(output: OutputFile, index: int) -> tuple[int, int]:
    """[begin, end) in bytes of a block."""
    return index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, output.nbytes)


def block_sizes(output: OutputFile) -> Ints:
    """Bytes of each block of a file, shape [block_count]."""
    sizes = np.full(block_count(output), BLOCK_BYTES, dtype=np.int64)
    if len(sizes):
        sizes[-1] = output.nbytes - (len(sizes) - 1) * BLOCK_BYTES
    return sizes


def block_of(offset: int) -> int:
    """Number of the block that a byte lies in."""
    return offset // BLOCK_BYTES


class Fingerprint:
    """The seal of a block, from its bytes in order."""

    def __init__(self, file: "CrcFields", output: OutputFile, index: int) -> None:
        self.file = file
        self.position, self.end = block_range(output, index)
        self.hasher = checksum.Hasher()
        first = bisect_right(file.ends, self.position)
        last = bisect_left(file.begins, self.end)
        self.fields = range(first, last)
        self.crcs = [0] * len(self.fields)

    def update(self, data: memoryview) -> None:
        """Takes the bytes that follow."""
        begin, end = self.position, self.position + len(data)
        for number, index in enumerate(self.fields):
            low, high = max(self.file.begins[index], begin), min(self.file.ends[index], end)
            if low < high:
                self.crcs[number] = zlib.crc32(data[low - begin : high - begin], self.crcs[number])
        places = self.file.places
        first, last = bisect_left(places, begin), bisect_left(places, end)
        if first < last:
            masked = bytearray(data)
            for place in places[first:last]:
                masked[place - begin] = 0
            data = memoryview(masked)
        self.hasher.update(data)
        self.position = end

    def seal(self) -> Seal:
        """What the block is known by."""
        return Seal(self.hasher.digest(), tuple(self.crcs))


class CrcFields:
    """An output file's CRC fields by offset, and the bytes that will hold CRC-32s."""

    def __init__(self, output: OutputFile) -> None:
        self.crcs = sorted((crc for crc in output.crc_fields if crc.nbytes), key=lambda crc: crc.offset)
        self.begins = [crc.offset for crc in self.crcs]
        self.ends = [crc.offset + crc.nbytes for crc in self.crcs]
        self.places = sorted(place + byte for crc in output.crc_fields for place in crc.positions for byte in range(4))
