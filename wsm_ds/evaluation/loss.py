"""The evaluator "loss": the mean loss of held-out tokens, with what is needed to compare models block by block."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import EvaluationError, RecipeError, WsmError
from wsm_ds.evaluation.evaluation import Blocks, Evaluation, Subject
from wsm_ds.evaluation.evaluator import MeasurementFailed, ModelEvaluator, Result
from wsm_ds.evaluation.forward import Forward
from wsm_ds.evaluation.held_out import Cut, DataSource, HeldOut, read_held_out
from wsm_ds.evaluation.models import default_device, load_folder, positions_of, torch_dtype, vocabulary_of
from wsm_ds.evaluation.statistics import LOSS, loss_metrics
from wsm_ds.evaluation.token_files import TokenDType

if TYPE_CHECKING:
    import torch

METHOD = 1
"""Grows when the same model and data would give other figures."""
CPU_BATCH_TOKENS, MOST_BATCH_TOKENS = 2048, 1 << 15
DEVICE_SHARE = 0.25
"""Of an accelerator's memory beside the parameters, which logits and activations of a batch may take."""
BYTES_PER_LOGIT, BYTES_PER_ACTIVATION = 12, 256


class LossEvaluator(ModelEvaluator):
    """Measures the loss on held-out data.

    Attributes:
        data: the held-out sources.
        tokenizer: folder of the tokenizer, "bytes", or None; see `Cut`.
        token_dtype: of bare token files; None: see `open_tokens`.
        sequence_length: predicted tokens of a block.
        blocks: of each source, at most.
        dtype: in which the model computes.
        model: as in `build_model`; None: a folder that is measured holds its config.
        batch_size: blocks that the model sees at once; None: as many as fit the device.
        vocabulary: number of tokens that the model knows; None: its config says so.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    kind: Literal["loss"] = "loss"
    data: tuple[DataSource, ...] = Field(min_length=1)
    tokenizer: str | None = None
    token_dtype: TokenDType | None = None
    sequence_length: int = Field(default=1024, ge=1)
    blocks: int = Field(default=256, ge=1)
    model: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    vocabulary: int | None = Field(default=None, ge=1)

    @property
    @override
    def main_metric(self) -> str:
        return LOSS

    @property
    def weights(self) -> dict[str, float] | None:
        """Of the sources, by name; None: their numbers of tokens."""
        given = {source.name: source.weight for source in self.data if source.weight is not None}
        if given and len(given) < len(self.data):
            without = next(source.name for source in self.data if source.weight is None)
            raise RecipeError(f"--data: {without} has no weight, and others have one; give all of them one, or none")
        return given or None

    def held_out(self) -> HeldOut:
        """The blocks; read once.

        Raises:
            EvaluationError: a file cannot be used.
        """
        return read_held_out(self.data, Cut(self.sequence_length, self.blocks, self.tokenizer, self.token_dtype))

    @override
    def content(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "method": METHOD,
            "data": self.held_out().digest,
            "weights": self.weights,
            "sequence_length": self.sequence_length,
            "dtype": self.dtype,
        }

    @override
    def details(self) -> dict[str, Any]:
        held_out = self.held_out()
        return {
            "data": {source.name: str(source.path) for source in self.data},
            "weights": self.weights,
            "blocks": len(held_out.tokens),
            "tokens": len(held_out.tokens) * self.sequence_length,
            "sequence_length": self.sequence_length,
            "dtype": self.dtype,
        }

    def require_fit(self, model: "torch.nn.Module") -> None:
        """Checks that a model can be measured on the held-out data.

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
        positions = positions_of(model)
        if positions is not None and positions < self.sequence_length:
            raise EvaluationError(
                f"`sequence_length` {self.sequence_length} is longer than the {positions} positions of the model."
            )
        numel: dict[Any, int] = {}
        for parameter in model.parameters():
            numel[parameter.dtype] = numel.get(parameter.dtype, 0) + parameter.numel()
        if numel and max(numel, key=lambda dtype: numel[dtype]) != torch_dtype(self.dtype):
            raise RecipeError(
                f"most parameters of the model are {max(numel, key=lambda d: numel[d])}, not {self.dtype}."
            )

    def measure(self, model: "torch.nn.Module", subject: Subject, ranks: Ranks | None = None) -> Evaluation:
        """Measures a model in memory.

        The figures are the same to the last bit on any number of ranks. The model's mode stays what it was.

        Ranks: all, with the same weights on each. Every rank gets the whole evaluation.

        Args:
            model: see `models`; on its device.
            subject: what it is.
            ranks: that share the blocks; None: this process alone.

        Returns:
            The evaluation. A loss that is not finite, or an error of the model, is its `failure`.

        Raises:
            EvaluationError, RecipeError: the data do not fit the model; see `require_fit`.
            PeerFailed: another rank failed.
        """
        began_s = time.monotonic()
        self.require_fit(model)
        outcome: Result | MeasurementFailed
        try:
            outcome = self._result(model, ranks or Ranks())
        except MeasurementFailed as error:
            outcome = error
        return self.evaluation(subject, began_s, outcome)

    @override
    def measure_folder(self, folder: Path, subject: Subject, ranks: Ranks | None = None) -> Evaluation:
        """Measures the model whose weights a folder holds as safetensors.

        Args:
            folder: see `load_folder`.
            subject: what it is.
            ranks: as in `measure`.

        Raises:
            EvaluationError: the folder's weights do not fit the model, or the data do not.
        """
        began_s = time.monotonic()
        evaluation = self.measure(load_folder(folder, self.dtype, self.model), subject, ranks)
        return evaluation.model_copy(update={"seconds": round(time.monotonic() - began_s, 3)})

    def _result(self, model: "torch.nn.Module", ranks: Ranks) -> Result:
        held_out = self.held_out()
        device = next((parameter.device for parameter in model.parameters()), default_device())
        rows = int(ranks.decide(lambda: self.batch_size or batch_rows(model, device, self.sequence_length)))
        batches = [
            range(first, min(first + rows, len(held_out.tokens))) for first in range(0, len(held_out.tokens), rows)
        ]
        mine, failure = [], None
        try:
            for batch, nats in self._losses(model, device, batches[ranks.rank :: ranks.world_size], ranks):
                mine.append((batch.start, nats))
        except WsmError:
            raise
        except Exception as error:  # the model is the user's code
            failure = f"{type(error).__name__}: {error}"
        gathered = ranks.gather({"nats": mine, "failure": failure})
        failures = [part["failure"] for part in gathered if part["failure"]]
        if failures:
            raise MeasurementFailed(failures[0])
        nats = [value for _, values in sorted(item for part in gathered for item in part["nats"]) for value in values]
        blocks = self._blocks(held_out, nats)
        return Result(metrics=loss_metrics(blocks, self.weights), blocks=blocks, details={"device": str(device.type)})

    def _losses(
        self, model: "torch.nn.Module", device: "torch.device", batches: list[range], ranks: Ranks
    ) -> Iterator[tuple[range, list[float]]]:
        import torch

        tokens = torch.from_numpy(self.held_out().tokens)
        with Forward(model) as forward:
            for batch in batches:
                ranks.check()
                yield batch, forward.nats(tokens[batch.start : batch.stop].to(device))

    def _blocks(self, held_out: HeldOut, nats: list[float]) -> Blocks:
        wrong = [number for number, value in enumerate(nats) if not math.isfinite(value)]
        if wrong:
            name = held_out.sources[int(held_out.source[wrong[0]])]
            raise MeasurementFailed(
                f"the loss is not a finite number in {len(wrong)} of {len(nats)} blocks, first in block {wrong[0]} "
                f"(of {name})"
            )
        return Blocks(
            sources=held_out.sources,
            source=tuple(held_out.source.tolist()),
            nats=tuple(nats),
            tokens=(self.sequence_length,) * len(nats),
            nbytes=None if held_out.nbytes is None else tuple(held_out.nbytes.tolist()),
        )


def batch_rows(model: "torch.nn.Module", device: "torch.device", sequence_length: int) -> int:
    """Blocks that a model sees at once: a power of two that the device's kind and the model decide.

    Not the memory that is free now: the same job must form the same batches when it is repeated.

    Args:
        model: on the device.
        device: where it computes.
        sequence_length: predicted tokens of a block.
    """
    import torch

    most = CPU_BATCH_TOKENS
    if device.type == "cuda":
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        room = max(0, torch.cuda.get_device_properties(device).total_memory - weights) * DEVICE_SHARE
        config = getattr(model, "config", None)
        width = int(getattr(config, "hidden_size", 0) or 4096)
        per_token = BYTES_PER_LOGIT * (vocabulary_of(model) or 1 << 17) + BYTES_PER_ACTIVATION * width
        most = min(MOST_BATCH_TOKENS, int(room / per_token))
    rows = max(1, most // sequence_length)
    return 1 << (rows.bit_length() - 1)
