"""DeepSpeed's just-in-time compilation, kept from hanging a job.

torch holds a file `lock` in the folder of an op while it compiles (`torch/utils/file_baton.py`), and waits for a lock
of others without limit and without a word. A job that is killed while it compiles leaves its lock for ever.
"""

import logging
import os
import time
from pathlib import Path

from wsm_ds.errors import StaleLock

log = logging.getLogger(__name__)

POLL_S = 1.0


def prepare_compilation(*, stale_after_s: float = 600.0) -> None:
    """Makes sure that no lock of a dead process is waited for; on CPUs, that nothing is compiled at all.

    On CPUs `init_distributed` would compile `deepspeed_shm_comm` (a minute), which training does not use.
    A config that names FusedAdam or CPUAdam compiles them all the same; `"torch_adam": true` does not.

    Ranks: any, before `start_process_groups`.

    Raises:
        StaleLock: see `require_no_stale_locks`.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    require_no_stale_locks(extensions_folder(), stale_after_s=stale_after_s)


def extensions_folder() -> Path:
    """Where torch keeps compiled ops (`torch/utils/cpp_extension.py`, `_get_build_directory`)."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def require_no_stale_locks(folder: Path, *, stale_after_s: float) -> None:
    """Waits while ops are being compiled. Returns when there is no lock.

    A lock is stale if it is older than `stale_after_s` and no process of this machine has it open, twice in a row
    (torch closes the lock's file a moment before it removes it).

    Args:
        folder: see `extensions_folder`.
        stale_after_s: 0 for a folder that only this machine uses. Where other machines share the folder, longer than
            the compilation of any op takes (600).

    Raises:
        StaleLock: the lock is named, with the command that removes it.
    """
    warned, unheld_before = False, set[Path]()
    while locks := {lock: age for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")) if (age := _age_s(lock))}:
        open_files = _open_files()
        unheld = {lock for lock in locks if lock.resolve() not in open_files}
        for lock in sorted(unheld & unheld_before):
            if locks[lock] > stale_after_s:
                raise StaleLock(
                    f"{lock} is {locks[lock]:.0f} s old and no process of this machine holds it: a start was killed "
                    "while it compiled, and every later start would wait for it without end. "
                    f"Remove it (rm '{lock}') and start again. A TORCH_EXTENSIONS_DIR of each job's own avoids it."
                )
        if not warned:
            log.warning("waiting for the compilation of others: %s", ", ".join(map(str, locks)))
            warned = True
        unheld_before = unheld
        time.sleep(POLL_S)


def _age_s(lock: Path) -> float | None:
    try:
        return max(time.time() - lock.stat().st_mtime, 1e-3)
    except FileNotFoundError:
        return None


def _open_files() -> set[Path]:
    """Every file that a process of this machine, as far as we may look, has open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(link.readlink())
        except OSError:
            continue
    return found
