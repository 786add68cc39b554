"""What lies in RUN/job: everything that belongs to the running of jobs, and not to the checkpoints.

    attempt               the number of the newest attempt; it rises by 1 at each start
    attempt-K/            what attempt K writes before it is published
    resharded/            the newest checkpoint for another number of ranks, while it is loaded
    unusable/             broken checkpoints that stood where a new one had to go
    heartbeat/            a file a rank
    steps.jsonl           a line a step
    stop                  made by people: the ranks save and leave, and do not start before it is removed
    done                  {"step", "attempt"}: the only proof that a run has reached its last step

`wsm-ds` passes this folder over.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import RecipeError, Superseded
from wsm_ds.filesystem.durable import replace_shared_text

ATTEMPT_VARIABLE = "WSM_ATTEMPT"
"""Set by a job script that has raised the number of the newest attempt before it started the ranks."""


@dataclass(frozen=True)
class JobFolder:
    """The files of RUN/job by name."""

    run: Path

    @property
    def folder(self) -> Path:
        """RUN/job."""
        return self.run / "job"

    @property
    def attempt(self) -> Path:
        """The number of the newest attempt."""
        return self.folder / "attempt"

    def attempt_folder(self, attempt: int) -> Path:
        """What attempt K may write in."""
        return self.folder / f"attempt-{attempt}"

    @property
    def resharded(self) -> Path:
        """A checkpoint in another form, while it is loaded."""
        return self.folder / "resharded"

    @property
    def unusable(self) -> Path:
        """Broken checkpoints that were in the way."""
        return self.folder / "unusable"

    @property
    def heartbeats(self) -> Path:
        """A file a rank."""
        return self.folder / "heartbeat"

    @property
    def steps(self) -> Path:
        """A JSON line a step."""
        return self.folder / "steps.jsonl"

    @property
    def stop(self) -> Path:
        """People's wish that the run pauses."""
        return self.folder / "stop"

    @property
    def done(self) -> Path:
        """The marker of success."""
        return self.folder / "done"


def read_attempt(job: JobFolder) -> int:
    """The number of the newest attempt; 0 if there was none."""
    try:
        return int(job.attempt.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0


def given_attempt() -> int | None:
    """The number that a job script has raised and exported; None if it did not.

    Raises:
        RecipeError: it is no number.
    """
    given = os.environ.get(ATTEMPT_VARIABLE, "")
    if given and not given.isdigit():
        raise RecipeError(f"{ATTEMPT_VARIABLE} is {given!r}; it must be the number in RUN/job/attempt.")
    return int(given) if given else None


def begin_attempt(job: JobFolder) -> int:
    """Raises the number of the newest attempt and returns it. Two callers at once get different numbers."""
    attempt = read_attempt(job) + 1
    while True:
        try:
            job.attempt_folder(attempt).mkdir(parents=True)
            break
        except FileExistsError:
            attempt += 1
    if read_attempt(job) < attempt:
        replace_shared_text(job.attempt, f"{attempt}\n")
    return attempt


def require_current(job: JobFolder, attempt: int) -> None:
    """Raises Superseded if another attempt has been started since."""
    newest = read_attempt(job)
    if newest != attempt:
        raise superseded(job, attempt, newest)


def superseded(job: JobFolder, attempt: int, newest: int) -> Superseded:
    """The error of an attempt that is not the newest."""
    return Superseded(
        f"attempt {attempt} of {job.run} was superseded by attempt {newest}; it ends here and publishes nothing more. "
        "A node that was cut off and came back ends so; nothing has to be done."
    )


def is_done(job: JobFolder, until_step: int, *, attempt: int | None = None) -> bool:
    """Whether the run has reached `until_step` (by this attempt, if one is given), and its checkpoint is published."""
    try:
        done = json.loads(job.done.read_text(encoding="utf-8"))
        return bool(done["step"] >= until_step and attempt in (None, done["attempt"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark_done(job: JobFolder, step: int, attempt: int) -> None:
    """Writes the marker; rank 0 does, when the checkpoint of the last step is published."""
    replace_shared_text(job.done, json.dumps({"step": step, "attempt": attempt}) + "\n")
