"""Makes streams: for the elements that the outputs of a plan request, where they lie in all sources."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from wsm_ds.dtypes import CODES, IS_SUMMABLE
from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts import Layout
from wsm_ds.layouts.element_order import reordered
from wsm_ds.layouts.layout import FRAGMENT, Table
from wsm_ds.planning.intersect import (
    NOWHERE,
    Ints,
    Order,
    Places,
    line_of,
    locate,
    order_along,
    order_of,
    require_all,
    without_repeats,
)
from wsm_ds.planning.plan import Combine, CopySegment, InputFile, InputNumber, OutputFile, OutputNumber, Stream, Target

SHORT_RUN_BYTES = 1 << 20
"""A read of fewer bytes costs a network file system as much as one of so many."""
MANY_FILES = 256
"""More files than this cannot all stay open while a stream goes over them in turn."""


class FragmentRow(NamedTuple):
    """A row of a fragment table, see `layouts.layout.FRAGMENT`: elements of a tensor at a byte offset of a file.

    Attributes:
        tensor: number of the tensor.
        start: first element.
        numel: number of elements.
        file: number of the file.
        offset: byte offset of the first element.
        dtype: code of the dtype.
        replica: the rank if every rank keeps a copy of its own, else 0.
    """

    tensor: int
    start: int
    numel: int
    file: int
    offset: int
    dtype: int
    replica: int = 0


def fragment_table(rows: Sequence[FragmentRow]) -> Table:
    """Returns the rows as a fragment table; rows without elements are left out."""
    return np.array([row for row in rows if row.numel], dtype=FRAGMENT)


@dataclass(frozen=True)
class SourceTables:
    """The fragment tables of all checkpoints that a plan reads, in one numbering of tensors and files.

    Attributes:
        layouts: the checkpoints, by rising step.
        inputs: the files of all checkpoints, the plan's first inputs.
        first_input: for each layout, the number of its first file in `inputs`.
        numels: elements of each tensor, as the newest layout numbers them.
        names: names of the tensors, as the newest layout numbers them.
    """

    layouts: tuple[Layout, ...]
    inputs: tuple[InputFile, ...]
    first_input: tuple[InputNumber, ...]
    numels: Ints
    names: tuple[str, ...]
    _tables: dict[tuple[str, int], Table] = field(default_factory=dict, compare=False, repr=False)
    _likeness: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    _first_alike: dict[tuple[int, bool], int] = field(default_factory=dict, compare=False, repr=False)

    def table(self, number: int, kind: str) -> Table:
        """Returns the fragments of `kind` in layout `number`, with the plan's numbers of tensors and inputs.

        Raises:
            LayoutMismatch: the layout has no elements of this kind.
        """
        table: Table = self.own_table(number, kind).copy()
        table["file"] += self.first_input[number]
        return table

    def own_table(self, number: int, kind: str) -> Table:
        """Returns the fragments of `kind` in layout `number`, with the plan's numbers of tensors and its own of files.

        Layouts that are alike have one table. Raises as `table`.
        """
        layout = self.layouts[number]
        if kind not in layout.fragments:
            raise LayoutMismatch(
                f"{layout.path} holds no {kind}, but {self.layouts[-1].path} does. Merge checkpoints of one optimizer, "
                "or carry the optimizer states of the newest (--optimizer-states carry)."
            )
        key = (kind, self.likeness(number))
        if key not in self._tables:
            self._tables[key] = self.renumbered(layout.fragments[kind], layout)
        return self._tables[key]

    def likeness(self, number: int) -> int:
        """Returns the number of the first layout that has the same fragments and numbers tensors in the same way."""
        if number not in self._likeness:
            layout, newest = self.layouts[number], self.layouts[-1]
            key = (id(layout.fragments), layout.tensors == newest.tensors and layout.names == self.names)
            self._likeness[number] = self._first_alike.setdefault(key if key[1] else (number, False), number)
        return self._likeness[number]

    def renumbered(self, table: Table, layout: Layout) -> Table:
        """Returns a copy of a table that numbers tensors and elements as `layout` does, with the plan's numbers.

        Raises:
            UnsupportedLayout: a large tensor is stored in another order than in the newest layout; it is named.
        """
        table = self._in_plan_order(table, layout)
        if layout.names != self.names:
            numbers = {name: index for index, name in enumerate(self.names)}
            table["tensor"] = np.array([numbers[name] for name in layout.names], dtype="i4")[table["tensor"]]
        return table

    def _in_plan_order(self, table: Table, layout: Layout) -> Table:
        """A copy whose elements are numbered in the order of the newest layout."""
        newest = self.layouts[-1].tensors
        rows: Table = table.copy()
        for number, (name, info) in enumerate(layout.tensors.items()):
            if info.axes != newest[name].axes:
                is_turned = rows["tensor"] == number
                turned = reordered(rows[is_turned], name, info.shape, info.axes, newest[name].axes)
                rows = np.concatenate([rows[~is_turned], turned])
        return rows


def source_tables(layouts: Sequence[Layout]) -> SourceTables:
    """Numbers the files of all layouts as the plan's inputs.

    Args:
        layouts: all checkpoints that the plan reads, by rising step. They hold the same tensors.
    """
    inputs: list[InputFile] = []
    first_inputs = []
    for layout in layouts:
        first_inputs.append(InputNumber(len(inputs)))
        for archive in layout.archives:
            times = archive.mtime_ns, archive.ctime_ns
            inputs.append(InputFile(archive.path, archive.nbytes, *times, archive.records))
    newest = layouts[-1]
    numels = np.array([info.numel for info in newest.tensors.values()], dtype=np.int64)
    return SourceTables(tuple(layouts), tuple(inputs), tuple(first_inputs), numels, newest.names)


@dataclass(frozen=True)
class ElementRequest:
    """Elements that an output needs.

    Attributes:
        output: the output.
        kind: the kind of the sources' elements that they are made of.
        table: where they belong. File numbers are those of the plan's output files, tensor numbers those of
            `SourceTables`.
        members: numbers of the layouts that they are made of, oldest first.
        coefficients: float64, one per member.
        is_cast: whether they are cast from the elements that the same output stores of this kind (module weights from
            masters).
    """

    output: OutputNumber
    kind: str
    table: Table
    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    is_cast: bool = False


@dataclass(frozen=True)
class _RequestedTable:
    """A table of a request in which no element occurs twice: one target of a stream."""

    request: ElementRequest
    table: Table


def element_streams(tables: SourceTables, requests: Sequence[ElementRequest]) -> list[Stream]:
    """Returns the streams that fill all requests. The elements of each kind are read once for all of them.

    Args:
        tables: the checkpoints.
        requests: the elements that the outputs need.

    Raises:
        LayoutMismatch: a source lacks elements; the message names the checkpoint, the tensor and the elements.
    """
    line = line_of(tables.numels)
    streams = []
    for kind in dict.fromkeys(request.kind for request in requests):
        of_kind = [_with_known_replicas(tables, request) for request in requests if request.kind == kind]
        for replica in np.unique(np.concatenate([request.table["replica"] for request in of_kind])):
            for is_summed in (True, False):
                requested = [
                    _RequestedTable(request, table)
                    for request in of_kind
                    for table in _tables_of(request.table, replica, is_summed, line)
                ]
                if requested:
                    combine = _combine(kind, is_summed)
                    streams.append(_element_stream(tables, kind, int(replica), combine, requested, line))
    return streams


def _with_known_replicas(tables: SourceTables, request: ElementRequest) -> ElementRequest:
    """Takes replica 0 for ranks that no source has. Replicas are the buffers of stage 3, which every rank saves."""
    alike = {tables.likeness(number): number for number in request.members}.values()
    replicas = [np.unique(tables.own_table(number, request.kind)["replica"]) for number in alike]
    known = np.unique(np.concatenate(replicas))
    table = request.table.copy()
    table["replica"][~np.isin(table["replica"], known)] = 0
    return replace(request, table=table)


def _tables_of(table: Table, replica: int, is_summed: bool, line: Ints) -> list[Table]:
    """The rows of one replica whose dtypes can be summed, or the others, without repeated elements."""
    rows = table[table["replica"] == replica]
    rows = rows[IS_SUMMABLE[rows["dtype"]] == is_summed]
    return without_repeats(rows, line) if len(rows) else []


def _combine(kind: str, is_summed: bool) -> Combine:
    if kind == "frozen":
        return "equal"
    return "merge" if is_summed else "newest"


def _element_stream(
    tables: SourceTables,
    kind: str,
    replica: int,
    combine: Combine,
    requests: list[_RequestedTable],
    line: Ints,
) -> Stream:
    """The stream of one kind and replica. A source must have all elements of the windows of which it is a member."""
    checkpoints = tuple(sorted({number for requested in requests for number in requested.request.members}))
    order, follows_source = _order(tables, kind, replica, checkpoints, requests, line)
    located: dict[int, Places] = {}
    checked: set[tuple[int, tuple[int, ...]]] = set()
    sources = []
    for number in checkpoints:
        alike, table = tables.likeness(number), _of_replica(tables.own_table(number, kind), replica)
        if alike not in located:
            located[alike] = locate(order, table, line)
        members = tuple(n for n, requested in enumerate(requests) if number in requested.request.members)
        if (alike, members) not in checked:
            checked.add((alike, members))
            is_all = len(members) == len(requests)
            needed_order = order if is_all else order_of([requests[n].table for n in members], line)
            places = located[alike] if is_all else locate(needed_order, table, line)
            require_all(places, needed_order, str(tables.layouts[number].path), line, tables.names)
        sources.append(replace(located[alike], first_file=tables.first_input[number]))
    # DeepSpeed casts module weights from the masters of the same output, so a cast target refers to that target.
    stored_target = {
        requested.request.output: index for index, requested in enumerate(requests) if not requested.request.is_cast
    }
    targets = tuple(
        Target(
            requested.request.output,
            locate(order, requested.table, line),
            tuple(checkpoints.index(number) for number in requested.request.members),
            requested.request.coefficients,
            stored_target.get(requested.request.output) if requested.request.is_cast else None,
        )
        for requested in requests
    )
    breaks = _breaks([*located.values(), *(target.places for target in targets)])
    return Stream(combine, order.numel, tuple(sources), checkpoints, targets, breaks, order, line, follows_source)


def _of_replica(table: Table, replica: int) -> Table:
    """The rows of a replica. A source of fewer ranks lacks those of further ranks; replica 0 stands for them."""
    of_replica: Table = table[table["replica"] == replica]
    if not len(of_replica):
        of_replica = table[table["replica"] == 0]
    return of_replica


def _order(
    tables: SourceTables,
    kind: str,
    replica: int,
    checkpoints: Sequence[int],
    requests: Sequence[_RequestedTable],
    line: Ints,
) -> tuple[Order, bool]:
    """The order of a stream's elements, and whether it is that of the newest source's files.

    In the order of the outputs, an output of whole tensors needs a read for each fragment of each source: ranks x
    tensors x checkpoints of them. In the order of a source, every source is read in long runs, and only the writes are
    short. But then the bytes of an output's block do not come in order, and it is read again for its checksum.
    """
    order = order_of([requested.table for requested in requests], line)
    table = _of_replica(tables.own_table(checkpoints[-1], kind), replica)
    newest = locate(order, table, line)
    runs, files = len(newest.files), len(newest.used_files)
    if runs <= files or (newest.nbytes > runs * SHORT_RUN_BYTES and files <= MANY_FILES):
        return order, False
    along = order_along(order, table, line)
    targets = [requested.table for requested in requests]
    places = len(checkpoints) * runs + sum(len(locate(order, target, line).files) for target in targets)
    along_places = len(checkpoints) * len(locate(along, table, line).files)
    along_places += sum(len(locate(along, target, line).files) for target in targets)
    return (along, True) if along_places < places else (order, False)


def _breaks(all_places: Sequence[Places]) -> Ints:
    """Stream elements at which a dtype changes. Elements without a place count as a dtype of their own."""
    breaks = []
    for places in all_places:
        dtypes = np.where(places.files == NOWHERE, -1, places.dtypes)
        breaks.append(places.starts[1:-1][dtypes[1:] != dtypes[:-1]])
    return np.unique(np.concatenate(breaks)).astype(np.int64)


def carry_streams(inputs: Sequence[InputFile], files: Sequence[OutputFile]) -> list[Stream]:
    """Returns one stream of all bytes that are copied: each byte of an input is read once for all outputs.

    The stream treats each input as a tensor of uint8 elements.

    Args:
        inputs: the plan's inputs.
        files: the output files, with the segments to copy.

    Returns:
        One stream, or none if nothing is copied.
    """
    byte = CODES["uint8"]
    rows_by_output: dict[OutputNumber, list[FragmentRow]] = {}
    for number, file in enumerate(files):
        for segment in file.segments:
            if isinstance(segment, CopySegment):
                row = FragmentRow(segment.source, segment.source_offset, segment.nbytes, number, segment.offset, byte)
                rows_by_output.setdefault(file.output, []).append(row)
    if not rows_by_output:
        return []
    line = line_of(np.array([source.nbytes for source in inputs], dtype=np.int64))
    whole_inputs = [FragmentRow(number, 0, source.nbytes, number, 0, byte) for number, source in enumerate(inputs)]
    output_tables = [
        (output, table)
        for output, rows in rows_by_output.items()
        for table in without_repeats(fragment_table(rows), line)
    ]
    order = order_of([table for _, table in output_tables], line)
    source = locate(order, fragment_table(whole_inputs), line)
    targets = tuple(Target(output, locate(order, table, line), (0,), (1.0,)) for output, table in output_tables)
    return [Stream("carry", order.numel, (source,), (), targets, np.zeros(0, np.int64), order, line)]
