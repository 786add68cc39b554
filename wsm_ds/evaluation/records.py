"""The file of evaluations: one JSON object a line, only ever added to, by several processes at once.

A process that is killed while it adds leaves at most a part of a line. The next one ends that line and adds its own
behind it. Readers pass over lines that are no evaluation.
"""

import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.evaluation import Evaluation
from wsm_ds.filesystem.durable import errors_name, sync_folder, write_all
from wsm_ds.filesystem.locks import try_lock
from wsm_ds.filesystem.own_files import open_own
from wsm_ds.planning.recipe_options import StrPath

log = logging.getLogger(__name__)

NAME = "evaluations.jsonl"
"""The file's usual name."""
LOCK_S, POLL_S = 120.0, 0.02
MOST_LINE_BYTES = 1 << 28


class Records:
    """Evaluations in a file. Several objects, also of other processes and hosts, may use one file.

    Args:
        path: the file; it need not exist. Its folder is made when something is added.

    Raises:
        EvaluationError: there is something else than a file of evaluations; nothing is added to it.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._evaluations: list[Evaluation] = []
        self._found: dict[tuple[str, str], list[int]] = {}
        self._read_bytes = 0
        self._strange_lines = 0
        self.refresh()
        if self._strange_lines and not self._evaluations:
            raise EvaluationError(
                f"{path} is not a file of evaluations. Choose another one; nothing was written to it."
            )

    def require_writable(self) -> None:
        """Checks that something can be added, before it is measured. Writes nothing.

        Raises:
            UnsafePath: a link, or no regular file, is in the file's place.
            EvaluationError: this user may not make the file.
            OSError: this user may not write into it.
        """
        if self.path.exists() or self.path.is_symlink():
            os.close(open_own(self.path, os.O_RDWR | os.O_APPEND))
            return
        above = next(folder for folder in self.path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise EvaluationError(f"{self.path} cannot be made: {above} is no folder where this user may write.")

    def refresh(self) -> None:
        """Reads what was added to the file since the last time."""
        try:
            # Without O_NONBLOCK, to open a named pipe waits until another process writes to it.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise EvaluationError(f"{self.path} is a folder, a pipe or a device, and a file of evaluations is needed.")
        with os.fdopen(descriptor, "rb") as file:
            file.seek(self._read_bytes)
            while (line := file.readline(MOST_LINE_BYTES)).endswith(b"\n"):  # a line without it is not finished
                self._read_bytes += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            evaluation = Evaluation.model_validate_json(line)
        except ValidationError:
            self._strange_lines += 1
            log.warning("%s holds a line that is no evaluation, perhaps of a process that was killed", self.path)
            return
        key = (evaluation.subject.identity, str(evaluation.evaluator.get("identity")))
        self._found.setdefault(key, []).append(len(self._evaluations))
        self._evaluations.append(evaluation)

    def all(self) -> tuple[Evaluation, ...]:
        """All evaluations in the file, in its order."""
        self.refresh()
        return tuple(self._evaluations)

    def find(self, subject_identity: str, evaluator_identity: str, *, failed: bool = False) -> Evaluation | None:
        """The newest evaluation of a model by an evaluator.

        Args:
            subject_identity: `Subject.identity`.
            evaluator_identity: `identity()` of the evaluator.
            failed: whether one without a result counts, too.

        Returns:
            None if there is none: it must be measured.
        """
        self.refresh()
        for number in reversed(self._found.get((subject_identity, evaluator_identity), [])):
            if failed or self._evaluations[number].failure is None:
                return self._evaluations[number]
        return None

    def add(self, evaluation: Evaluation) -> None:
        """Adds an evaluation, and returns when it is on the disk.

        Args:
            evaluation: to add.

        Raises:
            UnsafePath: a link, or no regular file, is in the file's place.
            OSError: the disk is full or fails, or another process holds the file for too long.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self._locked() as descriptor:
            end = os.fstat(descriptor).st_size
            is_torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            line = evaluation.model_dump_json().encode() + b"\n"
            with errors_name(self.path):
                write_all(descriptor, memoryview(b"\n" * is_torn + line), end)
                os.fsync(descriptor)
        if is_new:
            sync_folder(self.path.parent)
        self.refresh()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            deadline_s = time.monotonic() + LOCK_S
            while not try_lock(descriptor, self.path.parent):
                if time.monotonic() > deadline_s:
                    raise OSError(f"{self.path} has been locked by another process for {LOCK_S:g} s.")
                time.sleep(POLL_S)
            yield descriptor
        finally:
            os.close(descriptor)
