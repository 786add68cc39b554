"""A rank's optimizer file in another form.

Its keys: `runtime/zero/stage_1_and_2.py:3358`, `runtime/bf16_optimizer.py:629`, `runtime/zero/stage3.py:3431`.
"""

import math
from collections import OrderedDict
from typing import Any

from wsm_ds.layouts import zero12
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.outputs.resharding.form import Form, Origin, cuts
from wsm_ds.outputs.resharding.groups import Group
from wsm_ds.outputs.resharding.model_file import with_form
from wsm_ds.outputs.resharding.placeholders import fragment_address, own_copies, room, static_loss_scaler, zero_stage
from wsm_ds.torchfile import Tensor

ALIGNMENT = 2
"""Stages 1 and 2 pad a group to a multiple of this times the world size (`nccl_start_alignment_factor`)."""
PARAMETER_ALIGNMENT_BYTES = 16


def optimizer_tree(origin: Origin, form: Form, rank: int, keeps_states: bool) -> dict[str, Any]:
    """The object tree of `rank`'s file, with room for the elements; without `keeps_states` no optimizer states."""
    make = _stage3 if form.stage == 3 else _stage12
    model = origin.models[0].tree
    outer = dict(origin.optimizer.tree)
    if origin.layout.is_universal:
        outer = {"ds_config": model.get("ds_config"), "ds_version": model.get("ds_version")}
    new = make(origin, form, rank, origin.state, keeps_states)
    return outer | {"optimizer_state_dict": new, "ds_config": with_form(outer.get("ds_config"), form)}


def _stage12(origin: Origin, form: Form, rank: int, old: dict[str, Any], keeps_states: bool) -> dict[str, Any]:
    names = [cut[0] for cut in cuts(form, origin.groups, origin.layout)]
    tensors = origin.layout.tensors
    paddings = [alignment_paddings(tensors, form, group) for group in names]
    masters, states, missing, mappings = [], {}, [], []
    for number, group in enumerate(origin.groups):
        size, padding = partition_size(tensors, form, names[number], paddings[number], rank)
        masters.append(room(group.master, (size if form.is_bf16_optimizer else size - padding,)))
        missing.append(padding)
        slices = list(zero12.slices(names[number], paddings[number], tensors, rank * size, size))
        wholes = zero12.whole_parameters(slices, tensors)
        momentum = {zero12.MOMENTUM: sum(numel for _, _, numel, _ in wholes)} if group.is_muon else {}
        states[number] = _states(group, size, momentum)
        held = {name: fragment_address(numel, position) for name, _, numel, position in slices}
        mappings.append(OrderedDict((name, held[name]) for name in group.names if name in held))
    new = {} if form.is_bf16_optimizer else scaling(old)
    if "clip_grad" in old:
        new["clip_grad"] = old["clip_grad"]
    new["base_optimizer_state"] = {
        "state": _held(states, keeps_states),
        "param_groups": [entry(g, [n], keeps_states) for n, g in enumerate(origin.groups)],
    }
    new["single_partition_of_fp32_groups"] = masters
    if not form.is_bf16_optimizer:
        new["zero_stage"] = zero_stage(form.stage)
        new["param_alignment_paddings"] = paddings
    new["group_paddings"] = missing
    new["partition_count"] = [form.world_size] * len(origin.groups)
    new["ds_version"] = origin.models[0].tree.get("ds_version")
    new["param_slice_mappings"] = mappings
    return new


def alignment_paddings(tensors: dict[str, TensorInfo], form: Form, names: list[str]) -> list[int]:
    """Elements between each parameter and the next; none after the last."""
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
    """(elements of a partition, how many of `rank`'s lie beyond the group)."""
    numel = sum(tensors[name].numel for name in names) + sum(paddings)
    size = -(-numel // (ALIGNMENT * form.world_size)) * ALIGNMENT
    return size, max(0, min(size, (rank + 1) * size - numel))


def _stage3(origin: Origin, form: Form, rank: int, old: dict[str, Any], keeps_states: bool) -> dict[str, Any]:
    """All ranks' files have the same lengths: the last ranks' padding stays in place."""
    masters: list[Tensor] = []
    states, entries = {}, []
    for group, cut in zip(origin.groups, cuts(form, origin.groups, origin.layout), strict=True):
        entries.append(entry(group, [len(masters) + n for n in range(len(cut))], keeps_states))
        for names in cut:
            size = sum(-(-origin.layout.tensors[name].numel // form.world_size) for name in names)
            states[len(masters)] = _states(group, size, {})
            masters.append(room(group.master, (size,)))
    return {
        "zero_stage": zero_stage(3),
        **scaling(old),
        "partition_count": form.world_size,
        "optimizer_state_dict": {"state": _held(states, keeps_states), "param_groups": entries},
        "fp32_flat_groups": masters,
    }


def scaling(old: dict[str, Any]) -> dict[str, Any]:
    """The loss scale's state; BF16_Optimizer saves none, and ZeRO's is then a constant."""
    return {
        "loss_scaler": old.get("loss_scaler", static_loss_scaler()),
        "dynamic_loss_scale": old.get("dynamic_loss_scale", False),
        "overflow": old.get("overflow", False),
    }


def _states(group: Group, size: int, sizes: dict[str, int]) -> dict[str, Any]:
    """A group's states with room for `size` elements, or what `sizes` says; counters are copied."""
    return {
        name: room(group.element_wise[name], (sizes.get(name, size),)) if name in group.element_wise else own_copies(v)
        for name, v in group.states.items()
    }


def _held(states: dict[int, dict[str, Any]], keeps_states: bool) -> dict[int, dict[str, Any]]:
    """An optimizer that has not stepped yet holds no entry at all."""
    return {number: held for number, held in states.items() if held and keeps_states}


def entry(group: Group, numbers: list[int], keeps_states: bool) -> dict[str, Any]:
    """The group's entry of `param_groups`; a step counter in it belongs to the states."""
    kept = {name: value for name, value in group.hyperparameters.items() if keeps_states or name != "step"}
    return {**kept, "params": numbers}
