"""The command report: a page about a tuning, evaluated merges or a run."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.cli.options import command, json_option

if TYPE_CHECKING:
    from wsm_ds.reporting.trackers import Tracker

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
                         help="tokens of an optimizer step, for axes in tokens (default: what manifests tell)",
                         )  # fmt: skip
    trackers = report.add_argument_group("trackers (what is not there yet is added, on an axis of its own)")
    trackers.add_argument("--tensorboard", type=Path, metavar="DIR", help="write event files into this log directory")
    trackers.add_argument("--wandb", metavar="PROJECT", help="log to a project of Weights & Biases")
    trackers.add_argument("--trackio", metavar="PROJECT", help="log to a project of trackio")


def _report(options: argparse.Namespace) -> int:
    from wsm_ds.reporting.report.writing import write_report
    from wsm_ds.reporting.trackers import send_new, tracked_points

    trackers = _trackers(options)  # a package that is missing is said before anything is written
    files = write_report(
        options.path,
        out=options.out,
        evaluations=options.evaluations,
        metric=options.metric,
        tokens_per_step=options.tokens_per_step,
    )
    points = tracked_points(files.result)
    sent = {
        name: send_new(points, tracker, file or files.html.parent / f".sent-to-{name}")
        for name, tracker, file in trackers
    }
    if options.json:
        names = {"html": str(files.html), "markdown": str(files.markdown), "json": str(files.json)}
        print(json.dumps(names | {"sent": sent}, indent=2))
    else:
        print(f"{files.html}\n{files.markdown}\n{files.json}")
        for name, count in sent.items():
            print(f"{name}: {count} new values of {len(points)}")
    return 0


def _trackers(options: argparse.Namespace) -> "list[tuple[str, Tracker, Path | None]]":
    """The chosen trackers, and the file that remembers what was sent if it is not in the folder of the report."""
    from wsm_ds.reporting.trackers import TensorBoard, Trackio, WeightsAndBiases

    chosen: list[tuple[str, Tracker, Path | None]] = []
    folder = options.path if options.path.is_dir() else options.path.parent
    if options.tensorboard is not None:
        # In the log directory: whoever removes that wants everything written again.
        chosen.append(("tensorboard", TensorBoard(options.tensorboard), options.tensorboard / ".sent-by-wsm-ds"))
    if options.wandb is not None:
        chosen.append(("wandb", WeightsAndBiases(options.wandb, folder.resolve().name), None))
    if options.trackio is not None:
        chosen.append(("trackio", Trackio(options.trackio, folder.resolve().name), None))
    return chosen
