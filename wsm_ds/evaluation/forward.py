"""The losses of blocks of tokens, from any model that `models` describes."""

import inspect
import math
from typing import TYPE_CHECKING, Any

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.models import inner

if TYPE_CHECKING:
    import torch

LOGITS_AT_ONCE = 1 << 24
"""Logits that are turned into float32 at once: 64 MiB."""


class Forward:
    """Runs a model without gradients, in evaluation mode. A context manager, which gives the model its mode back.

    Args:
        model: to run.
    """

    def __init__(self, model: "torch.nn.Module") -> None:
        import torch

        self.model = model
        self.was_training = [module for module in model.modules() if module.training]
        self.is_one_number = False
        self.inference = torch.inference_mode()

    def __enter__(self) -> "Forward":
        self.model.eval()
        self.inference.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inference.__exit__(*error)
        for module in self.was_training:
            module.training = True

    def nats(self, batch: "torch.Tensor") -> list[float]:
        """The loss of each row: the sum over its predicted tokens, in nats, exactly rounded from their float32 values.

        A batch that an accelerator's memory does not hold is run in halves.

        Args:
            batch: int64, shape [rows, length + 1].

        Raises:
            EvaluationError: the model returns neither logits nor losses.
            OutOfMemoryError: the memory does not hold a single row.
        """
        import torch

        try:
            return self._nats(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        middle = len(batch) // 2
        return self.nats(batch[:middle]) + self.nats(batch[middle:])

    def _nats(self, batch: "torch.Tensor") -> list[float]:
        if callable(getattr(inner(self.model), "loss", None)):
            return self._own_losses(batch)
        logits = self.logits(batch[:, :-1])
        return [_sum(_token_losses(row, targets)) for row, targets in zip(logits, batch[:, 1:], strict=True)]

    def logits(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """The model's logits.

        Args:
            tokens: int64, shape [rows, length].

        Returns:
            Shape [rows, length, vocabulary].

        Raises:
            EvaluationError: the model returns something else.
        """
        import torch

        # A cache of keys and values is of no use here, and takes memory.
        made = self.model(input_ids=tokens, use_cache=False) if has_cache(self.model) else self.model(tokens)
        logits = getattr(made, "logits", made)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise EvaluationError(
                f"the model returns {found} for tokens of shape {list(tokens.shape)}, and logits of shape [batch, "
                "length, vocabulary] are needed. Give it a method loss(batch)."
            )
        return logits

    def _own_losses(self, batch: "torch.Tensor") -> list[float]:
        length = batch.shape[1] - 1
        if self.is_one_number and len(batch) > 1:
            return [self._own_losses(row[None])[0] for row in batch]
        losses = inner(self.model).loss(batch)
        if losses.ndim == 0:
            self.is_one_number = True
            return self._own_losses(batch) if len(batch) > 1 else [losses.double().item() * length]
        if losses.shape == batch[:, 1:].shape:
            return [_sum(row) for row in losses]
        if losses.shape == batch.shape[:1]:
            return [mean * length for mean in losses.double().tolist()]
        raise EvaluationError(
            f"the model's loss(batch) returns the shape {list(losses.shape)} for tokens of shape {list(batch.shape)}; "
            f"expected [], [{len(batch)}] or [{len(batch)}, {length}]."
        )


def has_cache(model: "torch.nn.Module") -> bool:
    """Whether a model's forward takes the arguments of causal models of the transformers library."""
    return {"input_ids", "use_cache"} <= inspect.signature(inner(model).forward).parameters.keys()


def _token_losses(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """The loss of each token of one row, in float32. In parts, because float32 logits take much memory."""
    import torch

    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    parts = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits.split(at_once), targets.split(at_once), strict=True)
    ]
    return torch.cat(parts)


def _sum(losses: "torch.Tensor") -> float:
    """The exact sum, rounded once: the order of the additions changes no bit. Infinities and NaN give NaN."""
    values = losses.double().tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
