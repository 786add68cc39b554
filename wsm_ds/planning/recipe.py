"""Recipes: which checkpoints are merged, with which coefficients, into what. Validates flags and YAML files."""

import os
import re
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self, Unpack

from wsm_ds.errors import RecipeError, brief, few
from wsm_ds.planning.recipe_errors import check_replacements, unknown_key
from wsm_ds.planning.recipe_file import read_yaml
from wsm_ds.planning.recipe_options import CheckpointOptions, RecipeOptions, StrPath, SweepOptions
from wsm_ds.planning.window_recipe import WindowRecipe, positive_bytes, validated

MAX_RANKS = 1 << 17
"""Most ranks of an output, more than any cluster has, so that a mistyped number does not fill the memory."""
MAX_OUTPUTS = 1000
"""Most outputs of one recipe, so that a mistyped list does not fill the memory: the lengths of lists multiply."""


class MergeRecipe(WindowRecipe):
    """One merge: which sum of checkpoints, see `WindowRecipe`, and what to write.

    Attributes:
        out: the folder to make. It must not exist.
        format: "zero" (DeepSpeed loads it), "universal" (DeepSpeed loads it at any stage and world size, with
            `load_universal` in its config) or "safetensors".
        dtype: dtype of the parameters in safetensors; the training dtype if not set.
        optimizer_states: "carry" those of the newest checkpoint, "merge" them with the same coefficients, or "drop"
            them (format zero only).
        world_size: data-parallel ranks of a zero output; those of the newest checkpoint if not set.
        stage: ZeRO stage of a zero output; that of the newest checkpoint if not set.
        sub_group_size: stage 3's sub_group_size of a zero output, in elements; that of the newest if not set.
        like: a checkpoint's folder, RUN/TAG: a zero output takes its stage, world size and sub_group_size.
        carry_from: RUN or RUN/TAG: the window gives the masters, and this full checkpoint all else (frozen weights,
            buffers, optimizer states, counters, client state). Of a run, it is the checkpoint of the window's last
            step. A merge of snapshots into a checkpoint needs it.
        max_shard_size: bytes of a safetensors file, or text as "5GB".
        rename: for safetensors: regular expressions and their replacements, applied to every name, in order.
        include: files to copy into the output's root (config.json, tokenizer files). The files that HF Trainer keeps
            beside the newest checkpoint are always copied, except weights.
    """

    out: Path
    format: Literal["zero", "universal", "safetensors"] = "zero"
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    optimizer_states: Literal["carry", "merge", "drop"] = "carry"
    world_size: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    stage: Literal[1, 2, 3] | None = None
    sub_group_size: int | None = Field(default=None, ge=1)
    like: Path | None = None
    carry_from: Path | None = None
    max_shard_size: int | str = "5GB"
    rename: dict[str, str] = Field(default_factory=dict)
    include: tuple[Path, ...] = ()

    @property
    def keeps_training_state(self) -> bool:
        """Whether the output is a checkpoint from which a training continues, and no file of weights alone."""
        return self.format != "safetensors"

    @field_validator("max_shard_size")
    @classmethod
    def _shard_bytes(cls, value: int | str) -> int:
        return positive_bytes(value)

    @field_validator("rename")
    @classmethod
    def _rename_patterns(cls, value: dict[str, str]) -> dict[str, str]:
        check_replacements(value)
        return value

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if self.format != "safetensors":
            if self.dtype is not None:
                raise ValueError(
                    f"`dtype` ({self.dtype}) is for safetensors, a {self.format} output keeps the run's precision; "
                    "remove it, or set `format` to safetensors"
                )
            if self.rename:
                raise ValueError(
                    f"`rename` is for safetensors, a {self.format} output keeps the run's names; remove it, or set "
                    "`format` to safetensors"
                )
        if self.optimizer_states != "carry" and self.format == "safetensors":
            raise ValueError(
                f"`optimizer_states` ({self.optimizer_states}) is for outputs that DeepSpeed loads, safetensors "
                "hold no optimizer states; remove it"
            )
        if self.optimizer_states == "drop" and self.format == "universal":
            raise ValueError(
                "`optimizer_states` (drop) is for zero outputs: DeepSpeed does not load a universal checkpoint without "
                "optimizer states; carry or merge them"
            )
        return self

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.optimizer_states == "merge" and any(c < 0.0 for c in self.coefficients or ()):
            raise ValueError(
                "`optimizer_states` (merge) with negative `coefficients` could give negative second moments, of which "
                "the optimizer takes the root; carry or drop them"
            )
        return self

    @model_validator(mode="after")
    def _check_carried(self) -> Self:
        if self.carry_from is not None and self.format == "safetensors":
            raise ValueError(
                f"`carry_from` ({self.carry_from}) is for outputs that DeepSpeed loads, safetensors hold weights "
                "alone; remove it"
            )
        if self.carry_from is not None and self.optimizer_states == "merge":
            raise ValueError(
                f"`carry_from` ({self.carry_from}) gives the optimizer states of one checkpoint; carry or drop them, "
                "found `optimizer_states`=merge"
            )
        return self

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        form = self._settings("world_size", "stage", "sub_group_size")
        has_form = form != "none of them"
        if self.format != "zero" and (self.like is not None or has_form):
            raise ValueError(
                "`world_size`, `stage`, `sub_group_size` and `like` are for zero outputs; found "
                f"{self._settings('world_size', 'stage', 'sub_group_size', 'like')} with `format` {self.format}"
            )
        if self.like is not None and has_form:
            raise ValueError(
                f"`like` ({self.like}) decides `world_size`, `stage` and `sub_group_size`; found {form}; give one "
                "or the other"
            )
        return self


def make_recipe(**values: Unpack[RecipeOptions]) -> MergeRecipe:
    """Returns a validated recipe.

    Args:
        **values: attributes of `MergeRecipe`; None means that the attribute is not set.

    Raises:
        RecipeError: the message names every wrong key, its value, and what is expected.
    """
    return validated(MergeRecipe, dict(values))


def one_recipe(
    run: StrPath, *, out: StrPath, tag: str | None = None, **options: Unpack[CheckpointOptions]
) -> MergeRecipe:
    """The recipe that writes one checkpoint again, in another format or form.

    Args:
        run: the run's folder.
        out: the folder to make; it must not exist.
        tag: the checkpoint's name; None: the newest complete one.
        options: what the output is, see `MergeRecipe`.

    Raises:
        RecipeError: see `make_recipe`.
    """
    foreign = (options.keys() & MergeRecipe.model_fields.keys()) - CheckpointOptions.__annotations__.keys()
    if foreign:
        keys = few(f"`{key}`" for key in sorted(foreign))
        raise RecipeError(f"{keys} is an option of merge; here one checkpoint is written.")
    window: dict[str, Any] = {"tags": (tag,)} if tag else {"last": 1}
    return make_recipe(run=run, out=out, coefficients=(1.0,), **window, **options)


SWEPT = {
    "last": "last{}", "last_tokens": "last{}-tokens", "last_samples": "last{}-samples", "to_step": "to{}",
    "top": "top{}", "curve": "{}", "floor": "floor{}", "spread": "{}", "format": "{}",
}  # fmt: skip
"""Keys that may have a list of values, one output per value, and the word in the output's folder name."""


def make_recipes(*, always_named: Collection[str] = (), **values: Unpack[SweepOptions]) -> tuple[MergeRecipe, ...]:
    """Returns the recipes of several outputs of one pass.

    There is a recipe for every combination of the lists, in every entry of `outputs`. An entry's values override the
    common ones; its `out` lies below the common `out`. Where a list has more than one value, the outputs are folders
    below `out`, named after their values.

    >>> recipes = make_recipes(run="run", out="merged", last=[4, 8], curve="1-sqrt")
    >>> [str(recipe.out) for recipe in recipes]
    ['merged/last4', 'merged/last8']

    Args:
        always_named: keys that may be lists and always appear in the folder name, also when they have a single
            value. Ignored for entries with their own `out`.
        **values: attributes of `MergeRecipe`; `last`, `last_tokens`, `last_samples`, `to_step`, `top`,
            `curve`, `floor`, `spread` and `format` may be lists. `outputs` is a list of mappings of the same.

    Raises:
        RecipeError: the message names every wrong key, its value, and what is expected.
    """
    common: dict[str, Any] = {key: value for key, value in values.items() if value is not None and key != "outputs"}
    entries = [{}] if values.get("outputs") is None else values["outputs"]
    if not isinstance(entries, list | tuple) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"the recipe is not valid: `outputs`: a list of mappings is needed, found {brief(entries)}")
    for mapping in (common, *entries):
        if not isinstance(mapping.get("out", ""), str | os.PathLike):
            raise RecipeError(
                f"the recipe is not valid: `out`: the path of a folder is needed, found {brief(mapping['out'])}"
            )
    recipes: list[MergeRecipe] = []
    for number, entry in enumerate(entries, 1 if values.get("outputs") else 0):
        merged = common | entry
        if "out" in entry and "out" in common:
            merged["out"] = Path(common["out"]) / entry["out"]
        for combination in _combinations(merged, () if "out" in entry else always_named):
            recipes.append(_recipe_of_entry(number, combination))
            if len(recipes) > MAX_OUTPUTS:
                raise RecipeError(
                    f"the recipe is not valid: its lists make more than {MAX_OUTPUTS} outputs; shorten them, or split "
                    "the recipe"
                )
    return tuple(recipes)


def _recipe_of_entry(number: int, values: dict[str, Any]) -> MergeRecipe:
    """The recipe of entry number 1, 2, ... of `outputs`, which an error names; 0 if there are no entries."""
    try:
        return make_recipe(**values)
    except RecipeError as error:
        prefix = "the recipe is not valid: "
        raise RecipeError(prefix + _entry_words(number) + str(error).removeprefix(prefix)) from error


def _combinations(values: dict[str, Any], always_named: Collection[str]) -> Iterator[dict[str, Any]]:
    """The values of a recipe for every combination of the lists in `values`."""
    lists = {key: list(values[key]) for key in SWEPT if isinstance(values.get(key), list | tuple)}
    lists |= {key: [values[key]] for key in SWEPT if key in always_named and key in values and key not in lists}
    for key, options in lists.items():
        if not all(isinstance(value, str | int | float) for value in options):
            kinds = few(brief(value) for value in options)
            raise RecipeError(f"the recipe is not valid: `{key}`: a list of plain values is needed, found {kinds}")
        if not options or len(set(map(str, options))) < len(options):
            raise RecipeError(
                f"the recipe is not valid: `{key}`: the list is empty or has a value twice, found [{few(options)}]"
            )
    for combination in product(*lists.values()):
        value_of = dict(zip(lists, combination, strict=True))
        is_named = {key: key in always_named or len(options) > 1 for key, options in lists.items()}
        words = [SWEPT[key].format(value_of[key]) for key in SWEPT if is_named.get(key)]
        folder = re.sub(r"[^\w.=-]+", "-", "-".join(words))
        out = values.get("out")
        yield values | value_of | ({"out": Path(out) / folder} if out is not None and folder else {})


def load_recipes(path: StrPath, **overrides: Unpack[SweepOptions]) -> tuple[MergeRecipe, ...]:
    """Reads recipes from a YAML file, see `make_recipes`.

    Args:
        path: the file.
        **overrides: values that replace those of the file, where they are not None.

    Raises:
        RecipeError: the file cannot be read, is not a mapping, or is not a valid recipe.
    """
    return make_recipes(**load_values(path, **overrides))


def load_values(path: StrPath, **overrides: Unpack[SweepOptions]) -> dict[str, Any]:
    """Reads the values for `make_recipes` from a YAML file.

    Args:
        path: the file.
        **overrides: values that replace those of the file, where they are not None.

    Raises:
        RecipeError: the file cannot be read, is not a mapping, or has a key that no recipe has; or an entry of its
            `outputs` sets a key of `overrides`, which would be ignored.
    """
    values = read_yaml(Path(path))
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} is not a mapping of keys to values, but {brief(values)}.")
    entries = values.get("outputs")
    mappings = [values]
    if isinstance(entries, list):
        mappings += [entry for entry in entries if isinstance(entry, dict)]
    known = {*MergeRecipe.model_fields, "outputs"}
    unknown = [(str(key), number) for number, mapping in enumerate(mappings) for key in mapping if key not in known]
    if unknown:
        faults = "; ".join(f"{_entry_words(number)}{unknown_key(key, known)}" for key, number in sorted(unknown))
        raise RecipeError(f"the recipe {path} is not valid: {faults}")
    flags = {key: value for key, value in overrides.items() if value is not None}
    for number, entry in enumerate(mappings[1:]):
        # An entry's `out` lies below the common one, so it does not replace it.
        for key in sorted((flags.keys() & entry.keys()) - {"out"}):
            raise RecipeError(
                f"`{key}` is set here ({_shown(flags[key])}), and by outputs[{number}] of the recipe {path} "
                f"({_shown(entry[key])}); remove one."
            )
    return values | flags


def _entry_words(number: int) -> str:
    """The beginning of a message about entry number 1, 2, ... of `outputs`; "" for number 0, the common values."""
    return f"outputs[{number - 1}]: " if number else ""


def _shown(value: Any) -> str:
    return few(map(str, value)) if isinstance(value, list | tuple) else str(value)


def load_recipe(path: StrPath, **overrides: Unpack[RecipeOptions]) -> MergeRecipe:
    """Reads the recipe of a YAML file that has one output.

    Args:
        path: the file.
        **overrides: values that replace those of the file, where they are not None.

    Raises:
        RecipeError: see `load_recipes`; or the file has several outputs.
    """
    recipes = load_recipes(path, **overrides)
    if len(recipes) > 1:
        raise RecipeError(f"the recipe {path} has {len(recipes)} outputs, expected one; use load_recipes.")
    return recipes[0]
