"""Measures folders by evaluators: what the records have is not measured again, and a failure costs one model alone."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import Interrupted, PeerFailed
from wsm_ds.evaluation.evaluation import Evaluation, Subject
from wsm_ds.evaluation.evaluator import Evaluator, MeasurementFailed
from wsm_ds.evaluation.folders import model_of_folder
from wsm_ds.evaluation.in_memory import InMemoryEvaluator
from wsm_ds.evaluation.records import Records
from wsm_ds.evaluation.subjects import subject_of_folder


@dataclass(frozen=True)
class Measured:
    """An evaluation, and whether it was made now.

    Attributes:
        evaluation: the record.
        is_new: False: it was found in the records.
    """

    evaluation: Evaluation
    is_new: bool


def evaluate_folders(
    folders: Sequence[Path],
    evaluators: Sequence[Evaluator],
    *,
    records: Records | None = None,
    ranks: Ranks | None = None,
    again: bool = False,
) -> Iterator[Measured]:
    """Measures every folder by every evaluator.

    A folder's model is loaded once for all evaluators that need it in the same form. That a model cannot be loaded or
    measured is the failure of its evaluations; the others go on.

    Ranks: all, with the same arguments. Rank 0 alone reads and writes the records.

    Args:
        folders: of models, see `model_of_folder`.
        evaluators: all are checked before anything is measured.
        records: where evaluations are found and added; None: all are made, and none is kept.
        ranks: that share the work; None: this process alone.
        again: whether to measure what the records have, too.

    Yields:
        The evaluations of the first folder, then those of the second, ….

    Raises:
        EvaluationError, RecipeError: a folder holds no model, or an evaluator cannot be used.
        PeerFailed: another rank failed.
    """
    members = ranks or Ranks()
    subjects = [subject_of_folder(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    for evaluator in evaluators:
        evaluator.require_ready()
    for folder, subject in zip(folders, subjects, strict=True):
        loaded = _Loaded(folder, members)
        for evaluator in evaluators:
            found = None if again else _found(records, subject, evaluator, members)
            evaluation = found or loaded.measured(evaluator, subject)
            if found is None and records is not None:
                members.decide(partial(records.add, evaluation))
            yield Measured(evaluation, found is None)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell folders apart.

    >>> names_of([Path("merges/step8/last4"), Path("merges/step16/last4")])
    ['step8/last4', 'step16/last4']

    Args:
        folders: paths.
    """
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def _found(records: Records | None, subject: Subject, evaluator: Evaluator, ranks: Ranks) -> Evaluation | None:
    if records is None:
        return None

    def find() -> Any:
        found = records.find(subject.identity, evaluator.identity())
        return None if found is None else found.model_dump(mode="json")

    found = ranks.decide(find)
    # Its name is that of today's request: the same model may have had another one.
    return None if found is None else Evaluation.model_validate(found).model_copy(update={"subject": subject})


class _Loaded:
    """The model of one folder, kept in memory in the form that was asked for last."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.form: tuple[str, str | None] | None = None
        self.model: Any = None
        self.failure: str | None = None

    def measured(self, evaluator: Evaluator, subject: Subject) -> Evaluation:
        if not isinstance(evaluator, InMemoryEvaluator):
            return evaluator.measure_folder(self.folder, subject, self.ranks)
        began_s = time.monotonic()
        self._load(evaluator)
        if self.failure is not None:
            return evaluator.evaluation(subject, began_s, MeasurementFailed(self.failure))
        made = evaluator.measure(self.model, subject, self.ranks)
        return made.model_copy(update={"seconds": round(time.monotonic() - began_s, 3)})

    def _load(self, evaluator: InMemoryEvaluator) -> None:
        form = (evaluator.dtype, evaluator.model)
        if form == self.form:
            return
        self.form, self.model = form, None  # the old model is freed before the new one is made
        failure = None
        try:
            self.model = model_of_folder(self.folder, *form)
        except (Interrupted, PeerFailed):
            raise
        except Exception as error:  # the model is the user's code, and its memory may not suffice
            failure = f"{type(error).__name__}: {error}"
        # All ranks must know: one that has no model shares no work.
        self.failure = next((text for text in self.ranks.gather(failure) if text is not None), None)
