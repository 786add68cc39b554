"""Numbering of elements, and the check that every element has one origin."""

import itertools
import re

import numpy as np
import pytest

from wsm_ds.dtypes import BY_NAME
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout
from wsm_ds.layouts.coverage import require_whole
from wsm_ds.layouts.element_order import reordered
from wsm_ds.layouts.layout import Table, TableBuilder, TensorInfo
from wsm_ds.torchfile.strides import dense_axes, runs_of

SHAPE = (2, 3, 4)
ORDERS = list(itertools.permutations(range(3)))
FP32 = BY_NAME["fp32"]


def rows(*pieces: tuple[int, int, int], kind: str = "buffer", replica: int = 0) -> dict[str, Table]:
    """Fragments (start, numel, offset) of tensor 0."""
    builder = TableBuilder()
    for start, numel, offset in pieces:
        builder.add(kind, 0, start, numel, file=0, offset=offset, dtype=FP32, replica=replica)
    return dict(builder.tables())


def values(table: Table, numel: int) -> list[int]:
    """What the fragments say of a file that holds 0, 1, 2, …: the value of each element."""
    found = [-1] * numel
    for row in table:
        for index in range(int(row["numel"])):
            found[int(row["start"]) + index] = int(row["offset"]) // 4 + index
    return found


@pytest.mark.parametrize("old", ORDERS)
@pytest.mark.parametrize("new", ORDERS)
def test_elements_keep_their_bytes_in_another_order(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    stored = np.arange(24).reshape([SHAPE[axis] for axis in old]).transpose(np.argsort(old))  # of shape SHAPE
    expected = stored.transpose(new).reshape(-1)
    for cut in (0, 5, 23):
        pieces = rows((0, cut, 0), (cut, 24 - cut, 4 * cut))["buffer"]
        turned = reordered(pieces, "x", SHAPE, old, new)
        assert values(turned, 24) == expected.tolist()
        assert old != new or len(turned) <= 2


@pytest.mark.parametrize("axes", ORDERS)
def test_dense_tensors_are_one_run_in_the_order_of_their_strides(axes: tuple[int, ...]) -> None:
    tensor = np.empty([SHAPE[axis] for axis in axes], dtype=np.int8).transpose(np.argsort(axes))
    assert tensor.shape == SHAPE
    assert dense_axes(tensor.shape, tensor.strides) == (None if axes == (0, 1, 2) else axes)
    expected = np.arange(24).reshape([SHAPE[axis] for axis in axes]).transpose(np.argsort(axes)).reshape(-1)
    runs = runs_of(tensor.shape, tensor.strides)
    assert (runs.positions[:, None] + np.arange(runs.numel)).reshape(-1).tolist() == expected.tolist()


def test_more_elements_than_can_be_turned_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayout, match=r"wide of shape \[2, 1048576\] is stored in the order.*\[1, 0\]"):
        reordered(rows((0, 2 << 20, 0))["buffer"], "wide", (2, 1 << 20), (1, 0), None)


WHOLE = {"x": TensorInfo((10,), FP32, "buffer"), "nothing": TensorInfo((0, 3), FP32, "buffer")}


@pytest.mark.parametrize("pieces", [[(0, 10, 0)], [(4, 6, 16), (0, 4, 0)], [(0, 10, 0), (0, 10, 80)]])
def test_whole_tensors_pass(pieces: list[tuple[int, int, int]]) -> None:
    require_whole(WHOLE, rows(*pieces), "RUN")
    require_whole(WHOLE, rows(*pieces, replica=1), "RUN")


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(0, 9, 0)], "a piece is [0, 9)"),
        ([(1, 9, 0)], "a piece is [1, 10), where one from 0 on is expected"),
        ([(0, 4, 0), (5, 5, 20)], "a piece is [5, 10), where one from 4 on is expected"),
        ([(0, 6, 0), (4, 6, 16)], "a piece is [4, 10), where one from 6 on is expected"),
        ([(0, 11, 0)], "a piece is [0, 11)"),
    ],
)
def test_gaps_and_overlaps_are_named(pieces: list[tuple[int, int, int]], words: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=f"RUN: the 10 elements of x .buffer. .*{re.escape(words)}"):
        require_whole(WHOLE, rows(*pieces), "RUN")


def test_a_tensor_without_any_fragment_is_named() -> None:
    with pytest.raises(BrokenCheckpoint, match=r"RUN: x has no weights in any file \(buffer, 10 elements expected\)"):
        require_whole(WHOLE, rows((0, 10, 0), kind="master"), "RUN")


def test_each_replica_is_checked_by_itself() -> None:
    tables = {"buffer": np.concatenate([rows((0, 10, 0))["buffer"], rows((0, 9, 0), replica=1)["buffer"]])}
    with pytest.raises(BrokenCheckpoint, match=r"a piece is \[0, 9\)"):
        require_whole(WHOLE, tables, "RUN")
