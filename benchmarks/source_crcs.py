"""Measures what it costs to compare the CRC-32s of the sources while a merge reads them.

    python benchmarks/source_crcs.py --folder /tmp/bench --width 4096 --checkpoints 4 --rounds 7

Makes the run of benchmarks/merge.py and merges it to a ZeRO checkpoint and to safetensors, in turns with and without
CRC-32s (without: a plan whose inputs list no records). It prints the medians of the wall time and of the processor time
of `run_plan`, in seconds, and the ratio of the two. First the sources come from the page cache, where reading costs the
least and a CRC-32 the most; then from the disk.
"""

import argparse
import dataclasses
import itertools
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from merge import make_run  # type: ignore[import-not-found] # noqa: E402

from wsm_ds.merge_planning import plan_merge  # noqa: E402
from wsm_ds.merging import run_plan  # noqa: E402
from wsm_ds.planning.plan import Plan  # noqa: E402
from wsm_ds.planning.recipe_options import Format  # noqa: E402


def seconds(plan: Plan, out: Path, *, is_cold: bool) -> tuple[float, float]:
    """Wall time and processor time of one merge; `is_cold`: the sources leave the page cache before."""
    shutil.rmtree(out, ignore_errors=True)
    for source in plan.inputs if is_cold else ():
        with source.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, began_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run_plan(plan)
    wall_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Makes the run, takes turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    run, out = make_run(options.folder, 2, options.width, options.checkpoints), options.folder / "out"
    formats: tuple[Format, ...] = ("zero", "safetensors")
    for output_format, is_cold in itertools.product(formats, (False, True)):
        shutil.rmtree(out, ignore_errors=True)
        plan = plan_merge(run=run, last=options.checkpoints, out=out, format=output_format, threads=options.threads,
                          allow=("warmup", "lr-change"))  # fmt: skip
        unchecked = dataclasses.replace(
            plan, inputs=tuple(dataclasses.replace(source, records={}) for source in plan.inputs)
        )
        seconds(plan, out, is_cold=False)  # fills the page cache
        turns = [
            (seconds(plan, out, is_cold=is_cold), seconds(unchecked, out, is_cold=is_cold))
            for _ in range(options.rounds)
        ]
        for number, kind in enumerate(("wall", "processor")):
            checked_s = statistics.median(turn[0][number] for turn in turns)
            unchecked_s = statistics.median(turn[1][number] for turn in turns)
            where = f"{output_format:12}{'disk' if is_cold else 'cache':6}{kind:10}"
            print(f"{where} {checked_s:.3f} s with, {unchecked_s:.3f} s without: {checked_s / unchecked_s:.3f}")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
