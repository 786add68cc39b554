"""What Slurm says of a job: the line that `scontrol show job --oneliner ID` prints."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The fields of a job that decide whether a script may requeue it.

    Attributes:
        state: such as RUNNING, COMPLETING, CANCELLED; "" if Slurm did not answer.
        reason: why it is in this state, such as None or TimeLimit.
        excluded_nodes: Slurm's notation, such as "n1,n[3-4]"; "" for none.
    """

    state: str
    reason: str
    excluded_nodes: str

    @property
    def may_be_requeued(self) -> bool:
        """Whether the job's own script may requeue it.

        A cancelled job must stay cancelled, but `scontrol requeue` would start it again. A job that was preempted or
        lost a node has been requeued by Slurm already. Neither is RUNNING any more. At its time limit Slurm sets the
        state first and kills later, so a job that saves just now has the reason TimeLimit.
        """
        return self.state == "RUNNING" or self.reason == "TimeLimit"


def parse_slurm_job(line: str) -> SlurmJob:
    """Reads the line of `scontrol show job --oneliner ID`; all fields are "" if it is empty.

    >>> parse_slurm_job("JobId=7 JobName=a JobState=RUNNING Reason=None ExcNodeList=(null) NodeList=n1")
    SlurmJob(state='RUNNING', reason='None', excluded_nodes='')
    """

    def field(name: str) -> str:
        match = re.search(rf"(?:^| ){name}=(\S*)", line)
        return match[1] if match else ""

    excluded_nodes = field("ExcNodeList")
    return SlurmJob(field("JobState"), field("Reason"), "" if excluded_nodes == "(null)" else excluded_nodes)
