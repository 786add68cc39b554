"""What `benchmarks.plan` measures with: calls are counted and delayed, and the fitted law is that of the times."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.counted import Usage, counted
from benchmarks.plan_law import GRID, TERMS, fitted

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="latency.c is compiled with cc")

CALLS = """
import os, sys
file = sys.argv[1]
folder = os.path.dirname(file)
os.stat(file), os.lstat(file), os.listdir(folder)
one, two = os.open(file, os.O_RDONLY), os.open(file, os.O_RDONLY)
os.pread(one, 5, 0), os.preadv(one, [bytearray(4)], 0), os.read(two, 100)
os.close(one), os.close(two)
at = os.open(folder, os.O_RDONLY)
os.stat(os.path.basename(file), dir_fd=at), os.close(os.open(os.path.basename(file), os.O_RDONLY, dir_fd=at))
os.stat(sys.executable), open(sys.executable, "rb").read(1)
"""


def calls(folder: Path, **values: float) -> Usage:
    (folder / "run").mkdir(exist_ok=True)
    file = folder / "run/file"
    file.write_bytes(bytes(10))
    command = [sys.executable, "-c", CALLS, str(file)]
    return counted(command, f"{folder}/run*", folder=folder, **values)  # type: ignore[arg-type]


def test_calls_on_the_named_files_are_counted_and_no_others(tmp_path: Path) -> None:
    used = calls(tmp_path)
    assert (used.opens, used.reads, used.stats, used.lists, used.read_bytes) == (4, 3, 3, 1, 19)
    assert used.open_at_once == 2


def test_each_counted_call_waits(tmp_path: Path) -> None:
    assert calls(tmp_path, delay_ms=100).wall_s >= 11 * 0.1


def test_a_command_that_fails_shows_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such run"):
        counted([sys.executable, "-c", "raise SystemExit('no such run')"], "/none", folder=tmp_path)


def test_a_limit_of_open_files_holds_for_the_command(tmp_path: Path) -> None:
    code = "import resource; assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)"
    counted([sys.executable, "-c", code], "/none", folder=tmp_path, open_files=100)


def test_a_larger_run_uses_the_start_once() -> None:
    start, used = Usage(1, 2, 100), Usage(3, 4, 150, opens=10, open_at_once=7)
    assert used.enlarged(8, start) == Usage(17, 18, 500, opens=80, open_at_once=7)


def test_the_fitted_law_is_that_of_the_measured_times() -> None:
    true = dict(zip(TERMS, (0.3, 0.0, 2e-5, 5e-3, 1e-4), strict=True))
    times = [sum(s * TERMS[name](run.checkpoints, run.ranks, run.tensors) for name, s in true.items()) for run in GRID]
    law = fitted([(replace(run, kind="zero3"), s) for run, s in zip(GRID, times, strict=True)])
    assert law.seconds == pytest.approx(true, abs=1e-7)
    assert law.largest_error < 1e-6
    assert law.of(16, 1024, 723) == pytest.approx(0.3 + 2e-5 * 16 * 723 + 5e-3 * 16 * 1024 + 1e-4 * 16 * 1024 * 723)
