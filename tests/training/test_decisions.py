"""Every decision of the job scripts, from facts alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from wsm_ds.training.decisions import (
    Action,
    Attempt,
    Decision,
    RanksEnd,
    RunState,
    crashes_in_a_row,
    decide_after_crash,
    decide_end,
    decide_pdsh_hosts,
    decide_requeue,
    decide_slurm_nodes,
    decide_start,
)
from wsm_ds.training.job import JobFolder
from wsm_ds.training.node_reports import NodeReport
from wsm_ds.training.slurm_job import SlurmJob

STATE = RunState(
    job=JobFolder(Path("/run")),
    newest_attempt=4,
    is_done=False,
    is_stopped=False,
    failed=None,
    latest="global_step50",
    crashes=(),
)
ATTEMPT = Attempt(number=4, until_step=100, latest_before="global_step50", max_crashes=3)
CRASHES = (
    "global_step50 attempt 2: the ranks ended with code 1",
    "global_step50 attempt 3: the ranks ended with code 1",
)
SILENCE, STAMP = "no answer within 60 s", "2026-11-27 05:00:00 job 7"
N1, N2, N3 = (NodeReport(f"n{number}", True, f"n{number}: fit: folder writable") for number in (1, 2, 3))


def unfit(report: NodeReport, answer: str) -> NodeReport:
    return replace(report, is_fit=False, answer=answer)


# --- may a job begin?


def test_a_job_begins_an_attempt() -> None:
    assert decide_start(STATE, 100) == Decision(Action.START)


def test_a_job_of_a_done_run_ends_well_although_it_failed_once_and_was_stopped() -> None:
    state = replace(STATE, is_done=True, failed="it crashed", is_stopped=True)
    assert decide_start(state, 100) == Decision(Action.DONE, messages=("done: step 100 was reached",))


def test_no_job_begins_before_people_have_removed_the_file_failed() -> None:
    decision = decide_start(replace(STATE, failed="3 attempts in a row …", is_stopped=True), 100)
    assert decision.action == Action.FAIL
    assert decision.argument.startswith("gave up before: 3 attempts in a row …. ")
    assert "remove /run/job/failed, and submit again" in decision.argument


def test_an_empty_file_failed_counts_too() -> None:
    assert decide_start(replace(STATE, failed=""), 100).action == Action.FAIL


def test_no_job_begins_before_people_have_removed_the_file_stop() -> None:
    decision = decide_start(replace(STATE, is_stopped=True), 100)
    assert decision == Decision(Action.FAIL, "stopped by /run/job/stop; remove it to continue")


# --- the ranks have ended


def test_done_counts_before_all_else_when_the_ranks_have_ended() -> None:
    state = replace(STATE, is_done=True, newest_attempt=5, is_stopped=True)
    end = RanksEnd(is_signalled=True, hang="rank 1 is silent", exit_code=1)
    assert decide_end(state, ATTEMPT, end) == Decision(Action.DONE, messages=("done: step 100 was reached",))


def test_a_superseded_attempt_decides_nothing_and_records_nothing() -> None:
    state = replace(STATE, newest_attempt=5, is_stopped=True, crashes=CRASHES)
    assert decide_end(state, ATTEMPT, RanksEnd(exit_code=1)) == Decision(Action.FAIL, "superseded by attempt 5")


@pytest.mark.parametrize("is_signalled", [False, True])
def test_a_stopped_run_is_not_requeued(is_signalled: bool) -> None:
    decision = decide_end(replace(STATE, is_stopped=True), ATTEMPT, RanksEnd(is_signalled=is_signalled))
    assert decision == Decision(Action.FAIL, "stopped by /run/job/stop; remove it to continue")


def test_after_a_signal_nothing_counts_as_a_crash() -> None:
    state = replace(STATE, crashes=CRASHES)
    assert decide_end(state, ATTEMPT, RanksEnd(is_signalled=True, exit_code=143)) == Decision(Action.SAVED)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (RanksEnd(exit_code=1), "the ranks ended with code 1"),
        (RanksEnd(exit_code=0), "the ranks ended with code 0"),
        (RanksEnd(), "the ranks ended by themselves"),
        (RanksEnd(hang="the slowest is rank 1", exit_code=143), "the slowest is rank 1"),
    ],
)
def test_the_reason_of_a_crash_is_recorded(end: RanksEnd, reason: str) -> None:
    assert decide_end(STATE, ATTEMPT, end) == Decision(
        Action.AGAIN,
        messages=("no new checkpoint since global_step50 (1 of 3 attempts)",),
        crashes=(f"global_step50 attempt 4: {reason}",),
    )


# --- crashes


def test_an_attempt_that_made_a_checkpoint_is_no_crash() -> None:
    state = replace(STATE, latest="global_step60", crashes=CRASHES)
    assert decide_after_crash(state, ATTEMPT, "the ranks ended with code 1") == Decision(Action.AGAIN)


def test_the_first_checkpoint_is_progress_too() -> None:
    assert decide_after_crash(STATE, replace(ATTEMPT, latest_before=""), "…") == Decision(Action.AGAIN)


def test_a_run_without_a_checkpoint_counts_its_crashes() -> None:
    state, attempt = replace(STATE, latest="", crashes=("none attempt 3: …",)), replace(ATTEMPT, latest_before="")
    decision = decide_after_crash(state, attempt, "the ranks ended with code 1")
    assert decision.messages == ("no new checkpoint since none (2 of 3 attempts)",)
    assert decision.crashes == ("none attempt 4: the ranks ended with code 1",)


def test_the_script_gives_up_after_so_many_crashes_at_one_checkpoint() -> None:
    why = "3 attempts in a row ended without a new checkpoint, the last: the ranks ended with code 9"
    assert decide_after_crash(replace(STATE, crashes=CRASHES), ATTEMPT, "the ranks ended with code 9") == Decision(
        Action.FAIL,
        f"GIVING UP: {why}. See /run/job/logs/attempt-4; remove /run/job/failed to try again",
        crashes=("global_step50 attempt 4: the ranks ended with code 9", "- gave up"),
        failed=f"{why} (logs: /run/job/logs/attempt-4)",
    )


def test_after_giving_up_a_new_count_begins() -> None:
    state = replace(STATE, crashes=(*CRASHES, "global_step50 attempt 4: …", "- gave up"))
    assert decide_after_crash(state, replace(ATTEMPT, number=5), "…").action == Action.AGAIN


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ([], 0),
        (["step5 attempt 1: a"], 1),
        (["step5 attempt 1: a", "step5 attempt 2: a"], 2),
        (["step5 attempt 1: a", "step6 attempt 2: a"], 0),
        (["step4 attempt 1: a", "step5 attempt 2: a"], 1),
        (["step5 attempt 1: a", "- gave up", "step5 attempt 2: a"], 1),
        (["step50 attempt 1: a"], 0),
    ],
)
def test_crashes_are_counted_back_to_the_last_other_checkpoint(lines: list[str], count: int) -> None:
    assert crashes_in_a_row(lines, "step5") == count


# --- the nodes of a Slurm job


def slurm_nodes(*reports: NodeReport, state: RunState = STATE) -> Decision:
    return decide_slurm_nodes(state, ATTEMPT, reports, last_line="the last line", silence=SILENCE, stamp=STAMP)


def test_the_ranks_start_where_all_nodes_are_fit() -> None:
    assert slurm_nodes(N1, N2) == Decision(Action.START)


def test_unfit_and_silent_nodes_are_recorded_and_left_out() -> None:
    assert slurm_nodes(unfit(N1, "mkdir: failed\nn1: unfit: scratch"), N2, unfit(N3, "")) == Decision(
        Action.REQUEUE,
        "n1,n3",
        messages=("n1 is left out: mkdir: failed\nn1: unfit: scratch", "n3 is left out: no answer within 60 s"),
        bad_nodes=(f"{STAMP}, n1: n1: unfit: scratch", f"{STAMP}, n3: no answer within 60 s"),
    )


def test_where_no_node_is_fit_the_attempt_counts_as_a_crash() -> None:
    decision = slurm_nodes(unfit(N1, "n1: unfit: clock"), unfit(N2, "n2: unfit: disk"))
    assert (decision.action, decision.argument) == (Action.REQUEUE, "n1,n2")
    assert decision.crashes == ("global_step50 attempt 4: no node is fit: n2: unfit: disk",)
    assert decision.messages[-1] == "no new checkpoint since global_step50 (1 of 3 attempts)"
    assert len(decision.bad_nodes) == 2


def test_where_no_node_is_fit_again_and_again_the_script_gives_up_and_still_names_them() -> None:
    decision = slurm_nodes(unfit(N1, "n1: unfit: clock"), state=replace(STATE, crashes=CRASHES))
    assert decision.action == Action.FAIL
    assert "the last: no node is fit: n1: unfit: clock" in decision.failed
    assert decision.messages == ("n1 is left out: n1: unfit: clock",)
    assert decision.bad_nodes == (f"{STAMP}, n1: n1: unfit: clock",)


@pytest.mark.parametrize(("crashes", "action"), [((), Action.REQUEUE), (CRASHES, Action.FAIL)])
def test_a_check_that_did_not_start_is_a_crash_and_no_node_is_blamed(crashes: tuple[str, ...], action: Action) -> None:
    state = replace(STATE, crashes=crashes)
    decision = decide_slurm_nodes(state, ATTEMPT, None, last_line="srun: error: gres", silence=SILENCE, stamp=STAMP)
    assert decision.action == action
    assert decision.crashes[0].endswith(": the check of the nodes did not start: srun: error: gres")
    assert not decision.bad_nodes
    assert action == Action.FAIL or not decision.argument


# --- the hosts of a host file


def pdsh_hosts(*reports: NodeReport) -> Decision:
    return decide_pdsh_hosts(STATE, ATTEMPT, reports, last_line="n2: n2: unfit: disk", silence=SILENCE)


def test_the_ranks_start_on_all_hosts_that_are_fit() -> None:
    assert pdsh_hosts(N1, N2) == Decision(Action.START, "n1")
    assert pdsh_hosts(unfit(N1, "n1: n1: unfit: clock"), N2, unfit(N3, "")) == Decision(
        Action.START,
        "n2 n1@n3",
        messages=("n1 is left out: n1: n1: unfit: clock", "n3 is left out: no answer within 60 s"),
    )


def test_where_no_host_is_fit_the_script_gives_up_at_once() -> None:
    decision = pdsh_hosts(unfit(N1, ""), unfit(N2, "n2: n2: unfit: disk"))
    assert decision.action == Action.FAIL
    assert decision.argument.startswith("GIVING UP: no host is fit: n2: n2: unfit: disk. See /run/job/logs/attempt-4; ")
    assert decision.failed == "no host is fit: n2: n2: unfit: disk (logs: /run/job/logs/attempt-4)"
    assert decision.crashes == ("- gave up",)
    assert len(decision.messages) == 2


# --- requeueing


def test_a_running_job_is_requeued_and_keeps_the_nodes_that_it_excludes() -> None:
    assert decide_requeue(SlurmJob("RUNNING", "None", "n9")) == Decision(Action.REQUEUE)


def test_unfit_nodes_are_excluded_beside_those_that_already_are() -> None:
    assert decide_requeue(SlurmJob("RUNNING", "None", ""), "n1,n2").argument == "n1,n2"
    assert decide_requeue(SlurmJob("RUNNING", "None", "n[7-9]"), "n1").argument == "n1,n[7-9]"


def test_a_job_that_slurm_is_ending_stays_ended() -> None:
    decision = decide_requeue(SlurmJob("CANCELLED", "None", ""), "n1")
    assert decision == Decision(Action.FAIL, "Slurm is ending this job; not requeued by this script")
