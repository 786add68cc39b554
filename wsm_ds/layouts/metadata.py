"""The model as a model file describes it: names, shapes, dtypes and roles of its tensors, and tied names.

The keys are those of `_common_checkpoint_state` (`runtime/engine.py:5017`).
"""

from dataclasses import dataclass
from typing import Any

from wsm_ds.dtypes import BY_NAME, DType
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts.entries import Entries, entries_of
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.layouts.moe import NO_EXPERTS, Experts
from wsm_ds.layouts.rank_files import WeightsFile
from wsm_ds.layouts.snapshot import SNAPSHOT
from wsm_ds.torchfile import Tensor, TorchFile
from wsm_ds.torchfile.strides import dense_axes


def model_parallel_size(model: Any) -> int:
    """Ranks that hold one replica of the model together: tensor-parallel ranks times pipeline stages."""
    return int(model.get("mp_world_size") or 1)


def module_of(model_file: TorchFile, extra_weights: tuple[WeightsFile, ...]) -> dict[str, Any]:
    """Every tensor of the module by name, from all files that hold weights.

    Args:
        model_file: a model file of the rank. That of a pipeline holds no weights.
        extra_weights: the rank's files of experts or of pipeline layers.
    """
    module = dict(model_file.tree["module"] or {})
    for weights in extra_weights:
        module |= weights.tensors
    return module


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model, as its files describe them.

    Attributes:
        tensors: parameters in the order of `param_shapes`, which is the order of partitions (`_get_zero_param_shapes`,
            `runtime/engine.py:5448`), then frozen ones and buffers in the module's order.
        aliases: tied names, with the name in `tensors`.
        extra_states, opaque: as in `Layout`.
    """

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    extra_states: tuple[str, ...]
    opaque: dict[str, str]


def tensors_of(
    model_file: TorchFile, module: dict[str, Any], shared_params: dict[str, str], experts: Experts = NO_EXPERTS
) -> ModelTensors:
    """Describes every tensor of a model of ZeRO stages 1 to 3.

    Args:
        model_file: a model file of the rank.
        module: its weights, as `module_of` gives them.
        shared_params: tied names and their owners, as the first model file of the checkpoint says.
        experts: the checkpoint's experts; `param_shapes` names those of rank 0 alone.

    Raises:
        BrokenCheckpoint: a name occurs twice, or has no weights; it is named.
        UnsupportedLayout: DeepSpeed has not saved a parameter, or a trained parameter is not a plain tensor; it is
            named.
    """
    model = model_file.tree
    buffers = set(experts.names_of_all_ranks(model.get("buffer_names") or ()))
    entries = entries_of(module, buffers)
    tensors = _parameters(model_file, entries, experts)
    frozen_shapes = model.get("frozen_param_shapes") or {}
    missing = [name for name in frozen_shapes if name not in module]
    if missing:
        raise BrokenCheckpoint(
            f"{model_file.path} names the frozen {few(missing)}, but no file holds their weights. Was it saved with "
            "exclude_frozen_parameters=True?"
        )
    aliases = _tied_names(entries.tensors, tensors, SNAPSHOT in model) | _shared_names(
        model_file, entries.tensors, tensors, shared_params
    )
    others = {name: value for name, value in entries.tensors.items() if name not in tensors and name not in aliases}
    if is_partitioned(model_file):
        _require_saved(model_file, [n for n, value in others.items() if n not in buffers and value.numel == 0])
    for name, value in others.items():
        is_buffer = name in buffers
        # Stage 3 saves an empty tensor in the module for a frozen parameter; frozen_param_shapes has the real shape.
        shape = value.shape if is_buffer else tuple(frozen_shapes.get(name, value.shape))
        axes = dense_axes(value.shape, value.stride) if value.shape == shape else None
        tensors[name] = TensorInfo(tuple(shape), value.dtype, "buffer" if is_buffer else "frozen", axes)
    return ModelTensors(tensors, aliases, entries.extra_states, entries.opaque)


def is_partitioned(model_file: TorchFile) -> bool:
    """Whether a model file is of stage 3: it holds empty tensors in place of parameters."""
    return "zero_pp_rank_" in model_file.path.name


def _require_saved(model_file: TorchFile, names: list[str]) -> None:
    """Raises UnsupportedLayout if one of the empty tensors stands for a parameter whose weights are not saved.

    Stage 3 saves weights with the optimizer, and those that need no gradient in `frozen_param_fragments`
    (`_get_zero_frozen_param_attributes`, `runtime/engine.py:5433`). Others it does not save.
    """
    unsaved = [name for name in names if name not in (model_file.tree.get("frozen_param_shapes") or {})]
    if unsaved:
        verb, was = ("has", "it was") if len(unsaved) == 1 else ("have", "they were")
        # Not BrokenCheckpoint: nothing is missing that DeepSpeed would have written, so no waiting helps.
        raise UnsupportedLayout(
            f"{model_file.path}: {few(unsaved)} {verb} no weights in any file: {was} frozen when the optimizer was "
            "made and trainable when this was saved, or trainable and in no parameter group. ZeRO stage 3 saves "
            "trainable weights only with the optimizer. Use an earlier checkpoint; and in the training program make a "
            "new engine after unfreezing, or freeze what the optimizer does not train."
        )


def _parameters(model_file: TorchFile, entries: Entries, experts: Experts) -> dict[str, TensorInfo]:
    """The trained parameters, of every expert of a layer where `param_shapes` names those of one rank."""
    tensors: dict[str, TensorInfo] = {}
    local_names: set[str] = set()
    for group in model_file.tree["param_shapes"]:
        for local_name, shape in group.items():
            if local_name in local_names:
                raise BrokenCheckpoint(f"{model_file.path}: param_shapes has {local_name} twice.")
            local_names.add(local_name)
            if local_name in tensors:  # an expert of a layer of which all experts were added with the first one
                continue
            for name in experts.names_of_all_ranks([local_name]):
                tensors[name] = TensorInfo(tuple(shape), _dtype_of(model_file, entries, name), "parameter")
    return tensors


def _tied_names(module: dict[str, Tensor], parameters: dict[str, TensorInfo], is_snapshot: bool) -> dict[str, str]:
    """Names whose tensor is the same view of the same bytes as a parameter's, with the parameter's name.

    `shared_params` does not suffice: only global rank 0 fills it (`_get_shared_params`,
    `runtime/engine.py:5490`). Tied weights of a snapshot, which are empty, are one tensor of it.
    """
    views = {name: (value.storage, value.offset, value.shape, value.stride) for name, value in module.items()}
    owners = {views[name]: name for name in parameters if name in views and (module[name].numel or is_snapshot)}
    return {name: owners[view] for name, view in views.items() if name not in parameters and view in owners}


def _shared_names(
    model_file: TorchFile, module: dict[str, Tensor], parameters: dict[str, TensorInfo], shared_params: dict[str, str]
) -> dict[str, str]:
    """The names of `shared_params` that are tied, with their owners.

    Stages 1 and 2 compare addresses (`_get_shared_params`, `runtime/engine.py:5503`). These are equal for all
    parameters without elements, too, and for views of one storage that begin at the same element.
    """
    aliases = {}
    for alias, owner in shared_params.items():
        if alias not in module or owner not in module or alias in parameters:
            continue
        one, other = module[alias], module[owner]
        if is_partitioned(model_file) or (one.numel and one.shape == other.shape and one.stride == other.stride):
            aliases[alias] = owner
    return aliases


def _dtype_of(model_file: TorchFile, entries: Entries, name: str) -> DType:
    if name in entries.opaque:
        raise UnsupportedLayout(
            f"{model_file.path}: the trained parameter {name} is {entries.opaque[name]}, which this version does not "
            "merge."
        )
    if name not in entries.tensors:
        raise BrokenCheckpoint(f"{model_file.path} names the parameter {name}, but no file holds its weights.")
    return entries.tensors[name].dtype


def module_dtype(tensors: dict[str, TensorInfo]) -> DType:
    """The dtype of the first trained parameter; fp32 if none is trained."""
    trained = [info.dtype for info in tensors.values() if info.role == "parameter"]
    return trained[0] if trained else BY_NAME["fp32"]
