"""The bytes of a new torch zip, around records whose data and CRC-32 are not known yet.

The format is torch's own (`caffe2/serialize/inline_container.cc`): stored records, data aligned to 64 bytes, sizes and
CRC-32 in data descriptors and in the central directory, zip64 where a size or an offset needs it (PKWARE APPNOTE
6.3.9).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
LOCAL_HEADER_BYTES, CENTRAL_ENTRY_BYTES = 30, 46
"""What comes before a record's name in its local header and in the central directory (APPNOTE 4.3.7, 4.3.12)."""
LIMIT32 = 0xFFFFFFFF
PADDING_TAG = 0x4246  # "FB", as torch writes it


@dataclass(frozen=True, slots=True)
class PlacedRecord:
    """Where a record lies in the new zip.

    Attributes:
        name: of the record, without the root folder.
        offset: of its first byte.
        nbytes: its length.
        crc_offsets: where its CRC-32 belongs.
    """

    name: str
    offset: int
    nbytes: int
    crc_offsets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ZipFrame:
    """A zip without the records' data.

    Attributes:
        nbytes: length of the whole file.
        records: where each record's data and CRC-32 belong.
        literals: (file offset, bytes) of headers, descriptors and directory; their CRC-32 fields are zero.
        root_offsets: where the name of the root folder is written, in the file, rising.
    """

    nbytes: int
    records: tuple[PlacedRecord, ...]
    literals: tuple[tuple[int, bytes], ...]
    root_offsets: NDArray[np.int64]

    def with_root(self, root: str) -> Iterator[tuple[int, bytes]]:
        """Returns the literals of the zip whose root folder has another name.

        Args:
            root: the name. It has as many bytes in UTF-8 as the one that the frame was made with.
        """
        name = np.frombuffer(root.encode(), np.uint8)
        for offset, literal in self.literals:
            data = np.frombuffer(literal, np.uint8).copy()
            low, high = np.searchsorted(self.root_offsets, [offset, offset + len(literal)])
            data[self.root_offsets[low:high, None] - offset + np.arange(len(name))] = name
            yield offset, data.tobytes()


def frame(root: str, sizes: dict[str, int]) -> ZipFrame:
    """Lays out a zip.

    Args:
        root: the folder in the zip that holds all records.
        sizes: bytes of each record by its name, in the order of the file.
    """
    literals, records, headers, root_offsets = [(0, bytearray())], [], [], []
    position = 0
    for name, nbytes in sizes.items():
        header_offset, full = position, f"{root}/{name}".encode()
        header = _local_header(full, position)
        literals[-1][1].extend(header)
        root_offsets.append(header_offset + LOCAL_HEADER_BYTES)
        position += len(header)
        if nbytes:  # the descriptor of an empty record follows its header: one literal holds both
            literals.append((position + nbytes, bytearray()))
        descriptor = struct.pack("<4sI" + ("QQ" if nbytes >= LIMIT32 else "II"), b"PK\x07\x08", 0, nbytes, nbytes)
        literals[-1][1].extend(descriptor)
        headers.append((full, nbytes, header_offset))
        records.append((name, position, nbytes))
        position += nbytes + len(descriptor)
    central_crcs, directory = [], bytearray()
    for full, nbytes, header_offset in headers:
        # The CRC-32 is at byte 16 of an entry of the central directory (APPNOTE 4.3.12).
        central_crcs.append(position + len(directory) + 16)
        root_offsets.append(position + len(directory) + CENTRAL_ENTRY_BYTES)
        directory += _central_entry(full, nbytes, header_offset)
    directory += _end(len(headers), len(directory), position)
    literals[-1][1].extend(directory)
    placed = tuple(
        PlacedRecord(name, offset, nbytes, (offset + nbytes + 4, central))
        for (name, offset, nbytes), central in zip(records, central_crcs, strict=True)
    )
    nbytes = position + len(directory)
    return ZipFrame(nbytes, placed, tuple((o, bytes(data)) for o, data in literals), np.array(root_offsets, np.int64))


def _local_header(name: bytes, position: int) -> bytes:
    # 30 bytes of local header and 4 of the extra field come before the padding (`PyTorchStreamWriter` aligns so that
    # a reader can map the file and use the data in place).
    start = position + LOCAL_HEADER_BYTES + len(name) + 4
    padding = b"Z" * (-start % ALIGNMENT)
    extra = struct.pack("<2H", PADDING_TAG, len(padding)) + padding
    # 0x808: a data descriptor follows, and the name is UTF-8 (APPNOTE 4.4.4).
    return struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _central_entry(name: bytes, nbytes: int, header_offset: int) -> bytes:
    # APPNOTE 4.5.3: the zip64 extra field holds only the values that do not fit their 32-bit fields, in this order.
    large = b""
    if nbytes >= LIMIT32:
        large += struct.pack("<QQ", nbytes, nbytes)
    if header_offset >= LIMIT32:
        large += struct.pack("<Q", header_offset)
    extra = struct.pack("<2H", 1, len(large)) + large if large else b""
    size, offset = min(nbytes, LIMIT32), min(header_offset, LIMIT32)
    head = struct.pack(
        "<4s6H3I5H2I",
        *(b"PK\x01\x02", 0, 0, 0x808, 0, 0, 0, 0, size, size, len(name), len(extra), 0, 0, 0, 0, offset),
    )
    return head + name + extra


def _end(count: int, directory_bytes: int, directory_offset: int) -> bytes:
    zip64 = b""
    if count >= 0xFFFF or directory_offset >= LIMIT32 or directory_bytes >= LIMIT32:
        end64 = directory_offset + directory_bytes
        zip64 = struct.pack(
            "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, directory_bytes, directory_offset
        ) + struct.pack("<4sIQI", b"PK\x06\x07", 0, end64, 1)
    count, size, offset = min(count, 0xFFFF), min(directory_bytes, LIMIT32), min(directory_offset, LIMIT32)
    return zip64 + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, offset, 0)
