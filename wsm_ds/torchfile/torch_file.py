"""One torch file, opened: its archive, its object tree, and where each tensor's bytes lie."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from wsm_ds.dtypes import Array, widen
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, VerificationFailed, WsmError
from wsm_ds.filesystem.read_ahead import read_ahead
from wsm_ds.torchfile.archive import Archive, Record
from wsm_ds.torchfile.known_files import understand
from wsm_ds.torchfile.raw_file import read_raw
from wsm_ds.torchfile.strides import Runs, last_position, permuted, run_count, runs_of
from wsm_ds.torchfile.unpickle import Tensor, record_of, unpickle

Result = TypeVar("Result")
MOST_RUNS = 1 << 20
"""Most runs of one tensor that is not contiguous. A plan has a row for each of them: some 20 seconds for so many."""


@dataclass(frozen=True)
class TorchFile:
    """An opened torch file.

    Attributes:
        archive: its records.
        tree: what `torch.load` would return, with `Tensor` addresses in place of tensors. Files that are alike share
            it, so nobody may change it.
        memo: see `once_per_form`.
    """

    archive: Archive
    tree: Any
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

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
        if not tensor.is_contiguous:
            raise BrokenCheckpoint(
                f"{self.path}: a tensor of shape {tensor.shape} and stride {tensor.stride} is not contiguous."
            )
        return self._first_byte(tensor)

    def address(self, tensor: Tensor) -> int:
        """Returns `byte_offset`, which is found once for all files that are alike."""
        key = ("address", id(tensor))
        if key not in self.memo:
            self.memo[key] = self.byte_offset(tensor)
        offset: int = self.memo[key]
        return offset

    def elements(self, tensor: Tensor) -> Array:
        """Reads the elements of a small tensor, as they are stored: an array of `tensor.dtype.storage`, [numel].

        Raises:
            BrokenCheckpoint: as `byte_offset`.
        """
        return np.fromfile(self.path, tensor.dtype.storage, tensor.numel, offset=self.byte_offset(tensor))

    def number(self, tensor: Tensor) -> float:
        """Reads the only element of a floating-point tensor: a rate, or a count of updates.

        Raises:
            BrokenCheckpoint: as `byte_offset`.
        """
        return float(widen(self.elements(tensor), tensor.dtype)[0])

    def byte_runs(self, name: str, tensor: Tensor, axes: tuple[int, ...] | None = None) -> Runs:
        """Returns where the elements of a tensor lie in the file. It may have any strides.

        Args:
            name: of the tensor, for messages.
            tensor: the tensor.
            axes: the order of the dimensions, the slowest first; None: row-major order.

        Returns:
            Runs; their positions are offsets in the file, in bytes.

        Raises:
            BrokenCheckpoint: the tensor reaches beyond its storage.
            UnsupportedLayout: it lies in more than `MOST_RUNS` runs.
        """
        shape, stride = permuted(tensor.shape, tensor.stride, axes)
        first_byte, count = self._first_byte(tensor), run_count(shape, stride)
        if count > MOST_RUNS:
            raise UnsupportedLayout(
                f"{self.path}: {name} of shape {list(tensor.shape)} and stride {list(tensor.stride)} is stored in "
                f"{count} pieces, and this version reads at most {MOST_RUNS} of a tensor. Make it contiguous in the "
                "training program (.contiguous())."
            )
        runs = runs_of(shape, stride)
        return Runs(runs.numel, first_byte + runs.positions * tensor.dtype.itemsize)

    def _first_byte(self, tensor: Tensor) -> int:
        record, itemsize = self.record(tensor), tensor.dtype.itemsize
        end = tensor.offset + 1 + last_position(tensor.shape, tensor.stride)
        if end * itemsize > record.nbytes:
            raise BrokenCheckpoint(
                f"{self.path}: a tensor of {tensor.numel} elements at {tensor.offset} reaches beyond its storage "
                f"of {record.nbytes} bytes."
            )
        return record.offset + tensor.offset * itemsize


def open_torch_file(path: Path, allowed_globals: frozenset[str] = frozenset()) -> TorchFile:
    """Opens a torch file without executing its pickle. Reads the zip directory and `data.pkl`, but no tensor.

    Args:
        path: the file.
        allowed_globals: names of the user's own classes that the pickle may mention; they are not imported.

    Raises:
        BrokenCheckpoint: it is not a file that torch writes; the message says what is wrong.
        UnsafePickle: it names a global that is not among the known ones; the message names it.
        UnsupportedLayout: it is in torch's legacy format, or its pickle is larger than that of any checkpoint.
        OSError: it cannot be read.
    """
    archive, form = understand(read_raw(path), allowed_globals)
    return TorchFile(archive, form.tree, form.memo)


def open_own_tree(path: Path, allowed_globals: frozenset[str] = frozenset()) -> TorchFile:
    """Opens a torch file whose tree no other file shares: it may be changed, and its storages know their file.

    Args:
        path: the file.
        allowed_globals: see `open_torch_file`.

    Raises:
        WsmError, OSError: as `open_torch_file`.
    """
    raw = read_raw(path)
    archive, form = understand(raw, allowed_globals)
    return TorchFile(archive, unpickle(archive, form.pickled, allowed_globals))


def open_torch_files(
    paths: Iterable[Path], allowed_globals: frozenset[str] = frozenset(), on_file: Callable[[], None] = lambda: None
) -> Iterator[TorchFile]:
    """Opens torch files, in their order, and reads the next ones meanwhile. See `open_torch_file`.

    Args:
        paths: the files.
        allowed_globals: see `open_torch_file`.
        on_file: called for each file that was read.
    """
    for raw in read_ahead(read_raw, paths):
        archive, form = understand(raw, allowed_globals)
        on_file()
        yield TorchFile(archive, form.tree, form.memo)


def once_per_form(function: Callable[[TorchFile], Result]) -> Callable[[TorchFile], Result]:
    """Makes a function of a torch file remember its result for all files that are alike.

    Args:
        function: its result depends on the tree and on where records lie, and not on the path, the size, the times or
            the CRC-32s.
    """

    @wraps(function)
    def remembered(file: TorchFile) -> Result:
        if function not in file.memo:
            file.memo[function] = function(file)
        result: Result = file.memo[function]
        return result

    return remembered


def require_readable(paths: Iterable[Path], allowed_globals: frozenset[str] = frozenset()) -> None:
    """Opens torch files that were just written, as their readers will.

    Args:
        paths: the files.
        allowed_globals: see `open_torch_file`.

    Raises:
        VerificationFailed: one of them cannot be read; the message says why.
    """
    try:
        for _ in open_torch_files(paths, allowed_globals):
            pass
    except WsmError as error:
        raise VerificationFailed(
            f"the output's file cannot be read, so nothing is published: {error} The newest checkpoint is damaged, or "
            "the disk is."
        ) from error
