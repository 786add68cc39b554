"""Runs of the window's elements for one kind of element: which sources, which fate, in plan terms."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsm_ds.dtypes import ALL
from wsm_ds.errors import LayoutMismatch
from wsm_ds.intersect import Ints, intersect
from wsm_ds.layouts import Layout
from wsm_ds.layouts.layout import FRAGMENT, Table
from wsm_ds.plan import Fate, InputFile, Read, Sum


@dataclass
class FileRuns:
    """What the plan of one output file collects: its runs, and the names of their pieces."""

    sums: list[Sum] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class WindowTables:
    """The fragment tables of a window's layouts (oldest first), in one numbering of tensors and of files."""

    layouts: tuple[Layout, ...]
    inputs: tuple[InputFile, ...]
    first_input: tuple[int, ...]
    numels: Ints
    names: tuple[str, ...]

    @property
    def newest(self) -> Layout:
        """The checkpoint that everything carried comes from."""
        return self.layouts[-1]

    def table(self, number: int, kind: str) -> Table:
        """The fragments of `kind` in source `number`, with the newest layout's tensor numbers and plan inputs."""
        layout = self.layouts[number]
        if kind not in layout.fragments:
            raise LayoutMismatch(f"{layout.path} holds no {kind}, but {self.newest.path} does.")
        table = layout.fragments[kind].copy()
        numbers = {name: index for index, name in enumerate(self.names)}
        table["tensor"] = np.array([numbers[name] for name in layout.names], dtype="i4")[table["tensor"]]
        table["file"] += self.first_input[number]
        return table


def window_tables(layouts: Sequence[Layout]) -> WindowTables:
    """Numbers the files of all layouts as the plan's inputs."""
    inputs: list[InputFile] = []
    first = []
    for layout in layouts:
        first.append(len(inputs))
        for archive in layout.archives:
            inputs.append(InputFile(Path(archive.path), archive.nbytes, archive.path.stat().st_mtime_ns))
    newest = layouts[-1]
    numels = np.array([info.numel for info in newest.tensors.values()], dtype=np.int64)
    return WindowTables(tuple(layouts), tuple(inputs), tuple(first), numels, newest.names)


def add_window_runs(files: defaultdict[int, FileRuns], tables: WindowTables, kind: str, out: Table) -> None:
    """Adds to each output file the runs that make its fragments `out` of the same kind in every source."""
    for replica in np.unique(out["replica"]):
        rows = out[out["replica"] == replica]
        sources = []
        for number in range(len(tables.layouts)):
            table = tables.table(number, kind)
            own = table[table["replica"] == replica]
            sources.append(own if len(own) else table[table["replica"] == 0])
        for floating in (True, False):
            chosen = rows[np.array([ALL[code].is_floating for code in rows["dtype"]], dtype=bool) == floating]
            if len(chosen):
                _add(files, tables, chosen, sources, _fate(kind, floating))


def add_copied_runs(files: defaultdict[int, FileRuns], tables: WindowTables, out: Table, source: Table) -> None:
    """Adds the runs that make `out` of one source: module weights of staged masters, states of the newest."""
    _add(files, tables, out, [source], "derive")


def _fate(kind: str, floating: bool) -> Fate:
    if kind == "frozen":
        return "equal"
    return "merge" if floating else "newest"


def _add(files: defaultdict[int, FileRuns], tables: WindowTables, out: Table, sources: list[Table], fate: Fate) -> None:
    runs = intersect(out, sources, tables.numels, tables.names)
    for index in range(len(runs.file)):
        reads = tuple(
            Read(
                int(runs.source_file[k, index]),
                int(runs.source_offset[k, index]),
                ALL[runs.source_dtype[k, index]],
            )
            for k in range(len(sources))
        )
        run = Sum(int(runs.offset[index]), int(runs.numel[index]), ALL[runs.dtype[index]], fate, reads)
        files[int(runs.file[index])].sums.append(run)
    for file, offset, tensor in zip(*runs.labels, strict=True):
        files[int(file)].labels.append((int(offset), int(tensor)))


def whole_tensors(placed: Sequence[tuple[int, int, int, int, int]]) -> Table:
    """An output table of whole tensors from (tensor, numel, file, offset, dtype code)."""
    rows = [(tensor, 0, numel, file, offset, dtype, 0) for tensor, numel, file, offset, dtype in placed if numel]
    return np.array(rows, dtype=FRAGMENT)
