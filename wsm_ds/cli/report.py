"""The command report: a page about a tuning, evaluated merges or a run."""

import argparse
import json
from pathlib import Path
from typing import Any

from wsm_ds.cli.options import command, json_option

REPORT = """\
Make a page of what was measured: report.html, which needs no server and no network, report.md with the same content,
and report.json with the numbers. It shows a tuning (tuning.json), or evaluations (evaluations.jsonl) of merges or along
a run. Nothing is measured, and no checkpoint is read."""
REPORT_EXAMPLES = """\
examples:
  wsm-ds report TUNE
  wsm-ds report MERGES --metric loss --out REPORT
  wsm-ds report RUN --evaluations RUN/evaluations.jsonl --tokens-per-step 4194304 --out REPORT

exit codes: 0 done; 2 a wrong request, or nothing to report; 3 a damaged file, or one that cannot be written"""


def add_command(commands: Any) -> None:
    """Adds this module's command to the parser's."""
    report = command(commands, "report", _report, "make a page of what was measured", REPORT, REPORT_EXAMPLES)
    report.add_argument("path", type=Path, metavar="TUNE|MERGES|RUN",
                        help="a folder with tuning.json or evaluations.jsonl, or one of these files")  # fmt: skip
    report.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default: that of the input)")
    json_option(report)
    records = report.add_argument_group("evaluations (not for a tuning, which has its own)")
    records.add_argument("--evaluations", action="append", default=[], type=Path, metavar="FILE",
                         help="a file of evaluations, in place of what lies in the folder; may be given several times",
                         )  # fmt: skip
    records.add_argument("--metric", metavar="NAME",
                         help="the metric that decides (default: the one measured of most models)")  # fmt: skip
    records.add_argument("--tokens-per-step", type=float, metavar="N",
                         help="tokens of an optimizer step, for axes in tokens (default: what the records tell)",
                         )  # fmt: skip


def _report(options: argparse.Namespace) -> int:
    from wsm_ds.reporting.report.writing import write_report

    files = write_report(
        options.path,
        out=options.out,
        evaluations=options.evaluations,
        metric=options.metric,
        tokens_per_step=options.tokens_per_step,
    )
    if options.json:
        print(json.dumps({"html": str(files.html), "markdown": str(files.markdown), "json": str(files.json)}, indent=2))
    else:
        print(f"{files.html}\n{files.markdown}\n{files.json}")
    return 0
