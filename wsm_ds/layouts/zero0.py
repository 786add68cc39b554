"""ZeRO stage 0: one model file holds everything, and the optimizer's tensors have no names.

In fp32 the module's weights are the masters. In 16 bits the masters lie beside them:

* FP16_Optimizer flattens a group, and the module's weights are views of the flat 16-bit copy, so their offsets name
  the masters' elements (`runtime/fp16/fused_optimizer.py:82-103`, `state_dict` :450).
* FP16_UnfusedOptimizer keeps one tensor for each parameter. Its shape and its rounded elements, which must be the
  module's, tell which parameter it is (`runtime/fp16/unfused_optimizer.py:68-88`, `state_dict` :335).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsm_ds.dtypes import narrow, widen
from wsm_ds.errors import UnsupportedLayout, few
from wsm_ds.layouts import schema
from wsm_ds.layouts.assembly import assemble
from wsm_ds.layouts.entries import entries_of
from wsm_ds.layouts.layout import Layout, NamedTensor, TableBuilder, TensorInfo
from wsm_ds.layouts.metadata import model_parallel_size
from wsm_ds.layouts.optimizer_states import SCALARS, problems_of_shaped, unnested
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.torchfile import Tensor, TorchFile
from wsm_ds.torchfile.strides import dense_axes

FIRST_BLOCK_NUMEL, LARGEST_BLOCK_NUMEL = 1 << 12, 1 << 20
"""Elements compared at a time: few at first, because most weights differ early; then many."""


@dataclass(frozen=True)
class NamedPiece:
    """A parameter inside flat tensors of the optimizer.

    Attributes:
        name: the parameter.
        position: its first element in each tensor of `kinds`.
        numel: its elements.
        kinds: the tensors that hold it, by kind.
        indivisible_states: its other optimizer states, as in `Layout`.
    """

    name: str
    position: int
    numel: int
    kinds: dict[str, Tensor]
    indivisible_states: dict[str, str]


class View(NamedTuple):
    """Where a weight begins in its storage, in elements, and its name."""

    start: int
    name: str


@dataclass(frozen=True)
class Optimizer:
    """The parameters and the optimizer of a stage 0 file.

    Attributes:
        tensors: parameters, frozen ones, buffers.
        aliases: tied names, with the name that each stands for.
        pieces: the parameters in the optimizer's tensors; empty if nothing shows which is which.
        groups: `param_groups`.
        module_is_master: whether the module's weights are the masters (fp32).
        has_nameless_states, extra_states, opaque: as in `Layout`.
    """

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    pieces: tuple[NamedPiece, ...]
    groups: list[dict[str, Any]]
    module_is_master: bool
    has_nameless_states: bool
    extra_states: tuple[str, ...]
    opaque: dict[str, str]


def read(checkpoint: Checkpoint, model: TorchFile) -> Layout:
    """Reads a checkpoint of ZeRO stage 0.

    Args:
        checkpoint: the folder to read.
        model: its model file, opened.

    Raises:
        BrokenCheckpoint, UnsupportedLayout: as `read_optimizer`.
    """
    if model_parallel_size(model.tree) > 1:
        raise UnsupportedLayout(
            f"{checkpoint.path} is model-parallel at stage 0, which this version does not read. Train with ZeRO "
            "stage 1, which writes the parameters' names."
        )
    optimizer = read_optimizer(model)
    world_size = int(model.tree["dp_world_size"])
    files = RankFiles(
        {0: model},
        {},
        {model.path: 0},
        optimizer.tensors,
        optimizer.aliases,
        world_size,
        extra_states=optimizer.extra_states,
        opaque=optimizer.opaque,
    )
    builder = TableBuilder()
    add_fragments(builder, model, optimizer)
    return assemble(
        checkpoint,
        [files],
        builder,
        stage=0,
        file_names=(model.path.name,),
        groups=optimizer.groups,
        has_nameless_states=optimizer.has_nameless_states,
    )


def read_optimizer(file: TorchFile) -> Optimizer:
    """Finds the parameters in the optimizer's tensors.

    If the structure of the file does not show them, it compares elements until only one weight fits.

    Raises:
        BrokenCheckpoint: the file is not what DeepSpeed writes.
        UnsupportedLayout: a master fits no parameter, or several; they are named.
    """
    state, module = file.tree["optimizer"], file.tree["module"]
    schema.check(file, state, schema.Flats if "optimizer_state_dict" in state else schema.Base, "optimizer")
    buffer_names = set(file.tree.get("buffer_names") or ())
    entries = entries_of(module, buffer_names)
    buffers = {name: tensor for name, tensor in entries.tensors.items() if name in buffer_names}
    weights, aliases = _owners({n: tensor for n, tensor in entries.tensors.items() if n not in buffer_names})
    base = state.get("optimizer_state_dict", state)
    if "fp32_groups_flat" in state:
        pieces = tuple(_fused_pieces(file, state["fp32_groups_flat"], base, weights))
    elif "fp32_groups" in state:
        pieces = tuple(_unfused_pieces(file, state["fp32_groups"], base, weights))
    else:
        pieces = tuple(_pieces_by_order(base, weights))
    # In fp32 DeepSpeed saves the torch optimizer itself; its 16-bit wrappers save it under `optimizer_state_dict`.
    module_is_master = base is state
    trained = set(weights) if module_is_master else {piece.name for piece in pieces}
    # Elements are numbered as the masters store them. Those of the 16-bit wrappers are in row-major order.
    axes = {
        n: None if n in trained and not module_is_master else dense_axes(t.shape, t.stride) for n, t in weights.items()
    }
    tensors = {n: TensorInfo(t.shape, t.dtype, "parameter", axes[n]) for n, t in weights.items() if n in trained}
    tensors |= {n: TensorInfo(t.shape, t.dtype, "frozen", axes[n]) for n, t in weights.items() if n not in trained}
    tensors |= {n: TensorInfo(t.shape, t.dtype, "buffer", dense_axes(t.shape, t.stride)) for n, t in buffers.items()}
    return Optimizer(
        tensors,
        aliases,
        pieces,
        list(base["param_groups"]),
        module_is_master,
        bool(base["state"]) and not pieces,
        entries.extra_states,
        entries.opaque,
    )


def add_fragments(builder: TableBuilder, file: TorchFile, optimizer: Optimizer) -> None:
    """Adds every fragment of a stage 0 checkpoint to `builder`; its only file has number 0."""
    numbers = {name: number for number, name in enumerate(optimizer.tensors)}
    kind_of_role = {"parameter": "master" if optimizer.module_is_master else "module"}
    for name, info in optimizer.tensors.items():
        stored: Tensor = file.tree["module"][name]
        kind = kind_of_role.get(info.role, info.role)
        builder.add_whole(kind, numbers[name], NamedTensor(name, stored, file), info.axes, file=0)
    for piece in optimizer.pieces:
        builder.indivisible_states |= piece.indivisible_states
        for kind, tensor in piece.kinds.items():
            if tensor.numel == piece.numel:
                axes = (
                    optimizer.tensors[piece.name].axes if tensor.shape == optimizer.tensors[piece.name].shape else None
                )
                named = NamedTensor(f"{kind} of {piece.name}", tensor, file)
                builder.add_whole(kind, numbers[piece.name], named, axes, file=0)
                continue
            offset = file.byte_offset(tensor) + piece.position * tensor.dtype.itemsize
            builder.add(kind, numbers[piece.name], 0, piece.numel, file=0, offset=offset, dtype=tensor.dtype)


def _owners(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under the first name of each, and the other names of tied ones."""
    first_names: dict[tuple[str, int, tuple[int, ...], tuple[int, ...]], str] = {}
    aliases = {}
    for name, tensor in weights.items():
        owner = first_names.setdefault((tensor.storage.key, tensor.offset, tensor.shape, tensor.stride), name)
        if owner != name and tensor.numel:
            aliases[name] = owner
    return {name: tensor for name, tensor in weights.items() if name not in aliases}, aliases


def _piece(name: str, numel: int, base: dict[str, Any], number: int, tensor: Tensor, **master: Tensor) -> NamedPiece:
    """A parameter that begins at element 0 of `tensor`, the optimizer's tensor of that number, and its states."""
    states = base["state"].get(number, {})
    problems = problems_of_shaped(states, tensor.shape)
    element_wise = {
        kind: value
        for kind, value in unnested(states).items()
        if isinstance(value, Tensor) and value.shape == tensor.shape and kind not in {*problems, *SCALARS}
    }
    return NamedPiece(name, 0, numel, master | element_wise, problems)


def _fused_pieces(
    file: TorchFile, flats: list[Tensor], base: dict[str, Any], weights: dict[str, Tensor]
) -> Iterator[NamedPiece]:
    """FP16_Optimizer: the views of the module's storage that equals a flat master, rounded, are the parameters."""
    views_by_storage: dict[str, list[View]] = {}
    for name, tensor in weights.items():
        views_by_storage.setdefault(tensor.storage.key, []).append(View(tensor.offset, name))
    pending = {key: sorted(views) for key, views in views_by_storage.items()}
    for number, flat in enumerate(flats):
        first_weights = {
            key: weights[views[0].name]
            for key, views in pending.items()
            if _has_no_gaps(views, weights) and sum(weights[name].numel for _, name in views) == flat.numel
        }
        candidates = _candidates(file, flat, first_weights)
        if len(candidates) != 1:
            problem = "fit no parameters" if not candidates else "fit several groups"
            raise UnsupportedLayout(
                f"{file.path}: the flat masters of group {number} {problem} of its module. Use ZeRO stage 1, which "
                "writes names."
            )
        for start, name in pending.pop(candidates[0]):
            yield replace(_piece(name, weights[name].numel, base, number, flat, master=flat), position=start)


def _has_no_gaps(views: list[View], weights: dict[str, Tensor]) -> bool:
    """Whether contiguous views follow each other without a gap from the storage's beginning."""
    end = 0
    for start, name in views:
        if start != end or not weights[name].is_contiguous:
            return False
        end += weights[name].numel
    return True


def _unfused_pieces(
    file: TorchFile, groups: list[list[Tensor]], base: dict[str, Any], weights: dict[str, Tensor]
) -> Iterator[NamedPiece]:
    """FP16_UnfusedOptimizer: finds the weight that equals each master, rounded, and has the same shape."""
    masters = [master for group in groups for master in group]
    candidates = []
    for number, master in enumerate(masters):
        same_shape = {name: weight for name, weight in weights.items() if weight.shape == master.shape}
        candidates.append(_candidates(file, master, same_shape))
        if not candidates[-1]:
            raise UnsupportedLayout(
                f"{file.path}: master {number} of shape {list(master.shape)} fits no parameter of its module; were the "
                "weights replaced without their masters (load_optimizer_states=False)?"
            )
    group_of_master = [number for number, group in enumerate(groups) for _ in group]
    for number, name in enumerate(_one_name_each(file, candidates, group_of_master, list(weights))):
        master = masters[number]
        yield _piece(name, master.numel, base, number, master, master=master)


def _one_name_each(
    file: TorchFile, candidates: list[list[str]], group_of_master: list[int], module_order: list[str]
) -> list[str]:
    """Chooses one name for each master.

    Weights can be equal in every rounded element (norms that are still 1.0 in bf16). Their order then decides, if they
    belong to one group and the other weights show that the groups keep the module's order.

    Args:
        file: the model file, for the message.
        candidates: names that each master may have.
        group_of_master: each master's parameter group.
        module_order: names of all weights, in the module's order.

    Raises:
        UnsupportedLayout: their order does not decide; the message has the names.
    """
    positions = {name: position for position, name in enumerate(module_order)}
    names = []
    for number, of_master in enumerate(candidates):
        alike = [other for other, of_other in enumerate(candidates) if of_other == of_master]
        if len(alike) != len(of_master) or len({group_of_master[other] for other in alike}) > 1:
            raise _ambiguous(file, number, of_master)
        names.append(of_master[alike.index(number)])
    if any(len(of_master) > 1 for of_master in candidates):
        for number in range(1, len(names)):
            previous = number - 1
            is_same_group = group_of_master[previous] == group_of_master[number]
            if is_same_group and positions[names[previous]] > positions[names[number]]:
                raise _ambiguous(file, *next((n, many) for n, many in enumerate(candidates) if len(many) > 1))
    return names


def _ambiguous(file: TorchFile, number: int, names: list[str]) -> UnsupportedLayout:
    return UnsupportedLayout(
        f"{file.path}: master {number} may be any of {few(names)}: they are equal once rounded, and the optimizer's "
        "groups do not keep the module's order. Train until they differ, or use ZeRO stage 1, which writes names."
    )


def _pieces_by_order(base: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[NamedPiece]:
    """fp32: states in the order of the weights, if one group holds all weights (`model.parameters()`); else none."""
    groups, names = base["param_groups"], list(weights)
    if len(groups) != 1 or len(groups[0]["params"]) != len(names):
        return
    pieces = [_piece(name, weights[name].numel, base, n, weights[name]) for n, name in enumerate(names)]
    # Either all parameters have states or none has. Otherwise the order of the group is not that of the module.
    if len({bool(piece.kinds or piece.indivisible_states) for piece in pieces}) == 1:
        yield from pieces


def _candidates(file: TorchFile, master: Tensor, weights: dict[str, Tensor]) -> list[str]:
    """The names of the weights that equal a master, rounded to their dtype.

    Reads block after block until one candidate remains, or to the end if several are equal. Each weight is compared
    over `master.numel` elements from its first one on, which may reach into the next views of its storage.
    """
    remaining, start, size = weights, 0, FIRST_BLOCK_NUMEL
    while remaining and start < master.numel and (len(remaining) > 1 or start == 0):
        numel = min(size, master.numel - start)
        block = widen(_elements(file, master, start, numel), master.dtype)
        rounded = {weight.dtype.name: narrow(block, weight.dtype) for weight in remaining.values()}
        remaining = {
            name: weight
            for name, weight in remaining.items()
            if np.array_equal(rounded[weight.dtype.name], _elements(file, weight, start, numel))
        }
        start, size = start + numel, LARGEST_BLOCK_NUMEL
    return list(remaining)


def _elements(file: TorchFile, tensor: Tensor, start: int, numel: int) -> NDArray[Any]:
    """Elements [start, start + numel) of a tensor, in row-major order."""
    storage, itemsize = tensor.dtype.storage, tensor.dtype.itemsize
    if tensor.is_contiguous:
        return np.fromfile(file.path, storage, numel, offset=file.byte_offset(tensor) + start * itemsize)
    runs = file.byte_runs("a weight", tensor)
    elements = np.arange(start, start + numel)
    offsets = runs.positions[elements // runs.numel] + elements % runs.numel * itemsize
    first = int(offsets.min())
    stored = np.fromfile(file.path, storage, (int(offsets.max()) - first) // itemsize + 1, offset=first)
    gathered: NDArray[Any] = stored[(offsets - first) // itemsize]
    return gathered
