"""An optimizer's parameter groups, as the training program made them, from the files of a ZeRO stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsm_ds.dtypes import DType
from wsm_ds.errors import BrokenCheckpoint, few
from wsm_ds.layouts.optimizer_states import unnested
from wsm_ds.layouts.universal import open_parameters, whole
from wsm_ds.torchfile import Tensor, TorchFile, open_own_tree


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group of an optimizer.

    Attributes:
        names: its parameters, in the optimizer's order.
        hyperparameters: its entry of `param_groups`, without the parameters' numbers.
        states: rank 0's optimizer states of the group (of its first sub-group), by name: tensors and numbers.
        element_wise: dtypes of the states that hold a value per element, by name.
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


def read_groups(
    model: TorchFile, state: dict[str, Any], round_robin_ranks: int, state_names: frozenset[str]
) -> tuple[ParameterGroup, ...]:
    """Reads the groups of a checkpoint.

    Args:
        model: rank 0's model file.
        state: rank 0's optimizer state.
        round_robin_ranks: number of ranks to which `round_robin_gradients` distributed the parameters; 1 without it.
        state_names: optimizer states that hold one value per element.

    Raises:
        BrokenCheckpoint: the model file and the optimizer do not agree about the groups.
    """
    shapes = model.tree["param_shapes"]
    is_stage3 = "fp32_flat_groups" in state
    base = state["optimizer_state_dict" if is_stage3 else "base_optimizer_state"]
    flats = state["fp32_flat_groups" if is_stage3 else "single_partition_of_fp32_groups"]
    groups = []
    numbers = sorted(n for entry in base["param_groups"] for n in entry["params"]) if is_stage3 else range(len(shapes))
    if list(numbers) != list(range(len(flats))) or len(shapes) != len(flats):
        raise BrokenCheckpoint(
            f"{model.path} names {len(shapes)} flat groups, but the optimizer holds {len(flats)} and its param_groups "
            f"refer to {few(list(numbers))}. Are the files from one checkpoint?"
        )
    for number, entry in enumerate(base["param_groups"]):
        # Stage 3 makes several flat groups (sub-groups) of a parameter group, stages 1 and 2 make one.
        indices = list(entry["params"]) if is_stage3 else [number]
        names = [name for index in indices for name in shapes[index]]
        states = base["state"].get(entry["params"][0], {}) if entry["params"] else {}
        flat = flats[indices[0]] if indices else flats[0]
        element_values = {
            name: value for name, value in unnested(states).items() if name in state_names and isinstance(value, Tensor)
        }
        groups.append(
            ParameterGroup(
                names=tuple(_in_optimizer_order(names, round_robin_ranks)),
                hyperparameters=_hyperparameters(entry),
                states=states,
                element_wise={name: value.dtype for name, value in element_values.items()},
                master=flat.dtype,
            )
        )
    return tuple(groups)


def read_universal_groups(
    path: Path, model: TorchFile, optimizer_state: TorchFile, allowed_globals: frozenset[str]
) -> tuple[ParameterGroup, ...]:
    """Reads the groups of a universal checkpoint; a group's states are those of its first parameter.

    Args:
        path: the checkpoint's folder.
        model: its model file.
        optimizer_state: its `optimizer_state.pt`.
        allowed_globals: see `open_torch_file`.

    Raises:
        BrokenCheckpoint: a group has no parameter that the model file names.
    """
    shapes, entries = model.tree["param_shapes"], optimizer_state.tree["param_groups"]
    counters = (optimizer_state.tree.get("optimizer_state_dict") or {"state": {}})["state"].get(0, {})
    groups = []
    for number, entry in enumerate(entries):
        indices = [number] if len(shapes) == len(entries) else entry["params"]
        names = tuple(name for index in indices if index < len(shapes) for name in shapes[index])
        if not names:
            raise BrokenCheckpoint(
                f"{optimizer_state.path}: param_groups.{number} holds no parameter that {model.path.name} names."
            )
        kinds = open_parameters(path, [*names[:1]], allowed_globals)[names[0]]
        # Its counters are copied, so their storages must know where they lie.
        trees = {kind: open_own_tree(file.path, allowed_globals).tree for kind, file in kinds.items()}
        tensors = {kind: tensor for kind, tree in trees.items() if (tensor := whole(tree)) is not None}
        master, step = tensors.pop("fp32"), tensors.pop("step", counters.get("step"))
        states = tensors | ({} if step is None else {"step": step})
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        groups.append(ParameterGroup(names, _hyperparameters(entry), states, dtypes, master.dtype))
    return tuple(groups)


def _hyperparameters(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "params"}


def in_partition_order(names: tuple[str, ...], ranks: int) -> list[str]:
    """Returns the order of a group's parameters under `round_robin_gradients`.

    Parameters are distributed to the ranks one by one and collected rank by rank
    (`runtime/zero/stage_1_and_2.py:901`, `_round_robin_reorder`).

    >>> in_partition_order(("a", "b", "c", "d", "e"), 2)
    ['a', 'c', 'e', 'b', 'd']

    Args:
        names: in the optimizer's order.
        ranks: number of data-parallel ranks; 1 leaves the order as it is.
    """
    return [name for rank in range(ranks) for name in names[rank::ranks]]


def _in_optimizer_order(names: list[str], ranks: int) -> list[str]:
    """The inverse of `in_partition_order`: from partition order back to the optimizer's order."""
    order = [index for rank in range(ranks) for index in range(rank, len(names), ranks)]
    return [name for _, name in sorted(zip(order, names, strict=True))]


def subgroups(names: tuple[str, ...], numels: dict[str, int], world_size: int, size: int) -> list[list[str]]:
    """Splits a parameter group into stage 3's sub-groups.

    A sub-group is closed by the parameter with which a rank's partitions reach `size` elements
    (`runtime/zero/stage3.py:1210`, `_create_fp16_sub_groups`).

    >>> subgroups(("a", "b", "c"), {"a": 4, "b": 4, "c": 4}, world_size=2, size=3)
    [['a', 'b'], ['c']]

    Args:
        names: parameters of the group.
        numels: elements of each parameter.
        world_size: data-parallel ranks; a rank holds ceil(numel / world_size) elements of a parameter.
        size: `sub_group_size`, in elements of one rank.
    """
    partition_numels = {name: -(-numels[name] // world_size) for name in names}
    if size >= sum(partition_numels.values()):
        return [list(names)] if names else []
    closed: list[list[str]] = []
    current: list[str] = []
    current_numel = 0
    for name in names:
        current.append(name)
        current_numel += partition_numels[name]
        if current_numel >= size or name == names[-1]:
            closed.append(current)
            current, current_numel = [], 0
    return closed
