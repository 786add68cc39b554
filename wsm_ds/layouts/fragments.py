"""The fragments of a checkpoint: a table of rows for each kind of element, or a rule that gives the rows.

ZeRO stage 3 cuts every parameter in the same way, so a rule with a few numbers a tensor and a rank takes the place of
ranks x tensors rows. Checkpoints that are alike share one object, and with it the rows.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from wsm_ds.dtypes import ITEMSIZES

FRAGMENT = np.dtype(
    [("tensor", "i4"), ("start", "i8"), ("numel", "i8"), ("file", "i4"), ("offset", "i8"), ("dtype", "i1"),
     ("replica", "i4")]
)  # fmt: skip
"""One fragment: elements [start, start + numel) of a tensor at a byte offset of a file.

`tensor` and `file` index the layout's `names` and `files`, `dtype` is an index in `dtypes.ALL`. `replica` is the rank
if every rank keeps a copy of its own (stage 3's buffers), and 0 for a single copy.
"""
Table = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EvenPartitions:
    """Parameters that are cut by themselves into ceil(numel / world_size) elements for each rank.

    Each rank keeps its partitions of them in one flat tensor, one after the other, with the padding of the last ranks.

    Attributes:
        tensors: numbers of the parameters, in the order of the flat tensor, shape [t].
        numels: their elements, shape [t].
        ranks: the data-parallel ranks, shape [w].
        files: the number of each rank's file, shape [w].
        offsets: where each rank's flat tensor begins in its file, in bytes, shape [w].
        dtype: code of the dtype.
        world_size: number of partitions.
    """

    tensors: Ints
    numels: Ints
    ranks: Ints
    files: Ints
    offsets: Ints
    dtype: int
    world_size: int

    @property
    def is_whole(self) -> bool:
        """Whether every rank has its partitions: then they are all elements of the parameters."""
        return np.array_equal(self.ranks, np.arange(self.world_size))

    def rows(self) -> Table:
        """Returns the fragments, rank by rank. Partitions that are padding alone are left out."""
        sizes = -(-self.numels // self.world_size)
        starts = np.minimum(self.ranks[:, None] * sizes, self.numels)
        numels = np.minimum(sizes, self.numels - starts)
        positions = np.cumsum(sizes) - sizes
        is_held = numels > 0
        rows = np.zeros(int(is_held.sum()), dtype=FRAGMENT)
        rows["tensor"] = np.broadcast_to(self.tensors, numels.shape)[is_held]
        rows["start"], rows["numel"] = starts[is_held], numels[is_held]
        rows["file"] = np.broadcast_to(self.files[:, None], numels.shape)[is_held]
        rows["offset"] = (self.offsets[:, None] + positions * ITEMSIZES[self.dtype])[is_held]
        rows["dtype"] = self.dtype
        return rows

    def is_same(self, other: "EvenPartitions") -> bool:
        """Whether two rules give the same rows."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


class Fragments(Mapping[str, Table]):
    """The table of `FRAGMENT` rows of each kind of element.

    The rows of a rule are made when they are asked for first. Nobody may change a table: layouts share it.

    Args:
        rows: fragments by kind.
        rules: rules by kind; their fragments follow the rows of the same kind.
    """

    def __init__(self, rows: Mapping[str, Table], rules: Mapping[str, tuple[EvenPartitions, ...]]) -> None:
        self.rows, self.rules = dict(rows), dict(rules)
        self._tables: dict[str, Table] = {}

    @override
    def __getitem__(self, kind: str) -> Table:
        if kind not in self._tables:
            parts = [self.rows[kind]] if kind in self.rows else []
            parts += [rule.rows() for rule in self.rules.get(kind, ())]
            if not parts:
                raise KeyError(kind)
            table: Table = parts[0] if len(parts) == 1 else np.concatenate(parts)
            table.flags.writeable = False
            self._tables[kind] = table
        return self._tables[kind]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    @override
    def __len__(self) -> int:
        return len(self._kinds)

    @override
    def __contains__(self, kind: object) -> bool:
        return kind in self._kinds

    @cached_property
    def _kinds(self) -> dict[str, None]:
        return dict.fromkeys([*self.rows, *self.rules])

    def is_same(self, other: "Fragments") -> bool:
        """Whether two checkpoints have the same fragments."""
        return (
            list(self) == list(other)
            and self.rules.keys() == other.rules.keys()
            and self.rows.keys() == other.rows.keys()
            and all(len(rules) == len(other.rules[kind]) for kind, rules in self.rules.items())
            and all(
                one.is_same(another)
                for kind, rules in self.rules.items()
                for one, another in zip(rules, other.rules[kind], strict=True)
            )
            and all(len(rows) == len(other.rows[kind]) for kind, rows in self.rows.items())
            and all(rows.tobytes() == other.rows[kind].tobytes() for kind, rows in self.rows.items())
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows that rules give."""
        return {"rows": self.rows, "rules": self.rules, "_tables": {}}


_RECENT: deque["ref[Fragments]"] = deque(maxlen=8)


def shared(fragments: Fragments) -> Fragments:
    """Returns the fragments of an earlier checkpoint if they are the same and still in use, or else `fragments`."""
    for known in _RECENT:
        earlier = known()
        if earlier is not None and earlier.is_same(fragments):
            return earlier
    _RECENT.append(ref(fragments))
    return fragments
