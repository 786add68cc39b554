"""Flags of evaluations, and the evaluators that they describe."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wsm_ds.errors import RecipeError

if TYPE_CHECKING:
    from wsm_ds.evaluation.evaluator import Evaluator
    from wsm_ds.evaluation.loss import LossEvaluator


def loss_options(parser: argparse.ArgumentParser) -> None:
    """Adds the group of the held-out data and the model."""
    group = parser.add_argument_group("measurement (the loss on held-out data)")
    group.add_argument("--data", action="append", default=[], metavar="[NAME=]FILE[@WEIGHT]",
                       help="held-out tokens or text; may be given several times")  # fmt: skip
    group.add_argument("--model", metavar="MODEL", help="a folder with a config.json of the transformers library, or "
                       "MODULE:FUNCTION or FILE.py:FUNCTION that returns a torch module")  # fmt: skip
    group.add_argument("--sequence-length", type=int, default=1024, metavar="N",
                       help="predicted tokens of a block (default 1024)")  # fmt: skip
    group.add_argument("--blocks", type=int, default=256, metavar="N",
                       help="blocks of each file, at most, evenly chosen (default 256)")  # fmt: skip
    group.add_argument("--eval-dtype", choices=("bf16", "fp16", "fp32"), default="fp32",
                       help="in which the model computes (default fp32)")  # fmt: skip
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="blocks at once (default: as many as fit the device)"
    )
    group.add_argument("--tokenizer", metavar="FOLDER", help="of text files; or bytes, for a model of bytes")
    group.add_argument("--token-dtype", metavar="DTYPE", help="of bare token files (default uint16)")
    group.add_argument("--vocabulary", type=int, metavar="N", help="tokens that the model knows (default: its config)")


def loss_evaluator(options: argparse.Namespace, data: Sequence[str]) -> "LossEvaluator":
    """The evaluator that the flags describe.

    Args:
        options: the parsed arguments.
        data: values of --data.

    Raises:
        RecipeError: a value is wrong, or there are no data.
    """
    from pydantic import ValidationError

    from wsm_ds.evaluation.held_out import parse_source
    from wsm_ds.evaluation.loss import LossEvaluator
    from wsm_ds.planning.recipe_errors import validation_sentences

    if not data:
        raise RecipeError("--data must be given: held-out tokens or text, which the training has not seen")
    values: dict[str, Any] = {
        "data": tuple(parse_source(text) for text in data),
        "model": options.model,
        "sequence_length": options.sequence_length,
        "blocks": options.blocks,
        "dtype": options.eval_dtype,
        "batch_size": options.batch_size,
        "tokenizer": options.tokenizer,
        "token_dtype": options.token_dtype,
        "vocabulary": options.vocabulary,
    }
    try:
        return LossEvaluator(**values)
    except ValidationError as error:
        raise RecipeError(validation_sentences(error, LossEvaluator.model_fields)) from error


def second_stage(options: argparse.Namespace) -> "Evaluator | None":
    """What --final measures with; None if it is not given."""
    if options.final is None:
        return None
    raise RecipeError("--final is not there yet")
