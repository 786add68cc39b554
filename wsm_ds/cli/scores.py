"""The scores of a run's checkpoints, from a file of evaluations, for a merge of the best ones."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.errors import RecipeError, few
from wsm_ds.reporting.tables import counted

if TYPE_CHECKING:
    from wsm_ds.evaluation.evaluation import Evaluation


@dataclass(frozen=True)
class Scores:
    """What was measured of single checkpoints.

    Attributes:
        values: by tag.
        maximize: whether more is better.
    """

    values: Mapping[str, float]
    maximize: bool


def score_values(options: argparse.Namespace, run: Path | None) -> dict[str, Any]:
    """The recipe values that --scores and --metric give; none without --scores.

    Args:
        options: the parsed arguments.
        run: the run's folder.

    Raises:
        RecipeError: see `read_scores`; or a flag is given without those that it needs.
    """
    if options.scores is None:
        if options.metric is not None:
            raise RecipeError("--metric names a metric in the file of --scores; give --scores FILE.jsonl, too")
        return {}
    if run is None:
        raise RecipeError("--scores needs the run whose checkpoints were evaluated; give RUN")
    scores = read_scores(options.scores, run, options.metric)
    return {"scores": dict(scores.values), "maximize": scores.maximize or None}


def read_scores(path: Path, run: Path, metric: str | None = None) -> Scores:
    """Reads the scores of a run's single checkpoints. A later line of a checkpoint replaces an earlier one.

    Args:
        path: JSON lines, one `Evaluation` each; a torn last line is passed over.
        run: the run's folder.
        metric: its name, or NAME@IDENTITY with the beginning of an evaluator's identity; None: there is only one.

    Raises:
        RecipeError: the file cannot be read or is no file of evaluations; it has no evaluation of a checkpoint of this
            run; the metric is not there; or more than one evaluator or metric fits.
    """
    name, _, identity = (metric or "").partition("@")
    found: dict[tuple[str, str], dict[str, float]] = {}
    maximize: dict[str, bool] = {}
    for evaluation in _evaluations(path):
        subject = evaluation.subject
        is_own = subject.kind == "checkpoint" and Path(subject.path).resolve().is_relative_to(run.resolve())
        if not is_own or evaluation.failure is not None or not subject.sources:
            continue
        for key, value in evaluation.metrics.items():
            of = str(evaluation.evaluator.get("identity", ""))
            found.setdefault((key, of), {})[subject.sources[0].tag] = value.value
            maximize[key] = value.maximize
    if not found:
        raise RecipeError(f"--scores {path}: it holds no evaluation of a single checkpoint of {run}")
    chosen = [(key, of) for key, of in found if (not name or key == name) and of.startswith(identity)]
    if len(chosen) != 1:
        choices = few(f"{key}@{of[:12]} ({counted(len(tags), 'checkpoint')})" for (key, of), tags in found.items())
        fault = f"no metric {metric!r}" if not chosen else "several values of a checkpoint"
        raise RecipeError(f"--scores {path} has {fault}; choose by --metric one of {choices}")
    return Scores(found[chosen[0]], maximize[chosen[0][0]])


def _evaluations(path: Path) -> "Iterator[Evaluation]":
    """The evaluations of a file, one at a time: those with losses of blocks are large."""
    from pydantic import ValidationError

    from wsm_ds.evaluation.evaluation import Evaluation

    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") or not line.strip():
                    continue  # the torn last line, or an empty one
                try:
                    yield Evaluation.model_validate_json(line)
                except ValidationError as error:
                    reason = str(error.errors(include_url=False)[0]["msg"])
                    raise RecipeError(f"--scores {path}: line {number} is not an evaluation: {reason}") from error
    except OSError as error:
        raise RecipeError(f"--scores {path} cannot be read: {error}") from error
