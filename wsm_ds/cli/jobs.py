"""Commands of job scripts: watchdog, check-node. They share flags and code with the modules of `wsm_ds.training`."""

from typing import Any

from wsm_ds.cli.options import command
from wsm_ds.training import node_check, watchdog

WATCHDOG = """\
Watch the ranks of a training run, and end with code 3 and the name of the slowest rank when one makes no progress for
too long. It runs beside the ranks, on one node; the job script then ends the ranks and starts them again. It ends with
code 0 on SIGTERM, or when the training is done."""
WATCHDOG_EXAMPLES = """\
example, in a job script, before the ranks are started:
  wsm-ds watchdog RUN --timeout-s 600 --start-timeout-s 1800 &"""
CHECK_NODE = """\
Check that this node can take part in a training run, before ranks are started on it: RUN can be written, storage is
free, addresses can be reached, accelerators work. Prints one line."""
CHECK_NODE_EXAMPLES = """\
examples:
  wsm-ds check-node RUN
  wsm-ds check-node RUN --accelerators 8 --free-bytes 1MB

exit codes: 0 the node is fit; 2 a wrong request; 3 the node is not fit, and the line says why"""


def add_commands(commands: Any) -> None:
    """Adds this module's commands to the parser's."""
    watching = command(commands, "watchdog", watchdog.run, "end a job whose ranks make no progress", WATCHDOG,
                       WATCHDOG_EXAMPLES)  # fmt: skip
    watchdog.add_arguments(watching)
    checking = command(commands, "check-node", node_check.run, "check that a node can take part in a run", CHECK_NODE,
                       CHECK_NODE_EXAMPLES)  # fmt: skip
    node_check.add_arguments(checking)
