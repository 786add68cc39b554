"""The fragment algebra against element-by-element bookkeeping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.errors import LayoutMismatch
from wsm_ds.intersect import intersect
from wsm_ds.layouts.layout import FRAGMENT, Table

FP32 = 1


def flat_table(numels: list[int], world_size: int) -> Table:
    """Stage 1/2: one flat line cut in equal partitions."""
    size = -(-sum(numels) // world_size)
    rows, position = [], 0
    for tensor, numel in enumerate(numels):
        for rank in range(world_size):
            low, high = max(position, rank * size), min(position + numel, (rank + 1) * size)
            if low < high:
                rows.append((tensor, low - position, high - low, rank, 64 + 4 * (low - rank * size), FP32, 0))
        position += numel
    return np.array(rows, dtype=FRAGMENT)


def cut_table(numels: list[int], world_size: int) -> Table:
    """Stage 3: every tensor cut by itself, padding kept."""
    rows, offsets = [], [128] * world_size
    for tensor, numel in enumerate(numels):
        size = -(-numel // world_size)
        for rank in range(world_size):
            low, high = min(rank * size, numel), min((rank + 1) * size, numel)
            if low < high:
                rows.append((tensor, low, high - low, rank, offsets[rank], FP32, 0))
            offsets[rank] += 4 * size
    return np.array(rows, dtype=FRAGMENT)


def addresses(table: Table) -> dict[tuple[int, int], tuple[int, int]]:
    """(tensor, element) → (file, byte)."""
    return {
        (int(r["tensor"]), int(r["start"]) + i): (int(r["file"]), int(r["offset"]) + 4 * i)
        for r in table
        for i in range(int(r["numel"]))
    }


LAYOUT = st.tuples(st.sampled_from([flat_table, cut_table]), st.integers(1, 5))


@given(st.lists(st.integers(1, 23), min_size=1, max_size=6), LAYOUT, st.lists(LAYOUT, min_size=1, max_size=3))
def test_every_output_byte_gets_the_same_element_of_every_source(numels, out_layout, source_layouts) -> None:  # type: ignore[no-untyped-def]
    out = out_layout[0](numels, out_layout[1])
    sources = [make(numels, world_size) for make, world_size in source_layouts]
    names = tuple(map(str, range(len(numels))))
    runs = intersect(out, sources, np.array(numels, dtype=np.int64), names)
    wanted = addresses(out)
    by_place = {place: element for element, place in wanted.items()}
    seen = set()
    maps = [addresses(source) for source in sources]
    for n in range(len(runs.file)):
        for i in range(int(runs.numel[n])):
            element = by_place[(int(runs.file[n]), int(runs.offset[n]) + 4 * i)]
            seen.add(element)
            for k, where in enumerate(maps):
                assert where[element] == (int(runs.source_file[k, n]), int(runs.source_offset[k, n]) + 4 * i)
    assert seen == set(wanted)


def test_equal_layouts_are_one_run_a_partition() -> None:
    numels = [7, 30, 11, 100]
    table = flat_table(numels, 4)
    runs = intersect(table, [table, table], np.array(numels, dtype=np.int64), tuple("abcd"))
    assert len(runs.file) == 4
    assert runs.numel.tolist() == [37, 37, 37, 37]


def test_a_source_without_some_elements_is_named() -> None:
    numels = [7, 30]
    table = flat_table(numels, 2)
    with pytest.raises(LayoutMismatch, match="source 1 lacks elements 12 to 30 of weight"):
        intersect(table, [table, table[:-1]], np.array(numels, dtype=np.int64), ("bias", "weight"))
