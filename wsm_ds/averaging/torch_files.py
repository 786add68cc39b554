"""Torch files whose metadata are pickled at once, and whose elements are written later by another thread.

`torch.save` holds Python's global lock for a third of a second at a time while it writes 400 MB. Here the small things
(counters, rates, buffers) are copied while the training waits; then only large pieces are written, without the lock.
"""

import io
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.engine.crc32 import crc_of
from wsm_ds.errors import NonFiniteValue
from wsm_ds.filesystem.durable import write_all
from wsm_ds.torchfile.zip_format import ALIGNMENT, PlacedRecord, frame

PIECE_BYTES = 1 << 24
"""Bytes that are copied from the device, checked and written at once."""
SMALL_RECORDS = {".format_version": b"1", ".storage_alignment": str(ALIGNMENT).encode(), "byteorder": b"little"}
VERSION = {"version": b"3\n"}
"""Records that torch writes before the elements, and after them (`_save` in `torch/serialization.py`)."""


@dataclass(frozen=True, eq=False)
class PickledFile:
    """A torch file that is not written yet.

    Attributes:
        name: of the file.
        records: the content of each record by its name: bytes, or a tensor of bytes that must not change before the
            file is written.
        averaged: names of the records that hold averages, in fp32.
    """

    name: str
    records: dict[str, Any]
    averaged: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(map(_nbytes, self.records.values()))


def pickled(name: str, tree: Any, averages: Iterable[Any] = (), steady: Iterable[Any] = ()) -> PickledFile:
    """Pickles a tree as `torch.save` does, and copies the elements of its tensors, but for those that stay as they are.

    Every tensor is said to be of the CPU, as those of a merge are: a reader places them where it wants.

    Args:
        name: of the file.
        tree: plain data, torch's tensors, and anything that can be pickled.
        averages: tensors in the tree that hold averages; they are not copied.
        steady: other tensors that are not copied.
    """
    keys = {_address(tensor): True for tensor in averages if tensor.numel()}
    keys |= {_address(tensor): False for tensor in steady if tensor.numel()}
    data = io.BytesIO()
    pickler = _Pickler(data, keys)
    pickler.dump(tree)
    records = {"data.pkl": data.getvalue(), **SMALL_RECORDS, **pickler.records, **VERSION}
    return PickledFile(name, records, frozenset(pickler.averaged))


class _Pickler(pickle.Pickler):
    """Replaces storages by references, as torch does, and collects their bytes.

    Args:
        file: where the pickle goes.
        kept: addresses of storages that are not copied; True for an average.
    """

    def __init__(self, file: io.BytesIO, kept: dict[int, bool]) -> None:
        super().__init__(file, protocol=2)
        self.kept = kept
        self.numbers: dict[int, str] = {}
        self.records: dict[str, Any] = {}
        self.averaged: set[str] = set()

    def persistent_id(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.storage.TypedStorage) and not torch.is_storage(value):
            return None
        if isinstance(value, torch.storage.TypedStorage):
            storage, kind = value._untyped_storage, getattr(torch, value._pickle_storage_type())
            numel = value._size()
        else:
            storage, kind, numel = value, torch.UntypedStorage, value.nbytes()
        if storage._cdata not in self.numbers:
            self.numbers[storage._cdata] = str(len(self.numbers))
            self._add_record(f"data/{self.numbers[storage._cdata]}", storage)
        return "storage", kind, self.numbers[storage._cdata], "cpu", numel

    def _add_record(self, name: str, storage: Any) -> None:
        import torch

        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        is_kept = storage.nbytes() > 0 and storage.data_ptr() in self.kept
        self.records[name] = content if is_kept else content.to("cpu", copy=True)
        if is_kept and self.kept[storage.data_ptr()]:
            self.averaged.add(name)


def _address(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _nbytes(content: Any) -> int:
    return len(content) if isinstance(content, bytes) else int(content.numel())


def write_file(folder: Path, file: PickledFile) -> None:
    """Writes a file and waits until it is on the disk.

    Memory: a piece of 16 MiB.

    Args:
        folder: where to.
        file: what.

    Raises:
        NonFiniteValue: an average holds a NaN or an infinity; the file is named. It is left half written.
        OSError: the disk is full, or fails.
    """
    zip_frame = frame(Path(file.name).stem, {name: _nbytes(content) for name, content in file.records.items()})
    descriptor = os.open(folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for offset, literal in zip_frame.literals:
            write_all(descriptor, memoryview(literal), offset)
        for placed in zip_frame.records:
            crc = _write_record(descriptor, placed, file)
            for offset in placed.crc_offsets:
                write_all(descriptor, memoryview(crc.to_bytes(4, "little")), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_record(descriptor: int, placed: PlacedRecord, file: PickledFile) -> int:
    """Writes a record and returns its CRC-32."""
    crc, offset = 0, placed.offset
    for piece in _pieces(file.records[placed.name]):
        if placed.name in file.averaged:
            _require_finite(piece, file.name)
        crc = crc_of(piece, crc)
        write_all(descriptor, piece, offset)
        offset += len(piece)
    return crc


def _pieces(content: Any) -> Iterator[memoryview]:
    if isinstance(content, bytes):
        yield memoryview(content)
        return
    for begin in range(0, content.numel(), PIECE_BYTES):
        yield memoryview(content[begin : begin + PIECE_BYTES].cpu().numpy()).cast("B")


def _require_finite(piece: memoryview, name: str) -> None:
    import numpy as np

    if not np.isfinite(np.frombuffer(piece, np.float32)).all():
        raise NonFiniteValue(f"{name}: the average of this slot holds a NaN or an infinity.")
