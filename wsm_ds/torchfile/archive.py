"""A torch file as its zip container describes it: where each record's bytes, and each copy of its CRC-32, lie.

Thousands of rank files have thousands of records each, and those of one run lie alike in all of them. So a `Directory`
says once for all where records lie, and an `Archive` adds what differs: the file and its CRC-32s.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from wsm_ds.errors import BrokenCheckpoint

Ints = NDArray[np.int64]


class Record(NamedTuple):
    """One file stored in the archive.

    Attributes:
        name: without the archive's root folder.
        offset: of its first byte in the torch file.
        nbytes: its length.
        crc: its CRC-32.
        crc_offsets: byte offsets in the torch file at which the CRC-32 is stored.
    """

    name: str
    offset: int
    nbytes: int
    crc: int
    crc_offsets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Directory:
    """Where the records of a torch file lie. Files that are alike have one object.

    Attributes:
        names: without the archive's root folder, shape [n].
        offsets: of their first bytes in the torch file, shape [n].
        nbytes: their lengths, shape [n].
        crc_offsets: byte offsets at which their CRC-32s are stored, shape [n, 2].
    """

    names: tuple[str, ...]
    offsets: Ints
    nbytes: Ints
    crc_offsets: Ints

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each record, by its name."""
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of all storages."""
        sizes = zip(self.names, self.nbytes.tolist(), strict=True)
        return sum(nbytes for name, nbytes in sizes if name.startswith("data/"))


@dataclass(frozen=True, eq=False)
class Archive:
    """All records of one torch file of `nbytes` bytes.

    Attributes:
        path: where the file is.
        nbytes: its size.
        directory: where its records lie.
        crcs: the CRC-32 of each record, uint32, shape [n].
        mtime_ns, ctime_ns: its times before anything was read from it; 0 if it is yet to be written.
    """

    path: Path
    nbytes: int
    directory: Directory
    crcs: NDArray[np.uint32]
    mtime_ns: int = 0
    ctime_ns: int = 0

    @property
    def records(self) -> "Records":
        """The records by name (`data.pkl`, `data/0`, …). They are made when they are asked for."""
        return Records(self)


class Records(Mapping[str, Record]):
    """The records of an archive, by name. A thousand rank files with thousands of records each are kept as arrays."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    @override
    def __getitem__(self, name: str) -> Record:
        directory = self.archive.directory
        number = directory.numbers[name]
        return Record(
            name,
            int(directory.offsets[number]),
            int(directory.nbytes[number]),
            int(self.archive.crcs[number]),
            tuple(directory.crc_offsets[number].tolist()),
        )

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.archive.directory.names)

    @override
    def __len__(self) -> int:
        return len(self.archive.directory.names)


def archive_of(path: Path, nbytes: int, records: Sequence[Record], mtime_ns: int = 0, ctime_ns: int = 0) -> Archive:
    """Returns the archive of these records.

    Args:
        path: of the torch file.
        nbytes: its size.
        records: in the order of the directory.
        mtime_ns: see `Archive`.
        ctime_ns: see `Archive`.
    """
    columns = np.array([(r.offset, r.nbytes, *r.crc_offsets) for r in records], dtype=np.int64).reshape(-1, 4)
    names = tuple(record.name for record in records)
    directory = Directory(names, columns[:, 0].copy(), columns[:, 1].copy(), columns[:, 2:].copy())
    crcs = np.array([record.crc for record in records], dtype=np.uint32)
    return Archive(path, nbytes, directory, crcs, mtime_ns, ctime_ns)


def checked_crc(path: Path, record: Record, data: bytes) -> bytes:
    """Returns the whole of a record's bytes.

    Raises:
        BrokenCheckpoint: they are not those that torch wrote: their CRC-32 differs. A CRC-32 of zero is none:
            `torch.serialization.set_crc32_options(False)`.
    """
    if record.crc and zlib.crc32(data) != record.crc:
        raise BrokenCheckpoint(
            f"{path}: record {record.name} is damaged: its CRC-32 is {zlib.crc32(data):08x}, and the file says "
            f"{record.crc:08x}. Take the file from another copy, or leave the checkpoint out."
        )
    return data
