"""Tensors that share bytes of a file, of which an output has each once.

Rotary embeddings are one buffer in every layer, and buffers and frozen parameters may be views of each other: torch
saves the storage once, and all of their names with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.layouts.layout import Table
from wsm_ds.planning.intersect import ITEMSIZES, Ints


class SharedElements(NamedTuple):
    """Elements [start, start + numel) of `tensor` that are stored in the bytes of another tensor's elements.

    Attributes:
        tensor: number of the tensor that was trimmed.
        start: its first shared element.
        numel: number of shared elements.
        owner: number of the tensor that keeps the bytes.
        owner_start: the element of `owner` that lies where element `start` lies.
    """

    tensor: int
    start: int
    numel: int
    owner: int
    owner_start: int


@dataclass(frozen=True)
class TrimmedFragments:
    """Fragments of which no two have a byte in common, and the elements that were trimmed for that."""

    table: Table
    shared: frozenset[SharedElements]


def trim_shared_bytes(table: Table, where: str) -> TrimmedFragments:
    """Takes from every fragment what one before it in its file (of the same place: of a lower number) has as well.

    Args:
        table: fragments of one kind.
        where: named in the error.

    Raises:
        UnsupportedLayout: two share bytes, but not whole elements of one dtype.
    """
    rows = table[np.lexsort((table["tensor"], table["offset"], table["file"]))]
    begin, end = rows["offset"], rows["offset"] + rows["numel"] * _itemsizes(rows)
    overlaps = (rows["file"][1:] == rows["file"][:-1]) & (begin[1:] < end[:-1])
    if not overlaps.any():
        return TrimmedFragments(table, frozenset())
    kept, shared = [], set[SharedElements]()
    for file in np.unique(rows["file"]):
        once = _once_in_a_file(rows[rows["file"] == file], where)
        kept.append(once.table)
        shared |= once.shared
    return TrimmedFragments(np.concatenate(kept), frozenset(shared))


def _once_in_a_file(rows: Table, where: str) -> TrimmedFragments:
    """The same of one file's fragments, which are in order."""
    itemsize = _itemsizes(rows)
    begin, end = rows["offset"], rows["offset"] + rows["numel"] * itemsize
    reached = np.concatenate([begin[:1], np.maximum.accumulate(end)[:-1]])
    furthest = np.maximum.accumulate(np.where(end > reached, np.arange(len(rows)), 0))
    owner = np.concatenate([[0], furthest[:-1]])  # it reaches furthest of those before, so all that is shared is its
    cut_bytes = np.clip(reached - begin, 0, end - begin)
    distance = begin - begin[owner]
    is_cut = cut_bytes > 0
    is_like = rows["dtype"] == rows["dtype"][owner]
    if np.any(is_cut & ~(is_like & (cut_bytes % itemsize == 0) & (distance % itemsize == 0))):
        raise UnsupportedLayout(
            f"{where}: two tensors share bytes, but are of two dtypes or out of step. Write safetensors, which keep "
            "them apart."
        )
    cut = cut_bytes // itemsize
    columns = (rows["tensor"], rows["start"], cut, rows["tensor"][owner], rows["start"][owner] + distance // itemsize)
    shared = frozenset(map(SharedElements, *(column[is_cut].tolist() for column in columns)))
    rows = rows.copy()
    rows["start"] += cut
    rows["numel"] -= cut
    rows["offset"] += cut_bytes
    return TrimmedFragments(rows[rows["numel"] > 0], shared)


def _itemsizes(rows: Table) -> Ints:
    sizes: Ints = ITEMSIZES[rows["dtype"].astype(np.int64)]
    return sizes
