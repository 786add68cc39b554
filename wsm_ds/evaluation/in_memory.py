"""What evaluators that run the model themselves have in common."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field
from typing_extensions import override

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import EvaluationError, RecipeError, WsmError
from wsm_ds.evaluation.evaluation import Evaluation, Subject
from wsm_ds.evaluation.evaluator import Evaluator, MeasurementFailed, Result
from wsm_ds.evaluation.folders import model_of_folder
from wsm_ds.evaluation.held_out import DataSource, HeldOut, parse_source
from wsm_ds.evaluation.models import torch_dtype, vocabulary_of
from wsm_ds.evaluation.token_files import TokenDType
from wsm_ds.planning.recipe_options import StrPath

if TYPE_CHECKING:
    import torch


Item = TypeVar("Item")
Made = TypeVar("Made")


def shared_work(ranks: Ranks, items: Sequence[Item], work: Callable[[Item], Made]) -> list[Made]:
    """Does the same for every item, on all ranks together.

    Args:
        ranks: that share the items. An item is done on one rank, whichever their number.
        items: the same on every rank.
        work: returns plain data.

    Returns:
        What `work` made of every item, in their order, on every rank.

    Raises:
        MeasurementFailed: `work` failed on some rank.
        PeerFailed: another rank is gone.
    """
    mine, failure = [], None
    try:
        for number in range(ranks.rank, len(items), ranks.world_size):
            ranks.check()
            mine.append((number, work(items[number])))
    except WsmError:
        raise
    except MeasurementFailed as error:
        failure = str(error)
    except Exception as error:  # a model is the user's code
        failure = f"{type(error).__name__}: {error}"
    parts = ranks.gather({"made": mine, "failure": failure})
    failures = [part["failure"] for part in parts if part["failure"] is not None]
    if failures:
        raise MeasurementFailed(failures[0])
    made = sorted((item for part in parts for item in part["made"]), key=lambda item: int(item[0]))
    return [result for _, result in made]


def _sources(value: Any) -> Any:
    """Sources from their texts: one, or a list."""
    values = [value] if isinstance(value, str | Path) else value
    if not isinstance(values, list | tuple):
        return value
    return tuple(parse_source(str(item)) if isinstance(item, str | Path) else item for item in values)


class InMemoryEvaluator(Evaluator):
    """Measures models in memory on blocks of held-out data.

    Attributes:
        data: the held-out sources, or their texts; see `parse_source`.
        tokenizer: folder of the tokenizer, "bytes", or None; see `Cut`.
        token_dtype: of bare token files; None: see `open_tokens`.
        dtype: in which the model computes.
        model: as in `build_model`; None: a folder that is measured holds its config.
        batch_size: blocks that the model sees at once.
        vocabulary: number of tokens that the model knows; None: its config says so.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    data: Annotated[tuple[DataSource, ...], BeforeValidator(_sources)] = Field(min_length=1)
    tokenizer: str | None = None
    token_dtype: TokenDType | None = None
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    model: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    vocabulary: int | None = Field(default=None, ge=1)

    @abstractmethod
    def held_out(self) -> HeldOut:
        """The blocks; read once.

        Raises:
            EvaluationError: a file cannot be used.
        """

    @abstractmethod
    def result(self, model: "torch.nn.Module", ranks: Ranks) -> Result:
        """Measures a model that fits.

        Args:
            model: see `models`; on its device.
            ranks: that share the work.

        Raises:
            MeasurementFailed: the model gives no result.
        """

    def require_fit(self, model: "torch.nn.Module") -> None:
        """Checks that a model can be measured on the held-out data.

        Args:
            model: on any device.

        Raises:
            EvaluationError: the data hold tokens that it does not know, or its sequences are shorter.
            RecipeError: its parameters have another dtype.
        """
        most = int(self.held_out().tokens.max())
        size = self.vocabulary or vocabulary_of(model)
        if size is not None and most >= size:
            raise EvaluationError(
                f"the held-out data hold token {most}, and the model knows {size} tokens. They were made by another "
                "tokenizer, or have another `token_dtype`."
            )
        numel: dict[Any, int] = {}
        for parameter in model.parameters():
            numel[parameter.dtype] = numel.get(parameter.dtype, 0) + parameter.numel()
        usual = max(numel, key=lambda dtype: numel[dtype], default=None)
        if usual is not None and usual != torch_dtype(self.dtype):
            raise RecipeError(f"most parameters of the model are {usual}, not {self.dtype}.")

    def measure(self, model: "torch.nn.Module", subject: Subject, ranks: Ranks | None = None) -> Evaluation:
        """Measures a model in memory.

        The figures are the same to the last bit on any number of ranks. The model's mode stays what it was.

        Ranks: all, with the same weights on each. Every rank gets the whole evaluation.

        Args:
            model: see `models`; on its device.
            subject: what it is.
            ranks: that share the work; None: this process alone.

        Returns:
            The evaluation. A figure that is not finite, or an error of the model, is its `failure`.

        Raises:
            EvaluationError, RecipeError: the data do not fit the model; see `require_fit`.
            PeerFailed: another rank failed.
        """
        began_s = time.monotonic()
        self.require_fit(model)
        outcome: Result | MeasurementFailed
        try:
            outcome = self.result(model, ranks or Ranks())
        except MeasurementFailed as error:
            outcome = error
        return self.evaluation(subject, began_s, outcome)

    @override
    def measure_folder(self, folder: StrPath, subject: Subject, ranks: Ranks | None = None) -> Evaluation:
        """Measures the model whose weights a folder holds.

        Args:
            folder: see `model_of_folder`.
            subject: what it is.
            ranks: as in `measure`.

        Raises:
            EvaluationError, ModelMismatch: the folder holds no model, or it fits neither its weights nor the data.
        """
        began_s = time.monotonic()
        evaluation = self.measure(model_of_folder(Path(folder), self.dtype, self.model), subject, ranks)
        return evaluation.model_copy(update={"seconds": round(time.monotonic() - began_s, 3)})
