"""One torch file, opened: its archive, its object tree, and where each tensor's bytes lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.torchfile.archive import Archive, Record, read_archive
from wsm_ds.torchfile.unpickle import Tensor, unpickle


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
        record = self.archive.records.get(f"data/{tensor.storage.key}")
        if record is None:
            raise BrokenCheckpoint(f"{self.path}: storage {tensor.storage.key} is missing.")
        return record

    def byte_offset(self, tensor: Tensor) -> int:
        """Offset in the file of the tensor's first element.

        Raises:
            BrokenCheckpoint: the tensor reaches beyond its storage, or is not contiguous.
        """
        record = self.record(tensor)
        start = tensor.offset * tensor.dtype.itemsize
        if not tensor.is_contiguous or min(tensor.shape, default=0) < 0 or tensor.offset < 0:
            raise BrokenCheckpoint(
                f"{self.path}: a tensor of shape {tensor.shape} and stride {tensor.stride} is not contiguous."
            )
        if start + tensor.numel * tensor.dtype.itemsize > record.nbytes:
            raise BrokenCheckpoint(
                f"{self.path}: a tensor of {tensor.numel} elements at {tensor.offset} reaches beyond its storage "
                f"of {record.nbytes} bytes."
            )
        return record.offset + start


def open_torch_file(path: Path, allowed_globals: frozenset[str] = frozenset()) -> TorchFile:
    """Opens `path` without executing its pickle. Reads the zip directory and `data.pkl`, no tensor.

    Raises:
        BrokenCheckpoint, UnsafePickle, UnsupportedLayout: see `read_archive` and `unpickle`.
    """
    archive = read_archive(path)
    pickled = archive.records["data.pkl"]
    with path.open("rb") as file:
        file.seek(pickled.offset)
        data = file.read(pickled.nbytes)
    return TorchFile(archive, unpickle(archive, data, allowed_globals))
