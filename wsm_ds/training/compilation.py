"""Keeps the just-in-time compilation of DeepSpeed's ops from hanging a job.

While torch compiles an op it holds a file `lock` in the op's folder (`torch/utils/file_baton.py`). It waits for the
locks of other processes without a limit and without a message. A job that is killed while it compiles leaves its lock
behind, and every later start waits for it without end.
"""

import logging
import os
import time
from pathlib import Path

from wsm_ds.errors import StaleLock

log = logging.getLogger(__name__)

POLL_S = 1.0


def prepare_compilation(*, stale_after_s: float = 600.0) -> None:
    """Checks that a start will not wait for the lock of a dead process; on CPUs, it also avoids a needless compilation.

    On CPUs `init_distributed` would compile `deepspeed_shm_comm` for a minute. Only inference uses it
    (`comm/torch.py`, `inference_all_reduce`). A config that names FusedAdam or CPUAdam still compiles those;
    `"torch_adam": true` avoids it.

    Args:
        stale_after_s: see `require_no_stale_locks`.

    Ranks: any, before `start_process_groups`.

    Raises:
        StaleLock: see `require_no_stale_locks`.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # The cache of the ops that can be built (`ops/__init__.py`): an empty one makes comm/torch.py skip the op.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    require_no_stale_locks(extensions_folder(), stale_after_s=stale_after_s)


def extensions_folder() -> Path:
    """Returns the folder in which torch keeps compiled ops (`torch/utils/cpp_extension.py`, `_get_build_directory`)."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def require_no_stale_locks(folder: Path, *, stale_after_s: float) -> None:
    """Waits while other processes compile ops. Returns when there is no lock.

    A lock is stale if it is older than `stale_after_s` and no process of this machine has it open. Two looks in a row
    must agree, because torch closes the lock's file a moment before it removes it.

    Args:
        folder: see `extensions_folder`.
        stale_after_s: age in seconds. 0 for a folder that only this machine uses. Where other machines share the
            folder, more than the compilation of any op takes: 600.

    Raises:
        StaleLock: the message names the lock and the command that removes it.
    """
    has_warned, unheld_before = False, set[Path]()
    while locks := {lock: age for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")) if (age := _age_s(lock))}:
        open_files = _open_files()
        unheld = {lock for lock in locks if lock.resolve() not in open_files}
        for lock in sorted(unheld & unheld_before):
            if locks[lock] > stale_after_s:
                raise StaleLock(
                    f"{lock} is {locks[lock]:.0f} s old and no process of this machine holds it: a start was killed "
                    "while it compiled an op, and every later start would wait for it without end. "
                    f"Remove it (rm '{lock}') and start again. A TORCH_EXTENSIONS_DIR of each job's own avoids it."
                )
        if not has_warned:
            log.warning("waiting for other processes, which compile ops: %s", ", ".join(map(str, locks)))
            has_warned = True
        unheld_before = unheld
        time.sleep(POLL_S)


def _age_s(lock: Path) -> float | None:
    try:
        return max(time.time() - lock.stat().st_mtime, 1e-3)
    except FileNotFoundError:
        return None


def _open_files() -> set[Path]:
    """Every file that a process of this machine has open, as far as this user may see."""
    open_files = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            open_files.add(link.readlink())
        except OSError:
            continue
    return open_files
