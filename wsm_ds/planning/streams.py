"""Which sources make the elements that the parts of a plan want: streams, each over the union of the windows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wsm_ds.dtypes import ALL, CODES
from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts import Layout
from wsm_ds.layouts.layout import FRAGMENT, Table
from wsm_ds.planning.intersect import (
    NOWHERE,
    Ints,
    Order,
    Places,
    line_of,
    locate,
    order_of,
    require_all,
    without_repeats,
)
from wsm_ds.planning.plan import Combine, CopySegment, InputFile, OutputFile, Stream, Target


@dataclass(frozen=True)
class SourceTables:
    """The fragment tables of all layouts that a plan reads (by rising step), in one numbering of tensors and files."""

    layouts: tuple[Layout, ...]
    inputs: tuple[InputFile, ...]
    first_input: tuple[int, ...]
    numels: Ints
    names: tuple[str, ...]

    def table(self, number: int, kind: str) -> Table:
        """The fragments of `kind` in layout `number`, with the plan's numbers of tensors and inputs."""
        layout = self.layouts[number]
        if kind not in layout.fragments:
            raise LayoutMismatch(f"{layout.path} holds no {kind}, but {self.layouts[-1].path} does.")
        table = self.renumbered(layout.fragments[kind], layout)
        table["file"] += self.first_input[number]
        return table

    def renumbered(self, table: Table, layout: Layout) -> Table:
        """A table that numbers tensors as `layout` does, with the plan's numbers."""
        table = table.copy()
        if layout.names != self.names:
            numbers = {name: index for index, name in enumerate(self.names)}
            table["tensor"] = np.array([numbers[name] for name in layout.names], dtype="i4")[table["tensor"]]
        return table


def source_tables(layouts: Sequence[Layout]) -> SourceTables:
    """Numbers the files of all layouts as the plan's inputs."""
    inputs: list[InputFile] = []
    first = []
    for layout in layouts:
        first.append(len(inputs))
        for archive in layout.archives:
            inputs.append(InputFile(Path(archive.path), archive.nbytes, archive.path.stat().st_mtime_ns))
    newest = layouts[-1]
    numels = np.array([info.numel for info in newest.tensors.values()], dtype=np.int64)
    return SourceTables(tuple(layouts), tuple(inputs), tuple(first), numels, newest.names)


@dataclass(frozen=True)
class ElementRequest:
    """Elements that a part wants written.

    Attributes:
        part: number of the part.
        kind: of the sources' elements.
        table: where they belong; its files are the plan's output files, its tensors numbered as in `SourceTables`.
        members: numbers of the layouts they are made of, oldest first.
        coefficients: float64, one a member.
        is_cast: they are cast from what the same part stores of this kind.
    """

    output: int
    kind: str
    table: Table
    members: tuple[int, ...]
    coefficients: tuple[float, ...]
    is_cast: bool = False


def element_streams(tables: SourceTables, wanted: Sequence[ElementRequest]) -> list[Stream]:
    """The streams that make everything that is wanted, each kind's elements read once.

    Raises:
        LayoutMismatch: a source lacks elements (the tensor and the range are named).
    """
    base = line_of(tables.numels)
    streams = []
    for kind in dict.fromkeys(want.kind for want in wanted):
        wants = [_own_or_first(tables, want) for want in wanted if want.kind == kind]
        for replica in np.unique(np.concatenate([want.table["replica"] for want in wants])):
            for floating in (True, False):
                chosen = [(want, table) for want in wants for table in _chosen(want.table, replica, floating, base)]
                if chosen:
                    streams.append(_stream(tables, kind, int(replica), _combine(kind, floating), chosen, base))
    return streams


def _own_or_first(tables: SourceTables, want: ElementRequest) -> ElementRequest:
    """Copies that no source keeps (more ranks than before) are made of the first one."""
    kept = np.unique(np.concatenate([tables.table(number, want.kind)["replica"] for number in want.members]))
    table = want.table.copy()
    table["replica"][~np.isin(table["replica"], kept)] = 0
    return replace(want, table=table)


def _chosen(table: Table, replica: int, floating: bool, base: Ints) -> list[Table]:
    rows = table[table["replica"] == replica]
    rows = rows[np.array([ALL[code].is_floating for code in rows["dtype"]], dtype=bool) == floating]
    return without_repeats(rows, base) if len(rows) else []


def _combine(kind: str, floating: bool) -> Combine:
    if kind == "frozen":
        return "equal"
    return "merge" if floating else "newest"


def _stream(
    tables: SourceTables,
    kind: str,
    replica: int,
    combine: Combine,
    chosen: list[tuple[ElementRequest, Table]],
    base: Ints,
) -> Stream:
    order = order_of([table for _, table in chosen], base)
    checkpoints = tuple(sorted({number for want, _ in chosen for number in want.members}))
    sources = []
    for number in checkpoints:
        table = tables.table(number, kind)
        own = table[table["replica"] == replica]
        held = locate(order, own if len(own) else table[table["replica"] == 0], base)
        needed = [table for want, table in chosen if number in want.members]
        wanted_here = order if len(needed) == len(chosen) else order_of(needed, base)
        require_all(locate(wanted_here, own if len(own) else table[table["replica"] == 0], base), wanted_here,
                    str(tables.layouts[number].path), base, tables.names)  # fmt: skip
        sources.append(held)
    stored = {want.output: index for index, (want, _) in enumerate(chosen) if not want.is_cast}
    targets = tuple(
        Target(
            want.output,
            locate(order, table, base),
            tuple(checkpoints.index(number) for number in want.members),
            want.coefficients,
            stored.get(want.output) if want.is_cast else None,
        )
        for want, table in chosen
    )
    return Stream(combine, _numel(order), tuple(sources), checkpoints, targets, _breaks(sources, targets), order, base)


def _numel(order: Order) -> int:
    return int(order.starts[-1])


def _breaks(sources: Sequence[Places], targets: Sequence[Target]) -> Ints:
    """Elements at which a dtype changes; what has no place counts as a dtype of its own."""
    found = []
    for where in [*sources, *(target.places for target in targets)]:
        kinds = np.where(where.files == NOWHERE, -1, where.dtypes)
        found.append(where.starts[1:-1][kinds[1:] != kinds[:-1]])
    return np.unique(np.concatenate(found)).astype(np.int64)


def carry_streams(inputs: Sequence[InputFile], outputs: Sequence[OutputFile]) -> list[Stream]:
    """One stream of all bytes that are copied, each byte of an input read once for all parts."""
    byte = CODES["uint8"]
    rows_of: dict[int, list[tuple[int, ...]]] = {}
    for number, output in enumerate(outputs):
        for piece in output.segments:
            if isinstance(piece, CopySegment):
                row = (piece.file, piece.source_offset, piece.nbytes, number, piece.offset, byte, 0)
                rows_of.setdefault(output.output, []).append(row)
    if not rows_of:
        return []
    base = line_of(np.array([file.nbytes for file in inputs], dtype=np.int64))
    files = [(number, 0, file.nbytes, number, 0, byte, 0) for number, file in enumerate(inputs) if file.nbytes]
    chosen = [
        (part, table)
        for part, rows in rows_of.items()
        for table in without_repeats(np.array(rows, dtype=FRAGMENT), base)
    ]
    order = order_of([table for _, table in chosen], base)
    source = locate(order, np.array(files, dtype=FRAGMENT), base)
    targets = tuple(Target(part, locate(order, table, base), (0,), (1.0,)) for part, table in chosen)
    return [Stream("carry", _numel(order), (source,), (), targets, np.zeros(0, np.int64), order, base)]


def whole_tensors(placed: Sequence[tuple[int, int, int, int, int]]) -> Table:
    """An output table of whole tensors from (tensor, numel, file, offset, dtype code)."""
    rows = [(tensor, 0, numel, file, offset, dtype, 0) for tensor, numel, file, offset, dtype in placed if numel]
    return np.array(rows, dtype=FRAGMENT)
