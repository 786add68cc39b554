"""What a job script does next, decided from plain facts: continue, requeue, leave nodes out, or stop.

Every function here takes facts and returns a `Decision`. None reads a file or a clock, starts a process or writes.
`wsm_ds.training.decide` gathers the facts and carries the decisions out for the scripts of launch/.

Two facts count, because a launcher's exit codes prove nothing (srun passes a rank's 75 on as 1, 75 or 143):
RUN/job/done is the only proof of success, and a changed RUN/latest the only proof of progress.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from wsm_ds.training.job import JobFolder
from wsm_ds.training.node_reports import NodeReport
from wsm_ds.training.slurm_job import SlurmJob

NO_CHECKPOINT = "none"
"""Stands in RUN/job/crashes for the checkpoint of a run that has none yet."""


class Action(Enum):
    """What the script does, if the decision holds no error."""

    START = "start"
    """It starts the attempt, or its ranks."""
    REQUEUE = "requeue"
    """It requeues the job. The argument names nodes to exclude."""
    SAVED = "saved"
    """The ranks saved after a signal: Slurm jobs are requeued, other scripts end with exit code 75."""
    AGAIN = "again"
    """It starts another attempt, because the ranks ended by themselves."""
    DONE = "done"
    """It ends with exit code 0."""
    FAIL = "fail"
    """It ends with exit code 1; the argument says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the script does and says, and what is recorded in RUN/job.

    Attributes:
        action: see `Action`.
        argument: of the action; "" if it needs none.
        messages: for the job's log.
        crashes: lines to add to RUN/job/crashes.
        bad_nodes: lines to add to RUN/job/bad_nodes.
        failed: the text of RUN/job/failed; "" to write none.
    """

    action: Action
    argument: str = ""
    messages: tuple[str, ...] = ()
    crashes: tuple[str, ...] = ()
    bad_nodes: tuple[str, ...] = ()
    failed: str = ""


@dataclass(frozen=True, slots=True)
class RunState:
    """What the files of a run say now.

    Attributes:
        job: the run's folder; only its paths are used, in messages.
        newest_attempt: the number of the newest attempt; 0 if there was none.
        is_done: whether the run has reached the step that the job was asked for.
        is_stopped: whether RUN/job/stop exists.
        failed: the first line of RUN/job/failed; None if that file does not exist.
        latest: the tag that RUN/latest names; "" if there is none.
        crashes: the lines of RUN/job/crashes.
    """

    job: JobFolder
    newest_attempt: int
    is_done: bool
    is_stopped: bool
    failed: str | None
    latest: str
    crashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a run.

    Attributes:
        number: counted from 1.
        until_step: number of updates that the job was asked for.
        latest_before: the tag that RUN/latest named when the attempt began; "" if there was none.
        max_crashes: attempts in a row without a new checkpoint after which the script gives up.
    """

    number: int
    until_step: int
    latest_before: str
    max_crashes: int


@dataclass(frozen=True, slots=True)
class RanksEnd:
    """How the ranks of an attempt ended.

    Attributes:
        is_signalled: whether a signal has asked the script to let them save and leave.
        hang: the watchdog's message, if the script ended them because they hung; else "".
        exit_code: of the launcher; None where it says nothing.
    """

    is_signalled: bool = False
    hang: str = ""
    exit_code: int | None = None

    @property
    def reason(self) -> str:
        """Why they ended, if no signal asked for it."""
        by_themselves = "by themselves" if self.exit_code is None else f"with code {self.exit_code}"
        return self.hang or f"the ranks ended {by_themselves}"


def decide_start(state: RunState, until_step: int) -> Decision:
    """Decides whether a job may begin an attempt: not if the run is done, or if people must act first."""
    if state.is_done:
        return _done(until_step)
    if state.failed is not None:
        path = state.job.failed
        return _fail(f"gave up before: {state.failed}. Correct the cause, remove {path}, and submit again")
    if state.is_stopped:
        return _stopped(state)
    return Decision(Action.START)


def decide_end(state: RunState, attempt: Attempt, end: RanksEnd) -> Decision:
    """Decides what follows when the ranks of an attempt have ended.

    An attempt that is not the newest one ends without effect: its node was cut off and came back.
    """
    if state.is_done:
        return _done(attempt.until_step)
    if state.newest_attempt != attempt.number:
        return _fail(f"superseded by attempt {state.newest_attempt}")
    if state.is_stopped:
        return _stopped(state)
    if end.is_signalled:
        return Decision(Action.SAVED)
    return decide_after_crash(state, attempt, end.reason)


def decide_after_crash(state: RunState, attempt: Attempt, reason: str) -> Decision:
    """Decides whether another attempt follows one that ended by itself.

    Attempts that made a checkpoint do not count as crashes. The script gives up after `max_crashes` attempts in a row
    that all ended at the same checkpoint.
    """
    if state.latest != attempt.latest_before:
        return Decision(Action.AGAIN)
    latest = state.latest or NO_CHECKPOINT
    crash = f"{latest} attempt {attempt.number}: {reason}"
    count = crashes_in_a_row((*state.crashes, crash), latest)
    if count >= attempt.max_crashes:
        gave_up = f"{count} attempts in a row ended without a new checkpoint, the last: {reason}"
        decision = _give_up(state, attempt, gave_up)
        return replace(decision, crashes=(crash, *decision.crashes))
    message = f"no new checkpoint since {latest} ({count} of {attempt.max_crashes} attempts)"
    return Decision(Action.AGAIN, messages=(message,), crashes=(crash,))


def crashes_in_a_row(lines: Sequence[str], latest: str) -> int:
    """Counts the lines at the end of RUN/job/crashes that are about the checkpoint `latest`.

    >>> crashes_in_a_row(["none attempt 1: no port", "step5 attempt 2: hang", "step5 attempt 3: code 1"], "step5")
    2
    """
    count = 0
    for line in lines:
        count = count + 1 if line.split(" ")[0] == latest else 0
    return count


def decide_slurm_nodes(
    state: RunState, attempt: Attempt, reports: Sequence[NodeReport] | None, last_line: str, silence: str, stamp: str
) -> Decision:
    """Decides whether the ranks of a Slurm job start, or the job is requeued without its unfit nodes.

    Where no node is fit, or the check did not start, something else than a node may be the cause; so that counts as a
    crash.

    Args:
        state: of the run.
        attempt: the one that checked the nodes.
        reports: see `reports_from_srun`.
        last_line: of the check's output.
        silence: the words for a node that gave no answer.
        stamp: what begins each line of RUN/job/bad_nodes: the time and the job.
    """
    if reports is None:
        return _requeued(decide_after_crash(state, attempt, f"the check of the nodes did not start: {last_line}"))
    unfit = {report.host: report.answer or silence for report in reports if not report.is_fit}
    if not unfit:
        return Decision(Action.START)
    last_lines = {host: answer.splitlines()[-1] for host, answer in unfit.items()}
    decision = Decision(Action.REQUEUE, ",".join(unfit))
    if len(unfit) == len(reports):
        crash = decide_after_crash(state, attempt, f"no node is fit: {last_lines[reports[-1].host]}")
        decision = _requeued(crash, decision.argument)
    return replace(
        decision,
        messages=tuple(f"{host} is left out: {answer}" for host, answer in unfit.items()) + decision.messages,
        bad_nodes=tuple(f"{stamp}, {host}: {line}" for host, line in last_lines.items()),
    )


def decide_pdsh_hosts(
    state: RunState, attempt: Attempt, reports: Sequence[NodeReport], last_line: str, silence: str
) -> Decision:
    """Decides on which hosts of a host file the ranks start.

    Args:
        state: of the run.
        attempt: the one that checked the hosts.
        reports: see `reports_from_pdsh`.
        last_line: of the check's output.
        silence: the words for a host that gave no answer.

    Returns:
        The argument is the first fit host and, if hosts are left out, those as DeepSpeed's `--exclude` wants them:
        "n1 n2@n4".
    """
    fit = [report.host for report in reports if report.is_fit]
    unfit = [report for report in reports if not report.is_fit]
    messages = tuple(f"{report.host} is left out: {report.answer or silence}" for report in unfit)
    if not fit:
        return replace(_give_up(state, attempt, f"no host is fit: {last_line}"), messages=messages)
    exclude = "@".join(report.host for report in unfit)
    return Decision(Action.START, f"{fit[0]} {exclude}".strip(), messages)


def decide_requeue(slurm_job: SlurmJob, unfit_nodes: str = "") -> Decision:
    """Decides whether a Slurm job's script may requeue it, and which nodes the job must not get then.

    Args:
        slurm_job: what Slurm says of it.
        unfit_nodes: to be excluded from now on, separated by commas.

    Returns:
        The argument is the whole list of nodes to exclude, if there are unfit ones.
    """
    if not slurm_job.may_be_requeued:
        return _fail("Slurm is ending this job; not requeued by this script")
    excluded = [nodes for nodes in (unfit_nodes, slurm_job.excluded_nodes) if nodes]
    return Decision(Action.REQUEUE, ",".join(excluded) if unfit_nodes else "")


def _requeued(crash: Decision, unfit_nodes: str = "") -> Decision:
    """What follows a crash before the ranks have started: the job is requeued, unless the script gives up."""
    if crash.action == Action.FAIL:
        return crash
    return replace(crash, action=Action.REQUEUE, argument=unfit_nodes)


def _done(until_step: int) -> Decision:
    return Decision(Action.DONE, messages=(f"done: step {until_step} was reached",))


def _fail(reason: str) -> Decision:
    return Decision(Action.FAIL, reason)


def _stopped(state: RunState) -> Decision:
    return _fail(f"stopped by {state.job.stop}; remove it to continue")


def _give_up(state: RunState, attempt: Attempt, reason: str) -> Decision:
    """Stops all jobs of the run until people have removed RUN/job/failed; then a new count of crashes begins."""
    logs = state.job.logs(attempt.number)
    error = f"GIVING UP: {reason}. See {logs}; remove {state.job.failed} to try again"
    return Decision(Action.FAIL, error, crashes=("- gave up",), failed=f"{reason} (logs: {logs})")
