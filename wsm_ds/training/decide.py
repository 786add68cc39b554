"""Decides for the job scripts of launch/ what they do next; they only start processes and pass signals on.

    python -m wsm_ds.training.decide end RUN --until-step 1000 --attempt 3 --max-crashes 3 --exit-code 1

It gathers the facts, writes what must last to RUN/job (crashes, failed, bad_nodes), and prints one instruction a line:

    log MESSAGE           for the job's log
    fail MESSAGE          end with exit code 1
    ACTION [ARGUMENT]     what to do next: `wsm_ds.training.decisions.Action`

The rules are in `wsm_ds.training.decisions`. Nothing here imports torch: a call takes a fraction of a second.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from wsm_ds.filesystem.small_files import read_small
from wsm_ds.training.decisions import (
    Action,
    Attempt,
    Decision,
    RanksEnd,
    RunState,
    decide_end,
    decide_pdsh_hosts,
    decide_requeue,
    decide_slurm_nodes,
    decide_start,
)
from wsm_ds.training.job import JobFolder, begin_attempt, is_done, read_attempt
from wsm_ds.training.node_reports import reports_from_pdsh, reports_from_srun
from wsm_ds.training.slurm_job import parse_slurm_job


def read_run_state(job: JobFolder, until_step: int) -> RunState:
    """Reads what the files of a run say now.

    Args:
        job: the run's.
        until_step: the step that the job was asked for.

    Raises:
        OSError: a file cannot be read.
    """
    return RunState(
        job=job,
        newest_attempt=read_attempt(job),
        is_done=is_done(job, until_step),
        is_stopped=job.stop.exists(),
        failed=_first_line(job.failed) if job.failed.exists() else None,
        latest=_first_line(job.run / "latest"),
        crashes=tuple(_text(job.crashes).splitlines()),
    )


def record(job: JobFolder, decision: Decision) -> None:
    """Writes the records of a decision to RUN/job.

    Raises:
        OSError: the disk is full, or fails.
    """
    for path, lines in ((job.crashes, decision.crashes), (job.bad_nodes, decision.bad_nodes)):
        if lines:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
    if decision.failed:
        job.failed.write_text(f"{decision.failed}\n", encoding="utf-8")


def instructions(decision: Decision) -> list[str]:
    """Returns the instructions for the script, one per line.

    >>> instructions(Decision(Action.REQUEUE, "n2", messages=("n2 is left out: no answer",)))
    ['log n2 is left out: no answer', 'requeue n2']
    """
    logged = [f"log {line}" for message in decision.messages for line in message.splitlines()]
    argument = " ".join(decision.argument.splitlines())
    return [*logged, f"{decision.action.value} {argument}".strip()]


def processes_by_host(heartbeats: Iterable[dict[str, Any]], attempt: int) -> dict[str, list[int]]:
    """Returns the process ids of an attempt's ranks on each host.

    >>> processes_by_host([{"attempt": 2, "host": "n1", "pid": 7}, {"attempt": 1, "host": "n1", "pid": 6}], 2)
    {'n1': [7]}
    """
    processes: dict[str, list[int]] = {}
    for beat in heartbeats:
        if beat["attempt"] == attempt:
            processes.setdefault(beat["host"], []).append(beat["pid"])
    return processes


def _start(options: argparse.Namespace) -> list[str]:
    job = JobFolder(options.run)
    return _record_and_print(job, decide_start(read_run_state(job, options.until_step), options.until_step))


def _begin(options: argparse.Namespace) -> list[str]:
    """The argument is the attempt's number and the tag from which it continues."""
    job = JobFolder(options.run)
    attempt = begin_attempt(job)
    job.logs(attempt).mkdir(parents=True, exist_ok=True)
    return instructions(Decision(Action.START, f"{attempt} {_first_line(job.run / 'latest')}".strip()))


def _nodes(options: argparse.Namespace) -> list[str]:
    job = JobFolder(options.run)
    state, attempt = read_run_state(job, options.until_step), _attempt(options)
    output = _text(job.logs(options.attempt) / "check")
    hosts, last_line = options.hosts.split(), next(reversed(output.splitlines()), "")
    silence = f"no answer within {options.timeout_s} s"
    if options.launcher == "pdsh":
        decision = decide_pdsh_hosts(state, attempt, reports_from_pdsh(hosts, output), last_line, silence)
    else:
        stamp = f"{time.strftime('%F %T')} job {options.job_id}"
        decision = decide_slurm_nodes(state, attempt, reports_from_srun(hosts, output), last_line, silence, stamp)
    return _record_and_print(job, decision)


def _end(options: argparse.Namespace) -> list[str]:
    job = JobFolder(options.run)
    end = RanksEnd(is_signalled=bool(options.signal), hang=options.hang, exit_code=options.exit_code)
    return _record_and_print(job, decide_end(read_run_state(job, options.until_step), _attempt(options), end))


def _processes(options: argparse.Namespace) -> list[str]:
    job = JobFolder(options.run)
    heartbeats = []
    for path in sorted(job.heartbeats.glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError):
            heartbeats.append(json.loads(read_small(path)))
    processes = processes_by_host(heartbeats, options.attempt)
    return [f"{host} {' '.join(map(str, pids))}" for host, pids in processes.items()]


def _requeue(options: argparse.Namespace) -> list[str]:
    line = sys.stdin.buffer.read().decode(errors="replace")  # a job's name or comment may be any bytes
    return instructions(decide_requeue(parse_slurm_job(line), options.unfit_nodes))


def _record_and_print(job: JobFolder, decision: Decision) -> list[str]:
    record(job, decision)
    return instructions(decision)


def _attempt(options: argparse.Namespace) -> Attempt:
    return Attempt(options.attempt, options.until_step, options.latest_before, options.max_crashes)


def _text(path: Path) -> str:
    """The text of a file; "" if it does not exist. Bytes that are not UTF-8, which ranks may print, are replaced."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _first_line(path: Path) -> str:
    return next(iter(_text(path).splitlines()), "").strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wsm_ds.training.decide", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], list[str]], help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        command.set_defaults(run_command=run)
        return command

    start = add("start", _start, "may a job begin an attempt?")
    begin = add("begin", _begin, "begin an attempt; prints its number and the checkpoint from which it continues")
    nodes = add("nodes", _nodes, "on which nodes do the ranks start? Reads the output of the node check")
    end = add("end", _end, "the ranks have ended: what follows?")
    processes = add("processes", _processes, "print the hosts and process ids of an attempt's ranks")
    requeue = add("requeue", _requeue, "may a Slurm job be requeued? Reads `scontrol show job --oneliner` from stdin")

    for command in (start, begin, nodes, end, processes):
        command.add_argument("run", type=Path, metavar="RUN")
    for command in (start, nodes, end):
        command.add_argument("--until-step", type=int, required=True, metavar="STEP")
    for command in (nodes, end, processes):
        command.add_argument("--attempt", type=int, required=True, metavar="K")
    for command in (nodes, end):
        command.add_argument("--latest-before", default="", metavar="TAG", help="RUN/latest when the attempt began")
        command.add_argument("--max-crashes", type=int, required=True, metavar="N")
    nodes.add_argument("--launcher", choices=["srun", "pdsh"], required=True)
    nodes.add_argument("--hosts", required=True, help="all that were asked, separated by spaces")
    nodes.add_argument("--timeout-s", required=True, metavar="S", help="how long they had, for messages")
    nodes.add_argument("--job-id", default="none", metavar="ID", help="Slurm's, for RUN/job/bad_nodes")
    end.add_argument(
        "--signal", default="", metavar="TEXT", help="not empty: a signal asked the ranks to save and leave"
    )
    end.add_argument("--hang", default="", metavar="TEXT", help="why the script ended the ranks")
    end.add_argument("--exit-code", type=int, metavar="CODE", help="of the launcher, for messages")
    requeue.add_argument("--unfit-nodes", default="", metavar="NODES", help="nodes that the job must not get again")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m wsm_ds.training.decide`; returns the exit code, which is 0 also where the script has to fail."""
    options = _parser().parse_args(arguments)
    try:
        lines = options.run_command(options)
    except OSError as error:
        lines = instructions(Decision(Action.FAIL, f"the run's folder cannot be read or written: {error}"))
    # Bytes, because a message with a path or "…" in it must reach the script whatever the node's locale is.
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
