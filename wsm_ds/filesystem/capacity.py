"""Is there enough of everything before a merge starts: bytes and inodes on the disk, memory on the machine."""

import os
from pathlib import Path

from wsm_ds.errors import InsufficientCapacity
from wsm_ds.sizes import format_size

INODES_BESIDE = 16
"""Folders, journal, manifest."""
CGROUP_LIMITS = ("/sys/fs/cgroup{path}/memory.max", "/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")


def require_disk(folder: Path, nbytes: int, files: int, what: str) -> None:
    """Raises InsufficientCapacity if the file system of `folder` has not `nbytes` and so many inodes free."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < nbytes:
        raise InsufficientCapacity(f"{folder} has {format_size(free)} free, {what} needs {format_size(nbytes)}.")
    if found.f_files and found.f_favail < files + INODES_BESIDE:
        raise InsufficientCapacity(f"{folder} has {found.f_favail} inodes free, {what} needs {files + INODES_BESIDE}.")


def disk_usage_bytes(folder: Path) -> int:
    """Bytes on the disk of all files below `folder`."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def require_memory(nbytes: int) -> None:
    """Raises InsufficientCapacity if the machine, or its control group (a Slurm job's --mem), has not `nbytes`."""
    available = available_memory()
    if available is not None and available < nbytes:
        raise InsufficientCapacity(
            f"{format_size(available)} of memory are available, the merge would use {format_size(nbytes)}. Give it "
            "a smaller --memory-budget."
        )


def available_memory() -> int | None:
    """Bytes; None where the system does not tell."""
    limits = [limit for limit in (_available_on_machine(), _limit_of_control_group()) if limit is not None]
    return min(limits, default=None)


def _available_on_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _limit_of_control_group() -> int | None:
    """The least limit of this process's groups, whichever version the machine has."""
    try:
        entries = Path("/proc/self/cgroup").read_text().split()
    except OSError:
        return None
    limits = []
    for entry in entries:
        path = entry.split(":", 2)[-1].rstrip("/")
        for place in CGROUP_LIMITS:
            limits += _limits(place, path)
    return min(limits, default=None)


def _limits(place: str, path: str) -> list[int]:
    """Limits of a group and of those it lies in."""
    found = []
    while True:
        try:
            text = Path(place.format(path=path)).read_text().strip()
        except OSError:
            text = ""
        if text.isdigit():
            found.append(int(text))
        if not path:
            return found
        path = path.rpartition("/")[0]
