"""A layout: all fragments of one checkpoint, as frozen data without tensors.

Fragments are kept as numpy tables (a 70B run at 512 ranks has a million of them), one per kind of element:

    master            optimizer's full-precision weights
    module            the weights that forward passes use
    frozen, buffer    parameters without an optimizer, and registered buffers
    exp_avg, …        optimizer states, under the optimizer's own names
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import CODES, DType
from wsm_ds.torchfile import Archive

FRAGMENT = np.dtype(
    [("tensor", "i4"), ("start", "i8"), ("numel", "i8"), ("file", "i4"), ("offset", "i8"), ("dtype", "i1"),
     ("replica", "i4")]
)  # fmt: skip
"""One fragment: elements [start, start + numel) of a tensor at a byte offset of a file.

`tensor` and `file` index the layout's `names` and `files`. `replica` tells copies apart that a rank keeps for
itself (stage 3's buffers); it is 0 where there is one copy.
"""
Table = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the model calls a tensor: its shape, its dtype in the module, and its role."""

    shape: tuple[int, ...]
    dtype: DType
    role: str  # "parameter" | "frozen" | "buffer"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """One checkpoint as a map from elements to byte ranges.

    `has_nameless_states`: there are optimizer states, but nothing says which parameters they belong to.
    `model_parallel_size`: ranks that hold a replica of the model together; if there are several, each one's tensors
    have its name in front (`mp_rank_01/NAME`).
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
    fragments: dict[str, Table]
    learning_rates: tuple[float, ...]
    warmup_num_steps: int | None
    has_nameless_states: bool = False
    model_parallel_size: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Fully qualified names, in the order that the fragment tables index."""
        return tuple(self.tensors)

    @property
    def is_universal(self) -> bool:
        """Whether parameters lie whole in files of their own; `stage` and `world_size` are then of the run."""
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
        """Parameters, trained and frozen; tied ones count once."""
        return sum(info.numel for info in self.tensors.values() if info.role != "buffer")


class TableBuilder:
    """Collects fragments by kind; empty ones are left out."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[int, ...]]] = {}

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
        """Adds elements [start, start + numel) of tensor number `tensor`."""
        if numel > 0:
            self.rows.setdefault(kind, []).append((tensor, start, numel, file, offset, CODES[dtype.name], replica))

    def tables(self) -> dict[str, Table]:
        """The finished tables."""
        return {kind: np.array(rows, dtype=FRAGMENT) for kind, rows in self.rows.items()}
