"""The evaluator "loss": the mean loss of held-out tokens, with what is needed to compare models block by block."""

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from typing_extensions import override

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import EvaluationError, RecipeError
from wsm_ds.evaluation.evaluation import Blocks
from wsm_ds.evaluation.evaluator import MeasurementFailed, Result
from wsm_ds.evaluation.forward import Forward
from wsm_ds.evaluation.held_out import Cut, HeldOut, read_held_out
from wsm_ds.evaluation.in_memory import InMemoryEvaluator, shared_work
from wsm_ds.evaluation.models import default_device, inner, positions_of, vocabulary_of
from wsm_ds.evaluation.statistics import LOSS, loss_metrics

if TYPE_CHECKING:
    import torch

METHOD = 1
"""Grows when the same model and data would give other figures."""
CPU_BATCH_TOKENS, MOST_BATCH_TOKENS = 2048, 1 << 15
DEVICE_SHARE = 0.25
"""Of an accelerator's memory beside the parameters, which logits and activations of a batch may take."""
BYTES_PER_LOGIT, BYTES_PER_ACTIVATION = 12, 256


class LossEvaluator(InMemoryEvaluator):
    """Measures the loss on held-out data.

    Attributes:
        sequence_length: predicted tokens of a block.
        blocks: of each source, at most.
        batch_size: blocks that the model sees at once; None: as many as fit the device.
    """

    kind: Literal["loss"] = "loss"
    sequence_length: int = Field(default=1024, ge=1)
    blocks: int = Field(default=256, ge=1)

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

    @override
    def held_out(self) -> HeldOut:
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

    @override
    def require_fit(self, model: "torch.nn.Module") -> None:
        super().require_fit(model)
        positions = positions_of(model)
        if positions is not None and positions < self.sequence_length:
            raise EvaluationError(
                f"`sequence_length` {self.sequence_length} is longer than the {positions} positions of the model."
            )

    @override
    def result(self, model: "torch.nn.Module", ranks: Ranks) -> Result:
        import torch

        held_out = self.held_out()
        device = next((parameter.device for parameter in model.parameters()), default_device())
        rows = int(ranks.decide(lambda: self.batch_size or batch_rows(model, device, self.sequence_length)))
        batches = [
            range(first, min(first + rows, len(held_out.tokens))) for first in range(0, len(held_out.tokens), rows)
        ]
        tokens = torch.from_numpy(held_out.tokens)
        with Forward(model) as forward:
            try:
                made = shared_work(ranks, batches, lambda rows: forward.nats(tokens[rows.start : rows.stop].to(device)))
            except MeasurementFailed as error:
                raise MeasurementFailed(f"{error} (in blocks of `sequence_length` {self.sequence_length})") from error
        blocks = self._blocks(held_out, [nats for batch in made for nats in batch])
        return Result(metrics=loss_metrics(blocks, self.weights), blocks=blocks, details={"device": device.type})

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
        config = getattr(inner(model), "config", None)
        width = int(getattr(config, "hidden_size", 0) or 4096)
        per_token = BYTES_PER_LOGIT * (vocabulary_of(model) or 1 << 17) + BYTES_PER_ACTIVATION * width
        most = min(MOST_BATCH_TOKENS, int(room / per_token))
    rows = max(1, most // sequence_length)
    return 1 << (rows.bit_length() - 1)
