"""Torch files that are alike: the same records at the same places, whatever the values in them.

The files of a thousand ranks, and those of one rank at each step, differ in their elements, in the CRC-32s of these,
and in the name of the zip's folder. A `Frame` has all other bytes of the metadata of one file that was read with care.
A file with the same bytes has the same records at the same places.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from wsm_ds.torchfile.archive import Directory, Ints
from wsm_ds.torchfile.raw_file import CENTRAL_ENTRY, RawFile
from wsm_ds.torchfile.zip_entries import LOCAL_HEADER, MARKS, SERIALIZATION_ID, Entry

CRC_BYTES = 4
Bytes = NDArray[np.uint8]
FrameKey = tuple[int, int, int, int, int]


def root_of(raw: RawFile) -> bytes:
    """The name of the folder that holds a torch file's records, with its slash; empty if the file does not begin so."""
    if len(raw.head) < LOCAL_HEADER.size:
        return b""
    name_bytes = LOCAL_HEADER.unpack_from(raw.head)[-2]
    name = raw.head[LOCAL_HEADER.size : LOCAL_HEADER.size + name_bytes]
    return name[: name.find(b"/") + 1]


def key_of(raw: RawFile, root: bytes) -> FrameKey:
    """What files that are alike have in common at first sight.

    Args:
        raw: the file.
        root: as `root_of` gives it.
    """
    return raw.nbytes, len(raw.head), len(raw.tail), len(root), raw.first_record_bytes


class Frame:
    """The metadata of a torch file, without what differs between files that are alike.

    Args:
        raw: a file; `can_frame` is true for it.
        root: the name of its folder, as `root_of` gives it.
        entries: its records, as `read_entries` gives them.
        directory: the same records.
    """

    def __init__(self, raw: RawFile, root: bytes, entries: Sequence[Entry], directory: Directory) -> None:
        self.directory = directory
        self.marks = [n for n, name in enumerate(directory.names) if name in MARKS or name == "byteorder"]
        self.id_number = directory.numbers.get(SERIALIZATION_ID)
        checked = [number for number, entry in enumerate(entries) if entry.is_checked]
        places = [entry.central + CENTRAL_ENTRY.size for entry in entries]
        places += [entries[number].header + LOCAL_HEADER.size for number in checked]
        self.roots = _positions(raw, [(place, place + len(root)) for place in places])
        self.crcs = _positions(raw, [(entry.central + 16, entry.central + 16 + CRC_BYTES) for entry in entries])
        copies = [_crc_beside_record(entries[number]) for number in checked]
        self.checked, self.copies = checked, _positions(raw, [(place, place + CRC_BYTES) for place in copies])
        is_same = np.zeros(len(_data(raw)), dtype=bool)
        is_same[_positions(raw, _metadata_ranges(raw, entries))] = True
        for varying in (self.roots, self.crcs, self.copies):
            is_same[varying] = False
        self.same = np.flatnonzero(is_same)
        self.values = _data(raw)[self.same]
        self.mark_crcs = self._crcs(_data(raw))[self.marks]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return sum(array.nbytes for array in (self.same, self.values, self.roots, self.crcs, self.copies))

    def crcs_of(self, raw: RawFile, root: bytes) -> NDArray[np.uint32] | None:
        """Returns the CRC-32s of a file's records, uint32, shape [n]; None if the file is not alike.

        Args:
            raw: a file with the same `key_of`.
            root: the name of its folder.
        """
        data = _data(raw)
        if not np.array_equal(data[self.same], self.values):
            return None
        if data[self.roots].tobytes() != root * (len(self.roots) // len(root)):
            return None
        crcs = self._crcs(data)
        copies = data[self.copies].reshape(-1, CRC_BYTES).copy().view("<u4")[:, 0]
        if not np.array_equal(copies, crcs[self.checked]) or not np.array_equal(crcs[self.marks], self.mark_crcs):
            return None
        if self.id_number is not None:
            begin, nbytes = (int(column[self.id_number]) for column in (self.directory.offsets, self.directory.nbytes))
            stated = int(crcs[self.id_number])
            if stated and zlib.crc32(raw.between(begin, begin + nbytes)) != stated:
                return None
        return crcs

    def _crcs(self, data: Bytes) -> NDArray[np.uint32]:
        crcs: NDArray[np.uint32] = data[self.crcs].reshape(-1, CRC_BYTES).copy().view("<u4")[:, 0]
        return crcs


def can_frame(raw: RawFile, root: bytes, entries: Sequence[Entry]) -> bool:
    """Whether all metadata of a file lie in what was read first, as they do in every file that torch writes.

    Args:
        raw: the file.
        root: the name of its folder.
        entries: its records.
    """
    return bool(root) and all(raw.has(begin, end) for begin, end in _metadata_ranges(raw, entries))


def _metadata_ranges(raw: RawFile, entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """The ranges of a file that hold its metadata: the directory, local headers and descriptors, and short records."""
    ranges = [(min(entry.central for entry in entries), raw.nbytes)]
    for entry in entries:
        record = entry.record
        if entry.is_checked:
            ranges += [(entry.header, record.offset), (record.offset + record.nbytes, entry.end)]
        if record.name in MARKS or record.name == "byteorder":
            ranges.append((record.offset, record.offset + record.nbytes))
    return ranges


def _crc_beside_record(entry: Entry) -> int:
    """Where the local header or the data descriptor of a record has its CRC-32."""
    return next(offset for offset in entry.record.crc_offsets if offset != entry.central + 16)


def _data(raw: RawFile) -> Bytes:
    """All bytes that were read, one after the other."""
    return np.frombuffer(raw.head if raw.tail is raw.head else raw.head + raw.tail, dtype=np.uint8)


def _positions(raw: RawFile, ranges: Iterable[tuple[int, int]]) -> Ints:
    """Where the bytes of these ranges of the file lie in `_data`. Each range lies in the head or in the tail."""
    shift = len(raw.head) - raw.tail_begin
    moved = [(begin, end) if end <= len(raw.head) else (begin + shift, end + shift) for begin, end in ranges]
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(begin, end) for begin, end in moved)]).astype(np.int64)
