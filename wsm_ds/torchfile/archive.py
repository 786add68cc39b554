"""The zip container of `torch.save`: where each record's bytes, and each copy of its CRC-32, lie.

torch stores every record uncompressed (method 0) behind a padded local header, with sizes and CRC-32 in a
data descriptor after the data and again in the central directory (`caffe2/serialize/inline_container.cc`).
"""

import itertools
import stat
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WsmError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_ENTRY_BYTES = 46
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
IS_ENCRYPTED, HAS_DESCRIPTOR = 0x01, 0x08
LONGEST_NAME = 1000
LEGACY_MAGIC = b"\x80\x02\x8a\x0a"


@dataclass(frozen=True, slots=True)
class Record:
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


@dataclass(frozen=True)
class Archive:
    """All records of one torch file of `nbytes` bytes, by name without the root folder (`data.pkl`, `data/0`, …)."""

    path: Path
    nbytes: int
    records: dict[str, Record]


def read_archive(path: Path) -> Archive:
    """Reads the central directory and the local headers of a torch file, but none of its data.

    Raises:
        BrokenCheckpoint: it is not a zip or is truncated, or records lie outside the file or overlap.
        UnsupportedLayout: it is in torch's legacy (non-zip) format, or a record is compressed or encrypted.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BrokenCheckpoint(f"{path} is not a regular file but a folder, a pipe or a device.")
    with path.open("rb") as file:
        # A pickle of torch's magic number, `torch/serialization.py`, MAGIC_NUMBER.
        if file.read(4) == LEGACY_MAGIC:
            raise UnsupportedLayout(
                f"{path} is in torch's legacy format, which has no byte addresses (ds_config has "
                '"checkpoint_serialization": false). Load it with torch and save it again.'
            )
        try:
            records = _read_records(path, file)
        except (zipfile.BadZipFile, struct.error, EOFError, ValueError, OverflowError, NotImplementedError) as error:
            if isinstance(error, WsmError):
                raise
            raise BrokenCheckpoint(
                f"{path} is not a whole torch file ({error}): it was cut off, or is still being written."
            ) from error
    by_name = {record.name: record for record in records}
    if "data.pkl" not in by_name:
        raise BrokenCheckpoint(f"{path} is a zip without data.pkl, not a torch file.")
    return Archive(path, status.st_size, by_name)


def _read_records(path: Path, file: BinaryIO) -> list[Record]:
    """All records. No two may share a byte or a name: a crafted file could else show two readers different data."""
    with zipfile.ZipFile(file) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    records, ranges = [], []
    position = directory
    for info in infos:
        record, end = _read_record(path, file, info, position, directory)
        records.append(record)
        ranges.append((info.header_offset, end))
        position += CENTRAL_ENTRY_BYTES + _central_tail(file, position)
    ranges.sort()
    overlap = any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    if overlap or len({record.name for record in records}) < len(records):
        raise BrokenCheckpoint(f"{path} is not a file that torch wrote: two of its records share bytes, or a name.")
    return records


def _central_tail(file: BinaryIO, position: int) -> int:
    """Bytes of name, extra field and comment of the central directory's entry at `position`."""
    file.seek(position + 28)
    name, extra, comment = struct.unpack("<3H", file.read(6))
    return int(name + extra + comment)


def _cut_off(path: Path, info: zipfile.ZipInfo) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{path}: record {info.filename} lies outside the file: it was cut off, or is still being written."
    )


def _read_record(path: Path, file: BinaryIO, info: zipfile.ZipInfo, central: int, directory: int) -> tuple[Record, int]:
    """A record, and the offset where it ends, its data descriptor included.

    Args:
        path: for messages.
        file: the torch file, opened.
        info: what Python's zipfile says of the record.
        central: offset of its entry in the central directory.
        directory: offset of the central directory.
    """
    if not 0 <= info.header_offset < directory:
        raise _cut_off(path, info)
    file.seek(info.header_offset)
    header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    signature, _, flags, method, *_, name_bytes, extra_bytes = header
    offset = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    end = offset + info.file_size
    if signature != b"PK\x03\x04" or end > directory:
        raise _cut_off(path, info)
    if {method, info.compress_type} != {zipfile.ZIP_STORED} or info.compress_size != info.file_size:
        raise UnsupportedLayout(f"{path}: record {info.filename} is compressed; torch never writes that.")
    if (flags | info.flag_bits) & IS_ENCRYPTED:
        raise UnsupportedLayout(f"{path}: record {info.filename} is encrypted; torch never writes that.")
    # The CRC-32 is at byte 16 of a central entry, and at byte 14 of a local header if no data descriptor follows
    # (APPNOTE 4.3.7 to 4.3.12).
    crc_offsets = [central + 16]
    if flags & HAS_DESCRIPTOR:
        file.seek(end)
        if file.read(4) == DESCRIPTOR_SIGNATURE and end + 8 <= directory:
            crc_offsets.append(end + 4)
            end += 8
    else:
        crc_offsets.append(info.header_offset + 14)
    # torch puts all records into one folder, which is called like the file without its suffix.
    name = info.filename.split("/", 1)[-1]
    if len(name) > LONGEST_NAME:
        raise BrokenCheckpoint(
            f"{path} is not a file that torch wrote: a record's name has {len(name)} letters, "
            f"at most {LONGEST_NAME} are expected."
        )
    return Record(name, offset, info.file_size, info.CRC, tuple(sorted(crc_offsets))), end
