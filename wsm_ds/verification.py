"""Verifies an output: its files are those of the manifest, and the sources give the same bytes again.

All files are compared with their checksums. Without `full`, SAMPLED_BYTES of the sources and of the output are read to
make parts of it again: of each stream of elements a share by its bytes, at least one task, in places that lie evenly in
the order of the output's files, and always the same ones. Small outputs are made again whole.
"""

import os
import random
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.distributed.launcher import local_world_size
from wsm_ds.distributed.ranks import Ranks
from wsm_ds.engine.open_files import FEWEST_OPEN, File, OpenFiles, free_descriptors, most_open, raise_limit
from wsm_ds.engine.reader import Reader, open_input
from wsm_ds.engine.seals import CRC_BYTES
from wsm_ds.engine.source_crcs import SourceCrcs
from wsm_ds.engine.tasks import Task, share, tasks_of
from wsm_ds.engine.threads import on_threads, workers_for
from wsm_ds.engine.timings import Timings
from wsm_ds.engine.worker import Worker
from wsm_ds.errors import (
    BudgetTooSmall,
    CheckpointNotFound,
    ForeignFiles,
    Interrupted,
    RecipeError,
    VerificationFailed,
    WsmError,
    few,
)
from wsm_ds.filesystem import checksum
from wsm_ds.layouts import read_layout
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import PLAN_MODULES, plan_windows
from wsm_ds.planning.one_save import require_one_save
from wsm_ds.planning.plan import LiteralSegment, Plan
from wsm_ds.planning.recipe import MergeRecipe, make_recipe
from wsm_ds.planning.recipe_options import StrPath
from wsm_ds.planning.window import Window, recorded_window, with_carried
from wsm_ds.publishing.manifest import read_manifest
from wsm_ds.sizes import parse_size

SAMPLED_BYTES = 4 << 30
"""Bytes that `verify` reads to make parts of an output again, without `full`."""


@dataclass(frozen=True)
class VerificationResult:
    """What `verify` has checked.

    Attributes:
        files: number of files whose checksums are right.
        nbytes: bytes of these files.
        recomputed_bytes: bytes that this rank has made again from the sources, and are equal.
        note: why nothing was recomputed (the sources cannot be read any more); "" if something was.
    """

    files: int
    nbytes: int
    recomputed_bytes: int
    note: str


def verify(
    out: StrPath,
    *,
    full: bool = False,
    threads: int | None = None,
    memory_budget: int | str | None = None,
    ranks: Ranks | None = None,
) -> VerificationResult:
    """Reads a merge's output again, compares checksums, and recomputes parts of it from the sources.

    Ranks: all, inside `ranks.together()`; each checks its share of the files and of the tasks.

    Args:
        out: the output's folder.
        full: whether to recompute everything. Otherwise parts are recomputed, always the same ones; see the module.
        threads: of this process; None: all cores, shared with the other ranks of the machine.
        memory_budget: bytes, or text as "512MiB", for all buffers of this process; None: that of the merge.
        ranks: those of a launcher; None: this process alone.

    Raises:
        CheckpointNotFound: `out` is not a folder.
        RecipeError: `threads` or `memory_budget` is not valid.
        BudgetTooSmall: the budget is smaller than the smallest unit of work.
        InsufficientCapacity: the system starts no more threads.
        VerificationFailed: the manifest is missing; or a file is missing, superfluous or differs; or with `full`, the
            sources cannot be read any more. The message names the file and, if known, the byte.
        PeerFailed: another rank has failed.
    """
    ranks = ranks or Ranks()
    machine = _machine(threads, memory_budget)
    folder = Path(out)
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder} is not a folder. Give the folder of an output of merge, export or reshard.")
    manifest = read_manifest(folder)
    _require_same_files(folder, manifest)
    _compare_checksums(folder, manifest, machine["threads"], ranks)
    ranks.barrier("checksums")
    nbytes = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    recomputed, note = _make_again(folder, manifest, full, machine, ranks)
    ranks.barrier("verified")
    return VerificationResult(len(manifest["files"]), nbytes, recomputed, note)


def _machine(threads: int | None, memory_budget: int | str | None) -> dict[str, int]:
    """The fields of a recipe that this machine decides, and not the merge that is verified."""
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // local_world_size())
    if threads < 1:
        raise RecipeError(f"`threads` (--threads) must be at least 1, not {threads}.")
    return {"threads": threads} | ({} if memory_budget is None else {"memory_budget": parse_size(memory_budget)})


def _require_same_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises VerificationFailed if the files in a folder are not those of its manifest."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    recorded = set(manifest["files"])
    if names != recorded:
        raise VerificationFailed(
            f"{folder}: missing {few(sorted(recorded - names)) or 'nothing'}; "
            f"not of this merge {few(sorted(names - recorded)) or 'nothing'}."
        )


def _compare_checksums(folder: Path, manifest: dict[str, Any], threads: int, ranks: Ranks) -> None:
    """Compares the checksums of this rank's share of the files, several files at a time."""
    # As tasks, so that each rank gets about as many bytes.
    entries = list(manifest["files"].items())
    numbered = [Task(0, number, number + 1, max(1, int(entry["bytes"]))) for number, (_, entry) in enumerate(entries)]

    def compare(task: Task) -> None:
        name, entry = entries[task.begin]
        if checksum.of_file(folder / name, int(manifest["block_bytes"])) != entry["xxh3_128_of_blocks"]:
            raise VerificationFailed(f"{folder / name} is not what was written: its checksum differs.")

    def work(take: Callable[[], Iterator[Task]], is_stopped: Callable[[], bool]) -> None:
        for task in take():
            compare(task)

    on_threads(share(numbered, ranks.rank, ranks.world_size), threads, work, ranks.check)


def _make_again(
    folder: Path, manifest: dict[str, Any], full: bool, machine: dict[str, int], ranks: Ranks
) -> tuple[int, str]:
    """Makes parts of an output again, and compares them; the number of bytes, or why it cannot be done."""
    windows: list[tuple[MergeRecipe, Window]] = []

    def make() -> tuple[Plan | None, str]:
        try:
            recipe, window = _recorded(manifest, machine)
            plan = plan_windows([recipe], [window], frozenset(manifest["files"]))
        except (Interrupted, BudgetTooSmall):
            raise
        except (WsmError, OSError) as error:
            if not full:
                return None, f"checksums only; the sources cannot be read any more: {error}"
            raise VerificationFailed(
                f"{folder}: all checksums match, but nothing can be merged again, because the sources cannot be read "
                f"any more: {error} Verify without full (--full) to compare the checksums alone."
            ) from error
        windows.append((recipe, window))
        return plan, ""

    plan, note = ranks.share(make, PLAN_MODULES)  # rank 0 alone reads the metadata
    recomputed = 0 if plan is None else _recompute(plan, folder, full, ranks)
    try:
        for recipe, window in windows:
            require_one_save(window.layouts, recipe.allow)
    except ForeignFiles as error:
        raise VerificationFailed(f"{folder} is what its sources give, but a source is in doubt. {error}") from error
    return recomputed, note


def _recorded(manifest: dict[str, Any], machine: dict[str, int]) -> tuple[MergeRecipe, Window]:
    """The recipe and the window that made an output, from its manifest; the sources are read."""
    recipe = make_recipe(**manifest["recipe"] | machine)
    window = recorded_window(manifest["sources"], recipe)
    if "carried_from" in manifest:
        allowed = frozenset(recipe.allow_globals)
        window = with_carried(window, Path(manifest["carried_from"]), read_layout, allowed)
    return recipe, window


class _Comparison:
    """A sink for the workers of all threads that compares their bytes with the output's instead of writing them.

    Attributes:
        nbytes: bytes that were compared.
    """

    def __init__(self, plan: Plan, paths: Sequence[Path], files: OpenFiles) -> None:
        self.paths, self.files, self.lock = paths, files, threading.Lock()
        # A worker does not know the CRC-32s of a zip: they are filled in when the file is complete.
        self.crc_offsets = [
            sorted(offset + byte for crc in file.crc_fields for offset in crc.crc_offsets for byte in range(CRC_BYTES))
            for file in plan.files
        ]
        self.nbytes = 0

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Raises VerificationFailed at the first byte that differs. CRC-32s are left to the checksums."""
        with self.files.use(File("output", number)) as (descriptor,):
            actual = np.frombuffer(os.pread(descriptor, len(data), offset), np.uint8)
        expected = np.frombuffer(data, np.uint8)
        if len(actual) < len(expected):
            raise VerificationFailed(
                f"{self.paths[number]} ends at byte {offset + len(actual)}; have the sources changed?"
            )
        offsets = self.crc_offsets[number]
        first, last = bisect_left(offsets, offset), bisect_left(offsets, offset + len(data))
        crc_bytes = [crc_offset - offset for crc_offset in offsets[first:last]]
        differences = np.setdiff1d(np.flatnonzero(expected != actual), crc_bytes)
        if len(differences):
            raise VerificationFailed(
                f"{self.paths[number]}: byte {offset + differences[0]} is not what the sources make."
            )
        with self.lock:
            self.nbytes += len(data)

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """Compares bytes that are copied from a source."""
        self.write(number, offset, data)


def _recompute(plan: Plan, out: Path, full: bool, ranks: Ranks) -> int:
    """Compares the bytes that this rank's share of a plan gives with those in `out`; returns their number."""
    paths = [out / file.name for file in plan.files]
    for path, file in zip(paths, plan.files, strict=True):
        if path.stat().st_size != file.nbytes:
            raise VerificationFailed(f"{path}: the sources make {file.nbytes} bytes; have they changed?")
    workers = workers_for(plan, plan.memory_bytes, plan.threads)
    raise_limit()
    threads = min(workers.threads, max(1, free_descriptors() // FEWEST_OPEN))

    def open_file(file: File) -> int:
        if file.use == "input":
            return open_input(plan.inputs, file)
        return os.open(paths[file.number], os.O_RDONLY | os.O_CLOEXEC)

    with OpenFiles(open_file, most_open(threads)) as files:
        comparison = _Comparison(plan, paths, files)
        for number, file in enumerate(plan.files) if ranks.rank == 0 else ():
            for segment in file.segments:
                if isinstance(segment, LiteralSegment):
                    comparison.write(number, segment.offset, memoryview(segment.data))
        tasks = share(tasks_of(plan) if full else sampled(tasks_of(plan), SAMPLED_BYTES), ranks.rank, ranks.world_size)
        reader, crcs, names = Reader(plan.inputs, files), SourceCrcs(plan.inputs), set(plan.names)

        def work(take: Callable[[], Iterator[Task]], is_stopped: Callable[[], bool]) -> None:
            worker = Worker(plan, reader, comparison, workers.slice_numel, names, Timings(), crcs)
            for task in take():
                worker.run(task, is_stopped)

        on_threads(tasks, threads, work, ranks.check)
    return comparison.nbytes


def sampled(tasks: Sequence[Task], nbytes: int) -> list[Task]:
    """Chooses tasks of every stream, always the same ones, with at most `nbytes` bytes together.

    Each stream gets a share by its bytes, and at least one task, even if that is larger. Its tasks are cut into as many
    equal rows as the share has room for, and one task of each row is taken: they are in the order of the output's
    files, so the choice lies in as many files as possible.

    Args:
        tasks: of the whole plan.
        nbytes: bytes that are read and written for the choice.
    """
    total = sum(task.nbytes for task in tasks)
    if total <= nbytes:
        return list(tasks)
    chosen = []
    for number, group in groupby(tasks, key=lambda task: task.stream):
        members = list(group)
        left = nbytes * sum(task.nbytes for task in members) // total
        rows = max(1, len(members) * nbytes // total)
        borders = [len(members) * row // rows for row in range(rows + 1)]
        # Seeded by the stream's number, so that a failure can be reproduced.
        rng = random.Random(number)
        picked = [members[rng.randrange(begin, end)] for begin, end in pairwise(borders)]
        kept: list[Task] = []
        for task in rng.sample(picked, len(picked)):
            if not kept or task.nbytes <= left:
                kept.append(task)
                left -= task.nbytes
        chosen += sorted(kept, key=lambda task: task.begin)
    return chosen
