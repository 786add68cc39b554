"""Rank files of stage 1 and 2 for another number of ranks, before their elements are put in.

Each new rank file is rank 0's of the newest checkpoint with partitions of other lengths: its pickle is written anew
from inert stand-ins (so parameter groups keep their hyper-parameters), its flat tensors are empty, and the same
reader that reads checkpoints says where the elements belong. Partition rule: `runtime/zero/stage_1_and_2.py:387-443`.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.layouts import Layout, zero12
from wsm_ds.layouts.layout import Table, TableBuilder
from wsm_ds.layouts.rank_files import RankFiles, element_wise
from wsm_ds.plan import Base, Bytes, Copy, CrcField, Template, Zeros
from wsm_ds.torchfile import Archive, Global, Record, Stub, Tensor, TorchFile, open_torch_file
from wsm_ds.torchfile.repickle import repickle, storages
from wsm_ds.torchfile.unpickle import Storage
from wsm_ds.torchfile.zip_format import frame

FRAGMENT_ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")
ALIGNMENT = 2
"""DeepSpeed pads a group to a multiple of this times the world size (`nccl_start_alignment_factor`)."""


def resized(
    newest: Layout, first_input: int, world_size: int, allowed_globals: frozenset[str]
) -> tuple[list[Template], dict[str, Table]]:
    """Templates of the model file and of `world_size` optimizer files, and where each kind's elements belong in them.

    Raises:
        UnsupportedLayout: stage 3, or a partition order that depends on the world size.
    """
    _refuse(newest, allowed_globals)
    paths = [archive.path for archive in newest.archives]
    numbers = {path: first_input + index for index, path in enumerate(paths)}
    model_path = next(path for path in paths if path.name.endswith("model_states.pt"))
    optim_path = next(path for path in paths if path.name.endswith("optim_states.pt"))
    model = open_torch_file(model_path, allowed_globals)
    shapes = model.tree["param_shapes"]
    model.tree["dp_world_size"] = world_size
    built = [_rewritten(model, model_path.name, numbers[model_path], set())]
    for rank in range(world_size):
        optim = open_torch_file(optim_path, allowed_globals)
        empty = _resize(optim.tree["optimizer_state_dict"], shapes, newest, rank, world_size)
        name = optim_path.name.replace("zero_pp_rank_0_", f"zero_pp_rank_{rank}_")
        built.append(_rewritten(optim, name, numbers[optim_path], empty))
    files = [file for file, _ in built]
    indices = {file.path: index for index, file in enumerate(files)}
    builder = TableBuilder()
    optims = dict(enumerate(files[1:]))
    zero12.place(builder, RankFiles({0: files[0]}, optims, indices, newest.tensors, newest.aliases, world_size))
    return [template for _, template in built], builder.tables()


def _refuse(newest: Layout, allowed_globals: frozenset[str]) -> None:
    if newest.stage == 3:
        raise UnsupportedLayout(f"{newest.path} is stage 3; another world size is written for stages 1 and 2 only.")
    config = open_torch_file(newest.archives[0].path, allowed_globals).tree.get("ds_config") or {}
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        raise UnsupportedLayout(
            f"{newest.path} was saved with round_robin_gradients, whose order of parameters depends on the world size."
        )


def _resize(
    state: dict[str, Any], shapes: list[dict[str, Any]], newest: Layout, rank: int, world_size: int
) -> set[str]:
    """Cuts the partitions for `rank` of `world_size`; returns the keys of the storages that are to be filled."""
    empty: set[str] = set()
    if isinstance(state["base_optimizer_state"], list) or "zero_stage" not in state:
        raise UnsupportedLayout(
            f"{newest.path} is an elastic checkpoint or of BF16_Optimizer; another world size is not written for those."
        )
    for group, names in enumerate(shapes):
        alignment = (state.get("param_alignment_paddings") or [[]] * len(shapes))[group]
        numel = sum(newest.tensors[name].numel for name in names) + sum(int(padding) for padding in alignment)
        size = -(-numel // (ALIGNMENT * world_size)) * ALIGNMENT
        padding = max(0, min(size, (rank + 1) * size - numel))
        masters = state["single_partition_of_fp32_groups"]
        old = masters[group].numel
        masters[group] = _flat(masters[group], size - padding, empty)
        held = state["base_optimizer_state"]["state"].get(group, {})
        for name, value in element_wise(held, old).items():
            held[name] = _flat(value, size, empty)
        state["group_paddings"][group] = padding
        state["partition_count"][group] = world_size
        slices = zero12.slices(names, alignment, newest.tensors, rank * size, size)
        mapping = state["param_slice_mappings"][group]
        kind = next((stub.made_by for stub in mapping.values()), FRAGMENT_ADDRESS)
        state["param_slice_mappings"][group] = OrderedDict(
            (name, Stub(kind, (), state={"numel": count, "start": position}, is_new=True))
            for name, _, count, position in slices
        )
    return empty


def _flat(like: Tensor, numel: int, empty: set[str]) -> Tensor:
    """A contiguous vector of its own storage, to be filled."""
    old = like.storage
    storage = Storage(old.key, old.dtype, old.kind, old.location, numel)
    empty.add(f"data/{old.key}")
    arguments: tuple[Any, ...] = (storage, 0, (numel,), (1,), False, OrderedDict())
    return Tensor(storage, 0, (numel,), (1,), Stub(Global("torch._utils", "_rebuild_tensor_v2"), arguments))


def _rewritten(file: TorchFile, name: str, number: int, empty: set[str]) -> tuple[TorchFile, Template]:
    """The file with its changed tree: as it will be read, and as a template with zeros where elements belong."""
    data = repickle(file.tree)
    sizes = {f"data/{s.key}": s.numel * s.dtype.itemsize for s in storages(file.tree)}
    old = file.archive.records
    kept = [n for n in old if n in sizes or not n.startswith("data/")]
    lengths = {n: len(data) if n == "data.pkl" else sizes[n] if n in empty else old[n].nbytes for n in kept}
    placed = frame(file.archive.root, lengths)
    base: list[Base] = [Bytes(offset, literal) for offset, literal in placed.literals]
    for record in placed.records:
        if record.name == "data.pkl":
            base.append(Bytes(record.offset, data))
        elif record.name in empty:
            base.append(Zeros(record.offset, record.nbytes))
        else:
            base.append(Copy(record.offset, record.nbytes, number, old[record.name].offset))
    base.sort(key=lambda piece: piece.offset)
    crcs = tuple(CrcField(r.offset, r.nbytes, r.crc_offsets) for r in placed.records)
    records = {r.name: Record(r.name, r.offset, r.nbytes, 0, r.crc_offsets) for r in placed.records}
    archive = Archive(Path(name), placed.nbytes, file.archive.root, records)
    return TorchFile(archive, file.tree), Template(name, placed.nbytes, base, crcs)
