"""Every element of every tensor has one origin: what a layout holds, and what an output writes, is checked for it."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.layouts.fragments import Fragments, Table
from wsm_ds.layouts.layout import TensorInfo

KIND_OF_ROLE = {"parameter": "master", "frozen": "frozen", "buffer": "buffer"}
"""The kind of elements that a tensor of each role is made of."""
Ints = NDArray[np.int64]


def require_whole(tensors: Mapping[str, TensorInfo], fragments: Mapping[str, Table], place: str) -> None:
    """Checks that the fragments of every tensor are the whole tensor, without a gap and without an overlap.

    Each replica is checked by itself. A fragment may occur twice: tied tensors, and parameters that DeepSpeed saves in
    two places.

    Args:
        tensors: the model's tensors, in the order that the tables number them.
        fragments: the table of each kind.
        place: the folder that the fragments lie in, for the message.

    Raises:
        BrokenCheckpoint: a tensor lacks elements, or an element has two origins. The tensor is named.
    """
    infos, names = list(tensors.values()), list(tensors)
    numels = np.array([info.numel for info in infos], dtype=np.int64)
    for role, kind in KIND_OF_ROLE.items():
        expected = np.array([info.role == role and info.numel > 0 for info in infos], dtype=bool)
        ruled = _tensors_of_rules(fragments, kind)
        table = fragments.get(kind) if ruled is None else None
        if ruled is not None:
            expected[ruled] = False
        elif table is not None and len(table):
            _require_contiguous(table, numels, kind, place, names)
            expected[np.unique(table["tensor"])] = False
        missing = np.flatnonzero(expected)
        if len(missing):
            raise BrokenCheckpoint(
                f"{place}: {names[missing[0]]} has no weights in any file ({kind}, {numels[missing[0]]} elements "
                "expected). Leave the checkpoint out."
            )


def _tensors_of_rules(fragments: Mapping[str, Table], kind: str) -> Ints | None:
    """The tensors of a kind whose fragments rules give, whole and each once; None if the rows have to tell."""
    if not isinstance(fragments, Fragments) or kind in fragments.rows or kind not in fragments.rules:
        return None
    rules = fragments.rules[kind]
    tensors = np.concatenate([rule.tensors for rule in rules])
    is_whole = all(rule.is_whole for rule in rules) and len(np.unique(tensors)) == len(tensors)
    return tensors if is_whole else None


def _require_contiguous(table: Table, numels: Ints, kind: str, place: str, names: list[str]) -> None:
    """Checks the fragments of one kind: those of a tensor and replica follow each other from its first to its last."""
    rows = table[np.lexsort((table["numel"], table["start"], table["replica"], table["tensor"]))]
    same_tensor = (rows["tensor"][1:] == rows["tensor"][:-1]) & (rows["replica"][1:] == rows["replica"][:-1])
    same_range = same_tensor & (rows["start"][1:] == rows["start"][:-1]) & (rows["numel"][1:] == rows["numel"][:-1])
    kept = np.concatenate([[True], ~same_range])
    rows, is_next = rows[kept], np.concatenate([[False], same_tensor])[kept]
    ends = rows["start"] + rows["numel"]
    expected_starts = np.where(is_next, np.concatenate([[0], ends[:-1]]), 0)
    is_last = np.concatenate([~is_next[1:], [True]])
    is_wrong = (rows["start"] != expected_starts) | (is_last & (ends != numels[rows["tensor"]]))
    if is_wrong.any():
        row = int(np.flatnonzero(is_wrong)[0])
        tensor, start = int(rows["tensor"][row]), int(rows["start"][row])
        raise BrokenCheckpoint(
            f"{place}: the {numels[tensor]} elements of {names[tensor]} ({kind}) are not in the files exactly once: "
            f"a piece is [{start}, {int(ends[row])}), where one from {int(expected_starts[row])} on is expected. "
            "Leave the checkpoint out."
        )
