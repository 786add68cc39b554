"""Which sum of checkpoints is made: a window and its coefficients. What is made of the sum belongs to `recipe`."""

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self, Unpack

from wsm_ds.distributed.launcher import local_world_size
from wsm_ds.errors import RecipeError
from wsm_ds.planning.recipe_errors import check_replacements, validation_sentences
from wsm_ds.planning.recipe_options import WindowOptions
from wsm_ds.sizes import parse_size

Allowance = Literal["warmup", "lr-change", "foreign-files"]


class WindowRecipe(BaseModel):
    """One sum of checkpoints: which ones, and with which coefficients.

    The window is chosen in exactly one way: by `last` (up to `to_step`, if that is set), by `from_step` with `to_step`,
    or by `tags`.

    Attributes:
        run: the run's folder (DeepSpeed's save_dir, or HF Trainer's output_dir).
        last: the newest N complete checkpoints, up to `to_step` if that is set.
        from_step: first step of the window.
        to_step: last step of the window; both ends belong to it.
        tags: checkpoints by name; their steps give the order.
        curve: the decay curve to emulate ("linear", "cosine", "1-sqrt", "power:2", "ema:0.1", …); "linear" if neither
            it nor `coefficients` is given.
        floor: the curve's final rate as a fraction of the peak, 0 to 1.
        coefficients: instead of a curve: one number per checkpoint, oldest first, with sum 1.
        oldest_interval: steps of the interval before the oldest checkpoint, which it stands for; the median interval if
            not set.
        memory_budget: bytes, or text as "512MiB"; limits all buffers of the merge, in each process.
        threads: workers of each process; if not set, all cores, shared with the other ranks of the machine.
        rename_sources: for older checkpoints of the window whose names differ from those of the newest: by tag (or a
            pattern of tags, with * and ?), regular expressions and their replacements, in order. Names that differ
            only by known wrappers (`torch.compile` and others) are matched without it.
        allow: checks to skip: "warmup" (the window lies inside the warmup), "lr-change" (the rate changes in it),
            "foreign-files" (files of a checkpoint are not of one save).
        allow_globals: names of classes in the checkpoints' client state to carry as data; they are not imported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    run: Path
    last: int | None = Field(default=None, ge=1)
    from_step: int | None = Field(default=None, ge=0)
    to_step: int | None = Field(default=None, ge=0)
    tags: tuple[str, ...] | None = None
    curve: str | None = None
    floor: float = Field(default=0.0, ge=0.0, le=1.0)
    coefficients: tuple[float, ...] | None = None
    oldest_interval: int | None = Field(default=None, ge=1)
    memory_budget: int | str = "512MiB"
    threads: int = Field(default_factory=lambda: max(1, len(os.sched_getaffinity(0)) // local_world_size()), ge=1)
    rename_sources: dict[str, dict[str, str]] = Field(default_factory=dict)
    allow: tuple[Allowance, ...] = ()
    allow_globals: tuple[str, ...] = ()

    @property
    def keeps_training_state(self) -> bool:
        """Whether the sum is stored as a checkpoint from which a training continues, in the mode that it was saved."""
        return False

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
        by_range = self.from_step is not None or (self.to_step is not None and self.last is None)
        if [self.last is not None, by_range, self.tags is not None].count(True) != 1:
            settings = self._settings("last", "from_step", "to_step", "tags")
            raise ValueError(
                "choose the window in exactly one way: `last` (with `to_step`, if it does not end at the newest "
                f"checkpoint), `from_step` with `to_step`, or `tags`; found {settings}"
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
