"""Whether the files of a checkpoint are of one save, as the values in them tell.

In stages 1 and 2 the module weights are the masters, rounded (`runtime/zero/stage_1_and_2.py`, `step`): bit for bit, at
every save. A rank's optimizer file of another step, of another rank or of another run has other masters. So a few
thousand elements of each file are compared. Stage 3 saves no module weights; there only the metadata tells.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import ALL, Array, DType, narrow, widen
from wsm_ds.errors import BrokenCheckpoint, ForeignFiles, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.layout import Table

NAMED = 2
"""Files that a message names on the other side of a comparison."""
RUNS, RUN_NUMEL = 8, 256
"""Runs of elements that are compared for each file, and elements of a run. They lie evenly in the file."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The comparison of one file's masters with module weights, or of one file's module weights with masters.

    Attributes:
        file: the file that was sampled.
        others: those that hold the same elements in the other form.
        holds: what `file` holds: "masters" or "weights".
        numel: elements that were compared.
        equal: how many of them are the master, rounded.
    """

    file: str
    others: tuple[str, ...]
    holds: str
    numel: int
    equal: int

    def __str__(self) -> str:
        other = "weights" if self.holds == "masters" else "masters"
        return (
            f"{self.file} holds other {self.holds} than the {other} in {few(self.others, NAMED)}: "
            f"{self.numel - self.equal} of {self.numel} compared elements differ"
        )


def require_one_save(layouts: Sequence[Layout], allow: Sequence[str]) -> None:
    """Checks that the files of each checkpoint are of one save. Reads a few thousand elements of each file.

    Args:
        layouts: the checkpoints.
        allow: checks to skip: "foreign-files".

    Raises:
        ForeignFiles: a checkpoint has files of another step, of another rank or of another run; names them.
    """
    if "foreign-files" in allow:
        return
    for layout in layouts:
        problem = problem_of(layout)
        if problem is not None:
            raise ForeignFiles(
                f"{layout.path}: {problem}. Restore the right files, choose a window without this checkpoint, or pass "
                "--allow foreign-files."
            )


def problem_of(layout: Layout) -> str | None:
    """Returns in words what shows that the files of a checkpoint are not of one save; None if nothing does.

    Args:
        layout: the checkpoint.
    """
    signs = signs_of_another_save(layout)
    return f"its files are not of one save, or one of them is damaged: {few(signs)}" if signs else None


def signs_of_another_save(layout: Layout) -> tuple[str, ...]:
    """Returns what shows that some files of a checkpoint are of another save; nothing if nothing does.

    Args:
        layout: the checkpoint.
    """
    wrong = [sample for sample in samples(layout) if sample.equal < sample.numel]
    named = {name for sample in wrong if sample.holds == "masters" for name in sample.others[:NAMED]}
    told = [sample for sample in wrong if sample.holds == "masters" or sample.file not in named]
    return (*layout.contradictions, *map(str, told))


def samples(layout: Layout) -> Iterator[Sample]:
    """Compares masters with module weights, for each file with either. Nothing in stage 3 and in fp32 stage 0.

    Experts and pipeline layers have files of their own for their weights. There are more of them than samples of a file
    with masters, so each of them is sampled, too.

    Args:
        layout: the checkpoint.
    """
    masters, modules = layout.fragments.get("master"), layout.fragments.get("module")
    if masters is None or modules is None:
        return
    masters, modules = _by_element(masters), _by_element(modules)
    with _OpenFile() as sampled_file, _OpenFile() as other_file:
        for holds, sampled, others in (("masters", masters, modules), ("weights", modules, masters)):
            order = np.argsort(sampled["file"], kind="stable")
            bounds = np.flatnonzero(np.diff(sampled["file"][order])) + 1
            for rows in np.split(sampled[order], bounds):
                sample = _sample(layout, holds, rows, others, sampled_file, other_file)
                if sample.numel:
                    yield sample


def _by_element(table: Table) -> Table:
    """The rows of the first replica, by tensor and element."""
    rows = table[table["replica"] == 0]
    in_order: Table = rows[np.lexsort((rows["start"], rows["tensor"]))]
    return in_order


def _sample(
    layout: Layout, holds: str, rows: Table, others: Table, sampled_file: "_OpenFile", other_file: "_OpenFile"
) -> Sample:
    """Compares runs of elements of one file with the same elements in the other form."""
    path = layout.path / layout.files[int(rows["file"][0])]
    ends = np.cumsum(rows["numel"])
    positions = np.arange(RUNS) * int(ends[-1]) // RUNS
    numbers = np.searchsorted(ends, positions, side="right")
    picked = rows[numbers]
    firsts = picked["start"] + positions - (ends[numbers] - picked["numel"])
    compared = equal = 0
    other_names: dict[str, None] = {}
    for row, first in zip(picked, firsts.tolist(), strict=True):
        other = _covering(others, int(row["tensor"]), first)
        if other is None:
            continue
        last = min(first + RUN_NUMEL, int(row["start"] + row["numel"]), int(other["start"] + other["numel"]))
        name = layout.files[int(other["file"])]
        values = sampled_file.elements(path, row, first, last)
        other_values = other_file.elements(layout.path / name, other, first, last)
        if holds == "masters":
            same = _is_rounded(values, other_values, ALL[other["dtype"]])
        else:
            same = _is_rounded(other_values, values, ALL[row["dtype"]])
        compared, equal = compared + len(same), equal + int(same.sum())
        other_names[name] = None
    return Sample(path.name, tuple(other_names), holds, compared, equal)


def _is_rounded(masters: Array, weights: Array, dtype: DType) -> NDArray[np.bool_]:
    """Whether each weight is its master, rounded. A master that is not finite is the merge's to refuse."""
    same: NDArray[np.bool_] = (widen(narrow(masters, dtype), dtype) == weights) | ~np.isfinite(masters)
    return same


def _covering(table: Table, tensor: int, element: int) -> Table | None:
    """The fragment that holds an element of a tensor; None if there is none. The table is in order of elements."""
    begin, end = np.searchsorted(table["tensor"], [tensor, tensor + 1])
    index = int(begin + np.searchsorted(table["start"][begin:end], element, side="right")) - 1
    if index < begin or element >= table["start"][index] + table["numel"][index]:
        return None
    row: Table = table[index]
    return row


class _OpenFile:
    """The file that was read last, kept open: most samples of a checkpoint are of one model file."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.descriptor = -1

    def __enter__(self) -> "_OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.path, self.descriptor = None, -1

    def elements(self, path: Path, row: Table, first: int, last: int) -> Array:
        """Elements [first, last) of a tensor, from the fragment that holds them, as floats."""
        if path != self.path:
            self.__exit__()
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.path = path
        dtype = ALL[row["dtype"]]
        offset = int(row["offset"]) + (first - int(row["start"])) * dtype.itemsize
        data = os.pread(self.descriptor, (last - first) * dtype.itemsize, offset)
        if len(data) < (last - first) * dtype.itemsize:
            raise BrokenCheckpoint(f"{path} ends before byte {offset + (last - first) * dtype.itemsize}.")
        return widen(np.frombuffer(data, dtype.storage), dtype)
