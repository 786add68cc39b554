"""Which jobs their own script may requeue, from what Slurm says of them."""

import pytest

from wsm_ds.training.slurm_job import SlurmJob, parse_slurm_job

LINE = (
    "JobId=7 JobName=pretrain UserId=root(0) Priority=1 JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
    "Partition=train ReqNodeList=(null) ExcNodeList={excluded} NodeList=n[1-2] Command=/the reason/JobState=RUNNING"
)


@pytest.mark.parametrize(
    ("state", "reason", "may_be_requeued"),
    [
        ("RUNNING", "None", True),
        ("COMPLETING", "TimeLimit", True),
        ("TIMEOUT", "TimeLimit", True),
        ("CANCELLED", "None", False),
        ("PENDING", "BeginTime", False),
        ("COMPLETING", "None", False),
        ("PREEMPTED", "None", False),
    ],
)
def test_a_job_may_be_requeued_while_it_runs_or_is_at_its_time_limit(
    state: str, reason: str, may_be_requeued: bool
) -> None:
    job = parse_slurm_job(LINE.format(state=state, reason=reason, excluded="(null)"))
    assert job == SlurmJob(state, reason, "")
    assert job.may_be_requeued is may_be_requeued


def test_excluded_nodes_are_in_slurms_notation() -> None:
    job = parse_slurm_job(LINE.format(state="RUNNING", reason="None", excluded="n1,n[4-5]"))
    assert job.excluded_nodes == "n1,n[4-5]"


def test_no_answer_of_slurm_allows_nothing() -> None:
    assert parse_slurm_job("") == SlurmJob("", "", "")
    assert not parse_slurm_job("").may_be_requeued
