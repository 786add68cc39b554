"""Runs a command and tells what it used: processor time, memory, and calls on the files of a run.

The calls are counted, and delayed if asked, by `latency.c`, a library that is loaded before all others.
"""

import os
import resource
import subprocess
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("latency.c")
ROOT = SOURCE.parents[1]


@dataclass(frozen=True)
class Usage:
    """What a command used.

    Attributes:
        cpu_s: processor seconds of its process, user and system.
        wall_s: seconds from its start to its end.
        peak_bytes: most resident memory.
        opens: files opened; this and what follows are of the files that a pattern names.
        reads: calls that read.
        stats: calls that ask for a file's attributes by its name.
        lists: folders opened to be listed.
        read_bytes: bytes read.
        open_at_once: most files that were open at the same time.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: float
    opens: float = 0
    reads: float = 0
    stats: float = 0
    lists: float = 0
    read_bytes: float = 0
    open_at_once: float = 0

    def without(self, other: "Usage") -> "Usage":
        """Returns what this command used beyond another one; `open_at_once` stays.

        Args:
            other: the command that did less.
        """
        rest = {field.name: getattr(self, field.name) - getattr(other, field.name) for field in fields(self)}
        return replace(self, **rest | {"open_at_once": self.open_at_once})

    def enlarged(self, factor: int, start: "Usage") -> "Usage":
        """Returns what a run of `factor` times the ranks uses, if all but the start grows with the ranks.

        Args:
            factor: number of times.
            start: what a command uses that does nothing.
        """
        whole = {
            field.name: getattr(start, field.name) + factor * getattr(self.without(start), field.name)
            for field in fields(self)
        }
        return replace(self, **whole | {"open_at_once": self.open_at_once})


def compiled(folder: Path) -> Path:
    """Compiles `latency.c` with the C compiler of this machine, unless that has been done.

    Args:
        folder: where the library is kept.

    Returns:
        The library.
    """
    library = folder / "latency.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        command = ["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
    return library


def counted(
    command: list[str], files: str, *, folder: Path, delay_ms: float = 0, open_files: int | None = None
) -> Usage:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        files: a pattern of absolute paths, in which `*` matches `/`, too: the files whose calls are counted.
        folder: of the library and of the report.
        delay_ms: how long each counted call waits.
        open_files: the limit of open files (`ulimit -n`); None: as it is.

    Returns:
        What the command used.
    """
    with Started(command, files, folder=folder, delay_ms=delay_ms, open_files=open_files) as started:
        return started.usage()


class Started:
    """A command that runs. It is killed at the end of the `with` block if it has not ended."""

    def __init__(
        self, command: list[str], files: str, *, folder: Path, delay_ms: float = 0, open_files: int | None = None
    ) -> None:
        """Starts the command; the arguments are those of `counted`."""
        self.command, self._report = command, folder / f"calls-{os.getpid()}"
        self._report.unlink(missing_ok=True)
        variables = {
            "CALLS_OF": files,
            "CALLS_DELAY_US": str(round(1000 * delay_ms)),
            "CALLS_REPORT": str(self._report),
            "LD_PRELOAD": str(compiled(folder)),
            "PYTHONPATH": str(ROOT),
        }

        def limit() -> None:
            if open_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

        self._begun = time.monotonic()
        self._printed = (folder / "printed").open("w+b")
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stdout=self._printed, stderr=subprocess.STDOUT, preexec_fn=limit
        )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        self._printed.close()

    def usage(self) -> Usage:
        """Waits for the command's end; returns what it used.

        Raises:
            RuntimeError: the command failed; shows what it printed.
        """
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.monotonic() - self._begun
        if self.process.returncode:
            self._printed.seek(0)
            printed = self._printed.read().decode(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(self.command)} ended with {self.process.returncode}:\n{printed}")
        *calls, most = zip(*(map(int, line.split()) for line in self._report.read_text().splitlines()), strict=True)
        self._report.unlink()
        cpu_s, peak_bytes = used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss
        opens, reads, stats, lists, read_bytes = map(sum, calls)
        return Usage(cpu_s, wall_s, peak_bytes, opens, reads, stats, lists, read_bytes, max(most))
