"""Locks of torch's just-in-time compilation: waited for while somebody holds them, named when nobody does."""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsm_ds.errors import StaleLock
from wsm_ds.training.compilation import extensions_folder, require_no_stale_locks

if TYPE_CHECKING:
    from torch.utils.file_baton import FileBaton


def lock_of_op(folder: Path, age_s: float) -> "FileBaton":
    """What torch makes while it compiles."""
    from torch.utils.file_baton import FileBaton

    path = folder / "py311_cpu" / "fused_adam" / "lock"
    path.parent.mkdir(parents=True)
    baton = FileBaton(str(path))
    assert baton.try_acquire()
    os.utime(path, (time.time() - age_s,) * 2)
    return baton


def test_a_lock_that_a_killed_job_has_left_is_named(tmp_path: Path) -> None:
    baton = lock_of_op(tmp_path, age_s=1000)
    os.close(baton.fd)  # as when its process was killed
    with pytest.raises(
        StaleLock, match=r"fused_adam/lock is 100[01] s old and no process of this machine holds it.*rm '"
    ):
        require_no_stale_locks(tmp_path, stale_after_s=600)


def test_a_lock_is_waited_for_while_a_process_holds_it(tmp_path: Path) -> None:
    baton = lock_of_op(tmp_path, age_s=1000)
    threading.Timer(0.5, baton.release).start()
    began_s = time.monotonic()
    require_no_stale_locks(tmp_path, stale_after_s=600)
    assert time.monotonic() - began_s > 0.4


def test_a_young_lock_may_be_another_machines_and_is_waited_for(tmp_path: Path) -> None:
    baton = lock_of_op(tmp_path, age_s=0)
    os.close(baton.fd)
    with pytest.raises(StaleLock):
        require_no_stale_locks(tmp_path, stale_after_s=1.5)


def test_on_a_machine_by_itself_a_lock_without_a_process_is_named_within_seconds(tmp_path: Path) -> None:
    baton = lock_of_op(tmp_path, age_s=0)
    os.close(baton.fd)
    with pytest.raises(StaleLock):
        require_no_stale_locks(tmp_path, stale_after_s=0)


def test_a_lock_that_is_released_at_this_moment_is_not_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baton = lock_of_op(tmp_path, age_s=1000)
    os.close(baton.fd)  # torch closes the file first, and removes it then
    threading.Timer(0.5, Path(baton.lock_file_path).unlink).start()
    require_no_stale_locks(tmp_path, stale_after_s=0)


def test_the_folder_is_the_one_that_torch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert Path(_get_build_directory("op", verbose=False)).parent == extensions_folder()
    require_no_stale_locks(extensions_folder(), stale_after_s=0)
