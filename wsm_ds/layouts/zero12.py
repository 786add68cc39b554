"""ZeRO stages 1 and 2, and BF16_Optimizer: flat partitions of each parameter group.

A group's parameters, flattened in `param_shapes` order, form one flat tensor, padded to equal partitions of P
elements; rank r owns [r·P, (r+1)·P). `param_slice_mappings` is not read: under `round_robin_gradients` it follows
another order than the partitions (`_link_all_hp_params`, `runtime/zero/stage_1_and_2.py:824`), while `param_shapes`
follows the partitions' (`_get_zero_param_shapes`, `runtime/engine.py:5448`).
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from wsm_ds.errors import BrokenCheckpoint, few
from wsm_ds.layouts.layout import NamedTensor, TableBuilder, TensorInfo
from wsm_ds.layouts.optimizer_states import FlatStates, StateForms, forms_of
from wsm_ds.layouts.rank_files import RankFiles, require_numel
from wsm_ds.torchfile import Tensor, TorchFile

MOMENTUM = "momentum_buffer"


class Piece(NamedTuple):
    """Elements [start, start + numel) of the parameter `name`, at element `position` of a flat partition."""

    name: str
    start: int
    numel: int
    position: int


def add_fragments(builder: TableBuilder, files: RankFiles) -> None:
    """Adds every fragment of a stage 1 or 2 checkpoint to `builder`.

    Raises:
        BrokenCheckpoint: the optimizer files contradict each other, or the model file. File and group are named.
    """
    add_module(builder, files)
    groups = files.models[0].tree["param_shapes"]
    partition_numels: dict[int, int] = {}
    for optim in files.optims.values():
        _require_group_count(optim, optim.tree["optimizer_state_dict"], len(groups))
    forms = forms_of(_flats(files))
    builder.indivisible_states |= forms.indivisible
    for rank, optim in files.optims.items():
        state = optim.tree["optimizer_state_dict"]
        for group, shapes in enumerate(groups):
            numel = _partition_numel(state, group)
            if numel != partition_numels.setdefault(group, numel):
                raise BrokenCheckpoint(
                    f"{optim.path}: partition {group} holds {numel} elements, that of rank 0 {partition_numels[group]}."
                )
            rank_pieces = _rank_pieces(files, optim, group, shapes, rank)
            _add_partition(builder, files, optim, group, rank_pieces, forms)


def _flats(files: RankFiles) -> Iterator[FlatStates]:
    """The optimizer's states of every partition, without Muon's momentum, which is that of whole parameters."""
    for optim in files.optims.values():
        state = optim.tree["optimizer_state_dict"]
        base = state["base_optimizer_state"]
        for group, master in enumerate(state["single_partition_of_fp32_groups"]):
            states = _states(state, group)
            if is_muon(base, group):
                states = {name: value for name, value in states.items() if name != MOMENTUM}
            # Elastic checkpoints trim the states as they trim the masters; others save them with the padding
            # (`_get_state_without_padding`, runtime/zero/stage_1_and_2.py:3338).
            yield FlatStates(states, master.numel if isinstance(base, list) else _partition_numel(state, group))


def _partition_numel(state: dict[str, Any], group: int) -> int:
    """Elements of a rank's partition, padding included.

    ZeRO trims the padding off the masters that it saves (`_get_groups_without_padding`,
    `runtime/zero/stage_1_and_2.py:3327`), BF16_Optimizer does not (`runtime/bf16_optimizer.py:633`).
    """
    stored: int = state["single_partition_of_fp32_groups"][group].numel
    # Only the ZeRO class writes `zero_stage`, so its absence shows BF16_Optimizer.
    return stored + int(state["group_paddings"][group]) if "zero_stage" in state else stored


def _rank_pieces(files: RankFiles, optim: TorchFile, group: int, shapes: dict[str, Any], rank: int) -> list[Piece]:
    """The pieces in a rank's partition of a parameter group."""
    state = optim.tree["optimizer_state_dict"]
    partition_numel = _partition_numel(state, group)
    share = files.experts.share(optim, group, shapes, rank, files.world_size)
    unknown = [name for name in share.names if name not in files.tensors]
    if unknown:
        raise BrokenCheckpoint(f"{optim.path}: group {group} holds {few(unknown)}, which no model file has.")
    alignments = state.get("param_alignment_paddings")
    alignment = alignments[group] if alignments else []
    expected = sum(files.tensors[name].numel for name in share.names) + sum(int(padding) for padding in alignment)
    require_numel(optim, f"parameter group {group}", partition_numel * share.count, expected)
    return list(pieces(share.names, alignment, files.tensors, share.index * partition_numel, partition_numel))


def _add_partition(
    builder: TableBuilder, files: RankFiles, optim: TorchFile, group: int, rank_pieces: list[Piece], forms: StateForms
) -> None:
    state, numbers, file = optim.tree["optimizer_state_dict"], files.tensor_numbers, files.indices[optim.path]
    masters = state["single_partition_of_fp32_groups"][group]
    states = _states(state, group)
    flats = {"master": masters, **forms.of(states)}
    pieces_by_kind = dict.fromkeys(flats, rank_pieces)
    if is_muon(state["base_optimizer_state"], group) and isinstance(states.get(MOMENTUM), Tensor):
        flats[MOMENTUM] = states[MOMENTUM]
        pieces_by_kind[MOMENTUM] = whole_parameters(rank_pieces, files.tensors)
    for kind, flat in flats.items():
        base = optim.byte_offset(flat)
        for name, start, numel, position in pieces_by_kind[kind]:
            require_numel(optim, f"{kind} of partition {group}", flat.numel, position + numel)
            offset = base + position * flat.dtype.itemsize
            builder.add(kind, numbers[name], start, numel, file=file, offset=offset, dtype=flat.dtype)


def is_muon(base: Any, group: int) -> bool:
    """Whether Muon updates a group.

    In stages 1 and 2 Muon keeps the momentum of whole parameters, on every rank whose partition they touch.

    Args:
        base: the base optimizer's state dict.
        group: number of the group.
    """
    return isinstance(base, dict) and bool(base["param_groups"][group].get("use_muon"))


def whole_parameters(pieces: Iterable[Piece], tensors: dict[str, TensorInfo]) -> list[Piece]:
    """The parameters that lie in a partition, whole or in part, laid out as whole ones one after the other.

    >>> from wsm_ds.dtypes import BY_NAME
    >>> info = TensorInfo((4,), BY_NAME["bf16"], "parameter")
    >>> whole_parameters([Piece("a", 2, 2, 0), Piece("b", 0, 1, 2)], {"a": info, "b": info})
    [Piece(name='a', start=0, numel=4, position=0), Piece(name='b', start=0, numel=4, position=4)]
    """
    whole_pieces, position = [], 0
    for name, *_ in pieces:
        whole_pieces.append(Piece(name, 0, tensors[name].numel, position))
        position += tensors[name].numel
    return whole_pieces


def _require_group_count(optim: TorchFile, state: dict[str, Any], groups: int) -> None:
    """Raises BrokenCheckpoint unless each list of the optimizer file has one entry per group of the model file."""
    base = state["base_optimizer_state"]
    lists = {name: state[name] for name in ("single_partition_of_fp32_groups", "partition_count", "group_paddings")}
    lists["base_optimizer_state"] = base if isinstance(base, list) else base["param_groups"]
    lists["param_alignment_paddings"] = state.get("param_alignment_paddings") or [[]] * groups
    for name, entries in lists.items():
        if len(entries) != groups:
            raise BrokenCheckpoint(
                f"{optim.path}: {name} has {len(entries)} entries, but the model file names {groups} parameter groups."
            )


def pieces(
    names: Iterable[str], alignment: list[int], tensors: dict[str, TensorInfo], first: int, size: int
) -> Iterator[Piece]:
    """Yields the parts of a group's parameters that lie in the partition [first, first + size) of its flat tensor.

    Args:
        names: the group's parameters in the order of the flat tensor.
        alignment: elements of padding after each parameter; missing ones are 0.
        tensors: shapes of the parameters.
        first: the partition's first element in the flat tensor.
        size: elements of the partition.

    >>> from wsm_ds.dtypes import BY_NAME
    >>> info = TensorInfo((4,), BY_NAME["bf16"], "parameter")
    >>> list(pieces(["a", "b"], [], {"a": info, "b": info}, 3, 3))
    [Piece(name='a', start=3, numel=1, position=0), Piece(name='b', start=0, numel=2, position=1)]
    """
    position = 0
    for index, name in enumerate(names):
        numel = tensors[name].numel
        begin, end = max(position, first), min(position + numel, first + size)
        if begin < end:
            yield Piece(name, begin - position, end - begin, begin - first)
        position += numel + (int(alignment[index]) if index < len(alignment) else 0)


def _states(state: dict[str, Any], group: int) -> dict[str, Any]:
    """The optimizer's states of a group, by the optimizer's own names; elastic checkpoints hold a list of groups."""
    base = state["base_optimizer_state"]
    states: dict[str, Any] = base[group] if isinstance(base, list) else base["state"].get(group, {})
    return states


def add_module(builder: TableBuilder, files: RankFiles) -> None:
    """Adds the whole tensors of the model file, and of the files that hold further weights, to `builder`.

    A tied name is added only where it has bytes of its own (DeepSpeed clones tensors when it saves experts).

    Raises:
        BrokenCheckpoint: a weight's shape is not that of `param_shapes`; file and tensor are named.
    """
    model = files.models[0]
    copies = further_copies(files, model)
    _add_weights(builder, files, model, [*(model.tree["module"] or {}).items(), *copies.items()])
    for weights in files.extra_weights:
        _add_weights(builder, files, weights.file, weights.tensors.items())


def _add_weights(
    builder: TableBuilder, files: RankFiles, source: TorchFile, weights: Iterable[tuple[str, Any]]
) -> None:
    kinds = {"parameter": "module", "frozen": "frozen", "buffer": "buffer"}
    numbers, file = files.tensor_numbers, files.indices[source.path]
    added: set[tuple[Any, ...]] = set()
    for name, value in weights:
        owner = files.aliases.get(name, name)
        if not isinstance(value, Tensor) or owner not in files.tensors:
            continue
        view = (owner, value.storage.key, value.offset, value.shape, value.stride)
        if view in added:
            continue
        added.add(view)
        info = files.tensors[owner]
        if value.shape != info.shape:
            raise BrokenCheckpoint(f"{source.path}: {name} has shape {value.shape}, param_shapes says {info.shape}.")
        builder.add_whole(kinds[info.role], numbers[owner], NamedTensor(name, value, source), info.axes, file=file)


def further_copies(files: RankFiles, model: TorchFile) -> dict[str, Any]:
    """Returns what a model file holds of parameters that were trained and later frozen, by name.

    They are in the optimizer, and also in `frozen_param_fragments` (`_get_zero_frozen_param_attributes`,
    `runtime/engine.py:5433`), from which DeepSpeed loads them.
    """
    fragments = model.tree.get("frozen_param_fragments") or {}
    return {n: value for n, value in fragments.items() if n in files.tensors and files.tensors[n].role == "parameter"}
