"""Writes checkpoints in DeepSpeed's form for any number of ranks.

The trees come from a checkpoint of two ranks that DeepSpeed wrote; only what depends on model, ranks or step
is replaced. `tests/benchmarks` compares the files for two ranks with DeepSpeed's own, byte for byte.
"""

import math
import os
import shutil
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.many_ranks.forms import Form
from benchmarks.many_ranks.values import EXPERT, Values, groups_of

ALIGNMENT = 2
"""Elements to which DeepSpeed aligns a rank's partition (`nccl_start_alignment_factor`)."""
STATES = ("master", "exp_avg", "exp_avg_sq")


def _metadata(names: list[str]) -> Any:
    """What `nn.Module.state_dict` leaves on its result: a version of every module, in the order of the modules."""
    versions: Any = OrderedDict({"": {"version": 1}})
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            versions.setdefault(".".join(parts[:depth]), {"version": 1})
    return versions


def _own(text: str) -> str:
    """An equal text that is another object: DeepSpeed pickles the names in `param_shapes` once more."""
    return (" " + text)[1:]


def _model_tree(form: Form, module: Any, values: Values, world_size: int) -> dict[str, Any]:
    """A model file's tree, without `param_shapes`."""
    tree = form.model()
    if hasattr(tree["module"], "_metadata"):  # MoE saves copy the module, and lose it
        module._metadata = _metadata(list(module))
    tree |= {
        "module": module,
        "dp_world_size": world_size,
        "global_steps": values.step,
        "global_samples": 2 * values.step * world_size,
    }
    tree["lr_scheduler"]["last_batch_iteration"] = values.step - 1
    return tree


def _link(source: Path, target: Path, *, is_copied: bool) -> None:
    """Makes `target` the same file as `source`, or a copy of it."""
    if is_copied:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system allows only so many links (ext4: 65 000)
        shutil.copyfile(source, target)


def write_zero3(folder: Path, form: Form, values: Values, world_size: int, *, all_real: bool) -> None:
    """Writes a checkpoint of ZeRO-3: each rank has a part of every parameter, padded at the end.

    Args:
        folder: the checkpoint's folder, to be made.
        form: of "zero3".
        values: what it holds.
        world_size: number of ranks.
        all_real: whether every file is one of its own, with its own values. Otherwise ranks from 1 on are hard links
            to the files of rank 1, which take little room and one place in the page cache.
    """
    import torch

    folder.mkdir(parents=True)
    groups = groups_of(values.shapes)
    module = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in values.shapes)
    model = _model_tree(form, module, values, world_size)
    model["param_shapes"] = [
        OrderedDict((_own(name), torch.Size(values.shapes[name])) for name in group) for group in groups
    ]
    optimizer = form.optimizer()
    for rank in range(world_size):
        model_path = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        if rank < 2:
            model["shared_params"] = {}
            torch.save(model, model_path)
        else:  # only rank 0 has the names of tied parameters; this model has none
            _link(folder / "zero_pp_rank_1_mp_rank_00_model_states.pt", model_path, is_copied=all_real)
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        if rank < 2 or all_real:
            _fill_zero3(optimizer["optimizer_state_dict"], values, groups, rank, world_size)
            torch.save(optimizer, path)
        else:
            _link(folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", path, is_copied=False)


def _fill_zero3(state: dict[str, Any], values: Values, groups: list[list[str]], rank: int, world_size: int) -> None:
    """Puts a rank's values into an optimizer file's tree."""
    import torch

    state["partition_count"] = world_size
    for number, group in enumerate(groups):
        parts = {kind: [_part(values.states[kind][name], rank, world_size) for name in group] for kind in STATES}
        moments = state["optimizer_state_dict"]["state"][number]
        moments["step"] = torch.tensor(float(values.step))
        moments |= {kind: torch.cat(parts[kind]) for kind in STATES[1:]}
        master = torch.cat(parts["master"])
        master.__dict__.update(state["fp32_flat_groups"][number].__dict__)  # `ds_id`: it is pickled with them
        state["fp32_flat_groups"][number] = master.requires_grad_(True)


def _part(flat: Any, rank: int, world_size: int) -> Any:
    """A rank's part of a parameter, filled up with zeros."""
    import torch

    length = -(-len(flat) // world_size)
    part = torch.zeros(length)
    own = flat[rank * length : (rank + 1) * length]
    part[: len(own)] = own
    return part


@dataclass(frozen=True)
class _Line:
    """The parameters of a group, one after the other, as ZeRO-2 cuts them into slices.

    Attributes:
        names: of the parameters.
        begins: first element of each, and the end of the last.
        states: by kind, the elements; padded, so that `count` ranks get equal, aligned slices.
        count: number of slices.
    """

    names: list[str]
    begins: list[int]
    states: dict[str, Any]
    count: int


def _line(values: Values, names: list[str], sources: list[str], count: int) -> _Line:
    """Lays parameters on a line; `names` are those in the files, and `sources` those in `values`."""
    import torch

    begins = [0, *accumulate(math.prod(values.shapes[source]) for source in sources)]
    states = {}
    for kind in STATES:
        states[kind] = torch.zeros(-(-begins[-1] // (ALIGNMENT * count)) * ALIGNMENT * count)
        states[kind][: begins[-1]] = torch.cat([values.states[kind][source] for source in sources])
    return _Line(names, begins, states, count)


def write_zero2(folder: Path, form: Form, values: Values, world_size: int) -> None:
    """Writes a checkpoint of ZeRO-2: each rank has a slice of each group's line of parameters.

    Args:
        folder: the checkpoint's folder, to be made.
        form: of "zero2".
        values: what it holds.
        world_size: number of ranks.
    """
    import torch

    folder.mkdir(parents=True)
    groups = groups_of(values.shapes)
    lines = [_line(values, group, group, world_size) for group in groups]
    module: Any = OrderedDict.fromkeys(values.shapes)
    for line in lines:
        weights = line.states["master"].bfloat16()
        for name, begin, end in zip(line.names, line.begins, line.begins[1:], strict=False):
            module[name] = weights[begin:end].view(values.shapes[name])  # all are views of one storage
    model = _model_tree(form, module, values, world_size)
    model["param_shapes"] = [
        OrderedDict((_own(name), torch.Size(values.shapes[name])) for name in group) for group in groups
    ]
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    optimizer = form.optimizer()
    state = optimizer["optimizer_state_dict"]
    state["partition_count"] = [world_size] * len(groups)
    state["param_alignment_paddings"] = [[0] * len(group) for group in groups]
    for rank in range(world_size):
        _fill_zero2(state, values.step, [(rank, line) for line in lines])
        torch.save(optimizer, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _fill_zero2(state: dict[str, Any], step: int, slices: list[tuple[int, _Line]]) -> None:
    """Puts a rank's slices into an optimizer file's tree.

    Args:
        state: the tree's `optimizer_state_dict`.
        step: number of updates.
        slices: for each group, which slice of which line.
    """
    import torch
    from deepspeed.utils.tensor_fragment import fragment_address

    state["group_paddings"], state["param_slice_mappings"] = [], []
    for number, (part, line) in enumerate(slices):
        length = len(line.states["master"]) // line.count
        begin, end = part * length, (part + 1) * length
        padding = max(0, min(length, end - line.begins[-1]))
        state["group_paddings"].append(padding)
        # DeepSpeed saves a view without the padding; the storage has it.
        own = line.states["master"][begin:end].clone()[: length - padding]
        state["single_partition_of_fp32_groups"][number] = own.requires_grad_(True)
        moments = state["base_optimizer_state"]["state"][number]
        moments["step"] = torch.tensor(float(step))
        moments |= {kind: line.states[kind][begin:end].clone() for kind in STATES[1:]}
        addresses = OrderedDict()
        for index in range(bisect_right(line.begins, begin) - 1, min(bisect_left(line.begins, end), len(line.names))):
            first, last = max(line.begins[index], begin), min(line.begins[index + 1], end)
            if first < last:
                addresses[line.names[index]] = fragment_address(numel=last - first, start=first - begin)
        state["param_slice_mappings"].append(addresses)


def write_moe(folder: Path, form: Form, values: Values, world_size: int, ep: int, experts_from: Path | None) -> None:
    """Writes a checkpoint of ZeRO-2 with native MoE: a file for each expert, and an expert group for each ep rank.

    Args:
        folder: the checkpoint's folder, to be made.
        form: of "moe".
        values: what it holds.
        world_size: number of ranks.
        ep: ranks among which a layer's experts are divided.
        experts_from: a checkpoint with the same weights, whose experts' files become hard links; None: none.
    """
    import torch

    folder.mkdir(parents=True)
    dense, expert = groups_of(values.shapes)
    layers = _experts_by_layer(expert)
    module = OrderedDict((name, values.states["master"][name].bfloat16().view(values.shapes[name])) for name in dense)
    local = len(next(iter(layers.values()))) // ep
    model = _model_tree(form, module, values, world_size)
    model["num_experts"] = [local * ep] * len(layers)
    local_names = _local_names(expert, 0, local)
    shapes = values.shapes | {name: values.shapes[source] for name, source in local_names.items()}
    # Each shape is a tuple of its own, as DeepSpeed pickles it; `tuple(shape)` would be the same object.
    model["param_shapes"] = [OrderedDict((_own(n), (*shapes[n],)) for n in group) for group in (dense, local_names)]
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for number, experts in enumerate(layers.values()):
        for identity, names in enumerate(experts.values()):
            file = f"layer_{number}_expert_{identity}_mp_rank_00_model_states.pt"
            if experts_from is not None:
                _link(experts_from / file, folder / file, is_copied=False)
                continue
            weights = {n: values.states["master"][n].bfloat16().view(values.shapes[n]) for n in names}
            torch.save(weights, folder / file)
    optimizer = form.optimizer()
    state = optimizer["optimizer_state_dict"]
    state["partition_count"] = [world_size, world_size // ep]
    state["param_alignment_paddings"] = [[0] * len(dense), [0] * len(local_names)]
    dense_line = _line(values, dense, dense, world_size)
    sources = [list(_local_names(expert, first, local).values()) for first in range(0, local * ep, local)]
    lines = [_line(values, list(local_names), own, world_size // ep) for own in sources]
    for rank in range(world_size):
        _fill_zero2(state, values.step, [(rank, dense_line), (rank // ep, lines[rank % ep])])
        torch.save(optimizer, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _experts_by_layer(names: list[str]) -> dict[str, dict[int, list[str]]]:
    """Names of the experts' parameters, by layer and by the expert's number."""
    layers: dict[str, dict[int, list[str]]] = {}
    for name in names:
        layer, rest = name.split(EXPERT)
        layers.setdefault(layer, {}).setdefault(int(rest.split(".")[0]), []).append(name)
    return layers


def _local_names(names: list[str], first: int, count: int) -> dict[str, str]:
    """The names that an expert-parallel rank gives to its experts `first` and following, and their global names."""
    local = {}
    for name in names:
        layer, rest = name.split(EXPERT)
        number, weight = rest.split(".", 1)
        if first <= int(number) < first + count:
            local[f"{layer}{EXPERT}{int(number) - first}.{weight}"] = name
    return local
