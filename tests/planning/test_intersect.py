"""The fragment algebra against element-by-element bookkeeping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts.layout import FRAGMENT, Table
from wsm_ds.planning.intersect import NOWHERE, Places, line_of, locate, order_of, require_all, without_repeats

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


def elements(places: Places) -> list[tuple[int, int]]:
    """(file, byte) of every element of a stream."""
    addresses_of = [(NOWHERE, 0)] * int(places.starts[-1])
    for place in places.within(0, len(addresses_of)):
        for i in range(place.numel):
            addresses_of[place.element + i] = (place.file, place.offset + 4 * i)
    return addresses_of


@given(
    st.lists(st.integers(1, 23), min_size=1, max_size=6),
    st.lists(LAYOUT, min_size=1, max_size=3),
    st.lists(LAYOUT, min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_a_stream_finds_the_same_element_in_every_source_and_every_output(  # type: ignore[no-untyped-def]
    numels, out_layouts, source_layouts, random
) -> None:
    outputs = [make(numels, world_size) for make, world_size in out_layouts]
    outputs = [out[sorted(random.sample(range(len(out)), random.randint(1, len(out))))] for out in outputs]
    sources = [make(numels, world_size) for make, world_size in source_layouts]
    base = line_of(np.array(numels, dtype=np.int64))
    order = order_of(outputs, base)
    names = [
        (tensor, int(position - base[tensor]))
        for begin, end in zip(order.begin, order.end, strict=True)
        for position in range(begin, end)
        for tensor in [int(np.searchsorted(base, position, "right")) - 1]
    ]
    assert sorted(names) == sorted({element for out in outputs for element in addresses(out)})
    for table in [*outputs, *sources]:
        expected = addresses(table)
        assert elements(locate(order, table, base)) == [expected.get(name, (NOWHERE, 0)) for name in names]
    first = [place for place in elements(locate(order, outputs[0], base)) if place[0] != NOWHERE]
    assert first == sorted(first)


def test_equal_layouts_are_one_run_a_partition() -> None:
    numels = [7, 30, 11, 100]
    table, base = flat_table(numels, 4), line_of(np.array(numels, dtype=np.int64))
    places = locate(order_of([table], base), table, base)
    assert places.starts.tolist() == [0, 37, 74, 111, 148]


def test_elements_that_are_stored_twice_make_two_tables() -> None:
    numels = [7, 30]
    base = line_of(np.array(numels, dtype=np.int64))
    once, twice = flat_table(numels, 2), np.concatenate([flat_table(numels, 2), cut_table(numels, 3)])
    assert len(without_repeats(once, base)) == 1
    layers = without_repeats(twice, base)
    assert sorted(row.tobytes() for layer in layers for row in layer) == sorted(row.tobytes() for row in twice)
    for layer in layers:
        assert len(addresses(layer)) == layer["numel"].sum()


def test_a_source_without_some_elements_is_named() -> None:
    numels = [7, 30]
    table, base = flat_table(numels, 2), line_of(np.array([7, 30], dtype=np.int64))
    order = order_of([table], base)
    with pytest.raises(LayoutMismatch, match="step 4 lacks elements 12 to 30 of weight"):
        require_all(locate(order, table[:-1], base), order, "step 4", base, ("bias", "weight"))
