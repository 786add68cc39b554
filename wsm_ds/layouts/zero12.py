"""ZeRO stages 1 and 2, and BF16_Optimizer: flat partitions of each parameter group.

A group's parameters, flattened in `param_shapes` order, are one line of elements padded to equal partitions;
rank r owns [r·P, (r+1)·P). The order is that of `param_shapes`, never of `param_slice_mappings`, which is
wrong under `round_robin_gradients` (`runtime/zero/stage_1_and_2.py:824-850`, `runtime/engine.py:5463-5466`).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, few
from wsm_ds.layouts.layout import TableBuilder, TensorInfo
from wsm_ds.layouts.rank_files import RankFiles, element_wise, require_numel
from wsm_ds.torchfile import Tensor, TorchFile

MOMENTUM = "momentum_buffer"
Slice = tuple[str, int, int, int]
"""(fqn, start in the parameter, numel, position in the partition)."""


def place(builder: TableBuilder, files: RankFiles) -> None:
    """Adds every fragment of a stage 1 or 2 checkpoint to `builder`."""
    place_module(builder, files)
    groups = files.models[0].tree["param_shapes"]
    sizes: dict[int, int] = {}
    for rank, optim in files.optims.items():
        state = optim.tree["optimizer_state_dict"]
        _require_count(optim, state, len(groups))
        for number, shapes in enumerate(groups):
            part = files.experts.part(optim, number, shapes, rank, files.world_size)
            size = _partition_numel(optim, state, number)
            if size != sizes.setdefault(number, size):
                raise BrokenCheckpoint(
                    f"{optim.path}: partition {number} holds {size} elements, that of rank 0 {sizes[number]}."
                )
            alignment = (state.get("param_alignment_paddings") or [[]] * len(groups))[number]
            strange = [name for name in part.names if name not in files.tensors]
            if strange:
                raise BrokenCheckpoint(f"{optim.path}: group {number} holds {few(strange)}, which no model file has.")
            needed = sum(files.tensors[name].numel for name in part.names) + sum(int(padding) for padding in alignment)
            require_numel(optim, f"parameter group {number}", size * part.count, needed)
            pieces = list(slices(part.names, alignment, files.tensors, part.index * size, size))
            _place_partition(builder, files, optim, number, size, pieces)


def _partition_numel(optim: TorchFile, state: dict[str, Any], group: int) -> int:
    """Elements of a rank's partition with padding. ZeRO trims the padding off the masters, BF16_Optimizer does not."""
    held: int = state["single_partition_of_fp32_groups"][group].numel
    return held + int(state["group_paddings"][group]) if "zero_stage" in state else held


def _place_partition(
    builder: TableBuilder, files: RankFiles, optim: TorchFile, group: int, size: int, slices: list[Slice]
) -> None:
    state, numbers, file = optim.tree["optimizer_state_dict"], files.numbers, files.indices[optim.path]
    masters = state["single_partition_of_fp32_groups"][group]
    states = _states(state, group)
    flats = {"master": masters, **element_wise(states, masters.numel, size)}
    places = dict.fromkeys(flats, slices)
    if is_muon(state["base_optimizer_state"], group) and isinstance(states.get(MOMENTUM), Tensor):
        flats[MOMENTUM], places[MOMENTUM] = states[MOMENTUM], whole_parameters(slices, files.tensors)
    for kind, flat in flats.items():
        base = optim.byte_offset(flat)
        for name, start, numel, position in places[kind]:
            require_numel(optim, f"{kind} of partition {group}", flat.numel, position + numel)
            offset = base + position * flat.dtype.itemsize
            builder.add(kind, numbers[name], start, numel, file=file, offset=offset, dtype=flat.dtype)


def is_muon(base: Any, group: int) -> bool:
    """Whether Muon updates a group: in stages 1 and 2 it keeps whole parameters' momentum on every rank they touch."""
    return isinstance(base, dict) and bool(base["param_groups"][group].get("use_muon"))


def whole_parameters(slices: list[Slice], tensors: dict[str, TensorInfo]) -> list[Slice]:
    """The parameters that lie in a partition, wholly or partly, one after the other and whole."""
    wholes, position = [], 0
    for name, *_ in slices:
        wholes.append((name, 0, tensors[name].numel, position))
        position += tensors[name].numel
    return wholes


def _require_count(optim: TorchFile, state: dict[str, Any], groups: int) -> None:
    """Each list in an optimizer file that has an entry a group has as many as the model file names groups."""
    base = state["base_optimizer_state"]
    lists = {name: state[name] for name in ("single_partition_of_fp32_groups", "partition_count", "group_paddings")}
    lists["base_optimizer_state"] = base if isinstance(base, list) else base["param_groups"]
    lists["param_alignment_paddings"] = state.get("param_alignment_paddings") or [[]] * groups
    for name, held in lists.items():
        if len(held) != groups:
            raise BrokenCheckpoint(
                f"{optim.path}: {name} has {len(held)} entries, but the model file names {groups} parameter groups."
            )


def slices(
    shapes: Iterable[str], alignment: list[int], tensors: dict[str, TensorInfo], first: int, size: int
) -> Iterator[Slice]:
    """What of a group's parameters lies in [first, first + size)."""
    position = 0
    for index, name in enumerate(shapes):
        numel = tensors[name].numel
        begin, end = max(position, first), min(position + numel, first + size)
        if begin < end:
            yield name, begin - position, end - begin, begin - first
        position += numel + (int(alignment[index]) if index < len(alignment) else 0)


def _states(state: dict[str, Any], group: int) -> dict[str, Any]:
    """The optimizer's states of a group, by the optimizer's own names."""
    base = state["base_optimizer_state"]
    held: dict[str, Any] = base[group] if isinstance(base, list) else base["state"].get(group, {})
    return held


def place_module(builder: TableBuilder, files: RankFiles) -> None:
    """Whole tensors of the model file and of those beside it; a tied name counts only where it has own bytes."""
    model = files.models[0]
    _place_weights(builder, files, model, model.tree["module"] or {})
    for weights in files.beside:
        _place_weights(builder, files, weights.file, weights.tensors)


def _place_weights(builder: TableBuilder, files: RankFiles, model: TorchFile, weights: dict[str, Any]) -> None:
    kinds = {"parameter": "module", "frozen": "frozen", "buffer": "buffer"}
    numbers, file = files.numbers, files.indices[model.path]
    placed: set[int] = set()
    for name in sorted(weights, key=lambda name: name in files.aliases):
        value, owner = weights[name], files.aliases.get(name, name)
        if not isinstance(value, Tensor) or owner not in files.tensors:
            continue
        offset = model.byte_offset(value)
        if name in files.aliases and offset in placed:
            continue
        placed.add(offset)
        info = files.tensors[owner]
        if value.shape != info.shape:
            raise BrokenCheckpoint(f"{model.path}: {name} has shape {value.shape}, param_shapes says {info.shape}.")
        builder.add(kinds[info.role], numbers[owner], 0, value.numel, file=file, offset=offset, dtype=value.dtype)
