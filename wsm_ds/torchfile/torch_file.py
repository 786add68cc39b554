"""One torch file, opened: its archive, its object tree, and where each tensor's bytes lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout
from wsm_ds.sizes import format_size
from wsm_ds.torchfile.archive import Archive, Record, checked_crc, read_archive
from wsm_ds.torchfile.unpickle import Storage, Tensor, unpickle


@dataclass(frozen=True)
class TorchFile:
    """An opened torch file. `tree` is what `torch.load` would return, with `Tensor` addresses in place of tensors."""

    archive: Archive
    tree: Any

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.archive.path

    def record(self, tensor: Tensor) -> Record:
        """Returns the archive's record that holds the tensor's storage; raises as `record_of`."""
        return record_of(self.archive, tensor.storage)

    def byte_offset(self, tensor: Tensor) -> int:
        """Returns the offset in the file of the tensor's first element, in bytes.

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
    """Returns the record that holds a storage.

    Raises:
        BrokenCheckpoint: there is no record, or it is shorter than the storage.
    """
    record = archive.records.get(f"data/{storage.key}")
    if record is None:
        raise BrokenCheckpoint(
            f"{archive.path}: storage {storage.key} is missing: there is no record data/{storage.key}."
        )
    if storage.nbytes > record.nbytes:
        raise BrokenCheckpoint(
            f"{archive.path}: storage {storage.key} has {record.nbytes} bytes, expected {storage.nbytes} for "
            f"{storage.numel} elements."
        )
    return record


MOST_PICKLE_BYTES = 1 << 27


def open_torch_file(path: Path, allowed_globals: frozenset[str] = frozenset()) -> TorchFile:
    """Opens a torch file without executing its pickle. Reads the zip directory and `data.pkl`, but no tensor.

    Args:
        path: the file.
        allowed_globals: names of the user's own classes that the pickle may mention; they are not imported.

    Raises:
        BrokenCheckpoint, UnsafePickle, UnsupportedLayout: as `read_archive` and `unpickle`.
        UnsupportedLayout: the pickle is larger than `MOST_PICKLE_BYTES`.
    """
    archive = read_archive(path)
    pickled = archive.records["data.pkl"]
    if pickled.nbytes > MOST_PICKLE_BYTES:
        raise UnsupportedLayout(
            f"{path}: data.pkl has {format_size(pickled.nbytes)}, more than {format_size(MOST_PICKLE_BYTES)}: save "
            "client state of that size as tensors."
        )
    with path.open("rb") as file:
        file.seek(pickled.offset)
        data = checked_crc(path, pickled, file.read(pickled.nbytes))
    return TorchFile(archive, unpickle(archive, data, allowed_globals))
