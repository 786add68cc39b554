"""The order in which a tensor's elements are numbered, and fragments renumbered from one order to another.

Elements are numbered in row-major order, except where a file stores a tensor with its dimensions permuted (transposed,
channels_last). There they are numbered as they are stored. So such a tensor is one fragment, and a merge into the same
order reads and writes it in one piece.
"""

import numpy as np

from wsm_ds.dtypes import ITEMSIZES
from wsm_ds.errors import UnsupportedLayout
from wsm_ds.layouts.layout import Table
from wsm_ds.torchfile.torch_file import MOST_RUNS

Axes = tuple[int, ...] | None
"""Dimensions, the slowest first; None: row-major order."""


def reordered(rows: Table, name: str, shape: tuple[int, ...], old: Axes, new: Axes) -> Table:
    """Renumbers the elements of one tensor's fragments.

    Args:
        rows: the fragments, with elements numbered in the order `old`.
        name: of the tensor, for the message.
        shape: of the tensor.
        old: their order.
        new: the order that is needed.

    Returns:
        The same elements at the same bytes, numbered in the order `new`; a row for each run.

    Raises:
        UnsupportedLayout: there are too many elements; the tensor is named.

    Memory: some 100 bytes per element, for at most `MOST_RUNS` elements.
    """
    numel = int(rows["numel"].sum())
    if numel == 0:
        return rows
    if numel > MOST_RUNS:
        raise UnsupportedLayout(
            f"{name} of shape {list(shape)} is stored in the order of dimensions {_words(old, shape)} and needed in "
            f"{_words(new, shape)}; it has {numel} elements, and this version turns at most {MOST_RUNS}. Make it "
            "contiguous in the training program (.contiguous()), or write --format zero."
        )
    row = np.repeat(np.arange(len(rows)), rows["numel"])
    within = np.arange(numel) - np.repeat(np.cumsum(rows["numel"]) - rows["numel"], rows["numel"])
    old_axes, new_axes = old or tuple(range(len(shape))), new or tuple(range(len(shape)))
    old_index = np.unravel_index(rows["start"][row] + within, [shape[axis] for axis in old_axes])
    index = dict(zip(old_axes, old_index, strict=True))
    turned = rows[row]
    turned["start"] = np.ravel_multi_index([index[axis] for axis in new_axes], [shape[axis] for axis in new_axes])
    turned["offset"] += within * ITEMSIZES[turned["dtype"]]
    turned["numel"] = 1
    return _joined(turned)


def _joined(rows: Table) -> Table:
    """Joins rows of one element that follow each other in the tensor and in the file."""
    rows = rows[np.lexsort((rows["start"], rows["replica"], rows["file"]))]
    follows = (rows["file"][1:] == rows["file"][:-1]) & (rows["replica"][1:] == rows["replica"][:-1])
    follows &= (rows["start"][1:] == rows["start"][:-1] + 1) & (
        rows["offset"][1:] == rows["offset"][:-1] + ITEMSIZES[rows["dtype"][:-1]]
    )
    heads = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    joined: Table = rows[heads]
    joined["numel"] = np.diff(np.concatenate([heads, [len(rows)]]))
    return joined


def _words(axes: Axes, shape: tuple[int, ...]) -> list[int]:
    return list(axes or range(len(shape)))
