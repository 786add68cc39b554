"""ZeRO stage 0: one model file holds everything, and the optimizer's tensors carry no names.

In fp32 the module's weights are the masters. Otherwise the masters lie beside them (`runtime/fp16/`): the fused
optimizer flattens a group and the module's weights are views of the flat 16-bit copy, so their places name the
elements; the unfused one keeps a tensor a parameter, which is told by its shape and by its rounded elements being
the module's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import narrow, widen
from wsm_ds.errors import UnsupportedLayout, few
from wsm_ds.layouts import schema
from wsm_ds.layouts.layout import TableBuilder, TensorInfo
from wsm_ds.torchfile import Tensor, TorchFile

FIRST_BLOCK_NUMEL, LARGEST_BLOCK_NUMEL = 1 << 12, 1 << 20
"""Elements compared at a time: few where most weights differ already, many where they are alike."""


@dataclass(frozen=True)
class Named:
    """A piece of an optimizer's tensors: `numel` elements from `start` of each of `kinds` are the parameter `name`."""

    name: str
    start: int
    numel: int
    kinds: dict[str, Tensor]


@dataclass(frozen=True)
class Optimizer:
    """What a stage 0 file says of its parameters. `named` is empty where only the module's weights have names."""

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    named: tuple[Named, ...]
    groups: list[dict[str, Any]]
    module_is_master: bool
    has_nameless_states: bool


def read_optimizer(file: TorchFile) -> Optimizer:
    """Names the optimizer's tensors. Where the structure does not say, reads as many elements as tell weights apart.

    Raises:
        UnsupportedLayout: a master is no parameter's, or may be any of several.
    """
    state, module = file.tree["optimizer"], file.tree["module"]
    schema.check(file, state, schema.Flats if "optimizer_state_dict" in state else schema.Base, "optimizer")
    buffers = set(file.tree.get("buffer_names") or ())
    weights, aliases = _owners({n: t for n, t in module.items() if isinstance(t, Tensor) and n not in buffers})
    base = state.get("optimizer_state_dict", state)
    if "fp32_groups_flat" in state:
        named = tuple(_fused(file, state["fp32_groups_flat"], base, weights))
    elif "fp32_groups" in state:
        named = tuple(_unfused(file, state["fp32_groups"], base, weights))
    else:
        named = tuple(_by_order(base, weights))
    module_is_master = base is state
    trained = set(weights) if module_is_master else {piece.name for piece in named}
    tensors = {n: TensorInfo(t.shape, t.dtype, "parameter") for n, t in weights.items() if n in trained}
    tensors |= {n: TensorInfo(t.shape, t.dtype, "frozen") for n, t in weights.items() if n not in trained}
    held = {n: tensor for n, tensor in module.items() if n in buffers and isinstance(tensor, Tensor)}
    tensors |= {n: TensorInfo(t.shape, t.dtype, "buffer") for n, t in held.items()}
    return Optimizer(
        tensors, aliases, named, list(base["param_groups"]), module_is_master, bool(base["state"]) and not named
    )


def place(builder: TableBuilder, file: TorchFile, optimizer: Optimizer) -> None:
    """Adds every fragment of a stage 0 checkpoint, whose only file is number 0."""
    numbers = {name: number for number, name in enumerate(optimizer.tensors)}
    kind_of_role = {"parameter": "master" if optimizer.module_is_master else "module"}
    for name, info in optimizer.tensors.items():
        held: Tensor = file.tree["module"][name]
        kind, offset = kind_of_role.get(info.role, info.role), file.byte_offset(held)
        builder.add(kind, numbers[name], 0, info.numel, file=0, offset=offset, dtype=held.dtype)
    for piece in optimizer.named:
        for kind, tensor in piece.kinds.items():
            offset = file.byte_offset(tensor) + piece.start * tensor.dtype.itemsize
            builder.add(kind, numbers[piece.name], 0, piece.numel, file=0, offset=offset, dtype=tensor.dtype)


def _owners(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights under the first name of each, and the other names of tied ones."""
    first: dict[tuple[str, int, tuple[int, ...]], str] = {}
    aliases = {}
    for name, tensor in weights.items():
        owner = first.setdefault((tensor.storage.key, tensor.offset, tensor.shape), name)
        if owner != name and tensor.numel:
            aliases[name] = owner
    return {name: tensor for name, tensor in weights.items() if name not in aliases}, aliases


def _states(base: dict[str, Any], number: int, like: Tensor) -> dict[str, Tensor]:
    """Optimizer states of parameter `number` that hold a value for each of its elements."""
    held = base["state"].get(number, {})
    return {kind: value for kind, value in held.items() if isinstance(value, Tensor) and value.shape == like.shape}


def _fused(file: TorchFile, flats: list[Tensor], base: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[Named]:
    views: dict[str, list[tuple[int, str]]] = {}
    for name, tensor in weights.items():
        views.setdefault(tensor.storage.key, []).append((tensor.offset, name))
    pending = {key: sorted(held) for key, held in views.items()}
    for number, flat in enumerate(flats):
        rows = {
            key: weights[held[0][1]]
            for key, held in pending.items()
            if _tiles(held, weights) and sum(weights[name].numel for _, name in held) == flat.numel
        }
        found = _rounded_to(file, flat, rows)
        if len(found) != 1:
            what = "are no parameters" if not found else "may be any of several groups"
            raise UnsupportedLayout(f"{file.path}: the flat masters of group {number} {what} of its module.")
        for start, name in pending.pop(found[0]):
            yield Named(name, start, weights[name].numel, {"master": flat, **_states(base, number, flat)})


def _tiles(views: list[tuple[int, str]], weights: dict[str, Tensor]) -> bool:
    """Whether views follow each other without gaps from the storage's beginning."""
    end = 0
    for start, name in views:
        if start != end:
            return False
        end += weights[name].numel
    return True


def _unfused(
    file: TorchFile, groups: list[list[Tensor]], base: dict[str, Any], weights: dict[str, Tensor]
) -> Iterator[Named]:
    masters = [master for group in groups for master in group]
    found = []
    for number, master in enumerate(masters):
        alike = {name: weight for name, weight in weights.items() if weight.shape == master.shape}
        found.append(_rounded_to(file, master, alike))
        if not found[-1]:
            raise UnsupportedLayout(
                f"{file.path}: master {number} of shape {list(master.shape)} is no parameter's of its module; were the "
                "weights replaced without their masters (load_optimizer_states=False)?"
            )
    group_of = [group for group, held in enumerate(groups) for _ in held]
    for number, name in enumerate(_told_apart(file, found, group_of, list(weights))):
        master = masters[number]
        yield Named(name, 0, master.numel, {"master": master, **_states(base, number, master)})


def _told_apart(file: TorchFile, found: list[list[str]], group_of: list[int], order: list[str]) -> list[str]:
    """One name for each master of those found for it.

    Weights that are alike in every rounded element (norms that are still 1.0 in bf16) are told apart by their order,
    if they are all of one group and every group keeps the module's `order`, as far as the other weights show.
    """
    places = {name: place for place, name in enumerate(order)}
    chosen = []
    for number, names in enumerate(found):
        same = [other for other, others in enumerate(found) if others == names]
        if len(same) != len(names) or len({group_of[other] for other in same}) > 1:
            raise _ambiguous(file, number, names)
        chosen.append(names[same.index(number)])
    if any(len(names) > 1 for names in found):
        for number in range(1, len(chosen)):
            before = number - 1
            if group_of[before] == group_of[number] and places[chosen[before]] > places[chosen[number]]:
                raise _ambiguous(file, *next((n, names) for n, names in enumerate(found) if len(names) > 1))
    return chosen


def _ambiguous(file: TorchFile, number: int, names: list[str]) -> UnsupportedLayout:
    return UnsupportedLayout(
        f"{file.path}: master {number} may be any of {few(names)}: they are alike once rounded, and the optimizer's "
        "groups do not keep the module's order. Train until they differ, or use ZeRO stage 1, which writes names."
    )


def _by_order(base: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[Named]:
    """fp32: one group of all parameters in the module's order, as `model.parameters()` gives it; else no names."""
    groups, order = base["param_groups"], list(weights)
    if len(groups) != 1 or len(groups[0]["params"]) != len(order):
        return
    pieces = [Named(name, 0, weights[name].numel, _states(base, n, weights[name])) for n, name in enumerate(order)]
    if all(bool(piece.kinds) == bool(pieces[0].kinds) for piece in pieces):
        yield from pieces


def _rounded_to(file: TorchFile, master: Tensor, weights: dict[str, Tensor]) -> list[str]:
    """Those of `weights` that a master, rounded, may be.

    Reads block after block until one is left, or all of those that are alike. A weight stands for `master.numel`
    elements from its own first one.
    """
    left, start, size = weights, 0, FIRST_BLOCK_NUMEL
    while left and start < master.numel and (len(left) > 1 or start == 0):
        numel = min(size, master.numel - start)
        held = widen(_elements(file, master, start, numel), master.dtype)
        rounded = {weight.dtype.name: narrow(held, weight.dtype) for weight in left.values()}
        left = {
            name: weight
            for name, weight in left.items()
            if np.array_equal(rounded[weight.dtype.name], _elements(file, weight, start, numel))
        }
        start, size = start + numel, LARGEST_BLOCK_NUMEL
    return list(left)


def _elements(file: TorchFile, tensor: Tensor, start: int, numel: int) -> NDArray[Any]:
    offset = file.byte_offset(tensor) + start * tensor.dtype.itemsize
    return np.fromfile(file.path, tensor.dtype.storage, numel, offset=offset)
