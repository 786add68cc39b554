"""The command doctor: what bites a run, found before it does."""

import argparse
import json
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import allow_global, command, json_option

DOCTOR = """\
Look for what bites a run that is to be merged: in a ds_config before the run starts, or in a run's checkpoints and on
its disk. Each finding says what is there, what it does, how to mend it, and where this comes from. Nothing is
changed."""
DOCTOR_EXAMPLES = """\
examples:
  wsm-ds doctor configs/zero2_bf16.json
  wsm-ds doctor configs/zero2_bf16.json --interval 1000 --last 8 --steps 20000
  wsm-ds doctor RUN --last 2 --json

exit codes: 0 no error (there may be warnings and notes); 1 at least one error was found; 2 a wrong request; 3 the run
or the ds_config cannot be read"""


def add_command(commands: Any) -> None:
    """Adds this module's command to the parser's."""
    doctor = command(commands, "doctor", _doctor, "look for what bites a run", DOCTOR, DOCTOR_EXAMPLES)
    doctor.add_argument(
        "path", type=Path, metavar="RUN|ds_config.json", help="a run's folder, or a ds_config JSON file"
    )
    doctor.add_argument("--deepspeed", metavar="VERSION", help="the version of DeepSpeed that trains (default: the one "
                        "that is installed here, else the one that wrote the newest checkpoint)")  # fmt: skip
    allow_global(doctor)
    json_option(doctor)
    plan = doctor.add_argument_group("plan (what is checked against the run; nothing is guessed)")
    plan.add_argument("--interval", type=int, metavar="STEPS", help="steps between two checkpoints")
    plan.add_argument("--every", type=int, metavar="STEPS", help="steps between two merges")
    plan.add_argument("--last", type=int, metavar="N", help="checkpoints of the longest window")
    plan.add_argument("--steps", type=int, metavar="STEPS", help="the step at which training ends")


def _doctor(options: argparse.Namespace) -> int:
    from wsm_ds.doctor import examine
    from wsm_ds.doctor.findings import report_text
    from wsm_ds.doctor.run_checks import Intent

    intent = Intent(options.interval, options.every, options.last, options.steps)
    allowed = frozenset(options.allow_globals)
    report = examine(options.path, intent=intent, deepspeed=options.deepspeed, allow_globals=allowed)
    print(json.dumps(report.to_json(), indent=2) if options.json else report_text(report))
    return report.exit_code
