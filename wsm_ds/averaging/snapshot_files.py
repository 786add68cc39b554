"""The files of a snapshot: DeepSpeed's own names and trees, without module weights and optimizer states.

A trained weight is an empty tensor in the module, as ZeRO-3 writes it; the optimizer has no states; and there is no
loss scaler. So DeepSpeed refuses to continue a training from a snapshot, and every tool that reads masters reads it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsm_ds.averaging.masters import Tensors
from wsm_ds.averaging.torch_files import PickledFile, pickled
from wsm_ds.errors import RecipeError
from wsm_ds.layouts.snapshot import SNAPSHOT

RESUMING = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""What DeepSpeed needs in `optimizer_state_dict` to load it (`runtime/zero/stage3.py`, `_rigid_load_state_dict`)."""
EXPERT_NUMBER = re.compile(r"(deepspeed_moe\.experts\.deepspeed_experts\.)\d+\.")


def require_files(engine: Any) -> None:
    """Raises RecipeError if snapshots of an engine cannot be written; the message says why."""
    if not engine.zero_optimization():
        raise RecipeError(
            "snapshots need ZeRO stage 1, 2 or 3: the files of stage 0 do not name their masters. Use stage 1, or "
            "run=None to keep the averages in memory only."
        )
    if getattr(engine, "_autoep_folding_spec", None) is not None:
        raise RecipeError("snapshots of AutoEP layers cannot be read by this version. Use run=None.")


def snapshot_files(
    engine: Any, values: Tensors, snapshot: Mapping[str, Any], client_state: Mapping[str, Any]
) -> list[PickledFile]:
    """Pickles this rank's files of a snapshot; their elements are written later. It holds no collective.

    Args:
        engine: DeepSpeed's, between two updates.
        values: instead of the masters, one for one. They must not change before the files are written.
        snapshot: what the values are; see `wsm_ds.layouts.snapshot`.
        client_state: further plain data for the model files.
    """
    frozen = [parameter.detach() for parameter in engine.module.parameters() if not _is_trained(parameter)]
    files = [
        pickled(name, _without_weights(engine, tree), steady=frozen)
        for name, tree in _model_trees(engine, {**client_state, SNAPSHOT: dict(snapshot)})
    ]
    if engine.save_zero_checkpoint:
        tree = {
            "optimizer_state_dict": _optimizer_state(engine.optimizer, values),
            "ds_config": engine.config,
            "ds_version": _deepspeed_version(),
        }
        files.append(pickled(Path(engine._get_zero_ckpt_name("", "")).name, tree, averages=values))
    return files


def _deepspeed_version() -> str:
    from deepspeed.git_version_info import version

    return str(version)


def _optimizer_state(optimizer: Any, values: Tensors) -> dict[str, Any]:
    """The optimizer's state dict with values instead of masters, and without what only resuming needs."""
    state = {key: value for key, value in optimizer.state_dict().items() if key not in RESUMING}
    if "fp32_flat_groups" in state:
        state["fp32_flat_groups"] = values
        state["optimizer_state_dict"] = state["optimizer_state_dict"] | {"state": {}}
        return state
    masters = state["single_partition_of_fp32_groups"]
    # ZeRO saves its masters without the padding at their end, BF16_Optimizer with it.
    state["single_partition_of_fp32_groups"] = [
        value[: len(master)] for value, master in zip(values, masters, strict=True)
    ]
    base = state["base_optimizer_state"]
    state["base_optimizer_state"] = [{} for _ in base] if isinstance(base, list) else base | {"state": {}}
    return state


class _Recorder:
    """Takes the place of DeepSpeed's checkpoint engine: keeps what it would write.

    Args:
        original: DeepSpeed's.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.trees: list[tuple[str, Any]] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Keeps a file's tree."""
        self.trees.append((Path(path).name, state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes nothing."""

    def preserves_storage_sharing(self) -> bool:
        """False: nothing has to be cloned, because weights are not kept."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


@contextmanager
def _recorded(engine: Any) -> Iterator[_Recorder]:
    original = engine.checkpoint_engine
    engine.checkpoint_engine = recorder = _Recorder(original)
    try:
        yield recorder
    finally:
        engine.checkpoint_engine = original


def _model_trees(engine: Any, client_state: dict[str, Any]) -> list[tuple[str, Any]]:
    """The files that this rank writes beside the optimizer's, by name: model files, layers, experts."""
    with _recorded(engine) as recorder:
        save = engine._save_moe_checkpoint if engine.has_moe_layers else engine._save_checkpoint
        save("", "snapshot", client_state=client_state)
    return recorder.trees


def _is_trained(parameter: Any) -> bool:
    from deepspeed.runtime.utils import is_optimized_parameter

    return bool(is_optimized_parameter(parameter))


def _without_weights(engine: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A model file's tree, or that of a file of weights alone, with empty tensors for the trained parameters."""
    if "module" not in tree:
        return _emptied(engine, tree)
    module = tree["module"]
    return tree if module is None else tree | {"module": _emptied(engine, module)}


def _emptied(engine: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    partitioned = bool(engine.zero_optimization_partition_weights())
    addresses, names = set(), set()
    for name, parameter in engine.module.named_parameters():
        if _is_trained(parameter) or partitioned:
            names.add(_any_expert(name))
            addresses.add(parameter.data_ptr())
    empty: dict[Any, Any] = {}
    emptied = {}
    for name, value in weights.items():
        is_tensor = isinstance(value, torch.Tensor)
        is_weight = is_tensor and value.numel() and value.data_ptr() in addresses
        if is_weight or (is_tensor and EXPERT_NUMBER.search(name) and _any_expert(name) in names):
            # Tied names keep one tensor: that they are tied is told by the storage that they share.
            key = (value.data_ptr(), value.shape, value.stride()) if is_weight else name
            value = empty.setdefault(key, torch.empty(0, dtype=value.dtype))
        emptied[name] = value
    return emptied


def _any_expert(name: str) -> str:
    """A parameter's name without an expert's number: files have global numbers, the module local ones."""
    return EXPERT_NUMBER.sub(r"\1*.", name)
