"""Reads the zip container of `torch.save`, and refuses any zip that torch does not write.

torch stores every record uncompressed (method 0) behind a padded local header, with sizes and CRC-32 in a
data descriptor after the data and again in the central directory (`caffe2/serialize/inline_container.cc`).
"""

import io
import itertools
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from typing_extensions import override

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, WsmError
from wsm_ds.sizes import format_size
from wsm_ds.torchfile.archive import Record, checked_crc
from wsm_ds.torchfile.raw_file import CENTRAL_ENTRY, END, END64, LOCATOR64, MOST_DIRECTORY_BYTES, RawFile

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
DESCRIPTOR_BYTES = (16, 24)
"""Length of a data descriptor: with sizes of 32 bits, and of 64 bits."""
IS_ENCRYPTED, HAS_DESCRIPTOR, IS_UTF8 = 0x01, 0x08, 0x800
IS_FOLDER = 0x10
IN_ZIP64 = 0xFFFFFFFF
ALIGNMENT = 64
"""torch's own (`caffe2/serialize/inline_container.h`, `kFieldAlignment`); a user may choose another one."""
LONGEST_EXTRA = 0xFFFF
LONGEST_NAME = 1000
LARGEST_MARK = 4096
LEGACY_MAGIC = b"\x80\x02\x8a\x0a"
MARKS = {"version": range(1, 11), ".format_version": range(1, 1 << 16), ".storage_alignment": range(1, 1 << 32)}
"""Records that hold one number, and the numbers with which torch reads the file (`caffe2/serialize/versions.h`)."""
SERIALIZATION_ID = ".data/serialization_id"


class Entry(NamedTuple):
    """A record as it lies in the zip.

    Attributes:
        record: the record.
        header: offset of its local header.
        end: offset of the byte behind it and its data descriptor.
        central: offset of its entry in the central directory.
        is_checked: whether its local header and its data descriptor were read and checked. Those of a large record
            are not: its offset follows from that of the next record.
    """

    record: Record
    header: int
    end: int
    central: int
    is_checked: bool


def read_entries(raw: RawFile) -> list[Entry]:
    """Returns all records of a torch file, in the order of its directory.

    Raises:
        BrokenCheckpoint: it is not a zip or is truncated, or records lie outside the file or overlap.
        UnsupportedLayout: it is in torch's legacy (non-zip) format, or a record is compressed or encrypted.
    """
    path = raw.path
    # A pickle of torch's magic number, `torch/serialization.py`, MAGIC_NUMBER.
    if raw.head[:4] == LEGACY_MAGIC:
        raise UnsupportedLayout(
            f"{path} is in torch's legacy format, which has no byte addresses (ds_config has "
            '"checkpoint_serialization": false). Load it with torch and save it again.'
        )
    try:
        entries = _entries(raw)
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, OverflowError, NotImplementedError) as error:
        if isinstance(error, WsmError):
            raise
        raise BrokenCheckpoint(
            f"{path} is not a whole torch file ({error}): it was cut off, or is still being written."
        ) from error
    by_name = {entry.record.name: entry.record for entry in entries}
    for name in by_name.keys() & {*MARKS, "byteorder", SERIALIZATION_ID}:
        _check_mark(raw, by_name[name])
    if "data.pkl" not in by_name:
        raise BrokenCheckpoint(f"{path} is a zip without data.pkl, not a torch file.")
    if "constants.pkl" in by_name:  # torch.load runs it, `torch/serialization.py`, `_is_torchscript_zip`
        raise UnsupportedLayout(f"{path} is a TorchScript program, not a checkpoint.")
    return entries


def _check_mark(raw: RawFile, record: Record) -> None:
    """Checks a record without which torch does not load the file, or loads other numbers."""
    path = raw.path
    if record.nbytes > LARGEST_MARK:
        raise BrokenCheckpoint(f"{path}: record {record.name} has {record.nbytes} bytes; torch writes a short one.")
    data = checked_crc(path, record, raw.between(record.offset, record.offset + record.nbytes))
    if record.name == "byteorder" and data != b"little":
        raise UnsupportedLayout(f"{path}: the byte order is {data[:20]!r}, expected b'little'.")
    if record.name in MARKS and (not data.strip().isdigit() or int(data) not in MARKS[record.name]):
        raise BrokenCheckpoint(f"{path}: record {record.name} is {data[:20]!r}, which torch does not write.")


class _Readable(io.RawIOBase):
    """A raw file as `zipfile` reads files."""

    def __init__(self, raw: RawFile) -> None:
        self.raw, self.position = raw, 0

    @override
    def seekable(self) -> bool:
        return True

    @override
    def readable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.raw.nbytes)[whence])
        return self.position

    @override
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        begin = min(self.position, self.raw.nbytes)
        data = self.raw.between(begin, min(begin + len(buffer), self.raw.nbytes))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _entries(raw: RawFile) -> list[Entry]:
    """All records. No two may share a byte or a name: a crafted file could else show two readers different data."""
    path = raw.path
    begin, directory = _read_directory(raw)
    with zipfile.ZipFile(io.BufferedReader(_Readable(raw))) as archive:
        infos = archive.infolist()
    if len(infos) != len(directory) or len({info.filename.split("/", 1)[0] for info in infos}) > 1:
        raise BrokenCheckpoint(f"{path} is not a file that torch wrote: its records are not in one folder.")
    headers = sorted(info.header_offset for info in infos)
    following = dict(itertools.pairwise([*headers, begin]))
    entries, position = [], begin
    for info, central in zip(infos, directory, strict=True):
        if not 0 <= info.header_offset < begin:
            raise _cut_off(path, info)
        entry = _derived(raw, info, central, position, following[info.header_offset])
        entries.append(entry or _read_entry(raw, info, central, position, begin))
        position += len(central)
    ranges = sorted((entry.header, entry.end) for entry in entries)
    overlap = any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    if overlap or len({entry.record.name for entry in entries}) < len(entries):
        raise BrokenCheckpoint(f"{path} is not a file that torch wrote: two of its records share bytes, or a name.")
    return entries


def _read_directory(raw: RawFile) -> tuple[int, list[bytes]]:
    """Offset of the central directory, and its entries with names and extra fields.

    The directory ends where its end records begin, and these end with the file. So no reader can find another one.

    Raises:
        ValueError: it is not so, or the directory is larger than that of any checkpoint.
    """
    nbytes = raw.nbytes
    tail = raw.between(max(0, nbytes - END64.size - LOCATOR64.size - END.size), nbytes)
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
    return begin, _split_directory(raw.between(begin, begin + size), count)


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


def _derived(raw: RawFile, info: zipfile.ZipInfo, central: bytes, position: int, following: int) -> Entry | None:
    """A record whose local header was not read, from what its directory says.

    Its data end where the next record begins, with a data descriptor between them. Its length is one of two, and only
    one of them puts the data where torch does. None if header and descriptor were read, or if they must be.

    Args:
        raw: the torch file.
        info: what Python's zipfile says of the record.
        central: its entry in the central directory.
        position: offset of `central` in the file.
        following: offset of the next record's header, or of the directory.
    """
    size = info.file_size
    is_read = raw.has(info.header_offset, info.header_offset + LOCAL_HEADER.size)
    if is_read and raw.has(following - DESCRIPTOR_BYTES[1], following):
        return None
    header_end = info.header_offset + LOCAL_HEADER.size + CENTRAL_ENTRY.unpack_from(central)[10]
    offsets = {following - length - size: length for length in DESCRIPTOR_BYTES}
    aligned = [offset for offset in offsets if offset % ALIGNMENT == 0]
    is_usual = info.flag_bits == HAS_DESCRIPTOR | IS_UTF8 and info.compress_type == zipfile.ZIP_STORED
    if not is_usual or info.compress_size != size or info.external_attr & IS_FOLDER or len(aligned) != 1:
        return None
    (offset,) = aligned
    if not header_end <= offset <= header_end + LONGEST_EXTRA:
        return None
    record = Record(_short_name(raw.path, info), offset, size, info.CRC, (offset + size + 4, position + 16))
    return Entry(record, info.header_offset, following, position, is_checked=False)


def _short_name(path: Path, info: zipfile.ZipInfo) -> str:
    """A record's name without the folder. torch puts all records into one, called like the file without its suffix."""
    short = info.filename.split("/", 1)[-1]
    if len(short) > LONGEST_NAME:
        raise BrokenCheckpoint(
            f"{path} is not a file that torch wrote: a record's name has {len(short)} letters, "
            f"at most {LONGEST_NAME} are expected."
        )
    return short


def _read_entry(raw: RawFile, info: zipfile.ZipInfo, central: bytes, position: int, directory: int) -> Entry:
    """A record, from its local header, its data descriptor and the directory.

    Args:
        raw: the torch file.
        info: what Python's zipfile says of the record.
        central: its entry in the central directory.
        position: offset of `central` in the file.
        directory: offset of the central directory.
    """
    path, begin = raw.path, info.header_offset
    header = LOCAL_HEADER.unpack(raw.between(begin, begin + LOCAL_HEADER.size))
    signature, _, flags, method, *_, name_bytes, extra_bytes = header
    name = raw.between(begin + LOCAL_HEADER.size, begin + LOCAL_HEADER.size + name_bytes)
    offset = begin + LOCAL_HEADER.size + name_bytes + extra_bytes
    end = offset + info.file_size
    if signature != b"PK\x03\x04" or end > directory:
        raise _cut_off(path, info)
    if {method, info.compress_type} != {zipfile.ZIP_STORED} or info.compress_size != info.file_size:
        raise UnsupportedLayout(f"{path}: record {info.filename} is compressed; torch never writes that.")
    if (flags | info.flag_bits) & IS_ENCRYPTED:
        raise UnsupportedLayout(f"{path}: record {info.filename} is encrypted; torch never writes that.")
    central_name = central[CENTRAL_ENTRY.size :][: CENTRAL_ENTRY.unpack_from(central)[10]]
    has_other_flags = flags != info.flag_bits or flags & ~(HAS_DESCRIPTOR | IS_UTF8)
    if name != central_name or has_other_flags or info.external_attr & IS_FOLDER:
        raise BrokenCheckpoint(f"{path}: record {info.filename} is not the same in the file and in its directory.")
    # The CRC-32 is at byte 16 of a central entry, and at byte 14 of a local header if no data descriptor follows
    # (APPNOTE 4.3.7 to 4.3.12).
    crc_offsets = [position + 16]
    if flags & HAS_DESCRIPTOR:
        end += _check_descriptor(path, info, raw.between(end, min(end + DESCRIPTOR_BYTES[1], raw.nbytes)))
        if end > directory:
            raise _cut_off(path, info)
        crc_offsets.append(offset + info.file_size + 4)
    else:
        _check_sizes(path, info, header[6:9])
        crc_offsets.append(info.header_offset + 14)
    record = Record(_short_name(path, info), offset, info.file_size, info.CRC, tuple(sorted(crc_offsets)))
    return Entry(record, begin, end, position, is_checked=True)


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
