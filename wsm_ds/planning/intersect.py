"""Where the same elements lie in sources and outputs: intervals matched on a line of elements.

All tensors of a model laid end to end are one line. A checkpoint's fragments of one kind cut that line into
intervals; two checkpoints cut it differently where their world sizes, stages or orders differ. A *stream* goes over
the elements in the order of the first output, and `Places` say, for every source and every output, where each
stretch of the stream lies. Stretches that follow each other in a file are joined, so equal layouts end in one long
run per partition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import ALL, DType
from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts.layout import Table

ITEMSIZES = np.array([dtype.itemsize for dtype in ALL], dtype=np.int64)
NOWHERE = -1
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The elements of a stream: stretches [begin, end) of the line, one after the other; shape [m] each."""

    begin: Ints
    end: Ints

    @property
    def starts(self) -> Ints:
        """The stream's element that each stretch begins with, and the number of all; shape [m + 1]."""
        return np.concatenate([[0], np.cumsum(self.end - self.begin)]).astype(np.int64)


class Place(NamedTuple):
    """A run of stream elements that lie one after the other in one file.

    A NamedTuple, not a dataclass: the engine makes millions of them.

    Attributes:
        element: first element, counted from the start of the stream.
        numel: number of elements.
        file: number of the file, an input's in a source's places and an output file's in a target's.
        offset: byte offset of the first element in that file.
    """

    element: int
    numel: int
    file: int
    offset: int


@dataclass(frozen=True)
class Places:
    """Where the elements of a stream lie: [starts[i], starts[i+1]) from byte offsets[i] of file files[i] on.

    Arrays of shape [n], `starts` of [n + 1]. A file NOWHERE: these elements have no place. `dtypes` are codes.
    """

    starts: Ints
    files: Ints
    offsets: Ints
    dtypes: Ints

    def within(self, begin: int, end: int) -> Iterator[Place]:
        """Yields the places of the stream's elements [begin, end), in order; elements that lie NOWHERE are left out."""
        index = int(np.searchsorted(self.starts, begin, "right")) - 1
        while begin < end:
            stop = min(end, int(self.starts[index + 1]))
            if self.files[index] != NOWHERE:
                skipped = (begin - int(self.starts[index])) * int(ITEMSIZES[self.dtypes[index]])
                yield Place(begin, stop - begin, int(self.files[index]), int(self.offsets[index]) + skipped)
            begin, index = stop, index + 1

    def dtype(self, element: int) -> DType:
        """The dtype that an element has here."""
        return ALL[self.dtypes[int(np.searchsorted(self.starts, element, "right")) - 1]]

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""
        sizes = np.diff(self.starts) * ITEMSIZES[self.dtypes]
        return int(sizes[self.files != NOWHERE].sum())


def line_of(numels: Ints) -> Ints:
    """Where each tensor begins on the line, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(numels)]).astype(np.int64)


def without_repeats(table: Table, base: Ints) -> list[Table]:
    """`table` as the fewest tables that have no element twice."""
    begin, end = _interval(table, base)
    order = np.argsort(begin, kind="stable")
    if np.all(end[order][:-1] <= begin[order][1:]):
        return [table]
    layers: list[list[int]] = []
    reached: list[int] = []
    for row in order:
        for number, last in enumerate(reached):
            if last <= begin[row]:
                layers[number].append(row)
                reached[number] = int(end[row])
                break
        else:
            layers.append([row])
            reached.append(int(end[row]))
    return [table[np.sort(rows)] for rows in layers]


def order_of(outs: Sequence[Table], base: Ints) -> Order:
    """All elements of `outs`: those of the first in its order of files and offsets, then what only later ones have."""
    lines = [_sorted_line(out, base) for out in outs]
    bounds = np.unique(np.concatenate([np.concatenate(line[1:]) for line in lines]))
    begin, end = bounds[:-1], bounds[1:]
    rank = np.full(len(begin), len(outs))
    file, offset = np.zeros(len(begin), np.int64), np.zeros(len(begin), np.int64)
    for number, (out, (rows, starts, ends)) in enumerate(zip(outs, lines, strict=True)):
        at = np.searchsorted(starts, begin, "right") - 1
        mine = np.flatnonzero((at >= 0) & (ends[np.maximum(at, 0)] > begin) & (rank == len(outs)))
        rank[mine] = number
        file[mine], offset[mine], _ = _address(out, rows[at[mine]], begin[mine], base)
    kept = np.flatnonzero(rank < len(outs))
    kept = kept[np.lexsort((offset[kept], file[kept], rank[kept]))]
    return Order(begin[kept], end[kept])


def locate(order: Order, table: Table, base: Ints) -> Places:
    """Where the elements of `order` lie in `table`; NOWHERE what it has not."""
    rows, starts, ends = _sorted_line(table, base)
    bounds = np.unique(np.concatenate([starts, ends]))
    piece, begin, end = _cut(order, bounds)
    at = np.searchsorted(starts, begin, "right") - 1
    is_held = (at >= 0) & (ends[np.maximum(at, 0)] >= end)
    file, offset, dtype = _address(table, rows[np.maximum(at, 0)], begin, base)
    file = np.where(is_held, file, NOWHERE)
    offset = np.where(is_held, offset, 0)
    first = order.starts[:-1][piece] + begin - order.begin[piece]
    numel = end - begin
    follows = (file[1:] == file[:-1]) & (dtype[1:] == dtype[:-1])
    follows &= (offset[1:] == offset[:-1] + numel[:-1] * ITEMSIZES[dtype[:-1]]) | (file[1:] == NOWHERE)
    heads = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    total = np.array([order.starts[-1]])
    return Places(np.concatenate([first[heads], total]), file[heads], offset[heads], dtype[heads])


def require_all(found: Places, order: Order, where: str, base: Ints, names: Sequence[str]) -> None:
    """Raises LayoutMismatch, naming the tensor and the elements, if some of them lie NOWHERE."""
    missing = np.flatnonzero(found.files == NOWHERE)
    if len(missing):
        tensor, begin = element_of(order, base, int(found.starts[missing[0]]))
        numel = int(found.starts[missing[0] + 1] - found.starts[missing[0]])
        raise LayoutMismatch(
            f"{where} lacks elements {begin} to {begin + numel} of {names[tensor]}, which the output holds."
        )


def element_of(order: Order, base: Ints, element: int) -> tuple[int, int]:
    """(tensor, element in it) of an element of a stream."""
    piece = int(np.searchsorted(order.starts, element, "right")) - 1
    position = int(order.begin[piece]) + element - int(order.starts[piece])
    tensor = int(np.searchsorted(base, position, "right")) - 1
    return tensor, position - int(base[tensor])


def _interval(table: Table, base: Ints) -> tuple[Ints, Ints]:
    begin = base[table["tensor"]] + table["start"]
    return begin, begin + table["numel"]


def _sorted_line(table: Table, base: Ints) -> tuple[Ints, Ints, Ints]:
    """(rows, begin, end) of a table's fragments along the line; of repeated elements the first row counts."""
    begin, end = _interval(table, base)
    begin, rows = np.unique(begin, return_index=True)
    return rows, begin, end[rows]


def _cut(order: Order, bounds: Ints) -> tuple[Ints, Ints, Ints]:
    """(stretch of the order, begin, end) of the pieces of every stretch, cut at `bounds`."""
    begin, end = order.begin, order.end
    low, high = np.searchsorted(bounds, begin, "right"), np.searchsorted(bounds, end, "left")
    counts = high - low + 1
    piece = np.repeat(np.arange(len(begin)), counts)
    within = np.arange(len(piece)) - np.concatenate([[0], np.cumsum(counts)[:-1]])[piece]
    padded = np.concatenate([bounds, [0]])
    cut_begin = np.where(within == 0, begin[piece], padded[np.minimum(low[piece] + within - 1, len(bounds))])
    cut_end = np.where(within == counts[piece] - 1, end[piece], padded[np.minimum(low[piece] + within, len(bounds))])
    return piece, cut_begin, cut_end


def _address(table: Table, rows: Ints, begin: Ints, base: Ints) -> tuple[Ints, Ints, Ints]:
    """(file, byte offset, dtype) of what begins at `begin` of the line, in the table's rows."""
    taken = table[rows]
    dtype = taken["dtype"].astype(np.int64)
    within = begin - base[taken["tensor"]] - taken["start"]
    return taken["file"].astype(np.int64), taken["offset"] + within * ITEMSIZES[dtype], dtype
