"""One torch file, opened: its archive, its object tree, and where each tensor's bytes lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout
from wsm_ds.sizes import format_size
from wsm_ds.torchfile.archive import Archive, Record, read_archive
from wsm_ds.torchfile.unpickle import Storage, Tensor, unpickle


@dataclass(frozen=True)
class TorchFile:
    """`tree` is what `torch.load` would give, with `Tensor` addresses in place of tensors."""

    archive: Archive
    tree: Any

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.archive.path

    def record(self, tensor: Tensor) -> Record:
        """The archive record that holds the tensor's storage."""
        return record_of(self.archive, tensor.storage)

    def byte_offset(self, tensor: Tensor) -> int:
        """Offset in the file of the tensor's first element.

        Raises:
            BrokenCheckpoint: the tensor reaches beyond its storage, or is not contiguous.
        """
        record = self.record(tensor)
        start = tensor.offset * tensor.dtype.itemsize
        if not tensor.is_contiguous:
            raise BrokenCheckpoint(
                f"{self.path}: a tensor of shape {tensor.shape} and stride {tensor.stride} is not contiguous."
            )
        if start + tensor.numel * tensor.dtype.itemsize > record.nbytes:
            raise BrokenCheckpoint(
                f"{self.path}: a tensor of {tensor.numel} elements at {tensor.offset} reaches beyond its storage "
                f"of {record.nbytes} bytes."
            )
        return record.offset + start


def record_of(archive: Archive, storage: Storage) -> Record:
    """The record that holds a storage.

    Raises:
        BrokenCheckpoint: there is none, or it has not the storage's length.
    """
    record = archive.records.get(f"data/{storage.key}")
    if record is None:
        raise BrokenCheckpoint(f"{archive.path}: storage {storage.key} is missing.")
    if storage.nbytes > record.nbytes:
        raise BrokenCheckpoint(
            f"{archive.path}: storage {storage.key} has {record.nbytes} bytes, expected {storage.nbytes} for "
            f"{storage.numel} elements."
        )
    return record


MOST_PICKLE_BYTES = 1 << 27


def open_torch_file(path: Path, allowed_globals: frozenset[str] = frozenset()) -> TorchFile:
    """Opens `path` without executing its pickle. Reads the zip directory and `data.pkl`, no tensor.

    Raises:
        BrokenCheckpoint, UnsafePickle, UnsupportedLayout: see `read_archive` and `unpickle`.
    """
    archive = read_archive(path)
    pickled = archive.records["data.pkl"]
    if pickled.nbytes > MOST_PICKLE_BYTES:
        raise UnsupportedLayout(
            f"{path}: data.pkl has {format_size(pickled.nbytes)}, more than {format_size(MOST_PICKLE_BYTES)}: client "
            "state as large as that belongs into tensors."
        )
    with path.open("rb") as file:
        file.seek(pickled.offset)
        data = file.read(pickled.nbytes)
    return TorchFile(archive, unpickle(archive, data, allowed_globals))
