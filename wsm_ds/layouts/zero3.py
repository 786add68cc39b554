"""ZeRO stage 3: every parameter is cut by itself into ceil(numel / world_size) elements for each rank.

A sub-group's flat tensor is the partitions of its parameters one after the other; the padding of the last ranks stays
in place (`_aligned_size`, `runtime/zero/partition_parameters.py:1690`; `_rigid_state_dict`,
`runtime/zero/stage3.py:3431`). Module files hold empty tensors for the parameters, every rank's copy of the
buffers, and in `frozen_param_fragments` the rank's partition of each frozen parameter.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from wsm_ds.dtypes import CODES
from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts import zero12
from wsm_ds.layouts.element_order import reordered
from wsm_ds.layouts.fragments import EvenPartitions
from wsm_ds.layouts.layout import NamedTensor, TableBuilder
from wsm_ds.layouts.optimizer_states import FlatStates, StateForms, forms_of
from wsm_ds.layouts.rank_files import RankFiles, distinct, require_numel
from wsm_ds.torchfile import Tensor, TorchFile


def add_fragments(builder: TableBuilder, files: RankFiles) -> None:
    """Adds every fragment of a stage 3 checkpoint to `builder`.

    Raises:
        BrokenCheckpoint: a rank's file lacks elements, or contradicts the model file. File and tensor are named.
        UnsupportedLayout: masters are on NVMe.
    """
    for rank, model in files.models.items():
        add_model(builder, files, model, rank)
    optims = distinct(files.optims.values())
    for optim in optims:
        _require_subgroups(files, optim)
    forms = forms_of(_flats(optims))
    builder.indivisible_states |= forms.indivisible
    _add_partitions(builder, files, forms)


def add_model(builder: TableBuilder, files: RankFiles, model: TorchFile, rank: int) -> None:
    """Adds a rank's buffers and its fragments of frozen parameters to `builder`.

    What ZeRO has not partitioned is whole in the module of every rank: parameters that were added to the model after
    the engine was made, and tensors that a hook of the module saves.

    Raises:
        BrokenCheckpoint: one of them is missing or too short; file and tensor are named.
    """
    numbers, file = files.tensor_numbers, files.indices[model.path]
    fragments, module = model.tree.get("frozen_param_fragments") or {}, model.tree["module"] or {}
    for name, info in files.untrained:
        is_whole = info.role == "buffer" or name not in (files.models[0].tree.get("frozen_param_shapes") or {})
        stored = (module if is_whole else fragments).get(name)
        if not isinstance(stored, Tensor):
            raise BrokenCheckpoint(f"{model.path} holds no {info.role} {name}, although rank 0's file does.")
        if not is_whole:
            _add_partition(builder, files, model, info.role, name, stored, rank)
            continue
        if stored.shape != info.shape:
            raise BrokenCheckpoint(
                f"{model.path}: {name} has shape {list(stored.shape)}, in rank 0's file {list(info.shape)}."
            )
        # These are not partitioned and may differ between ranks, so each rank's copy is kept.
        whole = NamedTensor(name, stored, model)
        builder.add_whole(info.role, numbers[name], whole, info.axes, file=file, replica=rank)
    for name, stored in zero12.further_copies(files, model).items():
        _add_partition(builder, files, model, "module", name, stored, rank)


def _add_partition(
    builder: TableBuilder, files: RankFiles, model: TorchFile, kind: str, name: str, stored: Tensor, rank: int
) -> None:
    """Adds a rank's partition of a parameter that a model file holds."""
    start, numel = partition(files.tensors[name].numel, rank, files.world_size)
    require_numel(model, name, stored.numel, numel)
    number, file, info = files.tensor_numbers[name], files.indices[model.path], files.tensors[name]
    if info.axes is None:
        builder.add(kind, number, start, numel, file=file, offset=model.byte_offset(stored), dtype=stored.dtype)
        return
    # A partition is cut from the row-major order, also of a tensor that another stage stores in another order.
    row_major = TableBuilder()
    row_major.add(kind, number, start, numel, file=file, offset=model.byte_offset(stored), dtype=stored.dtype)
    for table in row_major.tables().values():
        builder.add_table(kind, reordered(table, name, info.shape, None, info.axes))


def partition(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns (start, numel without padding) of a rank's partition of a parameter.

    >>> [partition(5, rank, 4) for rank in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    size = -(-numel // world_size)
    start = min(rank * size, numel)
    return start, min(size, numel - start)


def _require_subgroups(files: RankFiles, optim: TorchFile) -> None:
    state = optim.tree["optimizer_state_dict"]
    flats, subgroups = state["fp32_flat_groups"], files.models[0].tree["param_shapes"]
    if len(flats) != len(subgroups) or state["partition_count"] != files.world_size:
        raise BrokenCheckpoint(
            f"{optim.path} holds {len(flats)} sub-groups cut for {state['partition_count']} ranks, but the model file "
            f"names {len(subgroups)} sub-groups and {files.world_size} ranks."
        )


def _flats(optims: Iterable[TorchFile]) -> Iterator[FlatStates]:
    """The optimizer's states of every partition of every sub-group."""
    for optim in optims:
        state = optim.tree["optimizer_state_dict"]
        for number, master in enumerate(state["fp32_flat_groups"]):
            yield FlatStates(state["optimizer_state_dict"]["state"].get(number, {}), master.numel)


class _Flat(NamedTuple):
    """A flat tensor of a rank: its kind, the number of its sub-group, its dtype's code and its byte offset."""

    kind: str
    number: int
    dtype: int
    offset: int


def _add_partitions(builder: TableBuilder, files: RankFiles, forms: StateForms) -> None:
    """Adds the masters and the optimizer's states of all ranks: a rule for each kind and sub-group."""
    flats_by_form: dict[int, list[_Flat]] = {}
    members: dict[tuple[str, int, int], list[tuple[int, int, int]]] = {}
    for rank, optim in files.optims.items():
        if id(optim.memo) not in flats_by_form:
            flats_by_form[id(optim.memo)] = _flats_of(files, optim, forms)
        for kind, number, dtype, offset in flats_by_form[id(optim.memo)]:
            members.setdefault((kind, number, dtype), []).append((rank, files.indices[optim.path], offset))
    for (kind, number, dtype), rows in members.items():
        names = list(files.models[0].tree["param_shapes"][number])
        tensors = np.array([files.tensor_numbers[name] for name in names], dtype=np.int64)
        numels = np.array([files.tensors[name].numel for name in names], dtype=np.int64)
        ranks, numbers, offsets = np.array(rows, dtype=np.int64).T
        builder.add_rule(kind, EvenPartitions(tensors, numels, ranks, numbers, offsets, dtype, files.world_size))


def _flats_of(files: RankFiles, optim: TorchFile, forms: StateForms) -> list[_Flat]:
    """The flat tensors in a rank's optimizer file.

    Raises:
        BrokenCheckpoint: one of them is too short; file and sub-group are named.
        UnsupportedLayout: one of them is empty, because it is on NVMe.
    """
    state, flats = optim.tree["optimizer_state_dict"], []
    # DeepSpeed sets one flat tensor per sub-group as the only parameter of its optimizer group while it saves, so the
    # states have the numbers of sub-groups (`_set_fp32_optimizer_param_groups`, runtime/zero/stage3.py:3442).
    for number, names in enumerate(files.models[0].tree["param_shapes"]):
        states = state["optimizer_state_dict"]["state"].get(number, {})
        # Every rank saves the full partition size, also the last ranks, whose partitions are partly padding.
        needed = sum(-(-files.tensors[name].numel // files.world_size) for name in names)
        for kind, flat in {"master": state["fp32_flat_groups"][number], **forms.of(states)}.items():
            flat_name = f"{kind} of the sub-group of {few(list(names), 1)}"
            if flat.numel == 0 and needed:
                raise UnsupportedLayout(
                    f"{optim.path}: {flat_name} is empty: it was offloaded to NVMe, which this version does not read."
                )
            require_numel(optim, flat_name, flat.numel, needed)
            if needed:
                flats.append(_Flat(kind, number, CODES[flat.dtype.name], optim.byte_offset(flat)))
    return flats
