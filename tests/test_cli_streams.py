"""Standard streams that are closed or full, and a small address space: the work is done, and the exit code is true."""

import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.errors import InsufficientCapacity
from wsm_ds.merging import merge
from wsm_ds.verification import verify

RUN = Path(__file__).parent / "golden" / "zero2_bf16"
CLOSED = "wsm-ds: stdout was closed before everything was printed"
FULL = "wsm-ds: stdout cannot be written ([Errno 28] No space left on device) before everything was printed"


def shell(command: str, ending: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command of wsm-ds, with the redirections in `ending`; its own exit code, not that of a pipe's end."""
    line = f"{shlex.quote(sys.executable)} -m wsm_ds {command} {ending}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("ending", "last_line"),
    [
        ("2>&-", None),
        ("2>/dev/full", None),
        ("<&-", None),
        (">&-", CLOSED),
        (">/dev/full", FULL),
        ("| head -c 10", CLOSED),
        ("<&- >&- 2>&-", None),
    ],
)
def test_a_merge_is_made_whatever_becomes_of_its_streams(tmp_path: Path, ending: str, last_line: str | None) -> None:
    out = tmp_path / "out"
    done = shell(f"merge {RUN} --last 2 --out {out}", ending)
    assert done.returncode == 0, done.stderr
    assert verify(out, full=True).recomputed_bytes > 0
    assert (CLOSED in done.stderr, FULL in done.stderr) == (last_line == CLOSED, last_line == FULL)


@pytest.mark.parametrize(
    ("command", "ending", "exit_code"),
    [
        (f"inspect {RUN}", ">&-", 3),
        (f"inspect {RUN}", ">/dev/full", 3),
        ("coefficients --curve linear -n 3", "| true", 3),
        (f"merge {RUN} --last 2 --out NEW --dry-run", ">/dev/full", 3),
        ("--help", ">/dev/full", 3),
        (f"prune {RUN} --keep-window 1", ">/dev/full", 3),
        (f"inspect {RUN}", "2>&-", 0),
        (f"merge {RUN} --last 9 --out NEW", "2>&-", 2),
        (f"merge {RUN} --last 9 --out NEW", ">&-", 2),
        ("verify nowhere", ">/dev/full 2>&-", 2),
    ],
)
def test_a_command_that_only_prints_fails_if_nothing_was_printed(command: str, ending: str, exit_code: int) -> None:
    assert shell(command, ending).returncode == exit_code


def test_no_file_becomes_standard_error_when_that_is_closed() -> None:
    code = "import os, sys; from wsm_ds.cli.streams import standard_streams\n"
    code += "with standard_streams():\n    print(os.readlink('/proc/self/fd/2'), os.open('/dev/null', 0) > 2)"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} 2>&-"
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == "/dev/null True\n"


@pytest.mark.parametrize("kilobytes", [60000, 120000, 180000])
def test_a_small_address_space_is_an_error_that_names_the_limit(tmp_path: Path, kilobytes: int) -> None:
    line = f"ulimit -v {kilobytes}; {shlex.quote(sys.executable)} -m wsm_ds merge {RUN} --last 2 --out {tmp_path}/out"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("wsm-ds: InsufficientCapacity: this process may use ")
    assert "(ulimit -v)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_system_that_starts_no_more_threads_is_an_error_that_names_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> Any:
        if thread.name == "merge-1":
            raise RuntimeError("can't start new thread")
        return start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(InsufficientCapacity, match=r"starts no more threads: .*--threads 1"):
        merge(run=RUN, last=2, out=tmp_path / "out", threads=2)
    assert list(tmp_path.iterdir()) == []
