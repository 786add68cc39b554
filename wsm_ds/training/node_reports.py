"""What the nodes answered when a job script asked each of them whether it is fit.

The answers are lines of `wsm_ds.training.node_check`, "HOST: fit: FACTS" or "HOST: unfit: REASON", each with the label
that the launcher puts before it: `srun --label` the number of the task, pdsh the name of the host.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FIT = ": fit: "


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Whether one node is fit.

    Attributes:
        host: its name.
        is_fit: False also for a node that gave no answer in time.
        answer: what it printed, which may be several lines; "" if nothing.
    """

    host: str
    is_fit: bool
    answer: str


def reports_from_srun(hosts: Sequence[str], output: str) -> list[NodeReport] | None:
    """Reads the output of `srun --label` with one task per node.

    Args:
        hosts: the job's nodes; task N ran on hosts[N].
        output: stdout and stderr of srun.

    Returns:
        One report per host. None if no task printed anything: then srun itself failed, and no node is to blame.

    >>> reports_from_srun(["n1", "n2"], "0: n1: fit: 1.0 TiB free\\nsrun: error: n2: task 1: Exited with exit code 3")
    [NodeReport(host='n1', is_fit=True, answer='n1: fit: 1.0 TiB free'), NodeReport(host='n2', is_fit=False, answer='')]
    """
    answers: dict[int, list[str]] = {}
    for task, line in re.findall(r"^ *(\d+): (.*)$", output, flags=re.MULTILINE):
        answers.setdefault(int(task), []).append(line)
    if not answers:
        return None
    texts = ["\n".join(answers.get(task, [])) for task in range(len(hosts))]
    return [NodeReport(host, FIT in text, text) for host, text in zip(hosts, texts, strict=True)]


def reports_from_pdsh(hosts: Sequence[str], output: str) -> list[NodeReport]:
    """Reads the output of pdsh; one report per host.

    The answer of an unfit host is the first line that names it: its own, or one of pdsh's, such as
    "pdsh@head: n2: ssh exited with exit code 255".

    >>> reports_from_pdsh(["n1"], "n1: n1: unfit: the clock differs")
    [NodeReport(host='n1', is_fit=False, answer='n1: n1: unfit: the clock differs')]
    """
    lines = output.splitlines()
    reports = []
    for host in hosts:
        fit = [line for line in lines if re.match(f"{re.escape(host)}: .*{FIT}", line)]
        named = [line for line in lines if f"{host}: " in line]
        reports.append(NodeReport(host, bool(fit), next(iter(fit or named), "")))
    return reports
