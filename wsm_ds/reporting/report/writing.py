"""Writes a report: `report.html`, `report.md` and `report.json`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsm_ds.errors import OutputExists, VerificationFailed
from wsm_ds.filesystem.durable import replace_text
from wsm_ds.filesystem.locks import hold_lock
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.reporting.report.inputs import read_result, read_tuning
from wsm_ds.reporting.report.markdown import markdown
from wsm_ds.reporting.report.page import MADE_BY, html
from wsm_ds.reporting.report.sections import document
from wsm_ds.tuning.results import TuningResult

HTML, MARKDOWN, JSON, LOCK = "report.html", "report.md", "report.json", ".report.lock"
BEST = "best.yaml"
"""The recipe of the recommended merge, in the folder of a tuning."""


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report.

    Attributes:
        html: the page.
        markdown: the same as Markdown.
        json: the numbers, in the form of a tuning's `tuning.json`.
        result: what `json` holds.
    """

    html: Path
    markdown: Path
    json: Path
    result: TuningResult


def write_report(
    path: Path | str,
    *,
    out: Path | str | None = None,
    evaluations: Sequence[Path | str] = (),
    metric: str | None = None,
    tokens_per_step: float | None = None,
) -> ReportFiles:
    """Reports a tuning, evaluated merges, or the evaluations of a run.

    An older report in the same folder is replaced. Nothing else is changed.

    Args:
        path: a folder with `tuning.json` or `evaluations.jsonl`, or one of these files.
        out: the folder of the report; None: that of `path`.
        evaluations: files of evaluations, in place of what lies in `path`.
        metric: of evaluations: the one that decides; None: the one that was measured of most models.
        tokens_per_step: of evaluations: tokens of an optimizer step, for the axes; None: what manifests tell.

    Raises:
        RecipeError: there is nothing to report, or no such metric.
        VerificationFailed: the file of a tuning is not what a tuning writes.
        EvaluationError: a file holds no evaluations.
        OutputExists: a file that is no report has the name of one, or another process writes a report there.
        OSError: the folder cannot be written.
    """
    source = Path(path)
    result = read_result(
        source, evaluations=[Path(file) for file in evaluations], metric=metric, tokens_per_step=tokens_per_step
    )
    folder = source if source.is_dir() else source.parent
    best = folder / BEST
    return write_result(result, Path(out) if out is not None else folder, best if best.is_file() else None)


def write_result(result: TuningResult, folder: Path, recipe: Path | None = None) -> ReportFiles:
    """Writes the report of a tuning.

    Args:
        result: what the tuning has found.
        folder: gets the files; it is made if it is not there.
        recipe: the file of the recommended merge; None: there is none.

    Raises:
        OutputExists: as in `write_report`.
        OSError: the folder cannot be written.
    """
    made = document(result, recipe)
    texts = {HTML: html(made), MARKDOWN: markdown(made), JSON: result.model_dump_json(indent=1) + "\n"}
    for name in texts:
        _require_report(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / LOCK, f"another process is writing a report in {folder}"):
        for name, text in texts.items():
            replace_text(folder / name, text)
    return ReportFiles(folder / HTML, folder / MARKDOWN, folder / JSON, result)


def _require_report(file: Path) -> None:
    """Raises OutputExists if a file is there that no report is."""
    if not file.exists() and not file.is_symlink():
        return
    try:
        is_ours = bool(read_tuning(file)) if file.suffix == ".json" else MADE_BY in read_small(file)[:1000]
    except (OSError, ValueError, VerificationFailed):
        is_ours = False
    if not is_ours:
        raise OutputExists(f"{file} is there, and is no report of wsm-ds. Move it away, or choose another --out.")
