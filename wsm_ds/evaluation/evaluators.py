"""Evaluators from plain values: of flags, or of a YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wsm_ds.errors import RecipeError, brief, did_you_mean, few
from wsm_ds.evaluation.commands import CommandEvaluator
from wsm_ds.evaluation.evaluator import Evaluator
from wsm_ds.evaluation.generation import GenerateEvaluator
from wsm_ds.evaluation.lm_eval import LmEvalEvaluator
from wsm_ds.evaluation.loss import LossEvaluator
from wsm_ds.planning.recipe_errors import validation_sentences
from wsm_ds.planning.recipe_file import read_yaml
from wsm_ds.planning.recipe_options import StrPath

KINDS: dict[str, type[Evaluator]] = {
    "loss": LossEvaluator,
    "generate": GenerateEvaluator,
    "command": CommandEvaluator,
    "lm-eval": LmEvalEvaluator,
}


def make_evaluator(values: Mapping[str, Any]) -> Evaluator:
    """Makes an evaluator.

    Args:
        values: the attributes of its class, and its `kind`: "loss", "generate", "command" or "lm-eval". None means that
            an attribute is not given.

    Raises:
        RecipeError: names every wrong key, its value, and what is expected.
    """
    given = {str(key): value for key, value in values.items() if value is not None}
    kind = given.pop("kind", None)
    if kind not in KINDS:
        raise RecipeError(f"the `kind` of an evaluator is {few(KINDS)}, not {brief(kind)}{did_you_mean(kind, KINDS)}.")
    made = KINDS[kind]
    unknown = sorted(given.keys() - made.model_fields.keys())
    if unknown:
        raise RecipeError(
            f"the evaluator {kind} has no key {brief(unknown[0])}{did_you_mean(unknown[0], made.model_fields)}; it has "
            f"{', '.join(sorted(made.model_fields))}."
        )
    try:
        return made(**given)
    except ValidationError as error:
        raise RecipeError(
            f"the evaluator {kind} is not valid: {validation_sentences(error, made.model_fields)}"
        ) from error


def load_evaluators(path: StrPath) -> tuple[Evaluator, ...]:
    """Reads evaluators from a YAML file: one mapping, or a list of them.

    Args:
        path: the file. Paths in it are relative to the working directory.

    Raises:
        RecipeError: it cannot be read, or holds something else; see `make_evaluator`.
    """
    content = read_yaml(Path(path), "the file of evaluators")
    entries = content if isinstance(content, list) else [content]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{path} must hold an evaluator, or a list of them, each a mapping; found {brief(content)}.")
    made = []
    for number, entry in enumerate(entries):
        try:
            made.append(make_evaluator(entry))
        except RecipeError as error:
            raise RecipeError(f"{path}, evaluator {number + 1}: {error}") from error
    return tuple(made)
