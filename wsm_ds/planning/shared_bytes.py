"""Tensors that share bytes of a file. An output stores these bytes once.

Rotary embeddings are often one buffer that every layer registers, and buffers and frozen parameters may be views of
each other. `torch.save` writes such a storage once, with all tensor names that refer to it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wsm_ds.dtypes import ITEMSIZES
from wsm_ds.errors import UnsupportedLayout
from wsm_ds.layouts.layout import Table
from wsm_ds.planning.intersect import Ints


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
    """The result of `trim_shared_bytes`.

    Attributes:
        table: fragments of which no two have a byte in common.
        shared: the elements that were trimmed.
    """

    table: Table
    shared: frozenset[SharedElements]


def trim_shared_bytes(table: Table, checkpoint: str) -> TrimmedFragments:
    """Trims from each fragment the bytes that an earlier fragment of the same file already covers.

    Where two fragments begin at the same byte, the lower tensor number keeps the bytes.

    Args:
        table: fragments of one kind.
        checkpoint: the checkpoint's path, for the message.

    Raises:
        UnsupportedLayout: two tensors share bytes, but have different dtypes or share parts of elements.
    """
    rows = table[np.lexsort((table["tensor"], table["offset"], table["file"]))]
    begin, end = rows["offset"], rows["offset"] + rows["numel"] * _itemsizes(rows)
    overlaps = (rows["file"][1:] == rows["file"][:-1]) & (begin[1:] < end[:-1])
    if not overlaps.any():
        return TrimmedFragments(table, frozenset())
    tables, shared = [], set[SharedElements]()
    for file in np.unique(rows["file"]):
        trimmed = _trim_one_file(rows[rows["file"] == file], checkpoint)
        tables.append(trimmed.table)
        shared |= trimmed.shared
    return TrimmedFragments(np.concatenate(tables), frozenset(shared))


def _trim_one_file(rows: Table, checkpoint: str) -> TrimmedFragments:
    """Does the work of `trim_shared_bytes` for the fragments of one file, sorted by offset."""
    itemsize = _itemsizes(rows)
    begin, end = rows["offset"], rows["offset"] + rows["numel"] * itemsize
    covered_until = np.concatenate([begin[:1], np.maximum.accumulate(end)[:-1]])
    furthest = np.maximum.accumulate(np.where(end > covered_until, np.arange(len(rows)), 0))
    # Of the earlier fragments, the one with the greatest end contains every byte that the row shares with any of them.
    owner = np.concatenate([[0], furthest[:-1]])
    cut_bytes = np.clip(covered_until - begin, 0, end - begin)
    distance = begin - begin[owner]
    is_cut = cut_bytes > 0
    has_owner_dtype = rows["dtype"] == rows["dtype"][owner]
    if np.any(is_cut & ~(has_owner_dtype & (cut_bytes % itemsize == 0) & (distance % itemsize == 0))):
        raise UnsupportedLayout(
            f"{checkpoint}: two tensors share bytes, but have different dtypes or share parts of elements. "
            "Write safetensors (--format safetensors), which store them apart."
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
