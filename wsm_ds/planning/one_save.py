"""Whether the files of a checkpoint are of one save, as the values in them tell.

In stages 1 and 2 the module weights are the masters, rounded (`runtime/zero/stage_1_and_2.py`, `step`): bit for bit, at
every save. A rank's optimizer file of another step, of another rank or of another run has other masters. So a few
thousand elements of each file are compared. Stage 3 saves no module weights; there only the metadata tells.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import ALL, ITEMSIZES, Array, DType, narrow, widen
from wsm_ds.errors import BrokenCheckpoint, ForeignFiles, few
from wsm_ds.filesystem.read_ahead import read_ahead
from wsm_ds.layouts import Layout
from wsm_ds.layouts.fragments import Ints, Table

NAMED = 2
"""Files that a message names on the other side of a comparison."""
RUNS, RUN_NUMEL = 4, 512
"""Runs of elements that are compared for each file, and elements of a run. They lie evenly in the file."""
FILES_AT_ONCE = 64
"""Files whose samples are compared in one step of numpy."""
MOST_KEPT_OPEN = 16
FindProblem = Callable[[Layout], str | None]
"""`problem_of`, or a function that keeps its results."""


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


def problem_of(layout: Layout) -> str | None:
    """Returns in words what shows that the files of a checkpoint are not of one save; None if nothing does.

    Args:
        layout: the checkpoint.
    """
    signs = signs_of_another_save(layout)
    return f"its files are not of one save, or one of them is damaged: {few(signs)}" if signs else None


def require_one_save(layouts: Sequence[Layout], allow: Sequence[str], find_problem: FindProblem = problem_of) -> None:
    """Checks that the files of each checkpoint are of one save. Reads a few thousand elements of each file.

    Args:
        layouts: the checkpoints.
        allow: checks to skip: "foreign-files".
        find_problem: `problem_of`, or a function that keeps its results.

    Raises:
        ForeignFiles: a checkpoint has files of another step, of another rank or of another run; names them.
    """
    if "foreign-files" in allow:
        return
    for layout in layouts:
        problem = find_problem(layout)
        if problem is not None:
            raise ForeignFiles(
                f"{layout.path}: {problem}. Restore the right files, choose a window without this checkpoint, or pass "
                "--allow foreign-files."
            )


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
    if "master" not in layout.fragments or "module" not in layout.fragments:
        return
    masters, modules = (_by_element(layout.fragments[kind]) for kind in ("master", "module"))
    with _Files(layout) as files:
        for holds, sampled, others in (("masters", masters, modules), ("weights", modules, masters)):
            runs = _runs(sampled, others)
            for codes in np.unique(runs[["dtype", "other_dtype"]]):
                is_alike = runs[["dtype", "other_dtype"]] == codes
                yield from _compared(files, holds, runs[is_alike], ALL[codes["dtype"]], ALL[codes["other_dtype"]])


def _by_element(table: Table) -> Table:
    """The rows of the first replica, by tensor and element."""
    rows = table[table["replica"] == 0]
    in_order: Table = rows[np.lexsort((rows["start"], rows["tensor"]))]
    return in_order


_RUN = np.dtype([("file", "i8"), ("offset", "i8"), ("dtype", "i1"), ("other_file", "i8"), ("other_offset", "i8"),
                 ("other_dtype", "i1"), ("numel", "i8")])  # fmt: skip
"""Elements that one file has in one form, and another file in the other form."""


def _runs(sampled: Table, others: Table) -> Table:
    """Picks RUNS runs of elements of each file, evenly, and finds the same elements in the other table."""
    by_file = sampled[np.argsort(sampled["file"], kind="stable")]
    ends = np.cumsum(by_file["numel"])
    firsts_of_file = np.flatnonzero(np.diff(by_file["file"], prepend=-1))
    before = np.concatenate([[0], ends])[firsts_of_file]
    totals = np.diff(before, append=ends[-1] if len(ends) else 0)
    positions = (before[:, None] + np.arange(RUNS) * totals[:, None] // RUNS).ravel()
    numbers = np.searchsorted(ends, positions, side="right")
    rows = by_file[numbers]
    first = rows["start"] + positions - (ends[numbers] - rows["numel"])
    # The tensors laid end to end: a position on this line tells tensor and element.
    longest = int((others["start"] + others["numel"]).max(initial=0)) + 1
    line = others["tensor"].astype(np.int64) * longest + others["start"]
    index = np.searchsorted(line, rows["tensor"].astype(np.int64) * longest + first, "right") - 1
    other = others[np.maximum(index, 0)]
    other_end = other["start"] + other["numel"]
    is_held = (index >= 0) & (other["tensor"] == rows["tensor"]) & (first < other_end)
    runs = np.zeros(len(rows), dtype=_RUN)
    runs["file"], runs["dtype"], runs["other_file"], runs["other_dtype"] = (
        *(rows["file"], rows["dtype"], other["file"], other["dtype"]),
    )
    runs["offset"] = rows["offset"] + (first - rows["start"]) * ITEMSIZES[rows["dtype"].astype(np.int64)]
    runs["other_offset"] = other["offset"] + (first - other["start"]) * ITEMSIZES[other["dtype"].astype(np.int64)]
    runs["numel"] = np.minimum(np.minimum(first + RUN_NUMEL, rows["start"] + rows["numel"]), other_end) - first
    kept: Table = runs[is_held]
    return kept


def _compared(files: "_Files", holds: str, runs: Table, dtype: DType, other_dtype: DType) -> Iterator[Sample]:
    """Reads and compares runs, all of one pair of dtypes. Many files are compared at once."""
    of_file = np.split(runs, np.flatnonzero(np.diff(runs["file"])) + 1) if len(runs) else []
    read = read_ahead(lambda rows: files.read(rows, dtype, other_dtype), of_file)
    remaining = zip(of_file, read, strict=True)
    while batch := list(islice(remaining, FILES_AT_ONCE)):
        values = widen(np.frombuffer(b"".join(data for _, (data, _) in batch), dtype.storage), dtype)
        others = widen(np.frombuffer(b"".join(data for _, (_, data) in batch), other_dtype.storage), other_dtype)
        same = _is_rounded(values, others, other_dtype) if holds == "masters" else _is_rounded(others, values, dtype)
        lengths = [int(rows["numel"].sum()) for rows, _ in batch]
        equal = np.add.reduceat(same, np.cumsum([0, *lengths[:-1]]))
        for (rows, _), numel, count in zip(batch, lengths, equal.tolist(), strict=True):
            names = tuple(files.names[file] for file in dict.fromkeys(rows["other_file"].tolist()))
            yield Sample(files.names[int(rows["file"][0])], names, holds, numel, count)


def _is_rounded(masters: Array, weights: Array, dtype: DType) -> NDArray[np.bool_]:
    """Whether each weight is its master, rounded. A master that is not finite is the merge's to refuse."""
    same: NDArray[np.bool_] = (widen(narrow(masters, dtype), dtype) == weights) | ~np.isfinite(masters)
    return same


class _Files:
    """The files of a checkpoint. Those that hold many of the samples stay open. A context manager that closes them.

    Args:
        layout: the checkpoint.
    """

    def __init__(self, layout: Layout) -> None:
        self.folder, self.names = layout.path, layout.files
        weights = layout.fragments["module"]["file"]
        self.kept = np.unique(weights).tolist() if len(np.unique(weights)) <= MOST_KEPT_OPEN else []
        self.descriptors: dict[int, int] = {}

    def __enter__(self) -> "_Files":
        self.descriptors = {file: self._open(file) for file in self.kept}
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def read(self, runs: Table, dtype: DType, other_dtype: DType) -> tuple[bytes, bytes]:
        """The bytes of runs, and those of the same elements in the other form. Several threads call it."""
        numels = runs["numel"]
        data = self._read(runs["file"], runs["offset"], numels * dtype.itemsize)
        return data, self._read(runs["other_file"], runs["other_offset"], numels * other_dtype.itemsize)

    def _read(self, files: Ints, offsets: Ints, sizes: Ints) -> bytes:
        parts, opened = [], dict[int, int]()
        try:
            for file, offset, nbytes in zip(files.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
                descriptor = self.descriptors.get(file)
                if descriptor is None:
                    if file not in opened:
                        opened[file] = self._open(file)
                    descriptor = opened[file]
                data = os.pread(descriptor, nbytes, offset)
                if len(data) < nbytes:
                    raise BrokenCheckpoint(f"{self.folder / self.names[file]} ends before byte {offset + nbytes}.")
                parts.append(data)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        return b"".join(parts)

    def _open(self, file: int) -> int:
        return os.open(self.folder / self.names[file], os.O_RDONLY | os.O_CLOEXEC)
