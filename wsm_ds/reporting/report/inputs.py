"""Finds what a folder holds that can be reported: a tuning, or evaluations."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wsm_ds.errors import RecipeError, VerificationFailed, few
from wsm_ds.evaluation.evaluation import Subject
from wsm_ds.evaluation.records import NAME, Records
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.publishing.manifest import read_manifest
from wsm_ds.reporting.report.from_evaluations import from_evaluations
from wsm_ds.tuning.results import CandidateResult, TuningResult

log = logging.getLogger(__name__)

TUNING = "tuning.json"
"""The file of a tuning, in its folder."""


def read_result(
    path: Path,
    *,
    evaluations: Sequence[Path] = (),
    metric: str | None = None,
    tokens_per_step: float | None = None,
) -> TuningResult:
    """Reads a tuning, or evaluations in the form of one.

    Args:
        path: a folder with `tuning.json` or `evaluations.jsonl`, or one of these files.
        evaluations: files of evaluations; they are reported in place of what lies in the folder.
        metric: of evaluations: the one that decides.
        tokens_per_step: of evaluations: tokens of an optimizer step.

    Raises:
        RecipeError: there is nothing to report; the message names what was looked for.
        VerificationFailed: the file of a tuning is not what a tuning writes; the message names the first faults.
        EvaluationError: a file holds no evaluations.
    """
    if not path.exists():
        raise RecipeError(f"{path} is not there. Name the folder of a tuning, of merges or of a run.")
    tuning = path if path.suffix == ".json" else path / TUNING
    if not evaluations and tuning.is_file():
        _refuse_options(tuning, metric=metric, tokens_per_step=tokens_per_step)
        return without_infinities(read_tuning(tuning))
    folder = path if path.is_dir() else path.parent
    files = list(evaluations) or [path if path.is_file() else path / NAME]
    if not evaluations and not files[0].is_file():
        raise RecipeError(
            f"{path} holds neither {TUNING} nor {NAME}, so there is nothing to report. Measure first (wsm-ds "
            "tune, or wsm-ds evaluate), or name the file of the evaluations by --evaluations."
        )
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise RecipeError(f"`evaluations`: {few(missing)}: no such file.")
    records = [record for file in files for record in Records(file).all()]
    manifests = _manifests(folder)
    result = from_evaluations(
        records,
        run=str(folder),
        metric=metric,
        tokens_per_step=tokens_per_step,
        manifest_of=lambda subject: _manifest_of(subject, manifests),
    )
    measured = {Path(record.subject.path).resolve() for record in records}
    waiting = tuple(str(out.relative_to(folder)) for out in manifests if out.resolve() not in measured)
    return without_infinities(result.model_copy(update={"waiting": waiting}))


def _refuse_options(tuning: Path, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise RecipeError(
            f"`{given[0]}` is for a report of evaluations, but {tuning} is a tuning, which has its own. Leave it out, "
            "or name files of evaluations (--evaluations)."
        )


def read_tuning(file: Path) -> TuningResult:
    """Reads the file of a tuning.

    Raises:
        VerificationFailed: it is not what a tuning writes; the message names the first faults.
    """
    try:
        return TuningResult.model_validate_json(read_small(file))
    except ValidationError as error:
        raise VerificationFailed(f"{file} is not what a tuning writes: {_faults(error)}.") from error
    except (OSError, ValueError) as error:
        raise VerificationFailed(f"{file} cannot be read: {error}") from error


def _faults(error: ValidationError) -> str:
    return few([f"{'.'.join(map(str, e['loc'])) or 'text'}: {e['msg']}" for e in error.errors(include_url=False)], 3)


def _manifests(folder: Path) -> dict[Path, dict[str, Any]]:
    """The merges in a folder, by their folders. A watch puts them one folder deeper."""
    outs = sorted(file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{MANIFEST}"))
    return {out: manifest for out in outs if (manifest := _manifest(out))}


def _manifest_of(subject: Subject, manifests: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    out = Path(subject.path)
    return manifests.get(out) or (_manifest(out) if (out / MANIFEST).is_file() else {})


def _manifest(out: Path) -> dict[str, Any]:
    try:
        return read_manifest(out)
    except VerificationFailed as error:
        log.warning("%s", error)
        return {}


def without_infinities(result: TuningResult) -> TuningResult:
    """Returns a tuning without values that are no numbers: JSON cannot hold them. A failure says what they were.

    Args:
        result: what was measured.
    """
    return result.model_copy(update={"candidates": tuple(map(_finite, result.candidates))})


def _finite(candidate: CandidateResult) -> CandidateResult:
    wrong = {name: metric for name, metric in candidate.metrics.items() if not math.isfinite(metric.value)}
    metrics = {
        name: metric
        if metric.error is None or math.isfinite(metric.error)
        else metric.model_copy(update={"error": None})
        for name, metric in candidate.metrics.items()
        if name not in wrong
    }
    said = [f"{name} is {metric.value}" for name, metric in wrong.items()]
    failure = "; ".join([candidate.failure, *said] if candidate.failure else said) or None
    difference = candidate.difference
    if difference is not None and not math.isfinite(difference.value):
        difference = None
    return candidate.model_copy(update={"metrics": metrics, "failure": failure, "difference": difference})
