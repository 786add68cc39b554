"""Proof that an output is right: its bytes are those of the manifest, and the sources make those bytes."""

import random
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.engine.reader import Reader
from wsm_ds.engine.staged_files import Timings
from wsm_ds.engine.tasks import Task, tasks_of
from wsm_ds.engine.worker import Worker, workers_for
from wsm_ds.errors import VerificationFailed, WsmError, few
from wsm_ds.filesystem import checksum
from wsm_ds.merging import plan_windows
from wsm_ds.planning.plan import LiteralSegment, Plan
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.planning.window import recorded_window
from wsm_ds.publishing.manifest import read_manifest
from wsm_ds.publishing.staging_folder import MANIFEST

SAMPLED_TASKS_PER_FILE = 2


@dataclass(frozen=True)
class Verified:
    """What was proven. `recomputed_bytes` is 0 if the sources are no longer there (`note` says so)."""

    files: int
    nbytes: int
    recomputed_bytes: int
    note: str


def verify(out: Path, *, full: bool = False) -> Verified:
    """Reads all of an output again, and recomputes sampled stretches (`full`: all) from the sources.

    Raises:
        VerificationFailed: a file is missing, superfluous or differs; it and the place are named.
    """
    manifest = read_manifest(out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {MANIFEST}
    expected: dict[str, dict[str, Any]] = manifest["files"]
    if names != set(expected):
        raise VerificationFailed(
            f"{out}: missing {few(sorted(set(expected) - names)) or 'nothing'}; "
            f"not of this merge {few(sorted(names - set(expected))) or 'nothing'}."
        )
    for name, entry in expected.items():
        if checksum.of_file(out / name, int(manifest["block_bytes"])) != entry["xxh3_128_of_blocks"]:
            raise VerificationFailed(f"{out / name} is not what was written: its checksum differs.")
    total = sum(int(entry["bytes"]) for entry in expected.values())
    try:
        plan = _replan(manifest)
    except (WsmError, OSError) as error:
        return Verified(len(names), total, 0, f"checksums only; the sources cannot be read any more: {error}")
    return Verified(len(names), total, _recompute(plan, out, full), "")


def _replan(manifest: dict[str, Any]) -> Plan:
    recipe = make_recipe(**manifest["recipe"])
    window = recorded_window(manifest["sources"], recipe)
    return plan_windows([recipe], [window], frozenset(manifest["files"]))


class _Comparison:
    """A sink that compares what a worker makes with what the output holds."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.paths = [out / output.name for output in plan.files]
        self.filled_in = [
            sorted(place + byte for crc in output.crc_fields for place in crc.positions for byte in range(4))
            for output in plan.files
        ]
        self.nbytes = 0

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Raises VerificationFailed at the first byte that differs; a zip's CRC-32s the checksums cover."""
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            held = np.frombuffer(file.read(len(data)), np.uint8)
        made = np.frombuffer(data, np.uint8)
        if len(held) < len(made):
            raise VerificationFailed(
                f"{self.paths[number]} ends at byte {offset + len(held)}; have the sources changed?"
            )
        places = self.filled_in[number]
        filled_in = [p - offset for p in places[bisect_left(places, offset) : bisect_left(places, offset + len(data))]]
        unlike = np.setdiff1d(np.flatnonzero(made != held), filled_in)
        if len(unlike):
            raise VerificationFailed(f"{self.paths[number]}: byte {offset + unlike[0]} is not what the sources make.")
        self.nbytes += len(data)

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """The same of bytes that are carried."""
        self.write(number, offset, data)


def _recompute(plan: Plan, out: Path, full: bool) -> int:
    comparison = _Comparison(plan, out)
    for number, output in enumerate(plan.files):
        if comparison.paths[number].stat().st_size != output.nbytes:
            raise VerificationFailed(
                f"{comparison.paths[number]}: the sources make {output.nbytes} bytes; have they changed?"
            )
        for piece in output.segments:
            if isinstance(piece, LiteralSegment):
                comparison.write(number, piece.offset, memoryview(piece.data))
    workers = workers_for(plan, plan.memory_bytes, 1)
    with Reader(plan.inputs) as reader:
        worker = Worker(plan, reader, comparison, workers.slice_numel, set(plan.names), Timings())
        for task in tasks_of(plan) if full else _sampled(plan):
            worker.run(task)
    return comparison.nbytes


def _sampled(plan: Plan) -> list[Task]:
    """Of every stream some tasks, the same ones every time."""
    chosen, tasks = [], tasks_of(plan)
    for number in range(len(plan.streams)):
        own = [task for task in tasks if task.stream == number]
        count = min(len(own), SAMPLED_TASKS_PER_FILE * max(1, len(plan.files)))
        chosen += random.Random(number).sample(own, count)
    return chosen
