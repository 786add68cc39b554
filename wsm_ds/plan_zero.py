"""Output as a ZeRO checkpoint in the newest source's layout: its rank files with some byte ranges replaced."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.layouts.layout import Table
from wsm_ds.plan import Bytes, Copy, CrcField, InputFile, OutputFile, overlay
from wsm_ds.runs import FileRuns, WindowTables, add_derived_runs, add_window_runs
from wsm_ds.torchfile import Archive, Tensor, open_torch_file
from wsm_ds.torchfile.repickle import repickle, storages
from wsm_ds.torchfile.zip_format import frame


@dataclass(frozen=True)
class _Template:
    """A rank file before its merged ranges are put in."""

    name: str
    nbytes: int
    base: list[Copy | Bytes]
    crcs: tuple[CrcField, ...]
    moved: dict[int, int]  # data offset of a record in the newest file → in this one; empty: nothing moved


def zero_outputs(
    tables: WindowTables, tag: str, optimizer_states: str, allowed_globals: frozenset[str]
) -> tuple[tuple[OutputFile, ...], tuple[InputFile, ...]]:
    """The output files of a ZeRO checkpoint `tag`, and all inputs (the staged masters are the last ones).

    Args:
        optimizer_states: "carry" (bytes of the newest), "merge" (same coefficients) or "drop" (left out).
    """
    newest, count = tables.newest, len(tables.layouts)
    first = tables.first_input[-1]
    drop = optimizer_states == "drop"
    templates = [_template(a, first + i, drop, allowed_globals) for i, a in enumerate(newest.archives)]
    kinds = ["master", "frozen", "buffer"] + (list(newest.state_names) if optimizer_states == "merge" else [])
    files: defaultdict[int, FileRuns] = defaultdict(FileRuns)
    for kind in kinds:
        if kind in newest.fragments:
            out = _moved(tables.table(count - 1, kind), templates, first)
            add_window_runs(files, tables, kind, out)
    staged = tuple(InputFile(Path(tag) / t.name, t.nbytes, 0, is_staged=True) for t in templates)
    phases = dict.fromkeys(range(len(templates)), 0)
    if "module" in newest.fragments:
        masters = _moved(tables.table(count - 1, "master"), templates, first)
        masters["file"] += len(tables.inputs)
        out = tables.table(count - 1, "module")
        out["file"] -= first
        add_derived_runs(files, tables, out, masters)
        phases.update(dict.fromkeys((int(file) for file in np.unique(out["file"])), 1))
    outputs = tuple(
        finished(
            f"{tag}/{template.name}",
            template.nbytes,
            template.base,
            template.crcs,
            files[index],
            phases[index],
        )
        for index, template in enumerate(templates)
    )
    return outputs, tables.inputs + staged


def finished(
    name: str,
    nbytes: int,
    base: list[Copy | Bytes],
    crcs: tuple[CrcField, ...],
    runs: FileRuns,
    phase: int = 0,
) -> OutputFile:
    """An output file: the base with its runs put in, and only those CRC-32 fields that can have changed."""
    sums = sorted(runs.sums, key=lambda run: run.offset)
    starts = np.array([run.offset for run in sums], dtype=np.int64)
    ends = np.array([run.offset + run.nbytes for run in sums], dtype=np.int64)
    touched = tuple(
        crc
        for crc in crcs
        if np.searchsorted(ends, crc.offset, "right") < np.searchsorted(starts, crc.offset + crc.nbytes, "left")
        or any(isinstance(piece, Bytes) for piece in base)
    )
    labels = np.array(sorted(runs.labels), dtype=np.int64).reshape(-1, 2)
    return OutputFile(name, nbytes, overlay(base, sums), touched, phase, labels[:, 0], labels[:, 1])


def _template(archive: Archive, file: int, drop: bool, allowed_globals: frozenset[str]) -> _Template:
    if drop and archive.path.name.endswith("optim_states.pt"):
        return _without_states(archive, file, allowed_globals)
    crcs = tuple(CrcField(r.offset, r.nbytes, r.crc_offsets) for r in archive.records.values() if r.crc)
    return _Template(archive.path.name, archive.nbytes, [Copy(0, archive.nbytes, file, 0)], crcs, {})


def _moved(table: Table, templates: list[_Template], first: int) -> Table:
    """The newest's fragments at their places in the templates, with `file` counting output files."""
    table = table.copy()
    table["file"] -= first
    for index, template in enumerate(templates):
        if not template.moved:
            continue
        rows = np.flatnonzero(table["file"] == index)
        old = np.array(sorted(template.moved), dtype=np.int64)
        shift = np.array([template.moved[offset] for offset in old], dtype=np.int64) - old
        record = np.searchsorted(old, table["offset"][rows], "right") - 1
        table["offset"][rows] += shift[record]
    return table


def _without_states(archive: Archive, file: int, allowed_globals: frozenset[str]) -> _Template:
    """The optimizer file with fresh moments: DeepSpeed makes them anew at the first update."""
    tree = open_torch_file(archive.path, allowed_globals).tree
    _drop_states(tree["optimizer_state_dict"])
    data = repickle(tree)
    kept = {f"data/{storage.key}" for storage in storages(tree)}
    records = {n: r for n, r in archive.records.items() if n in kept or not n.startswith("data/")}
    placed = frame(archive.root, {n: len(data) if n == "data.pkl" else r.nbytes for n, r in records.items()})
    base: list[Copy | Bytes] = [Bytes(offset, literal) for offset, literal in placed.literals]
    moved = {}
    for record in placed.records:
        source = records[record.name]
        if record.name == "data.pkl":
            base.append(Bytes(record.offset, data))
        elif record.nbytes:
            base.append(Copy(record.offset, record.nbytes, file, source.offset))
            moved[source.offset] = record.offset
    base.sort(key=lambda piece: piece.offset)
    crcs = tuple(CrcField(r.offset, r.nbytes, r.crc_offsets) for r in placed.records)
    return _Template(archive.path.name, placed.nbytes, base, crcs, moved)


def _drop_states(state: dict[str, Any]) -> None:
    """Empties the base optimizer's state, and takes back step counters kept in parameter groups."""
    base: Any = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    if isinstance(base, list):
        for entry in base:
            for name in [name for name, value in entry.items() if isinstance(value, Tensor)]:
                del entry[name]
        return
    base["state"].clear()
    for group in base["param_groups"]:
        group.pop("step", None)
