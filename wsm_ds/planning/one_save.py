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

from wsm_ds.dtypes import ALL, Array, narrow, widen
from wsm_ds.errors import BrokenCheckpoint, ForeignFiles, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.layout import Table

RUNS, RUN_NUMEL = 8, 256
"""Runs of elements that are compared for each file with masters, and elements of a run. They lie evenly in the file."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The comparison of one file's masters with module weights.

    Attributes:
        master_file: the file that holds the masters.
        module_files: those that hold the weights.
        numel: elements that were compared.
        equal: how many of them are the master, rounded.
    """

    master_file: str
    module_files: tuple[str, ...]
    numel: int
    equal: int


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
        signs = signs_of_another_save(layout)
        if signs:
            raise ForeignFiles(
                f"{layout.path}: its files are not of one save: {few(signs, 3)}. Restore the right files, choose a "
                "window without this checkpoint, or pass --allow foreign-files."
            )


def signs_of_another_save(layout: Layout) -> tuple[str, ...]:
    """Returns what shows that some files of a checkpoint are of another save; nothing if nothing does.

    Args:
        layout: the checkpoint.
    """
    wrong = [sample for sample in samples(layout) if sample.equal < sample.numel]
    return (
        *layout.contradictions,
        *(
            f"{sample.master_file} holds other masters than the weights in {few(sample.module_files, 2)}: "
            f"{sample.numel - sample.equal} of {sample.numel} compared elements differ"
            for sample in wrong
        ),
    )


def samples(layout: Layout) -> Iterator[Sample]:
    """Compares masters with module weights, for each file with masters. Nothing in stage 3 and in fp32 stage 0.

    Args:
        layout: the checkpoint.
    """
    masters, modules = layout.fragments.get("master"), layout.fragments.get("module")
    if masters is None or modules is None:
        return
    modules = modules[modules["replica"] == 0]
    modules = modules[np.lexsort((modules["start"], modules["tensor"]))]
    order = np.argsort(masters["file"], kind="stable")
    bounds = np.flatnonzero(np.diff(masters["file"][order])) + 1
    with _OpenFile() as module_file, _OpenFile() as master_file:
        for rows in np.split(masters[order], bounds):
            sample = _sample(layout, rows, modules, master_file, module_file)
            if sample.numel:
                yield sample


def _sample(
    layout: Layout, masters: Table, modules: Table, master_file: "_OpenFile", module_file: "_OpenFile"
) -> Sample:
    """Compares runs of one file's masters with the weights of the same elements."""
    path = layout.path / layout.files[int(masters["file"][0])]
    ends = np.cumsum(masters["numel"])
    positions = np.arange(RUNS) * int(ends[-1]) // RUNS
    numbers = np.searchsorted(ends, positions, side="right")
    picked = masters[numbers]
    firsts = picked["start"] + positions - (ends[numbers] - picked["numel"])
    compared = equal = 0
    module_names: dict[str, None] = {}
    for row, first in zip(picked, firsts.tolist(), strict=True):
        module = _covering(modules, int(row["tensor"]), first)
        if module is None:
            continue
        last = min(first + RUN_NUMEL, int(row["start"] + row["numel"]), int(module["start"] + module["numel"]))
        name, dtype = layout.files[int(module["file"])], ALL[module["dtype"]]
        weights = module_file.elements(layout.path / name, module, first, last)
        values = master_file.elements(path, row, first, last)
        # A master that is not finite is the merge's to refuse: it names the tensor.
        same = (widen(narrow(values, dtype), dtype) == weights) | ~np.isfinite(values)
        compared, equal = compared + len(same), equal + int(same.sum())
        module_names[name] = None
    return Sample(path.name, tuple(module_names), compared, equal)


def _covering(modules: Table, tensor: int, element: int) -> Table | None:
    """The module's fragment that holds an element of a tensor; None if there is none."""
    begin, end = np.searchsorted(modules["tensor"], [tensor, tensor + 1])
    index = int(begin + np.searchsorted(modules["start"][begin:end], element, side="right")) - 1
    if index < begin or element >= modules["start"][index] + modules["numel"][index]:
        return None
    row: Table = modules[index]
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
