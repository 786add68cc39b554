"""ZeRO stage 3: every parameter is cut by itself into ceil(numel / world_size) elements per rank.

A sub-group's flat tensor is its parameters' partitions one after the other, the last ranks' padding kept in
place (`runtime/zero/partition_parameters.py:1690-1702`, `runtime/zero/stage3.py:3431-3447`). Module files hold
placeholders; buffers are kept by every rank, frozen parameters as flat fragments.
"""

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few
from wsm_ds.layouts.layout import TableBuilder
from wsm_ds.layouts.rank_files import RankFiles, element_wise, require_numel
from wsm_ds.torchfile import Tensor, TorchFile


def place(builder: TableBuilder, files: RankFiles) -> None:
    """Adds every fragment of a stage 3 checkpoint to `builder`."""
    for rank, model in files.models.items():
        place_model(builder, files, model, rank)
    for rank, optim in files.optims.items():
        _place_optimizer(builder, files, optim, rank)


def place_model(builder: TableBuilder, files: RankFiles, model: TorchFile, rank: int) -> None:
    """Adds a rank's buffers and its fragments of frozen parameters."""
    numbers, file = files.numbers, files.indices[model.path]
    frozen = model.tree.get("frozen_param_fragments") or {}
    for name, info in files.tensors.items():
        if info.role == "parameter" or info.numel == 0:
            continue
        held = frozen.get(name) if info.role == "frozen" else (model.tree["module"] or {}).get(name)
        if not isinstance(held, Tensor):
            raise BrokenCheckpoint(f"{model.path} holds no {info.role} {name}, although rank 0's file does.")
        whole = info.role == "buffer"
        start, numel = (0, info.numel) if whole else partition(info.numel, rank, files.world_size)
        require_numel(model, name, held.numel, numel)
        offset, replica = model.byte_offset(held), rank if whole else 0
        builder.add(info.role, numbers[name], start, numel, file=file, offset=offset, dtype=held.dtype, replica=replica)


def partition(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, numel without padding) of a rank's part of a parameter."""
    size = -(-numel // world_size)
    start = min(rank * size, numel)
    return start, min(size, numel - start)


def _place_optimizer(builder: TableBuilder, files: RankFiles, optim: TorchFile, rank: int) -> None:
    state = optim.tree["optimizer_state_dict"]
    flats, subgroups = state["fp32_flat_groups"], files.models[0].tree["param_shapes"]
    if len(flats) != len(subgroups) or state["partition_count"] != files.world_size:
        raise BrokenCheckpoint(
            f"{optim.path}: {len(flats)} sub-groups cut in {state['partition_count']}, but the model file names "
            f"{len(subgroups)} and {files.world_size} ranks."
        )
    for number, names in enumerate(subgroups):
        states = state["optimizer_state_dict"]["state"].get(number, {})
        for kind, flat in {"master": flats[number], **element_wise(states, flats[number].numel)}.items():
            _place_subgroup(builder, files, optim, kind, flat, list(names), rank)


def _place_subgroup(
    builder: TableBuilder, files: RankFiles, optim: TorchFile, kind: str, flat: Tensor, names: list[str], rank: int
) -> None:
    numbers, file, what = files.numbers, files.indices[optim.path], f"{kind} of the sub-group of {few(names, 1)}"
    sizes = [-(-files.tensors[name].numel // files.world_size) for name in names]
    if flat.numel == 0 and any(sizes):
        raise UnsupportedLayout(
            f"{optim.path}: {what} is empty: it was offloaded to NVMe, which this version does not read."
        )
    require_numel(optim, what, flat.numel, sum(sizes))
    offset = optim.byte_offset(flat)
    for name, size in zip(names, sizes, strict=True):
        start, numel = partition(files.tensors[name].numel, rank, files.world_size)
        builder.add(kind, numbers[name], start, numel, file=file, offset=offset, dtype=flat.dtype)
        offset += size * flat.dtype.itemsize
