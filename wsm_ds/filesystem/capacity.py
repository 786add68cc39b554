"""Free disk and free memory, checked before a merge starts, so that it does not fail after an hour."""

import os
import resource
from pathlib import Path

from wsm_ds.errors import InsufficientCapacity
from wsm_ds.sizes import format_size

EXTRA_INODES = 16
"""For folders, journal and manifest."""
CGROUP_LIMITS = ("/sys/fs/cgroup{path}/memory.max", "/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
"""Where cgroup version 2 and version 1 show a group's limit."""


def require_disk(folder: Path, nbytes: int, files: int, purpose: str) -> None:
    """Checks that a file system has enough bytes and inodes free.

    Args:
        folder: any folder of the file system.
        nbytes: bytes that are needed.
        files: files that will be made.
        purpose: the work that needs them, for the message.

    Raises:
        InsufficientCapacity: bytes or inodes are missing; the message has both figures.
    """
    status = os.statvfs(folder)
    # f_bavail, not f_bfree: some free blocks may be reserved for root.
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < nbytes:
        raise InsufficientCapacity(
            f"{folder} has {format_size(free_bytes)} free, {purpose} needs {format_size(nbytes)}."
        )
    # Btrfs reports 0 inodes in all: it makes them as needed.
    if status.f_files and status.f_favail < files + EXTRA_INODES:
        raise InsufficientCapacity(
            f"{folder} has {status.f_favail} inodes free, {purpose} needs {files + EXTRA_INODES}."
        )


def disk_usage_bytes(folder: Path) -> int:
    """Bytes that all files below `folder` take on the disk. A sparse file takes less than its length."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def require_memory(nbytes: int) -> None:
    """Checks that `nbytes` of memory are available.

    Raises:
        InsufficientCapacity: the machine, or this process's control group (a Slurm job's --mem), has less.
    """
    available = available_memory()
    if available is not None and available < nbytes:
        raise InsufficientCapacity(
            f"{format_size(available)} of memory are available, the merge would use {format_size(nbytes)}. Give it "
            "a smaller --memory-budget."
        )


def require_address_space(nbytes: int) -> None:
    """Checks that the limit of this process's address space (`ulimit -v`) is at least `nbytes`.

    Raises:
        InsufficientCapacity: it is less.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < nbytes:
        raise InsufficientCapacity(
            f"this process may use {format_size(limit)} of address space (ulimit -v), and needs at least "
            f"{format_size(nbytes)}. Raise the limit."
        )


def available_memory() -> int | None:
    """Bytes of memory that this process may still use; None where the system does not say."""
    limits = [limit for limit in (_available_on_machine(), _limit_of_control_group()) if limit is not None]
    return min(limits, default=None)


def _available_on_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _limit_of_control_group() -> int | None:
    """The least limit of this process's control groups; None without one. Both cgroup versions are tried."""
    try:
        entries = Path("/proc/self/cgroup").read_text().split()
    except OSError:
        return None
    limits = []
    for entry in entries:
        path = entry.split(":", 2)[-1].rstrip("/")
        for pattern in CGROUP_LIMITS:
            limits += _limits(pattern, path)
    return min(limits, default=None)


def _limits(pattern: str, path: str) -> list[int]:
    """The limits of a group and of its parents."""
    limits = []
    while True:
        try:
            text = Path(pattern.format(path=path)).read_text().strip()
        except OSError:
            text = ""
        if text.isdigit():
            limits.append(int(text))
        if not path:
            return limits
        path = path.rpartition("/")[0]
