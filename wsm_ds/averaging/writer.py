"""Writes snapshots behind the training's back: a thread, one snapshot at a time, no barrier and no collective.

Each rank writes and syncs its own files, and then adds 1 to a counter in the store at which the ranks of the training
have met. The rank that is the last to count renames the folder. A rank that dies never counts, so its slot never gets
its final name.
"""

import errno
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.averaging.averages import release
from wsm_ds.averaging.torch_files import PickledFile, write_file
from wsm_ds.errors import NonFiniteValue, TrainingError
from wsm_ds.filesystem.durable import move_into_place

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".part"
"""The end of a folder's name in which a snapshot is written."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks count.

    Attributes:
        store: of torch.distributed: `add(key, amount)` returns the sum.
        world_size: ranks that count.
        name: of this meeting alone, so that an old attempt which is still alive counts and writes elsewhere.
    """

    store: Any
    world_size: int
    name: str


class SnapshotWriter:
    """Writes one snapshot at a time.

    Args:
        root: the folder of snapshots.
        meeting: the same on all ranks.
        may_publish: called before the rename; what it raises keeps the snapshot from appearing.

    Ranks: all make it, in the same order.
    """

    def __init__(self, root: Path, meeting: Meeting, may_publish: Callable[[], None] = lambda: None) -> None:
        self.root, self.meeting, self.may_publish = root, meeting, may_publish
        self._number = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, tag: str, files: Sequence[PickledFile]) -> None:
        """Begins to write a snapshot. Waits for the one before it, if that is not written yet.

        Args:
            tag: the snapshot's name.
            files: this rank's.

        Raises:
            TrainingError: what went wrong with an earlier snapshot.
        """
        self.wait()
        self._number += 1
        key = f"wsm_ds/averaging/{self.meeting.name}/{self._number}"
        self._thread = threading.Thread(target=self._write, args=(tag, list(files), key), name=f"snapshot {tag}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            TrainingError: the snapshot could not be written, for another reason than a full disk.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def raise_error(self) -> None:
        """Raises TrainingError if a snapshot could not be written, for another reason than a full disk; once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise TrainingError(f"a snapshot could not be written into {self.root}: {error}") from error

    def _write(self, tag: str, files: list[PickledFile], key: str) -> None:
        staged = self.root / f".{tag}.{self.meeting.name}{PARTIAL}"
        try:
            is_written = self._write_files(staged, files)
        except Exception as error:
            self._error, is_written = error, False
        while files:  # the averages are not needed while the other ranks write
            for content in files.pop().records.values():
                if not isinstance(content, bytes):
                    release(content)
        try:
            self._count(tag, staged, key, is_written)
        except Exception as error:
            self._error = self._error or error

    def _write_files(self, staged: Path, files: Sequence[PickledFile]) -> bool:
        """Whether this rank's files are on the disk. If there is no room for them, or no finite average, it is said."""
        try:
            staged.mkdir(parents=True, exist_ok=True)
            for file in files:
                write_file(staged, file)
            return True
        except NonFiniteValue as error:
            log.warning("no snapshot %s is written: %s", staged.name, error)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            log.warning("no snapshot %s is written, there is no room: %s. The training goes on.", staged.name, error)
        return False

    def _count(self, tag: str, staged: Path, key: str, is_written: bool) -> None:
        store = self.meeting.store
        if not is_written:
            store.add(f"{key}/failed", 1)
        if store.add(key, 1) < self.meeting.world_size:
            return
        if store.add(f"{key}/failed", 0):
            shutil.rmtree(staged, ignore_errors=True)
            return
        self.may_publish()
        move_into_place(staged, self.root / tag)
        log.info("snapshot %s is written", self.root / tag)
