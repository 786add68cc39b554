"""A rank's optimizer file in another form.

Its keys: `runtime/zero/stage_1_and_2.py:3358`, `runtime/bf16_optimizer.py:629`, `runtime/zero/stage3.py:3431`.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from wsm_ds.layouts import zero12
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.layouts.optimizer_states import NESTED
from wsm_ds.outputs.dropped_states import fresh_group
from wsm_ds.outputs.resharding.form import Form, Origin, cuts
from wsm_ds.outputs.resharding.groups import ParameterGroup
from wsm_ds.outputs.resharding.model_file import with_form
from wsm_ds.outputs.resharding.placeholders import (
    fragment_address,
    placeholder,
    static_loss_scaler,
    with_own_storage,
    zero_stage,
)
from wsm_ds.torchfile import Stub, Tensor

ALIGNMENT = 2
"""Stages 1 and 2 pad a group to a multiple of this times the world size (`runtime/zero/stage_1_and_2.py:387,441`)."""
PARAMETER_ALIGNMENT_BYTES = 16


def optimizer_tree(origin: Origin, form: Form, rank: int, keeps_states: bool) -> dict[str, Any]:
    """Returns the object tree of a rank's optimizer file, with placeholders for the elements.

    Args:
        origin: the newest checkpoint.
        form: the form of the new file.
        rank: data-parallel rank.
        keeps_states: whether the file holds optimizer states.
    """
    optimizer_state = _stage3 if form.stage == 3 else _stage12
    model = origin.models[0].tree
    outer = dict(origin.optimizer.tree)
    if origin.layout.is_universal:
        outer = {"ds_config": model.get("ds_config"), "ds_version": model.get("ds_version")}
    new_state = optimizer_state(origin, form, rank, keeps_states)
    return outer | {"optimizer_state_dict": new_state, "ds_config": with_form(outer.get("ds_config"), form)}


@dataclass
class _Partitions:
    """A rank's partitions in stages 1 and 2, an entry per parameter group in each list."""

    masters: list[Tensor] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    group_paddings: list[int] = field(default_factory=list)
    slice_mappings: list[OrderedDict[str, Stub]] = field(default_factory=list)


def _stage12(origin: Origin, form: Form, rank: int, keeps_states: bool) -> dict[str, Any]:
    """The optimizer state of stages 1 and 2 and of BF16_Optimizer, with the keys in DeepSpeed's order."""
    old = origin.state
    names = [cut[0] for cut in cuts(form, origin.groups, origin.layout)]
    paddings = [alignment_paddings(origin.layout.tensors, form, group_names) for group_names in names]
    partitions = _partitions(origin, form, rank, names, paddings)
    # BF16_Optimizer saves no loss scale (runtime/bf16_optimizer.py:629).
    new = {} if form.is_bf16_optimizer else loss_scaling(old)
    if "clip_grad" in old:
        new["clip_grad"] = old["clip_grad"]
    new["base_optimizer_state"] = {
        "state": _nonempty(partitions.states) if keeps_states else {},
        "param_groups": [param_group(group, [n], keeps_states) for n, group in enumerate(origin.groups)],
    }
    new["single_partition_of_fp32_groups"] = partitions.masters
    if not form.is_bf16_optimizer:
        new["zero_stage"] = zero_stage(form.stage)
        new["param_alignment_paddings"] = paddings
    new["group_paddings"] = partitions.group_paddings
    new["partition_count"] = [form.world_size] * len(origin.groups)
    new["ds_version"] = origin.models[0].tree.get("ds_version")
    new["param_slice_mappings"] = partitions.slice_mappings
    return new


def _partitions(
    origin: Origin, form: Form, rank: int, names: list[list[str]], paddings: list[list[int]]
) -> _Partitions:
    """A rank's partition of every group: `names` in partition order, `paddings` after each parameter."""
    tensors = origin.layout.tensors
    partitions = _Partitions()
    for number, group in enumerate(origin.groups):
        size, padding = partition_size(tensors, form, names[number], paddings[number], rank)
        # The ZeRO class saves masters without the padding at the end, BF16_Optimizer with it.
        partitions.masters.append(placeholder(group.master, (size if form.is_bf16_optimizer else size - padding,)))
        partitions.group_paddings.append(padding)
        pieces = list(zero12.pieces(names[number], paddings[number], tensors, rank * size, size))
        momentum = {}
        if group.is_muon:
            whole_pieces = zero12.whole_parameters(pieces, tensors)
            momentum[zero12.MOMENTUM] = sum(numel for _, _, numel, _ in whole_pieces)
        partitions.states[number] = _states(group, size, momentum)
        addresses = {name: fragment_address(numel, position) for name, _, numel, position in pieces}
        mapping = OrderedDict((name, addresses[name]) for name in group.names if name in addresses)
        partitions.slice_mappings.append(mapping)
    return partitions


def alignment_paddings(tensors: dict[str, TensorInfo], form: Form, names: list[str]) -> list[int]:
    """Returns the number of padding elements after each parameter of a group in the flat tensor.

    With `parameter_alignment`, every parameter begins at a multiple of 16 bytes; nothing follows the last one.

    Args:
        tensors: the model's tensors.
        form: the form of the new file.
        names: parameters of the group, in partition order.
    """
    if not form.parameter_alignment:
        return [0] * len(names)
    unit = PARAMETER_ALIGNMENT_BYTES // math.gcd(PARAMETER_ALIGNMENT_BYTES, tensors[names[0]].dtype.itemsize)
    paddings, end = [], 0
    for name in names[:-1]:
        end += tensors[name].numel
        paddings.append(-end % unit)
        end += paddings[-1]
    return [*paddings, 0]


def partition_size(
    tensors: dict[str, TensorInfo], form: Form, names: list[str], paddings: list[int], rank: int
) -> tuple[int, int]:
    """Returns the size of a group's partitions, and the padding at the group's end in a rank's partition.

    size = ceil(numel / (2 · world_size)) · 2, for `numel` elements of the group with the paddings between parameters.

    Args:
        tensors: the model's tensors.
        form: the form of the new file.
        names: parameters of the group, in partition order.
        paddings: elements after each parameter, see `alignment_paddings`.
        rank: data-parallel rank.

    Returns:
        Both in elements.
    """
    numel = sum(tensors[name].numel for name in names) + sum(paddings)
    size = -(-numel // (ALIGNMENT * form.world_size)) * ALIGNMENT
    return size, max(0, min(size, (rank + 1) * size - numel))


def _stage3(origin: Origin, form: Form, rank: int, keeps_states: bool) -> dict[str, Any]:
    """The optimizer state of stage 3.

    It is the same for every `rank`: each parameter has ceil(numel / world_size) elements in every rank's file, and the
    last ranks' padding stays in it.
    """
    masters: list[Tensor] = []
    states, param_groups = {}, []
    for group, cut in zip(origin.groups, cuts(form, origin.groups, origin.layout), strict=True):
        param_groups.append(param_group(group, [len(masters) + n for n in range(len(cut))], keeps_states))
        for names in cut:
            size = sum(-(-origin.layout.tensors[name].numel // form.world_size) for name in names)
            states[len(masters)] = _states(group, size, {})
            masters.append(placeholder(group.master, (size,)))
    return {
        "zero_stage": zero_stage(3),
        **loss_scaling(origin.state),
        "partition_count": form.world_size,
        "optimizer_state_dict": {"state": _nonempty(states) if keeps_states else {}, "param_groups": param_groups},
        "fp32_flat_groups": masters,
    }


def loss_scaling(old: dict[str, Any]) -> dict[str, Any]:
    """Returns the loss scale's entries of an optimizer state.

    Args:
        old: the origin's optimizer state. BF16_Optimizer saves no loss scale; the ZeRO classes expect one, and for
            bf16 it is a constant 1.
    """
    return {
        "loss_scaler": old.get("loss_scaler", static_loss_scaler()),
        "dynamic_loss_scale": old.get("dynamic_loss_scale", False),
        "overflow": old.get("overflow", False),
    }


def _states(group: ParameterGroup, size: int, sizes: dict[str, int]) -> dict[str, Any]:
    """A group's states: placeholders of `size` elements (of `sizes[name]`, if it is there), and copies of counters."""

    def of(states: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for name, value in states.items():
            if name in group.element_wise:
                new[name] = placeholder(group.element_wise[name], (sizes.get(name, size),))
            else:
                new[name] = of(value) if name == NESTED and isinstance(value, dict) else with_own_storage(value)
        return new

    return of(group.states)


def _nonempty(states: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """An optimizer that has not stepped yet has no entry for a group, instead of an empty one."""
    return {number: group_states for number, group_states in states.items() if group_states}


def param_group(group: ParameterGroup, numbers: list[int], keeps_states: bool) -> dict[str, Any]:
    """Returns the group's entry of `param_groups`.

    Args:
        group: the group.
        numbers: its `params`: the numbers of its flat tensors.
        keeps_states: whether states are kept; counters in the entry belong to them.
    """
    entry = group.hyperparameters
    return {**(entry if keeps_states else fresh_group(entry)), "params": numbers}
