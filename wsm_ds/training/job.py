"""The folder RUN/job: the files of running jobs, apart from the checkpoints.

    attempt               the number of the newest attempt; it rises by 1 at each start
    attempt-K/            what attempt K writes before it is published
    resharded-TAG-…/      a checkpoint rewritten for another number of ranks or stage, while it is loaded
    unusable/             broken checkpoints, moved away because a new one has the same name
    heartbeat/            one file per rank
    steps.jsonl           one line per step
    stop                  made by people: the ranks save and leave, and do not start before it is removed
    done                  {"step", "attempt"}: the only proof that a run has reached its last step

The job scripts of launch/ add:

    logs/attempt-K/       what the ranks, the watchdog and the node check of attempt K printed
    crashes               one line per attempt that ended by itself without a new checkpoint
    failed                why the scripts gave up; no job of the run starts before people remove it
    bad_nodes             one line per node that a job left out
    slurm_job             the id of the newest Slurm job

No `wsm-ds` command takes this folder for a checkpoint.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import RecipeError, Superseded
from wsm_ds.filesystem.durable import replace_shared_text
from wsm_ds.filesystem.small_files import read_small

ATTEMPT_VARIABLE = "WSM_ATTEMPT"
"""Set by a job script that has raised the number of the newest attempt before it started the ranks."""


@dataclass(frozen=True)
class JobFolder:
    """Paths of the files in RUN/job. Making one reads nothing."""

    run: Path

    @property
    def folder(self) -> Path:
        """RUN/job."""
        return self.run / "job"

    @property
    def attempt(self) -> Path:
        """The file that holds the number of the newest attempt."""
        return self.folder / "attempt"

    def attempt_folder(self, attempt: int) -> Path:
        """The folder of what an attempt has written and not published yet.

        Args:
            attempt: its number.
        """
        return self.folder / f"attempt-{attempt}"

    @property
    def unusable(self) -> Path:
        """The folder of broken checkpoints that were moved away because a new one has the same name."""
        return self.folder / "unusable"

    @property
    def heartbeats(self) -> Path:
        """The folder of heartbeats, one file per rank."""
        return self.folder / "heartbeat"

    @property
    def steps(self) -> Path:
        """The file of steps, one JSON line per step."""
        return self.folder / "steps.jsonl"

    @property
    def stop(self) -> Path:
        """The file with which people ask the run to save and stop."""
        return self.folder / "stop"

    @property
    def done(self) -> Path:
        """The marker of success."""
        return self.folder / "done"

    def logs(self, attempt: int) -> Path:
        """The folder of what an attempt's processes print."""
        return self.folder / "logs" / f"attempt-{attempt}"

    @property
    def crashes(self) -> Path:
        """The file of attempts that ended by themselves without a new checkpoint."""
        return self.folder / "crashes"

    @property
    def failed(self) -> Path:
        """The file that says why the job scripts gave up."""
        return self.folder / "failed"

    @property
    def bad_nodes(self) -> Path:
        """The file of nodes that jobs left out, with the reasons."""
        return self.folder / "bad_nodes"


def read_attempt(job: JobFolder) -> int:
    """Reads the number of the newest attempt; 0 if there was none.

    The file is not synced, so a crash of the storage may leave it empty. Then the folders of the attempts give the
    number.
    """
    recorded = _recorded_attempt(job)
    return _highest_attempt_folder(job) if recorded is None else recorded


def _recorded_attempt(job: JobFolder) -> int | None:
    try:
        return int(read_small(job.attempt))
    except (FileNotFoundError, ValueError):
        return None


def _highest_attempt_folder(job: JobFolder) -> int:
    folders = [*job.folder.glob("attempt-*"), *job.logs(0).parent.glob("attempt-*")]
    numbers = [folder.name.removeprefix("attempt-") for folder in folders]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def exported_attempt() -> int | None:
    """Returns the attempt's number that a job script has exported as WSM_ATTEMPT; None if there is none.

    Raises:
        RecipeError: WSM_ATTEMPT is not a number.
    """
    text = os.environ.get(ATTEMPT_VARIABLE, "")
    if text and not text.isdigit():
        raise RecipeError(f"{ATTEMPT_VARIABLE} is {text!r}; it must be the number in RUN/job/attempt.")
    return int(text) if text else None


def begin_attempt(job: JobFolder) -> int:
    """Starts a new attempt; older ones can publish nothing from here on.

    Returns:
        The attempt's number. Two callers at once get different numbers, because only one of them can make a folder.

    Ranks: rank 0, or the job script before the ranks start.
    """
    # The folders count too: after a crash of the storage the file may hold an older number.
    attempt = max(read_attempt(job), _highest_attempt_folder(job)) + 1
    while True:
        try:
            # mkdir is atomic, also on NFS.
            job.attempt_folder(attempt).mkdir(parents=True)
            break
        except FileExistsError:
            attempt += 1
    if (_recorded_attempt(job) or 0) < attempt:
        replace_shared_text(job.attempt, f"{attempt}\n")
    return attempt


def require_current(job: JobFolder, attempt: int) -> None:
    """Checks that `attempt` is still the newest one.

    Raises:
        Superseded: another attempt was started after it.
    """
    newest = read_attempt(job)
    if newest != attempt:
        raise superseded(job, attempt, newest)


def superseded(job: JobFolder, attempt: int, newest: int) -> Superseded:
    """Builds the error of an attempt that is not the newest one."""
    return Superseded(
        f"attempt {attempt} of {job.run} was superseded by attempt {newest}; it ends here and publishes nothing more. "
        "This happens when a node was cut off and came back; nothing has to be done."
    )


def is_done(job: JobFolder, until_step: int, *, attempt: int | None = None) -> bool:
    """Tells whether the run has reached `until_step` and has published the checkpoint of its last step.

    Args:
        job: the run's.
        until_step: number of updates.
        attempt: the attempt that must have reached it; None for any.
    """
    try:
        done = json.loads(read_small(job.done))
        return bool(done["step"] >= until_step and attempt in (None, done["attempt"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark_done(job: JobFolder, step: int, attempt: int) -> None:
    """Writes the marker of success. Ranks: rank 0, once the checkpoint of the last step is published."""
    replace_shared_text(job.done, json.dumps({"step": step, "attempt": attempt}) + "\n")
