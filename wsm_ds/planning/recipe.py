"""What the user asks for: which checkpoints, which curve, what to write. Validated, from flags or YAML."""

import os
import re
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Unpack

from wsm_ds.distributed.launcher import local_world_size
from wsm_ds.errors import RecipeError
from wsm_ds.filesystem.small_files import read_small
from wsm_ds.planning.recipe_options import RecipeOptions, SweepOptions
from wsm_ds.sizes import parse_size

Allowance = Literal["warmup", "lr-change"]
MOST_RANKS = 1 << 17
"""Of an output: more than any cluster has, and what a mistyped number must not exceed."""
MOST_OUTPUTS = 1000
"""Of one recipe, whose lists multiply."""


class MergeRecipe(BaseModel):
    """One merge. Exactly one of `last` (up to `to_step`, if given), `from_step` with `to_step`, and `tags` chooses the
    window.

    Attributes:
        run: the run's folder (DeepSpeed's save_dir, or HF Trainer's output_dir).
        last: the newest N complete checkpoints, up to `to_step` if that is given.
        from_step, to_step: all checkpoints with steps in this closed range.
        tags: checkpoints by name; their steps give the order.
        curve: the decay curve to emulate ("linear", "cosine", "1-sqrt", "power:2", "ema:0.1", …); "linear" if neither
            it nor `coefficients` is given.
        floor: the curve's final rate as a fraction of the peak, 0 to 1.
        coefficients: instead of a curve: one number a checkpoint, oldest first, summing to 1.
        oldest_interval: steps that the oldest checkpoint stands for; the median interval if not given.
        out: the folder to make. It must not exist.
        format: "zero" (DeepSpeed loads it), "universal" (at any stage and world size, if told to) or "safetensors".
        dtype: of the parameters in safetensors; the training dtype if not given.
        optimizer_states: "carry" those of the newest, "merge" them alike, or "drop" them (zero only).
        world_size, stage, sub_group_size: of a zero output; those of the newest checkpoint if not given.
        like: the folder of a checkpoint, RUN/TAG, whose form a zero output takes.
        memory_budget: bytes, or "512MiB"; holds all buffers of the merge, in each process.
        threads: workers of each process; all cores, shared with the other ranks of the machine, if not given.
        max_shard_size: of a safetensors file.
        rename: for safetensors: regular expressions and what replaces them in every name, applied in order.
        include: files to copy beside the output (config.json, tokenizer files); what HF Trainer keeps beside the
            newest checkpoint is copied without being asked for, except weights.
        allow: checks to pass over: "warmup" (a window inside the warmup), "lr-change".
        allow_globals: names of classes in the checkpoints' client state to carry along as data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    run: Path
    out: Path
    last: int | None = Field(default=None, ge=1)
    from_step: int | None = Field(default=None, ge=0)
    to_step: int | None = Field(default=None, ge=0)
    tags: tuple[str, ...] | None = None
    curve: str | None = None
    floor: float = Field(default=0.0, ge=0.0, le=1.0)
    coefficients: tuple[float, ...] | None = None
    oldest_interval: int | None = Field(default=None, ge=1)
    format: Literal["zero", "universal", "safetensors"] = "zero"
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    optimizer_states: Literal["carry", "merge", "drop"] = "carry"
    world_size: int | None = Field(default=None, ge=1, le=MOST_RANKS)
    stage: Literal[1, 2, 3] | None = None
    sub_group_size: int | None = Field(default=None, ge=1)
    like: Path | None = None
    memory_budget: int | str = "512MiB"
    threads: int = Field(default_factory=lambda: max(1, len(os.sched_getaffinity(0)) // local_world_size()), ge=1)
    max_shard_size: int | str = "5GB"
    rename: dict[str, str] = Field(default_factory=dict)
    include: tuple[Path, ...] = ()
    allow: tuple[Allowance, ...] = ()
    allow_globals: tuple[str, ...] = ()

    @field_validator("memory_budget", "max_shard_size")
    @classmethod
    def _bytes(cls, value: int | str) -> int:
        nbytes = parse_size(value)
        if nbytes < 1:
            raise ValueError("must be at least one byte")
        return nbytes

    @field_validator("rename")
    @classmethod
    def _patterns(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, replacement in value.items():
            try:
                re.compile(pattern)
                re.sub(pattern, replacement, "")
            except re.error as error:
                raise ValueError(f"{pattern!r} → {replacement!r} is not a regular expression: {error}") from error
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_curve(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("curve") is None and values.get("coefficients") is None:
            return values | {"curve": "linear"}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "MergeRecipe":
        by_range = self.from_step is not None or (self.to_step is not None and self.last is None)
        if [self.last is not None, by_range, self.tags is not None].count(True) != 1:
            raise ValueError("choose the window by exactly one of: last (and to_step), from_step with to_step, tags")
        if by_range and (self.from_step is None or self.to_step is None or self.from_step > self.to_step):
            raise ValueError("from_step and to_step go together, from_step <= to_step")
        if (self.curve is None) == (self.coefficients is None):
            raise ValueError("give either a curve or coefficients")
        if self.coefficients is not None and self.floor:
            raise ValueError("floor belongs to a curve; coefficients are taken as they are")
        if self.dtype is not None and self.format != "safetensors":
            raise ValueError(f"dtype is for safetensors; a {self.format} output keeps the run's precision")
        shape = [self.world_size, self.stage, self.sub_group_size]
        if self.format != "zero" and (self.like is not None or any(value is not None for value in shape)):
            raise ValueError("world_size, stage, sub_group_size and like are for zero outputs")
        if self.like is not None and any(value is not None for value in shape):
            raise ValueError("like decides world_size, stage and sub_group_size; give one or the other")
        if self.rename and self.format != "safetensors":
            raise ValueError(f"rename is for safetensors; a {self.format} output keeps the run's names")
        if self.optimizer_states != "carry" and self.format == "safetensors":
            raise ValueError("optimizer_states is for zero; safetensors holds no optimizer states")
        if self.optimizer_states == "drop" and self.format == "universal":
            raise ValueError("a universal checkpoint without optimizer states is not loaded by DeepSpeed; keep them")
        return self


def make_recipe(**values: Unpack[RecipeOptions]) -> MergeRecipe:
    """A validated recipe; None means not given.

    Raises:
        RecipeError: with every fault that was found.
    """
    given: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    try:
        return MergeRecipe(**given)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise RecipeError("the recipe is not valid: " + "; ".join(faults)) from error


SWEPT = {"last": "last{}", "to_step": "to{}", "curve": "{}", "floor": "floor{}", "format": "{}"}
"""What may be a list of values, one output each, and what the output's folder is then called."""


def make_recipes(*, named: Collection[str] = (), **values: Unpack[SweepOptions]) -> tuple[MergeRecipe, ...]:
    """The recipes of several outputs of one pass: every combination of the lists, for every entry of `outputs`.

    An entry of `outputs` counts before the common values; its `out` lies below the common one. Where a list has more
    than one value, outputs are folders below `out`, called after their values (`last8-1-sqrt`).

    Args:
        named: of SWEPT, what a folder is called after even if it has one value, unless the entry has an `out`.
        values: those of a recipe file.

    Raises:
        RecipeError: with every fault that was found.
    """
    common: dict[str, Any] = {key: value for key, value in values.items() if value is not None and key != "outputs"}
    entries = [{}] if values.get("outputs") is None else values["outputs"]
    if not isinstance(entries, list | tuple) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError("the recipe is not valid: outputs: a list of mappings is needed")
    for mapping in (common, *entries):
        if not isinstance(mapping.get("out", ""), str | os.PathLike):
            raise RecipeError("the recipe is not valid: out: the path of a folder is needed")
    recipes: list[MergeRecipe] = []
    for entry in entries:
        own = common | entry
        if "out" in entry and "out" in common:
            own["out"] = Path(common["out"]) / entry["out"]
        for chosen in _combinations(own, () if "out" in entry else named):
            recipes.append(make_recipe(**chosen))
            if len(recipes) > MOST_OUTPUTS:
                raise RecipeError(f"the recipe is not valid: it has more than {MOST_OUTPUTS} outputs")
    return tuple(recipes)


def _combinations(values: dict[str, Any], named: Collection[str]) -> Iterator[dict[str, Any]]:
    lists = {name: list(values[name]) for name in SWEPT if isinstance(values.get(name), list | tuple)}
    lists |= {name: [values[name]] for name in SWEPT if name in named and name in values and name not in lists}
    for name, found in lists.items():
        if not all(isinstance(value, str | int | float) for value in found):
            raise RecipeError(f"the recipe is not valid: {name}: a list of plain values is needed")
        if not found or len(set(map(str, found))) < len(found):
            raise RecipeError(f"the recipe is not valid: {name}: an empty list, or a value twice")
    for combination in product(*lists.values()):
        chosen = dict(zip(lists, combination, strict=True))
        is_named = {name: name in named or len(found) > 1 for name, found in lists.items()}
        words = [SWEPT[name].format(chosen[name]) for name in SWEPT if is_named.get(name)]
        folder = re.sub(r"[^\w.=-]+", "-", "-".join(words))
        out = values.get("out")
        yield values | chosen | ({"out": Path(out) / folder} if out is not None and folder else {})


def load_recipes(path: str | os.PathLike[str], **overrides: Unpack[SweepOptions]) -> tuple[MergeRecipe, ...]:
    """Recipes from a YAML file, see `make_recipes`; `overrides` that are not None count instead of the file's values.

    Raises:
        RecipeError: the file is missing, not a mapping, or not a valid recipe.
    """
    return make_recipes(**load_values(path, **overrides))


def load_values(path: str | os.PathLike[str], **overrides: Unpack[SweepOptions]) -> dict[str, Any]:
    """The values for `make_recipes` of a YAML file.

    Raises:
        RecipeError: the file is missing, not a mapping, or names what a recipe does not have.
    """
    import yaml

    try:
        values = yaml.safe_load(read_small(Path(path)))
    except Exception as error:  # safe_load raises nearly anything for what its tags do not fit
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} is not a mapping of names to values.")
    known = {*MergeRecipe.model_fields, "outputs"}
    entries = values.get("outputs")
    given = (
        [values, *(entry for entry in entries or () if isinstance(entry, dict))]
        if isinstance(entries, list)
        else [values]
    )
    unknown = sorted({str(key) for mapping in given for key in mapping} - known)
    if unknown:
        raise RecipeError(f"the recipe {path} has unknown names {unknown}; known are {sorted(known)}.")
    return values | {key: value for key, value in overrides.items() if value is not None}


def load_recipe(path: str | os.PathLike[str], **overrides: Unpack[RecipeOptions]) -> MergeRecipe:
    """The recipe of a YAML file that has one output; see `load_recipes`."""
    recipes = load_recipes(path, **overrides)
    if len(recipes) > 1:
        raise RecipeError(f"the recipe {path} has {len(recipes)} outputs; one is wanted here.")
    return recipes[0]
