"""Blocks of output files, and the checksums that tell whether a block is finished: its seal.

An output file is cut into blocks of BLOCK_BYTES. The bytes of a block are hashed while they are written, so that no
file is read again to get its checksum. The digests of all blocks together give the file's checksum in the manifest
(`filesystem.checksum`).

A file that torch writes is a zip archive, which holds the CRC-32 of each of its entries. These CRC-32s are known only
when all bytes of the entry are. Seals therefore count the bytes of a CRC-32 as zeros and hold the CRC-32 of the part
of each entry that lies in the block. `CrcFields.values` joins these CRC-32s when all blocks are sealed.
"""

import os
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wsm_ds.engine import crc32
from wsm_ds.engine.tasks import BLOCK_BYTES
from wsm_ds.filesystem import checksum
from wsm_ds.planning.intersect import Ints
from wsm_ds.planning.plan import CrcField, OutputFile

READ_BYTES = 1 << 18
CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class Seal:
    """The checksums of a finished block.

    Attributes:
        digest: `checksum.Hasher` of the block's bytes, with zeros in place of the zip's CRC-32s.
        crcs: one CRC-32 for each CRC field of the file that overlaps the block, in the order of `CrcFields`; it is the
            CRC-32 of the overlap.
    """

    digest: bytes
    crcs: tuple[int, ...]


def block_count(output_file: OutputFile) -> int:
    """Number of blocks of a file. An empty file has none."""
    return -(-output_file.nbytes // BLOCK_BYTES)


def block_range(output_file: OutputFile, block: int) -> tuple[int, int]:
    """[begin, end) of a block, in bytes of the file. The last block may be shorter than the others."""
    return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, output_file.nbytes)


def block_sizes(output_file: OutputFile) -> Ints:
    """Bytes of each block of a file, shape [block_count]."""
    sizes = np.full(block_count(output_file), BLOCK_BYTES, dtype=np.int64)
    if len(sizes):
        sizes[-1] = output_file.nbytes - (len(sizes) - 1) * BLOCK_BYTES
    return sizes


def block_of(offset: int) -> int:
    """Number of the block that the byte at `offset` of a file lies in."""
    return offset // BLOCK_BYTES


class CrcFields:
    """The CRC-32 fields of one output file, sorted so that those of a block are found by bisection.

    Attributes:
        output_file: the file.
        fields: fields that cover at least one byte, by rising offset. They do not overlap.
        begins: first byte that each of `fields` covers.
        ends: byte behind the last one that each of `fields` covers.
        filled_bytes: offset of every byte of the file that will hold a byte of a CRC-32, sorted.
    """

    def __init__(self, output_file: OutputFile) -> None:
        self.output_file = output_file
        self.fields = sorted((field for field in output_file.crc_fields if field.nbytes), key=lambda crc: crc.offset)
        self.begins = [field.offset for field in self.fields]
        self.ends = [field.offset + field.nbytes for field in self.fields]
        self.filled_bytes = sorted(
            offset + byte
            for field in output_file.crc_fields
            for offset in field.crc_offsets
            for byte in range(CRC_BYTES)
        )

    def overlapping(self, begin: int, end: int) -> range:
        """Numbers of the fields that cover a byte of [begin, end) of the file."""
        return range(bisect_right(self.ends, begin), bisect_left(self.begins, end))

    def values(self, seals: Sequence[Seal]) -> dict[CrcField, int]:
        """The CRC-32 of every field that covers a byte.

        Args:
            seals: of all blocks of the file, in order.
        """
        crcs = [0] * len(self.fields)
        for block, seal in enumerate(seals):
            block_begin, block_end = block_range(self.output_file, block)
            for number, crc in zip(self.overlapping(block_begin, block_end), seal.crcs, strict=True):
                begin, end = max(self.begins[number], block_begin), min(self.ends[number], block_end)
                crcs[number] = crc32.combine(crcs[number], crc, end - begin)
        return dict(zip(self.fields, crcs, strict=True))


class BlockHasher:
    """Makes the seal of a block from its bytes, which come in order, a range at a time.

    Attributes:
        offset: where the next byte to come lies in the file.
        end: offset in the file where the block ends.
    """

    def __init__(self, crc_fields: CrcFields, block: int) -> None:
        self.crc_fields = crc_fields
        self.offset, self.end = block_range(crc_fields.output_file, block)
        self.hasher = checksum.Hasher()
        self.fields = crc_fields.overlapping(self.offset, self.end)
        self.crcs = [0] * len(self.fields)

    def update(self, data: memoryview) -> None:
        """Adds the bytes at `offset`. They must not go beyond the block."""
        begin, end = self.offset, self.offset + len(data)
        for index, number in enumerate(self.fields):
            low, high = max(self.crc_fields.begins[number], begin), min(self.crc_fields.ends[number], end)
            if low < high:
                self.crcs[index] = zlib.crc32(data[low - begin : high - begin], self.crcs[index])
        filled = self.crc_fields.filled_bytes
        first, last = bisect_left(filled, begin), bisect_left(filled, end)
        if first < last:
            masked = bytearray(data)
            for offset in filled[first:last]:
                masked[offset - begin] = 0
            data = memoryview(masked)
        self.hasher.update(data)
        self.offset = end

    def seal(self) -> Seal:
        """The seal of the bytes so far."""
        return Seal(self.hasher.digest(), tuple(self.crcs))


def read_seal(descriptor: int, crc_fields: CrcFields, block: int) -> Seal:
    """Reads a block of an open staged file again and returns its seal.

    Raises:
        OSError: the file ends before the block does; the message has the byte.
    """
    block_hasher = BlockHasher(crc_fields, block)
    for data in _read_range(descriptor, block_hasher.offset, block_hasher.end):
        block_hasher.update(data)
    return block_hasher.seal()


def read_digest(descriptor: int, output_file: OutputFile, block: int) -> bytes:
    """Reads a block of an open staged file again and returns the digest of its bytes as they are.

    Raises:
        OSError: the file ends before the block does; the message has the byte.
    """
    hasher = checksum.Hasher()
    for data in _read_range(descriptor, *block_range(output_file, block)):
        hasher.update(data)
    return hasher.digest()


def _read_range(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes [begin, end), at most READ_BYTES at a time. Each yielded view is valid until the next one."""
    buffer = memoryview(bytearray(min(READ_BYTES, end - begin)))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if count == 0:
            raise OSError(
                f"a staged file ends at byte {begin}, before the end of a block at byte {end}: another process has "
                "truncated it. Start the merge again."
            )
        yield buffer[:count]
        begin += count
