"""The model as a model file describes it: names, shapes, dtypes and roles of its tensors, and tied names.

The keys are those of `_common_checkpoint_state` (`runtime/engine.py:5017`).
"""

from typing import Any

from wsm_ds.dtypes import BY_NAME, DType
from wsm_ds.errors import BrokenCheckpoint, few
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.layouts.moe import NO_EXPERTS, Experts
from wsm_ds.layouts.rank_files import WeightsFile
from wsm_ds.torchfile import Tensor, TorchFile


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


def tensors_of(
    model_file: TorchFile, module: dict[str, Any], shared_params: dict[str, str], experts: Experts = NO_EXPERTS
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Describes every tensor of a model of ZeRO stages 1 to 3.

    Args:
        model_file: a model file of the rank.
        module: its weights, as `module_of` gives them.
        shared_params: tied names and their owners, as the first model file of the checkpoint says.
        experts: the checkpoint's experts; `param_shapes` names those of rank 0 alone.

    Returns:
        Parameters in the order of `param_shapes`, which is the order of partitions (`_get_zero_param_shapes`,
        `runtime/engine.py:5448`), then frozen ones and buffers in the module's order; and the tied names with the name
        that each stands for.

    Raises:
        BrokenCheckpoint: a name occurs twice, or has no weights; it is named.
    """
    model = model_file.tree
    tensors = _parameters(model_file, module, experts)
    buffers = set(experts.names_of_all_ranks(model.get("buffer_names") or ()))
    aliases = _tied_names(module, tensors) | {
        alias: owner for alias, owner in shared_params.items() if alias in module and alias not in tensors
    }
    frozen_shapes = model.get("frozen_param_shapes") or {}
    missing = [name for name in frozen_shapes if name not in module]
    if missing:
        raise BrokenCheckpoint(
            f"{model_file.path} names the frozen {few(missing)}, but no file holds their weights. Was it saved with "
            "exclude_frozen_parameters=True?"
        )
    for name, value in module.items():
        if name in tensors or name in aliases or not isinstance(value, Tensor):
            continue
        is_buffer = name in buffers
        # Stage 3 saves an empty tensor in the module for a frozen parameter; frozen_param_shapes has the real shape.
        shape = value.shape if is_buffer else tuple(frozen_shapes.get(name, value.shape))
        tensors[name] = TensorInfo(tuple(shape), value.dtype, "buffer" if is_buffer else "frozen")
    return tensors, aliases


def _parameters(model_file: TorchFile, module: dict[str, Any], experts: Experts) -> dict[str, TensorInfo]:
    """The trained parameters, of every expert of a layer where `param_shapes` names those of one rank."""
    tensors: dict[str, TensorInfo] = {}
    local_names: set[str] = set()
    for group in model_file.tree["param_shapes"]:
        for local_name, shape in group.items():
            if local_name in local_names:
                raise BrokenCheckpoint(f"{model_file.path}: param_shapes has {local_name} twice.")
            local_names.add(local_name)
            for name in experts.names_of_all_ranks([local_name]):
                tensors[name] = TensorInfo(tuple(shape), _dtype_of(model_file, module, name), "parameter")
    return tensors


def _tied_names(module: dict[str, Any], parameters: dict[str, TensorInfo]) -> dict[str, str]:
    """Names whose tensor lies at the same bytes as a parameter's, with the parameter's name.

    `shared_params` does not suffice: only global rank 0 fills it (`_get_shared_params`,
    `runtime/engine.py:5490`).
    """
    owners = {
        (value.storage, value.offset, value.shape): name
        for name, value in module.items()
        if name in parameters and isinstance(value, Tensor) and value.numel
    }
    others = {name: value for name, value in module.items() if name not in parameters and isinstance(value, Tensor)}
    views = {name: (value.storage, value.offset, value.shape) for name, value in others.items()}
    return {name: owners[view] for name, view in views.items() if view in owners}


def _dtype_of(model_file: TorchFile, module: dict[str, Any], name: str) -> DType:
    value = module.get(name)
    if not isinstance(value, Tensor):
        raise BrokenCheckpoint(f"{model_file.path} names the parameter {name}, but no file holds its weights.")
    return value.dtype


def module_dtype(tensors: dict[str, TensorInfo]) -> DType:
    """The dtype of the first trained parameter; fp32 if none is trained."""
    trained = [info.dtype for info in tensors.values() if info.role == "parameter"]
    return trained[0] if trained else BY_NAME["fp32"]
