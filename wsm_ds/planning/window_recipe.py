"""Which sum of checkpoints is made: a window and its coefficients. What is made of the sum belongs to `recipe`."""

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator
from typing_extensions import Self, Unpack

from wsm_ds.distributed.launcher import local_world_size
from wsm_ds.errors import RecipeError
from wsm_ds.planning.recipe_errors import check_replacements, validation_sentences
from wsm_ds.planning.recipe_options import Unit, WindowOptions
from wsm_ds.schedules.spread import parse_spread
from wsm_ds.sizes import parse_count, parse_size

Allowance = Literal["warmup", "lr-change", "foreign-files", "negative", "missing-slots"]


class WindowRecipe(BaseModel):
    """One sum of checkpoints: which ones, and with which coefficients.

    The window is chosen in exactly one way: by `last`, `last_tokens` or `last_samples` (up to `to_step`, if that is
    set), by `from_step` with `to_step`, or by `tags`. Counts may be texts as "100B" (`wsm_ds.sizes.parse_count`).

    Attributes:
        run: the run's folder (DeepSpeed's save_dir, or HF Trainer's output_dir).
        last: the newest N complete checkpoints, up to `to_step` if that is set.
        last_tokens: the checkpoints of the newest D tokens, up to `to_step` if that is set. The oldest one stands for
            what is left of D before it.
        last_samples: the same in samples.
        from_step: first step of the window.
        to_step: last step of the window; both ends belong to it.
        tags: checkpoints by name; their steps give the order.
        curve: the decay curve to emulate ("linear", "cosine", "1-sqrt", "power:2", "ema:0.1", …); "linear" if neither
            it nor `coefficients` is given.
        floor: the curve's final rate as a fraction of the peak, 0 to 1.
        spread: how far the coefficients spread around their mean: "wsm" (if not set), "qam" or "maxent", or a dial
            between "wsm" and one of them, as "qam:0.5"; see `wsm_ds.schedules.spread`.
        coefficients: instead of a curve: one number per checkpoint, oldest first, with sum 1.
        by: the unit of the distances between checkpoints, from which the curve makes coefficients: "steps", "samples"
            or "tokens". If not set: that of `last_tokens` or `last_samples`, else steps.
        oldest_interval: the interval before the oldest checkpoint, which it stands for, in the unit of `by`; the median
            interval if not set.
        tokens_per_step: tokens of each step, for a run whose batch never changed.
        sequence_length: tokens of each sample, for a run whose files tell the samples alone.
        top: of the window, only the K checkpoints with the best scores. The curve then takes them as evenly spaced, so
            "linear" is their mean.
        scores: for `top`: a number for each checkpoint of the window, by tag.
        maximize: whether more is better in `scores`.
        data_switch: the last step before the training data changed. The figures then say how much of the merge lies on
            updates after it, and a window across it is warned of.
        tuned: where `wsm-ds tune` has the recipe from; it changes nothing, and the manifest repeats it.
        memory_budget: bytes, or text as "512MiB"; limits all buffers of the merge, in each process.
        threads: workers of each process; if not set, all cores, shared with the other ranks of the machine.
        rename_sources: for older checkpoints of the window whose names differ from those of the newest: by tag (or a
            pattern of tags, with * and ?), regular expressions and their replacements, in order. Names that differ
            only by known wrappers (`torch.compile` and others) are matched without it.
        allow: checks to skip: "warmup" (the window lies inside the warmup), "lr-change" (the rate changes in it),
            "foreign-files" (files of a checkpoint are not of one save), "negative" (`coefficients` may be negative: the
            sum then lies beyond the checkpoints, an extrapolation), "missing-slots" (a slot of the window was not
            written; the one after it stands for its steps, too).
        allow_globals: names of classes in the checkpoints' client state to carry as data; they are not imported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    run: Path
    last: int | None = Field(default=None, ge=1)
    last_tokens: int | str | None = None
    last_samples: int | str | None = None
    from_step: int | None = Field(default=None, ge=0)
    to_step: int | None = Field(default=None, ge=0)
    tags: tuple[str, ...] | None = None
    curve: str | None = None
    floor: float = Field(default=0.0, ge=0.0, le=1.0)
    spread: str | None = None
    coefficients: tuple[float, ...] | None = None
    by: Unit | None = None
    oldest_interval: int | str | None = None
    tokens_per_step: int | str | None = None
    sequence_length: int | None = Field(default=None, ge=1)
    top: int | None = Field(default=None, ge=1)
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)
    maximize: bool = False
    data_switch: int | None = Field(default=None, ge=0)
    tuned: dict[str, Any] | None = None
    memory_budget: int | str = "512MiB"
    threads: int = Field(default_factory=lambda: max(1, len(os.sched_getaffinity(0)) // local_world_size()), ge=1)
    rename_sources: dict[str, dict[str, str]] = Field(default_factory=dict)
    allow: tuple[Allowance, ...] = ()
    allow_globals: tuple[str, ...] = ()

    @property
    def keeps_training_state(self) -> bool:
        """Whether the sum is stored as a checkpoint from which a training continues, in the mode that it was saved."""
        return False

    @property
    def unit(self) -> Unit:
        """The unit of the distances between checkpoints."""
        return self.by or ("tokens" if self.last_tokens else "samples" if self.last_samples else "steps")

    @property
    def newest_counts(self) -> int | None:
        """The length of a window of the newest tokens or samples; None for one that is chosen otherwise."""
        length = self.last_tokens or self.last_samples
        return None if length is None else int(length)

    @field_validator("last_tokens", "last_samples", "oldest_interval", "tokens_per_step")
    @classmethod
    def _counts(cls, value: int | str | None) -> int | None:
        count = None if value is None else parse_count(value)
        if count == 0:
            raise ValueError(f"at least 1 is needed, found {value!r}")
        return count

    @field_validator("spread")
    @classmethod
    def _spread_text(cls, value: str | None) -> str | None:
        spread = parse_spread(value or "wsm")
        return None if spread.kind == "wsm" else str(spread)

    @field_validator("memory_budget")
    @classmethod
    def _budget_bytes(cls, value: int | str) -> int:
        return positive_bytes(value)

    @field_validator("rename_sources")
    @classmethod
    def _source_patterns(cls, value: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        for patterns in value.values():
            check_replacements(patterns)
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_curve(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("curve") is None and values.get("coefficients") is None:
            return values | {"curve": "linear"}
        return values

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        newest = [self.last, self.last_tokens, self.last_samples]
        by_range = self.from_step is not None or (self.to_step is not None and newest == [None] * 3)
        ways = [*(value is not None for value in newest), by_range, self.tags is not None]
        if ways.count(True) != 1:
            settings = self._settings("last", "last_tokens", "last_samples", "from_step", "to_step", "tags")
            raise ValueError(
                "choose the window in exactly one way: `last`, `last_tokens` or `last_samples` (with `to_step`, if it "
                f"does not end at the newest checkpoint), `from_step` with `to_step`, or `tags`; found {settings}"
            )
        if by_range and self.to_step is None:
            raise ValueError("`from_step` needs `to_step`, the last step of the window")
        if by_range and self.from_step is None:
            raise ValueError("`to_step` needs `from_step`, the first step of the window, or `last`")
        if by_range and (self.from_step or 0) > (self.to_step or 0):
            raise ValueError(f"`from_step` ({self.from_step}) is greater than `to_step` ({self.to_step})")
        return self

    @model_validator(mode="after")
    def _check_coefficients(self) -> Self:
        if (self.curve is None) == (self.coefficients is None):
            settings = self._settings("curve", "coefficients")
            raise ValueError(f"give either `curve` or `coefficients`; found {settings}")
        if self.coefficients is not None and self.floor:
            raise ValueError(
                f"`floor` ({self.floor}) belongs to a curve, and `coefficients` are used as they are; remove one"
            )
        if self.coefficients is not None and (self.spread or self.top):
            raise ValueError(
                f"{self._settings('spread', 'top')} belongs to a curve, and `coefficients` are used as they are; "
                "remove one"
            )
        negative = next((c for c in self.coefficients or () if c < 0.0), None)
        if negative is not None and "negative" not in self.allow:
            raise ValueError(
                f"`coefficients` must not be negative, found {negative}: the sum would lie beyond the checkpoints. If "
                "you want to extrapolate, allow it (--allow negative)"
            )
        return self

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.tokens_per_step is not None and self.sequence_length is not None:
            both = self._settings("tokens_per_step", "sequence_length")
            raise ValueError(f"{both}: each says how many tokens there are; remove one")
        if self.newest_counts is not None and self.oldest_interval is not None:
            raise ValueError(
                f"`oldest_interval` ({self.oldest_interval}) is what is left of the window's length before the oldest "
                "checkpoint, if that length is given by `last_tokens` or `last_samples`; remove one"
            )
        own_unit = "tokens" if self.last_tokens else "samples"
        if self.newest_counts is not None and self.unit != own_unit:
            raise ValueError(
                f"a window that is given in {own_unit} has its distances in {own_unit}; remove `by` ({self.by})"
            )
        return self

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if (self.top is None) != (not self.scores):
            raise ValueError(
                "`top` needs `scores`, a number for each checkpoint, and `scores` needs `top`; found "
                f"{self._settings('top')} and {len(self.scores)} scores"
            )
        if self.top is not None and (self.by or self.oldest_interval):
            raise ValueError(
                "`top` takes the chosen checkpoints as evenly spaced, so the distances do not count; remove "
                f"{self._settings('by', 'oldest_interval')}"
            )
        return self

    def _settings(self, *keys: str) -> str:
        """The keys that are set, with their values, for an error message."""
        values = {key: getattr(self, key) for key in keys}
        return ", ".join(f"`{key}`={value}" for key, value in values.items() if value is not None) or "none of them"


def positive_bytes(value: int | str) -> int:
    """A number of bytes, see `parse_size`.

    Raises:
        ValueError: it is no number of bytes, or less than one.
    """
    nbytes = parse_size(value)
    if nbytes < 1:
        raise ValueError(f"at least one byte is needed, found {value!r}")
    return nbytes


AnyRecipe = TypeVar("AnyRecipe", bound=WindowRecipe)


def validated(kind: type[AnyRecipe], values: dict[str, Any]) -> AnyRecipe:
    """Returns a recipe of a class.

    Args:
        kind: the class.
        values: its attributes; None means that the attribute is not set.

    Raises:
        RecipeError: the message names every wrong key, its value, and what is expected.
    """
    set_values = {key: value for key, value in values.items() if value is not None}
    try:
        return kind(**set_values)
    except ValidationError as error:
        faults = validation_sentences(error, kind.model_fields)
        raise RecipeError(f"the recipe is not valid: {faults}") from error


def make_window_recipe(**values: Unpack[WindowOptions]) -> WindowRecipe:
    """Returns a validated recipe of a sum.

    Args:
        **values: attributes of `WindowRecipe`; None means that the attribute is not set.

    Raises:
        RecipeError: the message names every wrong key, its value, and what is expected.
    """
    return validated(WindowRecipe, dict(values))
