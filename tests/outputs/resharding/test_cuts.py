"""Random models, groups and forms: every rank's flat tensors, cut by our rules and filled through the fragment algebra,
equal those that are cut literally, step by step, as DeepSpeed does it."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wsm_ds.dtypes import BY_NAME, CODES
from wsm_ds.layouts import zero3, zero12
from wsm_ds.layouts.layout import Table, TableBuilder, TensorInfo
from wsm_ds.outputs.resharding.form import Form
from wsm_ds.outputs.resharding.groups import in_partition_order, subgroups
from wsm_ds.outputs.resharding.optimizer_file import alignment_paddings, partition_size
from wsm_ds.planning.intersect import line_of, locate, order_of

PADDING = -1.0
Groups = list[list[int]]  # numbers of elements of each parameter


def literally(groups: Groups, form: Form) -> list[np.ndarray[Any, Any]]:
    """Each rank's flat tensors one after the other; an element's value is its number in the model."""
    ranks: list[list[float]] = [[] for _ in range(form.world_size)]
    first = 0
    for group in groups:
        parameters = []
        for numel in group:
            parameters.append([float(first + i) for i in range(numel)])
            first += numel
        if form.stage == 3:
            _cut_each(parameters, form, ranks)
        else:
            _cut_flat(parameters, form, ranks)
    return [np.array(rank) for rank in ranks]


def _cut_flat(parameters: list[list[float]], form: Form, ranks: list[list[float]]) -> None:
    if form.round_robin:
        buckets: list[list[list[float]]] = [[] for _ in range(form.world_size)]
        for index, parameter in enumerate(parameters):
            buckets[index % form.world_size].append(parameter)
        parameters = [parameter for bucket in buckets for parameter in bucket]
    flat: list[float] = []
    for index, parameter in enumerate(parameters):
        flat += parameter
        while form.parameter_alignment and index < len(parameters) - 1 and len(flat) % 8:  # 16 bytes of bf16
            flat.append(PADDING)
    while len(flat) % (2 * form.world_size):
        flat.append(PADDING)
    size = len(flat) // form.world_size
    for rank in range(form.world_size):
        ranks[rank] += flat[rank * size : (rank + 1) * size]


def _cut_each(parameters: list[list[float]], form: Form, ranks: list[list[float]]) -> None:
    for parameter in parameters:  # sub-groups follow each other, so they only decide which tensor an element is in
        padded = list(parameter)
        while len(padded) % form.world_size:
            padded.append(PADDING)
        size = len(padded) // form.world_size
        for rank in range(form.world_size):
            ranks[rank] += padded[rank * size : (rank + 1) * size]


def table(groups: Groups, form: Form) -> tuple[Table, list[int]]:
    """The fragments by our rules, file = rank, and each file's elements."""
    dtype = BY_NAME["fp32"]
    numels = [numel for group in groups for numel in group]
    tensors = {str(n): TensorInfo((numel,), BY_NAME["bf16"], "parameter") for n, numel in enumerate(numels)}
    builder, lengths, first = TableBuilder(), [0] * form.world_size, 0
    for group in groups:
        names = tuple(str(first + index) for index in range(len(group)))
        first += len(group)
        if form.stage == 3:
            sizes = {name: info.numel for name, info in tensors.items()}
            for closed in subgroups(names, sizes, form.world_size, form.sub_group_size):
                for name in closed:
                    for rank in range(form.world_size):
                        start, numel = zero3.partition(tensors[name].numel, rank, form.world_size)
                        place: Any = {"file": rank, "offset": 4 * lengths[rank], "dtype": dtype}
                        builder.add("master", int(name), start, numel, **place)
                        lengths[rank] += -(-tensors[name].numel // form.world_size)
            continue
        order = in_partition_order(names, form.world_size if form.round_robin else 1)
        paddings = alignment_paddings(tensors, form, order)
        for rank in range(form.world_size):
            size, _ = partition_size(tensors, form, order, paddings, rank)
            for name, start, numel, position in zero12.pieces(order, paddings, tensors, rank * size, size):
                place = {"file": rank, "offset": 4 * (lengths[rank] + position), "dtype": dtype}
                builder.add("master", int(name), start, numel, **place)
            lengths[rank] += size
    return builder.tables()["master"], lengths


FORMS = st.builds(
    Form,
    stage=st.sampled_from([1, 2, 3]),
    world_size=st.integers(1, 5),
    round_robin=st.booleans(),
    parameter_alignment=st.booleans(),
    sub_group_size=st.integers(1, 60),
)
MODELS = st.lists(st.lists(st.integers(1, 23), min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(groups=MODELS, out=FORMS, sources=st.lists(FORMS, min_size=1, max_size=3))
def test_every_rank_of_every_form_gets_its_elements_from_every_other_form(
    groups: Groups, out: Form, sources: list[Form]
) -> None:
    assert CODES["fp32"] == table(groups, out)[0]["dtype"][0]
    expected = literally(groups, out)
    out_table, lengths = table(groups, out)
    assert lengths == [len(rank) for rank in expected]
    tables = [table(groups, source)[0] for source in sources]
    flats_of_sources = [literally(groups, source) for source in sources]
    numels = np.array([numel for group in groups for numel in group], dtype=np.int64)
    base = line_of(numels)
    order = order_of([out_table], base)
    targets = list(locate(order, out_table, base).within(0, int(order.starts[-1])))
    for k, flats in enumerate(flats_of_sources):
        written = [np.full(length, PADDING) for length in lengths]
        line = np.empty(int(order.starts[-1]))
        for element, numel, file, offset in locate(order, tables[k], base).within(0, len(line)):
            line[element : element + numel] = flats[file][offset // 4 : offset // 4 + numel]
        for element, numel, file, offset in targets:
            written[file][offset // 4 : offset // 4 + numel] = line[element : element + numel]
        for got, rank in zip(written, expected, strict=True):
            assert np.array_equal(got, rank)


@given(st.lists(st.integers(1, 23), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 60))
def test_a_subgroup_closes_with_the_parameter_that_fills_it(numels: list[int], world_size: int, size: int) -> None:
    names = tuple(map(str, range(len(numels))))
    partition_numels = {name: -(-numel // world_size) for name, numel in zip(names, numels, strict=True)}
    closed = subgroups(names, dict(zip(names, numels, strict=True)), world_size, size)
    assert [name for group in closed for name in group] == list(names)
    assert all(sum(partition_numels[name] for name in group[:-1]) < size for group in closed)
    assert all(sum(partition_numels[name] for name in group) >= size for group in closed[:-1])
