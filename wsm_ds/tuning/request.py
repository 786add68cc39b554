"""What a tuning is asked to do, checked before anything is computed."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from wsm_ds.errors import RecipeError
from wsm_ds.evaluation.evaluator import Evaluator
from wsm_ds.evaluation.generation import GenerateEvaluator
from wsm_ds.planning.recipe_errors import validation_sentences
from wsm_ds.planning.window_recipe import WindowRecipe, make_window_recipe
from wsm_ds.schedules.spread import parse_spread
from wsm_ds.sizes import parse_size

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


class TuningRequest(BaseModel):
    """A tuning: the candidates, and how they are measured.

    Attributes:
        run: the run's folder.
        out: the folder of the tuning. An unfinished or finished one of the same run goes on.
        windows: numbers of checkpoints ("8"), or tokens of the newest part of the run ("100B").
        curves: see `WindowRecipe.curve`.
        spreads: see `WindowRecipe.spread`.
        ends: steps at which the windows end; empty: at the newest checkpoint.
        baselines: folders of weights to compare with, by name.
        options: fields of a `WindowRecipe` that all candidates share.
        screening: measures every candidate.
        model: what `build_model` makes the model from; None: the config.json beside the newest checkpoint, which HF
            Trainer saves there.
        rename: see `FillOptions`.
        finals: measure the finalists. The last one that is no check of generation decides; if there is none, the
            screening does.
        finalists: number of the best merges that `finals` measure, besides the newest raw checkpoint and the baselines.
        confirm: measures the recommended candidate and the newest raw checkpoint on data that have chosen nothing.
        budget_s: seconds after which no candidate is begun any more; None: no limit.
        memory_room: bytes for merges that wait in memory for their turn; None: half of what is free.
        disk_room: bytes for exported models; None: no limit.
        keep: which exported models stay; None: the recommended one if there are finalists, else none.
        include: files that exported models need (config.json, tokenizer).
        share: (number, count): this process screens every `count`-th candidate only, from `number` on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    run: Path
    out: Path
    windows: tuple[str, ...] = Field(min_length=1)
    curves: tuple[str, ...] = ("linear",)
    spreads: tuple[str, ...] = ("wsm",)
    ends: tuple[int, ...] = ()
    baselines: dict[str, Path] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    screening: Evaluator
    model: str | None = None
    rename: dict[str, str] = Field(default_factory=dict)
    finals: tuple[Evaluator, ...] = ()
    finalists: int = Field(default=3, ge=1)
    confirm: Evaluator | None = None
    budget_s: float | None = Field(default=None, gt=0)
    memory_room: int | str | None = None
    disk_room: int | str | None = None
    keep: Literal["best", "finalists", "all"] | None = None
    include: tuple[Path, ...] = ()
    share: tuple[int, int] = (0, 1)

    @field_validator("memory_room", "disk_room")
    @classmethod
    def _bytes(cls, value: int | str | None) -> int | None:
        return None if value is None else parse_size(value)

    @field_validator("windows", "curves")
    @classmethod
    def _distinct(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"a value is there twice: {', '.join(values)}")
        return values

    @field_validator("spreads")
    @classmethod
    def _spread_texts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(parse_spread(value)) for value in values))

    @field_validator("baselines")
    @classmethod
    def _baseline_names(cls, values: dict[str, Path]) -> dict[str, Path]:
        for name in values:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"the name {name!r} of a baseline may have letters, digits, '.', '_', '+' and '-' only"
                )
        return values

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        number, count = self.share
        if not 0 <= number < count:
            raise ValueError(f"`share` ({number}/{count}): the number must be from 0 to {count - 1}")
        return self

    @property
    def final(self) -> Evaluator | None:
        """Of `finals`, the one that decides; None: the screening decides."""
        deciding = [one for one in self.finals if not isinstance(one, GenerateEvaluator)]
        return deciding[-1] if deciding else None

    def recipe(self, window: str, curve: str, spread: str, end: int | None) -> WindowRecipe:
        """The recipe of a merge.

        Args:
            window: one of `windows`.
            curve: one of `curves`.
            spread: one of `spreads`.
            end: the step of the newest checkpoint; None: that of the run.

        Raises:
            RecipeError: a value is not valid.
        """
        length = {"last": int(window)} if window.isdecimal() else {"last_tokens": window}
        return make_window_recipe(
            run=self.run,
            curve=curve,
            spread=spread,
            to_step=end,
            **length,
            **self.options,
        )

    def recipe_of_tag(self, tag: str) -> WindowRecipe:
        """The recipe of one checkpoint as it is.

        Args:
            tag: its name.
        """
        kept = {key: value for key, value in self.options.items() if key not in ("floor", "by", "oldest_interval")}
        return make_window_recipe(run=self.run, tags=(tag,), coefficients=(1.0,), **kept)


def make_tuning_request(**values: Any) -> TuningRequest:
    """Returns a validated request.

    Args:
        **values: attributes of `TuningRequest`; None means that the attribute is not set.

    Raises:
        RecipeError: the message names every wrong value.
    """
    set_values = {key: value for key, value in values.items() if value is not None}
    try:
        return TuningRequest(**set_values)
    except ValidationError as error:
        faults = validation_sentences(error, TuningRequest.model_fields)
        raise RecipeError(f"the tuning is not valid: {faults}") from error
