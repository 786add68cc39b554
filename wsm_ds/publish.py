"""All or nothing: an output is staged beside its place, synced, and appears by one rename.

The manifest is the last file written into the staging folder, so a folder with a manifest is whole.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsm_ds.errors import OutputExists

log = logging.getLogger(__name__)

MANIFEST = "wsm_merge.json"
LOCK = ".lock"


def require_absent(out: Path) -> None:
    """Raises OutputExists if there is anything at `out`."""
    if out.exists() or out.is_symlink():
        raise OutputExists(f"{out} exists; nothing is ever overwritten. Remove it or choose another --out.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A staging folder for `out`, exclusively ours; what a killed merge left there is removed.

    On an error it is removed again; `commit` has to be called to publish it.

    Raises:
        OutputExists: `out` exists, or another process is staging it.
    """
    require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.wsm-staging"
    staging.mkdir(exist_ok=True)
    lock = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _hold(lock, out)
        for left in staging.iterdir():
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _hold(lock: int, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            log.warning("%s is on a file system without locks: start no second merge into it", out.parent)
            return
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
        raise OutputExists(f"another merge is writing {out} ({holder or 'holder unknown'}).") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)


def write_text(path: Path, text: str) -> None:
    """Writes and syncs a small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def commit(staging: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, syncs the folders and renames `staging` to `out`."""
    write_text(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    (staging / LOCK).unlink()
    for folder in [path for path in staging.rglob("*") if path.is_dir()] + [staging]:
        _sync_folder(folder)
    require_absent(out)
    staging.rename(out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync folders by themselves and refuse to be told
            raise
    finally:
        os.close(descriptor)
