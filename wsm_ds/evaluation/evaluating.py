"""Measures folders by evaluators: what the records have is not measured again, and a failure costs one model alone."""

import hashlib
import json
import re
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
from wsm_ds.evaluation.lm_eval import TOKENIZERS
from wsm_ds.evaluation.models import source_of
from wsm_ds.evaluation.records import Records
from wsm_ds.evaluation.subjects import CONFIG, subject_of_folder
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.planning.recipe_options import StrPath
from wsm_ds.publishing.manifest import read_manifest

FORM = "form"
"""The key of `Evaluation.evaluator` that tells the model's config or code: other ones are measured anew."""
WATCHED = re.compile(r"step\d+")
"""The folder in which a watch puts the merges that end at one step."""


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
    folders: Sequence[StrPath],
    evaluators: Sequence[Evaluator],
    *,
    records: Records | None = None,
    ranks: Ranks | None = None,
    again: bool = False,
    with_raw: bool = False,
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
        with_raw: whether to measure the newest checkpoint of each merge, too, if it is still there. A checkpoint has no
            form that programs know, so only evaluators that run the model themselves measure it.

    Yields:
        The evaluations of the first folder, then those of the second, …; those of newest checkpoints at the end.

    Raises:
        EvaluationError, RecipeError: a folder holds no model, or an evaluator cannot be used.
        PeerFailed: another rank failed.
    """
    members = ranks or Ranks()
    given = [Path(folder) for folder in folders]
    every = [*given, *(newest_sources(given) if with_raw else [])]
    subjects = [subject_of_folder(folder, name) for folder, name in zip(every, names_of(every), strict=True)]
    for evaluator in evaluators:
        evaluator.require_ready()
    if records is not None:
        members.decide(records.require_writable)
    for number, (folder, subject) in enumerate(zip(every, subjects, strict=True)):
        loaded = _Loaded(folder, members)
        is_raw = number >= len(given)
        for evaluator in evaluators:
            if is_raw and not isinstance(evaluator, InMemoryEvaluator):
                continue
            form = members.decide(partial(_form_of, folder, evaluator))
            found = None if again else _found(records, subject, evaluator, form, members)
            evaluation = found or _with_form(loaded.measured(evaluator, subject), form)
            if found is None and records is not None:
                members.decide(partial(records.add, evaluation))
            yield Measured(evaluation, found is None)


def newest_sources(folders: Sequence[Path]) -> list[Path]:
    """The newest checkpoints of merges, as far as they still exist and are not among the folders.

    Args:
        folders: merges, and others, which are passed over.

    Raises:
        VerificationFailed: a manifest is damaged.
    """
    merges = [folder for folder in folders if (folder / MANIFEST).is_file()]
    newest = dict.fromkeys(Path(read_manifest(folder)["sources"][-1]["path"]) for folder in merges)
    given = {folder.resolve() for folder in folders}
    return [path for path in newest if path.is_dir() and path.resolve() not in given]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell folders apart.

    The folders of a watch are named with their steps.

    >>> names_of([Path("merges/a"), Path("merges/b")]), names_of([Path("merges/step8/last4")])
    (['a', 'b'], ['step8/last4'])

    Args:
        folders: paths.
    """
    parts = [folder.resolve().parts for folder in folders]
    has_steps = any(WATCHED.fullmatch(part[-2]) for part in parts if len(part) > 1)
    for count in range(2 if has_steps else 1, max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def _form_of(folder: Path, evaluator: Evaluator) -> str:
    """SHA-256 of what makes a model of the weights: its config or code, and for programs the tokenizer."""
    spec = evaluator.model if isinstance(evaluator, InMemoryEvaluator) else None
    source = None if spec is None else source_of(spec)
    names = () if isinstance(evaluator, InMemoryEvaluator) else TOKENIZERS
    files = [folder / name for name in (CONFIG, *names)] if spec is None else [source] if source is not None else []
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _with_form(evaluation: Evaluation, form: str) -> Evaluation:
    return evaluation.model_copy(update={"evaluator": evaluation.evaluator | {FORM: form}})


def _found(
    records: Records | None, subject: Subject, evaluator: Evaluator, form: str, ranks: Ranks
) -> Evaluation | None:
    """The recorded evaluation of the same weights in the same form."""
    if records is None:
        return None

    def find() -> Any:
        found = records.find(subject.identity, evaluator.identity())
        is_same = found is not None and found.evaluator.get(FORM) == form
        return found.model_dump(mode="json") if found is not None and is_same else None

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
