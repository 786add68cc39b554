"""The expected object trees of DeepSpeed's files. They are checked once, when a file is opened.

Only the keys that are read, or rewritten, are described. All other keys (client state, a scheduler's state) may hold
anything.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief, few
from wsm_ds.layouts.saved_names import with_parameter_names
from wsm_ds.torchfile import Tensor, TorchFile, once_per_form, open_torch_file

MOST_ELEMENTS = 1 << 58
Whole = Annotated[int, Field(strict=True, ge=0, le=MOST_ELEMENTS)]
Positive = Annotated[int, Field(strict=True, ge=1, le=MOST_ELEMENTS)]


def _utf8(name: str) -> str:
    name.encode()  # UnicodeEncodeError is a ValueError
    return name


def _of_a_file(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"A shape of at most {MOST_ELEMENTS} elements is expected")
    return shape


Name = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_utf8)]
Shape = Annotated[tuple[Whole, ...], Field(strict=True), AfterValidator(_of_a_file)]
Tensors = list[InstanceOf[Tensor]]
NamedValues = dict[Name, Any]


class _Described(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True)  # type: ignore[misc]


class Group(_Described):
    """An entry of `param_groups`; `params` are numbers of parameters, or of flat tensors."""

    params: list[Whole]


class Base(_Described):
    """The state dict of a torch optimizer."""

    state: dict[Whole, dict[Any, Any]]
    param_groups: list[Group]


class Partitions(_Described):
    """`optimizer_state_dict` of stages 1 and 2 (`runtime/zero/stage_1_and_2.py:3358`), and of BF16_Optimizer
    (`runtime/bf16_optimizer.py:629`)."""

    single_partition_of_fp32_groups: Tensors
    partition_count: list[Positive]
    base_optimizer_state: Base | list[dict[Any, Any]]
    group_paddings: list[Whole]
    param_alignment_paddings: NotRequired[list[list[Whole]] | None]
    param_slice_mappings: NotRequired[list[NamedValues]]


class SubGroups(_Described):
    """`optimizer_state_dict` of stage 3 (`_rigid_state_dict`, `runtime/zero/stage3.py:3431`)."""

    fp32_flat_groups: Tensors
    partition_count: Positive
    optimizer_state_dict: Base


class Flats(_Described):
    """`optimizer` of stage 0 in 16 bits: masters beside the base optimizer's state.

    `fp32_groups_flat` is FP16_Optimizer's (`runtime/fp16/fused_optimizer.py:471`), `fp32_groups`
    FP16_UnfusedOptimizer's (`runtime/fp16/unfused_optimizer.py:355`).
    """

    optimizer_state_dict: Base
    fp32_groups_flat: NotRequired[Tensors]
    fp32_groups: NotRequired[list[Tensors]]


class Counted(_Described):
    """What every model file holds, whatever the stage: `global_steps`, the number of updates."""

    global_steps: Whole


class Model(_Described):
    """A model file of stages 1 to 3 (`_common_checkpoint_state`, `runtime/engine.py:5017`)."""

    dp_world_size: Positive
    param_shapes: list[dict[Name, Shape]]
    global_steps: Whole
    module: NamedValues | None
    mp_world_size: NotRequired[Whole | None]
    buffer_names: NotRequired[list[Name] | None]
    shared_params: NotRequired[dict[Name, Name] | None]
    frozen_param_shapes: NotRequired[dict[Name, Shape] | None]
    frozen_param_fragments: NotRequired[NamedValues | None]
    num_experts: NotRequired[list[Whole] | None]
    ds_version: NotRequired[Any]


class Model0(_Described):
    """The model file of stage 0; its `optimizer` is checked by `zero0.read_optimizer`."""

    dp_world_size: Positive
    global_steps: Whole
    module: NamedValues
    mp_world_size: NotRequired[Whole | None]
    buffer_names: NotRequired[list[Name] | None]


class UniversalState(_Described):
    """`zero/optimizer_state.pt` of a universal checkpoint (`checkpoint/ds_to_universal.py:1004-1022`)."""

    param_groups: list[Group]
    optimizer_state_dict: NotRequired[dict[str, Any] | None]


ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def check(file: TorchFile, tree: Any, expected: Any, where: str = "") -> None:
    """Raises BrokenCheckpoint if `tree` has not the type `expected`; it names the file, the key and the value.

    Args:
        file: the file that holds `tree`.
        tree: a part of the file's object tree.
        expected: one of the types of this module.
        where: keys that lead to `tree` in the file.
    """
    if expected not in ADAPTERS:
        ADAPTERS[expected] = TypeAdapter(expected)
    try:
        ADAPTERS[expected].validate_python(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        sentences = [f"{_key_path(where, f['loc'])}: {f['msg']}, found {brief(f['input'])}" for f in faults[:3]]
        listed = few(sentences, 3, total=len(faults))
        raise BrokenCheckpoint(f"{file.path} is not what DeepSpeed writes: {listed}.") from error


def _key_path(where: str, keys: tuple[int | str, ...]) -> str:
    return ".".join([*([where] if where else []), *(str(key)[:80] for key in keys)]) or "the file"


def open_model(path: Path, allowed_globals: frozenset[str]) -> TorchFile:
    """Opens a model file and check its keys.

    Args:
        path: the file.
        allowed_globals: names of the user's own classes that the file may mention.

    Raises:
        BrokenCheckpoint, UnsafePickle, UnsupportedLayout: the file cannot be read, or is not what DeepSpeed writes.
    """
    return checked_model(open_torch_file(path, allowed_globals))


def checked_model(file: TorchFile) -> TorchFile:
    """Returns a model file whose keys are checked, with the names of `named_parameters()`; raises as `open_model`."""
    tree = _model_tree(file)
    return file if tree is file.tree else replace(file, tree=tree)


@once_per_form
def _model_tree(file: TorchFile) -> Any:
    if is_stage0(file.tree) and file.tree.get("module") is None:
        raise UnsupportedLayout(
            f"{file.path} is of a PipelineModule at ZeRO stage 0 (its weights are in layer_*-model_states.pt), which "
            "this version does not read. Train with ZeRO stage 1, which writes the parameters' names."
        )
    check(file, file.tree, Model0 if is_stage0(file.tree) else Model)
    return with_parameter_names(file).tree


def is_stage0(model: Any) -> bool:
    """Whether a model file is of stage 0: it holds the optimizer and no shapes of partitions."""
    return isinstance(model, dict) and isinstance(model.get("optimizer"), dict) and model.get("param_shapes") is None


def checked_optimizer(file: TorchFile) -> TorchFile:
    """Returns a rank's optimizer file whose keys are checked.

    Args:
        file: the file, opened.

    Raises:
        BrokenCheckpoint, UnsupportedLayout: it is not what DeepSpeed writes.
    """
    _check_optimizer(file)
    return file


@once_per_form
def _check_optimizer(file: TorchFile) -> None:
    state = file.tree.get("optimizer_state_dict") if isinstance(file.tree, dict) else None
    if not isinstance(state, dict):
        raise BrokenCheckpoint(f"{file.path} holds no optimizer_state_dict; DeepSpeed writes one.")
    if "fp32_flat_groups" not in state and "single_partition_of_fp32_groups" not in state:
        raise UnsupportedLayout(f"{file.path} holds neither ZeRO partitions nor sub-groups: {few(map(brief, state))}.")
    check(file, state, SubGroups if "fp32_flat_groups" in state else Partitions, "optimizer_state_dict")


def open_universal_state(path: Path, allowed_globals: frozenset[str]) -> TorchFile:
    """Opens a universal checkpoint's `optimizer_state.pt` and check its keys; arguments and errors as `open_model`."""
    file = open_torch_file(path, allowed_globals)
    check(file, file.tree, UniversalState)
    return file


def checked_weights(file: TorchFile) -> TorchFile:
    """Returns a file of named weights alone (an expert's, a pipeline layer's); its keys are checked.

    Args:
        file: the file, opened.

    Raises:
        BrokenCheckpoint: it is not what DeepSpeed writes.
    """
    _check_weights(file)
    return file


@once_per_form
def _check_weights(file: TorchFile) -> None:
    check(file, file.tree, NamedValues)
