"""The zip container of `torch.save`: where each record's bytes, and each copy of its CRC-32, lie.

torch stores every record uncompressed (method 0) behind a padded local header, with sizes and CRC-32 in a
data descriptor after the data and again in the central directory (`caffe2/serialize/inline_container.cc`).
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_ENTRY_BYTES = 46
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
HAS_DESCRIPTOR = 0x08
LEGACY_MAGIC = b"\x80\x02\x8a\x0a"


@dataclass(frozen=True, slots=True)
class Record:
    """One stored file of the archive: `nbytes` bytes at `offset`, and the places that repeat its CRC-32."""

    name: str
    offset: int
    nbytes: int
    crc: int
    crc_offsets: tuple[int, ...]


@dataclass(frozen=True)
class Archive:
    """All records of one file, by name without the archive's root folder (`data.pkl`, `data/0`, …)."""

    path: Path
    nbytes: int
    root: str
    records: dict[str, Record]


def read_archive(path: Path) -> Archive:
    """Reads the central directory and the local headers of `path`; no data is read.

    Raises:
        BrokenCheckpoint: not a zip, truncated, or a record lies outside the file.
        UnsupportedLayout: torch's legacy (non-zip) format, or a compressed record.
    """
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) == LEGACY_MAGIC:
                raise UnsupportedLayout(
                    f"{path} is in torch's legacy format, which has no byte addresses (ds_config has "
                    '"checkpoint_serialization": false). Load it with torch and save it again.'
                )
            with zipfile.ZipFile(file) as archive:
                infos, directory = archive.infolist(), archive.start_dir
            records = {}
            position = directory
            for info in infos:
                record = _read_record(path, file, info, position, directory)
                records[record.name] = record
                position += CENTRAL_ENTRY_BYTES + _central_tail(file, position)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        if isinstance(error, UnsupportedLayout):
            raise
        raise BrokenCheckpoint(
            f"{path} is not a whole torch file ({error}): it was cut off, or is still being written."
        ) from error
    if "data.pkl" not in records:
        raise BrokenCheckpoint(f"{path} is a zip without data.pkl, not a torch file.")
    root = infos[0].filename.split("/", 1)[0]
    return Archive(path, nbytes, root, records)


def _central_tail(file: BinaryIO, position: int) -> int:
    file.seek(position + 28)
    name, extra, comment = struct.unpack("<3H", file.read(6))
    return int(name + extra + comment)


def _read_record(path: Path, file: BinaryIO, info: zipfile.ZipInfo, central: int, directory: int) -> Record:
    file.seek(info.header_offset)
    header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    signature, _, flags, method, *_, name_bytes, extra_bytes = header
    offset = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    end = offset + info.file_size
    if signature != b"PK\x03\x04" or end > directory:
        raise BrokenCheckpoint(f"{path}: record {info.filename} lies outside the file; it was cut off.")
    if method != zipfile.ZIP_STORED:
        raise UnsupportedLayout(f"{path}: record {info.filename} is compressed; torch never writes that.")
    places = [central + 16]
    if flags & HAS_DESCRIPTOR:
        file.seek(end)
        if file.read(4) == DESCRIPTOR_SIGNATURE:
            places.append(end + 4)
    else:
        places.append(info.header_offset + 14)
    name = info.filename.split("/", 1)[-1]
    return Record(name, offset, info.file_size, info.CRC, tuple(sorted(places)))
