"""An optimizer's parameter groups as the training program made them, whatever the ZeRO stage did with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.dtypes import DType
from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.layouts import zero12
from wsm_ds.layouts.rank_files import element_wise
from wsm_ds.layouts.universal import open_parameters, whole
from wsm_ds.torchfile import Tensor, TorchFile


@dataclass(frozen=True)
class Group:
    """One parameter group.

    Attributes:
        names: parameters in the optimizer's order.
        hyperparameters: its entry of `param_groups` without the parameters' numbers.
        states: rank 0's states of the group (of its first sub-group): stand-ins of tensors, and numbers.
        element_wise: those of them that hold a value per element, with their dtypes.
        master: dtype of the masters.
    """

    names: tuple[str, ...]
    hyperparameters: dict[str, Any]
    states: dict[str, Any]
    element_wise: dict[str, DType]
    master: DType

    @property
    def is_muon(self) -> bool:
        """Whether Muon updates the group."""
        return bool(self.hyperparameters.get("use_muon"))


def read_groups(model: TorchFile, state: dict[str, Any], dealt_to: int) -> tuple[Group, ...]:
    """The groups of a checkpoint, from rank 0's model file and optimizer state.

    Args:
        dealt_to: number of ranks that `round_robin_gradients` dealt the parameters out to; 1 without it.
    """
    shapes = model.tree["param_shapes"]
    is_stage3 = "fp32_flat_groups" in state
    base = state["optimizer_state_dict" if is_stage3 else "base_optimizer_state"]
    flats = state["fp32_flat_groups" if is_stage3 else "single_partition_of_fp32_groups"]
    groups = []
    numbers = sorted(n for entry in base["param_groups"] for n in entry["params"]) if is_stage3 else range(len(shapes))
    if list(numbers) != list(range(len(flats))) or len(shapes) != len(flats):
        raise BrokenCheckpoint(f"{model.path} names {len(shapes)} flat groups, the optimizer's groups are of others.")
    for number, entry in enumerate(base["param_groups"]):
        held = list(entry["params"]) if is_stage3 else [number]
        names = [name for index in held for name in shapes[index]]
        states = base["state"].get(entry["params"][0], {}) if entry["params"] else {}
        flat = flats[held[0]] if held else flats[0]
        padding = 0 if is_stage3 or "zero_stage" not in state else int(state["group_paddings"][number])
        element_values = element_wise(states, flat.numel, flat.numel + padding)
        if entry.get("use_muon") and isinstance(states.get(zero12.MOMENTUM), Tensor):
            element_values[zero12.MOMENTUM] = states[zero12.MOMENTUM]
        groups.append(
            Group(
                names=tuple(_dealt_back(names, dealt_to)),
                hyperparameters=_hyperparameters(entry),
                states=states,
                element_wise={name: value.dtype for name, value in element_values.items()},
                master=flat.dtype,
            )
        )
    return tuple(groups)


def read_universal_groups(
    path: Path, model: TorchFile, head: TorchFile, allowed_globals: frozenset[str]
) -> tuple[Group, ...]:
    """The groups of a universal checkpoint at `path`; states are those of each group's first parameter."""
    shapes, entries = model.tree["param_shapes"], head.tree["param_groups"]
    counters = (head.tree.get("optimizer_state_dict") or {"state": {}})["state"].get(0, {})
    groups = []
    for number, entry in enumerate(entries):
        indices = [number] if len(shapes) == len(entries) else entry["params"]
        names = tuple(name for index in indices if index < len(shapes) for name in shapes[index])
        if not names:
            raise BrokenCheckpoint(
                f"{head.path}: param_groups.{number} holds no parameter that {model.path.name} names."
            )
        kinds = open_parameters(path, [*names[:1]], allowed_globals)[names[0]]
        held = {kind: tensor for kind, file in kinds.items() if (tensor := whole(file.tree)) is not None}
        master, step = held.pop("fp32"), held.pop("step", counters.get("step"))
        states = held | ({} if step is None else {"step": step})
        dtypes = {name: tensor.dtype for name, tensor in held.items()}
        groups.append(Group(names, _hyperparameters(entry), states, dtypes, master.dtype))
    return tuple(groups)


def _hyperparameters(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "params"}


def in_partition_order(names: tuple[str, ...], ranks: int) -> list[str]:
    """Names dealt out to `ranks` one by one, and gathered rank by rank (`stage_1_and_2.py`, `_round_robin_reorder`)."""
    return [name for rank in range(ranks) for name in names[rank::ranks]]


def _dealt_back(dealt: list[str], ranks: int) -> list[str]:
    """The order that `in_partition_order` was given."""
    order = [index for rank in range(ranks) for index in range(rank, len(dealt), ranks)]
    return [name for _, name in sorted(zip(order, dealt, strict=True))]


def subgroups(names: tuple[str, ...], numels: dict[str, int], world_size: int, size: int) -> list[list[str]]:
    """Stage 3's sub-groups of a group: closed at `size` elements of a rank (`stage3.py`, `_create_fp16_sub_groups`)."""
    parts = {name: -(-numels[name] // world_size) for name in names}
    if size >= sum(parts.values()):
        return [list(names)] if names else []
    closed: list[list[str]] = []
    current: list[str] = []
    held = 0
    for name in names:
        current.append(name)
        held += parts[name]
        if held >= size or name == names[-1]:
            closed.append(current)
            current, held = [], 0
    return closed
