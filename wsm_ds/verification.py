"""Proof that an output is right: its bytes are those of the manifest, and the sources make those bytes."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.engine import BlockComputer, block_count, block_range, workers_for
from wsm_ds.errors import VerificationFailed, WsmError, few
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.zero import read_layout
from wsm_ds.manifest import read_manifest
from wsm_ds.merging import plan_for_window
from wsm_ds.plan import OutputFile, Plan
from wsm_ds.publish import MANIFEST
from wsm_ds.recipe import make_recipe
from wsm_ds.window import Window

SAMPLED_BLOCKS_PER_FILE = 4


@dataclass(frozen=True)
class Verified:
    """What was proven. `recomputed_bytes` is 0 if the sources are no longer there (`note` says so)."""

    files: int
    nbytes: int
    recomputed_bytes: int
    note: str


def verify(out: Path, *, full: bool = False) -> Verified:
    """Reads all of an output again, and recomputes sampled blocks (`full`: all) from the sources.

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
        if file_digest(out / name, int(manifest["block_bytes"])) != entry["sha256_of_blocks"]:
            raise VerificationFailed(f"{out / name} is not what was written: its checksum differs.")
    total = sum(int(entry["bytes"]) for entry in expected.values())
    try:
        plan = _replan(out, manifest)
    except (WsmError, OSError) as error:
        return Verified(len(names), total, 0, f"checksums only; the sources cannot be read any more: {error}")
    return Verified(len(names), total, _recompute(plan, out, full), "")


def file_digest(path: Path, block_bytes: int) -> str:
    """SHA-256 of the SHA-256 digests of the file's blocks."""
    outer = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            outer.update(hashlib.sha256(block).digest())
    return outer.hexdigest()


def _replan(out: Path, manifest: dict[str, Any]) -> Plan:
    recipe = make_recipe(**manifest["recipe"])
    allowed = frozenset(recipe.allow_globals)
    layouts = tuple(
        read_layout(Checkpoint(source["step"], source["tag"], Path(source["path"])), allowed)
        for source in manifest["sources"]
    )
    coefficients = np.array([source["coefficient"] for source in manifest["sources"]])
    return plan_for_window(recipe, Window(layouts, coefficients), frozenset(manifest["files"]))


def _recompute(plan: Plan, out: Path, full: bool) -> int:
    workers = workers_for(plan.memory_bytes, 1)
    done = 0
    with BlockComputer(plan, out, workers.slice_numel, set(plan.names)) as computer:
        for output in plan.outputs:
            path = out / output.name
            if path.stat().st_size != output.nbytes:
                raise VerificationFailed(f"{path}: the sources make {output.nbytes} bytes; have they changed?")
            filled_in = [place + byte for crc in output.crcs for place in crc.places for byte in range(4)]
            with path.open("rb") as file:
                for index in _chosen_blocks(output, full):
                    begin, end = block_range(output, index)
                    made = np.frombuffer(computer.block(output, begin, end), np.uint8).copy()
                    file.seek(begin)
                    held = np.frombuffer(file.read(end - begin), np.uint8)
                    places = [place - begin for place in filled_in if begin <= place < end]
                    made[places] = held[places]  # the zip's CRC-32 fields, which the checksums cover
                    if not np.array_equal(made, held):
                        at = begin + int(np.flatnonzero(made != held)[0])
                        raise VerificationFailed(f"{path}: byte {at} is not what the sources make.")
                    done += end - begin
    return done


def _chosen_blocks(output: OutputFile, full: bool) -> Iterator[int]:
    count = block_count(output)
    if full or count <= SAMPLED_BLOCKS_PER_FILE:
        return iter(range(count))
    return iter(sorted(random.Random(output.name).sample(range(count), SAMPLED_BLOCKS_PER_FILE)))
