"""ZeRO stage 3: every parameter is cut by itself into ceil(numel / world_size) elements for each rank.

A sub-group's flat tensor is the partitions of its parameters one after the other; the padding of the last ranks stays
in place (`_aligned_size`, `runtime/zero/partition_parameters.py:1690`; `_rigid_state_dict`,
`runtime/zero/stage3.py:3431`). Module files hold empty tensors for the parameters, every rank's copy of the
buffers, and in `frozen_param_fragments` the rank's partition of each frozen parameter.
"""

from collections.abc import Iterator

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts import zero12
from wsm_ds.layouts.element_order import reordered
from wsm_ds.layouts.layout import NamedTensor, TableBuilder
from wsm_ds.layouts.optimizer_states import FlatStates, StateForms, forms_of
from wsm_ds.layouts.rank_files import RankFiles, require_numel
from wsm_ds.torchfile import Tensor, TorchFile


def add_fragments(builder: TableBuilder, files: RankFiles) -> None:
    """Adds every fragment of a stage 3 checkpoint to `builder`.

    Raises:
        BrokenCheckpoint: a rank's file lacks elements, or contradicts the model file. File and tensor are named.
        UnsupportedLayout: masters are on NVMe.
    """
    for rank, model in files.models.items():
        add_model(builder, files, model, rank)
    for optim in files.optims.values():
        _require_subgroups(files, optim)
    forms = forms_of(_flats(files))
    builder.indivisible_states |= forms.indivisible
    for rank, optim in files.optims.items():
        _add_optimizer(builder, files, optim, rank, forms)


def add_model(builder: TableBuilder, files: RankFiles, model: TorchFile, rank: int) -> None:
    """Adds a rank's buffers and its fragments of frozen parameters to `builder`.

    What ZeRO has not partitioned is whole in the module of every rank: parameters that were added to the model after
    the engine was made, and tensors that a hook of the module saves.

    Raises:
        BrokenCheckpoint: one of them is missing or too short; file and tensor are named.
    """
    numbers, file = files.tensor_numbers, files.indices[model.path]
    fragments, module = model.tree.get("frozen_param_fragments") or {}, model.tree["module"] or {}
    for name, info in files.tensors.items():
        if info.role == "parameter" or info.numel == 0:
            continue
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


def _flats(files: RankFiles) -> Iterator[FlatStates]:
    """The optimizer's states of every rank's partition of every sub-group."""
    for optim in files.optims.values():
        state = optim.tree["optimizer_state_dict"]
        for number, master in enumerate(state["fp32_flat_groups"]):
            yield FlatStates(state["optimizer_state_dict"]["state"].get(number, {}), master.numel)


def _add_optimizer(builder: TableBuilder, files: RankFiles, optim: TorchFile, rank: int, forms: StateForms) -> None:
    state = optim.tree["optimizer_state_dict"]
    flats, subgroups = state["fp32_flat_groups"], files.models[0].tree["param_shapes"]
    # DeepSpeed sets one flat tensor per sub-group as the only parameter of its optimizer group while it saves, so the
    # states have the numbers of sub-groups (`_set_fp32_optimizer_param_groups`, runtime/zero/stage3.py:3442).
    for number, names in enumerate(subgroups):
        states = state["optimizer_state_dict"]["state"].get(number, {})
        for kind, flat in {"master": flats[number], **forms.of(states)}.items():
            _add_subgroup(builder, files, optim, kind, flat, list(names), rank)


def _add_subgroup(
    builder: TableBuilder, files: RankFiles, optim: TorchFile, kind: str, flat: Tensor, names: list[str], rank: int
) -> None:
    numbers, file, flat_name = (
        files.tensor_numbers,
        files.indices[optim.path],
        f"{kind} of the sub-group of {few(names, 1)}",
    )
    # Every rank saves the full partition size, also the last ranks, whose partitions are partly padding.
    partition_numels = [-(-files.tensors[name].numel // files.world_size) for name in names]
    if flat.numel == 0 and any(partition_numels):
        raise UnsupportedLayout(
            f"{optim.path}: {flat_name} is empty: it was offloaded to NVMe, which this version does not read."
        )
    require_numel(optim, flat_name, flat.numel, sum(partition_numels))
    offset = optim.byte_offset(flat)
    for name, partition_numel in zip(names, partition_numels, strict=True):
        start, numel = partition(files.tensors[name].numel, rank, files.world_size)
        builder.add(kind, numbers[name], start, numel, file=file, offset=offset, dtype=flat.dtype)
        offset += partition_numel * flat.dtype.itemsize
