"""The keywords of `merge`, `export`, `reshard` and `make_recipe(s)`, for type checkers and editors.

`MergeRecipe` and its base `WindowRecipe` document and validate the options. None means that an option is not set. A
test compares the names with theirs.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

Format = Literal["zero", "universal", "safetensors"]
Unit = Literal["steps", "samples", "tokens"]
UNITS: tuple[Unit, ...] = ("steps", "samples", "tokens")
StrPath = str | os.PathLike[str]


class _ReadOptions(TypedDict, total=False):
    allow: Sequence[Literal["warmup", "lr-change", "foreign-files", "negative", "missing-slots"]] | None
    allow_globals: Sequence[str] | None
    memory_budget: int | str | None
    threads: int | None


class _SumOptions(_ReadOptions, total=False):
    run: StrPath
    from_step: int | None
    tags: Sequence[str] | None
    coefficients: Sequence[float] | None
    oldest_interval: int | str | None
    by: Unit | None
    tokens_per_step: int | str | None
    sequence_length: int | None
    scores: Mapping[str, float] | None
    maximize: bool | None
    data_switch: int | None
    tuned: Mapping[str, Any] | None
    rename_sources: Mapping[str, Mapping[str, str]] | None


class WindowOptions(_SumOptions, total=False):
    """Options of one sum of checkpoints: the fields of `WindowRecipe`."""

    last: int | None
    last_tokens: int | str | None
    last_samples: int | str | None
    to_step: int | None
    top: int | None
    curve: str | None
    floor: float | None
    spread: str | None


class _WorkOptions(_ReadOptions, total=False):
    include: Sequence[StrPath] | None


class ExportOptions(_WorkOptions, total=False):
    """Options of a safetensors output."""

    dtype: Literal["bf16", "fp16", "fp32"] | None
    max_shard_size: int | str | None
    rename: Mapping[str, str] | None


class _FormOptions(_WorkOptions, total=False):
    optimizer_states: Literal["carry", "merge", "drop"] | None
    world_size: int | None
    stage: int | None
    sub_group_size: int | None
    like: StrPath | None


class ReshardOptions(_FormOptions, total=False):
    """Options of an output that DeepSpeed loads."""

    format: Literal["zero", "universal"] | None


class CheckpointOptions(ExportOptions, _FormOptions, total=False):
    """Options of one checkpoint in any format."""

    format: Format | None


class _MergeOptions(ExportOptions, _FormOptions, _SumOptions, total=False):
    out: StrPath
    carry_from: StrPath | None


class RecipeOptions(_MergeOptions, WindowOptions, total=False):
    """Options of one merge: the fields of `MergeRecipe`."""

    format: Format | None


class SweepOptions(_MergeOptions, total=False):
    """Options of several merges: each value of a list makes an output."""

    last: int | Sequence[int] | None
    last_tokens: int | str | Sequence[int | str] | None
    last_samples: int | str | Sequence[int | str] | None
    to_step: int | Sequence[int] | None
    top: int | Sequence[int] | None
    curve: str | Sequence[str] | None
    floor: float | Sequence[float] | None
    spread: str | Sequence[str] | None
    format: Format | Sequence[Format] | None
    outputs: Sequence[Mapping[str, Any]] | None
