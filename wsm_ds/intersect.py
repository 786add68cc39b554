"""Which bytes of the sources make each byte run of an output: intervals intersected on a line of elements.

All tensors of a model laid end to end are one line. A checkpoint's fragments of one kind cut that line in
intervals; two checkpoints cut it differently where their world sizes, stages or orders differ. Cutting at
every boundary of every source gives pieces that each lie in one fragment of each; pieces that follow each other
in every file are joined again. Equal layouts so end in one long run per partition.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import ALL
from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts.layout import Table

ITEMSIZES = np.array([dtype.itemsize for dtype in ALL], dtype=np.int64)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """n runs of an output with K sources each, ordered by output file and offset.

    Arrays of shape [n]: `file`, `offset` (bytes), `numel`, `dtype` (code), `tensor` (the first one of the run);
    of shape [K, n]: `source_file`, `source_offset` (bytes), `source_dtype`. `labels` are (file, offset, tensor)
    of every piece before joining, so that an element can be named.
    """

    file: Ints
    offset: Ints
    numel: Ints
    dtype: Ints
    tensor: Ints
    source_file: Ints
    source_offset: Ints
    source_dtype: Ints
    labels: tuple[Ints, Ints, Ints]


def intersect(out: Table, sources: list[Table], numels: Ints, names: tuple[str, ...]) -> Runs:
    """Joined runs that cover every fragment of `out` with elements of each of `sources`.

    Args:
        out: fragments to be written; they may repeat elements.
        sources: one table per source; together its fragments hold every element of `out`.
        numels: number of elements of each tensor, shape [tensors]; `out` and `sources` index it alike.
        names: fully qualified names, for errors.

    Raises:
        LayoutMismatch: a source lacks elements (the tensor and the range are named).
    """
    base = np.concatenate([[0], np.cumsum(numels)])
    lines = [_sorted_line(source, base) for source in sources]
    row, begin, end = _cut(out, base, lines)
    order = np.lexsort((out["offset"][row] + (begin - base[out["tensor"][row]] - out["start"][row]), out["file"][row]))
    row, begin, end = row[order], begin[order], end[order]
    columns = [_address(out, row, begin, base)]
    for number, (source, line) in enumerate(zip(sources, lines, strict=True)):
        columns.append(_address(source, _find(line, begin, end, out, row, base, names, number), begin, base))
    return _joined(columns, end - begin, out["tensor"][row].astype(np.int64))


def _line(table: Table, base: Ints) -> tuple[Ints, Ints]:
    begin = base[table["tensor"]] + table["start"]
    return begin, begin + table["numel"]


def _sorted_line(table: Table, base: Ints) -> tuple[Ints, Ints, Ints]:
    """(rows, begin, end) of a table's fragments along the line; of repeated elements the first row counts."""
    begin, end = _line(table, base)
    begin, rows = np.unique(begin, return_index=True)
    return rows, begin, end[rows]


def _cut(out: Table, base: Ints, lines: list[tuple[Ints, Ints, Ints]]) -> tuple[Ints, Ints, Ints]:
    """(row of out, begin, end) of the pieces of every row of `out`, cut at each boundary of each source."""
    begin, end = _line(out, base)
    bounds = np.unique(np.concatenate([np.concatenate(line[1:]) for line in lines]))
    low, high = np.searchsorted(bounds, begin, "right"), np.searchsorted(bounds, end, "left")
    counts = high - low + 1
    row = np.repeat(np.arange(len(out)), counts)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    within = np.arange(len(row)) - first[row]
    padded = np.concatenate([bounds, [0]])
    piece_begin = np.where(within == 0, begin[row], padded[np.minimum(low[row] + within - 1, len(bounds))])
    piece_end = np.where(within == counts[row] - 1, end[row], padded[np.minimum(low[row] + within, len(bounds))])
    return row, piece_begin, piece_end


def _find(
    line: tuple[Ints, Ints, Ints],
    begin: Ints,
    end: Ints,
    out: Table,
    row: Ints,
    base: Ints,
    names: tuple[str, ...],
    number: int,
) -> Ints:
    """For each piece, the source's row that holds it."""
    rows, starts, ends = line
    at = np.searchsorted(starts, begin, "right") - 1
    missing = np.flatnonzero((at < 0) | (ends[np.maximum(at, 0)] < end))
    if len(missing):
        piece = missing[0]
        tensor = int(out["tensor"][row[piece]])
        raise LayoutMismatch(
            f"source {number} lacks elements {begin[piece] - base[tensor]} to {end[piece] - base[tensor]} of "
            f"{names[tensor]}, which the output holds."
        )
    return rows[at]


def _address(table: Table, rows: Ints, begin: Ints, base: Ints) -> tuple[Ints, Ints, Ints]:
    """(file, byte offset, dtype) of the piece that begins at `begin`, in the table's row."""
    taken = table[rows]
    dtype = taken["dtype"].astype(np.int64)
    within = begin - base[taken["tensor"]] - taken["start"]
    return taken["file"].astype(np.int64), taken["offset"] + within * ITEMSIZES[dtype], dtype


def _joined(columns: list[tuple[Ints, Ints, Ints]], numel: Ints, tensor: Ints) -> Runs:
    """Joins pieces that follow each other in the output and in every source."""
    follows = np.ones(max(len(numel) - 1, 0), dtype=bool)
    for file, offset, dtype in columns:
        follows &= (file[1:] == file[:-1]) & (dtype[1:] == dtype[:-1])
        follows &= offset[1:] == offset[:-1] + numel[:-1] * ITEMSIZES[dtype[:-1]]
    heads = np.concatenate([[0], np.flatnonzero(~follows) + 1]) if len(numel) else np.zeros(0, np.int64)
    (file, offset, dtype), *sources = columns
    return Runs(
        file=file[heads],
        offset=offset[heads],
        numel=np.add.reduceat(numel, heads) if len(numel) else numel,
        dtype=dtype[heads],
        tensor=tensor[heads],
        source_file=np.array([source[0][heads] for source in sources]),
        source_offset=np.array([source[1][heads] for source in sources]),
        source_dtype=np.array([source[2][heads] for source in sources]),
        labels=(file, offset, tensor),
    )
