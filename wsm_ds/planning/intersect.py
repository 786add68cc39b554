"""Where the same elements lie in sources and outputs: ranges matched on a line of elements.

All tensors of a model laid end to end are one *line*. The fragments of one kind in a checkpoint cut the line into
ranges. Two checkpoints cut it differently where their world sizes, stages or parameter orders differ. A *stream*
goes over the elements in the order of the first output; `Places` say, for every source and every output, where each
run of elements lies. Runs that follow each other in a file are joined, so equal layouts give one long run per
partition.

In this module `line` is the array that `line_of` returns: the position at which each tensor begins on the line, and
the line's length; shape [tensors + 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import ALL, ITEMSIZES, DType
from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts.layout import Table

NOWHERE = -1
"""The file number of elements that a checkpoint or an output does not have."""
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The elements of a stream: ranges [begin, end) of the line, one after the other; shape [m] each."""

    begin: Ints
    end: Ints

    @property
    def starts(self) -> Ints:
        """The stream element that each range begins with, and at the end their number; shape [m + 1]."""
        return np.concatenate([[0], np.cumsum(self.end - self.begin)]).astype(np.int64)

    @property
    def numel(self) -> int:
        """Number of elements of the stream."""
        return int((self.end - self.begin).sum())


class Place(NamedTuple):
    """A run of stream elements that lie one after the other in one file.

    A NamedTuple and not a dataclass: the engine makes one for every slice and file, and unpacks it at once.

    Attributes:
        element: first element, counted from the start of the stream.
        numel: number of elements.
        file: number of the file: an input in the places of a source, an output file in the places of a target.
        offset: byte offset of the first element in that file.
    """

    element: int
    numel: int
    file: int
    offset: int


@dataclass(frozen=True)
class Places:
    """Where the elements of a stream lie in one checkpoint or in one output.

    Stream elements [starts[i], starts[i + 1]) lie from byte offsets[i] of file files[i] on.

    Attributes:
        starts: shape [n + 1]; the last entry is the number of elements of the stream.
        files: file numbers, counted from `first_file`, shape [n]; NOWHERE where the elements have no place.
        offsets: byte offsets, shape [n].
        dtypes: codes of `wsm_ds.dtypes.ALL`, shape [n].
        first_file: checkpoints that are alike share the arrays, and differ in this number.
    """

    starts: Ints
    files: Ints
    offsets: Ints
    dtypes: Ints
    first_file: int = 0

    def within(self, begin: int, end: int) -> Iterator[Place]:
        """Yields the places of the stream elements [begin, end), in order; elements that lie NOWHERE are left out."""
        index = int(np.searchsorted(self.starts, begin, "right")) - 1
        while begin < end:
            stop = min(end, int(self.starts[index + 1]))
            if self.files[index] != NOWHERE:
                skipped_bytes = (begin - int(self.starts[index])) * int(ITEMSIZES[self.dtypes[index]])
                file = int(self.files[index]) + self.first_file
                yield Place(begin, stop - begin, file, int(self.offsets[index]) + skipped_bytes)
            begin, index = stop, index + 1

    def dtype(self, element: int) -> DType:
        """The dtype in which a stream element is stored here."""
        return ALL[self.dtypes[int(np.searchsorted(self.starts, element, "right")) - 1]]

    @property
    def used_files(self) -> Ints:
        """Numbers of the files that hold elements, rising."""
        used: Ints = np.unique(self.files[self.files != NOWHERE]) + self.first_file
        return used

    @property
    def nbytes(self) -> int:
        """Bytes of all elements that have a place."""
        sizes = np.diff(self.starts) * ITEMSIZES[self.dtypes]
        return int(sizes[self.files != NOWHERE].sum())


def line_of(numels: Ints) -> Ints:
    """Returns the position at which each tensor begins on the line, and the length of the line.

    >>> line_of(np.array([3, 4])).tolist()
    [0, 3, 7]
    """
    return np.concatenate([[0], np.cumsum(numels)]).astype(np.int64)


def without_repeats(table: Table, line: Ints) -> list[Table]:
    """Splits `table` into the fewest tables in which no element occurs twice.

    An element occurs twice where an output stores it twice, for example a frozen parameter of stage 2, which is in
    `module` and in `frozen_param_fragments`.

    Args:
        table: fragments of one kind.
        line: see the module.
    """
    begin, end = _line_range(table, line)
    order = np.argsort(begin, kind="stable")
    if np.all(end[order][:-1] <= begin[order][1:]):
        return [table]
    # First fit along the line: each row goes into the first table whose last row ends before it.
    layers: list[list[int]] = []
    layer_ends: list[int] = []
    for row in order:
        for number, layer_end in enumerate(layer_ends):
            if layer_end <= begin[row]:
                layers[number].append(row)
                layer_ends[number] = int(end[row])
                break
        else:
            layers.append([row])
            layer_ends.append(int(end[row]))
    return [table[np.sort(rows)] for rows in layers]


def order_of(tables: Sequence[Table], line: Ints) -> Order:
    """Returns the order in which a stream goes over the elements of `tables`.

    The elements of the first table come first, by file and offset, so that the first output is written front to back.
    Then come the elements that only later tables have.

    Args:
        tables: fragments of one kind in each output. No element occurs twice in a table.
        line: see the module.
    """
    sorted_lines = [_sorted_line(table, line) for table in tables]
    bounds = _distinct(np.concatenate([np.concatenate([begins, ends]) for _, begins, ends in sorted_lines]))
    begin, end = bounds[:-1], bounds[1:]
    owner = np.full(len(begin), len(tables))  # the first table that has the range
    file, offset = np.zeros(len(begin), np.int64), np.zeros(len(begin), np.int64)
    for number, (table, (rows, begins, ends)) in enumerate(zip(tables, sorted_lines, strict=True)):
        row = np.searchsorted(begins, begin, "right") - 1
        new = np.flatnonzero((row >= 0) & (ends[np.maximum(row, 0)] > begin) & (owner == len(tables)))
        owner[new] = number
        file[new], offset[new], _ = _address(table, rows[row[new]], begin[new], line)
    kept = np.flatnonzero(owner < len(tables))
    kept = kept[np.lexsort((offset[kept], file[kept], owner[kept]))]
    return Order(begin[kept], end[kept])


def order_along(order: Order, table: Table, line: Ints) -> Order:
    """Returns the elements of `order` in the order in which they lie in the files of `table`.

    Args:
        order: the elements. Those that the table does not have come last.
        table: fragments of one kind. No element occurs twice.
        line: see the module.
    """
    _, begin, end, has_place, file, offset, _ = _pieces(order, table, line)
    by_place = np.lexsort((offset, file, ~has_place))
    return Order(begin[by_place], end[by_place])


def locate(order: Order, table: Table, line: Ints) -> Places:
    """Returns where the elements of `order` lie in `table`; elements that it does not have lie NOWHERE.

    Args:
        order: the elements.
        table: fragments of one kind. No element occurs twice.
        line: see the module.
    """
    range_number, begin, end, has_place, file, offset, dtype = _pieces(order, table, line)
    file = np.where(has_place, file, NOWHERE)
    offset = np.where(has_place, offset, 0)
    first = order.starts[:-1][range_number] + begin - order.begin[range_number]
    numel = end - begin
    follows = (file[1:] == file[:-1]) & (dtype[1:] == dtype[:-1])
    follows &= (offset[1:] == offset[:-1] + numel[:-1] * ITEMSIZES[dtype[:-1]]) | (file[1:] == NOWHERE)
    heads = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    total = np.array([order.starts[-1]])
    return Places(np.concatenate([first[heads], total]), file[heads], offset[heads], dtype[heads])


def require_all(places: Places, order: Order, checkpoint: str, line: Ints, names: Sequence[str]) -> None:
    """Checks that a checkpoint has every element of a stream.

    Args:
        places: where the elements of `order` lie in the checkpoint.
        order: the elements.
        checkpoint: its path, for the message.
        line: see the module.
        names: names of the tensors.

    Raises:
        LayoutMismatch: some elements lie NOWHERE. The message names the checkpoint, the tensor and the elements.
    """
    missing = np.flatnonzero(places.files == NOWHERE)
    if len(missing):
        tensor, begin = element_of(order, line, int(places.starts[missing[0]]))
        numel = int(places.starts[missing[0] + 1] - places.starts[missing[0]])
        raise LayoutMismatch(
            f"{checkpoint} lacks elements {begin} to {begin + numel} of {names[tensor]}, which the output holds. "
            "The checkpoint is incomplete, or it is of another model: leave it out of the window."
        )


def element_of(order: Order, line: Ints, element: int) -> tuple[int, int]:
    """Returns the number of the tensor that a stream element belongs to, and the element's number in that tensor."""
    range_number = int(np.searchsorted(order.starts, element, "right")) - 1
    position = int(order.begin[range_number]) + element - int(order.starts[range_number])
    tensor = int(np.searchsorted(line, position, "right")) - 1
    return tensor, position - int(line[tensor])


def _pieces(order: Order, table: Table, line: Ints) -> tuple[Ints, Ints, Ints, NDArray[np.bool_], Ints, Ints, Ints]:
    """Cuts an order where the rows of a table begin and end.

    Returns:
        For each piece: the number of its range in the order, begin and end on the line, whether the table has it, and
        if so file, byte offset and dtype code; shape [pieces] each.
    """
    rows, begins, ends = _sorted_line(table, line)
    range_number, begin, end = _cut(order, _distinct(np.concatenate([begins, ends])))
    row = np.searchsorted(begins, begin, "right") - 1
    has_place = (row >= 0) & (ends[np.maximum(row, 0)] >= end)
    return range_number, begin, end, has_place, *_address(table, rows[np.maximum(row, 0)], begin, line)


def _distinct(values: Ints) -> Ints:
    """The distinct values, rising. The begins and ends of rows are nearly sorted; numpy's own `unique` hashes them."""
    in_order = np.sort(values, kind="stable")
    distinct: Ints = in_order[np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(in_order)]]
    return distinct


def _line_range(table: Table, line: Ints) -> tuple[Ints, Ints]:
    """The range [begin, end) of the line that each row of a table covers."""
    begin = line[table["tensor"]] + table["start"]
    return begin, begin + table["numel"]


def _sorted_line(table: Table, line: Ints) -> tuple[Ints, Ints, Ints]:
    """The rows of a table sorted along the line, and their begins and ends. Of repeated begins the first row stays."""
    begin, end = _line_range(table, line)
    # A source may store a tensor twice, such as a tied one; both copies hold the same elements.
    begin, rows = np.unique(begin, return_index=True)
    return rows, begin, end[rows]


def _cut(order: Order, bounds: Ints) -> tuple[Ints, Ints, Ints]:
    """Cuts the ranges of the order at `bounds`. Returns the number of its range, begin and end of each cut range."""
    begin, end = order.begin, order.end
    low, high = np.searchsorted(bounds, begin, "right"), np.searchsorted(bounds, end, "left")
    counts = high - low + 1
    range_number = np.repeat(np.arange(len(begin)), counts)
    within = np.arange(len(range_number)) - np.concatenate([[0], np.cumsum(counts)[:-1]])[range_number]
    padded = np.concatenate([bounds, [0]])
    bound = low[range_number] + within
    cut_begin = np.where(within == 0, begin[range_number], padded[np.minimum(bound - 1, len(bounds))])
    cut_end = np.where(within == counts[range_number] - 1, end[range_number], padded[np.minimum(bound, len(bounds))])
    return range_number, cut_begin, cut_end


def _address(table: Table, rows: Ints, begin: Ints, line: Ints) -> tuple[Ints, Ints, Ints]:
    """The file, byte offset and dtype code of the elements at positions `begin` of the line, which lie in `rows`."""
    fragments = table[rows]
    dtype = fragments["dtype"].astype(np.int64)
    within = begin - line[fragments["tensor"]] - fragments["start"]
    return fragments["file"].astype(np.int64), fragments["offset"] + within * ITEMSIZES[dtype], dtype
