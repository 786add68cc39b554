"""The evaluator "generate": whether a model's greedy continuations are healthy.

A merge of a long window may have a lower loss than every checkpoint in it and still generate loops. Each prompt is the
beginning of a block of held-out data. Its continuation, always by the likeliest token, ends at an end token or at the
limit of length. It *loops* if it ends in three or more copies of the same tokens, which are LOOP_TOKENS or more
together.
"""

import inspect
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from wsm_ds.distributed.ranks import Ranks
from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.evaluation import Metric
from wsm_ds.evaluation.evaluator import MeasurementFailed, Result
from wsm_ds.evaluation.forward import Forward, has_cache
from wsm_ds.evaluation.held_out import Cut, HeldOut, read_held_out
from wsm_ds.evaluation.in_memory import InMemoryEvaluator, shared_work
from wsm_ds.evaluation.models import default_device, digest_of, inner, positions_of

if TYPE_CHECKING:
    import torch

METHOD = 1
LOOPING, AT_LIMIT, MEDIAN_LENGTH, REPEATED = "looping", "at_limit", "median_length", "repeated_4grams"
LOOP_TOKENS, LOOP_COPIES, GRAM = 24, 3, 4
BATCH_ROWS = 16


class GenerateEvaluator(InMemoryEvaluator):
    """Measures the health of greedy continuations.

    Attributes:
        prompts: number of prompts from each source, at most.
        prompt_tokens: length of a prompt.
        most_tokens: length at which a continuation is cut.
        end_tokens: tokens that end a text; None: those of the model's config. Without any, no continuation ends.
        batch_size: prompts that the model continues at once; None: BATCH_ROWS.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    kind: Literal["generate"] = "generate"
    prompts: int = Field(default=100, ge=1)
    prompt_tokens: int = Field(default=32, ge=1)
    most_tokens: int = Field(default=128, ge=1)
    end_tokens: tuple[int, ...] | None = None

    @property
    @override
    def main_metric(self) -> str:
        return LOOPING

    @override
    def held_out(self) -> HeldOut:
        return read_held_out(self.data, Cut(self.prompt_tokens, self.prompts, self.tokenizer, self.token_dtype))

    @override
    def content(self) -> dict[str, Any]:
        names = {"kind", "most_tokens", "end_tokens", "dtype"}
        own = {"method": METHOD, "data": self.held_out().digest, "model": digest_of(self.model)}
        return self.model_dump(include=names) | own

    @override
    def details(self) -> dict[str, Any]:
        return {
            "data": {source.name: str(source.path) for source in self.data},
            "prompts": len(self.held_out().tokens),
            "prompt_tokens": self.prompt_tokens,
            "most_tokens": self.most_tokens,
            "dtype": self.dtype,
        }

    @override
    def require_fit(self, model: "torch.nn.Module") -> None:
        super().require_fit(model)
        length, positions = self.prompt_tokens + self.most_tokens, positions_of(model)
        if positions is not None and positions < length:
            raise EvaluationError(
                f"`prompt_tokens` {self.prompt_tokens} and `most_tokens` {self.most_tokens} are together longer than "
                f"the {positions} positions of the model."
            )

    @override
    def result(self, model: "torch.nn.Module", ranks: Ranks) -> Result:
        prompts = self.held_out().tokens[:, : self.prompt_tokens]
        rows = self.batch_size or BATCH_ROWS
        ends = frozenset(ends_of(model) if self.end_tokens is None else self.end_tokens)
        batches = [prompts[first : first + rows] for first in range(0, len(prompts), rows)]
        made = shared_work(ranks, batches, lambda batch: continued(model, batch, self.most_tokens, ends))
        return Result(metrics=health([tokens for batch in made for tokens in batch], self.most_tokens))


def ends_of(model: Any) -> tuple[int, ...]:
    """The end tokens in a model's config."""
    for config in (getattr(inner(model), "generation_config", None), getattr(inner(model), "config", None)):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return tuple(end) if isinstance(end, list | tuple) else (int(end),)
    return ()


def continued(model: "torch.nn.Module", prompts: Any, most_tokens: int, ends: frozenset[int]) -> list[list[int]]:
    """The greedy continuations of prompts of one length.

    Args:
        model: returns logits; see `models`. One of the transformers library keeps what it has computed; for any other,
            each token costs a run over the whole text.
        prompts: int64, shape [rows, length].
        most_tokens: at which they are cut.
        ends: tokens that end a text.

    Returns:
        The tokens of each row, with the end token if there is one.

    Raises:
        EvaluationError: the model does not return logits.
    """
    import torch

    device = next((parameter.device for parameter in model.parameters()), default_device())
    texts = torch.from_numpy(prompts.copy()).to(device)
    made: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(made)
    with Forward(model) as forward:
        cache: dict[str, Any] = {}
        for _ in range(most_tokens):
            if has_cache(model):
                # Since version 5.24 of transformers the argument is called `cache`.
                name = "cache" if "cache" in inspect.signature(inner(model).forward).parameters else "past_key_values"
                output = model(input_ids=texts[:, -1:] if cache else texts, use_cache=True, **cache)
                logits, cache = output.logits[:, -1], {name: getattr(output, name)}
            else:
                logits = forward.logits(texts)[:, -1]
            if not bool(torch.isfinite(logits).all()):
                raise MeasurementFailed("a logit is not a finite number")
            best = logits.float().argmax(dim=-1)
            texts = torch.cat([texts, best[:, None]], dim=1)
            for row, token in enumerate(best.tolist()):
                if is_open[row]:
                    made[row].append(token)
                    is_open[row] = token not in ends
            if not any(is_open):
                break
    return made


def health(made: Sequence[Sequence[int]], most_tokens: int) -> dict[str, Metric]:
    """The metrics of continuations.

    Args:
        made: the tokens of each.
        most_tokens: at which they were cut.
    """
    looping = [is_looping(tokens) for tokens in made]
    lengths = sorted(len(tokens) for tokens in made)
    repeated = [repeated_share(tokens) for tokens in made]
    return {
        LOOPING: _share(looping),
        AT_LIMIT: _share([len(tokens) == most_tokens for tokens in made]),
        REPEATED: _mean(repeated),
        MEDIAN_LENGTH: Metric(value=float(statistics.median(lengths)), unit="tokens", maximize=True),
    }


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether a continuation ends in copies of the same tokens; see the module.

    >>> is_looping([5, 1, 2] + [7, 8, 9] * 8), is_looping([7, 8, 9] * 7), is_looping(list(range(60)) * 2)
    (True, False, False)
    """
    for period in range(1, len(tokens) // LOOP_COPIES + 1):
        length = max(LOOP_COPIES * period, -(-LOOP_TOKENS // period) * period)
        end = tokens[-length:]
        if len(end) == length and end[period:] == end[:-period]:
            return True
    return False


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of groups of GRAM tokens that stood in the continuation before.

    >>> repeated_share([1, 2, 3, 4, 5, 6, 7]), repeated_share([1, 1, 1, 1, 1])
    (0.0, 0.5)
    """
    grams = [tuple(tokens[first : first + GRAM]) for first in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _share(facts: Sequence[bool]) -> Metric:
    share = sum(facts) / len(facts)
    return Metric(value=share, error=math.sqrt(share * (1 - share) / len(facts)))


def _mean(values: Sequence[float]) -> Metric:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Metric(value=mean)
    return Metric(value=mean, error=statistics.stdev(values) / math.sqrt(len(values)))
