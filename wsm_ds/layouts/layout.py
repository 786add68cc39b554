"""A layout: all fragments of one checkpoint, as frozen data without tensors.

Fragments are kept as numpy tables (a 70B run at 512 ranks has a million of them), one per kind of element:

    master            optimizer's full-precision weights
    module            the weights that forward passes use
    frozen, buffer    parameters without an optimizer, and registered buffers
    exp_avg, …        optimizer states, under the optimizer's own names
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsm_ds.dtypes import CODES, DType
from wsm_ds.layouts.fragments import FRAGMENT as FRAGMENT
from wsm_ds.layouts.fragments import EvenPartitions, Fragments
from wsm_ds.layouts.fragments import Table as Table
from wsm_ds.layouts.snapshot import Snapshot
from wsm_ds.torchfile import Archive, Tensor, TorchFile


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the model.

    Attributes:
        shape: its sizes.
        dtype: its dtype in the module.
        role: "parameter" (the optimizer updates it), "frozen" or "buffer".
        axes: the order in which its elements are numbered, see `element_order`; None: row-major.
    """

    shape: tuple[int, ...]
    dtype: DType
    role: str
    axes: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """One checkpoint as a map from elements to byte ranges.

    Attributes:
        path: the checkpoint's folder.
        tag: its name within the run.
        step: optimizer steps before it was saved.
        stage: ZeRO stage of the run.
        world_size: data-parallel ranks of the run.
        dtype: of the module's parameters.
        files: paths of all files, relative to `path`; fragments refer to them by number.
        archives: the zip directory of each file.
        tensors: every tensor of the model by its fully qualified name; fragments refer to them by number.
        aliases: further names of tied tensors, with the name in `tensors`.
        fragments: one table of `FRAGMENT` rows for each kind of element.
        learning_rates: of each parameter group; None for a group without one (an optimizer that computes its own).
        warmup_num_steps: updates of the run's warmup; None if the files do not hold it.
        is_train_mode: which weights a schedule-free optimizer left in the model: those of training (True) or the
            averaged ones (False); None for other optimizers.
        indivisible_states: optimizer states that hold neither one value per element nor one value alone: by name, what
            they hold. They can be copied with their files, but neither cut nor summed.
        contradictions: what the metadata of the files contradicts itself in, see `one_save`; sentences.
        has_nameless_states: whether the files hold optimizer states and do not say to which parameters they belong.
        extra_states: entries of the module's state dict that are neither parameters nor buffers (`get_extra_state`).
        opaque: tensors whose values are not simply stored elements, with what each is ("a quantized tensor"). They are
            not in `tensors`.
        model_parallel_size: ranks that hold a replica of the model together. If there are several, the name of
            a rank precedes the names of its tensors (`mp_rank_01/NAME`).
        snapshot: what its masters are, if it holds them alone; None for a full checkpoint.
    """

    path: Path
    tag: str
    step: int
    stage: int
    world_size: int
    dtype: DType
    files: tuple[str, ...]
    archives: tuple[Archive, ...]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    fragments: Fragments
    learning_rates: tuple[float | None, ...]
    warmup_num_steps: int | None
    is_train_mode: bool | None = None
    indivisible_states: dict[str, str] = field(default_factory=dict)
    contradictions: tuple[str, ...] = ()
    has_nameless_states: bool = False
    model_parallel_size: int = 1
    extra_states: tuple[str, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Fully qualified names, in the order that the fragment tables index."""
        return tuple(self.tensors)

    @property
    def is_universal(self) -> bool:
        """Whether it is a universal checkpoint: each parameter has files of its own, which hold it whole."""
        return "zero/optimizer_state.pt" in self.files

    @property
    def state_names(self) -> tuple[str, ...]:
        """Kinds of optimizer states."""
        return tuple(kind for kind in self.fragments if kind not in ("master", "module", "frozen", "buffer"))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(archive.nbytes for archive in self.archives)

    @property
    def numel(self) -> int:
        """Elements of all parameters, trained and frozen; tied ones count once."""
        return sum(info.numel for info in self.tensors.values() if info.role != "buffer")


class NamedTensor(NamedTuple):
    """A tensor's address in an opened file, and its name for messages."""

    name: str
    tensor: Tensor
    file: TorchFile


class TableBuilder:
    """Collects the fragments of a checkpoint into one table for each kind.

    Attributes:
        rows: fragments by kind.
        runs: tables of fragments by kind.
        rules: rules by kind.
        indivisible_states: as in `Layout`.
    """

    def __init__(self) -> None:
        self.indivisible_states: dict[str, str] = {}
        self.rows: dict[str, list[tuple[int, ...]]] = {}
        self.runs: dict[str, list[Table]] = {}
        self.rules: dict[str, list[EvenPartitions]] = {}

    def add(
        self,
        kind: str,
        tensor: int,
        start: int,
        numel: int,
        *,
        file: int,
        offset: int,
        dtype: DType,
        replica: int = 0,
    ) -> None:
        """Adds elements [start, start + numel) of a tensor; nothing if `numel` is 0.

        Args:
            kind: what the elements are: "master", "module", "exp_avg", …
            tensor: the tensor's number.
            start: first element, in the flattened tensor.
            numel: how many elements.
            file: the file's number.
            offset: byte offset of the first element in the file.
            dtype: of the stored elements.
            replica: the rank, if each rank keeps a copy of its own.
        """
        if numel > 0:
            self.rows.setdefault(kind, []).append((tensor, start, numel, file, offset, CODES[dtype.name], replica))

    def add_whole(
        self,
        kind: str,
        tensor: int,
        stored: NamedTensor,
        axes: tuple[int, ...] | None,
        *,
        file: int,
        replica: int = 0,
    ) -> None:
        """Adds a whole tensor, which may have any strides.

        Args:
            kind: what the elements are: "module", "buffer", …
            tensor: the tensor's number.
            stored: its address.
            axes: the order in which its elements are numbered, as in its `TensorInfo`.
            file: the file's number.
            replica: the rank, if each rank keeps a copy of its own.

        Raises:
            BrokenCheckpoint, UnsupportedLayout: as `TorchFile.byte_runs`.
        """
        address, dtype = stored.tensor, stored.tensor.dtype
        if axes is None and address.is_contiguous:
            offset = stored.file.byte_offset(address)
            self.add(kind, tensor, 0, address.numel, file=file, offset=offset, dtype=dtype, replica=replica)
            return
        runs = stored.file.byte_runs(stored.name, address, axes)
        if address.numel == 0:
            return
        if len(runs.positions) == 1:
            offset = int(runs.positions[0])
            self.add(kind, tensor, 0, runs.numel, file=file, offset=offset, dtype=dtype, replica=replica)
            return
        table = np.zeros(len(runs.positions), dtype=FRAGMENT)
        table["tensor"], table["numel"], table["file"] = tensor, runs.numel, file
        table["start"] = np.arange(len(table), dtype=np.int64) * runs.numel
        table["offset"], table["dtype"], table["replica"] = runs.positions, CODES[dtype.name], replica
        self.add_table(kind, table)

    def add_table(self, kind: str, rows: Table) -> None:
        """Adds fragments of `kind`."""
        self.runs.setdefault(kind, []).append(rows)

    def add_rule(self, kind: str, rule: EvenPartitions) -> None:
        """Adds the fragments of `kind` that a rule gives."""
        self.rules.setdefault(kind, []).append(rule)

    def tables(self) -> Fragments:
        """Returns the fragments of each kind that has any."""
        tables = {kind: np.array(rows, dtype=FRAGMENT) for kind, rows in self.rows.items()}
        for kind, runs in self.runs.items():
            tables[kind] = np.concatenate([*([tables[kind]] if kind in tables else []), *runs])
        return Fragments(tables, {kind: tuple(rules) for kind, rules in self.rules.items()})


def are_copies(layout: Layout, other: Layout) -> bool:
    """Whether two checkpoints hold the same tensors at the same rates, as the CRC-32s in their files tell.

    torch stores the CRC-32 of every tensor (`torch.serialization.set_crc32_options`). Without them, two checkpoints do
    not count as copies. Client state may differ: a framework writes its own file names there.

    Args:
        layout: a checkpoint.
        other: another one.
    """
    checksums = _checksums(layout)
    return (
        all(crc for _, crc in checksums.values())
        and checksums == _checksums(other)
        and layout.learning_rates == other.learning_rates
    )


def _checksums(layout: Layout) -> dict[tuple[str, str], tuple[int, int]]:
    """Size in bytes and CRC-32 of every tensor's record, by file and record."""
    return {
        (name, record): (nbytes, crc)
        for name, archive in zip(layout.files, layout.archives, strict=True)
        for record, nbytes, crc in zip(
            archive.directory.names, archive.directory.nbytes.tolist(), archive.crcs.tolist(), strict=True
        )
        if record.startswith("data/") and nbytes
    }
