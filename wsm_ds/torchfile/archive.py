"""The zip container of `torch.save`: where each record's bytes, and each copy of its CRC-32, lie.

torch stores every record uncompressed (method 0) behind a padded local header, with sizes and CRC-32 in a
data descriptor after the data and again in the central directory (`caffe2/serialize/inline_container.cc`).
"""

import itertools
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WsmError
from wsm_ds.sizes import format_size

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_ENTRY = struct.Struct("<4s6H3I5H2I")
END, END64, LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
IS_ENCRYPTED, HAS_DESCRIPTOR, IS_UTF8 = 0x01, 0x08, 0x800
IS_FOLDER = 0x10
IN_ZIP64 = 0xFFFFFFFF
LONGEST_NAME = 1000
MOST_DIRECTORY_BYTES = 1 << 28
"""256 MiB. An entry has about 80 bytes, and a checkpoint's file about as many of them as tensors."""
LARGEST_MARK = 4096
LEGACY_MAGIC = b"\x80\x02\x8a\x0a"
MARKS = {"version": range(1, 11), ".format_version": range(1, 1 << 16), ".storage_alignment": range(1, 1 << 32)}
"""Records that hold one number, and the numbers with which torch reads the file (`caffe2/serialize/versions.h`)."""


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
    """All records of one torch file of `nbytes` bytes, by name without the root folder (`data.pkl`, `data/0`, …).

    `mtime_ns` and `ctime_ns` are the file's times before anything was read from it; 0 if it is yet to be written.
    """

    path: Path
    nbytes: int
    records: dict[str, Record]
    mtime_ns: int = 0
    ctime_ns: int = 0


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
            records = _read_records(path, file, status.st_size)
        except (zipfile.BadZipFile, struct.error, EOFError, ValueError, OverflowError, NotImplementedError) as error:
            if isinstance(error, WsmError):
                raise
            raise BrokenCheckpoint(
                f"{path} is not a whole torch file ({error}): it was cut off, or is still being written."
            ) from error
        by_name = {record.name: record for record in records}
        for name in by_name.keys() & {*MARKS, "byteorder", ".data/serialization_id"}:
            _check_mark(path, file, by_name[name])
    if "data.pkl" not in by_name:
        raise BrokenCheckpoint(f"{path} is a zip without data.pkl, not a torch file.")
    if "constants.pkl" in by_name:  # torch.load runs it, `torch/serialization.py`, `_is_torchscript_zip`
        raise UnsupportedLayout(f"{path} is a TorchScript program, not a checkpoint.")
    return Archive(path, status.st_size, by_name, status.st_mtime_ns, status.st_ctime_ns)


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


def _check_mark(path: Path, file: BinaryIO, record: Record) -> None:
    """Checks a record without which torch does not load the file, or loads other numbers."""
    if record.nbytes > LARGEST_MARK:
        raise BrokenCheckpoint(f"{path}: record {record.name} has {record.nbytes} bytes; torch writes a short one.")
    file.seek(record.offset)
    data = checked_crc(path, record, file.read(record.nbytes))
    if record.name == "byteorder" and data != b"little":
        raise UnsupportedLayout(f"{path}: the byte order is {data[:20]!r}, expected b'little'.")
    if record.name in MARKS and (not data.strip().isdigit() or int(data) not in MARKS[record.name]):
        raise BrokenCheckpoint(f"{path}: record {record.name} is {data[:20]!r}, which torch does not write.")


def _read_records(path: Path, file: BinaryIO, nbytes: int) -> list[Record]:
    """All records. No two may share a byte or a name: a crafted file could else show two readers different data."""
    begin, entries = _read_directory(file, nbytes)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    if len(infos) != len(entries) or len({info.filename.split("/", 1)[0] for info in infos}) > 1:
        raise BrokenCheckpoint(f"{path} is not a file that torch wrote: its records are not in one folder.")
    records, ranges = [], []
    position = begin
    for info, entry in zip(infos, entries, strict=True):
        record, end = _read_record(path, file, info, entry, position, begin)
        records.append(record)
        ranges.append((info.header_offset, end))
        position += len(entry)
    ranges.sort()
    overlap = any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    if overlap or len({record.name for record in records}) < len(records):
        raise BrokenCheckpoint(f"{path} is not a file that torch wrote: two of its records share bytes, or a name.")
    return records


def _read_directory(file: BinaryIO, nbytes: int) -> tuple[int, list[bytes]]:
    """Offset of the central directory, and its entries with names and extra fields.

    The directory ends where its end records begin, and these end with the file. So no reader can find another one.

    Raises:
        ValueError: it is not so, or the directory is larger than that of any checkpoint.
    """
    file.seek(max(0, nbytes - END64.size - LOCATOR64.size - END.size))
    tail = file.read()
    signature, *disks, count, size, begin, _ = END.unpack(tail[-END.size :])
    end = nbytes - END.size
    if tail.startswith(b"PK\x06\x06") and tail[END64.size :].startswith(b"PK\x06\x07"):
        end -= END64.size + LOCATOR64.size
        _, size64, _, _, *disks64, on_disk64, count64, directory64, begin64 = END64.unpack_from(tail)
        _, locator_disk, locator, disk_count = LOCATOR64.unpack_from(tail, END64.size)
        # Where a value is in both, both say the same.
        both = (count, count64, 0xFFFF), (size, directory64, IN_ZIP64), (begin, begin64, IN_ZIP64)
        is_one = (size64, *disks64, on_disk64, locator_disk, locator, disk_count) == (
            *(END64.size - 12, 0, 0, count64, 0, end, 1),
        )
        if not is_one or any(short not in (long, limit) for short, long, limit in both):
            raise ValueError("the two ends of its directory differ")
        disks[-1] = count if disks[-1] == count else -1
        count, size, begin = count64, directory64, begin64
    elif disks[-1] != count:
        raise ValueError("its directory is not in one piece")
    if signature != b"PK\x05\x06" or disks[:2] != [0, 0] or disks[-1] < 0 or begin + size != end:
        raise ValueError("its directory is not at its end")
    if size > MOST_DIRECTORY_BYTES:
        raise ValueError(f"its directory has {format_size(size)}")
    file.seek(begin)
    return begin, _split_directory(file.read(size), count)


def _split_directory(directory: bytes, count: int) -> list[bytes]:
    entries, position = [], 0
    for _ in range(count):
        signature, *_, name, extra, comment, disk, _, _, _ = CENTRAL_ENTRY.unpack_from(directory, position)
        end = position + CENTRAL_ENTRY.size + name + extra
        if signature != b"PK\x01\x02" or comment or disk or end > len(directory):
            raise ValueError("its directory has an entry that torch does not write")
        entries.append(directory[position:end])
        position = end
    if position != len(directory):
        raise ValueError("its directory has more than its entries")
    return entries


def _cut_off(path: Path, info: zipfile.ZipInfo) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{path}: record {info.filename} lies outside the file: it was cut off, or is still being written."
    )


def _read_record(
    path: Path, file: BinaryIO, info: zipfile.ZipInfo, entry: bytes, central: int, directory: int
) -> tuple[Record, int]:
    """A record, and the offset where it ends, its data descriptor included.

    Args:
        path: for messages.
        file: the torch file, opened.
        info: what Python's zipfile says of the record.
        entry: its entry in the central directory.
        central: offset of `entry` in the file.
        directory: offset of the central directory.
    """
    if not 0 <= info.header_offset < directory:
        raise _cut_off(path, info)
    file.seek(info.header_offset)
    header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    signature, _, flags, method, *_, name_bytes, extra_bytes = header
    name = file.read(name_bytes)
    offset = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    end = offset + info.file_size
    if signature != b"PK\x03\x04" or end > directory:
        raise _cut_off(path, info)
    if {method, info.compress_type} != {zipfile.ZIP_STORED} or info.compress_size != info.file_size:
        raise UnsupportedLayout(f"{path}: record {info.filename} is compressed; torch never writes that.")
    if (flags | info.flag_bits) & IS_ENCRYPTED:
        raise UnsupportedLayout(f"{path}: record {info.filename} is encrypted; torch never writes that.")
    central_name = entry[CENTRAL_ENTRY.size :][: CENTRAL_ENTRY.unpack_from(entry)[10]]
    has_other_flags = flags != info.flag_bits or flags & ~(HAS_DESCRIPTOR | IS_UTF8)
    if name != central_name or has_other_flags or info.external_attr & IS_FOLDER:
        raise BrokenCheckpoint(f"{path}: record {info.filename} is not the same in the file and in its directory.")
    # The CRC-32 is at byte 16 of a central entry, and at byte 14 of a local header if no data descriptor follows
    # (APPNOTE 4.3.7 to 4.3.12).
    crc_offsets = [central + 16]
    if flags & HAS_DESCRIPTOR:
        file.seek(end)
        end += _check_descriptor(path, info, file.read(24))
        if end > directory:
            raise _cut_off(path, info)
        crc_offsets.append(offset + info.file_size + 4)
    else:
        _check_sizes(path, info, header[6:9])
        crc_offsets.append(info.header_offset + 14)
    # torch puts all records into one folder, which is called like the file without its suffix.
    short = info.filename.split("/", 1)[-1]
    if len(short) > LONGEST_NAME:
        raise BrokenCheckpoint(
            f"{path} is not a file that torch wrote: a record's name has {len(short)} letters, "
            f"at most {LONGEST_NAME} are expected."
        )
    return Record(short, offset, info.file_size, info.CRC, tuple(sorted(crc_offsets))), end


def _check_descriptor(path: Path, info: zipfile.ZipInfo, data: bytes) -> int:
    """Bytes of a data descriptor, which is at the beginning of `data`."""
    for layout in ("<4sIII", "<4sIQQ"):
        size = struct.calcsize(layout)
        if struct.pack(layout, DESCRIPTOR_SIGNATURE, info.CRC, *[info.file_size & _limit(layout)] * 2) == data[:size]:
            return size
    raise BrokenCheckpoint(f"{path}: record {info.filename} is damaged: its sizes or CRC-32s differ.")


def _limit(layout: str) -> int:
    return IN_ZIP64 if layout.endswith("II") else (1 << 64) - 1


def _check_sizes(path: Path, info: zipfile.ZipInfo, crc_and_sizes: Sequence[int]) -> None:
    crc, *sizes = crc_and_sizes
    if crc != info.CRC or any(size not in (info.file_size, IN_ZIP64) for size in sizes):
        raise BrokenCheckpoint(f"{path}: record {info.filename} is damaged: its sizes or CRC-32s differ.")
