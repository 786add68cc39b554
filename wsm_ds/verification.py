"""Verifies an output: its files are those of the manifest, and the sources give the same bytes again."""

import random
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.engine.open_files import OpenFiles, most_open, raise_limit
from wsm_ds.engine.reader import Reader, open_input
from wsm_ds.engine.seals import CRC_BYTES
from wsm_ds.engine.source_crcs import SourceCrcs
from wsm_ds.engine.tasks import Task, tasks_of
from wsm_ds.engine.threads import workers_for
from wsm_ds.engine.timings import Timings
from wsm_ds.engine.worker import Worker
from wsm_ds.errors import CheckpointNotFound, ForeignFiles, VerificationFailed, WsmError, few
from wsm_ds.filesystem import checksum
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merge_planning import plan_windows
from wsm_ds.planning.one_save import require_one_save
from wsm_ds.planning.plan import LiteralSegment, Plan
from wsm_ds.planning.recipe import MergeRecipe, make_recipe
from wsm_ds.planning.recipe_options import StrPath
from wsm_ds.planning.window import Window, recorded_window
from wsm_ds.publishing.manifest import read_manifest

SAMPLED_TASKS_PER_FILE = 2
"""Tasks of each stream that `verify` recomputes without `full`, times the number of output files."""


@dataclass(frozen=True)
class VerificationResult:
    """What `verify` has checked.

    Attributes:
        files: number of files whose checksums are right.
        nbytes: bytes of these files.
        recomputed_bytes: bytes that were made again from the sources, and are equal.
        note: why nothing was recomputed (the sources cannot be read any more); "" if something was.
    """

    files: int
    nbytes: int
    recomputed_bytes: int
    note: str


def verify(out: StrPath, *, full: bool = False) -> VerificationResult:
    """Reads a merge's output again, compares checksums, and recomputes parts of it from the sources.

    Args:
        out: the output's folder.
        full: whether to recompute everything. Otherwise some tasks of each stream are recomputed, always the same ones.

    Raises:
        CheckpointNotFound: `out` is not a folder.
        VerificationFailed: the manifest is missing; or a file is missing, superfluous or differs; or with `full`, the
            sources cannot be read any more. The message names the file and, if known, the byte.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder} is not a folder. Give the folder of an output of merge, export or reshard.")
    manifest = read_manifest(folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    entries: dict[str, dict[str, Any]] = manifest["files"]
    if names != set(entries):
        raise VerificationFailed(
            f"{folder}: missing {few(sorted(set(entries) - names)) or 'nothing'}; "
            f"not of this merge {few(sorted(names - set(entries))) or 'nothing'}."
        )
    for name, entry in entries.items():
        if checksum.of_file(folder / name, int(manifest["block_bytes"])) != entry["xxh3_128_of_blocks"]:
            raise VerificationFailed(f"{folder / name} is not what was written: its checksum differs.")
    nbytes = sum(int(entry["bytes"]) for entry in entries.values())
    try:
        recipe, window = _recorded(manifest)
        plan = plan_windows([recipe], [window], frozenset(manifest["files"]))
    except (WsmError, OSError) as error:
        if full:
            raise VerificationFailed(
                f"{folder}: all checksums match, but nothing can be merged again, because the sources cannot be read "
                f"any more: {error} Verify without full (--full) to compare the checksums alone."
            ) from error
        note = f"checksums only; the sources cannot be read any more: {error}"
        return VerificationResult(len(names), nbytes, 0, note)
    recomputed = _recompute(plan, folder, full)
    try:
        require_one_save(window.layouts, recipe.allow)
    except ForeignFiles as error:
        raise VerificationFailed(f"{folder} is what its sources give, but a source is in doubt. {error}") from error
    return VerificationResult(len(names), nbytes, recomputed, "")


def _recorded(manifest: dict[str, Any]) -> tuple[MergeRecipe, Window]:
    """The recipe and the window that made an output, from its manifest; the sources are read."""
    recipe = make_recipe(**manifest["recipe"])
    return recipe, recorded_window(manifest["sources"], recipe)


class _Comparison:
    """A sink for workers that compares their bytes with the output's instead of writing them.

    Attributes:
        nbytes: bytes that were compared.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self.paths = [out / file.name for file in plan.files]
        # A worker does not know the CRC-32s of a zip: they are filled in when the file is complete.
        self.crc_offsets = [
            sorted(offset + byte for crc in file.crc_fields for offset in crc.crc_offsets for byte in range(CRC_BYTES))
            for file in plan.files
        ]
        self.nbytes = 0

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Raises VerificationFailed at the first byte that differs. CRC-32s are left to the checksums."""
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            actual = np.frombuffer(file.read(len(data)), np.uint8)
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
        self.nbytes += len(data)

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """Compares bytes that are copied from a source."""
        self.write(number, offset, data)


def _recompute(plan: Plan, out: Path, full: bool) -> int:
    """Compares the bytes that a plan gives with those in `out`; returns their number."""
    comparison = _Comparison(plan, out)
    for number, file in enumerate(plan.files):
        if comparison.paths[number].stat().st_size != file.nbytes:
            raise VerificationFailed(
                f"{comparison.paths[number]}: the sources make {file.nbytes} bytes; have they changed?"
            )
        for segment in file.segments:
            if isinstance(segment, LiteralSegment):
                comparison.write(number, segment.offset, memoryview(segment.data))
    workers = workers_for(plan, plan.memory_bytes, 1)
    crcs = SourceCrcs(plan.inputs)
    raise_limit()
    with OpenFiles(partial(open_input, plan.inputs), most_open(1)) as files:
        worker = Worker(
            plan, Reader(plan.inputs, files), comparison, workers.slice_numel, set(plan.names), Timings(), crcs
        )
        for task in tasks_of(plan) if full else _sampled(plan):
            worker.run(task)
    return comparison.nbytes


def _sampled(plan: Plan) -> list[Task]:
    """Some tasks of every stream, the same ones every time."""
    samples, tasks = [], tasks_of(plan)
    for number in range(len(plan.streams)):
        stream_tasks = [task for task in tasks if task.stream == number]
        count = min(len(stream_tasks), SAMPLED_TASKS_PER_FILE * max(1, len(plan.files)))
        # Seeded by the stream's number, so that a failure can be reproduced.
        samples += random.Random(number).sample(stream_tasks, count)
    return samples
