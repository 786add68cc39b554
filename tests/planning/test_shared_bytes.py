"""Each byte once: tables small enough to check by eye."""

import numpy as np
import pytest

from wsm_ds.dtypes import CODES
from wsm_ds.errors import UnsupportedLayout
from wsm_ds.layouts.layout import FRAGMENT
from wsm_ds.planning.shared_bytes import SharedElements, trim_shared_bytes

FP32, INT32, BF16 = CODES["fp32"], CODES["int32"], CODES["bf16"]


def table(*rows: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """Of (tensor, start, numel, file, offset, dtype)."""
    return np.array([(*row, 0) for row in rows], dtype=FRAGMENT)


def rows(fragments: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row)[:5] for row in fragments.tolist()]


def test_fragments_apart_stay_as_they_are() -> None:
    apart = table((0, 0, 4, 0, 100, FP32), (1, 0, 4, 0, 84, FP32), (2, 0, 4, 1, 100, INT32))
    trimmed = trim_shared_bytes(apart, "here")
    assert trimmed.table is apart
    assert trimmed.shared == frozenset()


def test_where_two_fragments_begin_at_one_byte_the_lower_tensor_number_keeps_it() -> None:
    trimmed = trim_shared_bytes(
        table((1, 0, 4, 0, 100, FP32), (0, 0, 4, 0, 100, FP32), (1, 0, 4, 1, 100, FP32)), "here"
    )
    assert rows(trimmed.table) == [(0, 0, 4, 0, 100), (1, 0, 4, 1, 100)]
    assert trimmed.shared == {SharedElements(tensor=1, start=0, numel=4, owner=0, owner_start=0)}


def test_overlapping_views_are_cut_where_the_one_that_reaches_furthest_ends() -> None:
    trimmed = trim_shared_bytes(
        table((0, 0, 8, 0, 100, FP32), (1, 0, 2, 0, 108, FP32), (2, 10, 6, 0, 120, FP32), (3, 0, 1, 0, 144, FP32)),
        "here",
    )
    assert rows(trimmed.table) == [(0, 0, 8, 0, 100), (2, 13, 3, 0, 132), (3, 0, 1, 0, 144)]
    assert trimmed.shared == {(1, 0, 2, 0, 2), (2, 10, 3, 0, 5)}


@pytest.mark.parametrize("other", [(1, 0, 4, 0, 100, INT32), (1, 0, 4, 0, 102, FP32), (1, 0, 4, 0, 104, BF16)])
def test_bytes_that_are_not_the_same_elements_are_refused(other: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(UnsupportedLayout, match="here: two tensors share bytes"):
        trim_shared_bytes(table((0, 0, 4, 0, 100, FP32), other), "here")
